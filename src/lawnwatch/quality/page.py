"""The report as one HTML file that loads nothing."""

from __future__ import annotations

import io
import re
from collections import Counter
from itertools import islice

import numpy as np

from lawnwatch import dataset
from lawnwatch.config import Settings
from lawnwatch.quality.checks import QualityResult, percent
from lawnwatch.quality.facts import JUDGED_BY_SETTLE, REFUSED, Facts, Floats, host_of
from lawnwatch.quality.noise import Noise
from lawnwatch.quality.sheets import Sheets

# Colours that the colour-blind can tell apart (Okabe and Ito, 2008), in the order of the sorted classes.
COLOURS = ("#e69f00", "#009e73", "#56b4e9", "#d55e00", "#0072b2", "#cc79a7", "#8c6d31")
OTHER_COLOUR = "#8a8f86"


def render(
    settings: Settings,
    result: QualityResult,
    facts: Facts,
    settled: dataset.Settled,
    noise: Noise,
    sheets: Sheets,
    moment: str,
) -> bytes:
    """The report as one HTML file that loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    shades = {name: COLOURS[n] if n < len(COLOURS) else OTHER_COLOUR for n, name in enumerate(facts.classes)}
    environment = Environment(
        loader=PackageLoader("lawnwatch", ""),
        autoescape=True,  # URLs and labels are strangers' text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["host"] = host_of
    environment.filters["code"] = lambda reason: reason.partition(":")[0].replace("_", " ")
    environment.filters["rest"] = lambda reason: reason.partition(": ")[2]
    # A plot holds numbers and our own words only, nothing of a stranger's that would need escaping.
    plots = [(title, Markup(plot), below) for title, plot, below in _plots(facts, settings)]  # noqa: S704
    return (
        environment.get_template("quality/page.html.j2")
        .render(
            result=result,
            failed=[check for check in result.checks if not check.passed],
            facts=facts,
            balance=facts.balance(),
            largest=max(facts.per_class().values()),
            counts=facts.per_class(),
            hosts=list(islice(facts.hosts.items(), 12)),
            settled=settled,
            noise=noise,
            sheets=sheets,
            shades=shades,
            splits=dataset.SPLITS,
            plots=plots,
            moment=moment,
            quality=settings.quality,
            data=settings.data,
            refused=facts.refused(),
            judged=facts.refused(*JUDGED_BY_SETTLE),
            reasons=_reasons(facts),
        )
        .encode()
    )


def _reasons(facts: Facts) -> list[tuple[str, str, int]]:
    """(state, reason code, records) of what cannot be used, most first."""
    counts: Counter[tuple[str, str]] = Counter()
    for (state, code, _), count in facts.outcomes.items():
        if state in REFUSED:
            counts[state, code] += count
    return [(state, code, count) for (state, code), count in counts.most_common()]


def _plots(facts: Facts, settings: Settings) -> list[tuple[str, str, str]]:
    """(title, SVG, what the line in it means) of the distributions by class."""
    p, quality = facts.pictures, settings.quality
    return [
        (
            "Shorter side, pixels",
            _histogram(facts, p.side, log=True, lines=[quality.min_side]),
            f"Left of the line: too small, less than {quality.min_side} pixels.",
        ),
        (
            "Brightness",
            _histogram(facts, p.brightness, lines=[quality.min_brightness, quality.max_brightness], limits=(0, 1)),
            "Mean luma, 0 black to 1 white. Outside the lines an image counts as blank.",
        ),
        (
            "Sharpness",
            _histogram(facts, np.maximum(p.sharpness, 1.0), log=True, lines=[quality.min_sharpness]),
            "Variance of the Laplacian; low means blurred. Left of the line an image counts as blank.",
        ),
    ]


def _histogram(
    facts: Facts,
    column: Floats,
    *,
    lines: list[float],
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:
    """Shares of each class's images over a column, as SVG that takes its ink from the page."""
    import matplotlib
    from matplotlib.figure import Figure

    label = facts.pictures.label
    measured = ~np.isnan(column)
    if not measured.any():
        return ""
    reach = [*limits] if limits else [float(column[measured].min()), float(column[measured].max()), *lines]
    low, high = (min(reach) * 0.8, max(reach) * 1.25) if log else (min(reach), max(reach))
    edges = np.geomspace(low, high, 31) if log else np.linspace(low, high, 31)
    ink = "#010203"
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lawnwatch", "font.size": 11}):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        rest = label >= len(COLOURS)
        drawn = [(COLOURS[n], label == n) for n in range(min(len(facts.classes), len(COLOURS)))]
        for colour, mine in [*drawn, (OTHER_COLOUR, rest)]:
            chosen = column[mine & measured]
            if len(chosen):
                shares = np.histogram(np.clip(chosen, low, high), edges)[0] / len(chosen)
                axes.stairs(shares, edges, fill=True, color=colour, alpha=0.28)
                axes.stairs(shares, edges, color=colour, linewidth=1.8)
        for line in lines:
            axes.axvline(line, color=ink, linewidth=1, linestyle=(0, (4, 3)))
        if log:
            axes.set_xscale("log")
            step = 1 if high / low < 300 else 2  # every third of a decade, or every decade
            ticks = [
                t for t in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)[::step] if low <= t <= high
            ]
            axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
            axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set(xlim=(low, high), ylim=(0, None), ylabel="share of class")
        axes.spines[["top", "right"]].set_visible(False)
        for part in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            part.set_color(ink)
        axes.tick_params(colors=ink)
        for spine in axes.spines.values():
            spine.set_color(ink)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    svg = re.sub(r'\s(?:id="[\w.]+_\d+")', "", svg)  # repeated in every plot, used by none
    svg = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)
    return re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px system-ui, sans-serif", svg)
