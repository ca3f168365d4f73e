"""`lawnwatch STEP …`: one command per step, the same for a person, for Airflow and for CI.

Progress for people goes to stderr, one JSON object goes to stdout, and the exit code says what happened:

0 done · 1 a fault of ours · 2 wrong input or settings · 3 the data cannot carry the step · 4 bytes are not
what their hash says · 5 a server does not answer · 6 somebody else was first · 7 the rollout failed, the old
model serves · 99 nothing to do · 130 interrupted (SIGINT) · 143 told to stop (SIGTERM).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel

from lawnwatch import __version__, log
from lawnwatch.config import Settings, get_settings
from lawnwatch.errors import (
    NOTHING_TO_DO,
    Conflict,
    DataError,
    InputError,
    IntegrityError,
    LawnwatchError,
    NotFound,
    SettingsError,
)
from lawnwatch.keys import PREDICT
from lawnwatch.store import ObjectStore, open_store

if TYPE_CHECKING:
    # SQLAlchemy takes a third of a second, which `serve` and `--help` do without.
    from lawnwatch.catalog import Catalog, ImportReport

MOST_DAYS = 36_500  # a date so long ago can still be reckoned
INTERRUPTED, TOLD_TO_STOP = 128 + signal.SIGINT, 128 + signal.SIGTERM

app = typer.Typer(
    help="From a table of labelled image URLs to a watched image-classification service. "
    "One command per step; progress on stderr, one JSON object on stdout.",
    epilog="Exit codes: 0 done, 1 internal, 2 wrong input or settings, 3 data cannot carry the step, "
    "4 integrity, 5 server unavailable, 6 conflict, 7 rollout failed, 99 nothing to do, 130 interrupted, "
    "143 told to stop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
catalog_app = typer.Typer(help="The image records: which pictures there are and what they show.", no_args_is_help=True)
data_app = typer.Typer(help="Look after what is stored: quality report and recheck.", no_args_is_help=True)
snapshot_app = typer.Typer(help="Immutable lists of images with their splits.", no_args_is_help=True)
model_app = typer.Typer(help="Model versions, and which of them is champion.", no_args_is_help=True)
rollout_app = typer.Typer(help="Which released model version is served.", no_args_is_help=True)
predictions_app = typer.Typer(help="What the API answered, as it is recorded.", no_args_is_help=True)
key_app = typer.Typer(help="API keys: who may ask the API.", no_args_is_help=True)
app.add_typer(catalog_app, name="catalog")
app.add_typer(data_app, name="data")
app.add_typer(snapshot_app, name="snapshot")
app.add_typer(model_app, name="model")
app.add_typer(rollout_app, name="rollout")
app.add_typer(predictions_app, name="predictions")
app.add_typer(key_app, name="key")


# --- what every step shares ---------------------------------------------------------------------------------


def progress(line: str) -> None:
    """One line for people, on stderr."""
    typer.echo(line, err=True)


def table(head: list[str], rows: list[list[str]]) -> None:
    """A table for people, on stderr: figures to the right, words to the left."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    figures = [all(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    for row in (head, *rows):
        cells = zip(row, widths, figures, strict=True)
        progress("  ".join(cell.rjust(w) if figure else cell.ljust(w) for cell, w, figure in cells).rstrip())


def emit(result: Any, *, exit_code: int = 0) -> NoReturn:
    """Print the step's one JSON object on stdout, its message on stderr, and leave."""
    document = as_json(result)
    if isinstance(document, dict) and document.get("message"):
        progress(str(document["message"]))
    typer.echo(json.dumps(document, ensure_ascii=False, default=str))
    raise typer.Exit(exit_code)


def as_json(value: Any) -> Any:
    """Dataclasses and pydantic models as plain JSON values; bytes never reach the terminal."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return [as_json(item) for item in value]
    return str(value)


def opened() -> tuple[Settings, Catalog, ObjectStore]:
    """Settings, the migrated catalog and the object store: what almost every step needs."""
    settings = get_settings()
    return settings, opened_catalog(), open_store(settings)


def opened_catalog() -> Catalog:
    """The migrated catalog alone, for commands that touch no object."""
    from lawnwatch.catalog import Catalog

    settings = get_settings()
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"The folder that LAWNWATCH_HOME names cannot be made: {error.strerror}.",
            hint="Name one that this user may write to.",
        ) from None
    catalog = Catalog(settings)
    catalog.migrate()
    return catalog


def version_option(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option("--version", callback=version_option, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    settings = get_settings()
    log.configure(level=settings.log_level, json=settings.log_json, run_id=settings.run_id)


# --- catalog ------------------------------------------------------------------------------------------------


@catalog_app.command("add", epilog="Example: lawnwatch catalog add https://example.org/lawn.jpg grass")
def catalog_add(
    url: Annotated[str, typer.Argument(help="Source URL, http or https.")],
    label: Annotated[str, typer.Argument(help="What the picture shows.")],
) -> None:
    """Add one image record. Adding it again changes nothing; another label is reported as a conflict."""
    outcome = opened_catalog().add(url, label)
    message = {
        "added": f"Added {url} as {label}.",
        "unchanged": f"{url} is already in the catalog as {label}.",
        "conflict": f"{url} is in the catalog under another label; nothing was changed. "
        "`lawnwatch catalog relabel` changes it on purpose.",
    }[outcome]
    emit(
        {"url": url, "label": label, "outcome": outcome, "message": message},
        exit_code=6 if outcome == "conflict" else 0,
    )


LabelSource = Annotated[str, typer.Option(help="Recorded as the source of the labels, 1 to 16 characters.")]


@catalog_app.command("import", epilog="Example: lawnwatch catalog import urls.csv")
def catalog_import(
    file: Annotated[Path, typer.Argument(help="CSV with the header url,label, Parquet, or JSON lines.")],
    source: LabelSource = "import",
) -> None:
    """Add many image records. Importing twice changes nothing; bad lines go to a reject file.

    Exit code 3 when all of them are bad.
    """
    _imported(opened_catalog().import_file(file, source=source, on_progress=progress))


def _imported(report: ImportReport) -> NoReturn:
    """A file of which not one row is a record is most likely another file than was meant."""
    emit(report, exit_code=DataError.exit_code if report.rows and report.rejected == report.rows else 0)


@catalog_app.command("import-table", epilog="Example: lawnwatch catalog import-table plants_data")
def catalog_import_table(
    table: Annotated[str, typer.Argument(help="A table with one labelled URL per row.")],
    url_column: Annotated[str, typer.Option(help="Its column with the source URL.")] = "url_source",
    label_column: Annotated[str, typer.Option(help="Its column with the label.")] = "label",
    key_column: Annotated[
        str, typer.Option(help="A column that is unique and never NULL; the primary key when left out.")
    ] = "",
    source: LabelSource = "import",
) -> None:
    """Add the rows of an existing table, read from the database LAWNWATCH_IMPORT_DATABASE_URL.

    A setting and not an option, because everybody on a machine can read its command lines and the URL may hold a
    password. Without it, the table is in the catalog's own database. The table is only read. Exit code 3 when all
    rows are bad.
    """
    _imported(
        opened_catalog().import_table(
            table,
            url_column=url_column,
            label_column=label_column,
            key_column=key_column or None,
            source=source,
            on_progress=progress,
        )
    )


@catalog_app.command("export", epilog="Example: lawnwatch catalog export quarantined.csv --state quarantined")
def catalog_export(
    file: Annotated[Path, typer.Argument(help="A .csv, .parquet or .jsonl file; replaced when it exists.")],
    state: Annotated[str, typer.Option(help="Only records in this state.")] = "",
    label: Annotated[str, typer.Option(help="Only records of this label.")] = "",
) -> None:
    """Write the image records to a file that `catalog import` reads again.

    Cells are written as they are. Mind that a spreadsheet program takes a label that begins with = for a formula.
    """
    records = opened_catalog().export(file, state=state or None, label=label or None)
    emit({"file": str(file), "records": records, "message": f"{records:,} image record(s) written to {file}."})


@catalog_app.command("status", epilog="Example: lawnwatch catalog status")
def catalog_status() -> None:
    """How many image records there are, by state, by label and by both."""
    status = opened_catalog().status()
    states = list(status.by_state)
    if states:
        counted = status.by_label_and_state.items()
        table(["label", *states], [[label, *(f"{n.get(state, 0):,}" for state in states)] for label, n in counted])
    emit(status)


@catalog_app.command("list", epilog="Example: lawnwatch catalog list --state quarantined --reason label_conflict")
def catalog_list(
    state: Annotated[str, typer.Option(help="Only records in this state.")] = "",
    label: Annotated[str, typer.Option(help="Only records of this label.")] = "",
    reason: Annotated[str, typer.Option(help="Only records whose reason begins so, such as http_404.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    after: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Go on after the record of this id.")] = 0,
) -> None:
    """Image records with their reasons, for a person to look at."""
    records = opened_catalog().select(
        state=state or None, label=label or None, reason=reason or None, limit=limit, after=after
    )
    for record in records:
        progress(
            f"{record.id:>9}  {record.state:<11}  {record.label.name}  {record.url}  {record.reason or ''}".rstrip()
        )
    shown = ("id", "url", "state", "reason", "label_source", "attempts", "sha256", "object_key", "split")
    images = [{"label": record.label.name} | {name: getattr(record, name) for name in shown} for record in records]
    more = f"; `--after {records[-1].id}` shows more" if len(records) == limit else ""
    emit({"images": images, "message": f"{len(records)} image record(s){more}."})


@catalog_app.command("show", epilog="Example: lawnwatch catalog show https://example.org/lawn.jpg")
def catalog_show(image: Annotated[str, typer.Argument(help="Source URL or id of an image record.")]) -> None:
    """Everything that is known of one image record."""
    emit(opened_catalog().show(image))


@catalog_app.command("retry", epilog="Example: lawnwatch catalog retry --state failed --reason http_503")
def catalog_retry(
    image: Annotated[
        str, typer.Argument(help="Source URL or id of one image record; all that match when left out.")
    ] = "",
    state: Annotated[
        str, typer.Option(help="Which records to fetch again: failed, gone, blocked or quarantined.")
    ] = "failed",
    label: Annotated[str, typer.Option(help="Only records of this label.")] = "",
    reason: Annotated[str, typer.Option(help="Only records whose reason begins so, such as http_503.")] = "",
) -> None:
    """Make failed image records pending again, so that the next ingest fetches them."""
    count = opened_catalog().retry(state, label=label or None, reason=reason or None, image=image or None)
    what = image or f"{count:,} {state} image record(s)"
    emit({"retried": count, "message": f"{what} will be fetched again."})


@catalog_app.command("relabel", epilog="Example: lawnwatch catalog relabel https://example.org/lawn.jpg dandelion")
def catalog_relabel(
    image: Annotated[str, typer.Argument(help="Source URL or id of an image record.")],
    label: Annotated[str, typer.Argument(help="What the picture really shows.")],
) -> None:
    """Change a label; the old one stays in the record's history."""
    opened_catalog().relabel(image, label)
    emit({"image": image, "label": label, "message": f"{image} is now labelled {label}."})


# --- ingest and snapshot ------------------------------------------------------------------------------------


@app.command("ingest", epilog="Example: lawnwatch ingest --labels dandelion,grass --limit 100")
def ingest_command(
    labels: Annotated[str, typer.Option(help="Only these labels, separated by commas.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Fetch at most so many images.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Fetch nothing; print how the pending images are shared among parallel runs.")
    ] = False,
) -> None:
    """Fetch, validate and store every pending image of the catalog."""
    from lawnwatch import ingest

    wanted = [label.strip() for label in labels.split(",") if label.strip()] or None
    if plan:
        catalog = opened_catalog()
        emit(ingest.plan(catalog.settings, catalog, labels=wanted, limit=limit))
    settings, catalog, store = opened()
    emit(ingest.run(settings, catalog, store, labels=wanted, limit=limit, progress=progress))


@data_app.command("recheck", epilog="Example: lawnwatch data recheck --older-than 30 --limit 10000")
def data_recheck(
    limit: Annotated[int | None, typer.Option(min=1, help="Recheck at most so many images.")] = None,
    older_than: Annotated[
        float,
        typer.Option(min=0, max=MOST_DAYS, help="Only images that were not rechecked in so many days.", metavar="DAYS"),
    ] = 0.0,
    sources: Annotated[
        bool, typer.Option("--sources/--no-sources", help="Ask the sources whether they still give the same picture.")
    ] = True,
    objects: Annotated[
        bool, typer.Option("--objects/--no-objects", help="Read the stored objects and compare their SHA-256.")
    ] = True,
) -> None:
    """Find sources that died or changed and objects that rotted; repair from source. Exit code 4 when one is lost."""
    from lawnwatch import recheck

    report = recheck.run(
        *opened(), limit=limit, older_than_days=older_than, sources=sources, objects=objects, progress=progress
    )
    emit(report, exit_code=IntegrityError.exit_code if report.lost else 0)


@data_app.command("quality", epilog="Example: lawnwatch data quality")
def data_quality(
    force: Annotated[bool, typer.Option("--force", help="Go on although a check fails; needs a reason.")] = False,
    reason: Annotated[str, typer.Option(help="Why a failed check is overruled; recorded with the report.")] = "",
) -> None:
    """Look at the stored images, judge them and keep the report. Exit code 3 when a check fails."""
    from lawnwatch import bundle, quality, registry, release

    settings, catalog, store = opened()

    def champion() -> bundle.Bundle:
        if registry.champion(settings, catalog) is None:  # known without waking MLflow
            raise NotFound("there is no champion yet.")
        found = release.find(settings, catalog, store)
        return bundle.read(store, found.sha256, settings.home / "cache" / "bundles")

    try:
        emit(
            quality.report(
                settings, catalog, store, find_champion=champion, force=force, reason=reason, progress=progress
            )
        )
    except quality.ChecksFailed as failed:
        said = {"error": failed.code, "message": failed.message, "hint": failed.hint}
        progress(f"error: {failed.message}\n  {failed.hint}")
        typer.echo(json.dumps(as_json(failed.result) | said, ensure_ascii=False))
        raise typer.Exit(failed.exit_code) from None


@snapshot_app.command("create", epilog="Example: lawnwatch snapshot create")
def snapshot_create(
    new_to_test: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.99,
            help="Share of the images like none before that join the test split. A deliberate act, recorded with the "
            "snapshot: without it that split never grows, and figures on it stay comparable.",
        ),
    ] = 0.0,
) -> None:
    """Freeze what is stored now as a snapshot. Exit code 99 when the latest one already holds exactly that.

    An image keeps its split for life. Copies and resizings follow the image they resemble; other new images go to
    train or validation; copies that carry different labels, and images that resemble two splits, are quarantined.
    """
    from lawnwatch import dataset

    snapshot = dataset.create_snapshot(*opened(), new_to_test=new_to_test)
    emit(snapshot.summary(), exit_code=0 if snapshot.created or snapshot.renewed else NOTHING_TO_DO)


@snapshot_app.command("list", epilog="Example: lawnwatch snapshot list")
def snapshot_list() -> None:
    """All snapshots, newest first."""
    from lawnwatch import dataset

    emit({"snapshots": dataset.list_snapshots(opened_catalog())})


@snapshot_app.command("show", epilog="Example: lawnwatch snapshot show latest")
def snapshot_show(
    snapshot: Annotated[str, typer.Argument(help="Id, the beginning of one, or `latest`.")] = "latest",
) -> None:
    """One snapshot: its classes, its splits, what made it, and what is quarantined now and why."""
    from lawnwatch import dataset

    _, catalog, store = opened()
    emit(dataset.show_snapshot(catalog, store, snapshot))


@snapshot_app.command("diff", epilog="Example: lawnwatch snapshot diff 3f2a latest")
def snapshot_diff(
    one: Annotated[str, typer.Argument(help="The older snapshot: id, the beginning of one, or `latest`.")],
    other: Annotated[str, typer.Argument(help="The newer one.")] = "latest",
) -> None:
    """What changed between two snapshots: images added, removed, relabelled or moved, and the counts of both."""
    from lawnwatch import dataset

    _, catalog, store = opened()
    emit(dataset.diff_snapshots(catalog, store, one, other))


@snapshot_app.command("verify", epilog="Example: lawnwatch snapshot verify latest --pixels")
def snapshot_verify(
    snapshot: Annotated[str, typer.Argument(help="Id, the beginning of one, or `latest`.")] = "latest",
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Also decode every image and look for the same picture in two splits.")
    ] = False,
) -> None:
    """Prove a snapshot: its hash, every object's SHA-256, and that nothing leaks between splits. Exit code 4 if not."""
    from lawnwatch import dataset

    settings, catalog, store = opened()
    report = dataset.verify_snapshot(settings, catalog, store, snapshot, pixels=pixels, progress=progress)
    emit(report, exit_code=0 if report["ok"] else IntegrityError.exit_code)


# --- train, evaluate, model ---------------------------------------------------------------------------------


@app.command("train", epilog='Example: lawnwatch train --force --reason "new labels reviewed"')
def train_command(
    snapshot: Annotated[str, typer.Option(help="Snapshot id; the newest when left out.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Train even when nothing that training reads has changed.")
    ] = False,
    reason: Annotated[
        str, typer.Option(help="Why; recorded with the run, and required for a non-inferior promotion.")
    ] = "",
    candidates: Annotated[str, typer.Option(help="Names of the candidates, separated by commas; all if empty.")] = "",
    budget: Annotated[float | None, typer.Option(min=1, help="Seconds for training all candidates.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu; as set for all runs when left out.")] = "",
    candidate: Annotated[
        str,
        typer.Option(
            help="Train this one only and leave it for the run, which follows with the same snapshot and options."
        ),
    ] = "",
    check: Annotated[
        bool,
        typer.Option("--check", help="Train nothing; print whether there is anything to train, and in which steps."),
    ] = False,
) -> None:
    """Train the candidates on a snapshot and pick the best on the validation split.

    One command does it all. Where several machines share the work, `--check` prints the commands that may run side
    by side, one for each candidate, and the same command without `--check` gathers what they left.
    """
    from lawnwatch import train

    settings, catalog, store = opened()
    options = {"candidates": candidates, "budget": budget, "device": device}
    settings = with_train_options(settings, candidates=candidates, budget=budget, device=device)
    if check:
        found = train.check(settings, catalog, store, snapshot_id=snapshot or None, force=force, reason=reason)
        shared = [f"--{name}={value}" for name, value in options.items() if value not in ("", None)]
        argv = ["train", f"--snapshot={found.snapshot}", *shared]
        emit(as_json(found) | {"commands": [[*argv, f"--candidate={name}"] for name in found.candidates]})
    if candidate:
        emit(train.run_candidate(settings, catalog, store, candidate, snapshot_id=snapshot or None, progress=progress))
    emit(
        train.run(
            settings,
            catalog,
            store,
            snapshot_id=snapshot or None,
            force=force,
            reason=reason,
            progress=progress,
        )
    )


def with_train_options(settings: Settings, *, candidates: str, budget: float | None, device: str) -> Settings:
    """The settings, with those of the training that were given as options."""
    given: dict[str, Any] = {"budget_seconds": budget}
    given |= {"candidates": [name.strip() for name in candidates.split(",") if name.strip()] or None}
    given |= {"device": device or None}
    changed = settings.train.model_dump() | {name: value for name, value in given.items() if value is not None}
    try:
        return settings.model_copy(update={"train": type(settings.train).model_validate(changed)})
    except ValueError as error:
        raise InputError(
            f"the options of the training are not usable: {str(error).splitlines()[2].strip()}",
            hint="`lawnwatch train --help` says what each takes.",
        ) from error


@app.command("evaluate", epilog="Example: lawnwatch evaluate --run 3f2a…")
def evaluate_command(
    run: Annotated[str, typer.Option(help="Id of the training run, as `lawnwatch train` printed it.")],
) -> None:
    """Measure a run on the frozen test split and decide: promote, reject or inconclusive."""
    from lawnwatch import evaluate

    emit(evaluate.run(*opened(), run, progress=progress))


def share(one: dict[str, float]) -> str:
    """A share with its interval: `95.0% (87.8 to 98.0)`."""
    if not one:
        return "not measured"
    return f"{one['value']:.1%} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"


def interval(one: dict[str, float]) -> str:
    """A figure with its interval: `0.950 (0.878 to 0.980)`."""
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


@model_app.command("list", epilog="Example: lawnwatch model list")
def model_list() -> None:
    """All model versions, newest first, with alias and verdict."""
    from lawnwatch import registry

    settings, catalog, _ = opened()
    found = registry.list_versions(settings, catalog)
    if found:
        rows = [
            [f"v{one.version}", ", ".join(one.aliases) or "-", one.candidate, share(one.metrics["accuracy"]),
             one.snapshot[:12], f"{one.created_at:%Y-%m-%d %H:%M}", "yes" if one.bundle_sha256 else "no"]
            for one in found
        ]  # fmt: skip
        table(["version", "alias", "candidate", "test accuracy", "snapshot", "made", "released"], rows)
    none = "There is no model version yet: `lawnwatch train`, `evaluate` and `model promote` make one."
    emit({"versions": found, "message": f"{len(found)} version(s)." if found else none})


@model_app.command("show", epilog="Example: lawnwatch model show champion")
def model_show(version: Annotated[str, typer.Argument(help="Version number or alias.")] = "champion") -> None:
    """One model version: metrics, verdict and lineage."""
    from lawnwatch import registry

    settings, catalog, _ = opened()
    found = registry.show(settings, catalog, version)
    for name, value in {
        "verdict": f"{found.decision}: {found.reason}",
        "run": found.run_id,
        "snapshot": found.snapshot,
        "bundle": found.bundle_sha256 or "not released yet",
        "made": f"{found.created_at:%Y-%m-%d %H:%M} UTC",
    }.items():
        progress(f"{name:<9} {value}")
    emit(found)


@model_app.command("compare", epilog="Example: lawnwatch model compare previous champion")
def model_compare(
    one: Annotated[str, typer.Argument(help="Version number or alias.")],
    other: Annotated[str, typer.Argument(help="Version number or alias, compared with the first.")],
) -> None:
    """Two versions side by side: figures, training data, and the paired gain on common test images."""
    from lawnwatch import versions

    found = versions.compare(*opened(), one, other)
    names = [f"v{each['version']}" for each in found["versions"]]
    metrics = found["metrics"].items()
    table(["figure", *names], [[figure, *(interval(each[name]) for name in names)] for figure, each in metrics])
    data = found["data"]
    if data is not None:
        progress(f"Training data of {names[1]}: " + ", ".join(f"{n:,} {what}" for what, n in data.items()) + ".")
    emit(found)


@model_app.command("lineage", epilog="Example: lawnwatch model lineage champion")
def model_lineage(
    version: Annotated[str, typer.Argument(help="Version number or alias.")] = "champion",
    image: Annotated[
        str, typer.Option(help="Instead: an image's URL or SHA-256; which snapshots and versions it is in.")
    ] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most images of the snapshot that are listed.")] = 20,
) -> None:
    """Where a version comes from: run, snapshot, images; or, with --image, what was made of a picture."""
    from lawnwatch import versions

    if image:
        back = versions.lineage_of_image(*opened(), image)
        for held in back["snapshots"]:
            progress(f"snapshot {held['snapshot'][:12]}: {held['label']}, in {held['split']}")
        for made in back["versions"]:
            named = f" ({', '.join(made['aliases'])})" if made["aliases"] else ""
            progress(f"v{made['version']}{named}: {made['use']}")
        emit(back)
    found = versions.lineage(*opened(), version, limit=limit)
    for listed in found["images"]:
        progress(f"{listed['split']:<10}  {listed['label']}  {listed['sha256'][:12]}  {listed['url']}")
    if limit and found["image_total"] > limit:
        progress(f"… and {found['image_total'] - limit:,} more; --limit lists them.")
    emit(found)


@model_app.command("register", epilog="Example: lawnwatch model register --run 3f2a…")
def model_register(
    run: Annotated[str, typer.Option(help="Id of the evaluated run; its verdict must say promote.")],
) -> None:
    """Register the run's model as a version with alias `challenger`, before it is approved."""
    from lawnwatch import registry

    settings, catalog, _ = opened()
    emit(registry.register(settings, catalog, run))


@model_app.command("promote", epilog="Example: lawnwatch model promote --run 3f2a…")
def model_promote(
    run: Annotated[str, typer.Option(help="Id of the evaluated run; its verdict must say promote.")],
    again: Annotated[
        str, typer.Option(help="Why a model that was rolled back is promoted all the same; recorded.")
    ] = "",
) -> None:
    """Register the run's model as a version and make it champion, if its verdict still holds."""
    from lawnwatch import registry

    settings, catalog, store = opened()
    try:
        emit(registry.promote(settings, catalog, run, again=again))
    except Conflict as lost:
        progress(f"{lost.message} Judging the run again.")
    from lawnwatch import evaluate

    evaluate.run(settings, catalog, store, run, progress=progress)
    emit(registry.promote(settings, catalog, run, again=again))


@model_app.command("rollback", epilog="Example: lawnwatch model rollback && lawnwatch rollout undo")
def model_rollback() -> None:
    """Make the previous champion champion again; the one that it replaces is not promoted again by itself."""
    from lawnwatch import registry

    settings, catalog, _ = opened()
    emit(registry.rollback(settings, catalog))


@app.command("reproduce", epilog="Example: lawnwatch reproduce champion")
def reproduce_command(
    version: Annotated[str, typer.Argument(help="Version number or alias.")],
) -> None:
    """Train a version again from its record (snapshot, seed, settings) and say what differs, in figures and bytes."""
    from lawnwatch import versions

    emit(versions.reproduce(*opened(), version, progress=progress))


@app.command("release", epilog="Example: lawnwatch release --version 3")
def release_command(
    version: Annotated[str, typer.Option(help="Version number or alias.")] = "champion",
) -> None:
    """Build the bundle of a model version and publish it to the object store."""
    from lawnwatch import release

    emit(release.publish(*opened(), version, progress=progress))


# --- rollout and serve --------------------------------------------------------------------------------------


@rollout_app.command("start", epilog="Example: lawnwatch rollout start --version 3")
def rollout_start(
    version: Annotated[str, typer.Option(help="Version number or alias.")] = "champion",
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1, help="Seconds until the API must serve it; 60, or on Kubernetes while the Deployment progresses."
        ),
    ] = None,
) -> None:
    """Point the service at a released version and wait until it serves it; else put the old one back."""
    from lawnwatch import release, rollout

    settings, catalog, store = opened()
    released = release.find(settings, catalog, store, version)
    emit(
        rollout.target(settings, catalog, store).start(
            rollout.ReleaseTarget.single(released.version, released.sha256),
            timeout=timeout,
            progress=progress,
        )
    )


@rollout_app.command("status", epilog="Example: lawnwatch rollout status")
def rollout_status() -> None:
    """What the target says, and what the API serves."""
    from lawnwatch import rollout

    emit(rollout.target(*opened()).status())


@rollout_app.command("verify", epilog="Example: lawnwatch rollout verify")
def rollout_verify(
    timeout: Annotated[float, typer.Option(min=0, help="Seconds until the answers must be right.")] = 30.0,
) -> None:
    """Ask the API as a client would: alive, ready, and serving the target with its golden answers proven."""
    from lawnwatch import rollout

    settings = get_settings()
    emit(rollout.verify(settings, open_store(settings), timeout=timeout))


@rollout_app.command("history", epilog="Example: lawnwatch rollout history")
def rollout_history() -> None:
    """All rollouts, newest first."""
    from lawnwatch import rollout

    emit({"rollouts": rollout.target(*opened()).history()})


@rollout_app.command("undo", epilog="Example: lawnwatch rollout undo")
def rollout_undo(
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1, help="Seconds until the API must serve it; 60, or on Kubernetes while the Deployment progresses."
        ),
    ] = None,
) -> None:
    """Serve the version that was served before the last completed rollout."""
    from lawnwatch import rollout

    emit(rollout.target(*opened()).undo(timeout=timeout, progress=progress))


@app.command("serve", epilog="Example: lawnwatch serve --port 8000")
def serve_command(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")] = None,
) -> None:
    """Answer POST /predict with the released model until a signal ends it."""
    from lawnwatch.serving.server import run

    settings = get_settings()
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    run(settings.model_copy(update={"serving": settings.serving.model_copy(update=given)}))


@app.command("exporter", epilog="Example: lawnwatch exporter")
def exporter_command() -> None:
    """Export facts of the pipelines as Prometheus metrics until a signal ends it."""
    from lawnwatch import exporter
    from lawnwatch.catalog import Catalog

    settings = get_settings()
    exporter.serve(settings, Catalog(settings))  # not migrated here: it watches, and must start before the database


@predictions_app.command("prune", epilog="Example: lawnwatch predictions prune --days 30")
def predictions_prune(
    days: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_DAYS, help="Days that are kept; 0: for ever. LAWNWATCH_SERVING__RETENTION_DAYS."),
    ] = None,
) -> None:
    """Delete recorded predictions older than the retention, with their pictures. Running it again is safe."""
    from lawnwatch import history

    settings, catalog, store = opened()
    kept = settings.serving.retention_days if days is None else days
    emit(history.prune(catalog, store, days=kept, progress=progress))


@key_app.command("create", epilog="Example: lawnwatch key create --name 'web app' --scope predict --scope admin")
def key_create(
    name: Annotated[str, typer.Option(help="Who or what holds the key.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="predict (the default): ask for predictions; admin: see all, too.")
    ] = None,
) -> None:
    """Make an API key. It is printed this once; only its hash is kept."""
    from lawnwatch import key_table

    emit(key_table.create(opened_catalog(), name, scope or [PREDICT]))


@key_app.command("list", epilog="Example: lawnwatch key list")
def key_list() -> None:
    """All API keys, without their secrets."""
    from lawnwatch import key_table

    emit({"keys": key_table.list_keys(opened_catalog())})


@key_app.command("revoke", epilog="Example: lawnwatch key revoke 0f1e2d3c4b5a6978")
def key_revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as `key list` shows it.")],
) -> None:
    """Refuse a key from now on; running servers do within five seconds."""
    from lawnwatch import key_table

    emit(key_table.revoke(opened_catalog(), key_id))


# --- the program --------------------------------------------------------------------------------------------


def fail(error: LawnwatchError) -> int:
    """Say an error in one sentence on stderr and as JSON on stdout; return its exit code."""
    progress(f"error: {error.message}")
    if error.hint:
        progress(f"  {error.hint}")
    typer.echo(json.dumps({"error": error.code, "message": error.message, "hint": error.hint}, ensure_ascii=False))
    return error.exit_code


def fault(error: Exception) -> LawnwatchError:
    """What no step foresaw: a fault of ours, but for an argument that is not text, which a database cannot take, and a
    package that this installation does without, as that of the serving image does without MLflow.
    """
    odd = [word for word in sys.argv[1:] if word.encode(errors="ignore").decode() != word]
    if isinstance(error, UnicodeEncodeError) and odd:
        return InputError(f"An argument is not text in UTF-8; received {odd[0][:80]!r}.", hint="Write it in UTF-8.")
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "lawnwatch":
        return SettingsError(
            f"This command needs the package {error.name}, which this installation of lawnwatch does not have.",
            hint="Run it where the pipelines run, such as in the scheduler's pod, or install lawnwatch[pipeline].",
        )
    return LawnwatchError(f"A fault of ours: {type(error).__name__}: {error}.", hint=keep_traceback())


def keep_traceback() -> str:
    """Write the current traceback to a file in home, or where that cannot be to a temporary one, and say where."""
    told = traceback.format_exc()
    try:
        folder = get_settings().home / "faults"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.txt"
        file.write_text(told)
        return f"Please report it with {file}."
    except (OSError, LawnwatchError):
        pass
    try:
        with tempfile.NamedTemporaryFile("w", prefix="lawnwatch-fault-", suffix=".txt", delete=False) as stream:
            stream.write(told)
        return f"Please report it with {stream.name}."
    except OSError:
        return "Please report it; there was no room to keep more about it."


def stop(_number: int, _frame: object) -> NoReturn:
    """End as on Ctrl-C, context managers run and nothing stays half written, but with SIGTERM's own exit code."""
    raise SystemExit(TOLD_TO_STOP)


def main() -> None:
    """Run the program; no traceback reaches a user but for a fault of ours."""
    signal.signal(signal.SIGTERM, stop)
    try:
        code = app(standalone_mode=False) or 0
    except typer.TyperException as error:
        # Without arguments the help was printed already, and the exception says nothing.
        hint = "`--help` shows the commands and their arguments."
        said = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
        code = fail(InputError(said, hint=hint)) if said else InputError.exit_code
    except LawnwatchError as error:
        code = fail(error)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as end:
        code = int(end.code or 0)
    # The edge of the program: the traceback is for us, not for the user.
    except Exception as error:  # noqa: BLE001
        code = fail(fault(error))
    if code in (INTERRUPTED, TOLD_TO_STOP):
        progress("interrupted; run the same command again to go on where it stopped")
    sys.exit(code)


def program() -> NoReturn:
    """What `lawnwatch` runs: `main`, and then leave at once.

    The work is done and said by then. Unloading TensorFlow, Arrow and their threads in the order that an ending
    interpreter happens to choose now and then aborts the process ("terminate called without an active exception"), and
    a finished step would count as failed.
    """
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    program()
