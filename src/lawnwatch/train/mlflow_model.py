"""The served graph as MLflow loads it: pictures in, probabilities out, without a pickle and without lawnwatch.

MLflow keeps a copy of this file with the run and executes that when the model is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from ai_edge_litert.interpreter import Interpreter


class ServedGraph(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers (n, 224, 224, 3) uint8 RGB with (n, classes) float64 calibrated probabilities, in the classes' order."""

    def load_context(self, context: Any) -> None:
        self._run = Interpreter(model_path=context.artifacts["graph"]).get_signature_runner("serving_default")
        self._temperature = json.loads(Path(context.artifacts["calibration"]).read_text())["temperature"]

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # MLflow reads annotations
        logits = np.concatenate([self._run(image=picture[np.newaxis])["logits"] for picture in model_input])
        powers = np.exp((logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / self._temperature)
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))


mlflow.models.set_model(ServedGraph())
