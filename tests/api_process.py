"""The API as a process of its own, and how tests ask it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lawnwatch.config import Settings
from lawnwatch.rollout import TARGET_KEY, ReleaseTarget
from lawnwatch.serving.metrics import STALE_SECONDS
from lawnwatch.store import ObjectStore, open_store

LAUNCH = """
import sys
from lawnwatch import log
from lawnwatch.config import get_settings
from lawnwatch.serving.server import run
log.configure(json=True)
run(get_settings())
"""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Api:
    """One API process on a port of its own."""

    home: Path
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    launch: list[str] = field(default_factory=list)  # a program that starts it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> Settings:
        return Settings(home=self.home, api_url=self.url)

    @property
    def store(self) -> ObjectStore:
        return open_store(self.settings)

    def start(self, *, ready: bool = True) -> Api:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        env = {
            "LAWNWATCH_HOME": str(self.home),
            "LAWNWATCH_SERVING__PORT": str(self.port),
            "LAWNWATCH_SERVING__POLL_SECONDS": "0.1",
            **self.env,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.launch, sys.executable, "-c", LAUNCH], env=os.environ | env, stdout=log, stderr=log
            )
        wait_for(lambda: self.get("/ready" if ready else "/health").status == 200, 90, self.log_text)
        return self

    def stop(self, sig: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(sig)
        return self.process.wait(30)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Answer(answer.status, lower(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, lower(error.headers), error.read())
        except OSError:
            return Answer(0, {}, b"")

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def predict(self, data: bytes, *, name: str = "file", filename: str = "photo.jpg", **headers: str) -> Answer:
        content_type, body = form([(name, filename, data)])
        return self.ask("POST", "/predict", body, {"Content-Type": content_type, **headers})

    def metric(self, name: str) -> float:
        time.sleep(STALE_SECONDS)  # so that what was told to whoever asked before is not told again
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def point_at(self, bundle: Any) -> None:
        target = ReleaseTarget.single(bundle.manifest.model_version, bundle.sha256)
        self.store.put(TARGET_KEY, target.to_bytes())


def lower(headers: Any) -> dict[str, str]:
    return {key.lower(): value for key, value in headers.items()}


def form(parts: list[tuple[str, str, bytes]]) -> tuple[str, bytes]:
    body = b""
    for name, filename, data in parts:
        body += b"--x1x\r\n" + (
            f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'.encode() + data + b"\r\n"
        )
    return "multipart/form-data; boundary=x1x", body + b"--x1x--\r\n"


def wait_for(condition: Callable[[], Any], seconds: float = 10, explain: Callable[[], str] = str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s\n{explain()[-3000:]}")


def problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json
    assert document["code"] == code and document["status"] == status and document["detail"]
    assert "Traceback" not in answer.body.decode() and str(Path.cwd()) not in answer.body.decode()
    return document


def peak_memory(api: Api) -> int:
    assert api.process is not None
    status = Path(f"/proc/{api.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) * 1024
