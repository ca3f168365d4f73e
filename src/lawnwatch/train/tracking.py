"""A training as MLflow shows it: one run with a nested run a candidate, complete or marked as not."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lawnwatch import bundle, dataset, model, registry
from lawnwatch.config import Settings
from lawnwatch.errors import NotFound
from lawnwatch.train.candidates import Candidate
from lawnwatch.train.export import CALIBRATION, git_commit
from lawnwatch.train.features import RECIPE, VIEWS


def record(
    settings: Settings,
    experiment: str,
    snapshot: dataset.Snapshot,
    fingerprint: str,
    work: Path,
    candidates: list[Candidate],
    best: Candidate,
    reason: str,
    force: bool,
) -> str:
    """One MLflow run with a nested run a candidate. The tag `lawnwatch.complete` is written last."""
    # MLflow's advice to programmers would stand, in colours, between the lines that a person reads.
    with registry.tracking(settings) as client, warnings.catch_warnings(record=True):
        half = work / "run_id"
        if half.exists():  # logged in part before MLflow went away
            with suppress(NotFound):
                _discard(client, experiment, half.read_text())
        tags = {
            "lawnwatch.fingerprint": fingerprint,
            "lawnwatch.snapshot": snapshot.id,
            "lawnwatch.candidate": best.name,
            "lawnwatch.candidates": json.dumps([summary(candidate) for candidate in candidates]),
            "lawnwatch.samples": str(snapshot.samples).lower(),
            "lawnwatch.reason": reason or ("forced" if force else ""),
            "mlflow.source.git.commit": git_commit(settings),
            "mlflow.note.content": _note(snapshot, candidates, best),
        }
        run = client.create_run(experiment, run_name=f"train {snapshot.id[:8]}", tags=tags)
        run_id = str(run.info.run_id)
        half.write_text(run_id)
        _log_inputs(settings, client, run_id, snapshot)
        read = settings.train.model_dump(mode="json")
        params: dict[str, Any] = {f"train.{name}": json.dumps(value) for name, value in read.items()}
        params |= {"views": VIEWS, "recipe": RECIPE, "classes": ",".join(snapshot.classes), "best": best.name}
        params |= {f"images.{split}": len(snapshot.split(split)) for split in ("train", "validation", "test")}
        _log_batch(client, run_id, params, {"val_accuracy": [best.val_accuracy], "val_log_loss": [best.val_log_loss]})
        client.log_dict(run_id, [asdict(candidate) for candidate in candidates], "candidates.json")
        client.log_dict(run_id, environment(), "environment.json")
        for name, figure in _plots(candidates).items():
            client.log_figure(run_id, figure, f"plots/{name}.png")
        client.log_artifacts(run_id, str(work / "model"), "model")
        client.log_artifacts(run_id, str(_mlflow_model(settings, snapshot, work)), "mlflow_model")
        calibration = json.loads((work / "model" / CALIBRATION).read_text())
        figures = {f"cv_{name}": [calibration[name]] for name in ("accuracy", "log_loss", "ece", "temperature")}
        figures |= {f"unknown_auroc_{one['method']}": [one["auroc"]] for one in calibration["unknown_comparison"]}
        facts = json.loads((work / "model" / "model.json").read_text())
        for name, variant in facts["variants"].items():
            if name != "float32":
                compared = ("accuracy_change", "changed_answers", "speedup")
                figures |= {f"{name}_{figure}": [variant[figure]] for figure in compared}
        _log_batch(client, run_id, {}, figures)
        client.log_figure(run_id, _unknown_plot(calibration["unknown_comparison"]), "plots/unknown.png")
        for candidate in candidates:
            child = client.create_run(experiment, run_name=candidate.name, tags={"mlflow.parentRunId": run_id})
            figures = {"val_accuracy": [candidate.val_accuracy], "val_log_loss": [candidate.val_log_loss]}
            figures |= {"temperature": [candidate.temperature], "seconds": [candidate.seconds]}
            curves = {f"epoch_{name}": values for name, values in candidate.curves.items()}
            _log_batch(client, child.info.run_id, candidate.params, figures | curves)
            client.set_terminated(child.info.run_id)
        client.set_terminated(run_id)
        client.set_tag(run_id, "lawnwatch.complete", "true")
    return run_id


def summary(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "servable": candidate.servable,
        "val_accuracy": round(candidate.val_accuracy, 4),
        "val_log_loss": round(candidate.val_log_loss, 4) if math.isfinite(candidate.val_log_loss) else None,
        "seconds": round(candidate.seconds, 1),
        "note": candidate.note,
    }


def _discard(client: Any, experiment: str, run_id: str) -> None:
    for child in client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'"):
        client.delete_run(child.info.run_id)
    client.delete_run(run_id)


def _log_batch(client: Any, run_id: str, params: dict[str, Any], metrics: dict[str, list[float]]) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    points = [
        Metric(name, value, now, step)
        for name, values in metrics.items()
        for step, value in enumerate(values, 1)
        if math.isfinite(value)
    ]
    client.log_batch(run_id, metrics=points[:1000], params=[Param(k, str(v)) for k, v in params.items()])


def _log_inputs(settings: Settings, client: Any, run_id: str, snapshot: dataset.Snapshot) -> None:
    """The snapshot as the run page shows it: where its manifest lies, its hash, its columns and counts."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.types import ColSpec, Schema

    counts = {split: len(snapshot.split(split)) for split in ("train", "validation", "test")}
    profile = {"num_rows": len(snapshot.rows), "snapshot": snapshot.id, "classes": snapshot.classes, "splits": counts}
    manifest = MetaDataset(
        resolve_dataset_source(f"{settings.store_url.rstrip('/')}/snapshots/{snapshot.id}/manifest.parquet"),
        name="lawnwatch-snapshot",
        digest=snapshot.id[:36],  # MLflow keeps no more of it; the whole is in the profile
        schema=Schema([ColSpec("string", "sha256"), ColSpec("string", "label"), ColSpec("string", "split")]),
    )
    data = Dataset(**(manifest.to_dict() | {"profile": json.dumps(profile)}))
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def _mlflow_model(settings: Settings, snapshot: dataset.Snapshot, work: Path) -> Path:
    """The served graph as an MLflow model with signature and input example, for `mlflow.pyfunc.load_model`."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    home, place = work / "model", work / "mlflow_model"
    shutil.rmtree(place, ignore_errors=True)
    versions = environment()
    mlflow.pyfunc.save_model(
        place,
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={"graph": str(home / bundle.MODEL), "calibration": str(home / CALIBRATION)},
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, model.SIZE, model.SIZE, 3))]),
            Schema([TensorSpec(np.dtype(np.float64), (-1, len(snapshot.classes)))]),
        ),
        input_example=np.zeros((1, model.SIZE, model.SIZE, 3), np.uint8),
        pip_requirements=[f"{name}=={versions[name]}" for name in ("ai-edge-litert", "mlflow", "numpy")],
        metadata={"classes": snapshot.classes, "snapshot": snapshot.id},
    )
    return place


def _note(snapshot: dataset.Snapshot, candidates: list[Candidate], best: Candidate) -> str:
    lines = [
        f"Trained on snapshot `{snapshot.id}`: {len(snapshot.split('train'))} training and "
        f"{len(snapshot.split('validation'))} validation images of {', '.join(snapshot.classes)}.",
        "" if not snapshot.samples else "\n**Trained on drawn sample pictures, not on photographs.**",
        "\n| candidate | validation accuracy | validation log loss | note |\n|---|---|---|---|",
    ]
    for one in candidates:
        mark = "**" if one.name == best.name else ""
        lines.append(f"| {mark}{one.name}{mark} | {one.val_accuracy:.1%} | {one.val_log_loss:.3f} | {one.note} |")
    return "\n".join(lines)


def environment() -> dict[str, str]:
    names = (
        "tensorflow",
        "keras",
        "scikit-learn",
        "numpy",
        "mlflow",
        "opencv-python-headless",
        "pillow",
        "ai-edge-litert",
    )
    return {name: metadata.version(name) for name in names}


def _plots(candidates: list[Candidate]) -> dict[str, Any]:
    from matplotlib.figure import Figure

    comparison = Figure(figsize=(6, 3.5), layout="constrained")
    axes = comparison.subplots()
    axes.barh([c.name for c in candidates], [c.val_accuracy for c in candidates], color="#5a9")
    axes.set(xlim=(0, 1), xlabel="validation accuracy", title="Candidates")
    plots = {"candidates": comparison}
    for candidate in candidates:
        if candidate.sweep:
            figure = Figure(figsize=(6, 3.5), layout="constrained")
            axes = figure.subplots()
            losses = [trial["log_loss"] for trial in candidate.sweep]
            axes.plot(range(1, len(losses) + 1), losses, "o", label="trial")
            axes.plot(range(1, len(losses) + 1), np.minimum.accumulate(losses), label="best so far")
            axes.set(xlabel="trial", ylabel="log loss", title=f"Sweep of {candidate.name}")
            axes.legend()
            plots[f"sweep_{candidate.name}"] = figure
        if "val_log_loss" in candidate.curves:
            figure = Figure(figsize=(6, 3.5), layout="constrained")
            axes = figure.subplots()
            for name in ("loss", "val_log_loss"):
                values = candidate.curves[name]
                axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
            axes.set(xlabel="epoch", title=candidate.name)
            axes.legend()
            plots[f"curves_{candidate.name}"] = figure
    return plots


def _unknown_plot(comparison: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    names, y = [one["method"] + (" (kept)" if one["chosen"] else "") for one in comparison], np.arange(len(comparison))
    for shift, kind, color in ((-0.2, "photographs", "#395"), (0.2, "drawings", "#9bc")):
        axes.barh(y + shift, [one[kind] for one in comparison], height=0.38, color=color, label=kind)
    axes.set(xlim=(0.4, 1), xlabel="AUROC against kinds not seen before", title="Telling what is no class")
    axes.set_yticks(y, names)
    axes.legend(loc="lower left")
    return figure
