"""Pictures that are small as files and large when they are decoded."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path


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
