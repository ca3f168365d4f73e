"""The service against its ceiling, its peers and an attack, over real sockets, in turns; prints ratios.

    python benchmarks/serving/run.py --bundle var/store/bundles/<sha256> --photos DIR SECTION …

Sections: rates, large, latency, overload, recording, start, memory, scaling; all when none is named. Every figure is
the median of --rounds turns, in each of which all that is compared is measured once after the other; what they share
of a noisy machine cancels in the ratio. CPU per request is the server's own (with all its processes), so it hardly
depends on who else uses the machine. The ceiling is what decode and inference reach in one process without HTTP, less
the share of the cores that the load generator used itself.

Peers are measured when --peers names a folder of virtual environments `bentoml`, `litserve`, `mlserver` (each with
that package, ai-edge-litert, opencv-python-headless, pillow and numpy), and --student an interpreter with Keras.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import load
import processes

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
CORES = os.cpu_count() or 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server under test, in processes of its own."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    folder: Path = HERE
    path: str = "/predict"
    v2: str = ""  # the model's name, for a server of the Open Inference Protocol
    base64: bool = False
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self, picture: bytes) -> float:
        """Seconds from the process's start to its first answer."""
        env = {**os.environ, **self.env, "PEER_PORT": str(self.port), "LAWNWATCH_SERVING__PORT": str(self.port)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        argv = [part.replace("{port}", str(self.port)) for part in self.argv]
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            argv, env=env, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        sent = load.base64_json(self.path, picture) if self.base64 else load.request(self.path, picture)
        sent = load.inference(self.v2, picture) if self.v2 else sent
        while time.perf_counter() - begun < 120:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self.process.returncode}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
                    sock.sendall(sent)
                    if b" 200 " in sock.recv(65536)[:20]:
                        return time.perf_counter() - begun
            except OSError:
                pass
            time.sleep(0.01)
        raise RuntimeError(f"{self.name} did not answer")

    def stop(self) -> None:
        if self.process is not None:
            for each in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(self.process.pid, each)
                    self.process.wait(15)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
            self.process = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def load(self, photos: Path, seconds: float, *options: str) -> dict[str, Any]:
        """One turn: the load generator's report, with the server's CPU and memory."""
        argv = [sys.executable, str(HERE / "load.py"), f"127.0.0.1:{self.port}", "--photos", str(photos)]
        argv += ["--path", self.path, "--seconds", str(seconds), *(["--v2", self.v2] if self.v2 else [])]
        argv += [*(["--base64"] if self.base64 else []), *options]
        before = processes.cpu_seconds(self.pid)
        found: dict[str, Any] = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
        used = processes.cpu_seconds(self.pid) - before
        found["cpu_ms"] = 1000 * used / max(1, found["statuses"].get("200", 0))
        found["pss_mib"] = processes.pss_mib(self.pid)
        return found


def prepare(released: Path, folder: Path, photos: Path, large: Path) -> tuple[dict[str, Path], str]:
    """Homes to serve from and large pictures; returns each variant's model file, and what the served one is."""
    import homes
    from PIL import Image

    from lawnwatch import bundle

    for number, photo in enumerate(sorted(photos.rglob("*.jpg"))[:4]):
        Image.open(photo).convert("RGB").resize((4000, 3000)).save(large / f"{number}.jpg", "JPEG", quality=85)
    models = {}
    for variant in ("float32", "served"):
        published = homes.make(released, folder / variant, "" if variant == "served" else variant)
        models[variant] = folder / variant / "store" / bundle.key(published.sha256, bundle.MODEL)
    manifest = published.manifest
    chosen = manifest.variants[manifest.served]
    said = (
        f"served: {manifest.served}, accuracy {100 * chosen.accuracy_change:+.2f} % against float32 Keras "
        f"on {chosen.images} held-out pictures"
    )
    return models, said


class Bench:
    """What the sections share."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.photos: Path = given.photos
        self.picture = next(self.photos.rglob("*.jpg")).read_bytes()
        self.large = folder / "large"
        self.large.mkdir()
        # In a process that ends: whoever has the same libraries in memory makes the server's share of them look less.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as once:
            self.models, said = once.submit(prepare, given.bundle, folder, self.photos, self.large).result()
        print(said)

    def ours(self, name: str, variant: str, **env: str) -> Server:
        """This service, in a copy of the variant's home, without keeping pictures unless asked to."""
        home = self.folder / f"home-{name}"
        if not home.exists():
            shutil.copytree(self.folder / variant, home)
        settings = {"LAWNWATCH_HOME": str(home), "LAWNWATCH_SERVING__RECORD_IMAGES": "none", **env}
        return Server(name, [self.given.python, "-m", "lawnwatch", "serve"], {"PYTHONPATH": str(SOURCE), **settings})

    def peers(self) -> list[Server]:
        """The packaged servers whose environments there are, on the float32 graph, one worker a core.

        Each once with the decode that its users write, and once, as `name+`, with this project's.
        """
        if self.given.peers is None:
            return []
        return self._peers("usual") + self._peers("lawnwatch")

    def _peers(self, decode: str) -> list[Server]:
        work = {"PEER_MODEL": str(self.models["float32"]), "PYTHONPATH": f"{SOURCE}:{HERE / 'peers'}"}
        work["PEER_DECODE"] = decode
        found, peers = [], self.given.peers.resolve()
        for name in ("bentoml", "litserve", "mlserver"):
            python, here = peers / name / "bin" / "python", HERE / "peers"
            if not python.exists():
                continue
            if name == "bentoml":
                argv = [str(python), "-m", "bentoml", "serve", "bentoml_service:Lawn", "-p", "{port}"]
                found.append(Server(name, argv, {**work, "BENTOML_DO_NOT_TRACK": "1"}, here))
            elif name == "litserve":
                found.append(Server(name, [str(python), "litserve_server.py"], work, here, base64=True))
            else:
                settings = self.folder / f"mlserver-{decode}"
                settings.mkdir(exist_ok=True)
                model = {"name": "lawn", "implementation": "mlserver_runtime.Lawn"}
                (settings / "model-settings.json").write_text(json.dumps(model))
                server = Server(name, [str(peers / name / "bin" / "mlserver"), "start", "."], work, settings, v2="lawn")
                ports = {"http_port": server.port, "grpc_port": free_port(), "metrics_port": free_port()}
                host = {"host": "127.0.0.1", "parallel_workers": 2, "debug": False}
                (settings / "settings.json").write_text(json.dumps({**host, **ports}))
                found.append(server)
        for server in found:
            server.name += "+" if decode == "lawnwatch" else ""
        return found

    def student(self) -> list[Server]:
        if self.given.student is None:
            return []
        argv = [self.given.student, "-m", "uvicorn", "student:app", "--port", "{port}", "--log-level", "error"]
        return [Server("student", argv, {"TF_CPP_MIN_LOG_LEVEL": "3"}, HERE / "peers")]

    def ceiling(self, variant: str, photos: Path, seconds: float, *options: str) -> dict[str, float]:
        argv = [self.given.python, str(HERE / "ceiling.py"), str(self.models[variant]), "--photos", str(photos)]
        argv += options
        env = {**os.environ, "PYTHONPATH": str(SOURCE)}
        run = subprocess.run([*argv, "--seconds", str(seconds)], env=env, capture_output=True, check=True)
        found: dict[str, float] = json.loads(run.stdout)
        return found

    def started(self, servers: list[Server]) -> list[Server]:
        """Those of the servers that start here; the others are named."""
        running = []
        for server in servers:
            try:
                server.start(self.picture)
                server.load(self.photos, 1.0, "--connections", "4")  # warm
                running.append(server)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(f"not measured: {server.name}: {error}")
                server.stop()
        return running

    def turns(self, measures: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        """Each measure once a round, for all rounds."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
        for number in range(self.given.rounds):
            for name, measure in measures.items():
                found[name].append(measure())
            said = ", ".join(f"{name} {each[-1].get('rate', 0):.0f}/s" for name, each in found.items())
            print(f"  round {number + 1}: {said}", flush=True)
        return found


def median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in found)


def ratio(a: list[dict[str, Any]], b: list[dict[str, Any]], name: str = "rate") -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(x[name] / y[name] for x, y in zip(a, b, strict=True) if y[name])


def rates(bench: Bench, photos: Path | None = None, connections: int = 32) -> None:
    """The service, its ceiling and its peers, closed loop."""
    photos = photos or bench.photos
    seconds = bench.given.seconds
    servers = bench.started(
        [bench.ours("fp32", "float32"), bench.ours("served", "served"), *bench.peers(), *bench.student()]
    )
    options = ("--connections", str(connections), "--timeout", "60")
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        f"ceiling {variant}": lambda v=variant: bench.ceiling(v, photos, seconds)  # type: ignore[misc]
        for variant in ("float32", "served")
    }
    for server in servers:
        measures[server.name] = lambda s=server: s.load(photos, seconds, *options)  # type: ignore[misc]
    try:
        found = bench.turns(measures)
    finally:
        for server in servers:
            server.stop()
    print(f"{'':14}{'req/s':>8}{'p50 ms':>8}{'p99 ms':>8}{'CPU ms':>8}{'load CPU':>9}{'PSS MiB':>9}")
    for name, each in found.items():
        if name.startswith("ceiling"):
            print(f"{name:14.14}{median(each, 'rate'):8.1f}{'':16}{median(each, 'cpu_ms'):8.2f}")
            continue
        row = "".join(f"{median(each, key):8.1f}" for key in ("rate", "p50_ms", "p99_ms", "cpu_ms"))
        print(f"{name:14}{row}{median(each, 'cpu_share'):9.2f}{median(each, 'pss_mib'):9.1f}")
    for ours, variant in (("fp32", "float32"), ("served", "served")):
        top = found[f"ceiling {variant}"]
        net = [{"rate": t["rate"] * (1 - o["cpu_share"] / CORES)} for t, o in zip(top, found[ours], strict=True)]
        cpu = ratio(top, found[ours], "cpu_ms")
        print(f"{ours} / ceiling: {ratio(found[ours], net):.2f} by rate, {cpu:.2f} by CPU")
        for server in servers:
            if server.name not in ("fp32", "served"):
                against = found[server.name]
                by_cpu = ratio(against, found[ours], "cpu_ms")
                print(f"{ours} / {server.name}: {ratio(found[ours], against):.2f} by rate, {by_cpu:.2f} by CPU")


def large(bench: Bench) -> None:
    """Photographs of 12 megapixels."""
    rates(bench, bench.large, 8)


def latency(bench: Bench) -> None:
    """p50 and p99 of each server at 80 % of what its closed loop reached in the same round.

    Beside them the bare work, in one process and at our servers' rates: what the machine itself does to the tail.
    """
    servers = bench.started([bench.ours("fp32", "float32"), bench.ours("served", "served"), *bench.peers()])

    peaks: dict[str, float] = {}

    def measure(server: Server) -> dict[str, Any]:
        peaks[server.name] = server.load(bench.photos, bench.given.seconds)["rate"]
        rate = str(0.8 * peaks[server.name])
        return server.load(bench.photos, bench.given.seconds, "--rate", rate, "--connections", "64")

    def bare(name: str, variant: str) -> dict[str, Any]:
        return bench.ceiling(variant, bench.photos, bench.given.seconds, "--rate", str(0.8 * peaks[name]))

    measures: dict[str, Callable[[], dict[str, Any]]] = {
        server.name: lambda s=server: measure(s)  # type: ignore[misc]
        for server in servers
    }
    measures |= {"bare fp32": lambda: bare("fp32", "float32"), "bare served": lambda: bare("served", "served")}
    try:
        found = bench.turns(measures)
    finally:
        for server in servers:
            server.stop()
    for name, each in found.items():
        over = statistics.median(one["p99_ms"] / one["p50_ms"] for one in each)
        print(
            f"{name:10} p50 {median(each, 'p50_ms'):.1f} ms, p99 {median(each, 'p99_ms'):.1f} ms, p99 / p50 {over:.2f}"
        )


def overload(bench: Bench) -> None:
    """256 connections, which all have a place, and 384, which have not; of clients that heed Retry-After and of clients
    that do not; and how long recovery takes.
    """
    crowds = {
        f"{count} {manner}": ("--connections", count, "--timeout", "30", *options)
        for count in ("256", "384")
        for manner, options in (("polite", ["--polite"]), ("rude", []))
    }
    for variant in ("served", "float32"):
        server = bench.ours(f"overload-{variant}", variant)
        server.start(bench.picture)

        def recovery(server: Server = server) -> dict[str, Any]:
            begun, answered = time.perf_counter(), False
            while not answered:
                found = server.load(bench.photos, 0.2, "--connections", "1")
                answered = set(found["statuses"]) == {"200"}
            return {"rate": 0.0, "seconds": time.perf_counter() - begun}

        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "peak": lambda s=server: s.load(bench.photos, bench.given.seconds),  # type: ignore[misc]
            **{
                name: lambda s=server, o=options: s.load(bench.photos, bench.given.seconds, *o)  # type: ignore[misc]
                for name, options in crowds.items()
            },
            "after": recovery,
        }
        try:
            found = bench.turns(measures)
        finally:
            server.stop()
        for kind in crowds:
            each = found[kind]
            print(
                f"{variant} {kind}: goodput / peak {ratio(each, found['peak']):.2f}, answered p99 "
                f"{median(each, 'p99_ms'):.0f} ms, refused {median(each, 'refused'):.0f} with p99 "
                f"{median(each, 'refused_p99_ms'):.0f} ms, time-outs {sum(one['timeouts'] for one in each)}"
            )
        print(f"{variant}: answered again after {median(found['after'], 'seconds'):.1f} s")


def recording(bench: Bench) -> None:
    """What recording costs: nothing kept, rows, rows and pictures (the embedded default)."""
    servers = [
        bench.ours("unrecorded", "served", LAWNWATCH_SERVING__RECORD_QUEUE="1"),
        bench.ours("rows", "served", LAWNWATCH_SERVING__RECORD_QUEUE="100000"),
        bench.ours(
            "pictures", "served", LAWNWATCH_SERVING__RECORD_QUEUE="100000", LAWNWATCH_SERVING__RECORD_IMAGES="all"
        ),
    ]
    # With a lock on the catalog nothing is written, and a queue of one is always full: answering without recording.
    servers = bench.started(servers)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(bench.folder / "home-unrecorded" / "catalog.db")], stdin=subprocess.PIPE
    )
    time.sleep(1)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        server.name: lambda s=server: s.load(bench.photos, bench.given.seconds)  # type: ignore[misc]
        for server in servers
    }
    try:
        found = bench.turns(measures)
    finally:
        holder.kill()
        for server in servers:
            server.stop()
    for name in ("rows", "pictures"):
        by_cpu = ratio(found[name], found["unrecorded"], "cpu_ms") - 1
        by_rate = 1 - ratio(found[name], found["unrecorded"])
        print(f"recording {name}: {100 * by_rate:+.1f} % of the rate, {100 * by_cpu:+.1f} % more CPU")


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
sys.stdin.read()
"""


def start(bench: Bench) -> None:
    """From the process's start to its first answer, bytecode compiled and bundle cached."""
    found = []
    for number in range(bench.given.rounds + 1):
        server = bench.ours("start", "served")
        seconds = server.start(bench.picture)
        cpu = processes.cpu_seconds(server.pid)
        server.stop()
        if number:  # the first compiles and fills the cache
            found.append({"seconds": seconds, "cpu": cpu})
            print(f"  {seconds:.2f} s, {cpu:.2f} s of CPU", flush=True)
    shortest = min(each["seconds"] for each in found)
    print(
        f"start: median {median(found, 'seconds'):.2f} s, shortest {shortest:.2f} s, CPU {median(found, 'cpu'):.2f} s"
    )


def memory(bench: Bench) -> None:
    """Proportional memory after 10,000 mixed requests, then its growth over --minutes."""
    server = bench.ours("memory", "served", LAWNWATCH_SERVING__RECORD_IMAGES="all")
    server.start(bench.picture)  # makes the tables, which is a job of its own on a cluster
    time.sleep(3)
    server.stop()
    server.start(bench.picture)
    mixed = bench.folder / "mixed"
    mixed.mkdir()
    for number, photo in enumerate(sorted(bench.photos.rglob("*.jpg"))[:198]):
        (mixed / f"{number:03}.jpg").write_bytes(photo.read_bytes())
    (mixed / "099.jpg").write_bytes((bench.large / "0.jpg").read_bytes())
    (mixed / "100.jpg").write_bytes(b"\xff\xd8\xff nothing")
    try:
        print(f"ready: {processes.pss_mib(server.pid):.1f} MiB", flush=True)
        answered = 0
        while answered < 10_000:
            answered += sum(server.load(mixed, 10)["statuses"].values())
        time.sleep(10)  # the queue of records is written
        first = processes.pss_mib(server.pid)
        print(f"after {answered} mixed requests: {first:.1f} MiB", flush=True)
        end = time.monotonic() + 60 * bench.given.minutes
        while time.monotonic() < end:
            pss = server.load(mixed, 20)["pss_mib"]
            print(f"  {pss:.1f} MiB", flush=True)
        time.sleep(10)
        print(f"growth over {bench.given.minutes:g} minutes: {processes.pss_mib(server.pid) - first:+.1f} MiB")
    finally:
        server.stop()


def scaling(bench: Bench) -> None:
    """Threads in one process, and processes (pods) side by side with the connections dealt out evenly."""
    one = [bench.ours(f"threads-{n}", "served", LAWNWATCH_SERVING__THREADS=str(n)) for n in (1, 2, 4)]
    pods = [bench.ours(f"pod-{n}", "served", LAWNWATCH_SERVING__THREADS="1") for n in range(2)]
    servers = bench.started([*one, *pods])

    def both() -> dict[str, Any]:
        argv = [sys.executable, str(HERE / "load.py"), "--photos", str(bench.photos)]
        argv += ["--seconds", str(bench.given.seconds), "--connections", "16"]
        runs = [subprocess.Popen([*argv, f"127.0.0.1:{pod.port}"], stdout=subprocess.PIPE) for pod in pods]
        return {"rate": sum(json.loads(run.communicate()[0])["rate"] for run in runs)}

    measures: dict[str, Callable[[], dict[str, Any]]] = {
        server.name: lambda s=server: s.load(bench.photos, bench.given.seconds)  # type: ignore[misc]
        for server in one
    }
    try:
        found = bench.turns({**measures, "2 pods": both})
    finally:
        for server in servers:
            server.stop()
    for name, each in found.items():
        print(
            f"{name}: {median(each, 'rate'):.0f}/s, {ratio(each, found['threads-2']):.2f} of two threads in one process"
        )


SECTIONS: dict[str, Callable[[Bench], None]] = {
    each.__name__: each for each in (rates, large, latency, overload, recording, start, memory, scaling)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--bundle", type=Path, required=True, help="a released bundle's folder")
    parser.add_argument("--photos", type=Path, required=True, help="a folder of *.jpg at any depth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn")
    parser.add_argument("--minutes", type=float, default=2.0, help="of the memory section's second half")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the service")
    parser.add_argument("--peers", type=Path, help="folder of virtual environments")
    parser.add_argument("--student", help="interpreter with Keras and TensorFlow")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    with tempfile.TemporaryDirectory(prefix="lawnwatch-serving-") as folder:
        bench = Bench(given, Path(folder))
        for name in given.sections or SECTIONS:
            print(f"\n{name}: {SECTIONS[name].__doc__} (load average {os.getloadavg()[0]:.1f})", flush=True)
            SECTIONS[name](bench)


if __name__ == "__main__":
    main()
