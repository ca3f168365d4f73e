"""`make demo`: the whole road on one machine, through a real Airflow, from image URLs to a page that answers.

    python infra/demo.py [--photos DIR] [--weights FILE] [--once]
    python infra/demo.py --stop

Everything is kept in ./var (LAWNWATCH_HOME). Running it again picks up where it was. Ports can be fixed with API_PORT,
WEB_PORT, AIRFLOW_PORT and MLFLOW_PORT. LAWNWATCH_DATABASE_URL, LAWNWATCH_STORE_URL and MLFLOW_TRACKING_URI lead to real
servers here as everywhere.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import secrets
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import reference_catalog
import samples
from airflow_rest import DONE, Airflow, AirflowError, Task
from supervise import Failed, Lock, Stopped, Supervisor, choose_port, say, sweep

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
LAWNWATCH = (PYTHON, "-m", "lawnwatch")
KERAS_WEIGHTS = (
    "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
    "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
)
ROBUST_FLOOR = "LAWNWATCH_GATE__MIN_ROBUST_ACCURACY"  # what a network of random numbers seldom reaches
REACH_SECONDS = 5.0
EVENT_SECONDS = 15.0  # an asset event that has not started its DAG by then is taken for lost
DAGS = ("data_pipeline", "training_pipeline", "inference_pipeline")
MARKS = {"success": "✓", "failed": "✗", "skipped": "–", "upstream_failed": "✗"}


# --- where pictures and weights come from ---------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What this demo works with; remembered in its home, so that the next start needs no argument."""

    home: Path
    pictures: str  # "web", "photos" or "samples"
    photos: str  # the folder that plays the web; empty for the real web
    weights: str  # "imagenet", a file, or "none"

    @property
    def origin(self) -> str:
        return reference_catalog.SAMPLE_ORIGIN if self.pictures == "samples" else reference_catalog.ORIGIN


def make_plan(photos: str, weights: str) -> Plan:
    """Decide between the arguments, what was decided before, and what can be reached; say it, loudly if it is less."""
    home = Path(os.environ.get("LAWNWATCH_HOME") or ROOT / "var").absolute()
    known = _remembered(home)
    if photos:
        folder = Path(photos).expanduser().resolve()
        if not any(any((folder / label).glob("*.jpg")) for label in reference_catalog.LABELS):
            raise Failed(
                f"PHOTOS={photos} holds no {' or '.join(f'{label}/*.jpg' for label in reference_catalog.LABELS)}: "
                "it must look like the reference data, <label>/<8 digits>.jpg."
            )
        plan = Plan(home, "photos", str(folder), "")
        say(f"Pictures: {folder} plays the web; the catalog keeps the real URLs.")
    elif known and (known.pictures == "web" or Path(known.photos).is_dir()):
        plan = replace(known, home=home)
        where = "the web" if known.pictures == "web" else f"{known.photos} plays the web"
        say(f"Pictures: as before, {where}.")
    elif _reachable(next(reference_catalog.records())[0]):
        plan = Plan(home, "web", "", "")
        say("Pictures: 400 photographs from the web, as the reference catalog lists them.")
    else:
        home = home.with_name(home.name + "-samples")
        folder = home / "drawn"
        _loudly(
            f"The web cannot be reached ({reference_catalog.ORIGIN.split('/')[2]} did not answer).",
            "Drawing SAMPLE pictures instead, so that the road can be walked. They are not photographs, and a",
            f"model that learnt from them knows nothing of lawns. They live in {home}, apart from real history.",
            "With photographs in a folder:  make demo PHOTOS=DIR   (DIR/<label>/<8 digits>.jpg)",
        )
        samples.draw(folder, samples.PER_CLASS)
        plan = Plan(home, "samples", str(folder), "")
    return replace(plan, weights=_weights(weights, _remembered(plan.home)))


def _weights(given: str, known: Plan | None) -> str:
    given = given or os.environ.get("LAWNWATCH_WEIGHTS", "")
    if not given and known and (known.weights == "imagenet" or Path(known.weights).is_file()):
        given = known.weights
    if given and given not in ("imagenet", "none"):
        file = Path(given).expanduser().resolve()
        if not file.is_file():
            raise Failed(f"There is no weights file {given}; WEIGHTS must be a file, `imagenet` or `none`.")
        say(f"Weights: {file}")
        return str(file)
    cached = Path.home() / ".keras" / "models" / KERAS_WEIGHTS.rpartition("/")[2]
    if given == "imagenet" or (not given and (cached.is_file() or _reachable(KERAS_WEIGHTS))):
        say("Weights: MobileNetV2 as trained on ImageNet, from Keras.")
        return "imagenet"
    _loudly(
        "No ImageNet weights: " + ("WEIGHTS=none was asked for." if given else "their host did not answer."),
        "MobileNetV2 starts from random numbers, and the model will be much worse than it could be.",
        f"So that one is released, the gate does not ask how it does on darkened pictures: {ROBUST_FLOOR}=0",
        "With a weights file:  make demo WEIGHTS=FILE   (Keras' MobileNetV2 1.0, 224, no top, .h5)",
    )
    return "none"


def _remembered(home: Path) -> Plan | None:
    try:
        return Plan(home=home, **json.loads((home / "demo.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(plan: Plan) -> None:
    file = plan.home / "demo.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"pictures": plan.pictures, "photos": plan.photos, "weights": plan.weights}))
    part.replace(file)


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _loudly(*lines: str) -> None:
    say("!" * 100)
    for line in lines:
        say(f"!!  {line}")
    say("!" * 100)


def play_the_web(folder: Path) -> str:
    """Serve a folder on loopback; returns its URL, with a slash at the end."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Four hundred lines about pictures would hide what matters."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


# --- the environment of everything ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ports:
    api: int
    web: int
    airflow: int
    mlflow: int


def choose_ports() -> Ports:
    taken: set[int] = set()
    return Ports(
        api=choose_port("the API", 8000, os.environ.get("API_PORT"), taken),
        web=choose_port("the web page", 8501, os.environ.get("WEB_PORT"), taken),
        airflow=choose_port("Airflow", 8080, os.environ.get("AIRFLOW_PORT"), taken),
        mlflow=choose_port("MLflow", 5000, os.environ.get("MLFLOW_PORT"), taken),
    )


def environment(plan: Plan, ports: Ports, origin: str) -> dict[str, str]:
    """What every process gets: the settings of lawnwatch and of Airflow."""
    airflow = plan.home / "airflow"
    keys = _keys(airflow)
    env = {
        "LAWNWATCH_HOME": str(plan.home),
        "LAWNWATCH_WEIGHTS": plan.weights,
        "LAWNWATCH_API_URL": f"http://127.0.0.1:{ports.api}",
        "LAWNWATCH_SERVING__PORT": str(ports.api),
        "AIRFLOW_HOME": str(airflow),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "2",  # an idle worker holds 128 MB
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "false",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{ports.airflow}/execution/",
        "AIRFLOW__CORE__FERNET_KEY": keys["fernet"],
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(ports.airflow),
        "AIRFLOW__API__BASE_URL": f"http://localhost:{ports.airflow}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": keys["session"],
        "AIRFLOW__API_AUTH__JWT_SECRET": keys["jwt"],
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{airflow / 'airflow.db'}",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # half the memory
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost"))),
    }
    if plan.weights == "none" and ROBUST_FLOOR not in os.environ:
        env[ROBUST_FLOOR] = "0"
    if origin:
        env["LAWNWATCH_FETCH__ORIGIN_MAP"] = json.dumps({plan.origin: origin})
        env["LAWNWATCH_FETCH__ALLOW_CIDRS"] = json.dumps(["127.0.0.0/8"])
    return dict(os.environ) | env


def _keys(airflow: Path) -> dict[str, str]:
    """Airflow's secrets and the login, made once and readable by this user alone."""
    airflow.mkdir(parents=True, exist_ok=True)
    file = airflow / "keys.json"
    if not file.exists():
        import base64

        keys = {
            "fernet": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "session": secrets.token_urlsafe(32),
            "jwt": secrets.token_urlsafe(48),
            "password": secrets.token_urlsafe(12),
        }
        part = file.with_suffix(".part")
        part.touch(mode=0o600)
        part.write_text(json.dumps(keys))
        part.replace(file)
    keys = json.loads(file.read_text())
    passwords = airflow / "simple_auth_manager_passwords.json.generated"
    passwords.touch(mode=0o600)
    passwords.write_text(json.dumps({"admin": keys["password"]}) + "\n")
    return {str(name): str(value) for name, value in keys.items()}


# --- the demo -------------------------------------------------------------------------------------------------


class Demo:
    """The services, and the road walked once."""

    def __init__(self, plan: Plan, ports: Ports) -> None:
        self.plan, self.ports = plan, ports
        origin = play_the_web(Path(plan.photos)) if plan.photos else ""
        env = environment(plan, ports, origin)
        self.supervisor = Supervisor(plan.home, env)
        self.mlflow_uri = env.get("MLFLOW_TRACKING_URI", "")
        self.api_url = f"http://127.0.0.1:{ports.api}"
        self.password = _keys(plan.home / "airflow")["password"]
        self.airflow = Airflow(f"http://127.0.0.1:{ports.airflow}", "admin", self.password)
        self.begun = time.monotonic()

    def up(self) -> None:
        """Start everything; the API first, for a model that is already released can answer at once."""
        boss, ports = self.supervisor, self.ports
        boss.start("API", *LAWNWATCH, "serve", port=ports.api)
        self._fill_catalog()
        self._prepare_airflow()
        for part in ("api-server", "scheduler", "dag-processor"):
            port = ports.airflow if part == "api-server" else None
            boss.start(f"airflow-{part}", PYTHON, "-m", "airflow", part, *_no_log_server(part), port=port)
        boss.start(
            "web-page", PYTHON, "-m", "streamlit", "run", str(ROOT / "webapp" / "app.py"),
            "--server.port", str(ports.web), "--server.address", "127.0.0.1", "--server.headless", "true",
            "--browser.gatherUsageStats", "false", "--server.fileWatcherType", "none", port=ports.web,
        )  # fmt: skip
        boss.wait(self._api_answers, "The API", service="API")
        if (self._ask("/model/info") or {}).get("target"):
            boss.wait(self._served_or_refused, "The released model", service="API")
        if model := self._served():
            say(f"The API answers with v{model['version']} after {self._elapsed()}.")
        say("Starting Airflow …")
        boss.wait(self.airflow.healthy, "Airflow", service="airflow-api-server")
        self.airflow.make_pools(json.loads((ROOT / "infra" / "pools.json").read_text()))
        boss.wait(lambda: all(map(self.airflow.has, DAGS)), "Airflow's reading of the DAGs", timeout=120)
        say(f"Airflow is up after {self._elapsed()}.")

    def idle_services(self) -> None:
        """What nobody waits for: started when the machine has nothing better to do."""
        self.supervisor.start("airflow-triggerer", PYTHON, "-m", "airflow", "triggerer", "--skip-serve-logs")
        if not self.mlflow_uri:
            self.supervisor.start(
                "MLflow", PYTHON, "-m", "mlflow", "server", "--workers", "1",
                "--host", "127.0.0.1", "--port", str(self.ports.mlflow),
                "--backend-store-uri", f"sqlite:///{self.plan.home / 'mlflow.db'}",
                "--artifacts-destination", (self.plan.home / "mlflow-artifacts").as_uri(),
                port=self.ports.mlflow,
            )  # fmt: skip

    def walk(self) -> bool:
        """Run the three DAGs where there is something to do. True when a model is served in the end."""
        cut_off = [(dag, run) for dag in DAGS for run, state in self.airflow.runs(dag).items() if state not in DONE]
        for dag, run in cut_off:  # of the calendar, or of a killed demo: it would hold the DAG's one place
            say(f"{dag}: dropping the run that was there before this demo's own ({run}).")
            self.airflow.give_up(dag, run)
        if not cut_off and not self._pending() and self._served():
            say("Nothing is pending and the champion is served: nothing to run.")
            return True
        known = {dag: set(self.airflow.runs(dag)) for dag in DAGS}
        states = self._follow("data_pipeline", self.airflow.trigger("data_pipeline"))
        if states is None:
            return False
        run = self._next("training_pipeline", known, expected=states["snapshot"] == "success")
        states = self._follow("training_pipeline", run)
        if states is None:
            return False
        if states["release"] == "success":
            run = self._next("inference_pipeline", known, expected=True)
            if self._follow("inference_pipeline", run) is None:
                return False
        return bool(self._served())

    def table(self, walked: bool) -> None:
        """Where everything is."""
        model = self._served()
        rows = [
            ("Web page", f"http://localhost:{self.ports.web}", "upload a photo"),
            ("API", f"http://localhost:{self.ports.api}/docs", "curl -F file=@photo.jpg "
             f"http://localhost:{self.ports.api}/predict"),
            ("Airflow", f"http://localhost:{self.ports.airflow}", f"log in as admin, password {self.password}"),
            ("MLflow", self.mlflow_uri or f"http://localhost:{self.ports.mlflow}", "runs, metrics, model versions"),
        ]  # fmt: skip
        say()
        for name, url, note in rows:
            say(f"  {name:9} {url:28} {note}")
        say()
        if model:
            say(f"  Serving {model['name']} v{model['version']} ({model['sha256'][:12]}) · {self._accuracy()}")
            if self.plan.pictures == "samples":
                say("  It learnt from drawn SAMPLE pictures: it knows nothing of real lawns.")
        else:
            say("  No model is served: POST /predict answers 503 and says why.")
        if not walked:
            say("  The road was not walked to its end; the reason is above. Airflow shows the log of every step.")
        say(f"  Everything is in {self.plan.home}; logs in {self.plan.home / 'logs'}. Ready after {self._elapsed()}.")

    # --- steps on the way -------------------------------------------------------------------------------------

    def _fill_catalog(self) -> None:
        """Every start imports the catalog again, which changes nothing when it is there."""
        sampled = self.plan.pictures == "samples"
        rows = reference_catalog.records(self.plan.origin, samples.PER_CLASS if sampled else 200)
        file = reference_catalog.write(self.plan.home / "reference.csv", rows)
        source = "sample" if sampled else "import"
        result = self._lawnwatch("catalog", "import", str(file), "--source", source)
        say(str(result.get("message", "")))

    def _prepare_airflow(self) -> None:
        """Make or upgrade Airflow's database; skipped when this version has done it."""
        from importlib.metadata import version

        stamp = self.plan.home / "airflow" / "migrated"
        wanted = version("apache-airflow-core")
        if stamp.exists() and stamp.read_text() == wanted:
            return
        say("Preparing Airflow's database …")
        self.supervisor.run(PYTHON, "-m", "airflow", "db", "migrate", log="airflow-migrate")
        stamp.write_text(wanted)

    def _pending(self) -> int:
        """Image records that still have to be fetched."""
        states = self._lawnwatch("catalog", "status").get("by_state", {})
        return int(states.get("pending", 0)) + int(states.get("claimed", 0))

    def _next(self, dag: str, known: dict[str, set[str]], *, expected: bool) -> str:
        """The run that the asset event started; events get lost, and then this starts it itself."""
        end = time.monotonic() + (EVENT_SECONDS if expected else 0)
        while True:
            fresh = [run for run in self.airflow.runs(dag) if run not in known[dag]]
            if fresh:
                return fresh[0]
            if time.monotonic() >= end:
                if expected:
                    say(f"{dag}: Airflow's asset event did not arrive; starting it directly.")
                return self.airflow.trigger(dag)
            self.supervisor.pause(1.0)

    def _follow(self, dag: str, run: str) -> dict[str, str] | None:
        """Show each task as it goes. Returns the tasks' states, or None when the run failed."""
        say(f"\n{dag}")
        shown: dict[tuple[str, int], str] = {}
        silent_since = time.monotonic()
        while True:
            try:
                state = self.airflow.state(dag, run)
                tasks = self.airflow.tasks(dag, run)
                silent_since = time.monotonic()
            except AirflowError as error:
                if time.monotonic() - silent_since > 60:
                    raise Failed(f"Airflow does not answer any more: {error}") from None
                self.supervisor.pause(1.0)
                continue
            for task in tasks:
                if shown.get((task.name, task.index)) != task.state:
                    shown[task.name, task.index] = task.state
                    self._show(dag, run, task)
            if state in DONE:
                return {name: shown[name, index] for name, index in shown} if state == "success" else None
            self.supervisor.pause(1.0)

    def _show(self, dag: str, run: str, task: Task) -> None:
        name = task.name if task.index < 0 else f"{task.name}[{task.index}]"
        if task.state == "running":
            say(f"  … {name}" + (f" (try {task.tries})" if task.tries > 1 else ""))
        elif task.state == "up_for_retry":
            say(f"  ! {name}: {self.airflow.message(dag, run, task.name, task.index)} It will be tried again.")
        elif task.state in ("success", "failed") or (task.state == "skipped" and task.seconds):
            took = f" ({task.seconds:.0f} s)" if task.seconds else ""
            said = self.airflow.message(dag, run, task.name, task.index)
            say(f"  {MARKS[task.state]} {name}{took}{': ' if said else ''}{said}")
            if task.state == "failed" and not said:
                say(f"      its log: {self.plan.home / 'airflow' / 'logs' / f'dag_id={dag}' / f'run_id={run}'}")

    # --- the API ----------------------------------------------------------------------------------------------

    def _api_answers(self) -> bool:
        return self._ask("/health") is not None

    def _served_or_refused(self) -> bool:
        info = self._ask("/model/info") or {}
        return info.get("state") == "ready" or bool(info.get("rejected"))

    def _served(self) -> dict[str, Any] | None:
        info = self._ask("/model/info") or {}
        model: dict[str, Any] | None = info.get("model") if info.get("state") == "ready" else None
        return model

    def _accuracy(self) -> str:
        evaluation = (self._ask("/model/info") or {}).get("evaluation") or {}
        accuracy = (evaluation.get("metrics") or {}).get("accuracy")
        if not accuracy:
            return "not evaluated"
        return (
            f"accuracy {accuracy['value']:.3f} (95 %: {accuracy['low']:.3f} to {accuracy['high']:.3f}) "
            f"on {evaluation.get('images', '?')} test images"
        )

    def _ask(self, path: str) -> dict[str, Any] | None:
        try:
            with urllib.request.urlopen(self.api_url + path, timeout=5) as response:
                answer = json.loads(response.read())
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None

    def _lawnwatch(self, *argv: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.supervisor.run(*LAWNWATCH, *argv, log="lawnwatch"))
        return result

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self.begun:.0f} s"


def _no_log_server(part: str) -> list[str]:
    """One machine, one disk: Airflow's page reads the logs there and needs no server for them."""
    return ["--skip-serve-logs"] if part == "scheduler" else []


# --- the program ----------------------------------------------------------------------------------------------


def homes() -> list[Path]:
    home = Path(os.environ.get("LAWNWATCH_HOME") or ROOT / "var").absolute()
    return [home, home.with_name(home.name + "-samples")]


def stop() -> int:
    """End the demos of this checkout, running or left behind."""
    for home in homes():
        pid = Lock(home).holder()
        if pid:
            say(f"Stopping the demo in {home} (process {pid}) …")
            os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 45
            while Lock(home).holder() and time.monotonic() < end:
                time.sleep(0.3)
            if Lock(home).holder():
                os.kill(pid, signal.SIGKILL)
        if count := sweep(home):
            say(f"Ended {count} process(es) that were left behind.")
    return 0


def run(photos: str, weights: str, *, once: bool) -> int:
    plan = make_plan(photos, weights)
    lock = Lock(plan.home)
    if not lock.take():
        raise Failed(f"A demo runs in {plan.home} already (process {lock.holder()}); `make stop` ends it.")
    if left := sweep(plan.home):
        say(f"Ended {left} process(es) that an earlier demo left behind.")
    _remember(plan)
    demo = Demo(plan, choose_ports())
    code = 1
    try:
        demo.up()
        walked = demo.walk()
        demo.idle_services()
        if not demo.mlflow_uri:
            mlflow = f"http://127.0.0.1:{demo.ports.mlflow}/health"
            demo.supervisor.wait(lambda: _answers(mlflow), "MLflow", service="MLflow")
        demo.table(walked)
        code = 0 if walked else 1
        if not once:
            say("  Ctrl-C ends it all.")
            while True:
                demo.supervisor.pause(60)
    except Stopped:
        say("\nStopping …")
    finally:
        demo.supervisor.end()
        lock.free()
        say("Everything has ended.")
    return code


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", default="", help="a folder that plays the web: DIR/<label>/<8 digits>.jpg")
    parser.add_argument("--weights", default="", help="MobileNetV2 weights file, `imagenet` or `none`")
    parser.add_argument("--once", action="store_true", help="end when the road is walked (exit code 1: it was not)")
    parser.add_argument("--stop", action="store_true", help="end a running demo")
    options = parser.parse_args()
    try:
        if options.stop:
            return stop()
        return run(options.photos, options.weights, once=options.once)
    except Failed as error:
        say(f"\nmake demo: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
