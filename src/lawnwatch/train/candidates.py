"""The candidates, how each is trained and judged on the validation split, and the rule that picks one."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch import bundle, dataset, model, unknown
from lawnwatch.config import Settings
from lawnwatch.train.features import COLOR_FEATURES, PROBE_IMAGES, VIEWS, Features, Floats, Pictures, Progress

CANDIDATES = ("color_baseline", "linear_probe", "fine_tuned", "small_input")  # the servable ones from the simplest on
TEACHERS = ("linear_probe", "fine_tuned")  # those among which one is picked; small_input is a variant of that one
PROBE_C = (0.001, 0.003, 0.01, 0.03, 0.1)
TEMPERATURE_SPREAD = 0.5
PATIENCE = 3
HELD_OUT_IMAGES = 2000  # pictures on which a graph is calibrated and its variants are compared
SMALL_C = (0.001, 0.003, 0.01)
TEACHER_SHARE = 0.5  # of a distilled target; the rest is the label


@dataclass(frozen=True)
class FineTuning:
    """How the top blocks are trained. epochs: most of them; None: as the settings say."""

    learning_rate: float = 1e-4
    epochs: int | None = None


FINE_TUNING = FineTuning()


@dataclass(frozen=True)
class Candidate:
    """One trained candidate, as measured on the validation split.

    Attributes:
        val_log_loss: at the temperature that was fitted on the same split.
        curves: name → one value an epoch (or a tried C).
        note: why it is out, when it is.
        val_losses: of each picture that it was judged on.
        sweep: each trial's numbers and log loss, when they were searched for.
    """

    name: str
    servable: bool
    val_accuracy: float
    val_log_loss: float
    temperature: float
    seconds: float
    params: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    val_losses: list[float] = field(default_factory=list)
    sweep: list[dict[str, Any]] = field(default_factory=list)


def pick(candidates: Sequence[Candidate]) -> Candidate:
    """The simplest candidate whose validation log loss is within one standard error of the smallest, paired.

    Args:
        candidates: usable ones, the simplest first.
    """
    best = min(candidates, key=lambda one: one.val_log_loss)
    for one in candidates:
        n = min(len(one.val_losses), len(best.val_losses))
        behind = np.array(one.val_losses[:n]) - np.array(best.val_losses[:n])
        if n > 1 and behind.mean() <= behind.std(ddof=1) / math.sqrt(n):
            return one
    return best


def color_baseline(
    train: Floats, train_labels: NDArray[np.int64], val: Floats, val_labels: NDArray[np.int64], n_classes: int
) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Logistic regression on (n, COLOR_FEATURES) colour and texture: what can be had without a network."""
    kernel, bias = _logistic(train, train_labels, 1.0, n_classes)
    judged = judge(val @ kernel + bias, val_labels)
    candidate = Candidate(
        name="color_baseline",
        servable=False,
        val_accuracy=judged.accuracy,
        val_log_loss=judged.loss,
        temperature=judged.temperature,
        seconds=0.0,
        params={"C": 1.0, "features": COLOR_FEATURES},
        note="a yardstick, never served",
        val_losses=judged.losses,
    )
    return candidate, {"kernel": kernel, "bias": bias}


def linear_probe(
    train: Features,
    val: Features,
    n_classes: int,
    seed: int,
    grid: Sequence[tuple[bool, float]] = tuple(itertools.product((False, True), PROBE_C)),
) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Logistic regression on the frozen embedding, fitted on the training and the validation split.

    Its strength and whether it sees the augmented views are chosen by cross-validation, by log loss on pictures as
    serving sees them. The figures are of the validation pictures, each by the head of the fold that left it out.

    Args:
        grid: whether it sees the views, and C.

    Returns:
        The candidate, and: `kernel`, `bias`; `fold_of` (m,), `fold_kernels` (folds, 1280, k) and `fold_biases`
        (folds, k), the heads that did not see picture i; `start_kernel`, `start_bias`, fitted on the training split;
        `held_out` (h,), the pictures on which graphs are judged, and `held_out_pooled` (h, 1280), their embeddings.
    """
    both = [_probed(train), _probed(val)]
    x = np.concatenate([part.pooled for part in both])
    labels = np.concatenate([part.labels for part in both])
    groups = np.concatenate([both[0].groups, both[1].groups + len(train.rows)])  # no group spans two splits
    n, of_val = len(labels), slice(len(both[0].labels), None)
    seen = [np.arange(len(part.views)) + start for part, start in zip(both, (0, len(both[0].labels)), strict=True)]
    viewed = np.concatenate(seen)
    views = np.concatenate([part.views for part in both])

    def head(rows: NDArray[np.int64], with_views: bool, c: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        chosen, truth = [x[rows]], [labels[rows]]
        if with_views:
            mine = np.isin(viewed, rows)
            chosen.append(views[mine].reshape(-1, model.EMBEDDING))
            truth.append(np.repeat(labels[viewed[mine]], VIEWS))
        return _logistic(np.concatenate(chosen), np.concatenate(truth), c, n_classes)

    parts = unknown.folds(labels, seed, groups)
    fold_of = np.zeros(n, np.int64)
    for k, (_, fold) in enumerate(parts):
        fold_of[fold] = k
    tried: list[tuple[float, bool, float, NDArray[Any], list[tuple[NDArray[Any], NDArray[Any]]]]] = []
    for with_views, c in grid:
        heads = [head(rest, with_views, c) for rest, _ in parts]
        logits = by_fold(x, fold_of, np.stack([k for k, _ in heads]), np.stack([b for _, b in heads]))
        tried.append((judge(logits, labels).loss, with_views, c, logits, heads))
    loss, with_views, c, logits, heads = min(tried, key=lambda one: one[0])
    whole, judged = judge(logits, labels), judge(logits[of_val], labels[of_val])
    candidate = Candidate(
        name="linear_probe",
        servable=True,
        val_accuracy=judged.accuracy,
        val_log_loss=judged.loss,
        temperature=whole.temperature,
        seconds=0.0,
        params={
            "C": c,
            "views": VIEWS if with_views else 0,
            "class_weight": "balanced",
            "folds": len(parts),
            "cv_images": n,
            "cv_accuracy": round(whole.accuracy, 4),
            "cv_log_loss": round(loss, 4),
        },
        curves={"cv_log_loss_by_C": [one[0] for one in tried]},
        val_losses=judged.losses,
    )
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:HELD_OUT_IMAGES])
    kernel, bias = head(np.arange(n), with_views, c)
    start_kernel, start_bias = head(np.arange(len(both[0].labels)), with_views, c)
    arrays = {
        "kernel": kernel,
        "bias": bias,
        "start_kernel": start_kernel,
        "start_bias": start_bias,
        "fold_kernels": np.stack([k for k, _ in heads]),
        "fold_biases": np.stack([b for _, b in heads]),
        "held_out_pooled": x[chosen],
    }
    numbers = {"fold_of": fold_of, "held_out": chosen}
    return candidate, {name: array.astype(np.float32) for name, array in arrays.items()} | numbers


def fine_tuned(
    settings: Settings,
    network: model.Network,
    train: Features,
    val: Features,
    head: tuple[Floats, Floats],
    deadline: float,
    progress: Progress,
    tuning: FineTuning = FINE_TUNING,
) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """Train the top blocks and the head from the cut activations, starting from the probe's head.

    Adam on a cosine schedule, class weights; each epoch draws one view of every picture. Stops when
    the validation loss has not improved for PATIENCE epochs, or at the deadline (`time.monotonic`).
    """
    tf, k = model.tensorflow(), model.keras()
    n, size = len(train.cut), settings.train.batch_size
    labels = train.labels[:n]
    n_classes = head[0].shape[1]
    weights = (len(labels) / (n_classes * np.maximum(np.bincount(labels, minlength=n_classes), 1))).astype(np.float32)
    kernel, bias = k.Variable(head[0], name="kernel"), k.Variable(head[1], name="bias")
    variables = [*model.unfreeze_top(network), kernel, bias]
    epochs = tuning.epochs or settings.train.fine_tune_epochs
    steps = epochs * math.ceil(n / size)
    optimizer = k.optimizers.Adam(k.optimizers.schedules.CosineDecay(tuning.learning_rate, steps))
    optimizer.build(variables)

    def logits_of(cut: Any) -> Any:
        features = network.top(tf.cast(cut, tf.float32), training=False)
        return tf.matmul(tf.reduce_mean(features, [1, 2]), kernel.value) + bias.value

    signature = [tf.TensorSpec([None, *model.CUT_SHAPE], tf.float16)]
    predict = tf.function(logits_of, input_signature=signature)

    @tf.function(input_signature=[*signature, tf.TensorSpec([None], tf.int64)])  # type: ignore[untyped-decorator]
    def step(cut: Any, truth: Any) -> Any:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(truth, logits_of(cut))
            loss = tf.reduce_mean(losses * tf.gather(weights, truth))
        optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
        return loss

    def validate() -> NDArray[Any]:
        parts = [predict(val.cut[i : i + 64, 0]).numpy() for i in range(0, len(val.cut), 64)]
        return np.concatenate(parts)

    rng = np.random.default_rng(settings.train.seed)
    # Infinite until an epoch ended well: a candidate that never trained must not pass for a trained one.
    best = (Judged(), 0, network.top.get_weights(), kernel.numpy(), bias.numpy())
    curves: dict[str, list[float]] = {"loss": [], "val_accuracy": [], "val_log_loss": []}
    note = ""
    for epoch in range(1, epochs + 1):
        order, losses = rng.permutation(n), []
        for start in range(0, n, size):
            chosen = order[start : start + size]
            views = rng.integers(0, train.cut.shape[1], size=len(chosen))
            losses.append(float(step(train.cut[chosen, views], labels[chosen])))
        judged = judge(validate(), val.labels[: len(val.cut)])
        if not (math.isfinite(judged.loss) and np.isfinite(losses).all()):
            note = f"the loss was not finite in epoch {epoch}; the weights before it are kept"
            break
        for name, value in (
            ("loss", float(np.mean(losses))),
            ("val_accuracy", judged.accuracy),
            ("val_log_loss", judged.loss),
        ):
            curves[name].append(value)
        progress(
            f"fine_tuned: epoch {epoch} of {epochs}, loss {np.mean(losses):.3f}, validation log loss {judged.loss:.3f}."
        )
        if judged.loss < best[0].loss:
            best = (judged, epoch, network.top.get_weights(), kernel.numpy(), bias.numpy())
        if epoch - best[1] >= PATIENCE:
            note = f"stopped early after epoch {epoch}"
            break
        if time.monotonic() > deadline:
            note = f"stopped by the time budget after epoch {epoch}"
            break
    judged, epoch, top, best_kernel, best_bias = best
    candidate = Candidate(
        name="fine_tuned",
        servable=True,
        val_accuracy=judged.accuracy,
        val_log_loss=judged.loss,
        temperature=judged.temperature,
        seconds=0.0,
        params={
            "best_epoch": epoch,
            "learning_rate": tuning.learning_rate,
            "epochs": epochs,
            "schedule": "cosine",
            "batch_size": size,
            "images": n,
            "cut": model.CUT_LAYER,
        },
        curves=curves,
        note=note,
        val_losses=judged.losses,
    )
    arrays = {f"top_{i:03}": array for i, array in enumerate(top)}
    return candidate, {"kernel": best_kernel, "bias": best_bias, **arrays}


@dataclass(frozen=True)
class Lesson:
    """What the best candidate teaches, so that what is held out has been seen by neither teacher nor student.

    Attributes:
        teacher: its name.
        rows: the n pictures that are taught; labels (n,); answers (n, k), the teacher's probabilities.
        asked: the h held-out pictures; asked_labels (h,).
        folds: for a probe, for each of its folds which of the n pictures lie outside it, and what the head that has not
            seen the fold says of them; the held-out pictures are then those that are taught. fold_of (h,).
    """

    teacher: str
    rows: list[dataset.Row]
    labels: NDArray[np.int64]
    answers: NDArray[Any]
    asked: list[dataset.Row]
    asked_labels: NDArray[np.int64]
    folds: list[tuple[NDArray[np.int64], NDArray[Any]]] = field(default_factory=list)
    fold_of: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of_probe(cls, arrays: dict[str, NDArray[Any]], temperature: float, held_out: Pictures) -> Lesson:
        """What the probe's heads teach of its held-out pictures."""
        x, fold_of = arrays["held_out_pooled"], arrays["fold_of"][arrays["held_out"]]
        heads = zip(arrays["fold_kernels"], arrays["fold_biases"], strict=True)
        folds = []
        for k, (kernel, bias) in enumerate(heads):
            rest = np.flatnonzero(fold_of != k)
            folds.append((rest, bundle.probabilities(x[rest] @ kernel + bias, temperature)))
        answers = bundle.probabilities(x @ arrays["kernel"] + arrays["bias"], temperature)
        rows, labels = held_out.rows, held_out.labels
        return cls("linear_probe", rows, labels, answers, rows, labels, folds, fold_of)


def small_input(
    small: tuple[Floats, Floats],
    lesson: Lesson,
    n_classes: int,
) -> tuple[Candidate, dict[str, NDArray[Any]]]:
    """A head for the network on a smaller picture, distilled from the best candidate (Hinton et al. 2015).

    Each target is half the teacher's calibrated answer and half the label.

    Args:
        small: (n, 1280) and (h, 1280) embeddings of the lesson's training and held-out pictures.

    Returns:
        The candidate, and `kernel`, `bias`; for a lesson in folds `fold_kernels` and `fold_biases` too; `logits` (h, k)
        of the held-out pictures.
    """
    x, asked = small
    weights = len(lesson.labels) / (n_classes * np.maximum(np.bincount(lesson.labels, minlength=n_classes), 1))

    def head(rows: NDArray[np.int64], answers: NDArray[Any], c: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """Soft targets are each picture once for each class, weighted by the target."""
        truth = np.eye(n_classes)[lesson.labels[rows]]
        targets = TEACHER_SHARE * answers + (1 - TEACHER_SHARE) * truth
        targets *= weights[lesson.labels[rows], np.newaxis]
        every = np.tile(np.arange(n_classes), len(rows))
        return _logistic(np.repeat(x[rows], n_classes, axis=0), every, c, n_classes, targets.ravel())

    tried = []
    for c in SMALL_C:
        if lesson.folds:
            heads = [head(rest, answers, c) for rest, answers in lesson.folds]
            kernels, biases = np.stack([k for k, _ in heads]), np.stack([b for _, b in heads])
            logits = by_fold(asked, lesson.fold_of, kernels, biases)
            arrays = {"fold_kernels": kernels, "fold_biases": biases}
        else:
            kernel, bias = head(np.arange(len(x)), lesson.answers, c)
            logits, arrays = asked @ kernel + bias, {}
        tried.append((judge(logits, lesson.asked_labels), c, logits, arrays))
    judged, c, logits, arrays = min(tried, key=lambda one: one[0].loss)
    kernel, bias = head(np.arange(len(x)), lesson.answers, c)
    candidate = Candidate(
        name="small_input",
        servable=True,
        val_accuracy=judged.accuracy,
        val_log_loss=judged.loss,
        temperature=judged.temperature,
        seconds=0.0,
        params={
            "C": c,
            "size": model.SMALL_SIZE,
            "teacher": lesson.teacher,
            "teacher_share": TEACHER_SHARE,
            "images": len(x),
            "judged_on": f"{len(asked)} {'cross-validated' if lesson.folds else 'validation'} images",
        },
        curves={"log_loss_by_C": [one[0].loss for one in tried]},
        note=f"a cheaper graph of {lesson.teacher}",
        val_losses=judged.losses,
    )
    arrays |= {"kernel": kernel, "bias": bias, "logits": logits}
    return candidate, {name: array.astype(np.float32) for name, array in arrays.items()}


def _probed(part: Features) -> Features:
    n = min(len(part.rows), PROBE_IMAGES)
    return replace(part, rows=part.rows[:n], labels=part.labels[:n], groups=part.groups[:n], pooled=part.pooled[:n])


def held_out(arrays: dict[str, NDArray[Any]], train: Pictures, val: Pictures) -> Pictures:
    """The pictures on which graphs with a probe's heads are judged."""
    rows = [*train.rows[:PROBE_IMAGES], *val.rows[:PROBE_IMAGES]]
    labels = np.concatenate([train.labels[:PROBE_IMAGES], val.labels[:PROBE_IMAGES]])
    chosen = [rows[i] for i in arrays["held_out"]]
    groups = np.unique([row.group for row in chosen], return_inverse=True)[1].astype(np.int64)
    return Pictures(chosen, labels[arrays["held_out"]], groups)


def by_fold(
    embeddings: NDArray[Any], fold_of: NDArray[np.int64], kernels: NDArray[Any], biases: NDArray[Any]
) -> NDArray[np.float64]:
    """(n, k) logits of (n, d) embeddings, each by the head of its fold: kernels (folds, d, k), biases (folds, k)."""
    logits = np.zeros((len(embeddings), biases.shape[1]))
    for k in range(len(kernels)):
        logits[fold_of == k] = embeddings[fold_of == k] @ kernels[k] + biases[k]
    return logits


def _logistic(
    x: NDArray[Any], y: NDArray[np.int64], c: float, n_classes: int, weights: NDArray[Any] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Class-balanced logistic regression on standardised features, folded into kernel (d, n) and bias (n,)."""
    from sklearn.linear_model import LogisticRegression

    x = x.astype(np.float64)
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-3
    balance = "balanced" if weights is None else None
    fitted = LogisticRegression(C=c, class_weight=balance, max_iter=1000, tol=1e-3)
    fitted.fit((x - mean) / spread, y, sample_weight=weights)
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if n_classes == 2:  # one row of coefficients: give half of it to each class, so that the map shows both
        coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.hstack([-intercept, intercept]) / 2
    kernel = (coefficients / spread).T
    return kernel, intercept - mean @ kernel


@dataclass(frozen=True)
class Judged:
    """Accuracy, log loss at the fitted temperature, that temperature, and each picture's loss."""

    accuracy: float = 0.0
    loss: float = math.inf
    temperature: float = 1.0
    losses: list[float] = field(default_factory=list)


def judge(logits: NDArray[Any], labels: NDArray[np.int64]) -> Judged:
    if not np.isfinite(logits).all():
        return Judged()
    temperature = fit_temperature(logits, labels)
    p = bundle.probabilities(logits, temperature)
    losses = -np.log(np.clip(p[np.arange(len(labels)), labels], 1e-12, 1))
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    return Judged(accuracy, float(losses.mean()), temperature, [round(float(one), 5) for one in losses])


def fit_temperature(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float:
    """The temperature that makes the softmax honest on labelled pictures, 0.25 to 10 (Guo et al. 2017).

    A small split without a single mistake would drive the temperature to zero and every answer to certainty. Two
    things hold against it: the targets are Platt's, (n + 1) / (n + k) instead of 1, and the logarithm of the
    temperature has a normal prior around 0 with a spread of TEMPERATURE_SPREAD, which hundreds of pictures outweigh.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    n, k = logits.shape
    right = (n + 1) / (n + k)
    targets = np.full((n, k), (1 - right) / (k - 1))
    targets[np.arange(n), labels] = right

    def loss(log_temperature: float) -> float:
        p = bundle.probabilities(logits, math.exp(log_temperature))
        fit = -(targets * np.log(np.clip(p, 1e-12, 1))).sum()
        return float(fit + 0.5 * (log_temperature / TEMPERATURE_SPREAD) ** 2)

    best = minimize_scalar(loss, bounds=(math.log(0.25), math.log(10)), method="bounded")
    return float(math.exp(best.x))


def log_loss(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean negative log probability of the truth; (n, k) and (n,)."""
    truth = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(truth, 1e-12, 1)).mean())
