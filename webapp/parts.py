"""What the pages share: the client, the look, how an error is said, how figures and times are written."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, tzinfo
from html import escape
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st
from PIL import Image, ImageOps
from pydantic import ValidationError

import metrics
from api import Api, ApiError, Interval, ModelInfo, Refused, TooSlow, Unreachable
from settings import WebSettings, unusable

UNKNOWN = "unknown"
STYLE = Path(__file__).with_name("style.css")
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_PIXELS = 50_000_000  # what the API takes; a larger picture is never decoded here either


def style() -> None:
    """One quiet look for all pages; Streamlit's own menu, decoration and deploy button are gone."""
    st.html(STYLE)


@st.cache_resource  # type: ignore[untyped-decorator]
def api() -> Api:
    """The client, shared by all sessions of this process."""
    settings = WebSettings()
    return Api(
        settings.api_url,
        key=settings.api_key.get_secret_value(),
        predict_timeout=settings.webapp_timeout,
        read_timeout=settings.webapp_read_timeout,
        failed=metrics.failed,
    )


def connect() -> Api:
    """The client; a setting that cannot be read ends the page with a sentence."""
    try:
        client: Api = api()
    except ValidationError as error:
        st.error(plain(unusable(error)), icon=":material/settings_alert:")
        st.stop()
        raise  # st.stop() never returns
    return client


def header(title: str, lead: str) -> None:
    """A page's title and its one sentence."""
    st.title(title)
    st.html(f'<p class="lw-lead">{escape(lead)}</p>')


def say(error: ApiError, *, asked_again: bool = True) -> None:
    """Tell a person what happened and what to do; never a traceback.

    Args:
        asked_again: the page asks anew each time it runs, so it may watch for the API's return by itself.
    """
    text = f"**{plain(error.message)}**" + (f"\n\n{plain(error.hint)}" if error.hint else "")
    if isinstance(error, Refused) and error.code == "no_model":
        st.info(text, icon=":material/hourglass_empty:")
    elif isinstance(error, Unreachable):
        st.error(text, icon=":material/cloud_off:")
        if asked_again:
            follow(ready=False)
    elif isinstance(error, TooSlow) or (isinstance(error, Refused) and error.status in (429, 503)):
        st.warning(text, icon=":material/hourglass_top:")
    elif isinstance(error, Refused) and error.status is not None and error.status < 500:
        st.warning(text, icon=":material/broken_image:")
    else:
        st.error(text, icon=":material/error:")


def samples_banner(info: ModelInfo) -> None:
    """A model of generated pictures must never be taken for a real one."""
    if info.samples:
        st.warning(
            "**Trained on generated sample pictures.** The road works; the answers say nothing about real "
            "photos. For a real model run `make demo` where the web is reached, or `make demo PHOTOS=DIR`.",
            icon=":material/science:",
        )


def no_model_notice(info: ModelInfo) -> None:
    """Nothing verified to serve yet: said once, with the API's reason, and what makes a model."""
    if info.state == "ready":
        return
    reason = plain(info.reason or "no model has been released yet")
    reason = reason[:1].upper() + reason[1:].rstrip(".") + "."
    if info.target:
        headline, advice = f"Version {info.target.version} is being made ready.", ""
    else:
        headline = "There is no model to ask yet."
        advice = "Trigger `training_pipeline` in Airflow, or run `make demo`. "
    st.info(f"**{headline}** {reason}\n\n{advice}This page follows by itself.", icon=":material/hourglass_empty:")
    follow(ready=True)


def follow(*, ready: bool) -> None:
    """Show the page anew once the API answers (`ready`: once it has a model), so that nobody has to press reload."""
    st.session_state["follow_later"] = True  # the run that shows the notice has asked just now
    _follow(ready)


@st.fragment(run_every=3)  # type: ignore[untyped-decorator]
def _follow(ready: bool) -> None:
    if st.session_state.pop("follow_later", False):
        return
    try:
        info = connect().model_info()
    except ApiError:
        return
    if info.state == "ready" or not ready:
        st.rerun()


def plain(text: str) -> str:
    """Text that Streamlit's Markdown shows as it is: labels and file names are data, not markup.

    What stands in backticks stays code: hints name commands that way.
    """
    pieces = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    return "".join(
        piece if place % 2 else re.sub(r"([\\*_\[\]<>$#~|:`])", r"\\\1", piece) for place, piece in enumerate(pieces)
    )


def percent(share: float) -> str:
    """`98.2 %`; a share short of one is never written as 100 %, one above nothing never as 0 %."""
    text = f"{share:.1%}"
    if share < 1 and text == "100.0%":
        text = ">99.9%"
    elif share > 0 and text == "0.0%":
        text = "<0.1%"
    return text.replace("%", " %")


def interval(measured: Interval | None, *, as_percent: bool) -> str:
    """`95.0 % (88.9 – 97.8)`; the value alone when it has no interval.

    Of a calibration error not its interval but the range in which it would lie for a perfectly calibrated model.
    """
    if measured is None:
        return "not measured"
    scale, digits = (100, 1) if as_percent else (1, 3)
    unit = " %" if as_percent else ""
    text = f"{measured.value * scale:.{digits}f}{unit}"
    if measured.expected is not None:
        text += f" ({measured.expected.low:.{digits}f} – {measured.expected.high:.{digits}f} if calibrated)"
    elif measured.low is not None and measured.high is not None:
        text += f" ({measured.low * scale:.{digits}f} – {measured.high * scale:.{digits}f})"
    return text


def size(count: int) -> str:
    """A number of bytes for a person."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


def ago(moment: datetime, now: datetime | None = None) -> str:
    """`just now`, `5 min ago`, `3 h ago`, `2 days ago`, then the date."""
    moment = _aware(moment)
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < 45:
        return "just now"
    for span, name, most in ((60, "min", 60), (3600, "h", 24), (86400, "day", 14)):
        count = max(1, round(seconds / span))
        if count < most:
            return f"{count} {name}{'s' if name == 'day' and count > 1 else ''} ago"
    return moment.strftime("%Y-%m-%d")


def moment(when: datetime) -> str:
    """A point in time in the time zone of the person's browser, zone named."""
    zone: tzinfo = UTC
    name = st.context.timezone
    if name:
        try:
            zone = ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError):
            zone = UTC
    return _aware(when).astimezone(zone).strftime("%Y-%m-%d %H:%M:%S %Z")


def _aware(when: datetime) -> datetime:
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def bars(probabilities: dict[str, float], *, most: int = 8) -> str:
    """HTML of one bar per class, likeliest first; the values are in the text, not only in the lengths."""
    ranked = sorted(probabilities.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [
        f'<li class="{"top" if place == 0 else ""}"><div class="row"><span>{escape(label)}</span>'
        f"<span>{escape(percent(share))}</span></div>"
        '<div class="track" aria-hidden="true">'
        f'<div class="fill" style="width:{min(max(share, 0), 1):.2%}"></div></div></li>'
        for place, (label, share) in enumerate(ranked[:most])
    ]
    left = ranked[most:]
    if left:
        rest = percent(sum(share for _, share in left))
        rows.append(f'<li class="lw-small">and {len(left)} more classes, {escape(rest)} together</li>')
    return f'<ul class="lw-bars" aria-label="Probability of each class">{"".join(rows)}</ul>'


def facts(pairs: list[tuple[str, str]]) -> str:
    """HTML of a list of names and values; a value in backticks becomes code."""
    rows = []
    for name, value in pairs:
        code = len(value) > 1 and value[0] == value[-1] == "`"
        shown = f"<code>{escape(value[1:-1])}</code>" if code else escape(value)
        rows.append(f"<dt>{escape(name)}</dt><dd>{shown}</dd>")
    return f'<dl class="lw-facts">{"".join(rows)}</dl>'


def upright(picture: bytes, longest: int = 1200) -> bytes:
    """A JPEG of the whole picture as a person holds it, its longest side at most `longest` pixels.

    Raises:
        OSError: the bytes are not a picture, or it is truncated or too large to show.
    """
    shown = _decoded(picture, longest)
    shown.thumbnail((longest, longest))
    return _jpeg(shown)


def thumbnail(picture: bytes, width: int = 480, height: int = 360) -> bytes:
    """A JPEG of exactly width × height, cut around the middle, so that a grid of pictures is even.

    Raises:
        OSError: the bytes are not a picture, or it is truncated or too large to show.
    """
    return _jpeg(ImageOps.fit(_decoded(picture, max(width, height)), (width, height)))


def _decoded(picture: bytes, longest: int) -> Image.Image:
    """RGB, upright, on white where it is transparent: for the eye only, the API decodes for itself."""
    try:
        with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG", "WEBP")) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise OSError(f"A picture of {opened.width} × {opened.height} pixels is too large to show.")
            opened.draft("RGB", (2 * longest, 2 * longest))  # a JPEG is decoded small: no 50-megapixel buffer
            # Pillow's exif_transpose also writes the other tags anew, and fails where one of them is broken.
            turn = TURNS.get(opened.getexif().get(ORIENTATION, 1))
            turned = opened if turn is None else opened.transpose(turn)
            if turned.mode.startswith("I"):  # 16-bit grey: scaled, where convert() would clip it to white
                turned = turned.convert("I").point(lambda value: value / 257).convert("L")
            if turned.has_transparency_data:
                turned = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
            return turned.convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"Not a picture that can be shown: {error}") from error


def _jpeg(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=88)
    return out.getvalue()


@st.cache_data(max_entries=400, ttl=3600, show_spinner=False)  # type: ignore[untyped-decorator]
def kept_thumbnail(url: str, path: str) -> bytes:
    """The thumbnail of a kept picture; `url`, the API's address, is part of the key since ids are its own."""
    return thumbnail(api().picture(path))
