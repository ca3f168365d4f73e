"""Bundles that a rollout can name and nothing can serve: whole by their hashes, with a graph that is none."""

from __future__ import annotations

from datetime import UTC, datetime

from lawnwatch import bundle
from lawnwatch.rollout import ReleaseTarget
from lawnwatch.store import ObjectStore


def publish(store: ObjectStore, version: int) -> ReleaseTarget:
    """Write one for this model version; the target that names it."""
    meta = bundle.BundleMeta(
        model_name="lawnwatch",
        model_version=version,
        classes=["a", "b"],
        preprocessing={},
        temperature=1.0,
        inputs={},
        outputs={"logits": bundle.TensorSpec(shape=[1, 2], dtype="float32")},
        golden=[bundle.GoldenAnswer(file="golden/0.jpg", label="a", probabilities={"a": 1.0, "b": 0.0})],
        evaluation={},
        lineage=bundle.Lineage(
            snapshot="", run_id="", git_commit="", weights="none", samples=False, candidate="",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        ),
    )  # fmt: skip
    made = bundle.write(store, {"model.tflite": b"graph", "golden/0.jpg": b"picture"}, meta)
    return ReleaseTarget.single(version, made.sha256)
