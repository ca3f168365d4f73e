"""The named checks. Their thresholds are `settings.quality` and the two of `settings.data` that the snapshot and the
ingest go by too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch.config import Settings
from lawnwatch.quality.facts import Facts, Pictures
from lawnwatch.quality.noise import Noise


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        value: what was found; None when there was nothing to judge.
        threshold: what is allowed.
        found, allowed: the two for people.
        sentence: what was found, and what it means.
        advice: what to do when the check fails.
    """

    name: str
    passed: bool
    value: float | None
    threshold: float
    found: str
    allowed: str
    sentence: str
    advice: str


@dataclass(frozen=True)
class QualityResult:
    """A report that lies complete in the store.

    Attributes:
        report: its id, 32 hexadecimal digits.
        passed: whether every check passed.
        forced: why failed checks were overruled; None when they were not.
        created: False when the same images had the same report before.
    """

    report: str
    passed: bool
    forced: str | None
    created: bool
    checks: list[Check]
    object_key: str
    report_url: str
    message: str


def judge(facts: Facts, noise: Noise, settings: Settings) -> list[Check]:
    """Every check on these facts, in the order of the report."""
    quality, data, p = settings.quality, settings.data, facts.pictures
    per_class = facts.per_class()
    usable = {name: count for name, count in per_class.items() if count}
    fewest, most = min(per_class, key=lambda n: (per_class[n], n)), max(per_class, key=lambda n: (per_class[n], n))
    short = {name: count for name, count in per_class.items() if count < data.min_per_class}
    imbalance = per_class[most] / max(1, per_class[fewest])
    conflicts = facts.refused("label_conflict")
    refused = facts.refused()
    tried = facts.records + sum(count for (s, _, _), count in facts.outcomes.items() if s not in (
        "stored", "pending", "claimed"))  # fmt: skip
    host, from_host = next(iter(facts.hosts.items()))
    small = int(np.count_nonzero(p.side < quality.min_side))
    blank = int(np.count_nonzero(is_blank(p, settings)))
    outside = [suspect for suspect in noise.suspects if not suspect.trained_on]
    return [
        Check(
            "enough_classes",
            len(usable) >= 2,
            len(usable),
            2,
            str(len(usable)),
            "at least 2",
            f"{_count(len(usable), 'class')} with usable images: {_listed(usable)}."
            + ("" if len(usable) >= 2 else " At least two are needed to tell apart."),
            "Add image records of another label with `lawnwatch catalog import`, then run `lawnwatch ingest`.",
        ),
        Check(
            "enough_images",
            not short,
            per_class[fewest],
            data.min_per_class,
            f"{per_class[fewest]:,}",
            f"at least {data.min_per_class:,}",
            "; ".join(
                f"{name} has {_count(count, 'usable image')}" for name, count in islice(sorted(short.items()), 10)
            )
            + f"; at least {data.min_per_class} are needed."
            if short
            else f"Every class has at least {data.min_per_class} usable images; {fewest} has the fewest, "
            f"{per_class[fewest]:,}.",
            f"Add image records of {_listed(short or [fewest])} and run `lawnwatch ingest`.",
        ),
        Check(
            "class_balance",
            imbalance <= quality.max_imbalance,
            imbalance,
            quality.max_imbalance,
            f"{imbalance:.1f} : 1",
            f"at most {quality.max_imbalance:g} : 1",
            f"The largest class, {most}, has {per_class[most]:,} images, the smallest, {fewest}, {per_class[fewest]:,}"
            + (
                "."
                if imbalance <= quality.max_imbalance
                else f"; at most {quality.max_imbalance:g} for one are allowed."
            ),
            f"Add image records of {fewest}.",
        ),
        _share(
            "label_conflicts",
            conflicts,
            facts.records + conflicts,
            quality.max_label_conflicts,
            "records had to be quarantined, because copies of one picture carry different labels",
            "Look at the quarantine sheet and correct them with `lawnwatch catalog relabel RECORD LABEL`.",
        ),
        _share(
            "copies",
            facts.records - facts.groups,
            facts.records,
            quality.max_copies,
            "stored records only repeated or resembled another one",
            "Look at the near-duplicate sheet; add pictures from other sources.",
        ),
        _share(
            "too_small",
            small,
            len(p),
            quality.max_too_small,
            f"images measured less than {quality.min_side} pixels on their shorter side",
            "Replace thumbnails by the original pictures.",
        ),
        _share(
            "blank",
            blank,
            len(p),
            quality.max_blank,
            "images showed next to nothing: all dark, all bright or without contrast",
            "Look at the darkest, brightest and least sharp of each class; sources often answer with a placeholder.",
        ),
        _share(
            "one_source",
            from_host,
            facts.records,
            quality.max_one_host,
            f"stored records came from {host}",
            "Add pictures from other sources: a model learns the habits of a single one.",
        ),
        _share(
            "failed_fetches",
            refused,
            tried,
            data.max_bad_ratio,
            "records that were tried could not be fetched or decoded",
            "See the reasons below; `lawnwatch catalog retry --state failed` fetches again what may have passed.",
        ),
        _share(
            "label_suspects",
            len(outside),
            noise.outside,
            quality.max_label_suspects,
            "images that the champion never trained on had a label that it confidently disputed",
            "Look at the label suspects and correct them with `lawnwatch catalog relabel RECORD LABEL`.",
            nothing=noise.why_not or "The champion was asked about no image that it had not trained on.",
        ),
    ]


def _share(
    name: str,
    part: int,
    whole: int,
    most: float,
    what: str,
    advice: str,
    *,
    nothing: str = "There is nothing to judge.",
) -> Check:
    """A check that at most a share `most` of `whole` is `part`; without a whole it passes unjudged."""
    allowed = f"at most {percent(most)}"
    if not whole:
        return Check(name, True, None, most, "not judged", allowed, nothing, advice)
    share = part / whole
    sentence = f"{part:,} of {whole:,} {what}"
    passed = share <= most
    return Check(
        name,
        passed,
        share,
        most,
        percent(share),
        allowed,
        f"{sentence}." if passed else f"{sentence} ({percent(share)}); {allowed} may be.",
        advice,
    )


def is_blank(p: Pictures, settings: Settings) -> NDArray[np.bool_]:
    """(n,) bool: pictures on which next to nothing can be seen."""
    quality = settings.quality
    return (
        (p.brightness < quality.min_brightness)
        | (p.brightness > quality.max_brightness)
        | (p.sharpness < quality.min_sharpness)
    )


def percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.2g} %" if percent < 1 else f"{percent:.1f} %".replace(".0 ", " ")


def _count(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def _listed(names: Any) -> str:
    first = list(islice(names, 6))
    return ", ".join(first) + (", …" if len(names) > 6 else "") if first else "none"
