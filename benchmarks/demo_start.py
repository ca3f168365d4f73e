"""How long `make demo` takes in a fresh clone: first start to first answer, and second start to answering.

The package cache is as warm as it is; LAWNWATCH_TEST_PHOTOS and LAWNWATCH_WEIGHTS become PHOTOS= and WEIGHTS=.
Prints both times beside what is allowed. Ports 8000, 8080, 8501 and 5000 must be free.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(clone: Path) -> float:
    """Run `make demo` until the API is ready; returns the seconds that took, and ends it."""
    argv = ["make", "demo"]
    argv += [f"PHOTOS={photos}"] if (photos := os.environ.get("LAWNWATCH_TEST_PHOTOS")) else []
    argv += [f"WEIGHTS={weights}"] if (weights := os.environ.get("LAWNWATCH_WEIGHTS")) else []
    began = time.monotonic()
    with (clone / "demo.log").open("ab") as log:
        demo = subprocess.Popen(argv, cwd=clone, stdout=log, stderr=log, start_new_session=True)
    try:
        while time.monotonic() - began < 1200:
            if demo.poll() is not None:
                sys.exit(f"make demo ended early:\n{(clone / 'demo.log').read_text()[-3000:]}")
            try:
                with urllib.request.urlopen("http://127.0.0.1:8000/ready", timeout=2):
                    return time.monotonic() - began
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        sys.exit("make demo did not answer within 20 minutes")
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGINT)
            demo.wait(timeout=120)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "lawnwatch"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        first, second = start(clone), start(clone)
    print(f"fresh clone → first answer {first:6.1f} s, {first / 360:.2f} of the 360 s allowed")
    print(f"second start → answering   {second:6.1f} s, {second / 45:.2f} of the 45 s allowed")


if __name__ == "__main__":
    main()
