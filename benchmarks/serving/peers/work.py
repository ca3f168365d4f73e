"""What every server here does for a picture: lawnwatch's own decode, the same LiteRT graph, the same fields out."""

from __future__ import annotations

import os
import queue
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from lawnwatch import images

CLASSES = ("dandelion", "grass")
THREADS = 2


class Model:
    """A graph for each of two threads."""

    def __init__(self) -> None:
        self._graphs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(THREADS):
            interpreter = Interpreter(model_path=os.environ["PEER_MODEL"], num_threads=1)
            self._graphs.put((interpreter, interpreter.get_signature_runner("serving_default")))

    def answer(self, data: bytes) -> dict[str, Any]:
        """The answer to a picture file, without what only lawnwatch adds (unknown score, record, metrics)."""
        info, rgb = images.inspect_and_decode(data, size=224, max_pixels=50_000_000)
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
            "image": {"format": info.format, "width": info.width, "height": info.height, "bytes": info.bytes},
        }
