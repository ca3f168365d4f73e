"""The quality report: what the stored images look like, and the checks they must pass.

One page per state of the catalog, kept in the store as HTML and JSON: figures from every stored image, contact sheets
from a few of them. The thresholds of the checks are `settings.quality` and the two of `settings.data` that the snapshot
and the ingest use too. The report is named by what it says, so that looking twice at the same images changes nothing.

Label noise is found by confident learning (Northcutt, Jiang, Chuang, "Confident learning: estimating uncertainty in
dataset labels", JAIR 70, 2021): the champion disputes a label when another class is at least as probable as that
class usually is for its own images.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from lawnwatch import bundle, dataset, images
from lawnwatch.catalog import Catalog, ImageRecord, Label, QualityReport, utc_now
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, InputError, LawnwatchError, NotFound
from lawnwatch.store import ObjectStore

FORMAT = 1  # of the page; another format is another report
CHUNK = 10_000  # records read at once
THREADS = 4  # pictures read and decoded at once
JUDGED_BY_SETTLE = ("label_conflict", "split_bridge")  # quarantined, though the fetch was good
OUTSIDE = 10  # images that the champion never saw, from which a class's usual probability is taken

# The page must open on a phone: about 300 thumbnails of 6 kB, whatever the number of classes.
CLASS_TILES, OTHER_TILES, FEWEST_TILES = 150, 48, 8
TILE = (150, 96)  # pixels

# Colours that the colour-blind can tell apart (Okabe and Ito, 2008), in the order of the sorted classes.
COLOURS = ("#e69f00", "#009e73", "#56b4e9", "#d55e00", "#0072b2", "#cc79a7", "#8c6d31")
OTHER_COLOUR = "#8a8f86"

Progress = Callable[[str], None]
Floats = NDArray[np.float64]


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


class ChecksFailed(DataError):
    """Images that must not become a snapshot; `result` is the report that says why."""

    def __init__(self, message: str, *, hint: str, result: QualityResult) -> None:
        super().__init__(message, hint=hint)
        self.result = result


def report(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    *,
    find_champion: Callable[[], bundle.Bundle],
    force: bool = False,
    reason: str = "",
    progress: Progress,
) -> QualityResult:
    """Settle the stored images, look at them, judge them, and keep the report.

    Args:
        find_champion: gives the released champion; whatever it raises leaves the label-noise section out.
        force: go on although checks fail; needs a reason.
        reason: why, recorded with the report.

    Raises:
        ChecksFailed: a check failed and was not forced; the report is recorded by then.
        DataError: no image is stored. InputError: force without a reason. Unavailable.
    """
    reason = reason.strip()
    if force and not reason:
        raise InputError("--force needs a reason.", hint='Say why: --force --reason "only a trial".')
    if len(reason) > 500:
        raise InputError(f"A reason has at most 500 characters; received {len(reason)}.")
    settled = dataset.settle(settings, catalog)
    facts = catalog.retried(partial(read_facts, catalog))
    if not len(facts.pictures):
        counts = ", ".join(f"{count} {state}" for state, count in sorted(facts.states().items())) or "none"
        raise DataError(
            f"No image is stored; the catalog's records are: {counts}.",
            hint="Add image records with `lawnwatch catalog import` and run `lawnwatch ingest`.",
        )
    progress(f"Looking at {len(facts.pictures):,} stored images of {len(facts.classes)} class(es).")
    champion, why_not = _found(find_champion)
    forced = reason if force else ""
    seed = _digest(settings, facts, settled, champion, why_not)
    for kept in (_id(seed, ""), _id(seed, forced)):  # what passes is not forced, and known by its plain name
        known = _known(settings, catalog, store, facts, kept)
        if known is not None and (known.passed or known.forced == (forced or None)):
            return _answered(known)

    noise = (
        dispute(settings, catalog, store, champion, facts.classes, progress) if champion else Noise.left_out(why_not)
    )
    checks = judge(facts, noise, settings)
    passed = all(check.passed for check in checks)
    overruled = forced if forced and not passed else None
    number = _id(seed, overruled or "")
    key = f"reports/quality/{number}.html"
    failed = [check for check in checks if not check.passed]
    result = QualityResult(
        report=number,
        passed=passed,
        forced=overruled,
        created=True,
        checks=checks,
        object_key=key,
        report_url=_url(settings, number),
        message=_message(facts, failed, overruled),
    )
    progress("Drawing the report.")
    sheets = draw_sheets(settings, catalog, store, facts, settled, noise)
    created_at = utc_now()
    page = _page(settings, result, facts, settled, noise, sheets, created_at.strftime("%-d %B %Y, %H:%M UTC"))
    document = {"created_at": created_at.isoformat(), **asdict(result), "facts": facts.summary(), "noise": asdict(noise)}
    store.put(
        key.removesuffix("html") + "json",
        json.dumps(document, indent=1, ensure_ascii=False).encode(),
        content_type="application/json",
    )
    store.put(key, page, content_type="text/html; charset=utf-8")
    catalog.retried(partial(_record, catalog, result))
    return _answered(result)


def _answered(result: QualityResult) -> QualityResult:
    """The result, or its failure."""
    if result.passed or result.forced:
        return result
    failed = [check for check in result.checks if not check.passed]
    raise ChecksFailed(
        " ".join(check.sentence for check in failed),
        hint=" ".join(dict.fromkeys(check.advice for check in failed))
        + f' The report: {result.report_url}. `lawnwatch data quality --force --reason "…"` goes on all the same.',
        result=result,
    )


def _message(facts: Facts, failed: list[Check], forced: str | None) -> str:
    counted = f"{len(facts.pictures):,} images of {', '.join(facts.classes[:8])}{', …' if len(facts.classes) > 8 else ''}"
    if not failed:
        return f"The {counted} pass every quality check."
    names = ", ".join(check.name for check in failed)
    return f"The {counted} fail {len(failed)} quality check(s): {names}" + (
        f"; overruled: {forced}" if forced else "."
    )


# --- the facts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """The distinct stored pictures, one place each in every column, in order of SHA-256.

    Attributes:
        id: (n,) int64, the first record of the picture.
        label: (n,) int32, class number.
        split: (n,) int8, place in `dataset.SPLITS`; -1 when it has none.
        side: (n,) float64, shorter side, pixels.
        brightness, sharpness: (n,) float64, as `images` measures them. All three are NaN where not measured.
        digest: SHA-256 of all of it with the pictures' own.
    """

    id: NDArray[np.int64]
    label: NDArray[np.int32]
    split: NDArray[np.int8]
    side: Floats
    brightness: Floats
    sharpness: Floats
    digest: str

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True)
class Facts:
    """What the catalog says of its images.

    Attributes:
        classes: names of the labels of every record that was tried, sorted.
        pictures: the distinct stored ones.
        records: stored records; more than pictures when several URLs gave the same bytes.
        groups: duplicate groups among them.
        hosts: stored records by host, most first.
        sources: stored records by what their source said at the last recheck.
        outcomes: (state, reason code, label) to records, of all records.
    """

    classes: list[str]
    pictures: Pictures
    records: int
    groups: int
    hosts: dict[str, int]
    sources: dict[str, int]
    outcomes: dict[tuple[str, str, str], int]

    def states(self) -> dict[str, int]:
        """Records by state."""
        counts: Counter[str] = Counter()
        for (state, _, _), count in self.outcomes.items():
            counts[state] += count
        return dict(counts)

    def refused(self, *codes: str) -> int:
        """Records that ended unusable with one of these reason codes; with no code, for any reason of the fetch."""
        return sum(
            count
            for (state, code, _), count in self.outcomes.items()
            if state in ("quarantined", "blocked", "gone", "failed")
            and (code in codes if codes else code not in JUDGED_BY_SETTLE)
        )

    def per_class(self) -> dict[str, int]:
        """Usable pictures by class, zero included."""
        counts = np.bincount(self.pictures.label, minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True)}

    def balance(self) -> dict[str, dict[str, int]]:
        """Usable pictures by class and split."""
        p = self.pictures
        return {
            name: {
                split: int(np.count_nonzero((p.label == number) & (p.split == place)))
                for place, split in enumerate(dataset.SPLITS)
            }
            for number, name in enumerate(self.classes)
        }

    def summary(self) -> dict[str, Any]:
        """The figures as JSON values."""
        p = self.pictures
        return {
            "images": len(p),
            "records": self.records,
            "groups": self.groups,
            "balance": self.balance(),
            "states": self.states(),
            "reasons": [
                {"state": state, "reason": code, "label": label, "records": count}
                for (state, code, label), count in sorted(self.outcomes.items())
                if code
            ],
            "hosts": dict(islice(self.hosts.items(), 100)),
            "sources": self.sources,
            "quantiles": {
                name: _quantiles(column)
                for name, column in (("side", p.side), ("brightness", p.brightness), ("sharpness", p.sharpness))
            },
        }


def read_facts(catalog: Catalog) -> Facts:
    """Read the catalog in columns, in short transactions; 100 bytes of memory an image. Raises Unavailable."""
    outcomes = _outcomes(catalog)
    classes = sorted({label for state, _, label in outcomes if state not in ("pending", "claimed")})
    with catalog.session() as session:
        numbers = {n: classes.index(name) for n, name in session.execute(sa.select(Label.id, Label.name)) if name in classes}
    hosts: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    chunks = []
    for rows in _stored(catalog):
        hosts.update(_host(row.url) for row in rows)
        sources.update(row.source_status or "not asked again" for row in rows)
        chunks.append(_columns([row for row in rows if row.label_id in numbers], numbers))
    table = np.concatenate(chunks) if chunks else _columns([], numbers)
    _, first = np.unique(table["sha"], return_index=True)  # of copies, the first record speaks
    distinct = table[first]
    pictures = Pictures(
        id=distinct["id"],
        label=distinct["label"],
        split=distinct["split"],
        side=distinct["side"],
        brightness=distinct["brightness"],
        sharpness=distinct["sharpness"],
        digest=hashlib.sha256(distinct.tobytes()).hexdigest(),
    )
    return Facts(
        classes=classes,
        pictures=pictures,
        records=len(table),
        groups=len(np.unique(table["group"])),
        hosts=dict(sorted(hosts.items(), key=lambda item: (-item[1], item[0]))),
        sources=dict(sources.most_common()),
        outcomes=outcomes,
    )


def _outcomes(catalog: Catalog) -> dict[tuple[str, str, str], int]:
    reason = sa.func.coalesce(ImageRecord.reason, "")
    code = sa.func.substr(reason, 1, sa.func.instr(reason, ":"))
    with catalog.session() as session:
        rows = session.execute(
            sa.select(ImageRecord.state, code, Label.name, sa.func.count())
            .join(Label, ImageRecord.label_id == Label.id)
            .group_by(ImageRecord.state, code, Label.name)
        ).all()
    return {(state, found.rstrip(":"), label): int(count) for state, found, label, count in rows}


def _stored(catalog: Catalog) -> Iterator[Sequence[Any]]:
    """All stored records, `CHUNK` at a time in order of id; no transaction outlives its chunk."""
    last = 0
    while True:
        with catalog.session() as session:
            rows = session.execute(
                sa.select(
                    ImageRecord.id,
                    ImageRecord.label_id,
                    ImageRecord.sha256,
                    ImageRecord.group_id,
                    ImageRecord.split,
                    ImageRecord.width,
                    ImageRecord.height,
                    ImageRecord.brightness,
                    ImageRecord.sharpness,
                    ImageRecord.url,
                    ImageRecord.source_status,
                )
                .where(ImageRecord.state == "stored", ImageRecord.id > last)
                .order_by(ImageRecord.id)
                .limit(CHUNK)
            ).all()
        if not rows:
            return
        last = rows[-1].id
        yield rows


def _columns(rows: Sequence[Any], numbers: dict[int, int]) -> NDArray[Any]:
    """Records as a structured array; half a SHA-256 tells pictures apart well enough."""
    place = {name: number for number, name in enumerate(dataset.SPLITS)}
    nan = float("nan")
    return np.array(
        [
            (
                row.id,
                row.sha256[:32],
                (row.group_id or row.sha256)[:32],
                numbers[row.label_id],
                place.get(row.split, -1),
                min(row.width, row.height) if row.width and row.height else nan,
                nan if row.brightness is None else row.brightness,
                nan if row.sharpness is None else row.sharpness,
            )
            for row in rows
        ],
        dtype=[
            ("id", np.int64), ("sha", "S32"), ("group", "S32"), ("label", np.int32), ("split", np.int8),
            ("side", np.float64), ("brightness", np.float64), ("sharpness", np.float64),
        ],
    )  # fmt: skip


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or url
    except ValueError:
        return url


def _quantiles(column: Floats) -> dict[str, float]:
    measured = column[~np.isnan(column)]
    if not len(measured):
        return {}
    return {
        name: round(float(value), 4)
        for name, value in zip(
            ("min", "p05", "median", "p95", "max"), np.quantile(measured, (0, 0.05, 0.5, 0.95, 1)), strict=True
        )
    }


# --- the checks -----------------------------------------------------------------------------------------------------


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
            "; ".join(f"{name} has {_count(count, 'usable image')}" for name, count in islice(sorted(short.items()), 10))
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
            f"{most} has {per_class[most]:,} images, {fewest} {per_class[fewest]:,}"
            + (" images, fewer than one for every " if imbalance > quality.max_imbalance else ", not fewer than one for every ")
            + f"{quality.max_imbalance:g}.",
            f"Add image records of {fewest}.",
        ),
        _share(
            "label_conflicts",
            conflicts,
            facts.records + conflicts,
            quality.max_label_conflicts,
            "records are quarantined because copies of one picture carry different labels",
            "Look at the quarantine sheet and correct them with `lawnwatch catalog relabel URL LABEL`.",
        ),
        _share(
            "copies",
            facts.records - facts.groups,
            facts.records,
            quality.max_copies,
            "stored records only repeat or resemble another one",
            "Look at the near-duplicate sheet; add pictures from other sources.",
        ),
        _share(
            "too_small",
            small,
            len(p),
            quality.max_too_small,
            f"images are less than {quality.min_side} pixels on their shorter side",
            "Replace thumbnails by the original pictures.",
        ),
        _share(
            "blank",
            blank,
            len(p),
            quality.max_blank,
            "images show next to nothing: all dark, all bright or without contrast",
            "Look at the darkest, brightest and least sharp of each class; sources often answer with a placeholder.",
        ),
        _share(
            "one_source",
            from_host,
            facts.records,
            quality.max_one_host,
            f"stored records come from {host}",
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
            "images that the champion never trained on carry a label that it confidently disputes",
            "Look at the label suspects and correct them with `lawnwatch catalog relabel URL LABEL`.",
            nothing=noise.why_not or "The champion was asked about no image that it had not trained on.",
        ),
    ]


def _share(
    name: str, part: int, whole: int, most: float, what: str, advice: str, *, nothing: str = "There is nothing to judge."
) -> Check:
    """A check that at most a share `most` of `whole` is `part`; without a whole it passes unjudged."""
    allowed = f"at most {most:.3g}" if most < 0.001 and most else f"at most {_percent(most)}"
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
        _percent(share),
        allowed,
        f"{sentence}." if passed else f"{sentence} ({_percent(share)}); {allowed} may be.",
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


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _count(count: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def _listed(names: Any) -> str:
    first = list(islice(names, 6))
    return ", ".join(first) + (", …" if len(names) > 6 else "") if first else "none"


# --- label noise ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suspect:
    """An image whose label the champion disputes.

    Attributes:
        probability: of the class that the champion sees.
        given_probability: of the label that the record carries.
        trained_on: the champion learned this very label from it, so its dispute weighs more and comes rarely.
    """

    id: int
    label: str
    predicted: str
    probability: float
    given_probability: float
    trained_on: bool


@dataclass(frozen=True)
class Noise:
    """What the champion says of the labels.

    Attributes:
        asked: images it was asked about. outside: those among them that it never trained on.
        usual: class to the mean probability it gives images of that class.
        why_not: why it was not asked, when it was not.
    """

    champion: int | None
    asked: int
    outside: int
    usual: dict[str, float]
    suspects: list[Suspect]
    why_not: str

    @staticmethod
    def left_out(why_not: str) -> Noise:
        return Noise(None, 0, 0, {}, [], why_not)


def _found(find_champion: Callable[[], bundle.Bundle]) -> tuple[bundle.Bundle | None, str]:
    try:
        return find_champion(), ""
    except NotFound as error:
        return None, f"Labels were not questioned: {error.message}"
    except LawnwatchError as error:
        return None, f"Labels were not questioned, because the champion cannot be read: {error.message}"


def dispute(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    champion: bundle.Bundle,
    classes: list[str],
    progress: Progress,
) -> Noise:
    """Ask the champion about the newest images, those it never trained on first. Raises Unavailable."""
    manifest = champion.manifest
    known = sorted(set(manifest.classes) & set(classes))
    if not known:
        return Noise.left_out(f"Labels were not questioned: champion v{manifest.model_version} knows none of them.")
    # Stored before that training and of its split: the champion has (or could have) learned the label from it.
    trained_on = sa.and_(ImageRecord.split == "train", ImageRecord.fetched_at < manifest.lineage.created_at)
    with catalog.session() as session:
        rows = session.execute(
            sa.select(ImageRecord.id, ImageRecord.object_key, Label.name, sa.case((trained_on, 1), else_=0))
            .join(Label, ImageRecord.label_id == Label.id)
            .where(ImageRecord.state == "stored", Label.name.in_(known))
            .order_by(sa.case((trained_on, 1), else_=0), ImageRecord.id.desc())
            .limit(settings.quality.label_images)
        ).all()
    rows = list({row.object_key: row for row in reversed(rows)}.values())[::-1]
    if not rows:
        return Noise.left_out("Labels were not questioned: LAWNWATCH_QUALITY__LABEL_IMAGES is 0.")
    graph = bundle.Graph(champion.bytes_of(bundle.MODEL), classes=len(manifest.classes), threads=2)
    progress(f"Asking champion v{manifest.model_version} about the labels of {len(rows):,} images.")

    def read(key: str) -> images.Rgb | None:
        try:
            return images.decode(store.get(key), size=graph.size, max_pixels=settings.images.max_pixels)
        except (NotFound, images.ImageError):  # `lawnwatch data recheck` is the one that reports lost objects
            return None

    asked, answers = [], []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), 64):
            batch = rows[start : start + 64]
            for row, picture in zip(batch, pool.map(read, [row.object_key for row in batch]), strict=True):
                if picture is not None:
                    asked.append(row)
                    answers.append(graph(picture).logits)
    if not asked:
        return Noise.left_out("Labels were not questioned: none of the images could be read from the store.")
    p = bundle.probabilities(np.stack(answers), manifest.temperature)
    given = np.array([manifest.classes.index(row[2]) for row in asked])
    outside = np.array([not row[3] for row in asked])
    predicted, usual = disputed(p, given, outside)
    suspects = [
        Suspect(
            id=asked[i].id,
            label=asked[i][2],
            predicted=manifest.classes[int(predicted[i])],
            probability=round(float(p[i, predicted[i]]), 4),
            given_probability=round(float(p[i, given[i]]), 4),
            trained_on=not outside[i],
        )
        for i in np.flatnonzero(predicted != given)
    ]
    suspects.sort(key=lambda one: (one.trained_on, -one.probability, one.id))
    return Noise(
        champion=manifest.model_version,
        asked=len(asked),
        outside=int(outside.sum()),
        usual={manifest.classes[k]: round(float(u), 4) for k, u in enumerate(usual) if np.isfinite(u)},
        suspects=suspects,
        why_not="",
    )


def disputed(
    p: Floats, given: NDArray[np.int64], outside: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], Floats]:
    """The class that each image confidently belongs to, its given one where no other does (confident learning).

    A class's usual probability is its mean over the images given that class: over those outside the training where
    there are enough, because a model is surer of what it learned.

    Args:
        p: (n, k) probabilities that add up to 1. given: (n,) class numbers. outside: (n,) not trained on.

    Returns:
        (n,) class numbers, and (k,) usual probabilities, infinite for a class that no image was given.
    """
    usual = np.full(p.shape[1], np.inf)
    for k in range(p.shape[1]):
        mine = given == k
        if np.count_nonzero(mine & outside) >= OUTSIDE:
            mine &= outside
        if mine.any():
            usual[k] = p[mine, k].mean()
    confident = np.where(p >= usual, p, -1.0)
    best = confident.argmax(axis=1)
    return np.where(confident.max(axis=1) > 0, best, given), usual


# --- contact sheets -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One record on a sheet; `picture` is a data URI, empty when there is no object to show."""

    id: int
    url: str
    label: str
    state: str
    split: str
    reason: str
    picture: str = ""
    width: int = TILE[0]
    height: int = TILE[1]
    note: str = ""


@dataclass(frozen=True)
class Sheets:
    """The contact sheets.

    Attributes:
        classes: (class, [(row title, tiles)]).
        quarantine: quarantined pictures that exist. refused: records without a picture.
        pairs: (Hamming distance in bits, the two pictures).
        suspects: tiles in the order of `Noise.suspects`.
    """

    classes: list[tuple[str, list[tuple[str, list[Tile]]]]]
    quarantine: list[Tile]
    refused: list[Tile]
    pairs: list[tuple[int, Tile, Tile]]
    suspects: list[tuple[Suspect, Tile]]


def draw_sheets(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    facts: Facts,
    settled: dataset.Settled,
    noise: Noise,
) -> Sheets:
    """Choose the pictures worth a look and read them. Raises Unavailable."""
    most = min(settings.quality.contact_sheet, OTHER_TILES)
    rows = {name: _spread(facts.pictures, facts.classes.index(name), count) for name, count in _shown(facts, settings)}
    suspects = noise.suspects[:most]
    with catalog.session() as session:
        distances = _distances(session, settled.near_duplicates)[: max(1, most // 2)]
        judged = _newest(session, most, JUDGED_BY_SETTLE)
        refused = _newest(session, most)
        ids = {i for spread in rows.values() for _, members in spread for i, _ in members}
        ids |= {suspect.id for suspect in suspects} | {i for _, *pair in distances for i in pair}
        chosen: dict[int, Any] = {row.id: row for row in judged}
        for start in range(0, len(ids), 500):
            part = sorted(ids)[start : start + 500]
            found = session.scalars(sa.select(ImageRecord).where(ImageRecord.id.in_(part)))
            chosen |= {record.id: record for record in found}

    def tile(record: ImageRecord) -> Tile:
        blank = Tile(
            id=record.id,
            url=record.url,
            label=record.label.name,
            state=record.state,
            split=record.split or "",
            reason=record.reason or "",
        )
        if not record.object_key:
            return blank
        try:
            data = store.get(record.object_key)
            rgb = images.thumbnail(data, width=TILE[0], height=TILE[1], max_pixels=settings.images.max_pixels)
        except (NotFound, images.ImageError):
            return blank
        uri = "data:image/jpeg;base64," + base64.b64encode(images.jpeg(rgb)).decode()
        return replace(blank, picture=uri, height=rgb.shape[0], width=rgb.shape[1])

    with ThreadPoolExecutor(THREADS) as pool:
        tiles = dict(zip(chosen, pool.map(tile, chosen.values()), strict=True))
    return Sheets(
        classes=[
            (name, [(title, [replace(tiles[i], note=note) for i, note in members if i in tiles]) for title, members in spread])
            for name, spread in rows.items()
        ],
        quarantine=[tiles[record.id] for record in judged],
        refused=[tile(record) for record in refused],
        pairs=[(bits, tiles[one], tiles[two]) for bits, one, two in distances],
        suspects=[(suspect, tiles[suspect.id]) for suspect in suspects if suspect.id in tiles],
    )


def _shown(facts: Facts, settings: Settings) -> list[tuple[str, int]]:
    """(class, tiles) of the classes that have a sheet: all, or the smallest where there are too many for one page."""
    counts = {name: count for name, count in facts.per_class().items() if count}
    smallest = sorted(counts, key=lambda name: (counts[name], name))[: CLASS_TILES // FEWEST_TILES]
    return [(name, min(settings.quality.contact_sheet, CLASS_TILES // len(smallest))) for name in sorted(smallest)]


def _spread(p: Pictures, label: int, count: int) -> list[tuple[str, list[tuple[int, str]]]]:
    """Rows of (record id, note): the extremes of a class, then a random look at the rest."""
    mine = np.flatnonzero(p.label == label)
    each = max(1, count // 8)
    rows: list[tuple[str, list[tuple[int, str]]]] = []
    left = count
    for title, column, sign, form in (
        ("Darkest", p.brightness, 1, "{:.0%} bright"),
        ("Brightest", p.brightness, -1, "{:.0%} bright"),
        ("Least sharp", p.sharpness, 1, "sharpness {:,.0f}"),
        ("Smallest", p.side, 1, "{:.0f} px"),
    ):
        measured = mine[~np.isnan(column[mine])]
        if left > each and len(measured):
            extreme = measured[np.argsort(sign * column[measured], kind="stable")[:each]]
            rows.append((title, [(int(p.id[i]), form.format(column[i])) for i in extreme]))
            left -= len(extreme)
    # In order of SHA-256 the first ones are a random choice that is the same each time.
    return [("A random look", [(int(p.id[i]), "") for i in mine[:left]]), *rows]


def _distances(session: Session, pairs: list[tuple[str, str]]) -> list[tuple[int, int, int]]:
    """(bits, record, record) of each pair, the most doubtful first."""
    shas = sorted({sha for pair in pairs for sha in pair})
    first: dict[str, tuple[int, int]] = {}
    for start in range(0, len(shas), 500):
        part = shas[start : start + 500]
        found = session.execute(
            sa.select(ImageRecord.sha256, sa.func.min(ImageRecord.id), sa.func.min(ImageRecord.phash))
            .where(ImageRecord.sha256.in_(part))
            .group_by(ImageRecord.sha256)
        )
        first |= {sha: (number, int(phash or "0", 16)) for sha, number, phash in found}
    known = [(first[one], first[two]) for one, two in pairs if one in first and two in first]
    return sorted(((a[1] ^ b[1]).bit_count(), a[0], b[0]) for a, b in known)[::-1]


def _newest(session: Session, count: int, codes: tuple[str, ...] = ()) -> list[ImageRecord]:
    """The newest records with these reason codes; with none, of all other records that cannot be used."""
    judged = [ImageRecord.reason.startswith(f"{code}:", autoescape=True) for code in codes or JUDGED_BY_SETTLE]
    query = sa.select(ImageRecord).order_by(ImageRecord.id.desc()).limit(count)
    if codes:
        # Side by side, those that contradict each other.
        found = session.scalars(query.where(ImageRecord.state == "quarantined", sa.or_(*judged)))
        return sorted(found, key=lambda record: (record.sha256 or "", record.id))
    states = ("quarantined", "blocked", "gone", "failed")
    other = sa.or_(ImageRecord.reason.is_(None), sa.not_(sa.or_(*judged)))
    return list(session.scalars(query.where(ImageRecord.state.in_(states), other)))


# --- the page -------------------------------------------------------------------------------------------------------


def _page(
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
    environment.filters["percent"] = _percent
    environment.filters["host"] = _host
    environment.filters["code"] = lambda reason: reason.partition(":")[0].replace("_", " ")
    environment.filters["rest"] = lambda reason: reason.partition(": ")[2]
    # A plot holds numbers and our own words only, nothing of a stranger's that would need escaping.
    plots = [(title, Markup(plot), below) for title, plot, below in _plots(facts, settings)]  # noqa: S704
    return (
        environment.get_template("quality.html.j2")
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
        if state in ("quarantined", "blocked", "gone", "failed"):
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
    low, high = limits or (float(column[measured].min()), float(column[measured].max()))
    low, high = (min(low, *lines), max(high, *lines)) if not limits else limits
    low, high = (low * 0.8, high * 1.25) if log else (low, high)
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
            ticks = [t for t in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000) if low <= t <= high]
            axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
            axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set(xlim=(low, high), ylim=(0, None), ylabel="share of class")
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
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


# --- the record -----------------------------------------------------------------------------------------------------


def _digest(
    settings: Settings,
    facts: Facts,
    settled: dataset.Settled,
    champion: bundle.Bundle | None,
    why_not: str,
) -> str:
    """Everything that the report says follows from this."""
    said = [
        FORMAT,
        settings.quality.model_dump(),
        settings.data.min_per_class,
        settings.data.max_bad_ratio,
        facts.pictures.digest,
        facts.summary(),
        settled.near_duplicates,
        champion.sha256 if champion else why_not,
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _id(digest: str, forced: str) -> str:
    """The report's name; an overruled one is a report of its own."""
    return hashlib.sha256(f"{digest}\n{forced}".encode()).hexdigest()[:32]


def _url(settings: Settings, number: str) -> str:
    return f"{settings.api_url.rstrip('/')}/reports/quality/{number}"


def _known(
    settings: Settings, catalog: Catalog, store: ObjectStore, facts: Facts, number: str
) -> QualityResult | None:
    """The report of that name, when it is recorded and lies in the store; it becomes the latest one again."""

    def find() -> QualityReport | None:
        with catalog.session() as session:
            row = session.get(QualityReport, number)
            latest = session.scalar(sa.select(QualityReport.id).order_by(QualityReport.created_at.desc()).limit(1))
            if row is not None and latest != number:
                row.created_at = utc_now()
            return row

    row = catalog.retried(find)
    if row is None or store.stat(row.object_key) is None:
        return None
    checks = [Check(**check) for check in row.checks]
    return QualityResult(
        report=row.id,
        passed=row.passed,
        forced=row.forced,
        created=False,
        checks=checks,
        object_key=row.object_key,
        report_url=_url(settings, row.id),
        message=_message(facts, [check for check in checks if not check.passed], row.forced),
    )


def _record(catalog: Catalog, result: QualityResult) -> None:
    with catalog.exclusive("quality"), catalog.session() as session:
        session.merge(
            QualityReport(
                id=result.report,
                created_at=utc_now(),
                passed=result.passed,
                forced=result.forced,
                checks=[asdict(check) for check in result.checks],
                object_key=result.object_key,
            )
        )
