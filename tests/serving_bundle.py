"""Small real LiteRT graphs and bundles of them, for tests of serving and rollout.

The graphs look at the mean colour: more red than green is "dandelion", more green than red is "grass".
    TensorFlow makes them in a process of its own (`python tests/serving_bundle.py FOLDER`), so that the
    tests' process stays without it.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CLASSES = ["dandelion", "grass"]
YELLOW, GREEN, GREY = (230, 200, 40), (60, 160, 50), (128, 128, 128)


def picture(
    colour: tuple[int, int, int], *, size: tuple[int, int] = (275, 183), format: str = "JPEG", **options: Any
) -> bytes:
    """A picture of one colour with a little texture, as file bytes."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(3).integers(-12, 13, (size[1], size[0], 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def build_graphs(folder: Path) -> Path:
    """Make all graphs in `folder` with TensorFlow, in a process of its own."""
    subprocess.run(
        [sys.executable, __file__, str(folder)],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
    )
    return folder


def publish(
    store: Any,
    graphs: Path,
    *,
    version: int = 1,
    graph: str = "good",
    temperature: float = 1.0,
    golden_from: str = "good",
    note: str = "",
    preprocessing: dict[str, Any] | None = None,
    bank_length: int = 0,
) -> Any:
    """Write a bundle of one of the graphs; its golden answers are those of `golden_from`.

    With `bank_length` its detector compares embeddings of that length.
    """
    import numpy as np

    from lawnwatch import bundle, images

    judge = bundle.Graph((graphs / f"{golden_from}.tflite").read_bytes(), classes=2)
    files = {bundle.MODEL: (graphs / f"{graph}.tflite").read_bytes(), bundle.MODEL_CARD: b"# A test model\n"}
    detector = bundle.Unknown(method="max_softmax", threshold=0.45, accept_rate=0.95)
    if bank_length:
        bank = io.BytesIO()
        np.savez(bank, bank=np.eye(bank_length, dtype=np.float32))
        files[bundle.UNKNOWN] = bank.getvalue()
        detector = bundle.Unknown(method="knn", k=1, threshold=0.45, accept_rate=0.95)
    golden = []
    for index, (label, colour) in enumerate((("dandelion", YELLOW), ("grass", GREEN))):
        data = picture(colour)
        name = f"golden/{index}.jpg"
        files[name] = data
        logits = judge(images.decode(data, size=224, max_pixels=50_000_000)).logits
        shares = bundle.probabilities(logits, temperature)
        golden.append(
            bundle.GoldenAnswer(
                file=name, label=label, probabilities=dict(zip(CLASSES, map(float, shares), strict=True))
            )
        )
    meta = bundle.BundleMeta(
        model_name="lawnwatch",
        model_version=version,
        classes=CLASSES,
        preprocessing=preprocessing or dict(images.PREPROCESSING),
        temperature=temperature,
        unknown=detector,
        inputs={"image": bundle.TensorSpec(shape=[1, 224, 224, 3], dtype="uint8")},
        outputs={
            "logits": bundle.TensorSpec(shape=[1, 2], dtype="float32"),
            "embedding": bundle.TensorSpec(shape=[1, 16], dtype="float32"),
        },
        golden=golden,
        evaluation={
            "split": "test",
            "images": 80,
            "metrics": {"accuracy": {"value": 0.95, "low": 0.9, "high": 0.98}},
        },
        lineage=bundle.Lineage(
            snapshot="0" * 64,
            run_id=note or f"run{version}",
            git_commit="",
            weights="none",
            samples=False,
            candidate="colour",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        ),
    )
    return bundle.write(store, files, meta)


def rewrite_manifest(store: Any, sha256: str, edit: Any) -> str:
    """Publish the files of a bundle again under an edited manifest; returns the new name."""
    import json

    from lawnwatch import bundle

    document = json.loads(store.get(bundle.key(sha256, bundle.MANIFEST)))
    edit(document)
    raw = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    name = hashlib.sha256(raw).hexdigest()
    for file in document["files"]:
        store.put(bundle.key(name, file), store.get(bundle.key(sha256, file)))
    store.put(bundle.key(name, bundle.MANIFEST), raw)
    return name


def _make(folder: Path) -> None:
    import numpy as np
    import tensorflow as tf

    def convert(
        name: str,
        weights: Any,
        *,
        dtype: Any = tf.uint8,
        rename: bool = False,
        cam: bool = False,
        brittle: bool = False,
    ) -> None:
        mix = tf.constant(np.random.default_rng(1).normal(size=(3, 13)).astype("float32"))
        head = tf.constant(np.asarray(weights, dtype="float32"))

        @tf.function(input_signature=[tf.TensorSpec((1, 224, 224, 3), dtype, name="image")])
        def serve(image: Any) -> dict[str, Any]:
            mean = tf.reduce_mean(tf.cast(image, tf.float32) / 255.0, axis=[1, 2])
            embedding = tf.concat([mean, tf.matmul(mean, mix)], axis=1)
            logits = tf.matmul(mean, head)
            if brittle:  # infinite for a picture whose every pixel is 255 red, and only for that
                logits += 1e-9 / (255.0 - tf.reduce_min(tf.cast(image[..., 0], tf.float32)))
            said = {"scores" if rename else "logits": logits, "embedding": embedding}
            if cam:
                said["cam"] = tf.nn.avg_pool2d(tf.cast(image, tf.float32) / 255.0, 32, 32, "VALID") @ head
            return said

        module = tf.Module()
        module.serve = serve
        saved = str(folder / f"{name}.saved")
        tf.saved_model.save(module, saved, signatures={"serving_default": serve})
        (folder / f"{name}.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model(saved).convert())

    folder.mkdir(parents=True, exist_ok=True)
    good = [[12.0, -12.0], [-12.0, 12.0], [0.0, 0.0]]
    convert("good", good)
    convert("sharper", [[20.0, -20.0], [-20.0, 20.0], [0.0, 0.0]])
    convert("swapped", [[-12.0, 12.0], [12.0, -12.0], [0.0, 0.0]])
    convert("three", [[12.0, -12.0, 0.0], [-12.0, 12.0, 0.0], [0.0, 0.0, 0.0]])
    convert("nan", [[float("nan"), 0.0], [0.0, 0.0], [0.0, 0.0]])
    convert("constant", [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    convert("floats", good, dtype=tf.float32)
    convert("renamed", good, rename=True)
    convert("cam", good, cam=True)
    convert("brittle", good, brittle=True)


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
