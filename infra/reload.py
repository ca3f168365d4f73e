"""Run a command, and start it again whenever a Python file in a folder changes: python reload.py FOLDER COMMAND...

For the API of compose's profile `dev`. It needs nothing but Python, for the image holds only what serving needs. A
command that ends by itself, such as by a half-written line, starts again at the next change. A signal is passed on, and
the end of the command is then the end of this, with its exit code.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

EVERY_SECONDS = 0.5
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def main(folder: Path, command: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they wait until they are asked for
    seen, stale, told = changed_at(folder), False, False
    child = start(command)
    while True:
        if asked := signal.sigtimedwait(SIGNALS, EVERY_SECONDS):
            told = True
            child.send_signal(asked.si_signo)
        if child.poll() is not None:
            if told:
                return child.returncode if child.returncode >= 0 else 128 - child.returncode
            if stale:
                child, stale = start(command), False
        now = changed_at(folder)
        if now != seen and not told:
            names = ", ".join(sorted({str(path.relative_to(folder)) for path, _ in now ^ seen}))
            print(f"changed: {names}; starting again", flush=True)
            seen, stale = now, True
            child.terminate()


def changed_at(folder: Path) -> set[tuple[Path, int]]:
    """Each Python file and when it was written."""
    found = set()
    for path in folder.rglob("*.py"):
        try:
            found.add((path, path.stat().st_mtime_ns))
        except FileNotFoundError:  # an editor's draft, gone since it was listed
            continue
    return found


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """A child that hears the signals, which it would inherit as blocked."""
    return subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python reload.py FOLDER COMMAND...")
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
