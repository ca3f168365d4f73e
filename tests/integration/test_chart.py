"""The chart and what is rendered from it, as a cluster would read them: valid, hardened, in sync, strict about values.

No cluster runs here; tests/e2e/test_cluster.py installs the chart on one.
"""

from __future__ import annotations

import ast
import base64
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from lawnwatch.config import PLACEHOLDERS, ServingSettings, Settings
from processes import program

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/lawnwatch"
# fmt: off
VALUES: dict[str, tuple[str, ...]] = {
    "default": (),
    "small": ("-f", str(CHART / "values-small.yaml")),
    "production": ("-f", str(CHART / "values-production.yaml"), "--api-versions=monitoring.coreos.com/v1"),
    "operator": ("--set", "monitoring.operator=true,monitoring.labels.release=stack",
                 "--api-versions=monitoring.coreos.com/v1"),
    "secrets by a job": ("--set", "secrets.create=job"),
    "upgrade": ("--is-upgrade", "--set", "secrets.create=job"),
    "node exporter": ("--set", "monitoring.nodeExporter.enabled=true"),
    "gateway": ("--set", "httpRoute.enabled=true,httpRoute.gateway=edge,api.autoscaling.requestsInFlight=8"),
}
# fmt: on
CRDS = {"ServiceMonitor", "PrometheusRule", "HTTPRoute"}

WORKER = "ConfigMap/lawnwatch-airflow/pod.yaml"  # the template of the steps' pods

NODE_EXPORTER = "DaemonSet/lawnwatch-node-exporter"

Object = dict[str, Any]


def helm(*argv: str) -> subprocess.CompletedProcess[str]:
    found = program("helm", str(Path.home() / ".cache/lawnwatch/bin/helm"))
    return subprocess.run([found, *argv], capture_output=True, text=True, cwd=ROOT)


@cache
def rendered(name: str) -> list[Object]:
    result = helm("template", "lawnwatch", str(CHART), "-n", "lawnwatch", "--kube-version=1.34.0", *VALUES[name])
    assert result.returncode == 0, result.stderr
    return [each for each in yaml.safe_load_all(result.stdout) if each]


@cache
def manifests() -> list[Object]:
    files = sorted((ROOT / "k8s").glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text()) if each]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Name and specification of every pod that these objects make, the steps' pods included."""
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield name, each["spec"]
        elif "template" in each.get("spec", {}):
            yield name, each["spec"]["template"]["spec"]
        elif "pod.yaml" in each.get("data", {}):
            yield f"{name}/pod.yaml", yaml.safe_load(each["data"]["pod.yaml"])["spec"]


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


# ── what a cluster takes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", VALUES)
def test_every_object_is_valid_to_the_last_field(name: str) -> None:
    for each in rendered(name):
        if each["kind"] not in CRDS:
            kubernetes_validate.validate(each, "1.34", strict=True)


def test_the_plain_manifests_and_the_charts_readme_are_what_the_chart_says() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "infra/render_chart.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_plain_manifests_are_valid_and_hold_no_secret() -> None:
    for each in manifests():
        kubernetes_validate.validate(each, "1.34", strict=True)
        assert each["kind"] != "Secret"
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "lawnwatch"
        assert not [key for key in each["metadata"].get("annotations") or {} if key.startswith("helm.sh/")]


@cache
def overlay(name: str) -> list[Object]:
    kustomize = Path(program("kubectl", str(Path.home() / ".cache/lawnwatch/bin/kustomize"), "kustomize"))
    verb = "build" if kustomize.name == "kustomize" else "kustomize"
    built = subprocess.run(
        [kustomize, verb, f"k8s/overlays/{name}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [each for each in yaml.safe_load_all(built) if each]


@pytest.mark.parametrize("name", ["small", "production"])
def test_an_overlay_builds_to_valid_objects(name: str) -> None:
    for each in overlay(name):
        kubernetes_validate.validate(each, "1.34", strict=True)


def test_the_overlay_production_has_more_of_what_is_stateless() -> None:
    assert find(overlay("production"), "HorizontalPodAutoscaler", "lawnwatch-api")["spec"]["minReplicas"] == 3


def test_the_overlay_small_is_what_helm_installs_with_the_small_values() -> None:
    """Volumes, pods and steps: otherwise neither can be applied over the other, nor train on two cores."""
    built = {(each["kind"], each["metadata"]["name"]): each for each in overlay("small")}
    for each in rendered("small"):
        if each["kind"] != "Secret" and "helm.sh/hook" not in each["metadata"].get("annotations", {}):
            assert plain(built[each["kind"], each["metadata"]["name"]]) == plain(each)


def plain(value: Any) -> Any:
    """An object without its namespace and what only Helm reads or knows; the steps' pod in it as an object."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    helms = {"helm.sh/chart", "app.kubernetes.io/managed-by", "namespace", "checksum/secrets"}
    made = {key: plain(yaml.safe_load(each) if key == "pod.yaml" else each)
            for key, each in value.items() if key not in helms}  # fmt: skip
    return {key: each for key, each in made.items() if (key, each) != ("annotations", {})}


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("api.replica=3", "replica"),
        ("monitoring.alertmanager.webhook=http://x", "webhook"),
        ("apii.replicas=3", "apii"),
        ("image.tag=latest", "tag"),
        ("mysql.image=mysql:latest", "image"),
        ("api.drainSeconds=soon", "drainSeconds"),
        ("secrets.create=true", "create"),
        ("mysql.storage=lots", "storage"),
        ("airflow.steps.trian.cpu=500m,airflow.steps.trian.memory=1Gi", "trian"),
        ("airflow.steps.train.cpu=1,airflow.steps.train.nodeSelectors.pool=x", "nodeSelectors"),
        (r"podAnnotations.lawnwatch\.io/model-version=3", "lawnwatch.io/model-version"),
        ("serviceAccounts.annotations.steps.role=x", "steps"),
        ("api.resources.requests.cpu=-1", "cpu"),
    ],
)
def test_a_value_that_is_not_known_or_not_possible_is_an_error_that_names_it(setting: str, named: str) -> None:
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", setting)
    assert result.returncode != 0
    assert named in result.stderr


def test_a_server_that_is_switched_off_must_be_named() -> None:
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", "mysql.enabled=false")
    assert result.returncode != 0
    assert "mysql.host is needed" in result.stderr


def test_a_ca_for_the_mysql_that_the_chart_brings_is_an_error_that_says_so() -> None:
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", "mysql.caSecret=ca")
    assert result.returncode != 0
    assert "mysql.caSecret is for a MySQL of your own" in result.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("mysql.host=db.example.org", "mysql.host is for a MySQL of your own"),
        ("minio.endpoint=https://s3.example.org", "are for an S3 of your own"),
        ("minio.buckets.lawnwatch=photos", "are for an S3 of your own"),
        ("minio.accessKeys.mlflow=AKIA", "are for an S3 of your own"),
        (
            "monitoring.enabled=false,monitoring.alertmanager.webhookUrl=http://x",
            "are for the Alertmanager of this chart",
        ),
        (
            "monitoring.operator=true,monitoring.alertmanager.webhookSecret=mine",
            "are for the Alertmanager of this chart",
        ),
        (
            "monitoring.alertmanager.webhookSecret=mine,monitoring.alertmanager.webhookUrl=http://x",
            "leave one of them empty",
        ),
    ],
)
def test_a_value_that_the_others_leave_no_use_for_is_an_error_that_says_so(setting: str, said: str) -> None:
    """Otherwise catalog and pictures go into the bundled servers, or into a bucket that nobody makes."""
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", setting)
    assert result.returncode != 0
    assert said in result.stderr


def test_a_whole_core_may_be_a_number() -> None:
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
                  "api.resources.requests.cpu=1")  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_schema_knows_the_steps_of_the_dags() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    words = set(schema["properties"]["airflow"]["properties"]["steps"]["propertyNames"]["enum"])
    texts = [file.read_text() for file in (ROOT / "dags").glob("*.py")]
    assert set(re.findall(r'step\(\s*"\w+",\s*"(\w+)"', "".join(texts))) == words


def test_every_pod_is_scheduled_as_the_values_say() -> None:
    text = helm(
        "template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
        "scheduling.nodeSelector.pool=ml,scheduling.priorityClassName=high,scheduling.tolerations[0].operator=Exists,"
        "scheduling.affinity.nodeAffinity.x=y,secrets.create=job",
    ).stdout  # fmt: skip
    made = dict(pods([each for each in yaml.safe_load_all(text) if each]))
    assert len(made) > 12
    for pod, spec in made.items():
        assert spec["nodeSelector"] == {"pool": "ml"}, pod
        assert spec["priorityClassName"] == "high", pod
        assert spec["tolerations"] == [{"operator": "Exists"}], pod
        assert spec["affinity"] == {"nodeAffinity": {"x": "y"}}, pod


def test_every_pod_has_the_annotations_of_the_values_and_its_own() -> None:
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
                "podAnnotations.team=lawn,secrets.create=job,monitoring.nodeExporter.enabled=true").stdout  # fmt: skip
    objects = [each for each in yaml.safe_load_all(text) if each]
    made = [each["spec"]["template"] for each in objects if "template" in each.get("spec", {})]
    made += [find(objects, "Pod", "lawnwatch-test-predict")]
    made += [yaml.safe_load(find(objects, "ConfigMap", "lawnwatch-airflow")["data"]["pod.yaml"])]
    assert len(made) == len(dict(pods(objects)))
    assert [each["metadata"] for each in made if each["metadata"]["annotations"]["team"] != "lawn"] == []
    assert find(objects, "Pod", "lawnwatch-test-predict")["metadata"]["annotations"]["helm.sh/hook"] == "test"
    prometheus = find(objects, "StatefulSet", "lawnwatch-prometheus")["spec"]["template"]
    assert "checksum/config" in prometheus["metadata"]["annotations"]


def test_an_account_has_the_annotations_of_its_own() -> None:
    given = "serviceAccounts.annotations.step.role=fetch,serviceAccounts.annotations.secrets.role=make"
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
                f"secrets.create=job,{given}").stdout  # fmt: skip
    accounts = {
        each["metadata"]["name"]: each["metadata"].get("annotations", {}).get("role")
        for each in yaml.safe_load_all(text)
        if each and each["kind"] == "ServiceAccount"
    }
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["serviceAccounts"]["properties"]
    assert {f"lawnwatch-{each}" for each in schema["annotations"]["propertyNames"]["enum"]} == set(accounts)
    assert {name: role for name, role in accounts.items() if role} == {
        "lawnwatch-step": "fetch",
        "lawnwatch-secrets": "make",
    }


def test_a_step_is_told_its_nodes() -> None:
    gpu = {"key": "gpu", "operator": "Exists"}
    train = {"cpu": "4", "memory": "8Gi", "nodeSelector": {"pool": "gpu"}, "tolerations": [gpu]}
    told = _environments("--set-json", f"airflow.steps.train={json.dumps(train)}")[WORKER]["LAWNWATCH_STEP_RESOURCES"]
    asked = Settings(step_resources=json.loads(told["value"])).step_resources["train"]
    assert asked.node_selector == {"pool": "gpu"}
    assert [(each.key, each.operator) for each in asked.tolerations] == [("gpu", "Exists")]


def test_every_pod_may_pull_from_a_private_registry() -> None:
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
                "image.pullSecrets={mine},monitoring.nodeExporter.enabled=true,secrets.create=job").stdout  # fmt: skip
    for pod, spec in pods([each for each in yaml.safe_load_all(text) if each]):
        assert spec["imagePullSecrets"] == [{"name": "mine"}], pod


def test_an_operator_that_is_not_there_is_an_error_that_says_so() -> None:
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", "monitoring.operator=true")
    assert result.returncode != 0
    assert "install the Prometheus operator first" in result.stderr


def test_an_autoscaler_whose_least_is_more_than_its_most_is_an_error() -> None:
    few = "api.autoscaling.minReplicas=4,api.autoscaling.maxReplicas=3"
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", few)
    assert result.returncode != 0
    assert "minReplicas is 4 and maxReplicas 3" in result.stderr


def test_the_schema_knows_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: Object, part: Object, path: str) -> None:
        part = schema["definitions"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part
        if not isinstance(values, dict) or "properties" not in part:
            return
        assert part["additionalProperties"] is False, path
        if path.endswith("resources"):
            return
        assert set(part["properties"]) - {"global"} == set(values), path
        for key, value in values.items():
            compare(value, part["properties"][key], f"{path}.{key}")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


# ── what must never be in it ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", VALUES)
def test_every_pod_passes_the_restricted_pod_security_standard(name: str) -> None:
    for pod, spec in pods(rendered(name)):
        if pod == NODE_EXPORTER:
            continue  # in a namespace of its own
        assert spec["securityContext"]["runAsNonRoot"] is True, pod
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert not [each for each in spec.get("volumes", []) if "hostPath" in each], pod
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), pod
        for each in containers(spec):
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, (pod, each["name"])
            assert not [port for port in each.get("ports", []) if "hostPort" in port], pod
            assert ":" in each["image"] and not each["image"].endswith(":latest"), pod


def test_the_node_exporter_alone_sees_the_node_and_may_change_nothing() -> None:
    objects = rendered("node exporter")
    apart = [each for each in objects if each["metadata"].get("namespace") == "lawnwatch-node"]
    assert {each["kind"] for each in apart} == {"DaemonSet", "Service"}
    namespace = find(objects, "Namespace", "lawnwatch-node")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    spec = dict(pods(objects))[NODE_EXPORTER]
    assert not {"hostPID", "hostIPC"} & spec.keys()
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsUser"] == 65534
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (mount,) = container["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == ("root", True)
    assert spec["volumes"] == [{"name": "root", "hostPath": {"path": "/"}}]


def test_prometheus_finds_every_node() -> None:
    objects = rendered("node exporter")
    service = find(objects, "Service", "lawnwatch-node-exporter")
    config = yaml.safe_load(find(objects, "ConfigMap", "lawnwatch-prometheus")["data"]["prometheus.yml"])
    (node,) = [each["dns_sd_configs"][0] for each in config["scrape_configs"] if each["job_name"] == "node"]
    name = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc.cluster.local."
    assert (node["names"], node["port"]) == ([name], service["spec"]["ports"][0]["port"])
    assert service["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"node exporter"}))
def test_nothing_is_made_outside_of_the_namespace(name: str) -> None:
    """So that an installation needs no rights beyond its namespace."""
    for each in rendered(name):
        assert each["kind"] not in {"Namespace", "ClusterRole", "ClusterRoleBinding", "PersistentVolume"}
        assert each["metadata"].get("namespace", "lawnwatch") == "lawnwatch"


def test_a_second_node_exporter_beside_an_operators_is_an_error_that_says_so() -> None:
    both = "monitoring.operator=true,monitoring.nodeExporter.enabled=true"
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", both)
    assert result.returncode != 0
    assert "kube-prometheus-stack brings a node exporter" in result.stderr


@pytest.mark.parametrize("name", ["default", "node exporter", "gateway"])
def test_prometheus_takes_the_configuration_of_the_chart(name: str, tmp_path: Path) -> None:
    for file, text in find(rendered(name), "ConfigMap", "lawnwatch-prometheus")["data"].items():
        (tmp_path / file).write_text(text.replace("/etc/prometheus/", f"{tmp_path}/"))
    checked = subprocess.run([program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")],
                             capture_output=True, text=True)  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_only_those_get_a_token_that_ask_kubernetes_something() -> None:
    with_token = {pod for pod, spec in pods(rendered("secrets by a job")) if spec["automountServiceAccountToken"]}
    assert with_token == {
        "Job/lawnwatch-secrets",
        *(f"Deployment/lawnwatch-airflow-{part}" for part in ("api", "scheduler", "dag-processor", "triggerer")),
        "Pod/lawnwatch-test-predict",
    }


def test_fault_50_a_rollout_may_patch_one_deployment_and_nobody_reads_secrets() -> None:
    roles = {each["metadata"]["name"]: each["rules"] for each in rendered("default") if each["kind"] == "Role"}
    assert roles == {
        "lawnwatch-rollout": [
            {"apiGroups": ["apps"], "resources": ["deployments"], "resourceNames": ["lawnwatch-api"],
             "verbs": ["get", "patch"]},
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        ],
        "lawnwatch-airflow": [
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "get", "list", "watch", "patch", "delete"]},
            {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
        ],
    }  # fmt: skip
    holders = {each["metadata"]["name"]: {subject["name"] for subject in each["subjects"]}
               for each in rendered("default") if each["kind"] == "RoleBinding"}  # fmt: skip
    assert holders == {
        "lawnwatch-rollout": {"lawnwatch-rollout", "lawnwatch-airflow"},
        "lawnwatch-airflow": {"lawnwatch-airflow"},
    }
    assert not [each for each in rendered("default") if each["kind"] in ("ClusterRole", "ClusterRoleBinding")]


def test_fault_49_passwords_are_long_and_new_at_every_installation() -> None:
    first, second = [
        yaml.safe_load_all(helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0").stdout) for _ in range(2)
    ]
    made = [
        {(each["metadata"]["name"], key): value for each in objects if each and each["kind"] == "Secret"
         for key, value in each["data"].items()}
        for objects in (first, second)
    ]  # fmt: skip
    assert len(made[0]) == 13
    assert all(len(value) >= 40 for value in made[0].values())
    assert not [key for key, value in made[0].items() if made[1][key] == value]


@pytest.mark.parametrize(
    ("named", "made"),
    [
        ("secrets.mysql=mine", ["lawnwatch-airflow", "lawnwatch-store"]),
        ("secrets.mysql=mine,secrets.store=mine,secrets.airflow=mine", None),
    ],
)
def test_fault_50_the_job_that_makes_secrets_may_never_read_any_other(named: str, made: list[str] | None) -> None:
    """To Kubernetes a rule for no name is a rule for every name."""
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
                f"secrets.create=job,{named}").stdout  # fmt: skip
    roles = {each["metadata"]["name"]: each["rules"] for each in yaml.safe_load_all(text)
             if each and each["kind"] == "Role"}  # fmt: skip
    assert [rule["resourceNames"] for rule in roles.get("lawnwatch-secrets", []) if "get" in rule["verbs"]] == (
        [made] if made else []
    )
    assert ("lawnwatch-secrets" in text) == bool(made)


@pytest.mark.parametrize("part", ["mysql", "store", "airflow"])
def test_fault_49_secrets_of_your_own_must_be_named(part: str) -> None:
    named = [f"secrets.{other}=mine" for other in ("mysql", "store", "airflow") if other != part]
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
                  ",".join(["secrets.create=none", *named]))  # fmt: skip
    assert result.returncode != 0
    assert f"secrets.{part} is empty" in result.stderr


@pytest.mark.parametrize("create", ["chart", "job", "none"])
@pytest.mark.parametrize(
    ("part", "settings", "keys"),
    [
        (
            "mysql",
            "mysql.enabled=false,mysql.host=db.example.org",
            "lawnwatch-password, airflow-password, mlflow-password",
        ),
        (
            "store",
            "minio.enabled=false,minio.endpoint=https://s3.example.org,minio.accessKeys.lawnwatch=AKIA",
            "lawnwatch-secret-key, airflow-secret-key, mlflow-secret-key",
        ),
    ],
)
def test_the_passwords_of_a_server_of_ones_own_are_never_made_up(
    part: str, settings: str, keys: str, create: str
) -> None:
    others = [f"secrets.{other}=mine" for other in ("mysql", "store", "airflow") if other != part]
    argv = ("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
            ",".join([settings, f"secrets.create={create}", *others]))  # fmt: skip
    result = helm(*argv)
    assert result.returncode != 0
    assert f"secrets.{part} is empty" in result.stderr
    assert f"under the keys {keys};" in result.stderr
    named = helm(*argv, "--set", f"secrets.{part}=mine")
    assert named.returncode == 0, named.stderr
    assert "kind: Secret\n" not in named.stdout


def test_fault_49_the_chart_and_the_settings_know_the_same_passwords() -> None:
    """What the chart refuses in a Secret that is there needs a cluster: tests/e2e/test_cluster.py."""
    (known,) = re.findall(r"\$known := list (.+) }}", (CHART / "templates/_helpers.tpl").read_text())
    assert set(re.findall(r'"([^"]*)"', known)) == PLACEHOLDERS


class Secrets(http.server.ThreadingHTTPServer):
    """As much of Kubernetes' API as Helm's `lookup` of a Secret asks."""

    def __init__(self) -> None:
        self.there: dict[str, dict[str, str]] = {}
        there = self.there

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                secret = {"name": "secrets", "namespaced": True, "kind": "Secret", "verbs": ["get"]}
                status, body = 200, {"kind": "APIResourceList", "groupVersion": "v1", "resources": [secret]}
                if self.path.partition("?")[0] != "/api/v1":
                    name = self.path.removeprefix("/api/v1/namespaces/farm/secrets/")
                    found = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": there.get(name)}
                    missing = {"kind": "Status", "code": 404, "reason": "NotFound", "message": f"no {name}"}
                    status, body = (200, found) if name in there else (404, missing)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def render(self, *argv: str) -> list[Object]:
        address = f"http://127.0.0.1:{self.server_address[1]}"
        result = helm("template", "lawnwatch", str(CHART), "-n", "farm", "--dry-run=server", "--kube-version=1.34.0",
                      f"--kube-apiserver={address}", *argv)  # fmt: skip
        assert result.returncode == 0, result.stderr
        return [each for each in yaml.safe_load_all(result.stdout) if each]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Secrets]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    secrets = Secrets()
    yield secrets
    secrets.shutdown()


def checksums(objects: list[Object]) -> dict[str, str]:
    """Of the Secrets' values, by the name of the pods' object."""
    found = {}
    for each in objects:
        annotations = each.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {})
        if "checksum/secrets" in annotations:
            found[each["metadata"]["name"].removeprefix("lawnwatch-")] = annotations["checksum/secrets"]
    return found


AIRFLOW = {"airflow-api", "airflow-scheduler", "airflow-dag-processor", "airflow-triggerer"}


def test_a_changed_secret_starts_those_anew_that_read_it_and_no_other(secrets: Secrets) -> None:
    installed = secrets.render("--set", "secrets.apiKey=key,secrets.env=settings")
    secrets.there |= {each["metadata"]["name"]: each["data"] for each in installed if each["kind"] == "Secret"}
    assert len(secrets.there) == 3
    secrets.there["key"] = {"api-key": "bHdfa2V5"}

    def upgraded() -> list[Object]:
        return secrets.render("--set", "secrets.apiKey=key,secrets.env=settings", "--is-upgrade")

    before = checksums(upgraded())
    assert set(before) == AIRFLOW | {"api", "exporter", "mlflow", "webapp"}
    # The key of the API is made after the install, by hand; what the chart made itself is as it was.
    kept = {"api", "exporter", "mlflow"}
    assert {name: checksums(installed)[name] for name in kept} == {name: before[name] for name in kept}

    for secret, key, readers in (
        ("lawnwatch-mysql", "lawnwatch-password", {"api", "exporter", *AIRFLOW}),
        ("lawnwatch-mysql", "mlflow-password", {"mlflow"}),
        ("lawnwatch-mysql", "root-password", set()),
        ("lawnwatch-store", "mlflow-secret-key", {"mlflow"}),
        ("lawnwatch-airflow", "jwt-secret", AIRFLOW),
        ("lawnwatch-airflow", "admin-password", {"airflow-api", "exporter"}),
        ("key", "api-key", {"webapp", *AIRFLOW}),
        ("settings", "LAWNWATCH_IMPORT_DATABASE_URL", {"api", "exporter", *AIRFLOW}),
    ):
        secrets.there[secret] = secrets.there.get(secret, {}) | {key: "YS1uZXctb25l"}
        after = checksums(upgraded())
        assert {name for name in after if after[name] != before[name]} == readers, key
        before = after


def test_no_value_of_a_secret_is_in_any_other_object(secrets: Secrets) -> None:
    objects = secrets.render()
    values = [value for each in objects if each["kind"] == "Secret" for value in each["data"].values()]
    text = json.dumps([each for each in objects if each["kind"] != "Secret"])
    assert len(values) == 13
    assert not [value for value in values if value in text or base64.b64decode(value).decode() in text]


def test_what_nobody_knows_of_the_secrets_changes_no_pod(secrets: Secrets) -> None:
    """A Job makes them, or nobody asks the cluster: then a rendering is as the one before."""
    assert checksums(secrets.render("--set", "secrets.create=job")) == {}
    assert checksums(rendered("secrets by a job")) == checksums(manifests()) == {}


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_never_names_a_model(name: str) -> None:
    """An upgrade leaves what a rollout wrote: the pods only read the two annotations."""
    api = find(rendered(name), "Deployment", "lawnwatch-api")
    written = api["spec"]["template"]["metadata"].get("annotations", {})
    assert not [key for key in written if key.startswith("lawnwatch.io/")]
    (container,) = api["spec"]["template"]["spec"]["containers"]
    read = {each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"]
            if "fieldRef" in each.get("valueFrom", {})}  # fmt: skip
    assert read == {
        "LAWNWATCH_SERVING__MODEL_VERSION": "metadata.annotations['lawnwatch.io/model-version']",
        "LAWNWATCH_SERVING__MODEL_SHA256": "metadata.annotations['lawnwatch.io/model-sha256']",
    }
    assert "replicas" not in api["spec"], "the autoscaler's; an upgrade would undo it"


@pytest.mark.parametrize("name", VALUES)
def test_every_container_asks_for_what_it_needs_and_has_a_limit_of_memory(name: str) -> None:
    for pod, spec in pods(rendered(name)):
        for each in containers(spec):
            resources = each["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), (pod, each["name"])
            assert mebibytes(resources["requests"]["memory"]) <= mebibytes(resources["limits"]["memory"]), pod


def test_the_pod_of_a_step_outlives_the_grace_of_the_step_in_it() -> None:
    worker = dict(pods(rendered("default")))[WORKER]
    assert worker["terminationGracePeriodSeconds"] > 30, "pipeline.GRACE_SECONDS"


@pytest.mark.parametrize("name", VALUES)
def test_kubernetes_adds_no_settings_of_its_own(name: str) -> None:
    """With service links a pod finds LAWNWATCH_API_PORT=tcp://… in its environment."""
    assert not [pod for pod, spec in pods(rendered(name)) if spec.get("enableServiceLinks", True)]


# ── how it hangs together ───────────────────────────────────────────────────────────────────────────────────


def cores(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def mebibytes(text: str) -> float:
    return float(text[:-2]) * {"Mi": 1, "Gi": 1024}[text[-2:]]


@pytest.mark.parametrize(
    ("name", "most_cores", "gigabytes"),
    [("small", 1.8, 11), ("default", 3.5, 14)],  # of 2 and 12, and of 4 and 16: a cluster keeps some for itself
)
def test_the_values_fit_the_node_they_are_for_with_a_step_running(name: str, most_cores: float, gigabytes: int) -> None:
    """Steps of `default` ask for what pipeline.py says, which training is the most of."""
    asked = []
    for pod, spec in pods(rendered(name)):
        if pod.startswith(("Deployment", "StatefulSet")):
            requests = [each["resources"]["requests"] for each in spec["containers"]]
            asked.append((sum(cores(each["cpu"]) for each in requests), sum(mebibytes(e["memory"]) for e in requests)))
    (worker,) = [spec for pod, spec in pods(rendered(name)) if pod == WORKER]
    (set_by_values,) = [each["value"] for each in worker["containers"][0]["env"]
                        if each["name"] == "LAWNWATCH_STEP_RESOURCES"]  # fmt: skip
    steps = {step: {"cpu": cpu, "memory": memory} for step, (cpu, memory) in step_resources().items()}
    amounts = (steps | json.loads(set_by_values)).values()
    api = find(rendered(name), "HorizontalPodAutoscaler", "lawnwatch-api")["spec"]["minReplicas"]
    (one_api,) = [spec for pod, spec in pods(rendered(name)) if pod == "Deployment/lawnwatch-api"]
    requests = one_api["containers"][0]["resources"]["requests"]
    asked += [(cores(requests["cpu"]), mebibytes(requests["memory"]))] * (api - 1)
    assert sum(cpu for cpu, _ in asked) + max(cores(each["cpu"]) for each in amounts) <= most_cores
    assert sum(memory for _, memory in asked) + max(mebibytes(e["memory"]) for e in amounts) <= gigabytes * 1024


def step_resources() -> dict[str, tuple[str, str]]:
    """RESOURCES of lawnwatch.pipeline, which cannot be imported without Airflow."""
    tree = ast.parse((ROOT / "src/lawnwatch/pipeline.py").read_text())
    (found,) = [each.value for each in tree.body
                if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "RESOURCES"]  # fmt: skip
    resources: dict[str, tuple[str, str]] = ast.literal_eval(found)
    return resources


@pytest.mark.parametrize("name", VALUES)
def test_every_service_and_policy_selects_pods_that_there_are(name: str) -> None:
    objects = rendered(name)
    labels = [
        each["spec"]["template"]["metadata"]["labels"] for each in objects if "template" in each.get("spec", {})
    ] + [each["metadata"]["labels"] for each in objects if each["kind"] == "Pod"]
    worker = find(objects, "ConfigMap", "lawnwatch-airflow")["data"]["pod.yaml"]
    labels.append(yaml.safe_load(worker)["metadata"]["labels"])
    for each in objects:
        selector = {
            "Service": lambda spec: spec.get("selector"),
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
        }.get(each["kind"], lambda spec: None)(each.get("spec", {}))
        if selector:
            assert [one for one in labels if selector.items() <= one.items()], each["metadata"]["name"]


def test_nothing_that_a_pod_waits_for_comes_only_after_the_install() -> None:
    for name in ("default", "secrets by a job"):
        hooks = {each["metadata"]["name"]: each["metadata"]["annotations"]["helm.sh/hook"]
                 for each in rendered(name) if "helm.sh/hook" in each["metadata"].get("annotations", {})}  # fmt: skip
        assert not [hook for hook in hooks.values() if "post-" in hook]
        assert "lawnwatch-bootstrap" not in hooks
        assert find(rendered(name), "Job", "lawnwatch-bootstrap")


def test_an_upgrade_makes_secrets_then_migrates_before_a_pod_changes_and_a_rollback_does_neither() -> None:
    hooks = {each["metadata"]["name"]: each["metadata"]["annotations"] for each in rendered("upgrade")
             if each["kind"] == "Job"}  # fmt: skip
    assert set(hooks) == {"lawnwatch-secrets", "lawnwatch-migrate"}, "another name than the install's own Job"
    assert hooks["lawnwatch-migrate"] == {
        "helm.sh/hook": "pre-upgrade",
        "helm.sh/hook-weight": "5",
        "helm.sh/hook-delete-policy": "before-hook-creation",
    }
    assert hooks["lawnwatch-secrets"]["helm.sh/hook-weight"] == "0"


@cache
def policies(name: str) -> dict[str, Object]:
    return {each["metadata"]["name"].removeprefix("lawnwatch-"): each["spec"] for each in rendered(name)
            if each["kind"] == "NetworkPolicy"}  # fmt: skip


Labels = dict[str, str]


def parts(objects: list[Object]) -> dict[str, tuple[Labels, Object]]:
    """Labels and specification of the pod of every part, by its component."""
    made = [each["spec"]["template"] for each in objects if "template" in each.get("spec", {})]
    made += [each for each in objects if each["kind"] == "Pod"]
    made.append(yaml.safe_load(find(objects, "ConfigMap", "lawnwatch-airflow")["data"]["pod.yaml"]))
    found = [(each["metadata"]["labels"], each["spec"]) for each in made]
    return {labels["app.kubernetes.io/component"]: (labels, spec) for labels, spec in found}


# Settings that are shared with parts that never ask by them.
NEVER_ASKED = {("api", "mlflow"), ("api", "api"), ("airflow-api", "mlflow"), ("airflow-dag-processor", "mlflow"),
               ("airflow-triggerer", "mlflow"), ("exporter", "minio"), ("mlflow", "mlflow")}  # fmt: skip
# A URL, a target of Prometheus, a name that it looks up, and the arguments of a driver.
ADDRESS = re.compile(
    r"(lawnwatch-[a-z-]+)(?:\.lawnwatch(?:-node)?\.svc\.[a-z.]+)?(?::|\W{1,6}(?:type: A, )?port(?:: |=))(\d+)"
)


def connections(objects: list[Object]) -> set[tuple[str, str, int]]:
    """From which part to which, and at which port of its pod: all that stands in URLs of pods and of configurations."""
    services = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Service"}
    made, needed = parts(objects), set()
    for part, (_, spec) in made.items():
        mine = [each["data"] for each in objects
                if each["kind"] == "ConfigMap" and each["metadata"]["name"] == f"lawnwatch-{part}"]  # fmt: skip
        for service, port in ADDRESS.findall(json.dumps([containers(spec), mine])):
            component = services[service]["selector"]["app.kubernetes.io/component"]
            (target,) = [each["targetPort"] for each in services[service]["ports"] if each["port"] == int(port)]
            (number,) = [one["containerPort"] for each in made[component][1]["containers"]
                         for one in each.get("ports", []) if one["name"] == target]  # fmt: skip
            needed.add((part, component, number))
    return {each for each in needed if each[:2] not in NEVER_ASKED}


def chosen(selector: Object, labels: Labels) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


def admits(rules: list[Object], side: str, labels: Labels, port: int, namespace: str = "lawnwatch") -> bool:
    """Whether one of the rules is for pods with these labels. An ipBlock is for what is not in the cluster."""
    for rule in rules:
        if port in [each["port"] for each in rule.get("ports", [{"port": port}])]:
            peers = rule.get(side)
            if peers is None or any(
                chosen(peer.get("podSelector", {}), labels)
                for peer in peers
                if "ipBlock" not in peer and (namespace == "lawnwatch" or "namespaceSelector" in peer)
            ):
                return True
    return False


def permitted(name: str, source: Labels, target: Labels, port: int, namespace: str = "lawnwatch") -> bool:
    """Whether the policies let this source reach this pod: they add up, and a pod that none is for is open."""
    inward = [each for each in policies(name).values()
              if "Ingress" in each["policyTypes"] and chosen(each["podSelector"], target)]  # fmt: skip
    outward = [each for each in policies(name).values()
               if "Egress" in each["policyTypes"] and chosen(each["podSelector"], source)]  # fmt: skip
    enters = [rule for each in inward for rule in each.get("ingress", [])]
    leaves = [rule for each in outward for rule in each.get("egress", [])]
    return (not inward or admits(enters, "from", source, port, namespace)) and (
        not outward or admits(leaves, "to", target, port)
    )


@pytest.mark.parametrize("name", VALUES)
def test_every_connection_that_a_pod_is_told_of_is_permitted(name: str) -> None:
    labels = {part: each for part, (each, _) in parts(rendered(name)).items()}
    # The exporter of the nodes is in their network, where no policy holds.
    needed = {each for each in connections(rendered(name)) if each[1] != "node-exporter"}
    assert {("webapp", "api", 8000), ("exporter", "airflow-api", 8080), ("step", "mlflow", 5000)} <= needed
    if name == "default":
        servers = {"api", "webapp", "exporter", "mysql", "minio", "mlflow", "airflow-api", "alertmanager"}
        assert {target for _, target, _ in needed} == servers
        assert {("prometheus", "webapp", 9106), ("mlflow", "mysql", 3306), ("bootstrap", "minio", 9000)} <= needed
    assert not [each for each in sorted(needed) if not permitted(name, labels[each[0]], labels[each[1]], each[2])]


@pytest.mark.parametrize("name", VALUES)
def test_no_part_is_open_to_one_that_does_not_ask_it(name: str) -> None:
    """API and page are for everybody; the scheduler's pod is where people ask MLflow by `lawnwatch`."""
    labels = {part: each for part, (each, _) in parts(rendered(name)).items() if part != "node-exporter"}
    needed = connections(rendered(name))
    ports = {(part, port["containerPort"]) for part, (_, spec) in parts(rendered(name)).items() if part in labels
             for each in spec["containers"] for port in each.get("ports", [])}  # fmt: skip
    open_to = {(source, target, port) for source in labels for target, port in ports
               if permitted(name, labels[source], labels[target], port)}  # fmt: skip
    everybodys = {("api", 8000), ("webapp", 8501)}
    unasked = {each for each in open_to - needed if each[1:] not in everybodys}
    assert unasked <= {("airflow-scheduler", "mlflow", 5000)}
    assert not [part for part in labels if part.startswith(("airflow-scheduler", "airflow-dag", "airflow-trig", "step"))
                and permitted(name, labels["api"], labels[part], 8793)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "label", "part", "port", "may"),
    [
        ("default", "ingress-nginx", "api", 8000, True),
        ("default", "ingress-nginx", "webapp", 8501, True),
        ("default", "ingress-nginx", "webapp", 9106, False),
        ("default", "grafana", "prometheus", 9090, True),
        ("default", "grafana", "mysql", 3306, False),
        ("gateway", "prometheus-adapter", "prometheus", 9090, True),
        ("default", "prometheus", "minio", 9000, False),
        ("operator", "prometheus", "api", 8000, True),
        ("operator", "prometheus", "webapp", 8501, True),
        ("operator", "prometheus", "webapp", 9106, True),
        ("operator", "prometheus", "exporter", 9105, True),
        ("operator", "prometheus", "minio", 9000, True),
        ("operator", "prometheus", "mysql", 3306, False),
    ],
)
def test_from_other_namespaces_come_those_who_ought_to(name: str, label: str, part: str, port: int, may: bool) -> None:
    stranger = {"app.kubernetes.io/name": label}
    assert permitted(name, stranger, parts(rendered(name))[part][0], port, namespace="elsewhere") is may


@pytest.mark.parametrize("part", ["api", "step", "mlflow"])
def test_what_fetches_pictures_never_reaches_the_clouds_metadata(part: str) -> None:
    """By no port but 53: at GKE the same address knows the names."""
    reached = [
        (to["ipBlock"], rule.get("ports"))
        for rule in policies("default")[f"{part}-egress"]["egress"]
        for to in rule["to"]
        if "ipBlock" in to
    ]
    names = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    for metadata in map(ip_address, ("169.254.169.254", "169.254.170.2", "fe80::a9fe:a9fe", "fd00:ec2::254")):
        for block, ports in reached:
            inside = metadata in ip_network(block["cidr"])
            out = any(metadata in ip_network(each) for each in block.get("except", []))
            assert not inside or out or ports == names, metadata
    web = map(ip_address, ("93.184.216.34", "10.96.0.1", "2606:2800:220:1::1"))
    assert all(any(address in ip_network(block["cidr"]) for block, _ in reached) for address in web)


@pytest.mark.parametrize("part", ["webapp", "api", "step", "mlflow"])
@pytest.mark.parametrize("resolver", ["169.254.20.10", "169.254.169.254"])
def test_names_are_asked_of_the_nodes_and_of_the_clouds_resolver(part: str, resolver: str) -> None:
    """NodeLocal DNSCache, and Cloud DNS of GKE."""
    asked = [rule["ports"] for rule in policies("default")[f"{part}-egress"]["egress"] for to in rule["to"]
             if "ipBlock" in to and ip_address(resolver) in ip_network(to["ipBlock"]["cidr"])
             and "except" not in to["ipBlock"]]  # fmt: skip
    assert asked == [[{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]]


def annotations(name: str, ingress: str) -> Object:
    """An Ingress's annotations without nginx' prefix."""
    found = find(overlay("production") if name == "overlay" else rendered(name), "Ingress", ingress)
    return {key.removeprefix("nginx.ingress.kubernetes.io/"): each
            for key, each in found["metadata"]["annotations"].items()}  # fmt: skip


@pytest.mark.parametrize("name", ["production", "overlay"])
def test_a_page_keeps_its_pod_and_the_api_spreads_its_requests(name: str) -> None:
    sticky = {"affinity": "cookie", "affinity-mode": "persistent", "session-cookie-path": "/"}
    assert sticky.items() <= annotations(name, "lawnwatch-webapp").items()
    assert "affinity" not in annotations(name, "lawnwatch-api")
    assert annotations(name, "lawnwatch-api")["rewrite-target"] == "/$2"
    assert "rewrite-target" not in annotations(name, "lawnwatch-webapp")


@pytest.mark.parametrize("name", ["production", "overlay"])
def test_a_batch_of_the_largest_size_passes_the_ingress(name: str) -> None:
    assert annotations(name, "lawnwatch-api")["proxy-body-size"] == "50m"
    assert ServingSettings().max_batch_bytes <= 50 * 1024**2
    assert annotations(name, "lawnwatch-webapp")["proxy-body-size"] == "25m"


def test_an_annotation_of_ones_own_takes_the_place_of_the_charts() -> None:
    assert annotations("production", "lawnwatch-api")["cert-manager.io/cluster-issuer"] == "letsencrypt"
    key = r"ingress.annotations.nginx\.ingress\.kubernetes\.io/proxy-body-size"
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--show-only=templates/ingress.yaml",
                "--set", f"ingress.enabled=true,{key}=1m").stdout  # fmt: skip
    assert text.count("proxy-body-size: 1m") == 2 and not {"25m", "50m"} & set(text.split())


def _monitored(name: str) -> dict[str, tuple[str, str]]:
    """Job, port and path of every endpoint of the ServiceMonitors, by the name that alerts and panels use."""
    return {
        one["relabelings"][0]["replacement"]: (one["port"], one["path"])
        for each in rendered(name) if each["kind"] == "ServiceMonitor"
        for one in each["spec"]["endpoints"]
    }  # fmt: skip


def test_an_operators_prometheus_scrapes_what_ours_would() -> None:
    ours = yaml.safe_load(find(rendered("default"), "ConfigMap", "lawnwatch-prometheus")["data"]["prometheus.yml"])
    paths = {each["job_name"]: each.get("metrics_path", "/metrics") for each in ours["scrape_configs"]}
    paths.pop("prometheus")  # itself
    assert {job: path for job, (_, path) in _monitored("operator").items()} == paths
    assert "minio" not in _monitored("production"), "none of ours is there"


def test_an_operators_prometheus_finds_the_monitors_and_their_ports() -> None:
    objects = rendered("operator")
    for each in objects:
        if each["kind"] in ("ServiceMonitor", "PrometheusRule"):
            assert each["metadata"]["labels"]["release"] == "stack"
        if each["kind"] == "ServiceMonitor":
            service = find(objects, "Service", each["metadata"]["name"])
            assert each["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            ports = {port["name"] for port in service["spec"]["ports"]}
            assert {one["port"] for one in each["spec"]["endpoints"]} <= ports


def test_an_operators_prometheus_alerts_for_this_namespace_and_no_other(tmp_path: Path) -> None:
    """It watches the whole cluster: others' targets, jobs of the same name, a second installation."""
    rules = find(rendered("operator"), "PrometheusRule", "lawnwatch")["spec"]
    assert 'absent(up{namespace="lawnwatch",job="api"})' in json.dumps(rules).replace("\\", "")
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in alerts if rule["labels"].get("namespace") != "lawnwatch"} == {"DiskLow"}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))

    def series(namespace: str) -> list[Object]:
        """What makes every alert but those of the nodes fire."""
        tests = yaml.safe_load((ROOT / "monitoring/rules_test.yml").read_text())["tests"]
        fired = [test for test in tests if test["alert_rule_test"][0]["exp_alerts"]]
        return [
            {
                "interval": test["interval"],
                "input_series": [
                    {"series": re.sub(r"^(\w+)\{?", rf'\1{{namespace="{namespace}",', one["series"]).rstrip("}") + "}",
                     "values": one["values"]}
                    for one in test["input_series"]
                ],
                "promql_expr_test": [
                    {
                        "expr": f'count by (namespace) (ALERTS{{alertname="{name}",alertstate="firing"}})',
                        "eval_time": test["alert_rule_test"][0]["eval_time"],
                        "exp_samples": [{"labels": '{namespace="lawnwatch"}',
                                         "value": len(test["alert_rule_test"][0]["exp_alerts"])}]
                        if namespace == "lawnwatch"
                        else [],
                    }
                ],
            }
            for test in fired
            if (name := test["alert_rule_test"][0]["alertname"]) not in ("DiskLow", "TargetMissing")
        ]  # fmt: skip

    for namespace in ("lawnwatch", "elsewhere"):
        case = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": series(namespace)}
        (tmp_path / "tests.yml").write_text(yaml.safe_dump(case))
        checked = subprocess.run([program("promtool"), "test", "rules", "tests.yml"], cwd=tmp_path,
                                 capture_output=True, text=True)  # fmt: skip
        assert checked.returncode == 0, (namespace, checked.stdout + checked.stderr)


@pytest.mark.parametrize(("job", "part", "port"), [("api", "api", 8000), ("webapp", "webapp", 9106),
                                                   ("web-sessions", "webapp", 8501)])  # fmt: skip
def test_prometheus_asks_each_pod_of_what_may_have_several_by_the_whole_name(job: str, part: str, port: int) -> None:
    """One address for all would give now this pod's counters, now that one's. And with a search list, one server that
    fails to answer for one of the names keeps pods that are gone as targets."""
    found = find(rendered("default"), "ConfigMap", "lawnwatch-prometheus")
    config = yaml.safe_load(found["data"]["prometheus.yml"])
    (scraped,) = [each["dns_sd_configs"] for each in config["scrape_configs"] if each["job_name"] == job]
    assert scraped[0]["names"] == [f"lawnwatch-{part}-pods.lawnwatch.svc.cluster.local."]
    assert scraped[0]["port"] == port
    service = find(rendered("default"), "Service", f"lawnwatch-{part}-pods")["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert port in [each["port"] for each in service["ports"]]
    assert service["selector"]["app.kubernetes.io/component"] == part


def test_a_webhook_that_is_secret_is_a_file_of_alertmanager() -> None:
    """Debian's Alertmanager, which the other tests start, is too old for `url_file`; the chart's knows it."""
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set",
                "monitoring.alertmanager.webhookSecret=mine").stdout  # fmt: skip
    objects = [each for each in yaml.safe_load_all(text) if each]
    config = find(objects, "ConfigMap", "lawnwatch-alertmanager")["data"]["alertmanager.yml"]
    (webhook,) = yaml.safe_load(config)["receivers"][0]["webhook_configs"]
    spec = dict(pods(objects))["Deployment/lawnwatch-alertmanager"]
    folders = {each["name"]: each["mountPath"] for each in spec["containers"][0]["volumeMounts"]}
    assert webhook == {"url_file": f"{folders['webhook']}/url", "send_resolved": True}
    (volume,) = [each for each in spec["volumes"] if each["name"] == "webhook"]
    assert volume["secret"] == {"secretName": "mine"}


def test_every_setting_of_prometheus_starts_it_anew() -> None:
    def checksum(*argv: str) -> str:
        text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", *argv).stdout
        pod = find([each for each in yaml.safe_load_all(text) if each], "StatefulSet", "lawnwatch-prometheus")
        return str(pod["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum("--set", "api.replicas=3")
    assert checksum() != checksum("--set", "monitoring.alertmanager.enabled=false")


def _environments(*argv: str) -> dict[str, dict[str, Object]]:
    """Each pod's environment, the main container's, as names with their entries."""
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", *argv)
    assert result.returncode == 0, result.stderr
    objects = [each for each in yaml.safe_load_all(result.stdout) if each]
    return {pod: {each["name"]: each for each in spec["containers"][0].get("env", [])} for pod, spec in pods(objects)}


def test_a_key_goes_to_those_that_ask_the_api_and_to_no_other() -> None:
    environments = _environments("--set", "secrets.apiKey=mine")
    holders = {pod for pod, env in environments.items() if "LAWNWATCH_API_KEY" in env}
    assert holders >= {WORKER, "Deployment/lawnwatch-webapp", "Deployment/lawnwatch-airflow-scheduler",
                       "Pod/lawnwatch-test-predict"}  # fmt: skip
    assert not holders & {"Deployment/lawnwatch-api", "Deployment/lawnwatch-exporter", "Deployment/lawnwatch-mlflow",
                          "StatefulSet/lawnwatch-mysql", "StatefulSet/lawnwatch-minio"}  # fmt: skip
    for pod in holders:
        wanted = {"secretKeyRef": {"name": "mine", "key": "api-key"}}
        assert environments[pod]["LAWNWATCH_API_KEY"]["valueFrom"] == wanted
    assert not [pod for pod, env in _environments().items() if "LAWNWATCH_API_KEY" in env]


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ("api.replicas=2", "http://localhost:8000"),
        ("ingress.enabled=true,ingress.host=lawn.example", "http://lawn.example/api"),
        ("ingress.enabled=true,ingress.host=lawn.example,ingress.tlsSecret=cert", "https://lawn.example/api"),
        ("httpRoute.enabled=true,httpRoute.gateway=edge,httpRoute.host=lawn.example", "https://lawn.example/api"),
        ("ingress.enabled=true,publicUrl=https://api.lawn.example", "https://api.lawn.example"),
    ],
)
def test_links_to_reports_begin_where_a_browser_reaches_the_api(settings: str, url: str) -> None:
    environments = _environments("--set", settings)
    for pod in (WORKER, "Deployment/lawnwatch-airflow-scheduler"):
        assert environments[pod]["LAWNWATCH_PUBLIC_URL"]["value"] == url


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "ingress.enabled=true,ingress.host=lawn.example",
            "http://lawn.example and the API at http://lawn.example/api/",
        ),
        (
            "ingress.enabled=true,ingress.host=lawn.example,ingress.tlsSecret=c",
            "the web page is at https://lawn.example ",
        ),
        (
            "httpRoute.enabled=true,httpRoute.gateway=g,httpRoute.host=lawn.example",
            "web page is at https://lawn.example ",
        ),
        ("api.replicas=2", None),
    ],
)
def test_the_notes_say_where_a_browser_finds_the_page(settings: str, said: str | None, tmp_path: Path) -> None:
    """Only an install shows the notes, so here they are an object's."""
    chart = tmp_path / "lawnwatch"
    shutil.copytree(CHART, chart)
    notes = (chart / "templates/NOTES.txt").read_text()
    text = f'{{{{ define "notes" }}}}{notes}{{{{ end }}}}notes: {{{{ include "notes" . | toJson }}}}'
    (chart / "templates/notes.yaml").write_text(text)
    result = helm("template", "lawnwatch", str(chart), "--kube-version=1.34.0", "--show-only=templates/notes.yaml",
                  "--set", settings)  # fmt: skip
    assert result.returncode == 0, result.stderr
    shown = yaml.safe_load(result.stdout)["notes"]
    assert "port-forward svc/lawnwatch-webapp" in shown
    assert said in shown if said else "From outside" not in shown


@pytest.mark.parametrize("name", VALUES)
def test_no_setting_is_given_twice(name: str) -> None:
    """Kubernetes would take the last one, and refuse both in a server-side apply."""
    for pod, spec in pods(rendered(name)):
        for each in containers(spec):
            names = [one["name"] for one in each.get("env", [])]
            assert len(names) == len(set(names)), pod


def test_a_setting_of_ones_own_takes_the_place_of_the_charts() -> None:
    ours = {"env": ("LAWNWATCH_LOG_JSON", "LAWNWATCH_WEIGHTS", "MLFLOW_HTTP_REQUEST_TIMEOUT"),
            "mlflow.env": ("MLFLOW_SERVER_ALLOWED_HOSTS",), "webapp.env": ("LAWNWATCH_API_URL",),
            "airflow.env": ("AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION", "AIRFLOW__API__WORKERS",
                            "AIRFLOW__API__SECRET_KEY")}  # fmt: skip
    chosen = ",".join(f"{value}.{name}=mine" for value, names in ours.items() for name in names)
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set-string", chosen).stdout
    seen = set()
    for pod, spec in pods([each for each in yaml.safe_load_all(text) if each]):
        for each in containers(spec):
            environment = each.get("env", [])
            names = [one["name"] for one in environment]
            assert len(names) == len(set(names)), pod
            seen |= {(pod, one["name"]) for one in environment if one.get("value") == "mine"}
    airflow = {("Deployment/lawnwatch-airflow-api", name) for part in ("env", "airflow.env") for name in ours[part]}
    for pod, name in (("mlflow", "MLFLOW_SERVER_ALLOWED_HOSTS"), ("webapp", "LAWNWATCH_API_URL")):
        assert {each for each in seen if name in each} == {(f"Deployment/lawnwatch-{pod}", name)}
    assert (
        airflow | {(WORKER, name) for name in ours["env"]} | {("Deployment/lawnwatch-api", "LAWNWATCH_LOG_JSON")}
        <= seen
    )


@pytest.mark.parametrize(
    "setting",
    [
        *(f"env.LAWNWATCH_SERVING__{each}" for each in ("MODEL_VERSION", "MODEL_SHA256", "DRAIN_SECONDS")),
        *(f"env.LAWNWATCH_{part}__{each}" for part in ("SERVING", "EXPORTER") for each in ("HOST", "PORT")),
        "env.MLFLOW_SERVER_ALLOWED_HOSTS",
        "webapp.env.LAWNWATCH_WEBAPP_METRICS_PORT",
        "webapp.env.STREAMLIT_SERVER_PORT",
    ],
)
def test_a_setting_that_is_not_for_its_place_is_an_error_that_names_it(setting: str) -> None:
    """It belongs to a rollout, to a value or to another part, or a port that is written elsewhere would not follow."""
    result = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set-string", f"{setting}=1")
    assert result.returncode != 0
    assert setting.rpartition(".")[2] in result.stderr


def test_settings_that_are_secret_go_where_the_others_go_and_stand_nowhere_in_the_clear() -> None:
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", "secrets.env=mine").stdout
    for pod, spec in pods([each for each in yaml.safe_load_all(text) if each]):
        for each in containers(spec):
            ours = "LAWNWATCH_DATABASE_URL" in [one["name"] for one in each.get("env", [])]
            assert each.get("envFrom", []) == ([{"secretRef": {"name": "mine"}}] if ours else []), (pod, each["name"])
    assert "envFrom" not in json.dumps(rendered("default"))


def test_everyone_who_asks_the_store_knows_its_region() -> None:
    """MinIO refuses a request that is signed for another."""
    text = helm("template", "lawnwatch", str(CHART), "--kube-version=1.34.0", "--set", "minio.region=eu-south-2").stdout
    asking = {
        (pod, each["name"]): json.dumps(each["env"])
        for pod, spec in pods([each for each in yaml.safe_load_all(text) if each])
        for each in containers(spec)
        if "lawnwatch-minio:9000" in json.dumps(each.get("env"))
    }
    assert len(asking) > 10
    assert [each for each, env in asking.items() if env.count("eu-south-2") < env.count("lawnwatch-minio:9000")] == []


def test_everyone_who_asks_a_mysql_with_a_ca_has_the_ca() -> None:
    """tests/integration/test_database_tls.py connects with these URLs."""
    asking = 0
    for pod, spec in pods(rendered("production")):
        for each in containers(spec):
            urls = [one["value"] for one in each.get("env", []) if one.get("value", "").startswith("mysql+")]
            if urls or "pymysql.connect" in str(each.get("args")):
                asking += 1
                mounts = {one["name"]: one["mountPath"] for one in each["volumeMounts"]}
                assert mounts["mysql-ca"] == "/etc/lawnwatch-mysql", (pod, each["name"])
                (volume,) = [one for one in spec["volumes"] if one["name"] == "mysql-ca"]
                assert volume["secret"] == {"secretName": "lawnwatch-mysql-ca"}
            for url in urls:
                assert "ssl_ca=/etc/lawnwatch-mysql/ca.crt" in url or url.startswith("mysql+aiomysql"), pod
    assert asking > 10
    assert not [pod for pod, spec in pods(rendered("default")) if "mysql-ca" in str(spec)]


def test_a_chart_packaged_with_a_build_in_its_version_gives_labels_that_kubernetes_takes(tmp_path: Path) -> None:
    chart = tmp_path / "lawnwatch"
    shutil.copytree(CHART, chart)
    about = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(re.sub(r"ersion: \"?0\.1\.0\"?", "ersion: 0.1.0+69810de", about))
    text = helm("template", "lawnwatch", str(chart), "--kube-version=1.34.0", "--set", "image.tag=0.1.0").stdout
    labels = {value for each in yaml.safe_load_all(text) if each for value in each["metadata"]["labels"].values()}
    assert {"lawnwatch-0.1.0_69810de", "0.1.0_69810de"} <= labels
    assert not [value for value in labels if not re.fullmatch(r"[A-Za-z0-9]([\w.-]{,61}[A-Za-z0-9])?", value)]


def test_a_release_and_its_namespace_may_be_numbers() -> None:
    text = helm("template", "123", str(CHART), "-n", "2024", "--kube-version=1.34.0", "--set",
                "secrets.create=job").stdout  # fmt: skip

    def numbers(part: Any) -> list[Any]:
        if isinstance(part, list):
            return [found for each in part for found in numbers(each)]
        if not isinstance(part, dict):
            return []
        texts = [value for key, value in part.items() if key in ("name", "namespace", "value") or "/" in key]
        return [text for text in texts if isinstance(text, int)] + numbers(list(part.values()))

    assert numbers(list(yaml.safe_load_all(text))) == []


def test_every_claim_outlives_the_release() -> None:
    for each in rendered("default"):
        assert each["kind"] != "PersistentVolumeClaim", "Helm would delete it with the release"
        if each["kind"] == "StatefulSet":
            assert "persistentVolumeClaimRetentionPolicy" not in each["spec"]


def test_mysql_keeps_its_log_of_changes_for_days_and_not_for_a_month() -> None:
    """MySQL 8.4 writes one that nobody reads here; thirty days of Airflow's heartbeats may fill a small volume."""
    composed = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["mysql"]["command"]
    (deployed,) = dict(pods(rendered("default")))["StatefulSet/lawnwatch-mysql"]["containers"]
    for argv in (composed, deployed["args"]):
        assert "--binlog-expire-logs-seconds=259200" in argv
