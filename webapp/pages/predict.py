"""Predict: one picture in, the answer beside it."""

from __future__ import annotations

import time
from html import escape

import streamlit as st

import metrics
import parts
from api import Api, ApiError, Prediction

MIME = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


def ask(client: Api, key: str, picture: bytes, content_type: str) -> Prediction | ApiError:
    """The answer for one upload, asked once: Streamlit runs this page again at every click.

    Its explanation comes with it, so that showing it later makes no second prediction.
    """
    if st.session_state.get("asked") != key:
        begun = time.monotonic()
        with st.spinner("Looking at the picture …"):
            try:
                st.session_state["answer"] = client.predict(picture, content_type, explain=True)
            except ApiError as error:
                st.session_state["answer"] = error
        metrics.uploaded(st.session_state["answer"], time.monotonic() - begun)
        st.session_state["asked"] = key
    answer: Prediction | ApiError = st.session_state["answer"]
    return answer


def show(answer: Prediction) -> None:
    """The label, how sure the model is, every class, and where the answer comes from."""
    if answer.label == parts.UNKNOWN:
        st.html('<p class="lw-answer">Not recognised</p>')
        st.html('<p class="lw-sub">answered as <b>unknown</b></p>')
        likeliest = max(answer.probabilities, key=lambda label: answer.probabilities[label], default="")
        closest = f" If it had to choose, it would say **{parts.plain(likeliest)}**." if likeliest else ""
        st.info(
            "This picture is unlike the pictures the model was trained on, so it names no class rather than "
            f"guess.{closest} A sharper photo that shows the subject from closer may help.",
            icon=":material/help:",
        )
        st.caption("What the model would say if it had to choose")
    else:
        st.html(f'<p class="lw-answer">{escape(answer.label)}</p>')
        st.html(f'<p class="lw-sub">{escape(parts.percent(answer.confidence))} confidence</p>')
    st.html(parts.bars(answer.probabilities))
    st.space("small")
    with st.container(border=True):
        timings = answer.timings_ms
        rows = [
            ("Model", f"{answer.model.name} v{answer.model.version}"),
            ("Prediction id", f"`{answer.prediction_id}`"),
            (
                "Picture",
                f"{answer.image.format} · {answer.image.width} × {answer.image.height} · "
                f"{parts.size(answer.image.bytes)}",
            ),
        ]
        if timings:
            # The total comes last and stands out by its place.
            ordered = sorted(timings, key=lambda name: (name == "total", list(timings).index(name)))
            rows.append(("Time", " · ".join(f"{name} {timings[name]:.0f} ms" for name in ordered)))
        if answer.unknown_score is not None:
            rows.append(("Unknown score", f"{answer.unknown_score:.3f}"))
        st.html(parts.facts(rows))


client = parts.connect()
parts.header(
    "What is in this picture?",
    "Drop a photo here. The model that is serving now answers, and says how sure it is.",
)
trouble: ApiError | None = None
try:
    info = client.model_info()
    parts.samples_banner(info)
    parts.no_model_notice(info)
except ApiError as error:
    trouble = error

upload = st.file_uploader("A photo: JPEG, PNG or WebP, up to 20 MB", type=["jpg", "jpeg", "png", "webp"], key="upload")
if upload is None:
    st.session_state.pop("asked", None)
    if trouble:
        parts.say(trouble)
    with st.expander("The same from a shell", icon=":material/terminal:"):
        st.code(f"curl -F file=@photo.jpg {client.url}/predict", language="bash")
else:
    picture = upload.getvalue()
    kind = upload.name.rpartition(".")[2].lower()
    answer = ask(client, upload.file_id, picture, MIME.get(kind, upload.type))
    left, right = st.columns(2, gap="large")
    with left:
        why = answer.explanation if isinstance(answer, Prediction) else None
        marked = why if st.session_state.get("why") else None
        try:
            # Drawn from the decoded picture, so that bytes that are none never reach the browser as one.
            st.image(
                parts.upright(marked.png_base64 if marked else picture),
                caption=f"{upload.name} · {parts.size(len(picture))}",
                width="stretch",
                alt=f"The uploaded picture {upload.name}" + (f", what speaks for {marked.of} marked" if marked else ""),
            )
            if why is not None:
                st.toggle(
                    f"Mark what speaks for **{parts.plain(why.of)}**",
                    key="why",
                    help="The brighter a part of the picture, the more it speaks for this class.",
                )
        except OSError:
            st.html('<div class="lw-noimage">This file cannot be shown as a picture.</div>')
    with right:
        if isinstance(answer, Prediction):
            show(answer)
        else:
            parts.say(answer, asked_again=False)
            if st.button("Try again", icon=":material/refresh:"):
                st.session_state.pop("asked", None)
                st.rerun()
