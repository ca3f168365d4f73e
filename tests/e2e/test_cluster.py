"""The whole platform on a real cluster, from an empty namespace on: `make test-cluster`.

The tests are one story and run in order: each stands on what the ones before have made. KUBECONFIG names a cluster
whose nodes hold the images (`make images`, then `kind load docker-image …`), with metrics-server and a default
StorageClass, and NodePort 30800 on this machine's loopback (kind: `extraPortMappings`), from where the load comes.
LAWNWATCH_TEST_WEIGHTS is a weights file inside the pipeline image; without one a simpler model is trained.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cluster import API_PORT, NAMESPACE, RELEASE, ROOT, Cluster, until
from large_pictures import png

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

FIRST_PER_LABEL = 100
Note = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def cluster(photos: Path) -> Cluster:
    return Cluster(
        images=os.environ.get("LAWNWATCH_TEST_REGISTRY", "lawnwatch"),
        tag=os.environ.get("LAWNWATCH_TEST_TAG", "0.1.0"),
        weights=os.environ.get("LAWNWATCH_TEST_WEIGHTS", "none"),
        photos=photos,
    )


@pytest.fixture(scope="module")
def note() -> Iterator[Note]:
    """Figures of this run, on the terminal and in var/cluster.json."""
    figures: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        figures[name] = value
        sys.stdout.write(f"\n  {name}: {value}\n")

    yield keep
    file = ROOT / "var/cluster.json"
    file.parent.mkdir(exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | figures, indent=1))


# ── 1. from nothing ─────────────────────────────────────────────────────────────────────────────────────────


def test_1_everything_but_the_api_is_ready_within_five_minutes(cluster: Cluster, note: Note) -> None:
    manifest = (ROOT / "k8s/00-namespace.yaml").read_bytes()
    assert f"name: {NAMESPACE}" in manifest.decode()
    cluster.kubectl("apply", "-f", "-", stdin=manifest)  # it enforces the restricted Pod Security Standard
    begun = time.monotonic()
    cluster.install()
    cluster.settled(600, but=(f"{RELEASE}-api",))
    seconds = time.monotonic() - begun
    note("seconds from helm install to all but the API ready", round(seconds))
    cluster.make_world()
    assert seconds <= 300


def test_1_every_pod_fits_two_cores_and_twelve_gigabytes(cluster: Cluster, note: Note) -> None:
    (node,) = [each["metadata"]["name"] for each in cluster.get("nodes")["items"]][:1]
    asked = cluster.kubectl("describe", "node", node).partition("Allocated resources")[2]
    cores = int(re.search(r"cpu +(\d+)m ", asked)[1]) / 1000  # type: ignore[index]
    gigabytes = int(re.search(r"memory +(\d+)Mi ", asked)[1]) * 2**20 / 1e9  # type: ignore[index]
    note("requests of all pods, the cluster's own among them", f"{cores} cores, {gigabytes:.1f} GB")
    assert cores <= 2 and gigabytes <= 12
    homeless = [pod["metadata"]["name"] for pod in cluster.get("pods")["items"] if "nodeName" not in pod["spec"]]
    assert not homeless


def test_1_the_api_says_that_there_is_no_model_yet(cluster: Cluster) -> None:
    (pod,) = cluster.pods("api")
    assert not cluster.ready(pod)
    status, info = cluster.world("ask", f"http://{pod['status']['podIP']}:8000/model/info")
    assert (status, info["state"]) == (200, "no_model")
    assert cluster.model() == {}


def test_1_the_first_release_makes_the_api_ready(cluster: Cluster, note: Note) -> None:
    cluster.import_photos(FIRST_PER_LABEL)
    begun = time.monotonic()
    known = {dag: cluster.runs(dag) for dag in ("training_pipeline", "inference_pipeline")}
    run, state = cluster.run_dag("data_pipeline", 900)
    assert state == "success", cluster.tasks("data_pipeline", run)
    run, state = cluster.next_run("training_pipeline", known["training_pipeline"], 1200)
    tasks = cluster.tasks("training_pipeline", run)
    assert (state, tasks["promote"]) == ("success", "success"), tasks
    run, state = cluster.next_run("inference_pipeline", known["inference_pipeline"], 600)
    assert state == "success", cluster.tasks("inference_pipeline", run)
    note("seconds from a trigger to the first model in service", round(time.monotonic() - begun))
    status, info = cluster.api("/model/info")
    assert (status, info["model"]["version"]) == (200, 1)
    assert cluster.model()["lawnwatch.io/model-sha256"] == info["model"]["sha256"]
    # `helm test` asks real pictures through the Service.
    assert "Phase:          Succeeded" in cluster.helm("test", RELEASE, "--timeout=5m")


def test_1_a_pod_is_ready_within_seconds(cluster: Cluster, note: Note) -> None:
    (before,) = cluster.pods("api")
    _autoscaled(cluster, 2, 3)  # which would take away a second pod that it did not ask for
    cluster.kubectl("scale", f"deployment/{RELEASE}-api", "--replicas=2")
    new = until("a second pod is ready", 60, lambda: [
        pod for pod in cluster.pods("api") if pod["metadata"]["uid"] != before["metadata"]["uid"] and cluster.ready(pod)
    ], every=0.5)[0]  # fmt: skip
    seconds = _start_to_ready(new)
    note("seconds from container start to ready, without the bundle in the cache", seconds)
    assert seconds <= 10
    # A container that ends is started again in its pod, whose folder holds the verified copy.
    name = new["metadata"]["name"]
    cluster.kubectl("exec", name, "--", "python", "-c", "import os, signal; os.kill(1, signal.SIGTERM)", check=False)

    back = _back(cluster, name)
    assert _ended(back)["exitCode"] == 0, "44: it drained and ended by itself within the grace"
    seconds = _start_to_ready(back)
    note("seconds from container start to ready, with the bundle in the cache", seconds)
    _autoscaled(cluster, 1, 3)
    cluster.kubectl("scale", f"deployment/{RELEASE}-api", "--replicas=1")
    until("one pod is left", 180, lambda: len(cluster.pods("api")) == 1 or None)
    assert seconds <= 3


def _ended(pod: Any) -> Any:
    """How the container that ran before the present one ended."""
    return pod["status"]["containerStatuses"][0]["lastState"]["terminated"]


def _restarts(pod: Any) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


def _start_to_ready(pod: Any) -> float:
    started = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    (ready,) = [one for one in pod["status"]["conditions"] if one["type"] == "Ready"]
    return datetime.fromisoformat(ready["lastTransitionTime"]).timestamp() - datetime.fromisoformat(started).timestamp()


# ── 2. a better model ───────────────────────────────────────────────────────────────────────────────────────


def test_2_a_model_of_more_photos_is_promoted_and_no_request_fails_meanwhile(cluster: Cluster, note: Note) -> None:
    cluster.import_photos(10_000)
    before = cluster.model()
    known = cluster.runs("inference_pipeline")
    with cluster.load(900, clients=4, rate=10) as counts:
        cluster.lawnwatch("ingest")
        cluster.lawnwatch("snapshot", "create")
        run, state = cluster.run_dag("training_pipeline", 1200, force=True, reason="twice the photos", budget=120)
        tasks = cluster.tasks("training_pipeline", run)
        said = cluster.said("training_pipeline", run, "evaluate")
        assert (state, tasks["promote"]) == ("success", "success"), (tasks, said)
        _, state = cluster.next_run("inference_pipeline", known, 600)
        assert state == "success"
        counted = counts()
    note("verdict on the second model", said)
    note("requests while the second model was trained and rolled out", counted)
    assert cluster.model()["lawnwatch.io/model-version"] == "2"
    assert cluster.model() != before
    assert counted["failures"] == {}
    assert set(counted["versions"]) == {"1", "2"}


def test_42_rolling_there_and_back_at_half_of_what_the_api_carries_fails_no_request(
    cluster: Cluster, note: Note
) -> None:
    before = cluster.model()
    with cluster.load(10, clients=8, rate=0) as counts:
        carried = counts(whole=True)
    rate = carried["per_second"] / 2
    note("answers a second of all that the API carries", carried)
    note("requests a second during six rollouts", round(rate, 1))
    with cluster.load(max(330, 10_500 / rate), clients=32, rate=rate) as counts:
        for _ in range(3):
            cluster.lawnwatch("rollout", "undo")
            cluster.lawnwatch("rollout", "undo")
        counted = counts(whole=True)
    note("requests during six rollouts", counted)
    assert counted["failures"] == {}
    assert counted["answered"] >= 10_000
    assert counted["per_second"] >= 0.95 * rate, "the clients sent as much as they were to"
    assert len(counted["versions"]) == 2
    assert cluster.model() == before


# ── 3. a model that must not serve ──────────────────────────────────────────────────────────────────────────

# The released bundle once more, with the answers of its golden pictures exchanged: whole, and wrong.
LIE = """
import json
from lawnwatch import bundle, registry, release
from lawnwatch.config import get_settings
from lawnwatch.catalog import Catalog
from lawnwatch.store import open_store
settings = get_settings(); catalog, store = Catalog(settings), open_store(settings)
good = release.find(settings, catalog, store)
found = bundle.read(store, good.sha256)
golden = [one.model_copy(update={"probabilities": dict(zip(one.probabilities, reversed(one.probabilities.values())))})
          for one in found.manifest.golden]
meta = found.manifest.model_copy(update={"golden": golden})
bad = bundle.write(store, {name: found.bytes_of(name) for name in found.files}, meta)
registry.tag_version(settings, good.version, "bundle_sha256", bad.sha256)
print(json.dumps({"version": good.version, "good": good.sha256, "bad": bad.sha256}))
"""
TRUTH = """
import sys
from lawnwatch import registry
from lawnwatch.config import get_settings
registry.tag_version(get_settings(), int(sys.stdin.readline()), "bundle_sha256", sys.stdin.readline().strip())
"""


def model_of(pod: dict[str, Any]) -> str | None:
    """SHA-256 of the bundle that a pod is to serve."""
    return pod["metadata"].get("annotations", {}).get("lawnwatch.io/model-sha256")


def test_45_a_bundle_that_cannot_prove_itself_never_serves_and_the_run_says_why(cluster: Cluster, note: Note) -> None:
    before = cluster.model()
    made = json.loads(cluster.python(LIE).splitlines()[-1])
    try:
        with cluster.load(150, clients=4, rate=10) as counts:
            run, state = cluster.run_dag("inference_pipeline", 600)
            counted = counts()
    finally:
        cluster.python(TRUTH, stdin=f"{made['version']}\n{made['good']}\n".encode())
    assert state == "failed", cluster.tasks("inference_pipeline", run)
    latest = cluster.lawnwatch("rollout", "history")["rollouts"][0]
    note("why the bad bundle was not rolled out", latest["reason"])
    assert (latest["state"], latest["sha256"]) == ("failed", made["bad"])
    assert "golden" in latest["reason"]
    assert cluster.model() == before
    assert counted["failures"] == {}
    assert set(counted["versions"]) == {before["lawnwatch.io/model-version"]}
    serving = before["lawnwatch.io/model-sha256"]
    until(
        "the pods of the bad one are gone",
        120,
        lambda: {model_of(pod) for pod in cluster.pods("api")} == {serving} or None,
    )


def test_3_kubectl_rollout_undo_restores_the_previous_model(cluster: Cluster) -> None:
    served = cluster.model()["lawnwatch.io/model-version"]
    cluster.lawnwatch("rollout", "undo")
    assert cluster.model()["lawnwatch.io/model-version"] != served
    cluster.kubectl("rollout", "undo", f"deployment/{RELEASE}-api")
    cluster.kubectl("rollout", "status", f"deployment/{RELEASE}-api", "--timeout=120s")
    assert cluster.model()["lawnwatch.io/model-version"] == served
    until("the Service answers with it", 30, lambda: cluster.api("/model/info")[1]["model"]["version"] == int(served))
    # The platform's own words mean the same afterwards.
    assert str(cluster.lawnwatch("rollout", "status")["target"]["entries"][0]["model_version"]) == served


# ── 4. faults ───────────────────────────────────────────────────────────────────────────────────────────────


# What serves, of the processes that a pod's containers share.
KILL = r"""
import os, signal
for process in filter(str.isdigit, os.listdir("/proc")):
    if b"\0serve\0" in open(f"/proc/{process}/cmdline", "rb").read():
        os.kill(int(process), signal.SIGKILL)
"""
LITTLE_MEMORY = "256Mi"
TRIES = 10  # of a client, 0.3 s apart: longer than Kubernetes needs to see that a container is gone


def test_43_a_killed_api_comes_back_in_its_pod_and_clients_that_try_again_lose_nothing(
    cluster: Cluster, note: Note
) -> None:
    """Where containers share processes the API is not the first of its own, which nothing in the pod could kill."""
    shared = "/spec/template/spec/shareProcessNamespace"
    _two_pods(cluster)
    _change(cluster, {"op": "add", "path": shared, "value": True})
    try:
        cluster.kubectl("rollout", "status", f"deployment/{RELEASE}-api", "--timeout=180s")
        until("two pods are left", 120, lambda: len(cluster.pods("api")) == 2 or None)
        victim, other = [pod["metadata"]["name"] for pod in cluster.pods("api")]
        with cluster.load(45, clients=4, rate=10, tries=TRIES) as counts:
            time.sleep(5)
            cluster.kubectl("exec", victim, "--", "python", "-c", KILL)
            back = _back(cluster, victim)
            counted = counts(whole=True)
        note("requests while an API was killed", counted)
        assert (_restarts(back), _ended(back)["exitCode"]) == (1, 128 + 9)
        assert _restarts(cluster.get("pod", other)) == 0
        assert counted["failures"] == {}
        assert sum(counted["retried"].values()) <= 20, "what it held, and what came before Kubernetes saw it"
        assert counted["answered"] >= 400
    finally:
        _change(cluster, {"op": "remove", "path": shared})
    cluster.kubectl("rollout", "status", f"deployment/{RELEASE}-api", "--timeout=180s")
    assert cluster.model()["lawnwatch.io/model-version"] == next(iter(counted["versions"]))


def _back(cluster: Cluster, name: str) -> Any:
    """The pod, once its container was started again and is ready."""

    def again() -> Any:
        pod = cluster.get("pod", name)
        return pod if _restarts(pod) >= 1 and cluster.ready(pod) else None

    return until("the container is back", 120, again, every=0.5)


def test_44_an_evicted_api_pod_drains(cluster: Cluster, note: Note) -> None:
    _two_pods(cluster)
    victim = cluster.pods("api")[0]["metadata"]["name"]
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": victim, "namespace": NAMESPACE},
    }
    with cluster.load(45, clients=4, rate=10) as counts:
        time.sleep(5)
        cluster.kubectl("create", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{victim}/eviction", "-f", "-",
                        stdin=json.dumps(eviction).encode())  # fmt: skip
        counted = counts(whole=True)
    note("requests while a pod was evicted", counted)
    assert counted["failures"] == {}
    _autoscaled(cluster, 1, 3)
    cluster.kubectl("scale", f"deployment/{RELEASE}-api", "--replicas=1")


def _two_pods(cluster: Cluster) -> None:
    """Two and no more, however busy those before were."""
    _autoscaled(cluster, 2, 2)
    until("two pods serve", 180, lambda: len([p for p in cluster.pods("api") if cluster.ready(p)]) == 2 or None)


def test_46_large_pictures_are_answered_or_refused_and_no_pod_runs_out_of_memory(
    cluster: Cluster, note: Note, tmp_path: Path
) -> None:
    _autoscaled(cluster, 1, 1)
    until("one pod is left", 180, lambda: len(cluster.pods("api")) == 1 or None)
    (before,) = cluster.pods("api")
    bomb = png(tmp_path / "bomb", 25_000, 25_000, depth=8, colour=0).read_bytes()  # 1.9 GB as RGB
    largest = png(tmp_path / "largest", 7142, 7000, depth=8, colour=6).read_bytes()  # 200 MB as RGBA, and allowed
    with ThreadPoolExecutor(12) as pool:
        bombs = Counter(pool.map(_predict, [bomb] * 12))
        both = Counter(pool.map(_predict, [bomb, largest] * 12))
    bodies = cluster.world("hold", f"http://{RELEASE}-api:8000", "24", "19000000")
    note("answers to pictures that are too large to decode", bombs)
    note("answers to those and the largest that may be, at once", both)
    note("answers to 24 bodies of 19 MB at once", bodies)
    (after,) = cluster.pods("api")
    peak = cluster.kubectl("exec", after["metadata"]["name"], "--", "grep", "VmHWM", "/proc/1/status").split()[1]
    note("most memory that the API had meanwhile, MB", round(int(peak) * 1024 / 1e6))
    assert bombs == {"422 too_many_pixels": 12}
    assert both["200 None"] and set(both) <= {"200 None", "422 too_many_pixels", "503 overloaded"}
    assert bodies.get("503 overloaded")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert _restarts(after) == _restarts(before)
    assert _predict(next(cluster.photos.glob("*/*.jpg")).read_bytes()) == "200 None"


def _predict(picture: bytes) -> str:
    """Status and problem code of one prediction through the Service."""
    connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=60)
    connection.request("POST", "/predict", picture, {"content-type": "image/png"})
    response = connection.getresponse()
    return f"{response.status} {json.loads(response.read()).get('code')}"


def test_46_an_api_with_too_little_memory_is_killed_and_restarts_alone(cluster: Cluster, note: Note) -> None:
    """A second pod behind the Service, with room for the model and not for large bodies."""
    (other,) = cluster.pods("api")
    template = cluster.get("deployment", f"{RELEASE}-api")["spec"]["template"]
    name = f"{RELEASE}-api-small"
    (container,) = template["spec"]["containers"]
    container["resources"] = {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": LITTLE_MEMORY}}
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": name}}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod).encode())
    try:
        small = until("the small pod serves", 120, lambda: (found := cluster.get("pod", name))
                      and cluster.ready(found) and found)  # fmt: skip
        assert _restarts(small) == 0, "it has room for the model"
        with cluster.load(60, clients=4, rate=10, tries=TRIES) as counts:
            time.sleep(5)
            bodies = cluster.world("hold", f"http://{small['status']['podIP']}:8000", "12", "19000000")
            back = _back(cluster, name)
            counted = counts(whole=True)
    finally:
        cluster.kubectl("delete", "pod", name, "--ignore-not-found")
    note("what became of 12 bodies of 19 MB where there is no room", bodies)
    note("requests meanwhile", counted)
    assert _ended(back)["reason"] == "OOMKilled"
    assert _restarts(cluster.get("pod", other["metadata"]["name"])) == _restarts(other)
    assert counted["failures"] == {}
    assert sum(counted["retried"].values()) <= 20
    assert counted["answered"] >= 500
    _autoscaled(cluster, 1, 3)


@pytest.mark.parametrize("server", ["mysql", "minio"])
def test_28_29_a_server_that_restarts_while_a_step_runs_loses_nothing(
    cluster: Cluster, note: Note, server: str
) -> None:
    before = cluster.lawnwatch("catalog", "status")
    with cluster.airflow() as airflow:
        run = airflow.trigger("data_pipeline", recheck=True)
    until("a step runs", 180, lambda: _step(cluster, "recheck"), every=0.5)
    cluster.kubectl("delete", "pod", f"{RELEASE}-{server}-0", "--grace-period=0", "--force")
    status, _ = cluster.api("/ready")
    assert status == 200, "the API serves on without it"
    cluster.settled(240)
    tries = _tries_of_a_success(cluster, "data_pipeline", run, 600)
    note(f"tries of the steps when {server} restarted", tries)
    assert until("the catalog answers", 90, lambda: cluster.lawnwatch("catalog", "status")) == before
    assert cluster.lawnwatch("snapshot", "verify")["snapshot"]


def test_32_a_training_pod_that_is_killed_is_run_again(cluster: Cluster, note: Note) -> None:
    with cluster.airflow() as airflow:
        run = airflow.trigger("training_pipeline", force=True, reason="a pod is killed", budget=60)
    victim = until("a training pod runs", 600, lambda: _step(cluster, "train", "candidate"), every=1)
    time.sleep(10)
    cluster.kubectl("delete", "pod", victim, "--grace-period=0", "--force")
    tries = _tries_of_a_success(cluster, "training_pipeline", run, 1200)
    note("tries after a killed training pod", tries)
    assert max(tries.values()) > 1


def _step(cluster: Cluster, *tasks: str) -> str | None:
    """A pod that does one of these tasks now."""
    for pod in cluster.get("pods", "-l", "app.kubernetes.io/component=step")["items"]:
        if pod["metadata"]["labels"].get("task_id") in tasks and pod["status"]["phase"] == "Running":
            return str(pod["metadata"]["name"])
    return None


def _tries_of_a_success(cluster: Cluster, dag: str, run: str, seconds: float) -> dict[str, int]:
    """Wait for the end of a run, which must be a good one; how often each task was tried."""

    def ended() -> Any:
        # Each time anew: the forwarded port ends with Airflow's API server, which may restart with its database.
        with cluster.airflow() as airflow:
            state = airflow.state(dag, run)
            return (state, airflow.tasks(dag, run)) if state in ("success", "failed") else None

    state, tasks = until(f"{dag} {run} ends", seconds, ended, every=5)
    assert state == "success", [(task.name, task.state) for task in tasks]
    return {task.name: task.tries for task in tasks}


def test_49_a_password_that_everybody_knows_is_refused(cluster: Cluster, note: Note) -> None:
    with _scratch(cluster) as elsewhere:
        install = ("install", RELEASE, str(ROOT / "helm/lawnwatch"), "--set", "secrets.create=none")
        with pytest.raises(AssertionError, match=r"secrets\.airflow is empty"):
            elsewhere.helm(*install)
        for part in ("mysql", "store", "airflow"):
            there = cluster.get("secret", f"{RELEASE}-{part}")
            mine = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": part}, "data": there["data"]}
            elsewhere.kubectl("apply", "-f", "-", stdin=json.dumps(mine).encode())
        named = ("--set", "secrets.mysql=mysql,secrets.store=store,secrets.airflow=airflow",
                 "--set", f"image.registry={cluster.images},image.tag={cluster.tag}")  # fmt: skip
        elsewhere.helm(*install, *named, "--dry-run=server")
        for key, known in (("admin-password", ""), ("api-secret-key", "ChangeMe")):
            before = elsewhere.get("secret", "airflow")["data"][key]
            _set_password(elsewhere, "airflow", stringData={key: known})
            with pytest.raises(AssertionError, match=f"Secret airflow: {key} is blank or well-known"):
                elsewhere.helm(*install, *named)
            _set_password(elsewhere, "airflow", data={key: before})
        assert elsewhere.get("deployments,statefulsets")["items"] == []

        # A chart that was rendered without the cluster goes round that: then each process refuses for itself.
        _set_password(elsewhere, "mysql", stringData={"root-password": "root", "lawnwatch-password": "changeme"})
        parts = [f"--show-only=templates/{part}.yaml" for part in ("rbac", "api", "bootstrap")]
        manifests = elsewhere.helm("template", *install[1:], *named, *parts, "--kube-version=1.34.0")
        elsewhere.kubectl("apply", "-f", "-", stdin=manifests.encode())
        said = {
            what: until(f"{what} refuses", 120, lambda what=what, argv=argv, word=word: _said(elsewhere, word, *argv))
            for what, word, argv in (
                ("the API", "LAWNWATCH_DATABASE_URL has a blank or well-known", (f"deploy/{RELEASE}-api",)),
                ("bootstrap", "MYSQL_ROOT_PASSWORD is well-known", (f"job/{RELEASE}-bootstrap", "-c", "databases")),
            )
        }
        note("what is said of well-known passwords", said)
        assert not [pod for pod in elsewhere.pods("api") if elsewhere.ready(pod)]


@contextmanager
def _scratch(cluster: Cluster) -> Iterator[Cluster]:
    """A namespace beside the installation, gone afterwards."""
    elsewhere = replace(cluster, namespace=f"{NAMESPACE}-passwords")
    elsewhere.kubectl("create", "namespace", elsewhere.namespace)
    try:
        yield elsewhere
    finally:
        elsewhere.kubectl("delete", "namespace", elsewhere.namespace, "--timeout=180s")


def _set_password(cluster: Cluster, secret: str, **change: dict[str, str]) -> None:
    cluster.kubectl("patch", "secret", secret, "-p", json.dumps(change))


def _said(cluster: Cluster, word: str, *argv: str) -> str | None:
    """The line of a container's log with these words."""
    return next((line for line in cluster.kubectl("logs", *argv).splitlines() if word in line), None)


def test_50_only_those_that_ask_kubernetes_have_a_token(cluster: Cluster) -> None:
    """What the accounts may do is asked in test_cluster_smoke.py."""
    with_token = {
        pod["metadata"]["labels"].get("task_id") or pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for pod in cluster.get("pods", "-l", "app.kubernetes.io/name=lawnwatch")["items"]
        if any("serviceAccountToken" in json.dumps(volume) for volume in pod["spec"].get("volumes", []))
    }
    processes = {f"airflow-{part}" for part in ("api", "scheduler", "dag-processor", "triggerer")}
    assert with_token - {"rollout"} == processes, "and the step that rolls out, when it runs"
    token = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    find = ("--", "python", "-c", f"import os; print(os.path.exists({token!r}))")
    assert cluster.kubectl("exec", f"deploy/{RELEASE}-api", *find).strip() == "False"
    assert cluster.kubectl("exec", f"deploy/{RELEASE}-airflow-scheduler", "-c", "airflow", *find).strip() == "True"


# ── 5. more load than one pod carries ───────────────────────────────────────────────────────────────────────


def test_5_the_autoscaler_adds_pods_under_load_and_takes_them_away(cluster: Cluster, note: Note) -> None:
    begun = time.monotonic()
    with cluster.load(150, clients=16, rate=200) as counts:
        until("a second pod serves", 150, lambda: len([p for p in cluster.pods("api") if cluster.ready(p)]) > 1 or None)
        note("seconds of load until a second pod serves", round(time.monotonic() - begun))
        note("requests while pods were added", counts())
    begun = time.monotonic()
    until("one pod is left", 420, lambda: len(cluster.pods("api")) == 1 or None, every=5)
    note("seconds without load until one pod is left", round(time.monotonic() - begun))


def test_5_requests_per_second_grow_with_the_pods(cluster: Cluster, note: Note) -> None:
    """Pods held to a quarter of a core each, so that four of them and the clients fit on a small node."""
    answered: dict[int, float] = {}
    limits = "/spec/template/spec/containers/0/resources/limits/cpu"
    _change(cluster, {"op": "add", "path": limits, "value": "250m"})
    for pods in (1, 2, 4):
        _autoscaled(cluster, pods, pods)
        cluster.kubectl("scale", f"deployment/{RELEASE}-api", f"--replicas={pods}")
        cluster.kubectl("rollout", "status", f"deployment/{RELEASE}-api", "--timeout=180s")
        until("so many pods", 180, lambda pods=pods: len(cluster.pods("api")) == pods or None)
        with cluster.load(30, clients=12, rate=150) as counts:
            answered[pods] = counts(whole=True)["answered"] / 30
    _change(cluster, {"op": "remove", "path": limits})
    _autoscaled(cluster, 1, 3)
    note("answers a second of 1, 2 and 4 pods of a quarter core", {n: round(rate, 1) for n, rate in answered.items()})
    note("scaling efficiency of 2 and 4", [round(answered[n] / answered[1] / n, 2) for n in (2, 4)])
    assert answered[4] / answered[1] / 4 >= 0.6
    until("one pod is left", 420, lambda: len(cluster.pods("api")) == 1 or None, every=5)


def _autoscaled(cluster: Cluster, least: int, most: int) -> None:
    spec = {"spec": {"minReplicas": least, "maxReplicas": most}}
    cluster.kubectl("patch", "hpa", f"{RELEASE}-api", "--type=merge", "-p", json.dumps(spec))


def _change(cluster: Cluster, change: dict[str, Any]) -> None:
    cluster.kubectl("patch", "deployment", f"{RELEASE}-api", "--type=json", "-p", json.dumps([change]))


# ── monitoring ──────────────────────────────────────────────────────────────────────────────────────────────

# Panels that are rightly empty while nothing bad has happened.
MAY_BE_EMPTY = {"Refused"}
OF_NODES = {
    "CPU of each node",
    "Memory of each node",
    "Disks of each node",
}  # monitoring.nodeExporter is off by default


@pytest.mark.parametrize("name", ["principal", "ml", "infrastructure"])
def test_every_panel_has_data_where_the_platform_runs(cluster: Cluster, name: str) -> None:
    dashboard = json.loads((ROOT / f"monitoring/dashboards/{name}.json").read_text())
    with cluster.load(40, clients=2, rate=4) as counts:
        counts(whole=True)
    time.sleep(20)
    may_be_empty = MAY_BE_EMPTY | (set() if cluster.prometheus('up{job="node"}') else OF_NODES)
    empty = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
        if panel["title"] not in may_be_empty
        and not cluster.prometheus(target["expr"].replace("$namespace", ".*"))  # as Grafana asks for all
    ]
    assert empty == []


def test_every_target_is_up(cluster: Cluster) -> None:
    # Those of a rollout that has just ended are on their way.
    until("all targets are scraped", 90, lambda: not cluster.prometheus("up == 0"))
    jobs = {each["metric"]["job"] for each in cluster.prometheus("up")}
    assert jobs - {"node"} == {"prometheus", "api", "webapp", "web-sessions", "exporter", "minio"}
    sources = {each["metric"]["source"] for each in cluster.prometheus("lawnwatch_source_up == 1")}
    assert sources == {"catalog", "mlflow", "airflow"}


def test_52_an_api_that_is_gone_is_an_alert_that_arrives_and_resolves(cluster: Cluster, note: Note) -> None:
    def alerts(status: str) -> list[Any]:
        _, received = cluster.world("ask", "http://127.0.0.1:8080/alerts")
        return [each for each in received if each[0] == "TargetMissing" and each[1] == status]

    begun = time.monotonic()
    cluster.kubectl("scale", f"deployment/{RELEASE}-api", "--replicas=0")
    until("the receiver hears of it", 420, lambda: alerts("firing"), every=5)
    note("seconds from no API to the alert", round(time.monotonic() - begun))
    begun = time.monotonic()
    cluster.kubectl("scale", f"deployment/{RELEASE}-api", "--replicas=1")
    until("it is resolved", 420, lambda: alerts("resolved"), every=5)
    note("seconds from a new API to its end", round(time.monotonic() - begun))


# ── 6. upgrade, plain manifests, and away ───────────────────────────────────────────────────────────────────


def test_6_an_upgrade_leaves_the_model_and_the_passwords(cluster: Cluster) -> None:
    model, passwords = cluster.model(), cluster.get("secret", f"{RELEASE}-mysql")["data"]
    cluster.helm("upgrade", RELEASE, str(ROOT / "helm/lawnwatch"), *cluster.values(), "--set", "api.drainSeconds=6")
    cluster.settled(300)
    assert cluster.model() == model
    assert cluster.get("secret", f"{RELEASE}-mysql")["data"] == passwords
    cluster.helm("rollback", RELEASE)
    cluster.settled(300)
    assert cluster.model() == model


def test_6_the_plain_manifests_leave_the_model(cluster: Cluster) -> None:
    model = cluster.model()
    overlay = _as_installed(cluster, cluster.kubectl("kustomize", str(ROOT / "k8s/overlays/small")))
    jobs = (f"{RELEASE}-bootstrap", f"{RELEASE}-secrets")
    cluster.kubectl("delete", "job", *jobs, "--ignore-not-found")  # the rollback's; a Job cannot be changed
    cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=overlay)
    cluster.kubectl("apply", "-f", "-", stdin=overlay)
    assert cluster.model() == model
    for job in jobs:
        cluster.kubectl("wait", "--for=condition=Complete", f"job/{job}", "--timeout=500s")
    # Every new pod, and not the old ones that are ready all the while: the template was taken and works.
    for each in cluster.get("deployments,statefulsets")["items"]:
        cluster.kubectl("rollout", "status", f"{each['kind']}/{each['metadata']['name']}", "--timeout=500s")
    assert cluster.model() == model
    status, info = cluster.api("/model/info")
    assert (status, info["model"]["sha256"]) == (200, model["lawnwatch.io/model-sha256"])
    cluster.kubectl(
        "delete", "job", *jobs, "--ignore-not-found"
    )  # not Helm's: the next install would refuse to take them over
    cluster.helm("upgrade", RELEASE, str(ROOT / "helm/lawnwatch"), *cluster.values())
    cluster.settled(300)
    assert cluster.model() == model


def _as_installed(cluster: Cluster, manifests: str) -> bytes:
    """Manifests with the images of this installation, and the environment that may fetch from the world's pod."""
    images = rf"\b{RELEASE}/(api|webapp|pipeline|mlflow|minio):[\w.-]+"
    manifests = re.sub(images, rf"{cluster.images}/\1:{cluster.tag}", manifests)
    return re.sub(r'(name: LAWNWATCH_ENVIRONMENT,?\s+value: "?)production', r"\1development", manifests).encode()


def test_6_after_uninstall_and_install_everything_is_there(cluster: Cluster) -> None:
    before = cluster.lawnwatch("catalog", "status")
    history = [each["id"] for each in cluster.lawnwatch("rollout", "history")["rollouts"]]
    passwords = {part: cluster.get("secret", f"{RELEASE}-{part}")["data"] for part in ("mysql", "store", "airflow")}
    cluster.helm("uninstall", RELEASE, "--wait", "--timeout=5m")
    assert len(cluster.get("pvc")["items"]) == 3
    cluster.install()
    cluster.settled(600, but=(f"{RELEASE}-api",))
    for part, data in passwords.items():
        assert cluster.get("secret", f"{RELEASE}-{part}")["data"] == data
    assert cluster.lawnwatch("catalog", "status") == before
    assert [each["id"] for each in cluster.lawnwatch("rollout", "history")["rollouts"]] == history
    cluster.lawnwatch("rollout", "start")
    status, info = cluster.api("/model/info")
    assert (status, info["state"]) == (200, "ready")
