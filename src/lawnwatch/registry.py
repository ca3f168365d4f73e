"""What has been judged and which model is champion: verdicts, MLflow versions, aliases, promotion.

The database decides who is champion: one row, changed under its row lock, so of two promotions at once one wins
and the other gets Conflict. MLflow holds the versions and shows the decision as aliases `champion`, `previous`
and `challenger`; they are written while the lock is held, because MLflow itself lets the last writer win.

MLflow takes seconds to import: nothing here does so before it is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Integer, String, Text, UniqueConstraint, insert, select, update
from sqlalchemy.exc import IntegrityError as DuplicateKey
from sqlalchemy.orm import Mapped, Session, mapped_column

from lawnwatch.catalog import Base, Catalog
from lawnwatch.config import GateSettings, Settings
from lawnwatch.database import UtcDateTime
from lawnwatch.errors import Conflict, DataError, IntegrityError, NotFound, Unavailable

METHOD = "4"  # changes whenever `evaluate` or `gate` would measure or judge the same run differently

# --- tables -------------------------------------------------------------------------------------------------


class VerdictRow(Base):
    """One judgement of one run against one champion under one policy."""

    __tablename__ = "verdicts"
    __table_args__ = (UniqueConstraint("run_id", "champion_version", "policy", name="uq_verdicts_question"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(String(64), index=True)
    champion_version: Mapped[int] = mapped_column(Integer)  # 0: there was no champion
    policy: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))
    snapshot: Mapped[str] = mapped_column(String(64))
    decision: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text)
    evaluation: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ChampionRow(Base):
    """The one row that says which version of a model is champion; version 0: none yet."""

    __tablename__ = "champion"

    model_name: Mapped[str] = mapped_column(String(120), primary_key=True)
    version: Mapped[int] = mapped_column(Integer)
    run_id: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))
    snapshot: Mapped[str] = mapped_column(String(64))
    previous_version: Mapped[int] = mapped_column(Integer)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class PromotionRow(Base):
    """Each change of the champion, for ever."""

    __tablename__ = "promotions"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    model_name: Mapped[str] = mapped_column(String(120), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # promote or rollback
    version: Mapped[int] = mapped_column(Integer)
    previous_version: Mapped[int] = mapped_column(Integer)
    run_id: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))
    snapshot: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


# --- results ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Champion:
    """The champion as recorded in the database."""

    version: int
    run_id: str
    fingerprint: str
    snapshot: str
    previous_version: int


@dataclass(frozen=True)
class Verdict:
    """What a run was judged to be.

    Attributes:
        decision: `promote`, `reject` or `inconclusive`.
        reason: why, in words and numbers.
        champion_version: whom it was compared with; 0 when there was no champion.
        policy: hash of every threshold and of the method.
        evaluation: the whole evaluation, as in evaluation.json.
        claim, checks, thresholds, more_images, report_url: of the evaluation, what a reader of the verdict asks first.
    """

    run_id: str
    decision: str
    reason: str
    champion_version: int
    snapshot: str
    fingerprint: str
    policy: str
    created_at: datetime
    evaluation: dict[str, Any] = field(repr=False)  # not printed by the CLI: it has its own file
    claim: str = field(init=False)
    checks: list[dict[str, Any]] = field(init=False)
    thresholds: dict[str, Any] = field(init=False)
    more_images: int | None = field(init=False)
    report_url: str = field(init=False)
    message: str = field(init=False)

    def __post_init__(self) -> None:
        said = self.evaluation
        for name, value in {
            "claim": said.get("verdict", {}).get("claim", ""),
            "checks": said.get("checks", []),
            "thresholds": said.get("policy", {}),
            "more_images": said.get("more_images"),
            "report_url": said.get("report_url", ""),
            "message": f"Verdict on run {self.run_id[:8]}: {self.decision}. {self.reason}",
        }.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen


@dataclass(frozen=True)
class Promotion:
    """Who is champion after a promotion or a rollback."""

    version: int
    previous_version: int
    run_id: str
    changed: bool
    message: str


@dataclass(frozen=True)
class RolledBack:
    """A version that was champion until a person went back to the one before it."""

    version: int
    run_id: str
    at: datetime

    @property
    def sentence(self) -> str:
        """What happened to it, for people."""
        return f"version {self.version} was rolled back on {self.at:%Y-%m-%d}"


@dataclass(frozen=True)
class VersionInfo:
    """One registered model version."""

    version: int
    aliases: list[str]
    run_id: str
    created_at: datetime
    candidate: str
    snapshot: str
    decision: str
    reason: str
    metrics: dict[str, Any]
    bundle_sha256: str | None
    message: str = ""


# --- MLflow -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _mlflow() -> Any:
    """MLflow, imported once, told to give up in bounded time and never to unpickle."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default a dead server blocks 246 s a call
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with a server it would stand before a command's JSON
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)  # for the library: we read no environment here
    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.ERROR)
    return mlflow


@contextmanager
def tracking(settings: Settings) -> Iterator[Any]:
    """An MlflowClient; a server that is down, a full disk or a missing run become errors of ours.

    Raises:
        Unavailable: MLflow does not answer or cannot write.
        NotFound: what was asked for is not there.
    """
    _mlflow()
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    where = settings.mlflow_tracking_uri.split("@")[-1]
    hint = "Start it, or check MLFLOW_TRACKING_URI, and run the step again: it continues from what was done."
    try:
        yield _client(settings)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotFound(f"MLflow at {where} has no such thing: {_first_line(error)}") from error
        if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise
        raise Unavailable(f"MLflow at {where} does not answer: {_first_line(error)}", hint=hint) from error
    except (requests.RequestException, SQLAlchemyError, OSError) as error:
        raise Unavailable(f"MLflow at {where} failed: {_first_line(error)}", hint=hint) from error


def _deepest(error: BaseException) -> BaseException:
    """What an exception began with."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


_ready: set[str] = set()


def _client(settings: Settings) -> Any:
    from mlflow import MlflowClient

    uri = settings.mlflow_tracking_uri
    if uri.startswith("sqlite") and uri not in _ready:
        # The first call migrates the database. Two processes must not do so at once.
        settings.home.mkdir(parents=True, exist_ok=True)
        with (settings.home / "mlflow.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            client = MlflowClient(uri, uri)
            client.search_experiments(max_results=1)
        _ready.add(uri)
        return client
    return MlflowClient(uri, uri)


def experiment_id(settings: Settings, client: Any) -> str:
    """The id of this model's experiment, made when missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(settings.model_name)
    if found is not None:
        return str(found.experiment_id)
    served = settings.mlflow_tracking_uri.startswith("http")
    place = None if served else (settings.home / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(settings.model_name, artifact_location=place))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(settings.model_name).experiment_id)


def artifacts(settings: Settings, run_id: str, folder: str) -> Path:
    """A run's artifact folder as a local copy, verified against the hashes in its `files.json`.

    Raises:
        NotFound: no such run or folder. IntegrityError: a file is missing or altered. Unavailable.
    """
    copy = settings.home / "cache" / "runs" / run_id / folder
    if copy.is_dir():
        try:
            return _verified(copy)
        except IntegrityError:
            shutil.rmtree(copy, ignore_errors=True)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent) as building, tracking(settings) as client:
        from mlflow.exceptions import MlflowException

        if not client.list_artifacts(run_id, folder):
            raise NotFound(f"run {run_id} has no artifacts below {folder}/.", hint="Was the step before it run?")
        try:
            fetched = _verified(Path(client.download_artifacts(run_id, folder, building)))
        except MlflowException as error:
            # MLflow says "please ensure that the path is correct" to whatever happens on the way.
            raise Unavailable(
                f"the artifacts of run {run_id} cannot be copied to {copy.parent}: {_first_line(_deepest(error))}",
                hint="Free disk space, see that MLflow's artifact store answers, and run the step again.",
            ) from error
        try:
            fetched.rename(copy)
        except OSError:
            if not copy.is_dir():  # else another process was quicker with the same files
                raise
    return copy


def run_params(settings: Settings, run_id: str) -> dict[str, str]:
    """What a run was started with, as MLflow keeps it. Raises NotFound, Unavailable."""
    with tracking(settings) as client:
        return {str(name): str(value) for name, value in client.get_run(run_id).data.params.items()}


def forget_artifacts(settings: Settings, run_id: str, folder: str) -> None:
    """Drop the local copy of an artifact folder that was written anew."""
    shutil.rmtree(settings.home / "cache" / "runs" / run_id / folder, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write `files.json`: the SHA-256 of every file of an artifact folder."""
    hashes = {path.name: _hash(path) for path in sorted(folder.iterdir()) if path.name != "files.json"}
    (folder / "files.json").write_text(json.dumps(hashes, indent=1, sort_keys=True))


def _verified(folder: Path) -> Path:
    try:
        hashes = json.loads((folder / "files.json").read_text())
        bad = [name for name, sha256 in hashes.items() if _hash(folder / name) != sha256]
    except (OSError, ValueError) as error:
        raise IntegrityError(f"the artifacts in {folder.name}/ cannot be verified: {error}") from error
    if bad:
        raise IntegrityError(f"the artifacts {bad} in {folder.name}/ are not what the run recorded.")
    return folder


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def log_evaluation(settings: Settings, run_id: str, evaluation: dict[str, Any], folder: Path) -> None:
    """Put an evaluation on its run's page: figures, verdict, and the sealed folder as `evaluation/`.

    Raises:
        Unavailable: MLflow does not answer or cannot write.
    """
    now = int(time.time() * 1000)
    with tracking(settings) as client:
        from mlflow.entities import Metric, RunTag

        metrics = []
        for name, one in evaluation.get("metrics", {}).items():
            for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
                metrics.append(Metric(f"test_{name}{suffix}", one[part], now, 0))
        verdict = evaluation["verdict"]
        # Whoever sees the decision finds what it rests on: the tags come last.
        client.log_artifacts(run_id, str(folder), folder.name)
        tags = [
            RunTag("lawnwatch.decision", verdict["decision"]),
            RunTag("lawnwatch.claim", verdict["claim"]),
            RunTag("lawnwatch.verdict", verdict["reason"][:4000]),
            RunTag("lawnwatch.report", evaluation["report_url"]),
            RunTag("mlflow.note.content", _described(client.get_run(run_id), evaluation)),
        ]
        client.log_batch(run_id, metrics=metrics, tags=tags)
    forget_artifacts(settings, run_id, folder.name)


def _described(run: Any, evaluation: dict[str, Any]) -> str:
    """What the run's page says of it, with the verdict below what training said."""
    trained = run.data.tags.get("mlflow.note.content", "").partition("\n\n**Verdict")[0]
    verdict = evaluation["verdict"]
    return (
        f"{trained}\n\n**Verdict: {verdict['decision']}.** {verdict['reason'][:2000]}\n\n"
        f"[Evaluation report]({evaluation['report_url']})"
    )


# --- verdicts -----------------------------------------------------------------------------------------------


def policy_of(policy: GateSettings) -> str:
    """Hash of the policy and the method a verdict rests on."""
    return hashlib.sha256(json.dumps([METHOD, policy.model_dump()], sort_keys=True).encode()).hexdigest()


def record_verdict(catalog: Catalog, verdict: Verdict) -> Verdict:
    """Store a verdict; the first one on the same question stays, and is returned."""
    try:
        with catalog.session() as session:
            columns = {column.name for column in VerdictRow.__table__.columns} - {"id"}
            session.execute(insert(VerdictRow).values({name: getattr(verdict, name) for name in columns}))
    except DuplicateKey:
        pass
    recorded = find_verdict(catalog, verdict.run_id, verdict.champion_version, verdict.policy)
    return recorded or verdict


def find_verdict(
    catalog: Catalog, run_id: str, champion_version: int | None = None, policy: str | None = None
) -> Verdict | None:
    """The newest verdict on a run (against that champion and under that policy, when given)."""
    query = select(VerdictRow).where(VerdictRow.run_id == run_id).order_by(VerdictRow.id.desc()).limit(1)
    if champion_version is not None:
        query = query.where(VerdictRow.champion_version == champion_version)
    if policy is not None:
        query = query.where(VerdictRow.policy == policy)
    with catalog.session() as session:
        row = session.scalars(query).first()
        if row is None:
            return None
        return Verdict(
            run_id=row.run_id,
            decision=row.decision,
            reason=row.reason,
            champion_version=row.champion_version,
            snapshot=row.snapshot,
            fingerprint=row.fingerprint,
            policy=row.policy,
            created_at=row.created_at,
            evaluation=row.evaluation,
        )


# --- champion, promotion, rollback --------------------------------------------------------------------------


def champion(settings: Settings, catalog: Catalog) -> Champion | None:
    """Who is champion, from the database alone; None before the first promotion."""
    with catalog.session() as session:
        row = session.get(ChampionRow, settings.model_name)
        if row is None or row.version == 0:
            return None
        return Champion(row.version, row.run_id, row.fingerprint, row.snapshot, row.previous_version)


def promote(settings: Settings, catalog: Catalog, run_id: str, *, again: str = "") -> Promotion:
    """Register a run's model as a version and make it champion, if its verdict says so and still holds.

    Doing it again changes nothing.

    Args:
        again: why a model that was rolled back is promoted all the same; recorded.

    Raises:
        NotFound: the run has no verdict.
        DataError: its verdict is not `promote`, or its model was rolled back.
        Conflict: the champion or the policy is no longer that of the verdict.
        Unavailable: MLflow or the database does not answer; nothing was changed.
    """
    now = champion(settings, catalog)
    if now is not None and now.run_id == run_id:
        with tracking(settings) as client:
            _set_aliases(settings, client, now.version, now.previous_version)
        return Promotion(
            now.version, now.previous_version, run_id, False, f"Version {now.version} is champion already."
        )
    verdict = _promotable(settings, catalog, run_id, now, again)
    with _locked_champion(settings, catalog, verdict.champion_version) as session:
        with tracking(settings) as client:
            version = _register(settings, client, verdict)
        _crown(session, settings, "promote", version, verdict)
        with tracking(settings) as client:
            _set_aliases(settings, client, version, verdict.champion_version)
    was = f" in place of version {verdict.champion_version}" if verdict.champion_version else ""
    return Promotion(
        version,
        verdict.champion_version,
        run_id,
        True,
        f"Version {version} is champion{was}. {verdict.reason}",
    )


def rollback(settings: Settings, catalog: Catalog) -> Promotion:
    """Make the previous champion champion again; the rejected one becomes `previous`, and is not promoted by itself.

    Raises:
        NotFound: there is no previous champion.
        Conflict: the champion changed meanwhile.
    """
    now = champion(settings, catalog)
    if now is None or now.previous_version == 0:
        raise NotFound("there is no previous champion to go back to.", hint="See `lawnwatch model list`.")
    back, away = now.previous_version, now.version
    with _locked_champion(settings, catalog, away) as session:
        first = session.scalars(
            select(PromotionRow)
            .where(PromotionRow.model_name == settings.model_name, PromotionRow.version == back)
            .order_by(PromotionRow.id.desc())
        ).first()
        if first is None:
            raise NotFound(f"version {back} was never promoted here.")
        verdict = Verdict(
            run_id=first.run_id,
            decision="promote",
            reason=f"rolled back from version {away}",
            champion_version=away,
            snapshot=first.snapshot,
            fingerprint=first.fingerprint,
            policy="",
            created_at=datetime.now(UTC),
            evaluation={},
        )
        _crown(session, settings, "rollback", back, verdict)
        with tracking(settings) as client:
            _set_aliases(settings, client, back, away)
    return Promotion(back, away, verdict.run_id, True, f"Version {back} is champion again in place of version {away}.")


def rolled_back(settings: Settings, catalog: Catalog, fingerprint: str) -> RolledBack | None:
    """How the model of a training was rolled back, if that is the last that became of it.

    By the training, not by the run: done again, it gives the same model.
    """
    query = select(PromotionRow).where(PromotionRow.model_name == settings.model_name).order_by(PromotionRow.id)
    with catalog.session() as session:
        history = session.scalars(query).all()
        made = {row.version: row.run_id for row in history if row.fingerprint == fingerprint}
        found = None
        for row in history:
            if row.kind == "rollback" and row.previous_version in made:
                found = RolledBack(row.previous_version, made[row.previous_version], row.created_at)
            elif row.version in made:
                found = None
    return found


@contextmanager
def _locked_champion(settings: Settings, catalog: Catalog, expected: int) -> Iterator[Session]:
    """A transaction that holds the champion's row while it still says `expected`; else Conflict."""
    name, now = settings.model_name, datetime.now(UTC)
    with catalog.session() as session:
        missing = session.get(ChampionRow, name) is None
    if missing:
        try:
            with catalog.session() as session:
                session.add(
                    ChampionRow(
                        model_name=name,
                        version=0,
                        run_id="",
                        fingerprint="",
                        snapshot="",
                        previous_version=0,
                        updated_at=now,
                    )
                )
        except DuplicateKey:
            pass
    with catalog.session() as session:
        # An UPDATE takes the row lock on every database (SQLite locks the file) and answers at once whether
        # the champion is still the one that was compared with.
        held = session.execute(
            update(ChampionRow)
            .where(ChampionRow.model_name == name, ChampionRow.version == expected)
            .values(updated_at=now)
        )
        if held.rowcount != 1:  # type: ignore[attr-defined]
            raise _changed(f"the champion is no longer version {expected}, which the verdict compared with")
        yield session


def _changed(said: str) -> Conflict:
    return Conflict(f"{said}.", hint="Evaluate the run again: the champion and the policy of now count.")


def _crown(session: Session, settings: Settings, kind: str, version: int, verdict: Verdict) -> None:
    """Write the new champion and the history row. The caller holds the row lock."""
    shared = {
        "model_name": settings.model_name,
        "version": version,
        "run_id": verdict.run_id,
        "fingerprint": verdict.fingerprint,
        "snapshot": verdict.snapshot,
        "previous_version": verdict.champion_version,
    }
    session.execute(
        update(ChampionRow)
        .where(ChampionRow.model_name == settings.model_name)
        .values(**shared, updated_at=datetime.now(UTC))
    )
    session.add(PromotionRow(**shared, kind=kind, reason=verdict.reason, created_at=datetime.now(UTC)))
    session.flush()


def register(settings: Settings, catalog: Catalog, run_id: str) -> VersionInfo:
    """Register a run's model as a version with alias `challenger`; again returns the same version.

    Raises:
        NotFound: the run has no verdict. DataError: its verdict is not `promote`, or its model was rolled back.
        Conflict: the champion or the policy is no longer that of the verdict. Unavailable.
    """
    now = champion(settings, catalog)
    if now is not None and now.run_id == run_id:
        return show(settings, catalog, now.version)
    verdict = _promotable(settings, catalog, run_id, now)
    with tracking(settings) as client:
        version = _register(settings, client, verdict)
    return show(settings, catalog, version)


def _promotable(settings: Settings, catalog: Catalog, run_id: str, now: Champion | None, again: str = "") -> Verdict:
    """The verdict on a run against the champion and by the policy of now, if it says promote."""
    version, any_verdict = now.version if now else 0, find_verdict(catalog, run_id)
    if any_verdict is None:
        raise NotFound(f"run {run_id} has no verdict.", hint=f"Run `lawnwatch evaluate --run {run_id}` first.")
    back = rolled_back(settings, catalog, any_verdict.fingerprint)
    if back is not None and not again:
        raise DataError(
            f"run {run_id} is not promoted: {back.sentence}, and this is the same training.",
            hint=f"To promote it all the same: `lawnwatch model promote --run {run_id} --again REASON`.",
        )
    if find_verdict(catalog, run_id, version) is None:
        raise _changed(f"the verdict on run {run_id} compared with another champion than version {version}")
    verdict = find_verdict(catalog, run_id, version, policy_of(settings.gate))
    if verdict is None:
        raise _changed(f"the verdict on run {run_id} was reached by another policy than that of now")
    if verdict.decision != "promote":
        raise DataError(
            f"run {run_id} is not promoted; its verdict is {verdict.decision}: {verdict.reason}",
            hint="The champion stays as it is.",
        )
    if back is not None:
        return replace(verdict, reason=f"{verdict.reason} Promoted although {back.sentence}: {again}.")
    return verdict


def _register(settings: Settings, client: Any, verdict: Verdict) -> int:
    from mlflow.exceptions import MlflowException

    name = settings.model_name
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run = client.get_run(verdict.run_id)
    accuracy = verdict.evaluation.get("metrics", {}).get("accuracy", {})
    tags = {
        "candidate": run.data.tags.get("lawnwatch.candidate", ""),
        "snapshot": verdict.snapshot,
        "fingerprint": verdict.fingerprint,
        "decision": verdict.decision,
        "reason": verdict.reason[:4000],
        "accuracy": json.dumps(accuracy),
    }
    found = [v for v in client.search_model_versions(f"name='{name}'") if v.run_id == verdict.run_id]
    if found:
        version = int(found[0].version)
    else:
        source = f"{run.info.artifact_uri.rstrip('/')}/model"
        version = int(
            client.create_model_version(
                name, source, run_id=verdict.run_id, tags=tags, description=verdict.reason
            ).version
        )
    client.set_registered_model_alias(name, "challenger", str(version))
    return version


def _set_aliases(settings: Settings, client: Any, version: int, previous: int) -> None:
    name = settings.model_name
    client.set_registered_model_alias(name, "champion", str(version))
    if previous:
        client.set_registered_model_alias(name, "previous", str(previous))
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get("challenger", "")) == str(version):
        client.delete_registered_model_alias(name, "challenger")


# --- what there is ------------------------------------------------------------------------------------------


def list_versions(settings: Settings, catalog: Catalog) -> list[VersionInfo]:
    """All versions of the model, newest first; aliases as the database decides them."""
    now = champion(settings, catalog)
    with tracking(settings) as client:
        if not client.search_registered_models(f"name='{settings.model_name}'"):
            return []
        held = client.get_registered_model(settings.model_name).aliases
        versions = client.search_model_versions(f"name='{settings.model_name}'")
    infos = [_info(version, held, now) for version in versions]
    return sorted(infos, key=lambda info: info.version, reverse=True)


def show(settings: Settings, catalog: Catalog, version: str | int = "champion") -> VersionInfo:
    """One version, by number (`3`, `v3`) or alias.

    Raises:
        NotFound: there is none such.
    """
    wanted = str(version).removeprefix("v")
    versions = list_versions(settings, catalog)
    for info in versions:
        if wanted == str(info.version) or str(version) in info.aliases:
            return info
    if not versions:
        raise NotFound(
            f"there is no model version {version}, nor any other yet.",
            hint="`lawnwatch train`, `evaluate` and `model promote` make one.",
        )
    there = ", ".join(sorted(f"v{info.version}" for info in versions))
    raise NotFound(f"there is no model version {version}; there are: {there}.", hint="Run `lawnwatch model list`.")


def tag_version(settings: Settings, version: int, name: str, value: str) -> None:
    """Put a tag on a version."""
    with tracking(settings) as client:
        client.set_model_version_tag(settings.model_name, str(version), name, value)


def _info(version: Any, held: dict[str, Any], now: Champion | None) -> VersionInfo:
    number, tags = int(version.version), version.tags
    aliases = [alias for alias in ("challenger",) if str(held.get(alias, "")) == str(number)]
    if now is not None:
        aliases += [
            alias for alias, at in (("champion", now.version), ("previous", now.previous_version)) if at == number
        ]
    accuracy = json.loads(tags.get("accuracy") or "{}")
    shown = f"{accuracy['value']:.1%} on test" if accuracy else "not measured"
    return VersionInfo(
        version=number,
        aliases=sorted(aliases),
        run_id=version.run_id,
        created_at=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        candidate=tags.get("candidate", ""),
        snapshot=tags.get("snapshot", ""),
        decision=tags.get("decision", ""),
        reason=tags.get("reason", ""),
        metrics={"accuracy": accuracy},
        bundle_sha256=tags.get("bundle_sha256"),
        message=f"Version {number} ({', '.join(sorted(aliases)) or 'no alias'}): {tags.get('candidate', '')}, "
        f"accuracy {shown}.",
    )
