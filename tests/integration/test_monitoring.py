"""Alerts and dashboards as files: every alert is tried firing and quiet (fault 52), every panel can be read.

That the dashboards' queries find data where the platform runs is asked in tests/e2e/test_cluster.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lawnwatch import exporter
from processes import program

pytestmark = pytest.mark.integration

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))


def promtool(*argv: str) -> None:
    result = subprocess.run([program("promtool"), *argv], cwd=MONITORING, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_fault_52_every_alert_fires_and_is_quiet_when_it_should() -> None:
    promtool("test", "rules", "rules_test.yml")
    alerts = {rule["alert"] for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
              for rule in group["rules"]}  # fmt: skip
    tried: dict[bool, set[str]] = {True: set(), False: set()}
    for test in yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]:
        for one in test["alert_rule_test"]:
            tried[bool(one["exp_alerts"])].add(one["alertname"])
    assert tried[True] == alerts
    assert tried[False] == alerts


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
            assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    text = (MONITORING / "prometheus.yml").read_text().replace("/etc/prometheus/", f"{MONITORING}/")
    (tmp_path / "prometheus.yml").write_text(text)
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_panel_has_a_title_a_description_a_unit_and_a_place_of_its_own(file: Path) -> None:
    dashboard: dict[str, Any] = json.loads(file.read_text())
    assert dashboard["uid"] == f"lawnwatch-{file.stem}"
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        name = panel["title"]
        assert name, panel["id"]
        assert panel["description"].endswith("."), name
        assert panel["fieldConfig"]["defaults"]["unit"], name
        assert panel["targets"], name
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{name} lies over another panel"
        assert at["x"] + at["w"] <= 24, name
        taken |= cells


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_query_but_those_of_the_nodes_is_for_the_chosen_namespace(file: Path) -> None:
    """All is `.*` and not `.+`: where Prometheus is not an operator's, the series have no such label."""
    dashboard = json.loads(file.read_text())
    (variable,) = dashboard["templating"]["list"]
    assert (variable["name"], variable["includeAll"], variable["allValue"]) == ("namespace", True, ".*")
    assert variable["current"]["value"] == "$__all"
    assert variable["query"]["query"] == "label_values(lawnwatch_source_up, namespace)"
    ours = r"\b(?:(?:lawnwatch|mysql|minio|process)_\w+|active_sessions|up|ALERTS)\b"
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked = len(re.findall(ours, target["expr"]))
            scoped = len(re.findall(ours + re.escape('{namespace=~"$namespace"'), target["expr"]))
            assert scoped == asked, (panel["title"], target["expr"])
            assert asked or "node_" in target["expr"], (panel["title"], target["expr"])


def test_there_are_three_dashboards() -> None:
    assert [file.stem for file in DASHBOARDS] == ["infrastructure", "ml", "principal"]


def test_every_series_of_ours_that_is_asked_for_exists() -> None:
    """A renamed metric leaves an empty panel or an alert that never fires; nothing else would say so."""
    asked: set[str] = set()
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                asked |= set(re.findall(r"lawnwatch_\w+", target["expr"]))
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            asked |= set(re.findall(r"lawnwatch_\w+", rule["expr"]))
    root = MONITORING.parent
    sources = [Path(exporter.__file__), *(root / "src/lawnwatch/serving").glob("*.py"), root / "webapp/metrics.py"]
    named = set(re.findall(r"\"(lawnwatch_\w+)\"", "".join(file.read_text() for file in sources)))
    assert not {each for each in asked if re.sub(r"_(total|bucket|sum|count)$", "", each) not in named
                and each not in named}  # fmt: skip
