"""LitServe: one worker process a core behind its own queue; the picture comes in JSON, for a form does not pickle."""

from __future__ import annotations

import base64
import os
from typing import Any

import litserve as ls
from work import Model


class Lawn(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Model()

    def decode_request(self, request: dict[str, str]) -> bytes:
        return base64.b64decode(request["file"])

    def predict(self, x: bytes) -> dict[str, Any]:
        return self.model.answer(x)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = ls.LitServer(Lawn(api_path="/predict"), accelerator="cpu", workers_per_device=2, timeout=60)
    server.run(host="127.0.0.1", port=int(os.environ["PEER_PORT"]), generate_client_file=False, log_level="error")
