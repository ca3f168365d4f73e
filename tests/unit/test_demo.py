"""`make demo`: what it decides before it starts anything, and that nothing it starts outlives it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import demo
import reference_catalog
import supervise
from processes import free_port

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No web, no weights host, no cached weights, and a home of its own."""
    monkeypatch.setattr(reference_catalog, "ORIGIN", "http://127.0.0.1:9/")
    monkeypatch.setattr(demo, "KERAS_WEIGHTS", "http://127.0.0.1:9/weights.h5")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAWNWATCH_HOME", str(tmp_path / "var"))
    monkeypatch.delenv("LAWNWATCH_WEIGHTS", raising=False)
    monkeypatch.setattr(demo.samples, "PER_CLASS", 2)
    return tmp_path


# --- what it decides ------------------------------------------------------------------------------------------


def test_without_web_and_weights_it_says_so_loudly_and_keeps_samples_apart(nowhere, capsys):
    plan = demo.make_plan("", "")
    assert (plan.pictures, plan.weights) == ("samples", "none")
    assert plan.home == nowhere / "var-samples" and not (nowhere / "var").exists()
    said = capsys.readouterr().out
    assert "SAMPLE" in said and "No ImageNet weights" in said and said.count("!!!!!!!!!!") >= 4
    assert len(list(plan.home.glob("drawn/*/*.jpg"))) >= 4


def test_a_network_of_random_numbers_is_not_asked_how_it_does_in_the_dark(nowhere, monkeypatch, capsys):
    plan = demo.make_plan("", "none")
    ports = demo.Ports(api=1, web=2, airflow=3, mlflow=4)
    floor = "LAWNWATCH_GATE__MIN_ROBUST_ACCURACY"
    assert f"{floor}=0" in capsys.readouterr().out
    assert demo.environment(plan, ports, "")[floor] == "0"
    assert floor not in demo.environment(replace(plan, weights="imagenet"), ports, "")
    monkeypatch.setenv(floor, "0.5")
    assert demo.environment(plan, ports, "")[floor] == "0.5"


def test_a_folder_plays_the_web_and_is_remembered(nowhere, photos, capsys):
    weights = nowhere / "weights.h5"
    weights.write_bytes(b"weights")
    plan = demo.make_plan(str(photos), str(weights))
    assert (plan.pictures, plan.home, plan.origin) == ("photos", nowhere / "var", reference_catalog.ORIGIN)
    plan.home.mkdir()
    demo._remember(plan)
    assert demo.make_plan("", "") == plan, "the next start needs no argument"
    assert "!!!" not in capsys.readouterr().out


def test_wrong_arguments_are_one_clear_sentence(nowhere, photos):
    with pytest.raises(supervise.Failed, match="holds no dandelion"):
        demo.make_plan(str(nowhere), "")
    with pytest.raises(supervise.Failed, match="no weights file"):
        demo.make_plan(str(photos), "missing.h5")


def test_the_reference_catalog_is_the_four_hundred():
    rows = list(reference_catalog.records())
    assert len(rows) == len(set(rows)) == 400
    assert rows[-1] == (
        "https://raw.githubusercontent.com/btphan95/greenr-airflow/refs/heads/master/data/grass/00000199.jpg",
        "grass",
    )


def test_a_taken_port_is_named_and_another_is_used(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        chosen = supervise.choose_port("the API", port, None, set())
        assert chosen > port
        assert f"Port {port} for the API is taken" in capsys.readouterr().out
        with pytest.raises(supervise.Failed, match=f"Port {port} for the API is taken"):
            supervise.choose_port("the API", 1, str(port), set())
    assert supervise.choose_port("the API", free_port(), None, {chosen}) != chosen


# --- what it starts -------------------------------------------------------------------------------------------

# A service that starts a child in a session of its own, as Airflow does with its tasks.
SUPERVISOR = """
import sys, time
from pathlib import Path
import supervise
from supervise import Lock, Stopped, Supervisor, say
supervise.GRACE_SECONDS = 1.0
home = Path(sys.argv[1])
lock = Lock(home)
assert lock.take()
boss = Supervisor(home, dict(__import__("os").environ))
boss.start("nest", "sh", "-c", "setsid sleep 300 & exec sleep 300")
boss.start("stubborn", "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
say("up")
try:
    while True:
        boss.pause(1)
except Stopped:
    boss.end()
"""


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "infra")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    wait_for(lambda: len(started(tmp_path)) >= 4)
    yield process
    process.kill()
    process.wait()
    supervise.sweep(tmp_path, grace=0)


def started(home: Path) -> set[int]:
    return {process.pid for process in supervise.left_behind(home)}


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_a_signal_ends_everything_it_started(supervisor, tmp_path, monkeypatch):
    supervisor.send_signal(signal.SIGTERM)
    supervisor.wait(timeout=40)
    assert started(tmp_path) == set()


def test_a_killed_supervisor_takes_everything_along(supervisor, tmp_path):
    assert supervise.Lock(tmp_path).holder() == supervisor.pid
    assert supervise.Lock(tmp_path).take() is False
    supervisor.kill()
    supervisor.wait()
    assert supervise.Lock(tmp_path).holder() is None
    wait_for(lambda: started(tmp_path) == set(), 30)


def test_stop_finds_what_even_the_watchdog_left(supervisor, tmp_path, monkeypatch, capsys):
    (watchdog,) = (p for p in psutil.Process(supervisor.pid).children() if "supervise.py" in " ".join(p.cmdline()))
    watchdog.kill()
    supervisor.kill()
    supervisor.wait()
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("LAWNWATCH_HOME", str(tmp_path))
    assert len(started(tmp_path)) >= 3  # the fourth is a `sleep 0.1`, which comes and goes
    assert demo.stop() == 0
    assert "left behind" in capsys.readouterr().out
    assert started(tmp_path) == set()


def test_a_service_that_dies_is_started_again_and_told(tmp_path, capsys):
    handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    boss = supervise.Supervisor(tmp_path, dict(os.environ))
    try:
        boss.start("API", "sleep", "300")
        first = boss.services["API"].process
        assert first is not None
        psutil.Process(first.pid).kill()
        first.wait()
        wait_for(lambda: boss.tick() or boss.services["API"].process not in (None, first))
        said = capsys.readouterr().out
        assert "The API ended unexpectedly (SIGKILL)" in said and "starting again" in said
    finally:
        boss.end()
        for sig, handler in handlers.items():
            signal.signal(sig, handler)


# A service whose child holds the port, as MLflow's does; it goes with a code of its own where the port is taken.
LISTENER = """
import os, socket, sys, time
held = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if os.fork():
    held.close()
time.sleep(300)
"""


@pytest.fixture
def boss(tmp_path: Path) -> Iterator[supervise.Supervisor]:
    handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    boss = supervise.Supervisor(tmp_path, dict(os.environ))
    yield boss
    boss.end()
    for sig, handler in handlers.items():
        signal.signal(sig, handler)


def kill_service(boss: supervise.Supervisor, name: str) -> subprocess.Popen[bytes]:
    first = boss.services[name].process
    assert first is not None
    first.kill()
    first.wait()
    return first


def comes_up(boss: supervise.Supervisor, port: int) -> bool:
    boss.tick()
    return not supervise.port_is_free(port)


def test_what_is_left_of_a_dead_service_does_not_keep_its_port(boss: supervise.Supervisor) -> None:
    port = free_port()
    boss.start("API", sys.executable, "-c", LISTENER, str(port), port=port)
    wait_for(lambda: comes_up(boss, port))
    first = kill_service(boss, "API")
    boss.pause(4)
    assert boss.services["API"].process not in (None, first)
    wait_for(lambda: comes_up(boss, port))
    assert len(boss.services["API"].deaths) == 1


def test_a_service_whose_port_was_taken_waits_for_it_and_says_who_has_it(
    boss: supervise.Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    boss.start("API", sys.executable, "-c", LISTENER, str(port), port=port)
    wait_for(lambda: comes_up(boss, port))
    for process in supervise.left_behind(boss.home, by=os.getpid()):
        if str(port) in process.cmdline():
            process.kill()
    wait_for(lambda: supervise.port_is_free(port))
    with socket.create_server(("127.0.0.1", port)):
        boss.pause(6)
        said = capsys.readouterr().out
        assert said.count(f"Port {port} of the API is taken") == 1, said
        assert f"(process {os.getpid()})" in said and "Free it" in said
        assert "starting again" not in said and len(boss.services["API"].deaths) == 1
        with pytest.raises(supervise.Failed, match=f"Port {port} of the API is taken"):
            boss.wait(lambda: False, "The API", service="API", timeout=20)
    wait_for(lambda: comes_up(boss, port))
    assert "The API is starting again" in capsys.readouterr().out


def test_a_service_that_cannot_stay_up_is_a_failure_with_its_last_words(tmp_path):
    handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    boss = supervise.Supervisor(tmp_path, dict(os.environ))
    try:
        boss.start("API", "sh", "-c", "echo no such table; exit 3")
        with pytest.raises(supervise.Failed, match=r"(?s)does not stay up.*no such table"):
            boss.wait(lambda: False, "The API", service="API", timeout=20)
    finally:
        boss.end()
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
