"""Does the gate keep its promises? Thousands of simulated challengers of known accuracy go through `gate.decide`.

    python benchmarks/gate_simulation.py [--challengers 1000] [--plot docs/images/gate.png]

Two models answer the same n images. A part of what makes an image hard is shared, so that their mistakes coincide as
those of two networks trained on the same photographs do; the rest is each model's own. The gate sees answers, log
losses and answers to altered images, as in an evaluation, and never the truth.

Promises, at alpha = 5 % a challenger:
1. no better than the champion: promoted as *better* in at most 5 %;
2. worse by the margin, with a recorded reason: promoted, on whatever claim, in at most 5 %.
Exit code 1 when a count speaks against one (beyond three standard errors of the simulation).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lawnwatch import gate
from lawnwatch.config import GateSettings

POLICY = GateSettings()
IMAGES = (80, 400, 2000)
CHAMPIONS = (0.90, 0.96)
SHARED = (0.3, 0.8)  # of the variance of how hard an image is, the part that both models have in common
GAINS = (-0.05, -0.03, -0.01, 0.0, 0.01, 0.02, 0.03, 0.05)


def challenger_and_champion(
    rng: np.random.Generator, n: int, accuracy: float, gain: float, shared: float
) -> tuple[gate.Evidence, gate.Evidence]:
    """What an evaluation would have measured of a champion and of a challenger that is truly better by `gain`."""
    hard = rng.standard_normal((2, n)) * math.sqrt(shared)  # plain and altered images
    labels = np.where(np.arange(n) % 2, "dandelion", "grass").tolist()

    def model(true: float) -> gate.Evidence:
        own = rng.standard_normal((2, n)) * math.sqrt(1 - shared)
        margin = NormalDist().inv_cdf(min(true, 0.9999)) + hard + own
        losses: NDArray[np.float64] = np.log1p(np.exp(-2 * margin[0]))
        return gate.Evidence(labels, margin[0] > 0, losses, robust={"altered": margin[1] - 0.2 > 0})

    champion = model(accuracy)
    return model(min(accuracy + gain, 0.9999)), champion


def rates(seed: int, count: int, n: int, accuracy: float, gain: float, shared: float, reason: str) -> dict[str, float]:
    """Share of the verdicts on `count` challengers; promotions by their claim."""
    rng = np.random.default_rng([seed, n, round(accuracy * 1000), round((gain + 1) * 1000), round(shared * 10)])
    found: Counter[str] = Counter()
    for _ in range(count):
        verdict = gate.decide(
            POLICY, *challenger_and_champion(rng, n, accuracy, gain, shared), (reason,) if reason else ()
        )
        found[verdict.claim or verdict.decision] += 1
    return {name: found[name] / count for name in ("better", "not worse", "inconclusive", "reject")}


def promises(count: int) -> bool:
    """The table of wrong promotions."""
    allowed = POLICY.alpha + 3 * math.sqrt(POLICY.alpha * (1 - POLICY.alpha) / count)
    print(f"\nWrong promotions of {count} challengers each; at most {POLICY.alpha:.0%} is promised.\n")
    print("| test images | champion | shared difficulty | no better, called better | worse by the margin, promoted |")
    print("|---:|---:|---:|---:|---:|")
    kept = True
    for n in IMAGES:
        for accuracy in CHAMPIONS:
            for shared in SHARED:
                false_claim = rates(1, count, n, accuracy, 0.0, shared, "")["better"]
                worse = rates(2, count, n, accuracy, -POLICY.margin, shared, "new data")
                slipped = worse["better"] + worse["not worse"]
                kept = kept and max(false_claim, slipped) <= allowed
                print(f"| {n} | {accuracy:.0%} | {shared:.0%} | {false_claim:.1%} | {slipped:.1%} |", flush=True)
    return kept


def power(count: int) -> dict[int, dict[float, dict[str, float]]]:
    """The table of verdicts against the true gain; champion 90 %, a recorded reason."""
    print("\nVerdicts against the true gain; champion 90 %, shared difficulty 80 %, with a recorded reason.\n")
    print("| test images | true gain | better | not worse | inconclusive | reject |")
    print("|---:|---:|---:|---:|---:|---:|")
    found: dict[int, dict[float, dict[str, float]]] = {}
    for n in IMAGES:
        found[n] = {}
        for gain in GAINS:
            one = found[n][gain] = rates(3, count, n, CHAMPIONS[0], gain, SHARED[-1], "new data")
            print(f"| {n} | {gain:+.0%} | " + " | ".join(f"{share:.0%}" for share in one.values()) + " |", flush=True)
    return found


def plot(found: dict[int, dict[float, dict[str, float]]], file: Path) -> None:
    """Promotions against the true gain, one panel a claim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(panels, ("called better", "promoted, with a recorded reason"), strict=True):
        for (n, by_gain), color in zip(found.items(), ("#c98f0a", "#5a9c54", "#2f6b8b"), strict=True):
            shares = [one["better"] + (0 if title == "called better" else one["not worse"]) for one in by_gain.values()]
            axes.plot([100 * gain for gain in by_gain], shares, marker="o", ms=4, color=color, label=f"{n} test images")
        axes.axhline(POLICY.alpha, color="#888", lw=0.8, ls="--")
        axes.set(title=title, xlabel="true gain, percentage points", ylim=(-0.02, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of challengers")
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--challengers", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    kept = promises(given.challengers)
    found = power(given.challengers)
    if given.plot:
        plot(found, given.plot)
    print(f"\nThe promises are {'kept' if kept else 'BROKEN'}.")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
