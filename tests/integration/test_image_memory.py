"""What the largest picture costs while it is decoded (FAULTS 46): a pod of 1 GiB must outlive two of them at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from large_pictures import png

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


def _cost(small: Path, large: Path) -> int:
    """The memory that the large picture takes more than the small one, in kB."""
    ran = subprocess.run(
        [sys.executable, "-c", DECODE, small, large], capture_output=True, text=True, check=True, timeout=120
    )
    return int(ran.stdout)
