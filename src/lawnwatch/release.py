"""From a promoted model version to a published bundle. Publishing again changes nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lawnwatch import bundle, evaluation_report, images, model, registry
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, IntegrityError, NotFound
from lawnwatch.store import ObjectStore
from lawnwatch.train.export import SMALL

GOLDEN_PER_CLASS = 2
# Of a golden probability. On other kernels of one processor, LiteRT's own in place of XNNPACK's, a float32 graph was
# seen to move one by less than 0.001, an int8 graph by up to 0.034: a server that has only those refuses the bundle.
TOLERANCE = 0.01
PHONE = (1280, 960)  # pixels of the golden picture that has to be shrunk
GRAIN = 4  # of these pixels: a JPEG is decoded at a quarter of this size, each of whose pixels is then a grain
GRAIN_LEVELS = 30  # standard deviation, of 255
PHONE_TRIED = 12  # pictures, the least sure, of which one becomes it

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Release:
    """A published bundle.

    Attributes:
        version: the model version in it.
        sha256: the bundle's name.
        created: False when it had been published before.
    """

    version: int
    sha256: str
    bytes: int
    created: bool
    message: str


def publish(
    settings: Settings, catalog: Catalog, store: ObjectStore, version: str | int = "champion", *, progress: Progress
) -> Release:
    """Build the bundle of a promoted version, put it into the store and tag the version with its hash.

    Raises:
        NotFound: no such version. DataError: its verdict is not `promote`.
        IntegrityError: the run's files are altered, or the graph does not reproduce itself. Unavailable.
    """
    info = registry.show(settings, catalog, version)
    if info.decision != "promote":
        raise DataError(
            f"version {info.version} is not released; its verdict is {info.decision}: {info.reason}",
            hint="Only a promoted version is published.",
        )
    if info.bundle_sha256:
        try:
            found = bundle.read(store, info.bundle_sha256)
        except (NotFound, IntegrityError) as error:
            progress(f"The published bundle is not intact ({error.message}); publishing it again.")
        else:
            return _release(found, created=False)
    progress(f"Building the bundle of version {info.version}.")
    built = _build(settings, catalog, store, info)
    registry.tag_version(settings, info.version, "bundle_sha256", built.sha256)
    return _release(built, created=True)


def find(settings: Settings, catalog: Catalog, store: ObjectStore, version: str | int = "champion") -> Release:
    """The published bundle of a version, verified.

    Raises:
        NotFound: no such version, or it was not released. IntegrityError. Unavailable.
    """
    info = registry.show(settings, catalog, version)
    if not info.bundle_sha256:
        raise NotFound(
            f"version {info.version} has not been released.", hint=f"Run `lawnwatch release --version {info.version}`."
        )
    return _release(bundle.read(store, info.bundle_sha256, settings.home / "cache" / "bundles"), created=False)


def _release(found: bundle.Bundle, *, created: bool) -> Release:
    size = sum(entry.bytes for entry in found.manifest.files.values())
    version = found.manifest.model_version
    done = "Published" if created else "Already published:"
    return Release(
        version=version,
        sha256=found.sha256,
        bytes=size,
        created=created,
        message=f"{done} version {version} as bundle {found.sha256[:12]} ({size / 1e6:.1f} MB).",
    )


def _build(settings: Settings, catalog: Catalog, store: ObjectStore, info: registry.VersionInfo) -> bundle.Bundle:
    trained = registry.artifacts(settings, info.run_id, "model")
    judged = registry.artifacts(settings, info.run_id, "evaluation")
    facts: dict[str, Any] = json.loads((trained / "model.json").read_text())
    evaluation: dict[str, Any] = json.loads((judged / bundle.EVALUATION).read_text())
    answers: dict[str, list[dict[str, Any]]] = json.loads((judged / "predictions.json").read_text())
    if facts["preprocessing"] != images.PREPROCESSING:
        raise IntegrityError(
            f"version {info.version} was trained with another preprocessing than this release's.",
            hint="Train again with this release of lawnwatch.",
        )
    classes, temperature = facts["classes"], evaluation["temperature"]
    # The recorded verdict may be a later one, against another champion; the promotion rested on this.
    evaluation["verdict"] = {"decision": info.decision, "reason": info.reason}
    # A bundle is public, its evaluation is what `/model/info` tells everybody: where pictures come from is not.
    evaluation["slices"] = [part for part in evaluation["slices"] if part["division"] != bundle.HOST_SLICES]

    variants = {name: bundle.Variant.model_validate(one) for name, one in facts["variants"].items()}
    files = {one.file: (trained / one.file).read_bytes() for one in variants.values()}
    graph = bundle.Graph(files[bundle.MODEL], classes=len(classes))
    max_pixels = settings.images.max_pixels

    def ask(picture: images.Rgb) -> NDArray[np.float64]:
        return bundle.probabilities(graph(picture).logits, temperature)

    chosen = [
        (f"golden/{i}{Path(answer['object_key']).suffix}", store.get(answer["object_key"]), answer["label"])
        for i, answer in enumerate(golden_rows(answers["validation"], classes))
    ]
    if max_pixels >= PHONE[0] * PHONE[1]:
        unsure = sorted(answers["validation"], key=_surest_first)[-PHONE_TRIED:]
        sent = [as_a_phone_sends_it(store.get(answer["object_key"]), max_pixels=max_pixels) for answer in unsure]
        best = most_telling(sent, ask, size=graph.size)
        chosen.append(("golden/phone.jpg", sent[best], unsure[best]["label"]))
    golden = []
    for name, data, label in chosen:
        files[name] = data
        p = ask(images.decode(data, size=graph.size, max_pixels=max_pixels)).tolist()
        golden.append(bundle.GoldenAnswer(file=name, label=label, probabilities=dict(zip(classes, p, strict=True))))
    for name in (bundle.SKETCH, bundle.UNKNOWN):
        files[name] = (judged / name).read_bytes()
    files[bundle.EVALUATION] = json.dumps(evaluation, indent=1, sort_keys=True).encode()
    files[bundle.MODEL_CARD] = model_card(settings.model_name, info, facts, evaluation).encode()
    meta = bundle.BundleMeta(
        model_name=settings.model_name,
        model_version=info.version,
        classes=classes,
        preprocessing=facts["preprocessing"],
        temperature=temperature,
        unknown=bundle.Unknown(**evaluation["unknown"]),
        variants=variants,
        served=facts["served"],
        inputs={name: bundle.TensorSpec(**spec) for name, spec in facts["inputs"].items()},
        outputs={name: bundle.TensorSpec(**spec) for name, spec in facts["outputs"].items()},
        golden=golden,
        tolerance=TOLERANCE,
        evaluation=evaluation,
        lineage=bundle.Lineage(
            snapshot=facts["snapshot"],
            run_id=info.run_id,
            git_commit=facts["git_commit"],
            weights=facts["weights"],
            samples=facts["samples"],
            candidate=facts["candidate"],
            created_at=datetime.fromisoformat(facts["created_at"]),
        ),
    )
    return bundle.write(store, files, meta)


def golden_rows(answers: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Validation pictures whose answers show a wrong resize, channel order or class order.

    Of each class the picture the model is surest of and those it is least sure of: a certain answer shows swapped
    classes, an uncertain one moves with the smallest change of a pixel.
    """
    chosen: list[dict[str, Any]] = []
    for label in classes:
        mine = sorted((answer for answer in answers if answer["label"] == label), key=_surest_first)
        chosen += mine[:1] + mine[1:][-(GOLDEN_PER_CLASS - 1) :]
    return chosen


def _surest_first(answer: dict[str, Any]) -> tuple[float, str]:
    return -max(answer["probabilities"].values()), answer["sha256"]


def as_a_phone_sends_it(data: bytes, *, max_pixels: int) -> bytes:
    """A picture enlarged to a JPEG of 1280 × 960 with grain, lying on its side with an EXIF orientation.

    Pictures found in the web are often smaller than what the graph takes, those from phones never: the grain shows
    whether a server averages pixels when it shrinks them. The same bytes for the same picture.
    """
    width, height = PHONE[0] // GRAIN, PHONE[1] // GRAIN
    rgb = cv2.resize(images.decode(data, size=None, max_pixels=max_pixels), (width, height))
    grain = np.random.default_rng(0).standard_normal((height, width, 1)) * GRAIN_LEVELS
    large = cv2.resize(rgb + grain, PHONE, interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    on_its_side = Image.Exif()
    on_its_side[images.ORIENTATION] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(large))).save(buffer, "JPEG", quality=50, exif=on_its_side)
    return buffer.getvalue()


def most_telling(pictures: Sequence[bytes], ask: Callable[[images.Rgb], NDArray[np.float64]], *, size: int) -> int:
    """Which picture's answer changes most where its pixels are picked and not averaged."""
    changes = []
    for data in pictures:
        whole = images.decode(data, size=None, max_pixels=PHONE[0] * PHONE[1])
        picked = cv2.resize(whole, (size, size), interpolation=cv2.INTER_NEAREST)
        averaged = images.decode(data, size=size, max_pixels=PHONE[0] * PHONE[1])
        changes.append(float(np.abs(ask(picked) - ask(averaged)).max()))
    return int(np.argmax(changes))


def model_card(name: str, info: registry.VersionInfo, facts: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """What the model is, how good, on what, and what it is not for: Markdown."""
    lines = [
        f"# {name} v{info.version}",
        "",
        f"Tells {', '.join(facts['classes'])} apart in photographs. {_served(facts)}",
        "",
    ]
    if facts["samples"]:
        lines += ["**Trained on drawn sample pictures. Its answers on photographs mean nothing.**", ""]
    lines += [
        f"## How good, on {evaluation['images']} test images",
        "",
        "| figure | value | 95 % interval |",
        "|---|---|---|",
    ]
    for figure, one in evaluation["metrics"].items():
        lines.append(f"| {figure} | {one['value']:.3f} | {evaluation_report.likely(one)} |")
    lines += ["", "| class | precision | recall | test images |", "|---|---|---|---|"]
    for label, one in evaluation["per_class"].items():
        precision, recall = (_figure(one[name]["value"]) for name in ("precision", "recall"))
        lines.append(f"| {label} | {precision} | {recall} | {one['support']} |")
    lines += [
        "",
        f"Verdict: {evaluation['verdict']['decision']}. {evaluation['verdict']['reason']}",
        "",
        f"Probabilities are calibrated with temperature {evaluation['temperature']:.2f}, fitted on pictures that the "
        "head had not seen. A picture unlike the training photographs gets a high `unknown_score` "
        f"(threshold {evaluation['unknown']['threshold']:.3f}, {evaluation['unknown']['method']}).",
        *_called_unknown(evaluation),
        "",
        "## Limits",
        "",
        "- It knows the classes above and nothing else. A picture of something else is named `unknown` when it is told "
        "as such, which fails most often for other plants.",
        "- It was measured on pictures from the same sources as it was trained on; other lawns, seasons and cameras "
        "may differ.",
        "- Pictures are stretched to a square: very long ones are distorted.",
        "",
        "## Where it comes from",
        "",
        f"- snapshot `{facts['snapshot']}`",
        f"- MLflow run `{info.run_id}`",
        f"- starting weights: {facts['weights']}",
        f"- code: {facts['git_commit']}",
        f"- trained: {facts['created_at']}",
        "",
    ]
    return "\n".join(lines)


def _served(facts: dict[str, Any]) -> str:
    """Which graph answers: the candidate's own, or the one on smaller pictures, whose head was distilled from it."""
    arithmetic = facts["variants"][facts["served"]]["arithmetic"]
    if facts["served"] == SMALL:
        side, head = model.SMALL_SIZE, f"its head `small_input` distilled from `{facts['candidate']}`"
    else:
        side, head = model.SIZE, f"candidate `{facts['candidate']}`"
    return f"Served is MobileNetV2 at {side} × {side} pixels, {head}, in LiteRT with {arithmetic} arithmetic."


def _called_unknown(evaluation: dict[str, Any]) -> list[str]:
    """How often pictures of the classes are called unknown; nothing where an older release measured."""
    found = evaluation.get("called_unknown", {})
    if "expected" not in found:
        return []
    meant, low, high = 1 - evaluation["unknown"]["accept_rate"], found["expected"]["low"], found["expected"]["high"]
    return [
        "",
        f"Of the test images {found['value']:.1%} are called unknown; {meant:.1%} is meant, of which chance makes "
        f"{low:.1%} to {high:.1%} on so many.",
    ]


def _figure(value: float | None) -> str:
    return "none predicted" if value is None else f"{value:.3f}"
