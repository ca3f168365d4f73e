"""Model: what is serving, how good it was measured to be, and where it comes from."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pandas as pd
import streamlit as st

import charts
import parts
from api import ApiError, Evaluation, ModelInfo

METRICS = {
    "accuracy": ("Accuracy", True, "Share of test images answered rightly."),
    "balanced_accuracy": (
        "Balanced accuracy",
        True,
        "Mean recall of the classes: a common class counts no more.",
    ),
    "macro_f1": ("Macro F1", True, "Mean over the classes of the harmonic mean of precision and recall."),
    "log_loss": ("Log loss", False, "How wrong the probabilities are; 0 is perfect."),
    "brier": ("Brier score", False, "Squared error of the probabilities; 0 is perfect."),
    "ece": (
        "Calibration error",
        False,
        "Gap between stated confidence and how often it is right. On few images it is above 0 for the best of "
        "models: the range beside it is that of a perfectly calibrated one.",
    ),
    "auc": (
        "AUC",
        False,
        "Area under the ROC curve: how often a picture of a class gets more of its probability than one of another.",
    ),
}
LINEAGE = {
    "snapshot": "Snapshot",
    "run_id": "MLflow run",
    "candidate": "Candidate",
    "git_commit": "Git commit",
    "weights": "Started from",
    "created_at": "Built",
}


def serving(info: ModelInfo) -> None:
    """One row: version, since when, accuracy, golden check."""
    model = info.model
    if model is None:
        return
    columns = st.columns(4)
    columns[0].metric("Serving", f"v{model.version}", border=True, help=f"Bundle SHA-256 {model.sha256}")
    columns[0].caption(f"{parts.plain(model.name)} · `{model.sha256[:12]}`")
    if info.loaded_at:
        columns[1].metric("Since", parts.ago(info.loaded_at), border=True, help=parts.moment(info.loaded_at))
        took = f" · loaded in {info.load_seconds:.1f} s" if info.load_seconds is not None else ""
        columns[1].caption(parts.plain(parts.moment(info.loaded_at) + took))
    accuracy = info.evaluation.metrics.get("accuracy") if info.evaluation else None
    columns[2].metric("Accuracy", parts.percent(accuracy.value) if accuracy else "not measured", border=True)
    if accuracy and accuracy.low is not None and accuracy.high is not None and info.evaluation:
        columns[2].caption(
            f"95 % interval {accuracy.low:.1%} – {accuracy.high:.1%}, {info.evaluation.images} test images"
        )
    if info.golden:
        columns[3].metric("Golden check", "passed" if info.golden.ok else "failed", border=True)
        if info.golden.max_error is not None:
            columns[3].caption(
                f"largest difference {info.golden.max_error:.1e}"
                if info.golden.max_error
                else "the recorded answers to the last digit"
            )
    else:
        columns[3].metric("Golden check", "not run", border=True)


def notices(info: ModelInfo) -> None:
    """What an operator must not miss: a refused bundle, a release on its way."""
    if info.rejected:
        st.error(
            f"**A released bundle was refused and is not served:** `{info.rejected.sha256[:12]}`. "
            f"{parts.plain(info.rejected.reason)}" + (" The model below goes on serving." if info.model else ""),
            icon=":material/gpp_bad:",
        )
    if info.target and info.model and info.target.sha256 != info.model.sha256 and not info.rejected:
        st.info(
            f"**Version {info.target.version} is on its way.** Version {info.model.version} answers until "
            "the new one has proved itself.",
            icon=":material/sync:",
        )


def measured(evaluation: Evaluation) -> None:
    """Metrics as a table and as dots with intervals."""
    st.subheader("Measured before release")
    st.caption(
        f"On {evaluation.images} images of the {parts.plain(evaluation.split)} split, which training never "
        "sees. Lines are 95 % intervals."
    )
    left, right = st.columns([5, 6], gap="large")
    rows, meanings = [], []
    known = [name for name in METRICS if name in evaluation.metrics]
    for name in [*known, *(name for name in evaluation.metrics if name not in METRICS)]:
        value = evaluation.metrics[name]
        title, as_percent, meaning = METRICS.get(name, (name.replace("_", " ").capitalize(), False, ""))
        rows.append({"Metric": title, "Value (95 % interval)": parts.interval(value, as_percent=as_percent)})
        meanings += [f"**{title}.** {meaning}"] if meaning else []
    with left:
        st.table(
            pd.DataFrame(rows, columns=["Metric", "Value (95 % interval)"]),
            hide_index=True,
            border="horizontal",
            alt="Metrics of the serving model with their intervals",
        )
        if meanings:
            with st.expander("What these say"):
                st.markdown("\n\n".join(meanings))
    chart = charts.intervals(evaluation)
    if chart is not None:
        right.altair_chart(chart, width="stretch", alt="Dots with 95 % intervals; the same figures are in the tables.")


def by_class(evaluation: Evaluation) -> None:
    """Confusion matrix, precision and recall."""
    left, right = st.columns([4, 7], gap="large")
    with left:
        st.subheader("Confusion matrix")
        chart = charts.confusion(evaluation.confusion)
        if chart is None:
            st.caption("None was recorded with this model.")
        else:
            st.altair_chart(chart, width="stretch", alt=charts.confusion_in_words(evaluation.confusion))
            st.caption("Numbers are test images; the colour is the share of the row.")
    with right:
        st.subheader("By class")
        rows = [
            {
                "Class": label,
                "Precision": parts.interval(figures.precision, as_percent=True),
                "Recall": parts.interval(figures.recall, as_percent=True),
                "Images": figures.support,
            }
            for label, figures in evaluation.per_class.items()
        ]
        if rows:
            st.table(pd.DataFrame(rows), hide_index=True, border="horizontal", alt="Precision and recall by class")
            st.caption(
                "Precision: of the pictures answered with this class, the share that is right. Recall: of "
                "the pictures of this class, the share that was answered so."
            )
        else:
            st.caption("Nothing was recorded by class.")
        if evaluation.verdict.decision:
            st.markdown(
                f"**Verdict: {parts.plain(evaluation.verdict.decision)}.** {parts.plain(evaluation.verdict.reason)}"
            )


def lineage(info: ModelInfo) -> None:
    """Where the model comes from, and what it decides with."""
    left, right = st.columns([5, 6], gap="large")
    with left:
        st.subheader("Where it comes from")
        shown = [(LINEAGE[name], info.lineage[name]) for name in LINEAGE if info.lineage.get(name) not in (None, "")]
        more = [
            (name.replace("_", " ").capitalize(), value)
            for name, value in info.lineage.items()
            if name not in LINEAGE and name != "samples" and isinstance(value, str | int | float) and value != ""
        ]
        pairs = [(name, written(value)) for name, value in [*shown, *more]]
        st.html(parts.facts([*pairs, ("Classes", ", ".join(info.classes))]))
    with right:
        st.subheader("What it decides with")
        if info.thresholds:
            st.html(
                parts.facts(
                    [(name.replace("_", " ").capitalize(), written(value)) for name, value in info.thresholds.items()]
                )
            )
        else:
            st.caption("No thresholds: every picture gets a class.")


def written(value: Any) -> str:
    """A recorded value for a person: hashes short and as code, times in the reader's zone."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {written(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    text = re.sub(r"(?<![0-9a-f])([0-9a-f]{12})[0-9a-f]{20,}", r"\1", str(value))
    if text != str(value) and len(text) == 12:
        return f"`{text}`"
    try:
        return parts.moment(datetime.fromisoformat(text)) if "T" in text and len(text) >= 19 else text
    except ValueError:
        return text


client = parts.connect()
parts.header("The model", "What answers right now, how good it was measured to be, and where it comes from.")
try:
    info = client.model_info()
except ApiError as error:
    parts.say(error)
else:
    parts.samples_banner(info)
    parts.no_model_notice(info)
    notices(info)
    if info.model:
        serving(info)
        if info.evaluation:
            measured(info.evaluation)
            by_class(info.evaluation)
        lineage(info)
