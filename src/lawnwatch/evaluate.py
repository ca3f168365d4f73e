"""Is the run good enough, and better than the champion? Measured on the graph that will be served.

Pictures go through `images.decode` and the LiteRT graph, the road of serving. The temperature and the threshold of
"unknown" are training's, from pictures that the head had not seen; the test split only measures. What is measured goes
to `gate.decide`; the verdict, every figure and a report for people are kept with the run, in MLflow, in the database
and in the store.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from lawnwatch import bundle, dataset, evaluation_report, gate, heatmap, images, measure, registry, train
from lawnwatch.catalog import Catalog, ImageRecord
from lawnwatch.config import GateSettings, Settings
from lawnwatch.errors import DataError, IntegrityError, NotFound, Unavailable
from lawnwatch.gate import Decision, Evidence
from lawnwatch.registry import Verdict
from lawnwatch.sketch import Sketch
from lawnwatch.store import ObjectStore

REFERENCE_IMAGES = 1000  # training pictures in the reference sketch
ALTERED_IMAGES = 400  # test pictures that are asked again in each alteration
TIMED_IMAGES = 20
TURNS = 4
HOSTS = 6  # largest source hosts that are slices of their own
SHOWN = 8  # pictures in each row of the report

Progress = Callable[[str], None]
Bools = NDArray[np.bool_]
Rgb = NDArray[np.uint8]


class UnusableModel(IntegrityError):
    """The graph cannot be loaded, returns no finite numbers, or says the same of every picture."""


# --- the step -----------------------------------------------------------------------------------------------


def run(settings: Settings, catalog: Catalog, store: ObjectStore, run_id: str, *, progress: Progress) -> Verdict:
    """Measure a run on the frozen test split and decide. The same question has the same, recorded answer.

    Raises:
        NotFound: no such run or snapshot. DataError: there are no test images.
        IntegrityError: the run's artifacts are not what it recorded. Unavailable.
    """
    champion = registry.champion(settings, catalog)
    policy = registry.policy_of(settings.gate)
    if champion is not None and champion.run_id == run_id:
        recorded = registry.find_verdict(catalog, run_id)
    else:
        recorded = registry.find_verdict(catalog, run_id, champion.version if champion else 0, policy)
    if recorded is not None:
        progress("This run was judged before; the recorded verdict stands.")
        return recorded

    home = registry.artifacts(settings, run_id, "model")
    facts = json.loads((home / "model.json").read_text())
    snapshot = dataset.load_snapshot(catalog, store, facts["snapshot"])
    rows = {split: snapshot.split(split) for split in ("train", "validation", "test")}
    if not rows["test"] or not rows["validation"]:
        raise DataError(
            f"snapshot {snapshot.id[:12]} has {len(rows['test'])} test images and {len(rows['validation'])} of "
            "validation.",
            hint="Both splits need images: add some and create a snapshot.",
        )
    with _disk(), tempfile.TemporaryDirectory() as building:
        folder = Path(building) / "evaluation"
        folder.mkdir()
        evaluation: dict[str, Any] = {}
        pictures: list[evaluation_report.Row] = []
        try:
            model = Model.open(home, facts)
            evaluation, evidence, probabilities = _measure(settings, catalog, store, model, rows, folder, progress)
            decision = _decide(settings, catalog, store, champion, model, evaluation, evidence, snapshot, progress)
            pictures = _shown(settings, store, model, probabilities, rows["test"])
        except UnusableModel as error:
            decision = Decision("reject", f"The model cannot be used: {error.message}")
        for check in decision.checks:
            progress(f"{check.status}: {check.sentence}")
        url = f"{settings.public_url.rstrip('/')}/reports/evaluation/{run_id}"
        evaluation |= {
            "verdict": {"decision": decision.decision, "claim": decision.claim, "reason": decision.reason},
            "checks": [asdict(check) for check in decision.checks],
            "more_images": decision.more_images,
            "comparison": decision.comparison,
            "champion_version": champion.version if champion else 0,
            "policy": settings.gate.model_dump(),
            "report_url": url,
        }
        page = evaluation_report.page(run_id=run_id, facts=facts, evaluation=evaluation, pictures=pictures)
        (folder / evaluation_report.FILE).write_bytes(page)
        (folder / bundle.EVALUATION).write_text(json.dumps(evaluation, indent=1, allow_nan=False))
        registry.seal(folder)
        registry.log_evaluation(settings, run_id, evaluation, folder)
        store.put(report_key(run_id), page, content_type="text/html; charset=utf-8")
    return registry.record_verdict(
        catalog,
        Verdict(
            run_id=run_id,
            decision=decision.decision,
            reason=decision.reason,
            champion_version=champion.version if champion else 0,
            snapshot=snapshot.id,
            fingerprint=facts["fingerprint"],
            policy=policy,
            created_at=datetime.now(UTC),
            evaluation=evaluation,
        ),
    )


@contextmanager
def _disk() -> Iterator[None]:
    """A full or read-only disk is said as such; nothing is recorded by then, so that a re-run begins anew."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise Unavailable(
            f"the evaluation cannot be written to {tempfile.gettempdir()}: {error.strerror}.",
            hint="Free disk space, or set TMPDIR to a place that has some, and run the step again.",
        ) from error


def report_key(run_id: str) -> str:
    """Where the store keeps the report on a run."""
    return f"reports/evaluation/{run_id}.html"


# --- one model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A run's graph and what the run says of it (`model.json`)."""

    home: Path
    data: bytes
    facts: dict[str, Any]
    graph: bundle.Graph

    @classmethod
    def open(cls, home: Path, facts: dict[str, Any]) -> Model:
        """Raises UnusableModel when the file is no graph under the contract."""
        data = (home / bundle.MODEL).read_bytes()
        return cls(home, data, facts, cls._graph(data, facts))

    @staticmethod
    def _graph(data: bytes, facts: dict[str, Any]) -> bundle.Graph:
        try:
            return bundle.Graph(data, classes=len(facts["classes"]))
        except IntegrityError as error:
            raise UnusableModel(error.message) from error

    def another(self) -> bundle.Graph:
        """The same graph for another thread."""
        return self._graph(self.data, self.facts)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the logits."""
        return list(self.facts["classes"])

    def right(self, scores: NDArray[Any], rows: Sequence[dataset.Row]) -> Bools:
        """(n,) which pictures it names as they are labelled; a class that it does not know is never right."""
        said = [self.classes[i] for i in scores.argmax(axis=1)]
        return np.array([label == row.label for label, row in zip(said, rows, strict=True)])


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a graph said of some pictures.

    Attributes:
        logits: (n, k). embeddings: (n, d). brightness, sharpness: (n,).
        outputs: as the graph returned them, for the score of "unknown".
    """

    logits: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    brightness: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    outputs: list[bundle.Outputs]


def ask(
    settings: Settings,
    store: ObjectStore,
    graph: bundle.Graph,
    rows: Sequence[dataset.Row],
    alter: Callable[[Rgb], Rgb] | None = None,
) -> Answers:
    """Run pictures through the road of serving.

    Args:
        alter: done to each decoded (size, size, 3) picture first.

    Raises:
        UnusableModel: the graph returned something that is not finite.
        IntegrityError: a picture's bytes are not what the snapshot says.
    """
    outputs, brightness, sharpness = [], [], []
    cache = dataset.ObjectCache.of(settings)
    for row in rows:
        data = cache.read(store, row.object_key, row.sha256)
        picture = images.decode(data, size=graph.size, max_pixels=settings.images.max_pixels)
        if alter is not None:
            picture = np.ascontiguousarray(alter(picture))
        try:
            outputs.append(graph(picture))
        except IntegrityError as error:
            raise UnusableModel(error.message) from error
        brightness.append(images.brightness(picture))
        sharpness.append(images.sharpness(picture))
    return Answers(
        logits=np.stack([one.logits for one in outputs]),
        embeddings=np.stack([one.embedding for one in outputs]),
        brightness=np.array(brightness),
        sharpness=np.array(sharpness),
        outputs=[bundle.Outputs(one.logits, one.embedding, None) for one in outputs],
    )


def _measure(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    model: Model,
    rows: dict[str, list[dataset.Row]],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Any], Evidence, NDArray[np.float64]]:
    """Measure on test, with training's calibration; keep in `folder` what the bundle needs.

    Returns:
        The evaluation, what the gate reads, and the calibrated (n, k) probabilities on the test split.

    Raises:
        UnusableModel: it answers the same whatever the picture shows, or nothing finite.
    """
    classes, graph = model.classes, model.graph
    index = {label: i for i, label in enumerate(classes)}
    labels = {split: np.array([index[row.label] for row in rows[split]], np.int64) for split in rows}
    validation = ask(settings, store, graph, rows["validation"])
    fitted = train.load_calibration(model.home)
    temperature = fitted.temperature
    detector = bundle.UnknownDetector.load(fitted.unknown, temperature, fitted.statistics)

    reference_rows = sorted(rows["train"], key=lambda row: str(row.sha256))[:REFERENCE_IMAGES]
    progress(f"Measuring {len(rows['test'])} test images; reference of {len(reference_rows)} training images.")
    reference = ask(settings, store, graph, reference_rows)
    sketch = Sketch.of(reference.embeddings, reference.brightness, reference.sharpness)
    (folder / bundle.SKETCH).write_bytes(sketch.to_bytes())
    (folder / bundle.UNKNOWN).write_bytes(fitted.statistics)

    test = ask(settings, store, graph, rows["test"])
    probabilities = bundle.probabilities(test.logits, temperature)
    evaluation = measure.measure(probabilities, labels["test"], classes)
    accuracy = evaluation["metrics"]["accuracy"]
    progress(f"Test accuracy {accuracy['value']:.1%} (95 % interval {accuracy['low']:.1%} to {accuracy['high']:.1%}).")
    must_vary(probabilities, classes)
    right = probabilities.argmax(axis=1) == labels["test"]
    unknown = detector.scores(test.logits, test.embeddings) >= fitted.unknown.threshold
    robust = _altered(settings, store, model, rows["test"][:ALTERED_IMAGES])
    (took,) = _latency(settings, store, [graph], rows["test"][:TIMED_IMAGES])
    answers = {
        "validation": _listed(rows["validation"], bundle.probabilities(validation.logits, temperature), classes),
        "test": _listed(rows["test"], probabilities, classes),
    }
    (folder / "predictions.json").write_text(json.dumps(answers))
    evaluation |= {
        "temperature": temperature,
        "unknown": fitted.unknown.model_dump(),
        "called_unknown": measure.share(int(unknown.sum()), len(unknown)),
        "unknown_comparison": fitted.comparison,
        "slices": measure.slices(right, _divisions(catalog, rows["test"], test)),
        "robustness": {
            "images": len(rows["test"][:ALTERED_IMAGES]),
            "unaltered": measure.share(int(right[:ALTERED_IMAGES].sum()), len(right[:ALTERED_IMAGES])),
            "altered": {kind: measure.share(int(hits.sum()), len(hits)) for kind, hits in robust.items()},
        },
        "latency_ms": took,
        "model_bytes": len(model.data),
    }
    evaluation["called_unknown"]["expected"] = fitted.called_unknown(len(rows["test"]))
    evidence = Evidence(
        labels=[row.label for row in rows["test"]],
        classes=classes,
        right=right,
        losses=_losses(probabilities, labels["test"]),
        ece=evaluation["metrics"]["ece"],
        unknown=unknown,
        robust=robust,
        latency_ms=took,
        model_bytes=len(model.data),
        variant=_served_variant(model),
    )
    return evaluation, evidence, probabilities


def must_vary(probabilities: NDArray[np.float64], classes: list[str]) -> None:
    """Raises UnusableModel when (n, k) probabilities are the same for every picture.

    A model that names one class only, by probabilities that differ, may have been shown few pictures of the other: what
    that is worth is a question of recall, which the gate asks.
    """
    if len(probabilities) > 1 and float(probabilities.std(axis=0).max()) < 1e-6:
        said = classes[int(probabilities[0].argmax())]
        raise UnusableModel(f"it answers {said!r} whatever the picture shows.")


def _served_variant(model: Model) -> gate.Reduced | None:
    """What training measured of the graph that is served, where its arithmetic is reduced."""
    served = bundle.Variant.model_validate(model.facts["variants"][model.facts["served"]])
    if served.arithmetic == "float32":
        return None
    return gate.Reduced(served.arithmetic, served.images, served.accuracy_change, served.speedup)


def _losses(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    return -np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1))


def _jpeg(picture: Rgb) -> Rgb:
    # Channels go in and come out in the same order, whatever OpenCV calls them.
    coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 30])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)


def _tilted(picture: Rgb) -> Rgb:
    size = len(picture)
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), 15, 1.0)
    return np.asarray(cv2.warpAffine(picture, turn, (size, size), borderMode=cv2.BORDER_REFLECT), np.uint8)


def _cropped(picture: Rgb) -> Rgb:
    size = len(picture)
    edge = round(size * 0.1)
    return np.asarray(
        cv2.resize(picture[edge:-edge, edge:-edge], (size, size), interpolation=cv2.INTER_LINEAR), np.uint8
    )


# What happens to pictures on their way from a phone, done to the picture as the network sees it.
ALTERATIONS: dict[str, Callable[[Rgb], Rgb]] = {
    "JPEG 30": _jpeg,
    "blurred": lambda picture: np.asarray(cv2.GaussianBlur(picture, (0, 0), 2.0), np.uint8),
    "dark": lambda picture: (picture * 0.4).astype(np.uint8),
    "tilted 15°": _tilted,
    "cropped": _cropped,
}


def _altered(settings: Settings, store: ObjectStore, model: Model, rows: Sequence[dataset.Row]) -> dict[str, Bools]:
    """Alteration → (m,) which of the pictures are right when altered so."""

    def hits(kind: str) -> Bools:
        return model.right(ask(settings, store, model.another(), rows, ALTERATIONS[kind]).logits, rows)

    with ThreadPoolExecutor(2) as pool:  # an inference holds one core and not the interpreter's lock
        return dict(zip(ALTERATIONS, pool.map(hits, ALTERATIONS), strict=True))


def _latency(
    settings: Settings, store: ObjectStore, graphs: Sequence[bundle.Graph], rows: Sequence[dataset.Row]
) -> list[float]:
    """Milliseconds of one inference of each graph: of each picture the quickest of some turns, of these the median.

    The graphs take turns, so that a busy machine slows all alike; what disturbs one turn does not count.
    """
    times: list[list[float]] = [[] for _ in graphs]
    for row in rows:
        pictures = [next(_decoded(settings, store, [row], graph.size)) for graph in graphs]
        quickest = [math.inf] * len(graphs)
        for _ in range(TURNS):
            for i, graph in enumerate(graphs):
                begun = time.perf_counter()
                graph(pictures[i])
                quickest[i] = min(quickest[i], 1000 * (time.perf_counter() - begun))
        for took, one in zip(times, quickest, strict=True):
            took.append(one)
    return [statistics.median(took) for took in times]


def _decoded(settings: Settings, store: ObjectStore, rows: Sequence[dataset.Row], size: int | None) -> Iterator[Rgb]:
    cache = dataset.ObjectCache.of(settings)
    for row in rows:
        data = cache.read(store, row.object_key, row.sha256)
        yield images.decode(data, size=size, max_pixels=settings.images.max_pixels)


def _divisions(catalog: Catalog, rows: Sequence[dataset.Row], answers: Answers) -> dict[str, list[str]]:
    """The parts of the test images that are looked at on their own."""
    hosts = [urlsplit(row.url).hostname or "unknown" for row in rows]
    large = {host for host, _ in Counter(hosts).most_common(HOSTS)}
    side = np.array([float(min(row.width, row.height)) for row in rows])
    return {
        "shorter side": measure.thirds(side, ("smallest third", "middle third", "largest third"), "{:.0f} px"),
        "brightness": measure.thirds(
            answers.brightness, ("darkest third", "middle third", "brightest third"), "{:.2f}"
        ),
        "sharpness": measure.thirds(
            answers.sharpness, ("most blurred third", "middle third", "sharpest third"), "{:.0f}"
        ),
        bundle.HOST_SLICES: [host if host in large else "other hosts" for host in hosts],
        "label source": _label_sources(catalog, rows),
    }


def _label_sources(catalog: Catalog, rows: Sequence[dataset.Row]) -> list[str]:
    found: dict[str, str] = {}
    shas = [row.sha256 for row in rows]
    with catalog.session() as session:
        for start in range(0, len(shas), 500):
            query = sa.select(ImageRecord.sha256, ImageRecord.label_source).where(
                ImageRecord.sha256.in_(shas[start : start + 500])
            )
            found |= {str(sha): source for sha, source in session.execute(query.order_by(ImageRecord.id.desc()))}
    return [found.get(sha, "no longer in the catalog") for sha in shas]


def _listed(
    rows: Sequence[dataset.Row], probabilities: NDArray[np.float64], classes: list[str]
) -> list[dict[str, Any]]:
    return [
        {
            "sha256": row.sha256,
            "object_key": row.object_key,
            "label": row.label,
            "predicted": classes[int(p.argmax())],
            "probabilities": dict(zip(classes, p.round(6).tolist(), strict=True)),
        }
        for row, p in zip(rows, probabilities, strict=True)
    ]


# --- against the champion -----------------------------------------------------------------------------------


def _decide(
    settings: Settings,
    catalog: Catalog,
    store: ObjectStore,
    champion: registry.Champion | None,
    model: Model,
    evaluation: dict[str, Any],
    evidence: Evidence,
    snapshot: dataset.Snapshot,
    progress: Progress,
) -> Decision:
    """The floors; where there is a champion, the same pictures put to it and the recorded reasons to change it."""
    if champion is None:
        return gate.decide(settings.gate, evidence)
    theirs = registry.artifacts(settings, champion.run_id, "model")
    other = Model.open(theirs, json.loads((theirs / "model.json").read_text()))
    if model.facts["samples"] and not other.facts["samples"]:
        return Decision("reject", "It was trained on drawn sample pictures; the champion was trained on photographs.")
    rows = snapshot.split("test")
    progress(f"Asking champion v{champion.version} the same {len(rows)} images.")
    answers = ask(settings, store, other.graph, rows)
    losses = None
    if other.classes == model.classes:
        judged = registry.artifacts(settings, champion.run_id, "evaluation")
        temperature = json.loads((judged / bundle.EVALUATION).read_text())["temperature"]
        index = np.array([other.classes.index(row.label) for row in rows])
        losses = _losses(bundle.probabilities(answers.logits, temperature), index)
    took, their_time = _latency(settings, store, [model.graph, other.graph], rows[:TIMED_IMAGES])
    evidence = replace(evidence, latency_ms=took)
    evaluation["latency_ms"] = took
    against = Evidence(
        labels=evidence.labels,
        right=other.right(answers.logits, rows),
        losses=losses,
        robust=_altered(settings, store, other, rows[:ALTERED_IMAGES]),
        latency_ms=their_time,
        model_bytes=len(other.data),
    )
    evaluation["champion_robustness"] = {kind: float(hits.mean()) for kind, hits in against.robust.items()}
    reasons = [
        *_changed_data(catalog, store, champion, snapshot),
        *_changed_model(settings.gate, model, other, evidence, against),
        *([model.facts["reason"]] if model.facts.get("reason") else []),
    ]
    return gate.decide(settings.gate, evidence, against, reasons)


def _changed_data(
    catalog: Catalog, store: ObjectStore, champion: registry.Champion, snapshot: dataset.Snapshot
) -> list[str]:
    """What the champion was not trained on: new images, repaired labels, images that have gone."""
    if snapshot.id == champion.snapshot:
        return []
    named = f"snapshot {snapshot.id[:8]} in place of {champion.snapshot[:8]}"
    try:
        before = dataset.load_snapshot(catalog, store, champion.snapshot)
    except (NotFound, IntegrityError):
        return [f"new data, {named}"]  # the old one is lost; that they differ is known from the names
    now, then = ({row.sha256: row.label for row in one.rows if row.split != "test"} for one in (snapshot, before))
    counts = {
        "new images": len(now.keys() - then.keys()),
        "repaired labels": sum(then.get(sha256, label) != label for sha256, label in now.items()),
        "images withdrawn": len(then.keys() - now.keys()),
    }
    said = [f"{count} {what}" for what, count in counts.items() if count]
    return [f"new data: {', '.join(said)}, {named}"] if said else []


def _changed_model(
    policy: GateSettings, model: Model, other: Model, evidence: Evidence, against: Evidence
) -> list[str]:
    """Reasons that lie in the two models: the champion cannot be served any more, or the new one is cheaper."""
    reasons = []
    if other.facts["preprocessing"] != images.PREPROCESSING:
        reasons.append("the champion was made for another preprocessing and cannot be released any more")
    if evidence.latency_ms and against.latency_ms and evidence.latency_ms <= policy.cheaper * against.latency_ms:
        reasons.append(f"cheaper: {evidence.latency_ms:.1f} ms an inference in place of {against.latency_ms:.1f}")
    if len(model.data) <= policy.cheaper * len(other.data):
        reasons.append(f"smaller: {len(model.data) / 1e6:.1f} MB in place of {len(other.data) / 1e6:.1f}")
    return reasons


# --- pictures for the report --------------------------------------------------------------------------------


def _shown(
    settings: Settings,
    store: ObjectStore,
    model: Model,
    probabilities: NDArray[np.float64],
    rows: Sequence[dataset.Row],
) -> list[evaluation_report.Row]:
    """The surest mistakes and the least sure answers, with what the network looked at where the graph tells."""
    right, sure = model.right(probabilities, rows), probabilities.max(axis=1)
    mistakes = [int(i) for i in np.argsort(-sure, kind="stable") if not right[i]]
    doubtful = [int(i) for i in np.argsort(sure, kind="stable") if int(i) not in mistakes[:SHOWN]]

    def tile(i: int) -> evaluation_report.Tile:
        (picture,) = _decoded(settings, store, [rows[i]], model.graph.size)
        said = int(probabilities[i].argmax())
        cam = model.graph(picture).cam
        return evaluation_report.Tile(
            picture=picture,
            overlay=None if cam is None else heatmap.overlay(picture, cam[..., said]),
            label=rows[i].label,
            predicted=model.classes[said],
            probability=float(sure[i]),
            url=rows[i].url,
        )

    return [
        evaluation_report.Row("Surest mistakes", len(mistakes), [tile(i) for i in mistakes[:SHOWN]]),
        evaluation_report.Row("Least sure answers", len(rows), [tile(i) for i in doubtful[:SHOWN]]),
    ]
