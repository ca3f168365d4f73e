"""The reloader of compose's profile `dev`, as a process with a command of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

RELOADER = Path(__file__).resolve().parents[2] / "infra/reload.py"
# Writes what it is and which process, and ends at SIGTERM with a code of its own.
CHILD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
open(sys.argv[1], "a").write(f"WORD {os.getpid()}\\n")
while True:
    time.sleep(60)
"""


class Reloaded:
    """A program in a folder, and the reloader over it."""

    def __init__(self, folder: Path) -> None:
        self.program, self.said = folder / "package/program.py", folder / "said"
        self.program.parent.mkdir()
        self.write("first")
        command = [sys.executable, str(self.program), str(self.said)]
        # Alone with the standard library, as in the API's image.
        self.process = subprocess.Popen([sys.executable, "-I", "-S", str(RELOADER), str(folder / "package"), *command])

    def write(self, word: str) -> None:
        self.program.write_text(CHILD.replace("WORD", word))

    def starts(self) -> list[tuple[str, int]]:
        """What each start so far said of itself."""
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        return [(word, int(number)) for word, number in (line.split() for line in lines)]

    def wait_for(self, starts: int) -> tuple[str, int]:
        wait_for(lambda: len(self.starts()) >= starts)
        return self.starts()[starts - 1]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def reloaded(tmp_path: Path) -> Iterator[Reloaded]:
    running = Reloaded(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()
    for _, number in running.starts():
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_a_changed_file_starts_it_again_and_sigterm_ends_both_with_the_childs_code(reloaded: Reloaded) -> None:
    _, first = reloaded.wait_for(1)
    (reloaded.program.parent / "notes.txt").write_text("no Python")
    time.sleep(1.5)
    assert len(reloaded.starts()) == 1
    reloaded.write("second")
    word, second = reloaded.wait_for(2)
    assert word == "second"
    assert not runs(first)
    reloaded.process.terminate()
    assert reloaded.process.wait(20) == 7
    assert not runs(second)
    assert len(reloaded.starts()) == 2


def test_what_ended_by_a_mistake_starts_again_when_that_is_mended(reloaded: Reloaded) -> None:
    _, first = reloaded.wait_for(1)
    reloaded.program.write_text("this is no Python")
    wait_for(lambda: not runs(first))
    time.sleep(1.5)
    assert reloaded.process.poll() is None
    reloaded.write("mended")
    assert reloaded.wait_for(2)[0] == "mended"


def test_a_signal_after_the_program_ended_is_the_end_with_its_code(reloaded: Reloaded) -> None:
    _, first = reloaded.wait_for(1)
    os.kill(first, signal.SIGKILL)
    reloaded.process.terminate()
    assert reloaded.process.wait(20) == 128 + signal.SIGKILL
