"""The model bundle: all that serving needs, in files that prove themselves.

A bundle is a set of files below `bundles/<sha256>/` in the object store. `manifest.json` names each file
with its SHA-256 and is written last; the bundle's own name is the SHA-256 of that manifest, so a bundle that
was swapped, truncated or edited no longer has its name. It holds data only: a LiteRT graph, arrays (never
pickled), pictures, JSON and Markdown. There is no code in a bundle; nothing in it runs but the graph.

`model.tflite` is the graph that is served. Others of the same model (float32 beside int8) lie beside it; `variants`
says what each is, how it was judged and which of them is served.

The graph's signature `serving_default` takes `image` (1, size, size, 3) uint8 RGB as `images.decode` makes
it, and returns, by name, `logits` (1, n) float32, `embedding` (1, d) float32 and, when there, `cam`
(1, h, w, n) float32. `Graph` runs it for evaluation, for the golden answers and for serving alike: what was
judged is what is served.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from lawnwatch import log
from lawnwatch.errors import IntegrityError, NotFound
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

MODEL = "model.tflite"
MANIFEST = "manifest.json"
EVALUATION = "evaluation.json"
HOST_SLICES = "source host"  # the division of an evaluation's slices that no bundle carries
SKETCH = "sketch.npz"
UNKNOWN = "unknown.npz"
MODEL_CARD = "model_card.md"

# What may lie in a bundle. Pickles, Keras archives and shared objects can run code when they are opened.
SUFFIXES = {
    ".tflite": "application/octet-stream",
    ".npz": "application/octet-stream",
    ".json": "application/json",
    ".md": "text/markdown",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}
MAX_MANIFEST_BYTES = 4_000_000

# Which arrays of `unknown.npz` a method needs, each with its number of dimensions.
_MAHALANOBIS = {"means": 2, "axes": 2, "variances": 1, "rest": 0}
_BACKGROUND = {"weight": 1, "bias": 0}
STATISTICS: dict[str, dict[str, int]] = {
    "knn": {"bank": 2},
    "mahalanobis": _MAHALANOBIS,
    "background": _BACKGROUND,
    "mahalanobis_background": _MAHALANOBIS | _BACKGROUND | {"centre": 1, "scale": 1},
}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FileEntry(_Strict):
    """One file of the bundle: its hash and its length."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class TensorSpec(_Strict):
    """One input or output of the graph."""

    shape: list[int]
    dtype: str
    description: str = ""


class Unknown(_Strict):
    """How a picture that belongs to no class is recognised: `score >= threshold` means unknown."""

    method: Literal["max_softmax", "energy", "knn", "mahalanobis", "background", "mahalanobis_background"]
    threshold: float = Field(allow_inf_nan=False)
    accept_rate: float = Field(ge=0, le=1, description="Share of held-out pictures the threshold lets pass.")
    k: int = Field(1, ge=1, description="Which nearest neighbour counts (knn).")


class Variant(_Strict):
    """One graph of the model."""

    file: str
    arithmetic: Literal["float32", "int8"]
    images: int = Field(0, ge=0, description="Held-out pictures on which it was compared with the float32 Keras model.")
    accuracy_change: float = Field(0, ge=-1, le=1, description="Its accuracy minus Keras' on the same pictures.")
    changed_answers: int = Field(0, ge=0, description="Pictures of these that it names otherwise.")
    speedup: float = Field(1, gt=0, description="Times as fast as float32 in one run, one thread.")
    passed: bool = Field(True, description="Not worse than the limit allows, and faster.")
    reason: str = ""


class GoldenAnswer(_Strict):
    """A picture of the bundle and what the model answers to it."""

    file: str
    label: str
    probabilities: dict[str, Probability]


class Lineage(_Strict):
    """Where the model came from."""

    snapshot: str
    run_id: str
    git_commit: str
    weights: str
    samples: bool = Field(description="True: trained on drawn sample pictures, not on photographs.")
    candidate: str
    created_at: datetime


class BundleMeta(_Strict):
    """The manifest without what `write` fills in."""

    model_name: str = Field(min_length=1)
    model_version: int = Field(ge=1)
    classes: list[str] = Field(min_length=2, description="Class names in the order of the logits.")
    preprocessing: dict[str, JsonValue]
    temperature: float = Field(gt=0, allow_inf_nan=False)
    unknown: Unknown | None = None
    variants: dict[str, Variant] = Field(default_factory=dict)
    served: str = Field("", description="Name of the variant that is `model.tflite`.")
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    golden: list[GoldenAnswer] = Field(min_length=1)
    tolerance: float = Field(0.01, gt=0, le=0.1, description="Largest difference of a golden probability.")
    evaluation: dict[str, JsonValue]
    lineage: Lineage

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: list[str]) -> list[str]:
        if len(set(classes)) != len(classes) or not all(classes):
            raise ValueError(f"class names must be distinct and not empty; received {classes}")
        return classes

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> BundleMeta:
        known = set(self.classes)
        for answer in self.golden:
            if answer.label not in known or set(answer.probabilities) != known:
                raise ValueError(f"golden answer of {answer.file} must name exactly the classes {self.classes}")
        if self.variants and (self.served not in self.variants or self.variants[self.served].file != MODEL):
            raise ValueError(f"served must name the variant in {MODEL}; received {self.served!r} of {self.variants}")
        logits = self.outputs.get("logits")
        if logits is None or logits.shape[-1] != len(self.classes):
            raise ValueError(f"outputs must hold `logits`, {len(self.classes)} numbers; received {self.outputs}")
        return self


class Manifest(BundleMeta):
    """What a bundle is, in one file; its SHA-256 names the bundle."""

    schema_version: Literal[1, 2] = 2
    runtime: Literal["litert"] = "litert"
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _files_are_allowed(self) -> Manifest:
        for name in self.files:
            path = Path(name)
            if path.is_absolute() or ".." in path.parts or path.suffix not in SUFFIXES or "\\" in name:
                raise ValueError(f"a bundle may hold {', '.join(sorted(SUFFIXES))} files only; received {name!r}")
        needed = {MODEL, *(one.file for one in self.variants.values()), *(answer.file for answer in self.golden)}
        missing = needed - set(self.files)
        if self.unknown is not None and self.unknown.method in STATISTICS:
            missing |= {UNKNOWN} - set(self.files)
        if missing:
            raise ValueError(f"the manifest misses the files {sorted(missing)}")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON (sorted keys, no spaces, UTF-8): the same manifest is always the same bytes."""
        later = {"variants", "served"} if self.schema_version == 1 else set()  # what version 1 did not have
        return json.dumps(
            self.model_dump(mode="json", exclude=later),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        ).encode()


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        sha256: SHA-256 of the manifest's bytes, the bundle's name.
        manifest: what it says of itself.
        files: each file's bytes, or the path of its verified copy in the cache.
    """

    sha256: str
    manifest: Manifest
    files: dict[str, Path | bytes]

    def bytes_of(self, name: str) -> bytes:
        """One file's bytes. Raises NotFound when the bundle has no such file."""
        content = self.files.get(name)
        if content is None:
            raise NotFound(f"bundle {self.sha256[:12]} has no file {name!r}; it has {sorted(self.files)}.")
        return content if isinstance(content, bytes) else content.read_bytes()


def key(sha256: str, name: str) -> str:
    """The object key of a bundle's file."""
    return f"bundles/{sha256}/{name}"


def write(store: ObjectStore, files: dict[str, bytes], meta: BundleMeta) -> Bundle:
    """Publish a bundle: every file first, the manifest last, so that no reader ever sees half of one.

    Writing the same content again changes nothing and returns the same bundle.

    Raises:
        IntegrityError: meta and files contradict each other, or hold what a bundle may not hold.
    """
    entries = {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)) for name, data in files.items()
    }
    try:
        fields = {name: getattr(meta, name) for name in BundleMeta.model_fields}
        manifest = Manifest(**fields, files=entries)
        raw = manifest.to_bytes()
    except ValueError as error:  # pydantic's ValidationError is one, a NaN in the JSON another
        raise IntegrityError(f"this bundle cannot be written: {error}") from error
    sha256 = hashlib.sha256(raw).hexdigest()
    for name in sorted(files):
        store.put(
            key(sha256, name),
            files[name],
            content_type=SUFFIXES[Path(name).suffix],
            sha256=entries[name].sha256,
        )
    store.put(key(sha256, MANIFEST), raw, content_type="application/json", sha256=sha256)
    return Bundle(sha256, manifest, dict(files))


def read(store: ObjectStore, sha256: str, cache_dir: Path | None = None) -> Bundle:
    """Read a bundle and verify every byte of it against its name.

    A copy in `cache_dir` is verified like the store's and used first, so that a store that is down does not
    matter; a copy that fails is removed and fetched anew. Where no copy can be written, the files stay in memory.

    Args:
        store: where bundles lie.
        sha256: the bundle's name, 64 hexadecimal digits.
        cache_dir: folder of verified copies; None keeps the files in memory.

    Raises:
        NotFound: the store has no such bundle.
        IntegrityError: a file is missing, truncated, altered or not allowed; the message says which.
        Unavailable: the store does not answer and there is no good copy.
    """
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise NotFound(f"a bundle is named by 64 hexadecimal digits; received {sha256!r}.")
    if cache_dir is None:
        return _verified(sha256, lambda name: _fetch(store, sha256, name))
    home = cache_dir / sha256
    if (home / MANIFEST).exists():
        try:
            return _on_disk(_verified(sha256, lambda name: _read_copy(home, name)), home)
        except IntegrityError:
            shutil.rmtree(home, ignore_errors=True)
    bundle = _verified(sha256, lambda name: _fetch(store, sha256, name))
    try:
        _save_copy(bundle, home)
    except OSError as error:  # a full disk, or one that must not be written
        logger.warning("the bundle cannot be kept on disk and is used from memory", sha256=sha256, error=str(error))
        return bundle
    return _on_disk(bundle, home)


def _verified(sha256: str, fetch: Callable[[str], bytes]) -> Bundle:
    raw = fetch(MANIFEST)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise IntegrityError(
            f"manifest of bundle {sha256[:12]} has {len(raw)} bytes; {MAX_MANIFEST_BYTES} are the most."
        )
    received = hashlib.sha256(raw).hexdigest()
    if received != sha256:
        raise IntegrityError(
            f"manifest of bundle {sha256[:12]} has SHA-256 {received[:12]}…: it is altered or another's.",
            hint="Release the model version again.",
        )
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "manifest"
        raise IntegrityError(
            f"manifest of bundle {sha256[:12]} cannot be read by this release: {where}: {problem['msg']}",
            hint="Release the model version again with this release of lawnwatch.",
        ) from error
    files: dict[str, Path | bytes] = {}
    for name, entry in manifest.files.items():
        try:
            data = fetch(name)
        except NotFound as error:
            raise IntegrityError(f"bundle {sha256[:12]} misses its file {name}.") from error
        found = hashlib.sha256(data).hexdigest()
        if len(data) != entry.bytes or found != entry.sha256:
            raise IntegrityError(
                f"{name} of bundle {sha256[:12]} is not what the manifest says: expected {entry.bytes} bytes "
                f"with SHA-256 {entry.sha256[:12]}…, received {len(data)} bytes with {found[:12]}….",
                hint="Release the model version again.",
            )
        files[name] = data
    return Bundle(sha256, manifest, files)


def _fetch(store: ObjectStore, sha256: str, name: str) -> bytes:
    try:
        return store.get(key(sha256, name))
    except NotFound as error:
        if name != MANIFEST:
            raise
        raise NotFound(
            f"there is no bundle {sha256[:12]}… in the store.",
            hint="Run `lawnwatch release` for the version.",
        ) from error


def _read_copy(home: Path, name: str) -> bytes:
    try:
        return (home / name).read_bytes()
    except OSError as error:
        raise IntegrityError(f"the cached copy of {name} cannot be read.") from error


def _save_copy(bundle: Bundle, home: Path) -> None:
    """Write the copy beside its place and move it in at once: a cache is whole or absent. Raises OSError."""
    home.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=home.parent))
    try:
        for name in bundle.files:
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            (building / name).write_bytes(bundle.bytes_of(name))
        (building / MANIFEST).write_bytes(bundle.manifest.to_bytes())
        building.chmod(0o755)
        building.rename(home)
    except OSError:
        if not (home / MANIFEST).exists():  # else another process was quicker with the same bytes
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _on_disk(bundle: Bundle, home: Path) -> Bundle:
    return Bundle(bundle.sha256, bundle.manifest, {name: home / name for name in bundle.files})


@dataclass(frozen=True)
class GoldenReport:
    """How far the answers here are from the recorded ones.

    Attributes:
        ok: every probability is within the manifest's tolerance and every label is the recorded one.
        max_error: the largest difference of a probability; infinite when an answer was no probability.
        images: how many pictures were asked.
        worst: the file with the largest difference.
    """

    ok: bool
    max_error: float
    images: int
    worst: str


def check_golden(bundle: Bundle, predict: Callable[[bytes], dict[str, float]]) -> GoldenReport:
    """Ask the golden pictures through the caller's own road (decode, resize, graph, softmax) and compare.

    Args:
        bundle: a verified bundle.
        predict: image file bytes → calibrated probability per class name.
    """
    worst, max_error, ok = "", 0.0, True
    for answer in bundle.manifest.golden:
        received = predict(bundle.bytes_of(answer.file))
        if set(received) != set(answer.probabilities) or not all(math.isfinite(p) for p in received.values()):
            return GoldenReport(False, math.inf, len(bundle.manifest.golden), answer.file)
        error = max(abs(received[name] - p) for name, p in answer.probabilities.items())
        if error >= max_error:
            worst, max_error = answer.file, error
        # A label may flip within the tolerance when two classes are level; that is not a different model.
        ok = ok and error <= bundle.manifest.tolerance
    return GoldenReport(ok, max_error, len(bundle.manifest.golden), worst)


class Outputs(NamedTuple):
    """What the graph returns for one picture.

    Attributes:
        logits: (n,) float32.
        embedding: (d,) float32.
        cam: (h, w, n) float32, the class activation map before the softmax; None when the graph has none.
    """

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]
    cam: NDArray[np.float32] | None


class Graph:
    """A LiteRT graph under the bundle's contract. Not for two threads at once: give each thread its own.

    Args:
        model: the bytes of `model.tflite`.
        classes: how many classes the logits must have.
        threads: threads of one inference.

    Raises:
        IntegrityError: the bytes are no LiteRT graph, or its signature is not the contract's.
    """

    def __init__(self, model: bytes, *, classes: int, threads: int = 1) -> None:
        from ai_edge_litert.interpreter import (
            Interpreter,
        )  # a second of import that the light commands do without

        try:
            self._interpreter = Interpreter(model_content=model, num_threads=threads)
            self._run: Any = self._interpreter.get_signature_runner("serving_default")
        except (ValueError, RuntimeError) as error:
            raise IntegrityError(
                f"the model file is no LiteRT graph with signature serving_default: {error}"
            ) from error
        inputs, outputs = self._run.get_input_details(), self._run.get_output_details()
        if set(inputs) != {"image"}:
            raise IntegrityError(f"the graph must have one input `image`; received {sorted(inputs)}.")
        shape, dtype = [int(side) for side in inputs["image"]["shape"]], np.dtype(inputs["image"]["dtype"])
        if len(shape) != 4 or shape[0] != 1 or shape[1] != shape[2] or shape[3] != 3 or dtype != np.uint8:
            raise IntegrityError(f"`image` must be (1, size, size, 3) uint8; received {shape} {dtype}.")
        if not {"logits", "embedding"} <= set(outputs):
            raise IntegrityError(f"the graph must return `logits` and `embedding`; it returns {sorted(outputs)}.")
        if [int(n) for n in outputs["logits"]["shape"]] != [1, classes]:
            raise IntegrityError(
                f"`logits` must be (1, {classes}), one a class; received {list(outputs['logits']['shape'])}."
            )
        self.size = shape[1]
        self.classes = classes
        self._tensors = {name: _shape_and_type(said) for name, said in (inputs | outputs).items()}

    def check_described(self, manifest: BundleMeta) -> None:
        """Compare the graph's tensors with what a manifest says of them.

        Raises:
            IntegrityError: another shape or type than described, or none of that name.
        """
        if set(manifest.inputs) != {"image"}:
            raise IntegrityError(f"the manifest must describe one input, `image`; received {sorted(manifest.inputs)}.")
        for name, spec in (manifest.inputs | manifest.outputs).items():
            found = self._tensors.get(name)
            if found != (spec.shape, spec.dtype):
                has = f"is {found[0]} {found[1]}" if found else "does not exist"
                raise IntegrityError(
                    f"the manifest describes `{name}` as {spec.shape} {spec.dtype}; in the graph it {has}.",
                    hint="Release the model version again.",
                )

    def __call__(self, image: NDArray[np.uint8]) -> Outputs:
        """Run one picture.

        Args:
            image: (size, size, 3) uint8 RGB, from `images.decode`.

        Raises:
            IntegrityError: the graph returned something that is not finite.
        """
        result = self._run(image=image[np.newaxis])
        logits, embedding = result["logits"][0].copy(), result["embedding"][0].copy()
        if not (np.isfinite(logits).all() and np.isfinite(embedding).all()):
            raise IntegrityError("the model returned numbers that are not finite (NaN or infinity).")
        cam = result.get("cam")
        return Outputs(logits, embedding, None if cam is None else cam[0].copy())


def _shape_and_type(tensor: dict[str, Any]) -> tuple[list[int], str]:
    return [int(side) for side in tensor["shape"]], np.dtype(tensor["dtype"]).name


def probabilities(logits: NDArray[np.floating[Any]], temperature: float) -> NDArray[np.float64]:
    """Calibrated softmax over the last axis: (..., n) → (..., n) float64 that sums to 1."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


class UnknownDetector:
    """Scores how little a picture looks like any class; `score >= spec.threshold` means unknown.

    Embeddings are scaled to unit length first, which a Gaussian model of them needs (Müller and Hein, "Mahalanobis++",
    ICML 2025). Higher is stranger:

        max_softmax             1 - largest probability (Hendrycks and Gimpel 2017)
        energy                  -log-sum-exp of the logits (Liu et al. 2020)
        knn                     1 - cosine to the k-th nearest training picture (Sun et al. 2022)
        mahalanobis             squared distance to the nearest class mean under the classes' shared covariance, shrunk
                                towards a multiple of the identity (Lee et al. 2018)
        background              log-odds of a head that was trained on made pictures against the classes (outlier
                                exposure, Hendrycks et al. 2019)
        mahalanobis_background  the sum of these two, each in standard deviations of held-out training pictures

    Args:
        spec: method and threshold.
        temperature: the model's temperature (max_softmax).
        statistics: the arrays that `STATISTICS` names for the method, from `unknown.npz`.

    Raises:
        IntegrityError: an array is missing, is not finite, or does not fit the others.
    """

    def __init__(
        self, spec: Unknown, temperature: float, statistics: dict[str, NDArray[np.floating[Any]]] | None = None
    ) -> None:
        self.spec = spec
        self.temperature = temperature
        self._s: dict[str, NDArray[np.float32]] = {}
        for name, dimensions in STATISTICS.get(spec.method, {}).items():
            array = (statistics or {}).get(name)
            if array is None or array.ndim != dimensions or not array.size or not np.isfinite(array).all():
                raise IntegrityError(f"{UNKNOWN} must hold `{name}`, finite and of {dimensions} dimension(s).")
            self._s[name] = array.astype(np.float32)
        lengths = {array.shape[-1] for name, array in self._s.items() if name in ("bank", "means", "axes", "weight")}
        if len(lengths) > 1:
            raise IntegrityError(f"the arrays of {UNKNOWN} are made for embeddings of different lengths: {lengths}.")
        self.length = lengths.pop() if lengths else None
        if spec.method == "knn" and len(self._s["bank"]) < spec.k:
            raise IntegrityError(f"{UNKNOWN} must hold at least {spec.k} embeddings for the k-NN score.")
        if "axes" in self._s and (
            self._s["variances"].shape != self._s["axes"].shape[:1]
            or not (self._s["variances"] > 0).all()
            or self._s["rest"] <= 0
        ):
            raise IntegrityError(f"{UNKNOWN} must hold a positive variance for each axis.")
        if "centre" in self._s and not (
            self._s["centre"].shape == self._s["scale"].shape == (2,) and (self._s["scale"] > 0).all()
        ):
            raise IntegrityError(f"{UNKNOWN} must hold a centre and a positive scale for each of two scores.")

    @classmethod
    def of(cls, bundle: Bundle) -> UnknownDetector | None:
        """The bundle's detector, or None when it has none."""
        spec = bundle.manifest.unknown
        if spec is None:
            return None
        data = bundle.bytes_of(UNKNOWN) if spec.method in STATISTICS else None
        return cls.load(spec, bundle.manifest.temperature, data)

    @classmethod
    def load(cls, spec: Unknown, temperature: float, data: bytes | None) -> UnknownDetector:
        """The detector from the bytes of `unknown.npz`. Raises IntegrityError when they are something else."""
        if data is None:
            return cls(spec, temperature)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                statistics = dict(arrays)
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise IntegrityError(f"{UNKNOWN} cannot be read: {error}") from error
        return cls(spec, temperature, statistics)

    def score(self, outputs: Outputs) -> float:
        """The score of one picture."""
        return float(self.scores(outputs.logits[np.newaxis], outputs.embedding[np.newaxis])[0])

    def scores(
        self, logits: NDArray[np.floating[Any]], embeddings: NDArray[np.floating[Any]]
    ) -> NDArray[np.floating[Any]]:
        """The scores of m pictures: logits (m, n), embeddings (m, d) → (m,)."""
        method = self.spec.method
        if method == "max_softmax":
            return np.asarray(1 - probabilities(logits, self.temperature).max(axis=1))
        if method == "energy":
            high = logits.max(axis=1).astype(np.float64)
            return np.asarray(-(high + np.log(np.exp(logits - high[:, np.newaxis]).sum(axis=1))))
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        unit = embeddings.astype(np.float32, copy=False) / np.maximum(lengths, 1e-12)
        if method == "knn":
            near = unit @ self._s["bank"].T
            at = near.shape[1] - self.spec.k
            return np.asarray(1 - np.partition(near, at, axis=1)[:, at])
        if method == "mahalanobis":
            return self._mahalanobis(unit)
        if method == "background":
            return self._background(unit)
        centre, scale = self._s["centre"], self._s["scale"]
        gaussian, head = self._mahalanobis(unit), self._background(unit)
        return np.asarray((gaussian - centre[0]) / scale[0] + (head - centre[1]) / scale[1])

    def _mahalanobis(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        """Along the axes by their variances; what is left of the difference by the variance of the rest."""
        away = unit[:, np.newaxis] - self._s["means"]  # (m, classes, d)
        along = (away @ self._s["axes"].T) ** 2
        left = np.maximum((away**2).sum(axis=2) - along.sum(axis=2), 0)
        return np.asarray(((along / self._s["variances"]).sum(axis=2) + left / self._s["rest"]).min(axis=1))

    def _background(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(unit @ self._s["weight"] + self._s["bias"])
