"""BentoML, as its documentation serves a picture: one worker a core, the upload as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
from work import Model


@bentoml.service(workers=2, traffic={"timeout": 60, "max_concurrency": 512})
class Lawn:
    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(route="/predict")
    def predict(self, file: Path) -> dict[str, Any]:
        return self.model.answer(file.read_bytes())
