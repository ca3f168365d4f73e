"""Bundles prove themselves: whatever is altered, missing or not allowed is refused with the reason."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lawnwatch import bundle
from lawnwatch.config import Settings
from lawnwatch.errors import IntegrityError, NotFound, Unavailable
from lawnwatch.store import ObjectStore, open_store

pytestmark = pytest.mark.unit

FILES = {"model.tflite": b"graph" * 100, "golden/0.jpg": b"picture", "model_card.md": b"# card"}


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(Settings(home=tmp_path))


def meta(**changes: Any) -> bundle.BundleMeta:
    values: dict[str, Any] = {
        "model_name": "lawnwatch",
        "model_version": 3,
        "classes": ["dandelion", "grass"],
        "preprocessing": {"size": 224},
        "temperature": 1.5,
        "inputs": {"image": {"shape": [1, 224, 224, 3], "dtype": "uint8"}},
        "outputs": {"logits": {"shape": [1, 2], "dtype": "float32"}},
        "golden": [{"file": "golden/0.jpg", "label": "grass", "probabilities": {"dandelion": 0.25, "grass": 0.75}}],
        "evaluation": {"metrics": {"accuracy": {"value": 0.97, "low": 0.9, "high": 0.99}}},
        "lineage": {
            "snapshot": "a" * 64,
            "run_id": "r",
            "git_commit": "c",
            "weights": "imagenet",
            "samples": False,
            "candidate": "linear_probe",
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        },
    }
    return bundle.BundleMeta.model_validate(values | changes)


def folder(settings_home: Path, sha256: str) -> Path:
    return settings_home / "store" / "bundles" / sha256


def test_writing_again_gives_the_same_bundle(store: ObjectStore) -> None:
    first, second = bundle.write(store, FILES, meta()), bundle.write(store, FILES, meta())
    assert first.sha256 == second.sha256 == bundle.read(store, first.sha256).sha256
    assert bundle.write(store, FILES, meta(temperature=1.6)).sha256 != first.sha256


def test_reading_gives_back_every_byte_from_memory_and_from_the_cache(store: ObjectStore, tmp_path: Path) -> None:
    sha256 = bundle.write(store, FILES, meta()).sha256
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        found = bundle.read(store, sha256, cache)
        assert {name: found.bytes_of(name) for name in found.files} == FILES
        assert found.manifest.temperature == 1.5
    with pytest.raises(NotFound, match="no file"):
        found.bytes_of("other.json")


def test_the_cache_serves_while_the_store_is_down_and_heals_when_it_rots(store: ObjectStore, tmp_path: Path) -> None:
    sha256 = bundle.write(store, FILES, meta()).sha256
    cache = tmp_path / "cache"
    bundle.read(store, sha256, cache)

    class Down:
        def get(self, key: str) -> bytes:
            raise Unavailable(f"down: {key}")

    assert bundle.read(Down(), sha256, cache).bytes_of("model_card.md") == b"# card"  # type: ignore[arg-type]
    (cache / sha256 / "model.tflite").write_bytes(b"rotten")
    with pytest.raises(Unavailable):
        bundle.read(Down(), sha256, cache)  # type: ignore[arg-type]
    assert bundle.read(store, sha256, cache).bytes_of("model.tflite") == FILES["model.tflite"]


def test_35_a_bundle_that_cannot_be_kept_is_used_from_memory(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = bundle.write(store, FILES, meta()).sha256
    (tmp_path / "a file").touch()
    found = bundle.read(store, sha256, tmp_path / "a file" / "cache")
    assert {name: found.bytes_of(name) for name in found.files} == FILES

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert bundle.read(store, sha256, tmp_path / "cache").bytes_of("model.tflite") == FILES["model.tflite"]
    assert list((tmp_path / "cache").iterdir()) == [], "half of a copy was left"


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "swap"])
def test_36_every_file_of_a_bundle_is_verified(store: ObjectStore, tmp_path: Path, name: str, harm: str) -> None:
    sha256 = bundle.write(store, FILES, meta()).sha256
    other = bundle.write(store, {**FILES, "model.tflite": b"another"}, meta(temperature=2)).sha256
    file = folder(tmp_path, sha256) / name
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    elif harm == "truncate":
        file.write_bytes(bytes(data[:-1]))
    elif harm == "remove":
        file.unlink()
    else:
        file.write_bytes(b"something else" if name in FILES else (folder(tmp_path, other) / name).read_bytes())
    expected = NotFound if (name, harm) == ("manifest.json", "remove") else IntegrityError
    with pytest.raises(expected):
        bundle.read(store, sha256)


def publish_raw(store: ObjectStore, change: Callable[[dict[str, Any]], object]) -> str:
    """A bundle whose manifest somebody wrote by hand: hashes right, content wrong."""
    made = bundle.write(store, FILES, meta())
    document = json.loads(made.manifest.to_bytes())
    change(document)
    raw = json.dumps(document).encode()
    sha256 = hashlib.sha256(raw).hexdigest()
    for name in set(document["files"]) & set(FILES):
        store.put(bundle.key(sha256, name), FILES[name])
    store.put(bundle.key(sha256, "manifest.json"), raw)
    return sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["classes"].append("moss"),
        lambda m: m.update(classes=["grass", "grass"]),
        lambda m: m["outputs"]["logits"].update(shape=[1, 3]),
        lambda m: m.update(temperature=0),
        lambda m: m.update(temperature="NaN"),
        lambda m: m.update(schema_version=3),
        lambda m: m.update(variants={"int8": {"file": "model.tflite", "arithmetic": "int8"}}, served="float32"),
        lambda m: m.update(variants={"int8": {"file": "model.tflite", "arithmetic": "int4"}}, served="int8"),
        lambda m: m.update(
            variants={
                "int8": {"file": "model.tflite", "arithmetic": "int8"},
                "float32": {"file": "gone.tflite", "arithmetic": "float32"},
            },
            served="int8",
        ),
        lambda m: m.update(runtime="pickle"),
        lambda m: m.update(run="import os"),
        lambda m: m["golden"][0].update(file="golden/9.jpg"),
        lambda m: m["golden"][0].update(label="moss"),
        lambda m: m.update(golden=[]),
        lambda m: m["files"].pop("model.tflite"),
        lambda m: m["files"].update({"code.pkl": {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}}),
        lambda m: m["files"].update({"../../x.json": {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}}),
        lambda m: m.update(unknown={"method": "knn", "threshold": 0.5, "accept_rate": 0.99}),
    ],
)
def test_37_a_manifest_that_contradicts_itself_is_refused(
    store: ObjectStore, change: Callable[[dict[str, Any]], object]
) -> None:
    sha256 = publish_raw(store, change)
    with pytest.raises(IntegrityError, match="cannot be read"):
        bundle.read(store, sha256)


@pytest.mark.parametrize("name", ["code.py", "model.pkl", "model.keras", "/etc/x.json", "../x.json", "lib.so"])
def test_40_a_bundle_holds_no_code(store: ObjectStore, name: str) -> None:
    with pytest.raises(IntegrityError, match="may hold"):
        bundle.write(store, {**FILES, name: b"x"}, meta())


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.sentinel, "executed")


def test_40_a_pickle_among_the_arrays_is_refused_and_not_run(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, bank=np.array([Harmful(tmp_path / "sentinel")], dtype=object), allow_pickle=True)
    spec = bundle.Unknown(method="knn", threshold=0.5, accept_rate=0.9)
    with pytest.raises(IntegrityError, match=bundle.UNKNOWN):
        bundle.UnknownDetector.load(spec, 1.0, buffer.getvalue())
    assert not (tmp_path / "sentinel").exists()


def test_a_name_that_is_no_hash_is_not_found(store: ObjectStore) -> None:
    for name in ("latest", "../" * 10, "A" * 64, ""):
        with pytest.raises(NotFound):
            bundle.read(store, name)


@pytest.mark.parametrize(
    ("answer", "ok"),
    [
        ({"dandelion": 0.25, "grass": 0.75}, True),
        ({"dandelion": 0.255, "grass": 0.745}, True),
        ({"dandelion": 0.27, "grass": 0.73}, False),
        ({"dandelion": 0.75, "grass": 0.25}, False),  # classes swapped
        ({"dandelion": float("nan"), "grass": 0.75}, False),
        ({"grass": 0.75}, False),
    ],
)
def test_golden_answers_tell_another_model(store: ObjectStore, answer: dict[str, float], ok: bool) -> None:
    report = bundle.check_golden(bundle.write(store, FILES, meta()), lambda data: answer)
    assert report.ok is ok
    assert report.images == 1


def test_probabilities_sum_to_one_and_temperature_softens() -> None:
    logits = np.array([[1000.0, 0.0], [2.0, 1.0]], np.float32)
    hot, cold = bundle.probabilities(logits, 4.0), bundle.probabilities(logits, 0.5)
    np.testing.assert_allclose(hot.sum(axis=1), 1)
    assert np.isfinite(hot).all()
    assert hot[1, 0] < cold[1, 0]


def test_a_bundle_of_schema_1_stays_readable_and_keeps_its_name(store: ObjectStore, tmp_path: Path) -> None:
    def older(document: dict[str, Any]) -> None:
        document["schema_version"] = 1
        del document["variants"], document["served"]

    made = bundle.write(store, FILES, meta())
    document = json.loads(made.manifest.to_bytes())
    older(document)
    raw = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    sha256 = hashlib.sha256(raw).hexdigest()
    for name, data in (*FILES.items(), ("manifest.json", raw)):
        store.put(bundle.key(sha256, name), data)
    for _ in range(2):  # from the store, then from the cache
        found = bundle.read(store, sha256, tmp_path / "cache")
        assert (found.manifest.schema_version, found.manifest.variants) == (1, {})
        assert found.manifest.to_bytes() == raw


STATISTICS: dict[str, Any] = {
    "bank": np.eye(4)[:2],
    "means": np.eye(4)[:2],
    "axes": np.eye(4)[2:3],
    "variances": np.array([0.5]),
    "rest": np.array(0.1),
    "weight": np.array([-1.0, -1.0, 1.0, 1.0]),
    "bias": np.array(0.0),
    "centre": np.zeros(2),
    "scale": np.ones(2),
}


@pytest.mark.parametrize(
    "method", ["max_softmax", "energy", "knn", "mahalanobis", "background", "mahalanobis_background"]
)
def test_the_unknown_score_is_higher_for_the_stranger(method: Any) -> None:
    spec = bundle.Unknown(method=method, threshold=0.5, accept_rate=0.99, k=1)
    buffer = io.BytesIO()
    np.savez(buffer, **{name: STATISTICS[name] for name in bundle.STATISTICS.get(method, {})})
    detector = bundle.UnknownDetector.load(spec, 1.0, buffer.getvalue() if method in bundle.STATISTICS else None)
    near = bundle.Outputs(np.array([9.0, 0.0], np.float32), np.array([5.0, 0.1, 0, 0], np.float32), None)
    far = bundle.Outputs(np.array([0.1, 0.0], np.float32), np.array([0, 0, 3.0, 3.0], np.float32), None)
    assert detector.score(near) < detector.score(far)


def test_the_mahalanobis_score_is_the_distance_under_the_stored_covariance() -> None:
    """Against the covariance written out: its axis has its own variance, every other direction that of the rest."""
    covariance = np.diag([0.1, 0.1, 0.5, 0.1])
    spec = bundle.Unknown(method="mahalanobis", threshold=1, accept_rate=0.9, k=1)
    detector = bundle.UnknownDetector(spec, 1.0, STATISTICS)
    x = np.random.default_rng(0).random((5, 4))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    away = unit[:, np.newaxis] - STATISTICS["means"]
    expected = np.einsum("nci,ij,ncj->nc", away, np.linalg.inv(covariance), away).min(axis=1)
    np.testing.assert_allclose(detector.scores(np.zeros((5, 2)), x.astype(np.float32)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("means", None, "means"),
        ("weight", np.array([1.0, np.nan, 0, 0]), "weight"),
        ("weight", np.ones(3), "different lengths"),
        ("variances", np.array([-1.0]), "positive variance"),
        ("scale", np.array([1.0, 0.0]), "positive scale"),
    ],
)
def test_37_statistics_that_cannot_be_meant_are_refused(name: str, value: Any, words: str) -> None:
    spec = bundle.Unknown(method="mahalanobis_background", threshold=1, accept_rate=0.97, k=1)
    with pytest.raises(IntegrityError, match=words):
        bundle.UnknownDetector(spec, 1.0, STATISTICS | {name: value})
    with pytest.raises(IntegrityError, match="cannot be read"):
        bundle.UnknownDetector.load(spec, 1.0, b"PK no archive")


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(IntegrityError, match="LiteRT"):
        bundle.Graph(b"not a flatbuffer at all" * 20, classes=2)
