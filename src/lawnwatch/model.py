"""The network: MobileNetV2 with its preprocessing inside, cut where training begins, exported to LiteRT.

    image (batch, 224, 224, 3) uint8 RGB
      │ bottom: rescale to [-1, 1], blocks 0-12, never trained
    cut (batch, 14, 14, 96) float32
      │ top: blocks 13-16 and the last convolution; trained by fine-tuning; batch norm stays in inference mode
    map (batch, 7, 7, 1280) float32
      │ mean over the map = embedding (batch, 1280); head = one dense layer
    logits (batch, n) float32; the head on the map gives cam (batch, 7, 7, n), whose mean is the logits

The rescaling lies inside, so training and serving cannot differ in it; there is no Lambda layer, so a graph
is data. TensorFlow takes 13 s to import: nothing here does so before it is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch.bundle import Graph, TensorSpec
from lawnwatch.errors import IntegrityError, SettingsError, Unavailable

SIZE = 224
SMALL_SIZE = 160  # side to which the cheaper graph brings its picture before the network
EMBEDDING = 1280
CUT_LAYER = "block_12_add"
CUT_SHAPE = (14, 14, 96)


@cache
def tensorflow() -> Any:
    """TensorFlow, imported once and without its banners. Only its native start-up chatter is dropped."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # for the library: we read no environment here
    with _native_stderr_dropped():
        import tensorflow as tf
    return tf


def keras() -> Any:
    """Keras 3 on TensorFlow."""
    tensorflow()
    import keras as k

    return k


@contextmanager
def _native_stderr_dropped() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: C++ logs there before any Python logging can be told not to."""
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@dataclass(frozen=True)
class Weights:
    """Where the network starts.

    Attributes:
        source: `imagenet`, `file:<name>` or `none`.
        sha256: of the file, or the source's name when there is no file to hash.
        path: the file to load; None for `imagenet` and `none`.
    """

    source: str
    sha256: str
    path: Path | None = None

    def describe(self) -> str:
        """For the lineage: source, and the file's hash when there is one."""
        return f"{self.source} sha256:{self.sha256}" if self.path else self.source


def find_weights(setting: str) -> Weights:
    """What LAWNWATCH_WEIGHTS means, without loading anything.

    Raises:
        SettingsError: it names a file that is not there.
    """
    if setting in ("imagenet", "none"):
        return Weights(setting, setting)
    path = Path(setting).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"the weights file {setting} does not exist.",
            hint="Set LAWNWATCH_WEIGHTS to a MobileNetV2 weights file (no top), to `imagenet`, or to `none`.",
        )
    with path.open("rb") as file:
        return Weights(f"file:{path.name}", hashlib.file_digest(file, "sha256").hexdigest(), path)


@dataclass(frozen=True)
class Network:
    """MobileNetV2 without its top, in two parts that share their layers with the whole.

    Attributes:
        bottom: image (b, 224, 224, 3) uint8 → cut (b, 14, 14, 96) float32.
        top: cut → map (b, 7, 7, 1280) float32.
    """

    bottom: Any
    top: Any


def start(seed: int, device: str) -> None:
    """Begin a training: always from the same numbers and names, whatever this process did before.

    Names count because Keras numbers its layers through the life of a process, and the exported graph holds them.

    Args:
        device: `cpu`; `gpu`, which must be there; `auto`: a GPU when there is one.

    Raises:
        SettingsError: there is no GPU and one was asked for, or TensorFlow has begun to use another device.
    """
    tf, k = tensorflow(), keras()
    gpus = tf.config.list_physical_devices("GPU")
    if device == "gpu" and not gpus:
        raise SettingsError("TensorFlow finds no GPU here.", hint="Set LAWNWATCH_TRAIN__DEVICE to auto or cpu.")
    if device == "cpu" and gpus:
        try:
            tf.config.set_visible_devices([], "GPU")
        except RuntimeError as error:
            raise SettingsError(f"the device cannot be changed to cpu: {error}", hint="Start a new process.") from error
    k.utils.clear_session(free_memory=False)
    k.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def load_network(weights: Weights, *, size: int = SIZE, scale_on: NDArray[np.uint8] | None = None) -> Network:
    """Build MobileNetV2 and load its weights.

    Args:
        size: side of the picture that the network sees; it takes one of SIZE and brings it to this itself.
        scale_on: (n, size, size, 3) uint8, a few dozen training pictures; only for random weights, whose features are
            brought to an ordinary size on them.

    Raises:
        Unavailable: the ImageNet weights cannot be downloaded.
        SettingsError: the file holds no MobileNetV2 weights.
    """
    k = keras()
    source: Any = {"imagenet": "imagenet", "none": None}.get(weights.source, str(weights.path))
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # Keras' download waits for ever by default
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # weights of 224 serve any size
            base = k.applications.MobileNetV2(weights=source, include_top=False, input_shape=(size, size, 3))
    except Exception as error:  # Keras raises plain Exception when a download fails
        if weights.path is not None:
            raise SettingsError(
                f"{weights.path} holds no MobileNetV2 weights without top: {error}",
                hint="Set LAWNWATCH_WEIGHTS to such a file, to `imagenet`, or to `none`.",
            ) from error
        raise Unavailable(
            f"the ImageNet weights cannot be downloaded: {error}",
            hint="Set LAWNWATCH_WEIGHTS=FILE to a copy of them, or =none to start from random weights.",
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    if scale_on is not None:
        _scale_features(base, scale_on)
    base.trainable = False
    cut = base.get_layer(CUT_LAYER).output
    image = k.Input((SIZE, SIZE, 3), dtype="uint8", name="image")
    seen = k.layers.Rescaling(1 / 127.5, offset=-1)(image)
    if size != SIZE:
        seen = k.layers.Resizing(size, size, interpolation="bilinear")(seen)
    below = k.Model(base.input, cut)
    bottom = k.Model(image, below(seen, training=False))
    return Network(bottom=bottom, top=k.Model(cut, base.output))


def _scale_features(base: Any, pictures: NDArray[np.uint8]) -> None:
    """Give a network of random weights features of ordinary size, by its last normalisation's statistics.

    Dozens of untrained layers shrink every signal; what comes out is of the order of 1e-12, too small for float32 to
    carry to an answer. A network with trained weights must not be touched so.
    """
    layer = base.get_layer("Conv_1_bn")
    below = keras().Model(base.input, layer.input)
    # A few at once: what every layer makes of a picture stays in memory until the last one has run, 90 MB of each.
    parts = [pictures[at : at + 8] / np.float32(127.5) - 1 for at in range(0, len(pictures), 8)]
    before = np.concatenate([below(part).numpy() for part in parts]).astype(np.float64)
    mean, variance = before.mean(axis=(0, 1, 2)), before.var(axis=(0, 1, 2))
    # The layer divides by sqrt(variance + epsilon), and epsilon is huge beside such a variance.
    gamma = np.sqrt((variance + layer.epsilon) / np.maximum(variance, 1e-60))
    beta = layer.get_weights()[1]
    layer.set_weights([gamma.astype(np.float32), beta, mean.astype(np.float32), variance.astype(np.float32)])


def build(network: Network, n_classes: int) -> Any:
    """The whole model: image uint8 → {"logits", "embedding", "cam"}; its dense layer is called `head`.

    Args:
        network: whose layers it shares: training the top trains this.
        n_classes: at least 2.
    """
    k = keras()
    image = k.Input(network.bottom.input_shape[1:], dtype="uint8", name="image")
    features = network.top(network.bottom(image), training=False)
    embedding = k.layers.GlobalAveragePooling2D(name="embedding")(features)
    head = k.layers.Dense(n_classes, name="head")
    return k.Model(image, {"logits": head(embedding), "embedding": embedding, "cam": head(features)})


def set_head(model: Any, kernel: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
    """Put a linear classifier on the embedding: kernel (1280, n), bias (n,)."""
    model.get_layer("head").set_weights([kernel, bias])


def unfreeze_top(network: Network) -> list[Any]:
    """Make the top's convolutions trainable and return their variables; batch norm stays in inference mode.

    A batch of a few dozen pictures would ruin the statistics that ImageNet left in the batch norms.
    """
    k = keras()
    for layer in network.top.layers:
        layer.trainable = not isinstance(layer, k.layers.BatchNormalization)
    return [variable for layer in network.top.layers for variable in layer.trainable_variables]


def export_litert(
    model: Any, ranges: NDArray[np.uint8], arithmetics: Sequence[str] = ("float32", "int8")
) -> dict[str, bytes]:
    """The model as LiteRT graphs with the signature of the bundle's contract, one for each arithmetic.

    In int8 the convolutions are, their ranges taken from pictures (Jacob et al. 2018); mean and head stay float32: they
    cost no time, and rounded logits would cost calibration.

    Args:
        ranges: (m, 224, 224, 3) uint8, for int8.
        arithmetics: `float32`, `int8` or both.

    Returns:
        Flatbuffers: signature `serving_default`, input `image` (1, 224, 224, 3) uint8, outputs `logits`, `embedding`
        and `cam` by name.
    """
    tf = tensorflow()
    folder = tempfile.mkdtemp(prefix="lawnwatch-export-")
    try:
        # Of a Keras model the saver would trace every layer for itself, which takes most of a minute and is not asked.
        served = tf.Module()
        served.variables_held = [weight.value for weight in model.weights]
        served.answer = tf.function(
            lambda image: model(image, training=False),
            input_signature=[tf.TensorSpec([1, *model.input_shape[1:]], tf.uint8, name="image")],
        )
        with _native_stderr_dropped(), warnings.catch_warnings(action="ignore", category=UserWarning):
            tf.saved_model.save(served, folder, signatures={"serving_default": served.answer})
            graphs: dict[str, bytes] = {}
            for arithmetic in arithmetics:
                converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
                graphs[arithmetic] = converter.convert() if arithmetic == "float32" else _quantized(converter, ranges)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for arithmetic, graph in graphs.items():
        weights = {"float32": 4, "int8": 1}[arithmetic] * sum(int(np.prod(weight.shape)) for weight in model.weights)
        if len(graph) < weights / 2:  # a converter that lost the variables still returns a graph, of noise
            raise IntegrityError(f"the exported graph has {len(graph)} bytes; its weights alone have {weights}.")
    return graphs


def _quantized(converter: Any, ranges: NDArray[np.uint8]) -> bytes:
    """TensorFlow's converter has no public way to leave operations out but through its debugger's options."""
    lite = tensorflow().lite
    converter.optimizations = [lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ({"image": picture[np.newaxis]} for picture in ranges)
    options = lite.experimental.QuantizationDebugOptions(denylisted_ops=["MEAN", "FULLY_CONNECTED"])
    debugger = lite.experimental.QuantizationDebugger(
        converter=converter, debug_dataset=converter.representative_dataset, debug_options=options
    )
    return bytes(debugger.get_nondebug_quantized_model())


def describe_inputs() -> dict[str, TensorSpec]:
    """The graph's input, for the manifest."""
    return {
        "image": TensorSpec(
            shape=[1, SIZE, SIZE, 3], dtype="uint8", description="RGB, 0 to 255, as images.decode makes it"
        )
    }


def describe_outputs(graph: bytes, n_classes: int) -> dict[str, TensorSpec]:
    """The outputs of an exported graph, for the manifest. The map's side depends on what the network sees."""
    cam = Graph(graph, classes=n_classes)(np.zeros((SIZE, SIZE, 3), np.uint8)).cam
    side = 7 if cam is None else len(cam)
    return {
        "logits": TensorSpec(shape=[1, n_classes], dtype="float32", description="softmax(logits / temperature)"),
        "embedding": TensorSpec(shape=[1, EMBEDDING], dtype="float32", description="mean of the last map"),
        "cam": TensorSpec(
            shape=[1, side, side, n_classes], dtype="float32", description="class activation map; mean = logits"
        ),
    }
