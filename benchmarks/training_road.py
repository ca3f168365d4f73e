"""How long the road from snapshot to verdict takes, step by step, by the command line.

Photographs from LAWNWATCH_TEST_PHOTOS (`<label>/*.jpg`), weights from LAWNWATCH_WEIGHTS; without them drawn samples
and no weights, and the table says so. Prints seconds per step, their sum, and the test accuracy with its interval.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "infra"))
import samples  # noqa: E402

LIMIT_SECONDS = 120.0


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


def step(*argv: str) -> tuple[float, dict[str, object]]:
    """Run one command; returns its wall seconds, start of the interpreter included, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lawnwatch", *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"lawnwatch {' '.join(argv)} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - started, json.loads(done.stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        given = os.environ.get("LAWNWATCH_TEST_PHOTOS")
        photos = Path(given).resolve() if given else samples.draw(home / "photos")
        weights = os.environ.setdefault("LAWNWATCH_WEIGHTS", "none")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_address[1]}"
        os.environ |= {"LAWNWATCH_HOME": folder, "LAWNWATCH_FETCH__ALLOW_CIDRS": '["127.0.0.0/8"]'}
        urls = home / "urls.csv"
        lines = (f"{web}/{file.parent.name}/{file.name},{file.parent.name}" for file in sorted(photos.glob("*/*.jpg")))
        urls.write_text("url,label\n" + "\n".join(lines) + "\n")
        step("catalog", "import", str(urls))
        ingest, report = step("ingest")
        snapshot, _ = step("snapshot", "create")
        train, trained = step("train")
        evaluate, verdict = step("evaluate", "--run", str(trained["run_id"]))
        total = snapshot + train + evaluate
    print(f"pictures: {'given' if given else 'drawn samples'}, weights: {Path(weights).name}")
    print(f"ingest {ingest:6.1f} s ({report['stored']} images)")
    for name, seconds in (("snapshot", snapshot), ("train", train), ("evaluate", evaluate)):
        print(f"{name:8} {seconds:6.1f} s")
    print(f"snapshot → verdict {total:.1f} s, {total / LIMIT_SECONDS:.2f} of the {LIMIT_SECONDS:.0f} s allowed")
    print(verdict["message"])


if __name__ == "__main__":
    main()
