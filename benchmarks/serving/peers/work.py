"""What every packaged server here does for a picture: the same LiteRT graph, the same fields out.

PEER_DECODE=usual decodes as most who write such a service do, Pillow at full size and its resize; `lawnwatch` gives the
peer this project's own decode, so that only the servers differ.
"""

from __future__ import annotations

import io
import os
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

CLASSES = ("dandelion", "grass")
THREADS = 2


Decode = Callable[[bytes], tuple[dict[str, Any], Any]]


def usual(data: bytes) -> tuple[dict[str, Any], Any]:
    """What the header says, and (224, 224, 3) uint8 RGB."""
    image = Image.open(io.BytesIO(data))
    said = {"format": image.format, "width": image.width, "height": image.height, "bytes": len(data)}
    return said, np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))


def ours(data: bytes) -> tuple[dict[str, Any], Any]:
    """The same by this project's decode."""
    from lawnwatch import images

    info, rgb = images.inspect_and_decode(data, size=224, max_pixels=50_000_000)
    return {"format": info.format, "width": info.width, "height": info.height, "bytes": info.bytes}, rgb


DECODERS: dict[str, Decode] = {"usual": usual, "lawnwatch": ours}


class Model:
    """A graph for each of two threads."""

    def __init__(self) -> None:
        self._decode = DECODERS[os.environ["PEER_DECODE"]]
        self._graphs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(THREADS):
            interpreter = Interpreter(model_path=os.environ["PEER_MODEL"], num_threads=1)
            self._graphs.put((interpreter, interpreter.get_signature_runner("serving_default")))

    def answer(self, data: bytes) -> dict[str, Any]:
        """The answer to a picture file, without what only lawnwatch adds (unknown score, record, metrics)."""
        said, rgb = self._decode(data)
        held = self._graphs.get()
        try:
            logits = held[1](image=rgb[np.newaxis])["logits"][0].astype(np.float64)
        finally:
            self._graphs.put(held)
        powers = np.exp(logits - logits.max())
        shares = powers / powers.sum()
        best = int(shares.argmax())
        return {
            "label": CLASSES[best],
            "confidence": float(shares[best]),
            "probabilities": dict(zip(CLASSES, map(float, shares), strict=True)),
            "image": said,
        }
