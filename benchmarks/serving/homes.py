"""A home to serve from, made of a released bundle: its served graph, or its float32 graph under the same answers.

    python benchmarks/serving/homes.py BUNDLE FOLDER [--variant float32]

BUNDLE is a bundle's folder, such as var/store/bundles/<sha256>.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from lawnwatch import bundle, images
from lawnwatch.config import Settings
from lawnwatch.rollout import TARGET_KEY, ReleaseTarget
from lawnwatch.store import open_store


def read_folder(folder: Path) -> tuple[bundle.Manifest, dict[str, bytes]]:
    """A bundle's manifest and files from a plain folder."""
    manifest = bundle.Manifest.model_validate(json.loads((folder / bundle.MANIFEST).read_bytes()))
    return manifest, {name: (folder / name).read_bytes() for name in manifest.files}


def make(source: Path, home: Path, variant: str = "") -> bundle.Bundle:
    """Publish the bundle below `home` and point the release target at it.

    With `variant` that graph is the served one: `model.tflite` and the variant's file change places, and the golden
    answers are that graph's own.
    """
    manifest, files = read_folder(source)
    settings = Settings(home=home)
    meta = {name: getattr(manifest, name) for name in bundle.BundleMeta.model_fields}
    if variant and variant != manifest.served:
        other = manifest.variants[variant].file
        files[bundle.MODEL], files[other] = files[other], files[bundle.MODEL]
        old = manifest.variants[manifest.served]
        meta["variants"] = {
            **manifest.variants,
            variant: manifest.variants[variant].model_copy(update={"file": bundle.MODEL}),
            manifest.served: old.model_copy(update={"file": other}),
        }
        meta["served"] = variant
        graph = bundle.Graph(files[bundle.MODEL], classes=len(manifest.classes))
        meta["inputs"], meta["outputs"] = _described(graph, manifest)
        meta["golden"] = [_answered(graph, manifest, answer, files[answer.file]) for answer in manifest.golden]
    store = open_store(settings)
    published = bundle.write(store, files, bundle.BundleMeta(**meta))
    store.put(TARGET_KEY, ReleaseTarget.single(manifest.model_version, published.sha256).to_bytes())
    return published


def _described(
    graph: bundle.Graph, manifest: bundle.Manifest
) -> tuple[dict[str, bundle.TensorSpec], dict[str, bundle.TensorSpec]]:
    """The manifest's tensors with this graph's sizes: a variant may look at larger pictures."""
    shapes = {"image": [1, graph.size, graph.size, 3]}
    cam = graph(np.zeros((graph.size, graph.size, 3), np.uint8)).cam
    if cam is not None:
        shapes["cam"] = [1, *cam.shape]

    def resized(specs: dict[str, bundle.TensorSpec]) -> dict[str, bundle.TensorSpec]:
        return {
            name: spec.model_copy(update={"shape": shapes.get(name, spec.shape)})
            for name, spec in specs.items()
            if name != "cam" or cam is not None
        }

    return resized(manifest.inputs), resized(manifest.outputs)


def _answered(
    graph: bundle.Graph, manifest: bundle.Manifest, answer: bundle.GoldenAnswer, data: bytes
) -> bundle.GoldenAnswer:
    logits = graph(images.decode(data, size=graph.size, max_pixels=50_000_000)).logits
    shares = bundle.probabilities(logits, manifest.temperature)
    return answer.model_copy(update={"probabilities": dict(zip(manifest.classes, map(float, shares), strict=True))})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", default="")
    given = parser.parse_args()
    print(make(given.bundle, given.folder, given.variant).sha256)
