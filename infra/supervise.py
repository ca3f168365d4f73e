"""Start services, start them again when they die, and end every one of them, whatever happens to the supervisor.

Every process that is started carries MARKER in its environment, and so do all its descendants, in whatever session:
what must end is found by that mark, never by a name that another's process may bear. A watchdog, which dies last, ends
it all when the supervisor is killed outright: Airflow's scheduler alone would first wait for its running task.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

MARKER = "LAWNWATCH_DEMO"  # the home folder and the supervisor's process id
GRACE_SECONDS = 20.0
MAX_LOOKS = 10  # for what outlived it; a process that the kernel will not end must not keep the demo for ever
PORT_SECONDS = 2.0  # between looks at a port that another process took


class Stopped(Exception):
    """The user, or a signal, asked for the end."""


class Failed(Exception):
    """Something that the demo cannot go on without did not come up; the text says what to do."""


def say(text: str = "") -> None:
    print(text, flush=True)


# --- one at a time in a folder --------------------------------------------------------------------------------


class Lock:
    """Held while a demo runs in a home folder; the kernel lets go of it when the holder dies."""

    def __init__(self, home: Path) -> None:
        self.file = home / "demo.lock"
        self._stream: IO[str] | None = None

    def take(self) -> bool:
        """True when it is ours now."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        stream = self.file.open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            return False
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        self._stream = stream
        return True

    def free(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def holder(self) -> int | None:
        """The process that holds it, or None."""
        if not self.file.exists():
            return None
        with self.file.open("r+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(stream.read() or 0) or None
        return None


def mark(home: Path, supervisor: int) -> str:
    """The value of MARKER for what a supervisor starts."""
    return f"{home}:{supervisor}"


def left_behind(home: Path, *, by: int | None = None) -> list[psutil.Process]:
    """Processes that a demo in this home started, at any depth; only those of one supervisor when it is named."""
    found = []
    for process in psutil.process_iter():
        try:
            where, _, supervisor = process.environ().get(MARKER, "").rpartition(":")
            if where == str(home) and by in (None, int(supervisor)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def sweep(home: Path, *, by: int | None = None, grace: float | None = None) -> int:
    """End what a demo in this home started and what still runs. Returns how many processes there were."""
    processes = left_behind(home, by=by)
    for process in processes:
        _signal(process.pid, signal.SIGTERM)
    psutil.wait_procs(processes, timeout=GRACE_SECONDS if grace is None else grace)
    for _ in range(MAX_LOOKS):  # a process may start another between the look that finds it and its end
        stubborn = left_behind(home, by=by)
        if not stubborn:
            break
        for process in stubborn:
            _signal(process.pid, signal.SIGKILL)
        psutil.wait_procs(stubborn, timeout=1.0)
    return len(processes)


def watch(home: Path, supervisor: int) -> None:
    """The watchdog: wait until the supervisor is gone, however it went, and end what it started."""
    while sys.stdin.buffer.read(1):
        pass
    sweep(home, by=supervisor)


def _signal(pid: int, sig: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sig)


# --- ports ----------------------------------------------------------------------------------------------------


def choose_port(name: str, wanted: int, fixed: str | None, taken: set[int]) -> int:
    """`wanted`, or the next free port and a line that says so.

    Raises:
        Failed: the user fixed the port and somebody has it.
    """
    port = int(fixed) if fixed else wanted
    if port not in taken and port_is_free(port):
        taken.add(port)
        return port
    who = _listener(port)
    if fixed:
        raise Failed(f"Port {port} for {name} is taken{who}. Free it, or choose another.")
    other = next(p for p in range(port + 1, port + 1000) if p not in taken and port_is_free(p))
    say(f"Port {port} for {name} is taken{who}: using {other} instead.")
    taken.add(other)
    return other


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _listener(port: int) -> str:
    """` by NAME (process N)`, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            here = connection.laddr  # an empty tuple where there is none
            if connection.status == psutil.CONN_LISTEN and here and here.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return ""


# --- services -------------------------------------------------------------------------------------------------


@dataclass
class Service:
    """A process that should run for as long as the demo does."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: Path
    port: int | None = None
    process: subprocess.Popen[bytes] | None = None
    deaths: list[float] = field(default_factory=list)
    start_again_at: float = 0.0
    port_lost: str = ""  # who took its port, while that is what it waits for


class Supervisor:
    """Everything happens in the main thread: every wait is also the moment when the dead are raised."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.home = home
        # Airflow renames its processes, which by default overwrites the environment that the mark is read from.
        self.env = env | {MARKER: mark(home, os.getpid()), "SPT_NOENV": "1"}
        self.services: dict[str, Service] = {}
        self.stopping = False
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sig, self._stop)
        # Its stdin is a pipe that nobody writes to: it ends when this process does, by whatever death.
        self._watchdog = subprocess.Popen(
            [sys.executable, __file__, str(home), str(os.getpid())], stdin=subprocess.PIPE, start_new_session=True
        )

    def _stop(self, signum: int, frame: object) -> None:
        if self.stopping:  # asked twice: at once
            sweep(self.home, by=os.getpid(), grace=0)
            os._exit(130)
        self.stopping = True

    def start(self, name: str, *argv: str, port: int | None = None, **env: str) -> None:
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        service = Service(name, list(argv), env, logs / f"{name}.log", port)
        self.services[name] = service
        self._launch(service)

    def _launch(self, service: Service) -> None:
        with service.log.open("ab") as log:
            service.process = subprocess.Popen(
                service.argv,
                env=self.env | service.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *argv: str, timeout: float = 300.0, log: str = "setup") -> str:
        """Run a command to its end and return its stdout.

        Raises:
            Failed: it failed; the text holds the end of what it said.
        """
        file = self.home / "logs" / f"{log}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            process = subprocess.Popen(
                argv,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,
            )
        end = time.monotonic() + timeout
        while True:
            try:
                output, _ = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                self.tick()
                if time.monotonic() > end:
                    process.kill()
                    raise Failed(f"`{' '.join(argv)}` did not end within {timeout:.0f} s; see {file}") from None
        if process.returncode:
            said = (file.read_text(errors="replace") + output.decode(errors="replace")).strip()[-600:]
            raise Failed(f"`{' '.join(argv)}` failed ({process.returncode}):\n{said}\nMore in {file}")
        return output.decode()

    def tick(self) -> None:
        """Raise what died; raise Stopped when the end was asked for."""
        if self.stopping:
            raise Stopped
        now = time.monotonic()
        for service in self.services.values():
            if service.process is None:
                if now >= service.start_again_at:
                    self._start_again(service)
            elif service.process.poll() is not None:
                dead, service.process = service.process, None
                service.deaths = [*(at for at in service.deaths if now - at < 120), now]
                service.start_again_at = now + min(30, 2 ** (len(service.deaths) - 1))
                say(f"The {service.name} ended unexpectedly ({_ending(dead.returncode)}); its log: {service.log}")
                if service.port is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(dead.pid, signal.SIGKILL)  # a child that it left, as MLflow does, keeps the port

    def _start_again(self, service: Service) -> None:
        """Launch it, or wait on while another process has its port: it would only die of that."""
        if service.port is None or port_is_free(service.port):
            service.port_lost = ""
            self._launch(service)
            say(f"The {service.name} is starting again.")
            return
        service.start_again_at = time.monotonic() + PORT_SECONDS
        if not service.port_lost:
            service.port_lost = f"Port {service.port} of the {service.name} is taken{_listener(service.port)}."
            say(
                f"{service.port_lost} Free it, and the {service.name} starts again; or end the demo and start it anew, "
                "and it takes another port."
            )

    def wait(self, ready: Callable[[], bool], what: str, *, service: str = "", timeout: float = 180.0) -> None:
        """Wait until `ready`.

        Raises:
            Failed: it took longer than `timeout`, or its service died three times or lost its port.
        """
        end = time.monotonic() + timeout
        while not ready():
            self.tick()
            watched = self.services.get(service)
            if watched is not None and watched.port_lost:
                raise Failed(f"{watched.port_lost} Free it, or start anew, which takes another port.")
            if watched is not None and len(watched.deaths) >= 3:
                raise Failed(f"{what} does not stay up. The end of its log:\n{_tail(watched.log)}")
            if time.monotonic() > end:
                where = f" The end of its log:\n{_tail(watched.log)}" if watched else ""
                raise Failed(f"{what} did not come up within {timeout:.0f} s.{where}")
            time.sleep(0.3)

    def pause(self, seconds: float) -> None:
        """Sleep while watching over the services."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(0.3, left))

    def end(self) -> None:
        """End every service and all that they started."""
        self.services.clear()
        sweep(self.home, by=os.getpid())
        self._watchdog.communicate()


def _tail(log: Path) -> str:
    return "\n".join("    " + line for line in log.read_text(errors="replace").splitlines()[-15:])


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
