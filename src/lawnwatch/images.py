"""What a picture is: ONE way to decode, orient and resize, for ingest, training and serving alike.

JPEG, PNG and WebP are read; everything else is refused whatever its name says. Size is decided from the header, before
a pixel is decoded. EXIF orientation is honoured; CMYK becomes RGB; alpha lies on white; 16-bit grey is scaled; of an
animation or a camera's multi-picture JPEG the first frame counts; a colour profile is not applied; a truncated file
is refused, and one of so many scans, segments or chunks that no camera or program wrote it.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lawnwatch.errors import ImageError, ImageTooLarge, TooManyPixels, UnsupportedMedia

# One picture is too small to share among threads; ingest and serving work on many pictures side by side.
cv2.setNumThreads(1)

Rgb = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
SIZE = 224

# What people send instead, to be named in the refusal.
SIGNATURES = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF, or a camera's raw format"),
    (b"MM\0*", "TIFF, or a camera's raw format"),
    (b"%PDF", "PDF"),
    (b"PK\3\4", "a ZIP archive"),
    (b"<", "a web page, or SVG"),
)
BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}  # of an ISO media file

# Recorded in every bundle: a server whose code prepares pictures differently must not serve it.
PREPROCESSING = {
    "size": SIZE,
    "color": "RGB",
    "dtype": "uint8",
    "resize": "stretch to size; area when shrinking, bilinear when enlarging",
    "orientation": "EXIF",
    "background": "white",
    "version": 1,
}

# What Pillow's readers raise on broken bytes, beside its own errors; found by flipping bytes of valid files.
FAULTS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
ORIENTATION = 0x0112  # the EXIF tag
TURNS: dict[int, Callable[[Rgb], Rgb]] = {
    2: lambda rgb: rgb[:, ::-1],
    3: lambda rgb: rgb[::-1, ::-1],
    4: lambda rgb: rgb[::-1],
    5: lambda rgb: rgb.swapaxes(0, 1),
    6: lambda rgb: np.rot90(rgb, -1),
    7: lambda rgb: rgb[::-1, ::-1].swapaxes(0, 1),
    8: lambda rgb: np.rot90(rgb),
}
_COSTS = {"WEBP": 2}  # libwebp decodes whole pictures only, and takes twice the memory for each pixel
TILE_PIXELS = 1_000_000  # converted to RGB at once: some modes take several copies on their way

# What Pillow and libjpeg walk piece by piece. Real pictures have far less; one of 20 MB took half a minute.
MAX_SEGMENTS = 1_000  # of a JPEG's header
MAX_STRAY_BYTES = 65_536  # between those segments
MAX_SCANS = 20  # of the largest picture allowed, in proportion more of a smaller one; encoders make about ten
MAX_CHUNKS = 10_000  # of a PNG: encoders cut the pixels into pieces of 4 kB and more, or one for each row
MAX_PACKED_CHUNKS = 256  # of a PNG, each of which may unpack to a megabyte
SAVE_ANEW = "Save it anew with a picture program, and send that."

JPEG_SIGNATURE, PNG_SIGNATURE = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
JPEG_SEGMENT = struct.Struct(">BBH")  # 0xFF, its kind, the length of what follows
JPEG_MARKER = re.compile(rb"\xff[\x01-\xfe]")
JPEG_BARE = {0x01, *range(0xD0, 0xDA)}  # kinds without a length
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
JPEG_SEQUENTIAL = {0xC0, 0xC1}
JPEG_SCAN = 0xDA
PNG_PACKED = {b"iCCP", b"zTXt", b"iTXt"}

# A PNG of 64 kB may hold 64 MB of compressed remarks, which nobody reads here.
PngImagePlugin.MAX_TEXT_MEMORY = 4 << 20
# Pillow warns of every odd EXIF tag, and a hostile picture has thousands; `warnings` keeps each text for good.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class ImageInfo:
    """What the header says; width and height as stored, before EXIF orientation."""

    format: str
    width: int
    height: int
    bytes: int


def inspect(data: bytes, *, max_pixels: int, max_bytes: int | None = None) -> ImageInfo:
    """Read the header only.

    Raises:
        UnsupportedMedia: not JPEG, PNG or WebP.
        ImageTooLarge, TooManyPixels: more bytes, or pixels, than allowed.
        ImageError: empty, a header that is cut off, or far too many scans, segments or chunks.
    """
    with _opened(data, max_pixels=max_pixels, max_bytes=max_bytes) as image:
        return _info(image, data)


def decode(data: bytes, *, size: int | None = SIZE, max_pixels: int) -> Rgb:
    """The picture as (size, size, 3) uint8 RGB; (height, width, 3) when size is None.

    A JPEG is shrunk while it is decoded (libjpeg's scaled DCT, never below the wanted size), then stretched to a
    square: the aspect ratio is not kept, so that nothing at the edge is lost.

    Raises:
        UnsupportedMedia, ImageTooLarge, ImageError: as `inspect`; ImageError also for truncated data.
    """
    return inspect_and_decode(data, size=size, max_pixels=max_pixels)[1]


def inspect_and_decode(
    data: bytes,
    *,
    size: int | None = SIZE,
    max_pixels: int,
    max_bytes: int | None = None,
    room: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> tuple[ImageInfo, Rgb]:
    """`inspect` and `decode` with one look at the header; see there.

    Args:
        room: entered with the picture's pixels, those of a WebP twice, while they are in memory; it may wait.
    """
    with _opened(data, max_pixels=max_pixels, max_bytes=max_bytes) as image:
        info = _info(image, data)
        # All its pixels, even if a JPEG is shrunk: a progressive one is held whole meanwhile.
        with room(info.width * info.height * _COSTS.get(info.format, 1)):
            if size is not None and info.format == "JPEG":
                # draft may change the mode too; CMYK has no scaled RGB decode and is left as it is.
                image.draft("RGB" if image.mode in ("RGB", "YCbCr") else image.mode, (size, size))
            rgb = _upright(image)
            if size is not None and rgb.shape[:2] != (size, size):
                shrinks = rgb.shape[0] >= size and rgb.shape[1] >= size
                how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
                rgb = cv2.resize(rgb, (size, size), interpolation=how).astype(np.uint8, copy=False)
    return info, np.ascontiguousarray(rgb)


@contextmanager
def _opened(data: bytes, *, max_pixels: int, max_bytes: int | None) -> Iterator[Image.Image]:
    """The picture's header, checked; whatever Pillow finds wrong, now or while decoding, is one of our errors."""
    if not data:
        raise UnsupportedMedia("The file is empty.", hint="Send a JPEG, PNG or WebP picture.")
    if max_bytes is not None and len(data) > max_bytes:
        raise ImageTooLarge(
            f"The file has {len(data):,} bytes; at most {max_bytes:,} are allowed.",
            hint="Send a smaller picture.",
        )
    if data.startswith(JPEG_SIGNATURE):
        _check_jpeg(data, max_pixels)
    elif data.startswith(PNG_SIGNATURE):
        _check_png(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data.startswith((JPEG_SIGNATURE, PNG_SIGNATURE)) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
            raise ImageError("The picture's header is damaged or cut off.", hint="Send the whole file.") from None
        raise UnsupportedMedia(
            f"The file is not a JPEG, PNG or WebP picture; {_likely(data)}.",
            hint="Convert it to JPEG, PNG or WebP.",
        ) from None
    except Image.DecompressionBombError:
        raise _bomb(max_pixels) from None
    except FAULTS as error:
        raise ImageError(f"The picture's header is damaged: {error}.", hint="Send the whole file.") from None
    with image:
        allowed = max_pixels // _COSTS.get(str(image.format), 1)
        if image.width * image.height > allowed:
            raise TooManyPixels(
                f"The picture has {image.width} × {image.height} pixels; at most {allowed:,} are allowed of a "
                f"{image.format} picture.",
                hint="Send a smaller picture.",
            )
        try:
            yield image
        except Image.DecompressionBombError:
            raise _bomb(max_pixels) from None
        except (*FAULTS, cv2.error) as error:
            raise ImageError(
                f"The picture cannot be decoded: {error}.",
                hint="It is truncated or damaged; send the whole file.",
            ) from None


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    """Refuse a JPEG that would cost far more than its bytes and pixels say. What is broken, its readers say."""
    at, frame, stray = 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        if len(data) < at + 4:
            return
        prefix, kind, length = JPEG_SEGMENT.unpack_from(data, at)
        if prefix != 0xFF or kind in (0x00, 0xFF):
            found = JPEG_MARKER.search(data, at, at + MAX_STRAY_BYTES + 3)
            begin = found.start() if found else len(data)
            stray, at = stray + begin - at, begin
            if stray > MAX_STRAY_BYTES:
                raise ImageError(
                    f"The JPEG's header has more than {MAX_STRAY_BYTES:,} bytes between its segments.", hint=SAVE_ANEW
                )
        elif kind == JPEG_SCAN:
            break
        elif kind in JPEG_BARE:
            at += 2
        else:
            frame = at if kind in JPEG_FRAMES else frame
            at += 2 + max(2, length)
    else:
        raise ImageError(f"The JPEG's header has more than {MAX_SEGMENTS:,} segments.", hint=SAVE_ANEW)
    if data[frame + 1] in JPEG_SEQUENTIAL and data[frame + 9 : frame + 10] == data[at + 4 : at + 5]:
        return  # the first scan has all colours: libjpeg reads no other
    height, width = int.from_bytes(data[frame + 5 : frame + 7]), int.from_bytes(data[frame + 7 : frame + 9])
    allowed = MAX_SCANS * max_pixels // max(1, width * height)
    # Each scan goes over all pixels, and may be ten bytes. Compressed pixels hold no marker; its length begins with 0.
    scans = data.count(b"\xff\xda\0", at)
    if scans > allowed >= MAX_SCANS:  # fewer: the picture is refused for its size
        raise ImageError(
            f"The JPEG has {scans:,} scans of {width} × {height} pixels; at most {allowed:,} are allowed of this size.",
            hint=SAVE_ANEW,
        )


def _check_png(data: bytes) -> None:
    """Refuse a PNG of very many chunks; what is broken, Pillow says."""
    at, packed = len(PNG_SIGNATURE), 0
    for _ in range(MAX_CHUNKS):
        kind = data[at + 4 : at + 8]
        if kind in (b"", b"IEND"):
            return
        packed += kind in PNG_PACKED
        if packed > MAX_PACKED_CHUNKS:
            raise ImageError(
                f"The PNG has more than {MAX_PACKED_CHUNKS} packed remarks and profiles beside its pixels.",
                hint=SAVE_ANEW,
            )
        at += 12 + int.from_bytes(data[at : at + 4])
    raise ImageError(f"The PNG has more than {MAX_CHUNKS:,} chunks.", hint=SAVE_ANEW)


def _likely(data: bytes) -> str:
    """What a file that is no picture for us seems to be, for the person who sent it."""
    if data[4:8] == b"ftyp":
        return f"it looks like {BRANDS.get(data[8:12], 'a film or a sound file')}"
    for signature, name in SIGNATURES:
        if data.startswith(signature):
            return f"it looks like {name}"
    return f"its first bytes are {data[:8].hex(' ')}"


def _bomb(max_pixels: int) -> TooManyPixels:
    return TooManyPixels(
        f"The picture has far more pixels than the {max_pixels:,} that are allowed.", hint="Send a smaller picture."
    )


def _info(image: Image.Image, data: bytes) -> ImageInfo:
    # MPO, of some cameras and phones: a JPEG with further JPEGs behind it, which Pillow calls by a name of its own.
    name = "JPEG" if image.format == "MPO" else str(image.format)
    return ImageInfo(name, image.width, image.height, len(data))


def _upright(image: Image.Image) -> Rgb:
    """The pixels as the photographer held it. Closes the picture: of the largest, memory is short for one more copy."""
    image.load()
    turn = _turn(image)
    rgb = _to_rgb(image)
    image.close()
    return rgb if turn is None else np.ascontiguousarray(turn(rgb))


def _turn(image: Image.Image) -> Callable[[Rgb], Rgb] | None:
    """What makes it upright; an unreadable EXIF block is no reason to refuse a readable picture.

    Pillow's own exif_transpose also writes the other tags anew, and fails where one of them is broken.
    """
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except (*FAULTS, ZeroDivisionError):
        return None


def _to_rgb(image: Image.Image) -> Rgb:
    width, height = image.size
    if width * height <= TILE_PIXELS:
        return _tile_to_rgb(image)
    columns = min(width, TILE_PIXELS)  # a picture may be a single row
    rows = TILE_PIXELS // columns
    rgb = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            right, bottom = min(left + columns, width), min(top + rows, height)
            rgb[top:bottom, left:right] = _tile_to_rgb(image.crop((left, top, right, bottom)))
    return rgb


def _tile_to_rgb(image: Image.Image) -> Rgb:
    """Each pixel by itself, so that a picture is the same whole or in tiles."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16 bits a sample: scaled to 8 and rounded, where Pillow's own conversion would clip at 255.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.asarray(cv2.cvtColor(grey.astype(np.uint8), cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def brightness(rgb: Rgb) -> float:
    """Mean luma (BT.601) of an (height, width, 3) uint8 picture, 0 black to 1 white."""
    return _brightness(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))


def sharpness(rgb: Rgb) -> float:
    """Variance of the Laplacian at 224 × 224, grey levels squared; low means blurred.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
    """
    return _sharpness(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))


def light_and_blur(rgb: Rgb) -> tuple[float, float]:
    """`brightness` and `sharpness`, the same numbers from one conversion to grey."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return _brightness(grey), _sharpness(grey)


def _brightness(grey: NDArray[np.uint8]) -> float:
    return float(cv2.mean(grey)[0] / 255.0)


def _sharpness(grey: NDArray[np.uint8]) -> float:
    if grey.shape != (SIZE, SIZE):
        grey = cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    edges = cv2.Laplacian(grey, cv2.CV_16S)  # 16 bits hold it exactly, and are quicker
    # E[x²] - E[x]², of sums without an error: a ninth of the time of cv2.meanStdDev.
    mean = cv2.sumElems(edges)[0] / edges.size
    return float(cv2.norm(edges, cv2.NORM_L2SQR) / edges.size - mean**2)


def phash(rgb: Rgb) -> int:
    """64-bit perceptual hash of a (height, width, 3) uint8 picture: copies and resizings differ in few bits.

    The signs of the 8 × 8 lowest frequencies of a 32 × 32 cosine transform against their median (the pHash of
    Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010).
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    median = np.sort(low[1:])[31]
    return int.from_bytes(np.packbits(low > median).tobytes())


def thumbnail(data: bytes, *, width: int, height: int, max_pixels: int) -> Rgb:
    """The picture within `width` × `height`, its aspect ratio kept, never enlarged: (h, w, 3) uint8 RGB.

    Raises:
        UnsupportedMedia, ImageTooLarge, ImageError: as `decode`.
    """
    with _opened(data, max_pixels=max_pixels, max_bytes=None) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "YCbCr", "L"):
            image.draft(None, (2 * width, 2 * height))
        rgb = _upright(image)
    scale = min(width / rgb.shape[1], height / rgb.shape[0])
    if scale < 1:
        size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return np.ascontiguousarray(rgb)


def jpeg(rgb: Rgb, *, quality: int = 80) -> bytes:
    """An (h, w, 3) uint8 RGB picture as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
