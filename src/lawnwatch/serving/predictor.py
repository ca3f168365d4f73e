"""From the bytes of a picture to an answer, with a bundle that has proven itself on this machine."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lawnwatch import images
from lawnwatch.bundle import (
    MODEL,
    MODEL_CARD,
    Bundle,
    GoldenReport,
    Graph,
    UnknownDetector,
    check_golden,
    probabilities,
)
from lawnwatch.errors import IntegrityError

UNKNOWN_LABEL = "unknown"
PIXELS = "RGB8"  # the format of a picture that came decoded


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says of one picture.

    Attributes:
        label: the likeliest class, or "unknown".
        likeliest: the likeliest class, unknown or not.
        confidence: calibrated probability of the likeliest class, unknown or not.
        unknown_score: None when the bundle has no detector.
        embedding: little-endian float16 bytes of the embedding.
        cam: (h, w) float32, where the picture speaks for the likeliest class; None when the graph does not tell.
        brightness, sharpness: of the decoded picture, see `images`.
        decode_seconds, infer_seconds: time spent; what `images` measures of the picture counts as decoding.
    """

    label: str
    likeliest: str
    confidence: float
    probabilities: dict[str, float]
    unknown_score: float | None
    image: images.ImageInfo
    embedding: bytes
    cam: NDArray[np.float32] | None
    brightness: float
    sharpness: float
    decode_seconds: float
    infer_seconds: float


class Predictor:
    """A bundle, ready to answer from several threads, each with a graph of its own.

    Args:
        bundle: a bundle whose hashes were verified.
        threads: how many will predict; a graph is ready for each of them.
        max_pixels: largest picture, decided before decoding.

    Raises:
        IntegrityError: the graph is not what the manifest says, or cannot reproduce the golden answers here.
    """

    def __init__(self, bundle: Bundle, *, threads: int, max_pixels: int) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._max_pixels = max_pixels
        self._classes = bundle.manifest.classes
        if self.manifest.preprocessing != images.PREPROCESSING:
            raise IntegrityError(
                f"bundle {self.sha256[:12]} was trained on pictures prepared in another way: it says "
                f"{self.manifest.preprocessing}, this server does {images.PREPROCESSING}.",
                hint="Train and release again with this release of lawnwatch.",
            )
        self._detector = UnknownDetector.of(bundle)
        self._model = bundle.bytes_of(MODEL)  # a graph works on the bytes it is given: one copy for all of them
        self._mine = threading.local()  # each thread keeps the graph it took first
        self._graphs = [self._new_graph()]  # those that no thread has taken yet
        self._graphs[0].check_described(self.manifest)
        self.size = self._graphs[0].size
        self.golden = self._prove()
        self._graphs = [self._mine.graph, *(self._new_graph() for _ in range(threads - 1))]
        del self._mine.graph  # whoever proves it need not be one of those who will predict

    @property
    def version(self) -> int:
        """The model version."""
        return self.manifest.model_version

    @property
    def sha256(self) -> str:
        """The bundle's name."""
        return self.bundle.sha256

    @property
    def model_card(self) -> str:
        """The model card, Markdown; empty when the bundle has none."""
        if MODEL_CARD not in self.bundle.files:
            return ""
        return self.bundle.bytes_of(MODEL_CARD).decode("utf-8", "replace")

    def answer(self, data: bytes) -> Answer:
        """Answer for one picture file.

        Raises:
            UnsupportedMedia, ImageTooLarge, ImageError: not a picture that can be used.
        """
        started = time.perf_counter()
        info, rgb = images.inspect_and_decode(data, size=self.size, max_pixels=self._max_pixels)
        return self._judge(info, rgb, started)

    def answer_pixels(self, rgb: images.Rgb) -> Answer:
        """Answer for one picture that is decoded already.

        Args:
            rgb: (size, size, 3) uint8 RGB; whoever prepared it otherwise than `images.decode` gets other answers.
        """
        info = images.ImageInfo(PIXELS, rgb.shape[1], rgb.shape[0], rgb.nbytes)
        return self._judge(info, rgb, time.perf_counter())

    def _judge(self, info: images.ImageInfo, rgb: images.Rgb, started: float) -> Answer:
        brightness, sharpness = images.light_and_blur(rgb)  # before the graph turns the picture out of the caches
        decoded = time.perf_counter()
        outputs = self._graph()(rgb)
        shares = probabilities(outputs.logits, self.manifest.temperature)
        score = self._detector.score(outputs) if self._detector is not None else None
        inferred = time.perf_counter()
        best = int(shares.argmax())
        unknown = score is not None and self._detector is not None and score >= self._detector.spec.threshold
        return Answer(
            label=UNKNOWN_LABEL if unknown else self._classes[best],
            likeliest=self._classes[best],
            confidence=float(shares[best]),
            probabilities={name: float(share) for name, share in zip(self._classes, shares, strict=True)},
            unknown_score=score,
            image=info,
            embedding=outputs.embedding.astype("<f2").tobytes(),
            cam=None if outputs.cam is None else outputs.cam[..., best],
            brightness=brightness,
            sharpness=sharpness,
            decode_seconds=decoded - started,
            infer_seconds=inferred - decoded,
        )

    def _prove(self) -> GoldenReport:
        """Recompute the golden answers here, by the road that requests take."""
        report = check_golden(self.bundle, lambda data: self.answer(data).probabilities)
        if not report.ok:
            raise IntegrityError(
                f"bundle {self.sha256[:12]} does not reproduce its golden answers here: "
                f"{report.worst} differs by {report.max_error:.4f}, {self.manifest.tolerance} is allowed.",
                hint="Release the model again; the bundle before it goes on serving.",
            )
        shape = (self.size, self.size, 3)
        # Not numpy.random: importing it for one picture costs 3 MiB and part of the time to the first answer.
        noise = np.frombuffer(hashlib.shake_128(b"noise").digest(math.prod(shape)), np.uint8).reshape(shape)
        graph = self._graph()
        if np.array_equal(graph(noise).logits, graph(np.zeros_like(noise)).logits):
            raise IntegrityError(
                f"bundle {self.sha256[:12]} answers the same whatever the picture shows.",
                hint="Train and release again.",
            )
        return report

    def _graph(self) -> Graph:
        """This thread's graph."""
        if not hasattr(self._mine, "graph"):
            try:
                self._mine.graph = self._graphs.pop()
            except IndexError:
                self._mine.graph = self._new_graph()
        graph: Graph = self._mine.graph
        return graph

    def _new_graph(self) -> Graph:
        return Graph(self._model, classes=len(self._classes))
