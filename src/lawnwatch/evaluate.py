"""Is the run good enough, and better than the champion? Measured on the graph that will be served.

Pictures go through `images.decode` and the LiteRT graph, the road of serving. The temperature and the threshold of
"unknown" are fitted on the validation split; the test split only measures. Every figure has a 95 % interval: Wilson's
for shares (Wilson 1927), the percentile bootstrap for the rest.

The verdict on a first model is by absolute floors. A challenger is compared with the champion on the same pictures:
exact McNemar test (McNemar 1947) for superiority, paired bootstrap for non-inferiority. It is promoted when it is
shown to be better, or when it is shown to be not worse by more than the margin and there is a recorded reason to
change; with a hundred test pictures a good champion can hardly be beaten significantly.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch import bundle, dataset, images, registry
from lawnwatch.catalog import Catalog
from lawnwatch.config import GateSettings, Settings
from lawnwatch.errors import DataError, IntegrityError
from lawnwatch.registry import Verdict
from lawnwatch.sketch import Sketch
from lawnwatch.store import ObjectStore
from lawnwatch.train import fit_temperature, log_loss

METHOD = "1"  # changes whenever the same run would be measured or judged differently
REFERENCE_IMAGES = 1000  # training pictures in the reference sketch and in the bank of "unknown"
UNKNOWN_NEIGHBOUR = 5
UNKNOWN_ACCEPT_RATE = 0.99
RESAMPLES = 2000
ECE_BINS = 10

Progress = Callable[[str], None]
Bools = NDArray[np.bool_]


# --- statistics ---------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; (0, 1) when there is nothing to count."""
    if n == 0:
        return 0.0, 1.0
    z = _quantile(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of McNemar's test: how surprising this split is if neither model is better."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    return 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses, 0.5).pvalue)


@dataclass(frozen=True)
class PairedGain:
    """Challenger's accuracy minus the champion's, on the same pictures.

    Attributes:
        low, high: one-sided bounds at level alpha each.
        wins: pictures that only the challenger had right.
        losses: pictures that only the champion had right.
        p: of the exact McNemar test.
    """

    images: int
    gain: float
    low: float
    high: float
    wins: int
    losses: int
    p: float


def paired_gain(challenger: Bools, champion: Bools, *, alpha: float, seed: int = 0) -> PairedGain:
    """Compare two models by which of the same n pictures each had right.

    The bootstrap believes too much when hardly any picture separates the two: with none it would give a bound of
    exactly zero. So neither bound is better than what n pictures without a single loss can show, 1 - alpha^(1/n).
    """
    difference = challenger.astype(np.int64) - champion.astype(np.int64)
    n = len(difference)
    wins, losses = int((difference == 1).sum()), int((difference == -1).sum())
    draws = np.random.default_rng(seed).multinomial(n, [wins / n, losses / n, 1 - (wins + losses) / n], RESAMPLES)
    gains = (draws[:, 0] - draws[:, 1]) / n
    least = 1 - alpha ** (1 / n)
    return PairedGain(
        images=n,
        gain=float(difference.mean()),
        low=float(min(np.quantile(gains, alpha), -least)),
        high=float(max(np.quantile(gains, 1 - alpha), least)),
        wins=wins,
        losses=losses,
        p=mcnemar(wins, losses),
    )


def expected_calibration_error(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean gap between confidence and accuracy over ten equal bins, weighted by count (Guo et al. 2017)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=right.astype(float) - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def confusion(predicted: NDArray[np.int64], labels: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """(n_classes, n_classes) counts; rows are the truth."""
    cells = np.bincount(labels * n_classes + predicted, minlength=n_classes * n_classes)
    return cells.reshape(n_classes, n_classes).astype(np.int64)


def figures(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro-F1, log loss, Brier score and ECE of (n, k) probabilities."""
    matrix = confusion(probabilities.argmax(axis=1), labels, probabilities.shape[1])
    right, truth, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    seen = truth > 0
    recall = right[seen] / truth[seen]
    f1 = 2 * right[seen] / (truth[seen] + predicted[seen])
    targets = np.eye(probabilities.shape[1])[labels]
    return {
        "accuracy": float(right.sum() / len(labels)),
        "balanced_accuracy": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "log_loss": log_loss(probabilities, labels),
        "brier": float(((probabilities - targets) ** 2).sum(axis=1).mean()),
        "ece": expected_calibration_error(probabilities, labels),
    }


def measure(probabilities: NDArray[np.float64], labels: NDArray[np.int64], classes: Sequence[str]) -> dict[str, Any]:
    """All figures with 95 % intervals, per class too, and the confusion matrix.

    Args:
        probabilities: (n, k), calibrated.
        labels: (n,), indices into classes.
    """
    n = len(labels)
    rng = np.random.default_rng(0)
    resamples = [figures(probabilities[i], labels[i]) for i in rng.integers(0, n, size=(RESAMPLES // 4, n))]
    metrics = {}
    for name, value in figures(probabilities, labels).items():
        low, high = np.quantile([one[name] for one in resamples], [0.025, 0.975])
        if name == "accuracy":
            low, high = wilson(round(value * n), n)
        metrics[name] = {"value": value, "low": float(low), "high": float(high)}
    matrix = confusion(probabilities.argmax(axis=1), labels, len(classes))
    per_class = {}
    for i, label in enumerate(classes):
        hit, predicted, support = int(matrix[i, i]), int(matrix[:, i].sum()), int(matrix[i].sum())
        per_class[label] = {
            "precision": _share(hit, predicted),
            "recall": _share(hit, support),
            "support": support,
        }
    return {
        "split": "test",
        "images": n,
        "metrics": metrics,
        "per_class": per_class,
        "confusion": {"labels": list(classes), "matrix": matrix.tolist()},
    }


def _share(hit: int, n: int) -> dict[str, float | None]:
    low, high = wilson(hit, n)
    return {"value": hit / n if n else None, "low": low, "high": high}


def _quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


# --- the verdict: pure functions of counts ------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """`promote`, `reject` or `inconclusive`, why, and the numbers it rests on."""

    decision: str
    reason: str
    more_images: int | None = None


def judge_floors(right: int, n: int, gate: GateSettings) -> Decision:
    """The absolute floors, which every model must pass."""
    low, high = wilson(right, n)
    measured = (
        f"Test accuracy is {right / n:.1%} (95 % interval {low:.1%} to {high:.1%}) on {n} images"
        if n
        else "There are no test images"
    )
    if n < gate.min_test_images:
        more = gate.min_test_images - n
        return Decision(
            "inconclusive",
            f"{measured}; nothing is decided on fewer than {gate.min_test_images}: collect about {more} more labelled "
            "test images to tell.",
            more,
        )
    if low >= gate.min_accuracy:
        return Decision("promote", f"{measured}; at least {gate.min_accuracy:.0%} was asked of the lower bound.")
    if right / n <= gate.min_accuracy:
        return Decision("reject", f"{measured}; the lower bound must reach {gate.min_accuracy:.0%}.")
    needed = n
    while wilson(round(right / n * needed), needed)[0] < gate.min_accuracy and needed < 100 * n:
        needed += max(1, n // 20)
    return Decision(
        "inconclusive",
        f"{measured}; the lower bound must reach {gate.min_accuracy:.0%}: collect about {needed - n} more labelled "
        "test images to tell.",
        needed - n,
    )


def judge_challenger(pair: PairedGain, gate: GateSettings, why: str) -> Decision:
    """Challenger against champion.

    Args:
        pair: the comparison on the same pictures.
        gate: alpha and margin.
        why: the recorded reason to change the model when it is merely not worse; empty: there is none.
    """
    measured = (
        f"On {pair.images} test images the challenger is {pair.gain:+.1%} against the champion "
        f"({pair.wins} images won, {pair.losses} lost; 90 % interval {pair.low:+.1%} to {pair.high:+.1%}; "
        f"McNemar p = {pair.p:.3f})"
    )
    if pair.p < gate.alpha and pair.gain > 0:
        return Decision("promote", f"{measured}: it is better.")
    if pair.high < 0 or (pair.p < gate.alpha and pair.gain < 0):
        return Decision("reject", f"{measured}: it is worse.")
    if pair.low > -gate.margin:
        if why:
            return Decision(
                "promote",
                f"{measured}: it is not worse by more than {gate.margin:.0%}, and there is a reason to change: {why}.",
            )
        return Decision(
            "inconclusive",
            f"{measured}: it is not worse by more than {gate.margin:.0%}, but not shown to be better, and no reason to "
            "change was given (`--reason`).",
        )
    more = images_to_tell(pair, gate)
    return Decision(
        "inconclusive",
        f"{measured}: it may still be worse by more than {gate.margin:.0%}; collect about {more} more labelled test "
        "images to tell.",
        more,
    )


def images_to_tell(pair: PairedGain, gate: GateSettings) -> int:
    """How many more test images would decide with 80 % power, if the rates seen so far are the true ones."""
    z = _quantile(1 - gate.alpha) + _quantile(0.8)
    separating = (pair.wins + pair.losses + 1) / (pair.images + 2)
    distance = max(abs(pair.gain + gate.margin), 0.01) if pair.gain > -gate.margin else max(-pair.gain, 0.01)
    needed = z * z * separating / distance**2
    smallest = math.log(gate.alpha) / math.log(1 - gate.margin)  # images with which no loss at all is enough
    return max(1, math.ceil(max(needed, smallest)) - pair.images)


class UnusableModel(IntegrityError):
    """The graph cannot be loaded, returns no finite numbers, or says the same of every picture."""


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


def ask(settings: Settings, store: ObjectStore, graph: bundle.Graph, rows: Sequence[dataset.Row]) -> Answers:
    """Run pictures through the road of serving.

    Raises:
        UnusableModel: the graph returned something that is not finite.
        IntegrityError: a picture's bytes are not what the snapshot says.
    """
    outputs, brightness, sharpness = [], [], []
    cache = dataset.ObjectCache.of(settings)
    for row in rows:
        data = cache.read(store, row.object_key, row.sha256)
        picture = images.decode(data, size=graph.size, max_pixels=settings.images.max_pixels)
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


def run(settings: Settings, catalog: Catalog, store: ObjectStore, run_id: str, *, progress: Progress) -> Verdict:
    """Measure a run on the frozen test split and decide. The same question has the same, recorded answer.

    Raises:
        NotFound: no such run or snapshot. DataError: there are no test images.
        IntegrityError: the run's artifacts are not what it recorded. Unavailable.
    """
    champion = registry.champion(settings, catalog)
    policy = policy_of(settings.gate)
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
    classes: list[str] = facts["classes"]
    rows = {split: snapshot.split(split) for split in ("train", "validation", "test")}
    if not rows["test"] or not rows["validation"]:
        raise DataError(
            f"snapshot {snapshot.id[:12]} has {len(rows['test'])} test images and {len(rows['validation'])} of "
            "validation.",
            hint="Both splits need images: add some and create a snapshot.",
        )
    with tempfile.TemporaryDirectory() as building:
        folder = Path(building) / "evaluation"
        folder.mkdir()
        comparison: dict[str, Any] | None = None
        try:
            graph = _open(home, classes)
            evaluation, right = _measure(settings, store, graph, classes, rows, folder, progress)
        except UnusableModel as error:
            evaluation, verdict = {}, Decision("reject", f"The model cannot be used: {error.message}")
        else:
            verdict, comparison = _decide(settings, store, champion, facts, right, rows["test"], progress)
        evaluation |= {
            "verdict": {"decision": verdict.decision, "reason": verdict.reason},
            "more_images": verdict.more_images,
            "comparison": comparison,
            "champion_version": champion.version if champion else 0,
            "policy": settings.gate.model_dump(),
        }
        (folder / bundle.EVALUATION).write_text(json.dumps(evaluation, indent=1, allow_nan=False))
        registry.seal(folder)
        _log(settings, run_id, evaluation, verdict, folder)
    return registry.record_verdict(
        catalog,
        Verdict(
            run_id=run_id,
            decision=verdict.decision,
            reason=verdict.reason,
            champion_version=champion.version if champion else 0,
            snapshot=snapshot.id,
            fingerprint=facts["fingerprint"],
            policy=policy,
            created_at=datetime.now(UTC),
            message=f"Verdict on run {run_id[:8]}: {verdict.decision}. {verdict.reason}",
            evaluation=evaluation,
        ),
    )


def _open(home: Path, classes: Sequence[str]) -> bundle.Graph:
    try:
        return bundle.Graph((home / bundle.MODEL).read_bytes(), classes=len(classes))
    except IntegrityError as error:
        raise UnusableModel(error.message) from error


def policy_of(gate: GateSettings) -> str:
    """Hash of the policy and the method a verdict rests on."""
    return hashlib.sha256(json.dumps([METHOD, gate.model_dump()], sort_keys=True).encode()).hexdigest()


def _measure(
    settings: Settings,
    store: ObjectStore,
    graph: bundle.Graph,
    classes: list[str],
    rows: dict[str, list[dataset.Row]],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Any], Bools]:
    """Calibrate on validation, measure on test, keep what the bundle needs; also which test images were right."""
    index = {label: i for i, label in enumerate(classes)}
    labels = {split: np.array([index[row.label] for row in rows[split]], np.int64) for split in rows}
    validation = ask(settings, store, graph, rows["validation"])
    temperature = fit_temperature(validation.logits, labels["validation"])

    reference_rows = sorted(rows["train"], key=lambda row: str(row.sha256))[:REFERENCE_IMAGES]
    progress(f"Measuring {len(rows['test'])} test images; reference of {len(reference_rows)} training images.")
    reference = ask(settings, store, graph, reference_rows)
    sketch = Sketch.of(reference.embeddings, reference.brightness, reference.sharpness)
    (folder / bundle.SKETCH).write_bytes(sketch.to_bytes())
    bank = reference.embeddings / np.maximum(np.linalg.norm(reference.embeddings, axis=1, keepdims=True), 1e-12)
    bank = bank.astype(np.float16)  # half the file; the score moves by less than 0.001
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, bank=bank)
    (folder / bundle.UNKNOWN).write_bytes(buffer.getvalue())
    unknown = _unknown(bank.astype(np.float32), validation, temperature)

    test = ask(settings, store, graph, rows["test"])
    probabilities = bundle.probabilities(test.logits, temperature)
    evaluation = measure(probabilities, labels["test"], classes)
    accuracy = evaluation["metrics"]["accuracy"]
    progress(f"Test accuracy {accuracy['value']:.1%} (95 % interval {accuracy['low']:.1%} to {accuracy['high']:.1%}).")
    if float(probabilities.std(axis=0).max()) < 1e-6 or len(set(probabilities.argmax(axis=1))) == 1:
        said = classes[int(probabilities[0].argmax())]
        raise UnusableModel(f"it answers {said!r} whatever the picture shows.")
    evaluation |= {"temperature": temperature, "unknown": unknown.model_dump()}
    answers = {
        "validation": _listed(rows["validation"], bundle.probabilities(validation.logits, temperature), classes),
        "test": _listed(rows["test"], probabilities, classes),
    }
    (folder / "predictions.json").write_text(json.dumps(answers))
    _plots(evaluation, probabilities, labels["test"], folder)
    return evaluation, probabilities.argmax(axis=1) == labels["test"]


def _unknown(bank: NDArray[np.float32], validation: Answers, temperature: float) -> bundle.Unknown:
    """A threshold on the distance to the k-th training embedding that lets the stated share of validation pass."""
    k = min(UNKNOWN_NEIGHBOUR, len(bank))
    spec = bundle.Unknown(method="knn", threshold=0.0, accept_rate=UNKNOWN_ACCEPT_RATE, k=k)
    detector = bundle.UnknownDetector(spec, temperature, bank)
    scores = [detector.score(outputs) for outputs in validation.outputs]
    # The next number above, because the threshold itself already means unknown.
    threshold = float(np.nextafter(np.quantile(scores, UNKNOWN_ACCEPT_RATE, method="higher"), np.inf))
    return spec.model_copy(update={"threshold": threshold})


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


def _decide(
    settings: Settings,
    store: ObjectStore,
    champion: registry.Champion | None,
    facts: dict[str, Any],
    right: Bools,
    test: list[dataset.Row],
    progress: Progress,
) -> tuple[Decision, dict[str, Any] | None]:
    """Floors first, then the comparison with the champion on the same pictures."""
    floors = judge_floors(int(right.sum()), len(right), settings.gate)
    if champion is None or floors.decision != "promote":
        return floors, None
    theirs = registry.artifacts(settings, champion.run_id, "model")
    other = json.loads((theirs / "model.json").read_text())
    if facts["samples"] and not other["samples"]:
        return Decision(
            "reject", "It was trained on drawn sample pictures; the champion was trained on photographs."
        ), None
    progress(f"Asking champion v{champion.version} the same {len(right)} images.")
    answers = ask(settings, store, _open(theirs, other["classes"]), test)
    said = [other["classes"][i] for i in answers.logits.argmax(axis=1)]
    champion_right = np.array([label == row.label for label, row in zip(said, test, strict=True)])
    pair = paired_gain(right, champion_right, alpha=settings.gate.alpha)
    why = facts.get("reason", "")
    if not why and facts["snapshot"] != champion.snapshot:
        why = f"new data, snapshot {facts['snapshot'][:8]} in place of {champion.snapshot[:8]}"
    comparison = {
        "champion_version": champion.version,
        "images": pair.images,
        "gain": pair.gain,
        "low": pair.low,
        "high": pair.high,
        "wins": pair.wins,
        "losses": pair.losses,
        "mcnemar_p": pair.p,
        "recorded_reason": why,
    }
    return judge_challenger(pair, settings.gate, why), comparison


# --- the record ---------------------------------------------------------------------------------------------


def _log(settings: Settings, run_id: str, evaluation: dict[str, Any], verdict: Decision, folder: Path) -> None:
    with registry.tracking(settings) as client:
        for name, interval in evaluation.get("metrics", {}).items():
            client.log_metric(run_id, f"test_{name}", interval["value"])
            client.log_metric(run_id, f"test_{name}_low", interval["low"])
            client.log_metric(run_id, f"test_{name}_high", interval["high"])
        client.log_artifacts(run_id, str(folder), "evaluation")
        client.set_tag(run_id, "lawnwatch.decision", verdict.decision)
        client.set_tag(run_id, "lawnwatch.verdict", verdict.reason)
    registry.forget_artifacts(settings, run_id, "evaluation")


def _plots(
    evaluation: dict[str, Any], probabilities: NDArray[np.float64], labels: NDArray[np.int64], folder: Path
) -> None:
    """confusion.png and reliability.png."""
    from matplotlib.figure import Figure

    names, matrix = evaluation["confusion"]["labels"], np.array(evaluation["confusion"]["matrix"])
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix, cmap="Greens")
    for (i, j), count in np.ndenumerate(matrix):
        axes.text(j, i, str(count), ha="center", va="center", color="white" if count > matrix.max() / 2 else "black")
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="predicted", ylabel="truth", title="Test split")
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)
    figure.savefig(folder / "confusion.png")

    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for b in sorted(set(bins.tolist())):
        chosen = bins == b
        low, high = wilson(int(right[chosen].sum()), int(chosen.sum()))
        mean = float(right[chosen].mean())
        error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.errorbar(confidence[chosen].mean(), mean, yerr=error, fmt="o", color="#395", capsize=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title="Reliability, test split")
    figure.savefig(folder / "reliability.png")
