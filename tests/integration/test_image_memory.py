"""What the largest picture costs while it is decoded (FAULTS 46): a pod of 1 GiB must outlive two of them at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    ran = subprocess.run(
        [sys.executable, "-c", DECODE, small, large], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(ran.stdout) < 400_000, "kB"
