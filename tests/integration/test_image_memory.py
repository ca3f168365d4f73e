"""What the largest pictures, and a network, cost in memory (FAULTS 7, 46): a pod must outlive them."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from large_pictures import png
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings

pytestmark = pytest.mark.integration

DECODE = """
import sys
from pathlib import Path
from lawnwatch import images
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
small, large = (Path(name).read_bytes() for name in sys.argv[1:])
images.decode(small, max_pixels=50_000_000)
before = peak()
images.decode(large, max_pixels=50_000_000)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("width", "height", "depth", "colour"),
    [(7142, 7000, 8, 6), (7142, 7000, 8, 4), (7142, 7000, 16, 0), (10_000_000, 5, 8, 6)],
    ids=["RGBA", "LA", "I;16", "five rows of RGBA"],
)
def test_46_the_largest_picture_fits_beside_another(
    tmp_path: Path, width: int, height: int, depth: int, colour: int
) -> None:
    small = png(tmp_path / "small", 20, 20, depth=depth, colour=colour)
    large = png(tmp_path / "large", width, height, depth=depth, colour=colour)
    assert _cost(small, large) < 400_000, "kB"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_46_so_does_the_largest_webp(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    Image.new("RGBA", (20, 20)).save(small, "WEBP")
    Image.new("RGBA", (5000, 5000), (10, 200, 30, 128)).save(large, "WEBP", method=0)
    assert _cost(small, large) < 400_000, "kB"


INGEST = """
import sys
from lawnwatch import ingest
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.store import open_store
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
settings = Settings.model_validate_json(sys.argv[1])
catalog, store = Catalog(settings), open_store(settings)
before = peak()
assert ingest.run(settings, catalog, store).stored == 8
print(peak() - before)
"""


class Page(http.server.BaseHTTPRequestHandler):
    """The same picture at every address, its last bytes apart."""

    picture = b""

    def do_GET(self) -> None:
        body = self.picture + self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_7_many_large_pictures_at_once_take_the_memory_of_two(tmp_path: Path) -> None:
    """Eight pictures of 24 megapixels, 0.5 MB as files, 170 MB each when they are decoded."""
    Page.picture = png(tmp_path / "large", 6000, 4000, depth=8, colour=6).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    settings = Settings(
        home=tmp_path / "home",
        fetch={"allow_cidrs": ["127.0.0.0/8"], "origin_map": {"https://photos.example/": base}},
    )
    catalog = Catalog(settings)
    catalog.migrate()
    for number in range(8):
        catalog.add(f"https://photos.example/{number}.png", "grass")
    given = settings.model_dump_json(include={"home", "fetch"})
    ran = subprocess.run([sys.executable, "-c", INGEST, given], capture_output=True, text=True, check=True, timeout=300)
    server.shutdown()
    assert int(ran.stdout) < 500_000, "kB"


def _cost(small: Path, large: Path) -> int:
    """The memory that the large picture takes more than the small one, in kB."""
    ran = subprocess.run(
        [sys.executable, "-c", DECODE, small, large], capture_output=True, text=True, check=True, timeout=120
    )
    return int(ran.stdout)


SCALE = """
import numpy as np
from lawnwatch import model
model.start(0, "cpu")
pictures = np.random.default_rng(0).integers(0, 255, (64, 224, 224, 3), np.uint8)
model.load_network(model.Weights("none", "none"), scale_on=pictures)
print(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_46_a_network_without_weights_fits_the_pod_of_a_training() -> None:
    ended = subprocess.run([sys.executable, "-c", SCALE], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout.split()[-1]) * 1024 < 2_500_000_000, "of 4 GB, beside what a training itself takes"
