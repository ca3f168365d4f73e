"""The step: settle, look, judge, keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import sqlalchemy as sa

from lawnwatch import bundle, dataset
from lawnwatch.catalog import Catalog, QualityReport
from lawnwatch.config import Settings
from lawnwatch.database import utc_now
from lawnwatch.errors import DataError, InputError, LawnwatchError, NotFound
from lawnwatch.quality import page
from lawnwatch.quality.checks import Check, QualityResult, judge
from lawnwatch.quality.facts import Facts, read_facts
from lawnwatch.quality.noise import Noise, dispute
from lawnwatch.quality.sheets import draw_sheets
from lawnwatch.store import ObjectStore

FORMAT = 1  # of the page; another format is another report

Progress = Callable[[str], None]


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
    html = page.render(settings, result, facts, settled, noise, sheets, created_at.strftime("%-d %B %Y, %H:%M UTC"))
    document = {
        "created_at": created_at.isoformat(),
        **asdict(result),
        "facts": facts.summary(),
        "noise": asdict(noise),
    }
    store.put(
        key.removesuffix("html") + "json",
        json.dumps(document, indent=1, ensure_ascii=False).encode(),
        content_type="application/json",
    )
    store.put(key, html, content_type="text/html; charset=utf-8")
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
    counted = (
        f"{len(facts.pictures):,} images of {', '.join(facts.classes[:8])}{', …' if len(facts.classes) > 8 else ''}"
    )
    if not failed:
        return f"The {counted} pass every quality check."
    names = ", ".join(check.name for check in failed)
    return f"The {counted} fail {len(failed)} quality check(s): {names}" + (f"; overruled: {forced}" if forced else ".")


def _found(find_champion: Callable[[], bundle.Bundle]) -> tuple[bundle.Bundle | None, str]:
    try:
        return find_champion(), ""
    except NotFound as error:
        return None, f"Labels were not questioned: {error.message}"
    except LawnwatchError as error:
        return None, f"Labels were not questioned, because the champion cannot be read: {error.message}"


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
    return f"{settings.public_url.rstrip('/')}/reports/quality/{number}"


def _known(settings: Settings, catalog: Catalog, store: ObjectStore, facts: Facts, number: str) -> QualityResult | None:
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
