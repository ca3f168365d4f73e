"""Who may become champion: one policy, a few exact tests, a verdict with its reasons. Pure functions.

A model must pass the absolute floors. A challenger must also be compared with the champion on the same test images, and
is promoted on one of two claims:

- *better*: the exact McNemar test, one-sided at level alpha (McNemar 1947). Of challengers that are no better, at most
  a share of alpha is promoted on this claim.
- *not worse*: an exact unconditional test shows that it is not worse by the margin, and there is a recorded reason to
  change. Of challengers that are worse by the margin, at most a share of alpha is promoted. With a hundred test images
  a good champion can hardly ever be beaten, so without this claim no new data would ever reach production.

Each promise is for one challenger. Whatever the claim, no class may be worse by the class margin, and probabilities,
answers to altered images, time and size must be within their limits: further conditions make a wrong promotion rarer,
never likelier. `benchmarks/gate_simulation.py` counts all of it.

Not `reject` but `inconclusive` is the verdict where more test images might still show what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lawnwatch.config import GateSettings
from lawnwatch.measure import bootstrap_mean, quantile, wilson

RESAMPLES = 2000
EXACT_IMAGES = 5000  # beyond, the score's normal limit is as good and far quicker
POWER = 0.8  # with which "collect about N more" would tell
MOST_IMAGES = 1_000_000

Status = Literal["passed", "failed", "unsure", "not judged"]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


# --- what is judged, and what comes out -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reduced:
    """What reducing the arithmetic of the served graph cost and gained, on held-out images.

    Attributes:
        images: on which the graph was compared with the float32 Keras model.
        change: its accuracy minus that model's on the same images.
        speedup: times as fast as the float32 graph in one run.
    """

    arithmetic: str
    images: int
    change: float
    speedup: float


@dataclass(frozen=True)
class Evidence:
    """What was measured of one model on the n test images. What is None was not measured and is not judged.

    Attributes:
        labels: the truth of each image.
        right: (n,) which images it answered right.
        classes: those it must tell apart; of one that no test image shows, nothing is known.
        losses: (n,) negative log of the calibrated probability of the truth.
        ece: expected calibration error with its 95 % interval: `value`, `low`, `high`.
        unknown: (n,) which images it called unknown.
        robust: alteration → (m,) which of the same first m images it answered right when they were altered so.
        latency_ms: median time of one inference; challenger and champion in turn on the same images.
        model_bytes: size of the model file.
        variant: of a served graph of reduced arithmetic; None when it is the float32 one.
    """

    labels: Sequence[str]
    right: Bools
    classes: Sequence[str] = ()
    losses: Floats | None = None
    ece: dict[str, float] | None = None
    unknown: Bools | None = None
    robust: dict[str, Bools] = field(default_factory=dict)
    latency_ms: float | None = None
    model_bytes: int | None = None
    variant: Reduced | None = None


@dataclass(frozen=True)
class Check:
    """One question to a model.

    Attributes:
        status: `passed`; `failed`: shown to break the rule; `unsure`: more images may tell; `not judged`.
        sentence: the answer in words and numbers.
        more_images: about how many more test images would tell, when unsure.
    """

    name: str
    status: Status
    sentence: str
    more_images: int | None = None


@dataclass(frozen=True)
class Decision:
    """The verdict.

    Attributes:
        decision: `promote`, `reject` or `inconclusive`.
        claim: what a promotion rests on: `floors`, `better` or `not worse`; empty without one.
        reason: why, for people.
        checks: every question that was asked.
        comparison: the paired figures; None without a champion.
        more_images: about how many more test images would tell, when inconclusive.
    """

    decision: Literal["promote", "reject", "inconclusive"]
    reason: str
    claim: str = ""
    checks: list[Check] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    more_images: int | None = None


# --- exact tests of paired answers --------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedGain:
    """Challenger's accuracy minus the champion's, on the same pictures.

    Attributes:
        wins: pictures that only the challenger had right.
        losses: pictures that only the champion had right.
        low, high: bounds of the gain by Tango's score, each at level alpha.
        p_better, p_worse: exact McNemar test, one-sided, of "no better" and of "no worse".
        p_not_worse: exact test of "worse by the margin or more".
        bootstrap: bounds by the paired bootstrap, each at level alpha.
    """

    images: int
    wins: int
    losses: int
    gain: float
    low: float
    high: float
    p_better: float
    p_worse: float
    p_not_worse: float
    bootstrap: tuple[float, float]


def paired_gain(challenger: Bools, champion: Bools, *, alpha: float, margin: float) -> PairedGain:
    """Compare two models by which of the same n pictures each had right."""
    n, wins, losses = len(challenger), int((challenger & ~champion).sum()), int((champion & ~challenger).sum())
    # Resampling n images with +1, 0, -1 on them is drawing how often each comes.
    rates = [wins / n, losses / n, 1 - (wins + losses) / n]
    draws = np.random.default_rng(0).multinomial(n, rates, RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [alpha, 1 - alpha])
    return PairedGain(
        images=n,
        wins=wins,
        losses=losses,
        gain=(wins - losses) / n,
        low=-_largest_loss(wins, losses, n, alpha),
        high=_largest_loss(losses, wins, n, alpha),
        p_better=mcnemar(wins, losses),
        p_worse=mcnemar(losses, wins),
        p_not_worse=not_worse(wins, losses, n, margin),
        bootstrap=(float(low), float(high)),
    )


def mcnemar(wins: int, losses: int) -> float:
    """Exact one-sided p of McNemar's test: the chance of so many wins or more if neither model is better."""
    from scipy.stats import binom  # type: ignore[import-untyped]

    return float(binom.sf(wins - 1, wins + losses, 0.5))


@lru_cache(maxsize=100_000)
def not_worse(wins: int, losses: int, n: int, margin: float) -> float:
    """Exact p of the hypothesis that the challenger is worse by the margin or more.

    Outcomes are ordered by Tango's score statistic (Tango 1998). The p-value is the largest chance, over every rate of
    wins, of an outcome that speaks at least as strongly for the challenger, when it loses `margin` more than it wins
    (an unconditional test: Hsueh, Liu and Chen 2001). The paired bootstrap cannot be used here: on 80 images with one
    loss it is wrong twice as often as it says. A negative margin asks whether the gain is larger than that.
    """
    from scipy.special import bdtr, gammaln, xlog1py, xlogy  # type: ignore[import-untyped]

    score = float(_score(np.array(float(wins)), np.array(float(losses)), n, margin))
    if n > EXACT_IMAGES:
        return 1 - NormalDist().cdf(score)
    w = np.arange(n + 1)
    most = _most_losses(score, n, margin)
    rates = _rates(margin)[:, np.newaxis]
    ways = gammaln(n + 1) - gammaln(w + 1) - gammaln(n - w + 1)
    chance = np.exp(ways + xlogy(w, rates) + xlog1py(n - w, -rates))  # (rates, n + 1) of so many wins
    at, won = np.nonzero((chance > 1e-12) & (most >= 0))
    lose = np.clip((rates[at, 0] + margin) / (1 - rates[at, 0]), 0, 1)
    few_enough = np.where(most[won] >= n - won, 1.0, bdtr(most[won].astype(float), n - won, lose))
    return float(min(np.bincount(at, weights=chance[at, won] * few_enough).max(initial=0.0), 1.0))


def _rates(margin: float) -> Floats:
    """Rates of wins among which the p-value is largest; dense where few pictures separate two good models."""
    least, most = max(0.0, -margin), (1 - margin) / 2 - 1e-6
    return np.unique(np.concatenate([np.linspace(least, min(least + 0.06, most), 40), np.linspace(least, most, 40)]))


def _score(wins: Floats, losses: Floats, n: int, margin: float) -> Floats:
    """Tango's statistic of H0 "gain = -margin"; larger speaks for the challenger."""
    b = wins + losses + margin * (losses - wins) - 2 * n * margin
    root = np.sqrt(np.maximum(b * b + 8 * n * wins * margin * (1 - margin), 0))
    rate = np.maximum((b + root) / (4 * n), max(0.0, -margin))  # of wins, most likely under H0
    return np.asarray((wins - losses + n * margin) / np.sqrt(n * (2 * rate + margin - margin**2)))


def _most_losses(score: float, n: int, margin: float) -> NDArray[np.int64]:
    """(n + 1,) for each number of wins, the most losses that still reach the score; -1: none does."""
    wins = np.arange(n + 1)
    low, high = np.full(n + 1, -1), n - wins
    while (low < high).any():
        middle = (low + high + 1) // 2
        reached = _score(wins.astype(float), middle.astype(float), n, margin) >= score - 1e-9
        low, high = np.where(reached, middle, low), np.where(reached, high, np.minimum(high, middle - 1))
    return low


def _largest_loss(wins: int, losses: int, n: int, alpha: float) -> float:
    """The largest loss of accuracy that the score does not rule out at level alpha (Tango's interval), to 0.0001."""
    low, high = (losses - wins) / n, 1.0
    while high - low > 0.0001:
        middle = (low + high) / 2
        ruled_out = _score(np.array(float(wins)), np.array(float(losses)), n, middle) >= quantile(1 - alpha)
        low, high = (low, middle) if ruled_out else (middle, high)
    return high


# --- the floors ---------------------------------------------------------------------------------------------


def floors(policy: GateSettings, model: Evidence) -> list[Check]:
    """What every model must reach, whoever is champion."""
    n, right = len(model.right), int(model.right.sum())
    checks = [_enough(policy, n), _accuracy(policy, right, n)]
    for label in sorted({*model.labels, *model.classes}):
        mine = np.array([one == label for one in model.labels], bool)
        hits, count = int(model.right[mine].sum()), int(mine.sum())
        low, high = wilson(hits, count)
        recall = hits / count if count else 0.0
        said = f"Recall of {label} is {recall:.1%} ({low:.1%} to {high:.1%}, {count} images)"
        checks.append(_at_least(f"recall of {label}", said, recall, high, policy.min_class_recall))
    if model.ece is not None:
        said = f"Calibration error is {model.ece['value']:.3f} ({model.ece['low']:.3f} to {model.ece['high']:.3f})"
        checks.append(_at_most("calibration", said, model.ece["value"], model.ece["low"], policy.max_ece, "{:.2f}"))
    if model.unknown is not None:
        called, count = int(model.unknown.sum()), len(model.unknown)
        low, high = wilson(called, count)
        said = f"It calls {called / count:.1%} of the test images unknown ({low:.1%} to {high:.1%})"
        checks.append(_at_most("unknown", said, called / count, low, policy.max_unknown, "{:.0%}"))
    if model.robust:
        worst = min(model.robust, key=lambda kind: float(model.robust[kind].mean()))
        hits, count = int(model.robust[worst].sum()), len(model.robust[worst])
        low, high = wilson(hits, count)
        said = f"On altered images it is worst when {worst}: {hits / count:.1%} ({low:.1%} to {high:.1%})"
        checks.append(_at_least("robustness", said, hits / count, high, policy.min_robust_accuracy))
    if model.latency_ms is not None:
        said = f"One inference takes {model.latency_ms:.1f} ms"
        checks.append(_at_most("latency", said, model.latency_ms, model.latency_ms, policy.max_latency_ms, "{:.0f} ms"))
    if model.model_bytes is not None:
        megabytes = model.model_bytes / 1e6
        said = f"The model file has {megabytes:.1f} MB"
        checks.append(_at_most("size", said, megabytes, megabytes, policy.max_model_bytes / 1e6, "{:.1f} MB"))
    if model.variant is not None:
        checks.append(_variant(policy, model.variant))
    return checks


def _enough(policy: GateSettings, n: int) -> Check:
    if n >= policy.min_test_images:
        return Check("test images", "passed", f"There are {n} test images; {policy.min_test_images} were asked.")
    said = "There are no test images" if n == 0 else f"There are {n} test images"
    return Check(
        "test images",
        "unsure",
        f"{said}; nothing is decided on fewer than {policy.min_test_images}.",
        policy.min_test_images - n,
    )


def _accuracy(policy: GateSettings, right: int, n: int) -> Check:
    """The one floor that must be shown, by the lower bound: it is what a first champion rests on."""
    low, high = wilson(right, n)
    floor = policy.min_accuracy
    if n == 0:
        return Check("accuracy", "unsure", f"Accuracy was not measured; {floor:.0%} was asked.")
    said = f"Test accuracy is {right / n:.1%} (95 % interval {low:.1%} to {high:.1%}) on {n} images"
    if low >= floor:
        return Check("accuracy", "passed", f"{said}; at least {floor:.0%} was asked of the lower bound.")
    if high < floor:
        return Check("accuracy", "failed", f"{said}; at least {floor:.0%} was asked of the lower bound.")
    needed = n
    while low < floor <= high and needed < MOST_IMAGES:
        needed += max(1, needed // 20)
        low, high = wilson(round(right / n * needed), needed)
    return Check("accuracy", "unsure", f"{said}; the lower bound must reach {floor:.0%}.", needed - n)


def _variant(policy: GateSettings, served: Reduced) -> Check:
    """Reduced arithmetic must cost next to nothing and must be worth it; training chose by the same rule."""
    kept = served.change >= -policy.variant_loss - 1e-9 and served.speedup >= policy.variant_speedup
    return Check(
        "served variant",
        "passed" if kept else "failed",
        f"The served {served.arithmetic} graph is {_signed(served.change)} against float32 Keras on {served.images} "
        f"held-out images ({_signed(-policy.variant_loss)} is allowed) and {served.speedup:.2f} times as fast as "
        f"float32 ({policy.variant_speedup:.2f} is asked).",
    )


def _at_least(name: str, said: str, value: float, high: float, limit: float) -> Check:
    """Passed by the measured value; failed only where even the upper bound is below the limit."""
    status: Status = "passed" if value >= limit else "failed" if high < limit else "unsure"
    return Check(name, status, f"{said}; at least {limit:.0%} was asked.")


def _at_most(name: str, said: str, value: float, low: float, limit: float, form: str) -> Check:
    status: Status = "passed" if value <= limit else "failed" if low > limit else "unsure"
    return Check(name, status, f"{said}; at most {form.format(limit)} was asked.")


# --- against the champion -----------------------------------------------------------------------------------


def compare(policy: GateSettings, challenger: Evidence, champion: Evidence) -> tuple[PairedGain, list[Check]]:
    """Challenger and champion on the same test images: the paired gain, and every condition of a promotion."""
    pair = paired_gain(challenger.right, champion.right, alpha=policy.alpha, margin=policy.margin)
    checks = [_overall(policy, pair), *_classes(policy, challenger, champion)]
    if challenger.losses is not None and champion.losses is not None:
        mean, low, high = bootstrap_mean(challenger.losses - champion.losses, policy.alpha)
        said = f"Log loss is {mean:+.3f} against the champion's ({low:+.3f} to {high:+.3f})"
        checks.append(_at_most("calibration against champion", said, mean, low, policy.log_loss_margin, "+{:.2f}"))
    kinds = [kind for kind in challenger.robust if kind in champion.robust]
    if kinds:
        ours, theirs = (np.stack([model.robust[kind] for kind in kinds]) for model in (challenger, champion))
        drop, low, high = bootstrap_mean((theirs.astype(float) - ours).mean(axis=0), policy.alpha)
        said = f"On altered images it is {_signed(-drop)} against the champion ({_signed(-high)} to {_signed(-low)})"
        status: Status = (
            "passed" if drop <= policy.robust_margin else "failed" if low > policy.robust_margin else "unsure"
        )
        checks.append(Check("robustness against champion", status, f"{said}; -{policy.robust_margin:.0%} is allowed."))
    if challenger.latency_ms is not None and champion.latency_ms is not None:
        ratio = challenger.latency_ms / champion.latency_ms
        said = f"One inference takes {ratio:.2f} times the champion's {champion.latency_ms:.1f} ms"
        checks.append(_at_most("latency against champion", said, ratio, ratio, policy.max_latency_ratio, "{:.2f}"))
    return pair, checks


def _overall(policy: GateSettings, pair: PairedGain) -> Check:
    said = (
        f"On {pair.images} test images the challenger is {_signed(pair.gain)} against the champion "
        f"({pair.wins} won, {pair.losses} lost; {100 * (1 - 2 * policy.alpha):.0f} % interval "
        f"{_signed(pair.low)} to {_signed(pair.high)})"
    )
    if pair.p_better <= policy.alpha:
        return Check("accuracy against champion", "passed", f"{said}: it is better, McNemar {_p(pair.p_better)}.")
    if pair.p_worse <= policy.alpha:
        return Check("accuracy against champion", "failed", f"{said}: it is worse, McNemar {_p(pair.p_worse)}.")
    limit = f"worse by {policy.margin:.0%}, {_p(pair.p_not_worse)}"
    if pair.p_not_worse <= policy.alpha:
        return Check("accuracy against champion", "passed", f"{said}: it is not {limit}.")
    more = images_to_tell(pair.wins, pair.losses, pair.images, alpha=policy.alpha, margin=policy.margin)
    return Check("accuracy against champion", "unsure", f"{said}: it may still be {limit}.", more)


def _classes(policy: GateSettings, challenger: Evidence, champion: Evidence) -> list[Check]:
    """Each class must not be worse by the class margin: a gain elsewhere does not pay for it."""
    labels = sorted(set(challenger.labels))
    checks = []
    for label in labels:
        mine = np.array([one == label for one in challenger.labels])
        ours, theirs = challenger.right[mine], champion.right[mine]
        n, wins, losses = len(ours), int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        name = f"{label} against champion"
        said = f"{label}: {wins} won, {losses} lost of {n} images"
        p = not_worse(wins, losses, n, policy.class_margin)
        smallest = math.ceil(math.log(policy.alpha) / math.log(1 - policy.class_margin))
        if mcnemar(losses, wins) <= policy.alpha / len(labels):  # many classes, many tries to look bad
            checks.append(Check(name, "failed", f"{said}: it is worse."))
        elif p <= policy.alpha:
            checks.append(Check(name, "passed", f"{said}: it is not worse by {policy.class_margin:.0%}, {_p(p)}."))
        elif n < smallest:
            said += f": fewer than {smallest} images cannot show that it is not worse by {policy.class_margin:.0%}"
            checks.append(Check(name, "not judged", f"{said}."))
        else:
            more = images_to_tell(wins, losses, n, alpha=policy.alpha, margin=policy.class_margin)
            said += f": it may still be worse by {policy.class_margin:.0%}, {_p(p)}"
            checks.append(Check(name, "unsure", f"{said}.", more * len(labels)))
    return checks


def _signed(share: float) -> str:
    tenths = round(1000 * share)
    return f"{tenths / 10:+.1f}%" if tenths else "0%"


def _p(value: float) -> str:
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def images_to_tell(wins: int, losses: int, n: int, *, alpha: float, margin: float) -> int:
    """How many more test images would decide with 80 % power, if the rates seen so far are the true ones.

    The sample size of a paired non-inferiority test by normal approximation (Nam 1997); where the challenger is behind
    by more than the margin, that of showing that it is worse.
    """
    z = quantile(1 - alpha) + quantile(POWER)
    separating = (wins + losses + 1) / (n + 2)
    gain = (wins - losses) / n
    distance = max(gain + margin if gain > -margin else -gain, 0.01)
    needed = z * z * max(separating, margin) / distance**2
    smallest = math.log(alpha) / math.log(1 - margin)  # images with which no loss at all is enough
    return max(1, math.ceil(max(needed, smallest)) - n)


def images_to_show(gain: float, separating: int, n: int, *, alpha: float) -> int | None:
    """How many more test images would show a gain of this size with 80 % power; None where there is none to show.

    The sample size of McNemar's test (Connor 1987).
    """
    if gain <= 0:
        return None
    rate = separating / n
    z = quantile(1 - alpha) * math.sqrt(rate) + quantile(POWER) * math.sqrt(max(rate - gain**2, 0))
    return max(1, math.ceil((z / gain) ** 2) - n)


# --- the verdict --------------------------------------------------------------------------------------------


def decide(
    policy: GateSettings, challenger: Evidence, champion: Evidence | None = None, reasons: Sequence[str] = ()
) -> Decision:
    """Promote, reject, or say how many more test images would tell.

    Args:
        policy: every threshold.
        challenger: what was measured of the model.
        champion: the same of the champion, on the same images; None when there is none yet.
        reasons: recorded reasons to change a champion that the challenger merely equals.
    """
    checks = floors(policy, challenger)
    if champion is None or any(check.status in ("failed", "unsure") for check in checks):
        return _settled(checks, "floors")
    pair, compared = compare(policy, challenger, champion)
    checks += compared
    better = pair.p_better <= policy.alpha
    comparison = {
        "images": pair.images,
        "gain": pair.gain,
        "low": pair.low,
        "high": pair.high,
        "bootstrap_low": pair.bootstrap[0],
        "bootstrap_high": pair.bootstrap[1],
        "wins": pair.wins,
        "losses": pair.losses,
        "p_better": pair.p_better,
        "p_worse": pair.p_worse,
        "p_not_worse": pair.p_not_worse,
        "reasons": list(reasons),
    }
    if not better and not reasons and not any(check.status in ("failed", "unsure") for check in compared):
        more = images_to_show(pair.gain, pair.wins + pair.losses, pair.images, alpha=policy.alpha)
        said = (
            f"{compared[0].sentence} But it is not shown to be better, and no reason to change is recorded: "
            "new data, a cheaper variant, or what --reason says."
        )
        said += f" Collect about {more} more labelled test images to show a gain of this size." if more else ""
        return Decision("inconclusive", said, checks=checks, comparison=comparison, more_images=more)
    settled = _settled(checks, "better" if better else "not worse", lead=compared[0])
    if settled.decision == "promote" and not better:
        because = f"{settled.reason} There is a reason to change: {'; '.join(reasons)}."
        return Decision("promote", because, "not worse", checks, comparison)
    return Decision(
        settled.decision, settled.reason, settled.claim, checks, comparison, more_images=settled.more_images
    )


def _settled(checks: list[Check], claim: str, lead: Check | None = None) -> Decision:
    """Rejected by what failed, undecided by what is unsure, else promoted; the main question is answered first."""
    lead = lead or next(check for check in checks if check.name == "accuracy")
    failed = [check for check in checks if check.status == "failed"]
    unsure = [check for check in checks if check.status == "unsure"]
    stopping = failed or unsure
    said = " ".join(check.sentence for check in dict.fromkeys([lead, *stopping]))
    if failed:
        return Decision("reject", said, checks=checks)
    if unsure:
        more = max((check.more_images or 0 for check in unsure), default=0)
        if more >= MOST_IMAGES // 2:
            return Decision(
                "inconclusive", f"{said} No number of images that can be collected would tell.", checks=checks
            )
        if more:
            said += f" Collect about {more} more labelled test images to tell."
        return Decision("inconclusive", said, checks=checks, more_images=more or None)
    return Decision("promote", said, claim, checks)
