"""The evaluation of a run as one HTML file that loads nothing: for people, kept with the version."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

FILE = "report.html"
JPEG_QUALITY = 80

METRICS = {
    "accuracy": ("Accuracy", "share of right answers"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall of the classes"),
    "macro_f1": ("Macro F1", "mean of the classes' F1"),
    "auc": ("AUC", "area under the ROC curve"),
    "log_loss": ("Log loss", "nats; lower is better"),
    "brier": ("Brier score", "lower is better"),
    "ece": ("Calibration error", "ECE, ten bins; biased upwards on few images"),
}
TITLES = {
    ("promote", "floors"): "Promoted: it passes every floor",
    ("promote", "better"): "Promoted: it is better than the champion",
    ("promote", "not worse"): "Promoted: not worse, and there is a reason to change",
    ("reject", ""): "Rejected",
    ("inconclusive", ""): "Not decided: these test images cannot tell",
}

Rgb = NDArray[np.uint8]


@dataclass(frozen=True)
class Tile:
    """One picture of the report.

    Attributes:
        picture: (size, size, 3) uint8, as the network sees it.
        overlay: the same with what speaks for the predicted class marked; None where the graph does not tell.
    """

    picture: Rgb
    overlay: Rgb | None
    label: str
    predicted: str
    probability: float
    url: str


@dataclass(frozen=True)
class Row:
    """Pictures under one title; `count` is how many there are of the kind, shown or not."""

    title: str
    count: int
    tiles: list[Tile]


def page(*, run_id: str, facts: dict[str, Any], evaluation: dict[str, Any], pictures: Sequence[Row]) -> bytes:
    """The report.

    Args:
        run_id: of the training run.
        facts: what the run says of its model (`model.json`).
        evaluation: as in `evaluation.json`; a model that could not be used has a verdict and no figures.
        pictures: rows of pictures to look at.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lawnwatch", ""),
        autoescape=True,  # labels and URLs are strangers' text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["signed"] = signed
    environment.filters["likely"] = likely
    environment.filters["embedded"] = embedded
    verdict = evaluation["verdict"]
    claim = verdict["claim"] if verdict["decision"] == "promote" else ""
    return (
        environment.get_template("evaluation_report.html.j2")
        .render(
            run_id=run_id,
            facts=facts,
            it=evaluation,
            title=TITLES[verdict["decision"], claim],
            metrics=METRICS,
            pictures=pictures,
            least=_least(evaluation),
            moment=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        )
        .encode()
    )


def percent(share: float | None) -> str:
    """`97.5 %`; a dash where there was nothing to count."""
    return "–" if share is None else f"{100 * share:.1f} %"


def likely(one: dict[str, Any]) -> str:
    """`0.021 to 0.070`; of a calibration error the range that a perfectly calibrated model would have."""
    bounds = one.get("expected", one)
    return f"{bounds['low']:.3f} to {bounds['high']:.3f}" + (" if calibrated" if "expected" in one else "")


def signed(share: float) -> str:
    """`+2.5 %`; a share that rounds to nothing has no sign."""
    tenths = round(1000 * share)
    return f"{tenths / 10:+.1f} %".replace("-", "−") if tenths else "0 %"


def embedded(picture: Rgb) -> str:
    """A picture as a data URL."""
    coded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()


def _least(evaluation: dict[str, Any]) -> float:
    """Where the axis of shares begins: a tenth below the lowest interval, so that differences can be seen."""
    if "metrics" not in evaluation:
        return 0.0
    lows: list[float] = [one["accuracy"]["low"] for one in evaluation["slices"] if not one["few"]]
    lows += [one["low"] for one in evaluation["robustness"]["altered"].values()]
    lows += [one[name]["low"] for one in evaluation["per_class"].values() for name in ("precision", "recall")]
    lows += [evaluation["metrics"][name]["low"] for name in ("accuracy", "balanced_accuracy", "macro_f1")]
    return max(0.0, math.floor(10 * min(lows)) / 10)
