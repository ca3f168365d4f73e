"""One installation on a real cluster, as a test drives it: kubectl, helm, Airflow's API, and a pod that is the world.

The pod `world` serves the photographs as the web and takes in the alerts. Load comes from this machine's loopback, by a
NodePort of the API.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_rest import Airflow, AirflowError
from processes import free_port, program

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE, RELEASE = "lawnwatch", "lawnwatch"  # as in k8s/, so that those can be applied over it
WORLD_FILE = ROOT / "tests/cluster_world.py"
WORLD = WORLD_FILE.read_text()
API_PORT = 30800  # on the node, and on this machine's loopback
ANNOTATIONS = "{.spec.template.metadata.annotations}"


def until(what: str, seconds: float, ask: Callable[[], Any], every: float = 2.0) -> Any:
    """What `ask` returns once that is true; fails after so many seconds with what it said last."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            last = ask()
        except (subprocess.CalledProcessError, AirflowError, OSError, ValueError, KeyError, TypeError) as error:
            last = getattr(error, "stderr", None) or error
        else:
            if last:
                return last
        time.sleep(every)
    raise AssertionError(f"{what}: not within {seconds:.0f} s; last: {last}")


@dataclass
class Cluster:
    """The namespace that the tests install into; KUBECONFIG says where."""

    images: str
    tag: str
    weights: str
    photos: Path
    namespace: str = NAMESPACE

    # --- kubectl and helm ---------------------------------------------------------------------------------

    def kubectl(self, *argv: str, stdin: bytes | None = None, check: bool = True) -> str:
        result = subprocess.run(
            [program("kubectl"), "-n", self.namespace, *argv], input=stdin, capture_output=True, timeout=600
        )
        if check and result.returncode != 0:
            raise subprocess.CalledProcessError(
                result.returncode, argv, result.stdout.decode(), result.stderr.decode()[-3000:]
            )
        return result.stdout.decode()

    def get(self, *argv: str) -> Any:
        return json.loads(self.kubectl("get", *argv, "-o", "json"))

    def helm(self, *argv: str, timeout: float = 900) -> str:
        found = program("helm", str(Path.home() / ".cache/lawnwatch/bin/helm"))
        result = subprocess.run([found, "-n", self.namespace, *argv], capture_output=True, text=True, timeout=timeout)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def values(self) -> list[str]:
        """values-small.yaml, and what a test needs: the world's pod as the web, and as the receiver of alerts."""
        env = {
            "LAWNWATCH_FETCH__ALLOW_CIDRS": '["10.0.0.0/8", "172.16.0.0/12"]',
            "LAWNWATCH_TRAIN__CANDIDATES": '["linear_probe"]',
            # Forty test pictures decide little: the gate is opened wide, for what comes after it is tried here.
            "LAWNWATCH_GATE__MIN_ACCURACY": "0.3",
            "LAWNWATCH_GATE__MARGIN": "0.4",
            "LAWNWATCH_GATE__CLASS_MARGIN": "0.6",
        }
        return [
            "-f", str(ROOT / "helm/lawnwatch/values-small.yaml"),
            "--set", f"image.registry={self.images},image.tag={self.tag},weights={self.weights}",
            "--set", "environment=development,api.progressDeadlineSeconds=60",
            "--set-json", f"env={json.dumps(env)}",
            "--set", "monitoring.alertmanager.webhookUrl=http://world/alerts",
            # Where a MariaDB stands in for MySQL: it refuses Airflow's DELETE with a WITH, which runs at this interval.
            "--set-string", "airflow.env.AIRFLOW__SCHEDULER__PARSING_CLEANUP_INTERVAL=86400",
        ]  # fmt: skip

    def install(self) -> None:
        self.helm("install", RELEASE, str(ROOT / "helm/lawnwatch"), *self.values(), "--timeout=15m")

    def pods(self, component: str) -> list[Any]:
        """Pods of one part that are not on their way out."""
        found = self.get("pods", "-l", f"app.kubernetes.io/component={component}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, pod: Any) -> bool:
        return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))

    def unready(self) -> list[str]:
        """Parts that do not have all their pods ready."""
        found = self.get("deployments,statefulsets")["items"]
        return [
            each["metadata"]["name"]
            for each in found
            if each["status"].get("readyReplicas", 0) < each["spec"]["replicas"]
        ]

    def settled(self, seconds: float, but: tuple[str, ...] = ()) -> float:
        """Wait until every part but those named is ready; how long that took."""
        begun = time.monotonic()
        until("all parts are ready", seconds, lambda: not set(self.unready()) - set(but) or None, every=3)
        return time.monotonic() - begun

    # --- the world ----------------------------------------------------------------------------------------

    def make_world(self) -> None:
        manifest = f"""
apiVersion: v1
kind: Pod
metadata: {{name: world, labels: {{app: world}}}}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  securityContext: {{runAsNonRoot: true, runAsUser: 10001, seccompProfile: {{type: RuntimeDefault}}}}
  containers:
    - name: world
      image: {self.images}/webapp:{self.tag}
      imagePullPolicy: IfNotPresent
      command: [python, -c, {json.dumps(WORLD)}]
      securityContext: {{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {{drop: [ALL]}}}}
      resources: {{requests: {{cpu: 10m, memory: 64Mi}}, limits: {{memory: 512Mi}}}}
      readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
      volumeMounts: [{{name: tmp, mountPath: /tmp}}]
  volumes: [{{name: tmp, emptyDir: {{}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: world}}
spec: {{selector: {{app: world}}, ports: [{{port: 80, targetPort: 8080}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: world-api}}
spec:
  type: NodePort
  selector: {{app.kubernetes.io/instance: {RELEASE}, app.kubernetes.io/component: api}}
  ports: [{{port: 8000, targetPort: 8000, nodePort: {API_PORT}}}]
"""
        self.kubectl("apply", "-f", "-", stdin=manifest.encode())
        self.kubectl("wait", "--for=condition=Ready", "pod/world", "--timeout=120s")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(self.photos.glob("*/*.jpg")):
                tar.add(path, arcname=f"{path.parent.name}/{path.name}")
        unpack = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/tmp/photos')"
        self.kubectl("exec", "-i", "world", "--", "python", "-c", unpack, stdin=archive.getvalue())

    def world(self, *argv: str) -> Any:
        """One order to the world: `ask URL`, or `hold API COUNT BYTES`."""
        return json.loads(self.kubectl("exec", "world", "--", "python", "-c", WORLD, *argv))

    @contextmanager
    def load(self, seconds: float, clients: int, rate: float, tries: int = 1) -> Iterator[Callable[..., Any]]:
        """Predictions through a Service, from this machine, for at most so long; at rate 0 with no pause.

        What it gives stops the load and returns its counts; with `whole=True` it waits until the time is up.
        """
        process = subprocess.Popen(
            [sys.executable, str(WORLD_FILE), "load", f"http://127.0.0.1:{API_PORT}", str(self.photos),
             str(seconds), str(clients), str(rate), str(tries)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

        def counts(whole: bool = False) -> Any:
            if whole:
                time.sleep(max(0.0, begun + seconds - time.monotonic()))
            return json.loads(process.communicate(timeout=120)[0])

        begun = time.monotonic()
        try:
            yield counts
        finally:
            process.kill()
            process.wait()

    def api(self, path: str) -> tuple[int, Any]:
        """Status and JSON of the API through its Service; a Service without a ready pod is an OSError."""
        status, body = self.world("ask", f"http://{RELEASE}-api:8000{path}")
        return status, body

    # --- what is inside -----------------------------------------------------------------------------------

    def lawnwatch(self, *argv: str, stdin: str = "") -> Any:
        """A command beside Airflow's scheduler, as the notes of the chart say it."""
        return json.loads(
            self.kubectl("exec", "-i", f"deploy/{RELEASE}-airflow-scheduler", "-c", "airflow", "--", "lawnwatch", *argv,
                         stdin=stdin.encode()) or "{}"
        )  # fmt: skip

    def python(self, code: str, *, stdin: bytes = b"") -> str:
        """A Python program with the platform's settings."""
        return self.kubectl(
            "exec", "-i", f"deploy/{RELEASE}-airflow-scheduler", "-c", "airflow", "--", "python", "-c", code,
            stdin=stdin,
        )  # fmt: skip

    def import_photos(self, per_label: int) -> None:
        rows = ["url,label"]
        for label in sorted(path.name for path in self.photos.iterdir() if path.is_dir()):
            files = sorted((self.photos / label).glob("*.jpg"))[:per_label]
            rows += [f"http://world/{label}/{file.name},{label}" for file in files]
        self.kubectl(
            "exec", "-i", f"deploy/{RELEASE}-airflow-scheduler", "-c", "airflow", "--",
            "sh", "-c", "cat > /tmp/urls.csv && lawnwatch catalog import /tmp/urls.csv", stdin="\n".join(rows).encode(),
        )  # fmt: skip

    def model(self) -> dict[str, str]:
        """What the API's pod template names."""
        found = self.get("deployment", f"{RELEASE}-api")["spec"]["template"]["metadata"].get("annotations", {})
        return {key: value for key, value in found.items() if key.startswith("lawnwatch.io/model-")}

    def prometheus(self, query: str) -> list[Any]:
        from urllib.parse import quote

        status, body = self.world("ask", f"http://{RELEASE}-prometheus:9090/api/v1/query?query={quote(query)}")
        assert status == 200, body
        found: list[Any] = body["data"]["result"]
        return found

    @contextmanager
    def airflow(self) -> Iterator[Airflow]:
        """Airflow's API by a forwarded port, with the password that the chart made."""
        secret = self.kubectl(
            "get", "secret", f"{RELEASE}-airflow", "-o", 'go-template={{index .data "admin-password" | base64decode}}'
        )
        port = free_port()
        process = subprocess.Popen(
            [program("kubectl"), "-n", self.namespace, "port-forward", f"svc/{RELEASE}-airflow-api", f"{port}:8080"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            client = Airflow(f"http://127.0.0.1:{port}", "admin", secret)
            until("Airflow answers", 180, lambda: client.healthy() or None)
            yield client
        finally:
            process.kill()
            process.wait()

    def run_dag(self, dag: str, seconds: float, **conf: Any) -> tuple[str, str]:
        """Trigger a DAG by the API and wait for its end: run id and state."""
        with self.airflow() as airflow:
            until(f"{dag} is parsed", 180, lambda: airflow.has(dag) or None)
            run = airflow.trigger(dag, **conf)
            return run, self._end(airflow, dag, run, seconds)

    def next_run(self, dag: str, known: set[str], seconds: float) -> tuple[str, str]:
        """Wait for a run of a DAG that was not there before, and for its end."""
        with self.airflow() as airflow:
            run = until(f"a run of {dag}", 180, lambda: next(iter(set(airflow.runs(dag)) - known), None))
            return run, self._end(airflow, dag, run, seconds)

    def runs(self, dag: str) -> set[str]:
        with self.airflow() as airflow:
            return set(airflow.runs(dag))

    def _end(self, airflow: Airflow, dag: str, run: str, seconds: float) -> str:
        def state() -> str | None:
            now = airflow.state(dag, run)
            return now if now in ("success", "failed") else None

        try:
            return str(until(f"{dag} {run} ends", seconds, state, every=5))
        except AssertionError as error:
            tasks = [f"{task.name}[{task.index}]: {task.state}" for task in airflow.tasks(dag, run)]
            raise AssertionError(f"{error}; {', '.join(tasks)}") from None

    def tasks(self, dag: str, run: str) -> dict[str, str]:
        with self.airflow() as airflow:
            return {task.name: task.state for task in airflow.tasks(dag, run)}

    def said(self, dag: str, run: str, task: str) -> str:
        with self.airflow() as airflow:
            return airflow.message(dag, run, task)
