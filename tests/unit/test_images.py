"""Pictures that are broken, huge, odd or hostile (FAULTS 1-8), and what a model sees of the good ones."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lawnwatch import images
from lawnwatch.errors import ImageError, ImageTooLarge, UnsupportedMedia

pytestmark = pytest.mark.unit
CAP = 50_000_000


def scene(width: int = 160, height: int = 120) -> Image.Image:
    """A picture whose four corners differ and whose content is smooth, so that JPEG hardly changes it."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    blue = 127 + 120 * np.sin(x / 9) * np.cos(y / 13)
    return Image.fromarray(np.dstack([red, green, blue]).astype(np.uint8))


def saved(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and holds none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + b"\0\0\1\0IDAT" + zlib.compress(b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!doctype html><img src=x>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"GIF89a" + saved(scene())[6:],
        saved(scene(), "GIF"),
        saved(scene(), "BMP"),
        saved(scene(), "TIFF"),
        b"PK\x03\x04" + saved(scene()),
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
    ],
    ids=["empty", "html", "svg", "eps", "gif-jpeg", "gif", "bmp", "tiff", "zip-jpeg", "wav"],
)
def test_01_only_jpeg_png_and_webp(data: bytes) -> None:
    for look in (images.inspect, images.decode):
        with pytest.raises(UnsupportedMedia):
            look(data, max_pixels=CAP)


@pytest.mark.parametrize("format", images.FORMATS)
@pytest.mark.parametrize("tenths", range(1, 10))
def test_02_truncated(format: str, tenths: int) -> None:
    data = saved(scene(), format)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(ImageError) as caught:
        images.decode(data[: len(data) * tenths // 10], max_pixels=CAP)
    assert caught.value.code == "corrupt"


def test_03_cmyk_becomes_rgb() -> None:
    rgb = images.decode(saved(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), quality=95), size=None, max_pixels=CAP)
    assert np.abs(rgb[20, 20].astype(int) - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_03_transparency_lies_on_white(mode: str) -> None:
    """Alpha channels, and the one transparent colour of a palette, grey or RGB PNG."""
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (16, 16), (90, 90, 90, 0))
        image.paste((0, 0, 0, 255), (8, 0, 16, 16))
        data = saved(image.convert(mode), "PNG")
    else:
        image = Image.new("RGB", (16, 16), (90, 90, 90))
        image.paste((0, 0, 0), (8, 0, 16, 16))
        image = image.quantize(2) if mode == "P" else image.convert(mode)
        data = saved(image, "PNG", transparency=image.getpixel((0, 0)))
    rgb = images.decode(data, size=None, max_pixels=CAP)
    assert rgb.shape == (16, 16, 3)
    assert rgb[8, 2].tolist() == [255, 255, 255]
    assert rgb[8, 12].tolist() == [0, 0, 0]


def test_03_half_transparent_black_is_mid_grey() -> None:
    half = saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    assert abs(int(images.decode(half, size=None, max_pixels=CAP)[0, 0, 0]) - 127) <= 1


def test_04_sixteen_bits_are_scaled() -> None:
    grey = Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16))
    assert set(images.decode(saved(grey, "PNG"), max_pixels=CAP).ravel().tolist()) == {156}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_05_all_orientations_give_the_same_pixels(orientation: int) -> None:
    upright = scene(90, 90)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    turned = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(turned, "PNG", exif=exif)
    assert np.array_equal(images.decode(data, max_pixels=CAP), images.decode(saved(upright, "PNG"), max_pixels=CAP))


def test_05_broken_exif_counts_as_upright() -> None:
    data = saved(scene(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f" + b"\xff" * 20)
    assert np.array_equal(images.decode(data, max_pixels=CAP), images.decode(saved(scene()), max_pixels=CAP))


def test_05_a_broken_tag_beside_the_orientation_is_no_fault() -> None:
    """A tag whose value cannot be written anew: Pillow's exif_transpose fails on it with struct.error."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHIHH", 0x011A, 3, 0, 0, 0)
    entries += struct.pack("<HHI4s", 0x8769, 2, 2, b"?\0\0\0") + struct.pack("<HHI4s", 0x0100, 2, 2, b"x\0\0\0")
    tiff = b"II*\0" + struct.pack("<IH", 8, 4) + entries + struct.pack("<I", 0)
    data = saved(scene(90, 60), "PNG", exif=tiff)
    turned = images.decode(saved(scene(90, 60).transpose(Image.Transpose.ROTATE_270), "PNG"), max_pixels=CAP)
    assert np.array_equal(images.decode(data, max_pixels=CAP), turned)


def test_06_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert images.decode(data, max_pixels=CAP)[100, 100].tolist() == [255, 0, 0]


def test_07_one_pixel_is_a_picture() -> None:
    assert images.decode(saved(Image.new("RGB", (1, 1), "lime"), "PNG"), max_pixels=CAP).shape == (224, 224, 3)


@pytest.mark.parametrize("side", [65_500, 30_000, 9_000])
def test_07_too_many_pixels_are_refused_by_the_header(side: int) -> None:
    for look in (images.inspect, images.decode):
        with pytest.raises(ImageTooLarge):
            look(png_header(side, side), max_pixels=CAP)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_07_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    bombs = {
        "png": saved(Image.new("L", (9000, 9000)), "PNG"),
        "webp": saved(Image.new("RGB", (9000, 9000)), "WEBP", lossless=True),
    }
    for name, data in bombs.items():
        bomb = tmp_path / name
        bomb.write_bytes(data)
        script = (
            "import sys, pathlib\nfrom lawnwatch import images\nfrom lawnwatch.errors import ImageTooLarge\n"
            "peak = lambda: int(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))\n"
            "data = pathlib.Path(sys.argv[1]).read_bytes()\nbefore = peak()\n"
            "try: images.decode(data, max_pixels=50_000_000)\nexcept ImageTooLarge: print(peak() - before)"
        )
        ran = subprocess.run([sys.executable, "-c", script, bomb], capture_output=True, text=True, check=True)
        assert int(ran.stdout) < 50_000, f"{name}: {ran.stdout} kB"


def test_07_too_many_bytes() -> None:
    data = saved(scene())
    assert images.inspect(data, max_pixels=CAP, max_bytes=len(data)).bytes == len(data)
    with pytest.raises(ImageTooLarge):
        images.inspect(data, max_pixels=CAP, max_bytes=len(data) - 1)


def test_08_flipped_bytes_are_pictures_or_image_errors() -> None:
    random_ = random.Random(17)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = scene(48, 36)
    alpha.putalpha(90)
    valid = [
        saved(scene(48, 36), exif=exif),
        saved(scene(48, 36), progressive=True),
        saved(alpha, "PNG"),
        saved(scene(48, 36).quantize(16), "PNG", transparency=3),
        saved(scene(48, 36), "WEBP"),
        saved(alpha, "WEBP", lossless=True, exif=exif),
    ]
    decoded = refused = 0
    for _ in range(2000):
        data = bytearray(random_.choice(valid))
        for _ in range(random_.randint(1, 8)):
            # Headers matter most: half of the flips go there.
            reach = len(data) if random_.random() < 0.5 else min(len(data), 200)
            data[random_.randrange(reach)] = random_.randrange(256)
        try:
            assert images.decode(bytes(data), max_pixels=1_000_000).shape == (224, 224, 3)
            decoded += 1
        except ImageError:
            refused += 1
    assert decoded > 100 and refused > 100


def test_inspect_reads_the_header() -> None:
    for format, extension in images.EXTENSIONS.items():
        data = saved(scene(), format)
        assert images.inspect(data, max_pixels=CAP) == images.ImageInfo(format, 160, 120, len(data))
        assert extension == images.MEDIA_TYPES[format].removeprefix("image/").replace("jpeg", "jpg")


def test_a_large_jpeg_decodes_at_a_smaller_scale_to_nearly_the_same_pixels() -> None:
    large = scene(2400, 1800)
    exact = np.asarray(large.resize((224, 224), Image.Resampling.BOX), dtype=int)
    rgb = images.decode(saved(large, quality=95), max_pixels=CAP)
    assert rgb.dtype == np.uint8 and rgb.flags.c_contiguous
    assert np.abs(rgb.astype(int) - exact).mean() < 2


def test_phash_is_near_for_copies_and_far_for_others(photos: Path) -> None:
    files = sorted(photos.glob("*/*.jpg"))[::10][:20]
    hashes = []
    for file in files:
        data = file.read_bytes()
        one = images.phash(images.decode(data, max_pixels=CAP))
        image = Image.open(file).convert("RGB")
        smaller = saved(image.resize((max(image.width // 2, 64), max(image.height // 2, 64))), quality=80)
        other = images.phash(images.decode(smaller, max_pixels=CAP))
        assert 0 <= one < 2**64
        assert (one ^ other).bit_count() <= 6, file
        hashes.append(one)
    apart = [(one ^ two).bit_count() for number, one in enumerate(hashes) for two in hashes[:number]]
    assert np.median(apart) > 20


def test_brightness_and_sharpness() -> None:
    assert images.brightness(np.zeros((9, 9, 3), np.uint8)) == 0
    assert images.brightness(np.full((9, 9, 3), 255, np.uint8)) == 1
    noise = np.random.default_rng(1).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    assert images.sharpness(noise) > 50 > images.sharpness(np.full((300, 200, 3), 99, np.uint8)) == 0


def test_a_thumbnail_keeps_the_aspect_ratio_the_orientation_and_never_enlarges() -> None:
    picture = Image.new("RGB", (1200, 400))
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    upright, turned = io.BytesIO(), io.BytesIO()
    picture.save(upright, "JPEG")
    picture.save(turned, "JPEG", exif=exif)
    assert images.thumbnail(upright.getvalue(), width=150, height=96, max_pixels=10**6).shape == (50, 150, 3)
    assert images.thumbnail(turned.getvalue(), width=150, height=96, max_pixels=10**6).shape == (96, 32, 3)
    assert images.thumbnail(turned.getvalue(), width=5000, height=5000, max_pixels=10**6).shape == (1200, 400, 3)
