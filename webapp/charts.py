"""The figures of the Model page as Altair charts: pure functions of what the API said."""

from __future__ import annotations

import altair as alt
import pandas as pd

from api import Confusion, Evaluation, Interval

GREEN = "#3f7d3a"
INK = "#3d473a"
# Metrics that are shares between 0 and 1, better when larger; the others are listed, not drawn on this axis.
SHARES = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy", "macro_f1": "Macro F1"}


def intervals(evaluation: Evaluation) -> alt.LayerChart | None:
    """A dot per measured share with its 95 % interval as a line; None when there is nothing to draw.

    The axis ends at 1 and begins below the lowest bound, never at a value that hides an interval.
    """
    rows: list[dict[str, object]] = []
    for name, title in SHARES.items():
        _add(rows, title, evaluation.metrics.get(name))
    for label, figures in evaluation.per_class.items():
        _add(rows, f"Precision · {label}", figures.precision)
        _add(rows, f"Recall · {label}", figures.recall)
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    low = max(0.0, float(frame["low"].min()) - 0.05)
    base = alt.Chart(frame).encode(
        y=alt.Y(
            "name:N", sort=None, title=None, axis=alt.Axis(labelLimit=220, labelColor=INK, ticks=False, domain=False)
        ),
        tooltip=[
            alt.Tooltip("name:N", title="figure"),
            alt.Tooltip("value:Q", format=".1%"),
            alt.Tooltip("low:Q", format=".1%"),
            alt.Tooltip("high:Q", format=".1%"),
        ],
    )
    axis = alt.Axis(format="%", title=None, tickCount=6, grid=True)
    scale = alt.Scale(domain=[low, 1.0], nice=False)
    line = base.mark_rule(strokeWidth=3, opacity=0.4, color=GREEN, strokeCap="round").encode(
        x=alt.X("low:Q", scale=scale, axis=axis), x2="high:Q"
    )
    dot = base.mark_circle(size=110, color=GREEN, opacity=1).encode(x=alt.X("value:Q", scale=scale, axis=axis))
    chart: alt.LayerChart = (line + dot).properties(height=max(120, 30 * len(rows) + 30))
    return chart


def _add(rows: list[dict[str, object]], name: str, measured: Interval | None) -> None:
    if measured is not None:
        low = measured.value if measured.low is None else measured.low
        high = measured.value if measured.high is None else measured.high
        rows.append({"name": name, "value": measured.value, "low": low, "high": high})


def confusion(counts: Confusion) -> alt.LayerChart | None:
    """A heat map of counts: a row per true label, a column per answer; None when it does not fit its labels.

    The colour is the share of the row, so that a rare class is as readable as a common one.
    """
    labels, matrix = counts.labels, counts.matrix
    answers = labels if all(len(row) == len(labels) for row in matrix) else [*labels, "unknown"]
    if not labels or len(matrix) != len(labels) or any(len(row) != len(answers) for row in matrix):
        return None
    rows = [
        {"truth": labels[t], "answer": answers[a], "count": count, "share": count / max(1, sum(row))}
        for t, row in enumerate(matrix)
        for a, count in enumerate(row)
    ]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X(
            "answer:N",
            sort=answers,
            title="the model says",
            axis=alt.Axis(orient="top", labelAngle=0 if len(answers) <= 6 else -40, domain=False, ticks=False),
        ),
        y=alt.Y("truth:N", sort=labels, title="it is", axis=alt.Axis(domain=False, ticks=False, labelColor=INK)),
    )
    squares = base.mark_rect(cornerRadius=4).encode(
        color=alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], range=["#eef1e8", GREEN]), legend=None),
        tooltip=[
            alt.Tooltip("truth:N", title="it is"),
            alt.Tooltip("answer:N", title="the model says"),
            alt.Tooltip("count:Q", title="images"),
            alt.Tooltip("share:Q", title="of its row", format=".1%"),
        ],
    )
    text = base.mark_text(fontSize=18 if len(labels) <= 4 else 12, fontWeight="bold").encode(
        text="count:Q", color=alt.condition("datum.share > 0.5", alt.value("white"), alt.value("#1f2a1c"))
    )
    chart: alt.LayerChart = (squares + text).properties(height=max(240, 60 * len(labels) + 60))
    return chart


def confusion_in_words(counts: Confusion) -> str:
    """The confusion matrix as a sentence, for a screen reader."""
    said = [
        f"{label}: "
        + ", ".join(f"{count} answered {answer}" for answer, count in zip(counts.labels, row, strict=False))
        for label, row in zip(counts.labels, counts.matrix, strict=False)
    ]
    return "Confusion matrix. " + "; ".join(said) + "."
