"""MLServer: a custom runtime in two worker processes; the picture comes as BYTES of the Open Inference Protocol."""

from __future__ import annotations

import base64
import json
from typing import Any

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from work import Model


class Lawn(MLModel):
    async def load(self) -> bool:
        self._model = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data: Any = payload.inputs[0].data[0]
        answer = json.dumps(self._model.answer(base64.b64decode(data)))
        output = ResponseOutput(name="answer", shape=[1], datatype="BYTES", data=[answer])
        return InferenceResponse(model_name=self.name, outputs=[output])
