"""The report: whole with every verdict, and safe with what strangers wrote into labels and URLs."""

from __future__ import annotations

import re
from dataclasses import asdict

import numpy as np
import pytest

from lawnwatch import evaluation_report, gate, heatmap, measure
from lawnwatch.config import GateSettings

pytestmark = pytest.mark.unit

POLICY = GateSettings()
HOSTILE = '"><script>alert(1)</script>'
FACTS = {
    "candidate": "linear_probe",
    "created_at": "2026-01-01T00:00:00+00:00",
    "snapshot": "0" * 64,
    "weights": "none",
    "git_commit": "abc",
    "samples": False,
}


def evaluation(
    wins: int, losses: int, reasons: tuple[str, ...], labels: tuple[str, str] = ("dandelion", "grass")
) -> dict:
    """What an evaluation against a champion records, of 80 images."""
    truth = np.arange(80) % 2
    champion, challenger = np.ones(80, bool), np.ones(80, bool)
    champion[:wins] = False
    challenger[wins : wins + losses] = False
    names = [labels[i] for i in truth]
    robust = {"dark": challenger, "JPEG 30": challenger}
    decision = gate.decide(
        POLICY, gate.Evidence(names, challenger, robust=robust), gate.Evidence(names, champion, robust=robust), reasons
    )
    probabilities = np.where(np.eye(2)[np.where(challenger, truth, 1 - truth)] > 0, 0.9, 0.1)
    hits = measure.share(int(challenger.sum()), 80)
    return measure.measure(probabilities, truth, labels) | {
        "verdict": {"decision": decision.decision, "claim": decision.claim, "reason": decision.reason},
        "checks": [asdict(check) for check in decision.checks],
        "comparison": decision.comparison,
        "champion_version": 3,
        "policy": POLICY.model_dump(),
        "temperature": 1.2,
        "slices": measure.slices(challenger, {"source host": [HOSTILE] * 75 + ["few.example"] * 5}),
        "robustness": {"images": 80, "unaltered": hits, "altered": {"dark": hits, "JPEG 30": hits}},
        "champion_robustness": {"dark": 1.0, "JPEG 30": 0.9},
        "unknown": {"accept_rate": 0.97},
        "called_unknown": measure.share(5, 80) | {"expected": {"low": 0.0, "high": 0.0875}},
        "unknown_comparison": [],
        "latency_ms": 8.0,
        "model_bytes": 9_000_000,
    }


def pictures() -> list[evaluation_report.Row]:
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    cam = np.random.default_rng(1).normal(size=(7, 7))
    seen = evaluation_report.Tile(
        picture, heatmap.overlay(picture, cam), HOSTILE, "grass", 0.9, f"javascript:{HOSTILE}"
    )
    return [evaluation_report.Row("Surest mistakes", 1, [seen]), evaluation_report.Row("Least sure answers", 0, [])]


@pytest.mark.parametrize(
    ("wins", "losses", "reasons", "title"),
    [
        (12, 1, (), "it is better than the champion"),
        (0, 0, ("new data",), "there is a reason to change"),
        (0, 0, (), "Not decided"),
        (0, 12, (), "Rejected"),
    ],
)
def test_each_verdict_has_its_page(wins: int, losses: int, reasons: tuple[str, ...], title: str) -> None:
    found = evaluation(wins, losses, reasons)
    text = evaluation_report.page(run_id="r" * 32, facts=FACTS, evaluation=found, pictures=pictures()).decode()
    assert title in text and "Against champion v3" in text
    assert all(f"LAWNWATCH_GATE__{name.upper()}" in text for name in GateSettings.model_fields)
    assert "too few" in text and "what speaks for grass" in text


def test_a_calibration_error_stands_beside_what_an_honest_model_would_have() -> None:
    found = evaluation(1, 1, ())
    text = evaluation_report.page(run_id="r" * 32, facts=FACTS, evaluation=found, pictures=[]).decode()
    one = found["metrics"]["ece"]
    assert text.count(f"{one['expected']['low']:.3f} to {one['expected']['high']:.3f} if calibrated") == 2
    recorded_before = {"value": 0.021, "low": 0.004, "high": 0.07}
    assert evaluation_report.likely(recorded_before) == "0.004 to 0.070"


def test_what_is_called_unknown_stands_beside_what_chance_makes_of_it() -> None:
    text = evaluation_report.page(run_id="r" * 32, facts=FACTS, evaluation=evaluation(1, 1, ()), pictures=[]).decode()
    assert "6.2 % (2.7 % to 13.8 %) are called unknown; 3.0 % is meant" in text
    assert "chance makes 0.0 % to 8.8 % of it" in text


def test_what_strangers_wrote_stays_text_and_nothing_is_loaded() -> None:
    found = evaluation(1, 1, (HOSTILE,), labels=("grass", HOSTILE))
    text = evaluation_report.page(run_id="r" * 32, facts=FACTS, evaluation=found, pictures=pictures()).decode()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "javascript:" not in text
    assert "default-src 'none'" in text
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == []


def test_a_model_that_cannot_be_used_has_a_page_without_figures() -> None:
    found = {
        "verdict": {"decision": "reject", "claim": "", "reason": "The model cannot be used: it says NaN."},
        "checks": [],
        "comparison": None,
        "champion_version": 0,
        "policy": POLICY.model_dump(),
    }
    text = evaluation_report.page(run_id="r" * 32, facts=FACTS, evaluation=found, pictures=[]).decode()
    assert "it says NaN" in text and "Confusion" not in text


def test_the_overlay_marks_where_the_map_is_high_and_survives_a_flat_one() -> None:
    grey = np.full((64, 64, 3), 100, np.uint8)
    cam = np.zeros((7, 7))
    cam[:3, :3] = 5
    marked = heatmap.overlay(grey, cam).astype(int)
    assert np.abs(marked[:20, :20] - 100).mean() > 5 * np.abs(marked[44:, 44:] - 100).mean()
    assert np.array_equal(heatmap.overlay(grey, np.zeros((7, 7))), grey)


def test_signs_are_written_as_people_write_them() -> None:
    assert evaluation_report.signed(-0.05) == "−5.0 %"
    assert evaluation_report.signed(0.125) == "+12.5 %"
    assert evaluation_report.signed(-0.0004) == "0 %"
