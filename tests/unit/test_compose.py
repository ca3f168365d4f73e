"""The compose file as it is written; tests/e2e/test_compose.py brings it up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_every_port_is_on_loopback_and_can_be_moved_by_a_name_that_the_docs_know() -> None:
    """Another Grafana or Prometheus on the machine must not keep the platform from coming up."""
    documented = set(re.findall(r"`([A-Z_]+_PORT)`", (ROOT / "docs/compose.md").read_text()))
    names = []
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            found = re.fullmatch(r"127\.0\.0\.1:\$\{([A-Z_]+_PORT):-\d+\}:\d+", port)
            assert found, (name, port)
            names.append(found[1])
    assert len(names) == len(set(names))
    assert set(names) == documented
