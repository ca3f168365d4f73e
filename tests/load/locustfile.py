"""Load for a running API: what clients of an image classifier really send, well-meant and not.

    make load                                    # headless, 60 s, report.html; fails beyond the thresholds
    locust -f tests/load/locustfile.py           # the web UI, http://localhost:8089

Of 100 requests 70 are small photos, 10 photos as a phone takes them (12 megapixels), 5 batches, 8 files that are no
pictures, and 7 ask for state and history. A refusal for want of a place (503 with Retry-After) is neither a success
nor a failure: it is counted beside them, and the client waits as it was told. Thresholds, in the environment:

    LOAD_MAX_FAILED   share of requests that may fail (0: none)
    LOAD_MAX_REFUSED  share that may be refused for want of a place (0.05)
    LOAD_P99_MS       99th percentile of the small photos (2500: admission lets nobody wait much over 2 s)
    LOAD_KEY          API key, where the server requires one
"""

from __future__ import annotations

import io
import logging
import os
import random
from typing import Any

import gevent
import numpy as np
from locust import FastHttpUser, between, events, task
from PIL import Image

SEED = 6
SMALL = "/predict (small)"


def photo(width: int, height: int, format: str, seed: int) -> bytes:
    """A picture with the structure of a photograph: smooth areas, edges and grain."""
    random_ = np.random.default_rng(seed)
    coarse = random_.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = random_.integers(-6, 7, (height, width, 1), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(buffer, format, quality=85)
    return buffer.getvalue()


SMALLS = [photo(275, 183, format, SEED + n) for n, format in enumerate(["JPEG"] * 6 + ["PNG", "WEBP"])]
PHONE = photo(4000, 3000, "JPEG", SEED + 100)
BAD = [b"", b"<html>", SMALLS[0][:3000], b"\x89PNG\r\n\x1a\n" + bytes(50), b"GIF89a" + bytes(60), os.urandom(5000)]
refused = 0
logger = logging.getLogger("load")
gevent.get_hub().loop.update_now()  # making the photos took seconds, which --run-time must not count


class Client(FastHttpUser):
    """One client that waits a little between its requests."""

    wait_time = between(0.0, 0.2)
    headers = {"X-API-Key": os.environ["LOAD_KEY"]} if os.environ.get("LOAD_KEY") else {}

    def send(self, method: str, path: str, name: str, expected: set[int], **body: Any) -> Any:
        """Ask, and judge the answer: success, failure, or refused for want of a place."""
        global refused
        with self.client.request(
            method, path, name=name, catch_response=True, headers=self.headers, **body
        ) as response:
            if response.status_code in expected:
                response.success()
            elif response.status_code == 503 and response.headers.get("Retry-After"):
                refused += 1
                response.success()
                gevent.sleep(float(response.headers["Retry-After"]))
            else:
                response.failure(f"{response.status_code}: {(response.text or '')[:200]}")
        return response

    @task(70)
    def small(self) -> None:
        data = random.choice(SMALLS)
        self.send("POST", "/predict", SMALL, {200}, files={"file": ("photo.jpg", data)})

    @task(10)
    def phone(self) -> None:
        self.send("POST", "/predict", "/predict (12 MP)", {200}, files={"file": ("phone.jpg", PHONE)})

    @task(5)
    def batch(self) -> None:
        files = [("file", ("x.jpg", random.choice(SMALLS))) for _ in range(8)]
        self.send("POST", "/predict/batch", "/predict/batch (8)", {200}, files=files)

    @task(8)
    def bad(self) -> None:
        data = random.choice(BAD)
        self.send("POST", "/predict", "/predict (no picture)", {415, 422}, files={"file": ("bad.jpg", data)})

    @task(7)
    def look(self) -> None:
        path = random.choice(["/model/info", "/ready", "/health", "/predictions?limit=20"])
        self.send("GET", path, path.partition("?")[0], {200})


@events.quitting.add_listener
def judge(environment: Any, **_: Any) -> None:
    """Exit with 1 when a threshold was crossed, and say which."""
    total, small = environment.stats.total, environment.stats.get(SMALL, "POST")
    if not total.num_requests:
        logger.error("no request was answered")
        environment.process_exit_code = 1
        return
    measured = {
        "LOAD_MAX_FAILED": (total.num_failures / total.num_requests, 0.0),
        "LOAD_MAX_REFUSED": (refused / total.num_requests, 0.05),
        "LOAD_P99_MS": (float(small.get_response_time_percentile(0.99) or 0), 2500.0),
    }
    crossed = False
    for name, (value, default) in measured.items():
        most = float(os.environ.get(name, default))
        logger.info("%s %.4g, at most %g%s", name, value, most, "  CROSSED" if value > most else "")
        crossed = crossed or value > most
    environment.process_exit_code = int(crossed)
