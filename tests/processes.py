"""Real processes that tests start, wait for, and end."""

from __future__ import annotations

import ctypes
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Play a folder as the web, on loopback; gives its URL without a slash at the end."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str, *places: str) -> str:
    """The path of a program, or a failure that says how to get it."""
    for place in (*places, name, f"/usr/sbin/{name}"):
        if found := shutil.which(place):
            return found
    pytest.fail(f"{name} is not installed; run infra/test-servers", pytrace=False)


def _die_with_parent() -> None:
    """A killed test run leaves no server behind (Linux; elsewhere the fixtures' own clean-up must do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)


@dataclass
class Server:
    """A process that a test started, with its log; `stop` and `start` may be used to break and mend it."""

    argv: list[str]
    ready: Callable[[], bool]
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, deadline: float = 90.0) -> Server:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                env=os.environ | self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if self.ready():
                return self
            time.sleep(0.1)
        state = f"ended with {self.process.returncode}" if self.process.poll() is not None else "did not answer"
        self.stop()
        pytest.fail(f"{self.argv[0]} {state}:\n{self.log.read_text(errors='replace')[-3000:]}", pytrace=False)

    def stop(self, sig: int = signal.SIGTERM) -> None:
        if self.process is None:
            return
        for each in (sig, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, each)
            except ProcessLookupError:
                break
            try:
                self.process.wait(timeout=20)
                break
            except subprocess.TimeoutExpired:
                continue
        self.process = None


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
