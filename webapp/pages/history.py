"""History: what was asked lately, and what the answer was."""

from __future__ import annotations

from html import escape

import streamlit as st

import parts
from api import Api, ApiError, Garbled, History, Record, Refused

PAGE = 12
COLUMNS = 4
NO_PICTURE = '<div class="lw-noimage">picture not kept</div>'
NOT_LOADED = '<div class="lw-noimage">picture not loaded</div>'


def known_labels(client: Api) -> list[str]:
    """What the serving model may answer; when the API is gone the list of predictions says so, once."""
    try:
        info = client.model_info()
    except ApiError:
        return []
    parts.samples_banner(info)
    return [*info.classes, parts.UNKNOWN]


def choose_label(options: list[str]) -> str | None:
    """The label to filter by; None for all."""
    chosen: str | None = st.pills("Answer", options, key="label", on_change=first_page)
    return chosen


def first_page() -> None:
    """Begin again at the newest prediction."""
    st.session_state["pages"] = [None]


def older(next_page: str | int) -> None:
    """Go one page back in time."""
    st.session_state["pages"].append(next_page)


def newer() -> None:
    """Go one page forward in time."""
    st.session_state["pages"].pop()


def picture(client: Api, record: Record) -> bytes | None:
    """The thumbnail of a record; None when its picture is not kept or cannot be shown.

    Raises:
        Unreachable, TooSlow, Refused: the API gives no pictures now; asking for the others would only make the page
            wait.
    """
    if not record.image_url:
        return None
    try:
        small: bytes = parts.kept_thumbnail(client.url, record.image_url)
    except Refused as error:
        if not is_gone(error):
            raise
        return None
    except (Garbled, OSError):
        return None
    return small


def is_gone(error: ApiError) -> bool:
    """The API has no such picture any more; any other refusal says nothing about it."""
    return isinstance(error, Refused) and error.status == 404


@st.dialog("Prediction", width="large")  # type: ignore[untyped-decorator]
def details(client: Api, record: Record) -> None:
    """One prediction in full."""
    left, right = st.columns(2, gap="large")
    with left:
        try:
            if not record.image_url:
                raise OSError("not kept")
            st.image(
                parts.upright(client.picture(record.image_url)),
                width="stretch",
                alt=f"The picture that was answered {record.label}",
            )
        except ApiError as error:
            if is_gone(error):
                st.html(NO_PICTURE)
            else:
                parts.say(error, asked_again=False)
        except OSError:
            st.html(NO_PICTURE)
    with right:
        st.html(f'<p class="lw-answer">{escape(record.label)}</p>')
        st.html(f'<p class="lw-sub">{escape(parts.percent(record.confidence))} confidence</p>')
        if record.probabilities:
            st.html(parts.bars(record.probabilities))
    with right:
        st.space("small")
        st.html(parts.facts(described(record)))


def described(record: Record) -> list[tuple[str, str]]:
    """What is recorded beside the answer."""
    rows = [("Prediction id", f"`{record.prediction_id}`"), ("Asked", parts.moment(record.created_at))]
    if record.model_version is not None:
        rows.append(("Model version", f"v{record.model_version}"))
    if record.image and record.image.width:
        rows.append(
            (
                "Picture",
                f"{record.image.format} · {record.image.width} × {record.image.height} · "
                f"{parts.size(record.image.bytes)}",
            )
        )
    return rows


def card(client: Api, record: Record, thumbnail: bytes | None, *, asked: bool) -> None:
    """One prediction in the grid; `asked` tells a picture that is not kept from one that the API would not give."""
    if thumbnail is None:
        st.html(NO_PICTURE if asked or not record.image_url else NOT_LOADED)
    else:
        st.image(thumbnail, width="stretch", alt=f"A picture that was answered {record.label}")
    version = f" · v{record.model_version}" if record.model_version is not None else ""
    st.html(
        f'<div class="lw-card"><b>{escape(record.label)}</b>'
        f"<span>{escape(parts.percent(record.confidence))}</span></div>"
        f'<p class="lw-small" title="{escape(parts.moment(record.created_at))}">'
        f"{escape(parts.ago(record.created_at))}{version}</p>"
    )
    if st.button("Details", key=f"details-{record.prediction_id}", type="tertiary", icon=":material/open_in_full:"):
        details(client, record)


def grid(client: Api, found: History) -> None:
    """The page of predictions, four beside each other, then the ways to the next and the last page."""
    gone: ApiError | None = None
    for start in range(0, len(found.items), COLUMNS):
        row = st.columns(COLUMNS, gap="medium")
        for column, record in zip(row, found.items[start : start + COLUMNS], strict=False):
            thumbnail = None
            if gone is None:
                try:
                    thumbnail = picture(client, record)
                except ApiError as error:
                    gone = error
            with column:
                card(client, record, thumbnail, asked=gone is None)
    if gone:
        parts.say(gone)
    pages = st.session_state["pages"]
    with st.container(horizontal=True, horizontal_alignment="center", vertical_alignment="center"):
        st.button("Newer", on_click=newer, disabled=len(pages) == 1, icon=":material/chevron_left:")
        st.html(f'<p class="lw-small">page {len(pages)}</p>', width="content")
        st.button(
            "Older",
            on_click=older,
            args=(found.next,),
            disabled=found.next is None,
            icon=":material/chevron_right:",
        )


client = parts.connect()
parts.header("History", "The latest predictions, newest first, with the pictures that were kept.")
st.session_state.setdefault("pages", [None])
labels = known_labels(client)
with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
    label = choose_label(labels)
    st.button("Refresh", on_click=first_page, icon=":material/refresh:")
try:
    found = client.history(limit=PAGE, before=st.session_state["pages"][-1], label=label)
except ApiError as error:
    # A page mark that the API no longer knows (its history was pruned) must not lock the page.
    if isinstance(error, Refused) and error.status in (400, 404, 422) and len(st.session_state["pages"]) > 1:
        first_page()
    parts.say(error)
else:
    if found.items:
        grid(client, found)
    elif label:
        st.html(
            f'<div class="lw-empty"><b>No prediction was answered “{escape(label)}” yet.</b>'
            "Choose another answer above, or none to see all.</div>"
        )
    elif len(st.session_state["pages"]) > 1:
        st.html('<div class="lw-empty"><b>Nothing older.</b></div>')
        st.button("Back to the newest", on_click=first_page)
    else:
        st.html(
            '<div class="lw-empty"><b>No predictions yet.</b>Upload a photo on the Predict page, or send one '
            "to <code>POST /predict</code>; it appears here.</div>"
        )
