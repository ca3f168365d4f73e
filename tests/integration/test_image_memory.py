"""What the largest picture costs while it is decoded (FAULTS 46): a pod of 1 GiB must outlive two of them at once."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

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


def png(path: Path, width: int, height: int, *, depth: int, colour: int) -> Path:
    """A PNG that is written row by row: colour type 0 is grey, 4 grey and alpha, 6 RGBA."""
    samples = {0: 1, 4: 2, 6: 4}[colour]
    row = b"\0" + bytes(range(1, 1 + samples * depth // 8)) * width
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    return path


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
