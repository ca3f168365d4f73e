"""Draws sample pictures: yellow flower heads on green against plain grass, each visibly stamped SAMPLE.

They stand in for photographs where none can be reached, so that the road can still be walked. What is learnt
from them says nothing about real lawns: every one says SAMPLE, and none ever shares a home folder with real
history.

    python infra/samples.py FOLDER [PER_CLASS]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

LABELS = ("dandelion", "grass")
SIZE = (275, 183)  # width, height: the median of the reference photographs
PER_CLASS = 100


def draw(folder: Path, per_class: int = PER_CLASS) -> Path:
    """Write `<folder>/<label>/<8 digits>.jpg`, the same bytes for the same number every time.

    Args:
        folder: made if missing; pictures that are already there are kept.
        per_class: pictures of each label, numbered from 0.

    Returns:
        The folder.
    """
    for label in LABELS:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            target = folder / label / f"{number:08}.jpg"
            if not target.exists():
                part = target.with_suffix(".part")
                part.write_bytes(picture(label, number))
                part.replace(target)
    return folder


def picture(label: str, number: int) -> bytes:
    """One JPEG of `label`; `number` seeds everything that varies in it."""
    rng = np.random.default_rng([LABELS.index(label), number])
    image = _lawn(rng)
    if label == "dandelion":
        for _ in range(int(rng.integers(1, 6))):
            _flower(image, rng)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1))))
    _stamp(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _lawn(rng: np.random.Generator) -> Image.Image:
    """Uneven green with blades on it; broad light and shade keep any two from being near-duplicates."""
    width, height = SIZE
    shade = rng.uniform(0.35, 1.25, size=(4, 6)).astype(np.float32)
    light = np.asarray(Image.fromarray(shade).resize(SIZE, Image.Resampling.BICUBIC))
    green = np.array([rng.uniform(45, 95), rng.uniform(110, 165), rng.uniform(25, 65)])
    pixels = light[..., None] * green + rng.normal(0, 9, size=(height, width, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(150, 350))):
        x, y, length = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(12, 45)
        lean, tone = rng.uniform(-14, 14), rng.uniform(0.5, 1.4)
        colour = tuple(int(c) for c in (green * tone).clip(0, 255))
        pen.line([(x, y), (x + lean / 2, y - length / 2), (x + lean, y - length)], fill=colour, width=2)
    return image


def _flower(image: Image.Image, rng: np.random.Generator) -> None:
    """A head of two rings of yellow petals."""
    width, height = SIZE
    x, y, radius = rng.uniform(25, width - 25), rng.uniform(25, height - 25), rng.uniform(14, 42)
    pen = ImageDraw.Draw(image)
    for ring, colour in ((1.0, (236, 190, 20)), (0.6, (252, 216, 60))):
        petals = int(rng.integers(18, 30))
        for angle in np.linspace(0, 2 * np.pi, petals, endpoint=False) + rng.uniform(0, 1):
            reach = radius * ring * rng.uniform(0.85, 1.1)
            tip = (x + reach * np.cos(angle), y + reach * np.sin(angle))
            pen.line([(x, y), tip], fill=colour, width=max(2, int(radius / 5)))


def _stamp(image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=22)
    left, top, right, bottom = pen.textbbox((6, 4), "SAMPLE", font=font)
    pen.rectangle((left - 4, top - 4, right + 4, bottom + 4), fill=(255, 255, 255))
    pen.text((6, 4), "SAMPLE", fill=(200, 0, 0), font=font)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    print(draw(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else PER_CLASS))
