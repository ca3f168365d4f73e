"""Pictures that are broken, huge, odd or hostile (FAULTS 1-8), and what a model sees of the good ones."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from lawnwatch import images
from lawnwatch.errors import ImageError, ImageTooLarge, TooManyPixels, UnsupportedMedia

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


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    """A PNG from its parts: colour type 0 is grey, 2 RGB, 4 grey and alpha; each row begins with a zero byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg_with(marker: int, content: bytes) -> bytes:
    """A JPEG with application segments that hold the content, as many as it takes."""
    data = saved(scene())
    name, content = content[:6], content[6:]
    parts = [name + content[start : start + 65_000] for start in range(0, len(content), 65_000)]
    segments = b"".join(struct.pack(">BBH", 0xFF, marker, len(part) + 2) + part for part in parts)
    return data[:2] + segments + data[2:]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims so many pixels."""
    data = saved(scene())
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def webp_of_size(width: int, height: int) -> bytes:
    """A lossless WebP of one colour, 34 bytes for any number of pixels: only the header's two times 14 bits differ."""
    data = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    at = data.index(b"\x2f", 20) + 1
    return data[:at] + struct.pack("<I", width - 1 | (height - 1) << 14) + data[at + 4 :]


def exif_bomb(size: int, tags: int) -> bytes:
    """A TIFF directory whose every tag claims the whole block as its value."""
    entries = b"".join(struct.pack("<HHII", 1000 + tag, 1, size - 8, 8) for tag in range(tags))
    head = b"II*\0" + struct.pack("<IH", 8, tags) + entries + b"\0\0\0\0"
    return head + b"x" * (size - len(head))


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
        saved(scene(), "JPEG2000"),
        saved(scene(), "PPM"),
        saved(scene(), "ICO"),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"<script>/*" + saved(scene()) + b"*/</script>",
        b"\n" + saved(scene(), "PNG"),
    ],
    ids=[
        "empty", "html", "svg", "eps", "gif-jpeg", "gif", "bmp", "tiff", "zip-jpeg", "wav", "jpeg2000", "ppm", "ico",
        "heic", "html-jpeg", "newline-png",
    ],
)  # fmt: skip
def test_01_only_jpeg_png_and_webp(data: bytes) -> None:
    for look in (images.inspect, images.decode):
        with pytest.raises(UnsupportedMedia):
            look(data, max_pixels=CAP)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "looks like HEIC"),
        (saved(scene(), "GIF"), "looks like GIF"),
        (saved(scene(), "TIFF"), "looks like TIFF"),
        (b"<!doctype html><img src=x>", "looks like a web page"),
        (b"nothing", "first bytes are 6e 6f 74 68 69 6e 67"),
    ],
)
def test_01_the_refusal_says_what_was_sent(data: bytes, said: str) -> None:
    with pytest.raises(UnsupportedMedia, match=said):
        images.inspect(data, max_pixels=CAP)


def test_01_what_follows_a_picture_is_not_looked_at() -> None:
    data = saved(scene())
    for polyglot in (data + b"<script>alert(1)</script>", data + b"PK\x03\x04"):
        assert np.array_equal(images.decode(polyglot, max_pixels=CAP), images.decode(data, max_pixels=CAP))


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})],
    ids=["jpeg", "progressive", "png", "webp", "webp-lossless"],
)
@pytest.mark.parametrize("tenths", range(1, 10))
def test_02_truncated(format: str, options: dict[str, bool], tenths: int) -> None:
    data = saved(scene(), format, **options)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(ImageError) as caught:
        images.decode(data[: len(data) * tenths // 10], max_pixels=CAP)
    assert caught.value.code == "corrupt"


@pytest.mark.parametrize("adobe", [True, False])
def test_03_cmyk_becomes_rgb(adobe: bool) -> None:
    """Inks as Adobe writes them, inverted; a file without Adobe's mark is taken to be so too, as browsers do."""
    inks = [(0, 255, 255, 0), (255, 0, 0, 0), (0, 0, 0, 128), (0, 0, 0, 0), (60, 120, 30, 60)]
    golden = [(255, 0, 0), (0, 255, 255), (127, 127, 127), (255, 255, 255), (149, 103, 172)]
    image = Image.new("CMYK", (16 * len(inks), 16))
    for number, ink in enumerate(inks):
        image.paste(ink, (16 * number, 0, 16 * number + 16, 16))
    data = saved(image, quality=100)
    at = data.index(b"\xff\xeeAdobe") if b"\xff\xeeAdobe" in data else data.index(b"\xff\xee\x00\x0eAdobe")
    if not adobe:
        data = data[:at] + data[at + 16 :]
    rgb = images.decode(data, size=None, max_pixels=CAP)
    assert np.abs(rgb[8, 8::16].astype(int) - golden).max() <= 2


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_03_golden_pixels_of_pictures_with_alpha(mode: str) -> None:
    """Colours (0, 0, 0), (200, 200, 200) and (40, 40, 40), at full, half (128) and no opacity: on white."""
    greys, alphas = [0, 200, 40], [255, 128, 0]
    golden = [[[grey] * 3 for grey in (0, 227, 255)]]
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putpalette([value for grey in greys for value in (grey, grey, grey)])
        image.putdata([0, 1, 2])
        data = saved(image, "PNG", transparency=bytes(alphas))
    else:
        both = np.array([[[*[grey] * (len(mode) - 1), alpha] for grey, alpha in zip(greys, alphas, strict=True)]])
        data = saved(Image.fromarray(both.astype(np.uint8), mode), "PNG")
    assert images.decode(data, size=None, max_pixels=CAP).tolist() == golden


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


@pytest.mark.parametrize("color", [0, 2, 4], ids=["grey", "rgb", "grey and alpha"])
def test_04_sixteen_bits_are_scaled(color: int) -> None:
    pixel = {0: [40_000], 2: [40_000] * 3, 4: [40_000, 65_535]}[color]
    row = b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * 9
    data = png(9, 9, row * 9, depth=16, color=color)
    assert set(images.decode(data, max_pixels=CAP).ravel().tolist()) == {156}


@pytest.mark.parametrize("format", images.FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_05_all_orientations_give_the_same_pixels(orientation: int, format: str) -> None:
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
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    rgb = images.decode(saved(turned, format, exif=exif, **options), max_pixels=CAP)
    expected = images.decode(saved(upright, format, **options), max_pixels=CAP)
    # JPEG's blocks begin at another edge of a turned picture; the other two are exact.
    assert np.abs(rgb.astype(int) - expected).max() <= (12 if format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16", "1", "CMYK"])
def test_46_in_tiles_or_whole_the_pixels_are_the_same(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(7).integers(0, 256, (45, 71, 4), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, :2].copy().view(np.uint16)[:, :, 0])
    else:
        image = Image.fromarray(noise, "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"transparency": 3} if mode == "P" else {}
    data = saved(image, "JPEG" if mode == "CMYK" else "PNG", exif=exif, **options)
    whole = images.decode(data, size=None, max_pixels=CAP)
    for pixels in (64, 71, 500):
        monkeypatch.setattr(images, "TILE_PIXELS", pixels)
        assert np.array_equal(images.decode(data, size=None, max_pixels=CAP), whole)


def test_04_every_sixteen_bit_grey_is_rounded_to_the_nearest_of_eight() -> None:
    greys = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    rgb = images.decode(saved(Image.fromarray(greys), "PNG"), size=None, max_pixels=CAP)
    assert np.array_equal(rgb, np.repeat(np.round(greys / 257)[:, :, np.newaxis], 3, axis=2))


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


@pytest.mark.parametrize(("format", "options"), [("WEBP", {"lossless": True}), ("PNG", {}), ("MPO", {"quality": 100})])
def test_06_the_first_frame_counts(format: str, options: dict[str, object]) -> None:
    """Of an animated WebP, an animated PNG, and a camera's multi-picture JPEG, which is a JPEG to all who ask."""
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    info, rgb = images.inspect_and_decode(data, max_pixels=CAP)
    assert info.format == {"MPO": "JPEG"}.get(format, format)
    assert np.abs(rgb[100, 100].astype(int) - (255, 0, 0)).max() <= 2


def test_06_a_multi_picture_jpeg_decodes_as_its_first_jpeg_alone() -> None:
    many = saved(scene(900, 700), "MPO", save_all=True, append_images=[scene(900, 700)])
    assert np.array_equal(images.decode(many, max_pixels=CAP), images.decode(saved(scene(900, 700)), max_pixels=CAP))


def test_07_one_pixel_is_a_picture() -> None:
    assert images.decode(saved(Image.new("RGB", (1, 1), "lime"), "PNG"), max_pixels=CAP).shape == (224, 224, 3)


@pytest.mark.parametrize("side", [65_500, 30_000, 9_000])
def test_07_too_many_pixels_are_refused_by_the_header(side: int) -> None:
    for data in (png(side, side, b""), jpeg_of_size(side, side), webp_of_size(min(side, 16_383), 9_000)):
        for look in (images.inspect, images.decode):
            with pytest.raises(TooManyPixels, match=f"{CAP:,}|{CAP // 2:,}") as refused:
                look(data, max_pixels=CAP)
            assert (refused.value.status, refused.value.code) == (422, "too_many_pixels")


def test_46_a_webp_may_have_half_as_many_pixels() -> None:
    """Its pixels cost twice the memory: tests/integration/test_image_memory.py."""
    assert images.decode(saved(scene(50, 40), "WEBP"), max_pixels=4000).shape == (224, 224, 3)
    with pytest.raises(TooManyPixels, match="50 × 40 pixels; at most 1,999 are allowed of a WEBP"):
        images.decode(saved(scene(50, 40), "WEBP"), max_pixels=3999)
    assert images.decode(saved(scene(50, 40)), max_pixels=2000).shape == (224, 224, 3)


def remark(megabytes: int) -> bytes:
    return chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (megabytes << 20)))


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        (remark(20), True),
        (remark(1) * 60, True),
        (chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"\0" * (20 << 20))), True),
        (chunk(b"tEXt", b"a\0" + b"x" * (5 << 20)), True),
        (chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * (20 << 20))), True),
        (remark(0), False),
        (chunk(b"iCCP", b"a\0\0" + zlib.compress(b"no profile")), False),
    ],
    ids=["one remark", "many remarks", "international", "plain", "profile", "short", "odd profile"],
)
def test_07_what_is_packed_beside_the_pixels_is_bounded(extra: bytes, refused: bool) -> None:
    row = b"\0" + b"\x50" * 24
    data = png(8, 8, row * 8, extra=extra)
    behind = png(8, 8, row * 8)[:-12] + extra + chunk(b"IEND", b"")
    for each in (data, behind):
        if refused:
            with pytest.raises(ImageError) as caught:
                images.decode(each, max_pixels=CAP)
            assert caught.value.code == "corrupt"
        else:
            assert set(images.decode(each, max_pixels=CAP).ravel().tolist()) == {0x50}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_07_a_bomb_costs_no_memory_and_says_nothing(tmp_path: Path) -> None:
    """Each in turn, in one process of its own, by the peak of its memory: pixels, remarks, and tags."""
    bits = png(9000, 9000, bytes(9000 * 1126), depth=1, color=0)
    assert len(bits) < 11_000
    bombs = {
        "81 megapixels": bits,
        "81 megapixels of webp": webp_of_size(9000, 9000),
        "30000 x 30000": png(30_000, 30_000, b""),
        "remarks": png(8, 8, bytes(25 * 8), extra=remark(1) * 60),
        "rows without end": png(8, 8, bytes(60_000_000)),
        "exif of a jpeg": jpeg_with(0xE1, b"Exif\0\0" + exif_bomb(1_000_000, 2_000)),
        "exif of a png": png(8, 8, bytes(25 * 8), extra=chunk(b"eXIf", exif_bomb(1_000_000, 2_000))),
        "pictures of a jpeg": jpeg_with(0xE2, b"MPF\0" + exif_bomb(60_000, 2_000)),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    script = (
        "import json, pathlib, sys\nfrom lawnwatch import images\nfrom lawnwatch.errors import ImageError\n"
        "peak = lambda: int(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))\n"
        "images.decode(pathlib.Path(sys.argv[2]).read_bytes(), max_pixels=50_000_000)\ncosts = {}\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    data = path.read_bytes()\n    before = peak()\n"
        "    try: images.decode(data, max_pixels=50_000_000)\n    except ImageError: pass\n"
        "    costs[path.name] = peak() - before\nprint(json.dumps(costs))"
    )
    ordinary = tmp_path.with_name("ordinary")
    ordinary.write_bytes(saved(scene()))
    ran = subprocess.run([sys.executable, "-c", script, tmp_path, ordinary], capture_output=True, text=True, check=True)
    costs = json.loads(ran.stdout)
    assert costs.keys() == bombs.keys()
    assert max(costs.values()) < 50_000, f"kB: {costs}"
    assert ran.stderr == ""


def with_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are so many."""
    begin = data.rindex(b"\xff\xda\0")
    return data[:begin] + data[begin:-2] * (count - data.count(b"\xff\xda\0") + 1) + data[-2:]


JPEG, PROGRESSIVE = saved(scene()), saved(scene(), progressive=True)
REMARK = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"remark"))


def png_in_pieces(count: int, extra: bytes = b"") -> bytes:
    """A PNG of so many chunks for its pixels, most of them empty, as some encoders' last one is."""
    return png(8, 8, bytes(200), extra=extra + chunk(b"IDAT", b"") * (count - 1))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (with_scans(PROGRESSIVE, 21), "21 scans of 160 × 120 pixels; at most 20 are allowed"),
        (with_scans(PROGRESSIVE.replace(b"\xff\xc2", b"\xff\xc9"), 21), "21 scans"),
        (with_scans(PROGRESSIVE.replace(b"\xff\xda\0", b"\xff\xff\xda\0"), 21), "21 scans"),
        (JPEG[:2] + b"\xff\xef\0\2" * 1000 + JPEG[2:], "more than 1,000 segments"),
        (JPEG[:2] + b"\xff\xd0" * 1000 + JPEG[2:], "more than 1,000 segments"),
        (JPEG[:20] + b"\xff\0" * 33_000 + JPEG[20:], "more than 65,536 bytes between its segments"),
        (JPEG[:20] + b"\xff" * 66_000 + JPEG[20:], "more than 65,536 bytes between its segments"),
        (JPEG[:20] + b"\0" * 66_000, "more than 65,536 bytes between its segments"),
        (JPEG[:2] + (b"\xff\xef\0\2" + b"\xff" * 999) * 70 + JPEG[2:], "more than 65,536 bytes between its segments"),
        (png_in_pieces(10_000), "more than 10,000 chunks"),
        (png(8, 8, bytes(200), extra=chunk(b"prVt", b"") * 10_000), "more than 10,000 chunks"),
        (png(8, 8, bytes(200), extra=REMARK * 257), "more than 256 packed remarks and profiles"),
    ],
    ids=[
        "scans", "scans of another coding", "scans after fill", "segments", "markers", "escapes", "fill", "zeros",
        "fill here and there", "pieces", "chunks", "remarks",
    ],
)  # fmt: skip
def test_07_what_would_be_dear_to_decode_is_refused_before(data: bytes, said: str) -> None:
    for look in (images.inspect, images.decode):
        with pytest.raises(ImageError, match=said) as caught:
            look(data, max_pixels=20_000)
        assert caught.value.code == "corrupt" and "Save it anew" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        with_scans(PROGRESSIVE, 20),
        PROGRESSIVE + b"\xff\xda" * 50,
        PROGRESSIVE[:2] + struct.pack(">BBH", 0xFF, 0xE1, 3 * len(PROGRESSIVE) + 2) + PROGRESSIVE * 3 + PROGRESSIVE[2:],
        JPEG + PROGRESSIVE * 3,
        JPEG[:2] + b"\xff\xef\0\2" * 900 + JPEG[2:],
        JPEG[:20] + b"\xff" * 60_000 + JPEG[20:],
        png_in_pieces(9_990),
        png(8, 8, bytes(200), extra=REMARK * 256),
        png(8, 8, bytes(200)) + bytes(200_000),
    ],
    ids=[
        "scans", "film behind it", "previews before it", "pictures behind it", "segments", "fill", "pieces", "remarks",
        "zeros behind it",
    ],
)  # fmt: skip
def test_07_what_encoders_and_cameras_write_is_read(data: bytes) -> None:
    assert images.decode(data, max_pixels=20_000).shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (JPEG[:2], b"\xff\xef\0\2"),
        (JPEG[:2], b"\xff"),
        (JPEG[:20], b"\xff\0"),
        (PROGRESSIVE[:-2], PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda\0") :][:10]),
        (png(8, 8, b"")[:33], chunk(b"prVt", b"")),
        (png(8, 8, b"")[:33], chunk(b"zTXt", b"\0\0" + zlib.compress(bytes(1 << 20)))),
    ],
    ids=["segments", "fill", "escapes", "scans", "chunks", "remarks"],
)
def test_07_the_largest_file_of_many_pieces_costs_no_more_than_a_large_photo(begin: bytes, piece: bytes) -> None:
    data = begin + piece * (20_000_000 // len(piece))
    started = time.thread_time()
    with pytest.raises(ImageError):
        images.decode(data, max_pixels=CAP)
    assert time.thread_time() - started < 1, "seconds of CPU"


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


def test_a_colour_profile_is_not_applied() -> None:
    profile = b"\0\0\1\0" + b"acsp" * 100
    for format in images.FORMATS:
        with_profile = images.decode(saved(scene(), format, icc_profile=profile), max_pixels=CAP)
        assert np.array_equal(with_profile, images.decode(saved(scene(), format), max_pixels=CAP))


def test_inspect_reads_the_header() -> None:
    for format, extension in images.EXTENSIONS.items():
        data = saved(scene(), format)
        assert images.inspect(data, max_pixels=CAP) == images.ImageInfo(format, 160, 120, len(data))
        assert extension == images.MEDIA_TYPES[format].removeprefix("image/").replace("jpeg", "jpg")


def test_a_large_jpeg_decodes_at_a_smaller_scale_to_nearly_the_same_pixels() -> None:
    large = scene(1600, 1200)
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
    exact = noise[:224, :200].repeat(2, axis=1)[:, :224]  # of the size at which it is measured
    edges = cv2.Laplacian(cv2.cvtColor(exact, cv2.COLOR_RGB2GRAY).astype(np.float64), cv2.CV_64F)
    assert images.sharpness(exact) == pytest.approx(edges.var(), rel=1e-12)


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
