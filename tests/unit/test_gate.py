"""The gate: exact tests against enumeration, counted cases, and its promises by simulation.

`benchmarks/gate_simulation.py` counts the same at 1,000 challengers and three sizes of the test split.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from lawnwatch import evaluate, gate
from lawnwatch.config import GateSettings

pytestmark = pytest.mark.unit

POLICY = GateSettings()


def pair(wins: int, losses: int, n: int) -> tuple[gate.Evidence, gate.Evidence]:
    """A challenger and a champion that differ on so many images, spread over two classes."""
    challenger, champion = np.ones(n, bool), np.ones(n, bool)
    champion[:wins] = False
    challenger[wins : wins + losses] = False
    labels = ["dandelion" if i % 2 else "grass" for i in range(n)]
    return gate.Evidence(labels, challenger), gate.Evidence(labels, champion)


def alone(right: int, n: int) -> gate.Evidence:
    answers = np.ones(n, bool)
    answers[: n - right] = False
    return gate.Evidence(["dandelion" if i % 2 else "grass" for i in range(n)], answers)


def status(verdict: gate.Decision) -> dict[str, str]:
    return {check.name: check.status for check in verdict.checks}


# --- the tests ----------------------------------------------------------------------------------------------


def test_mcnemar_is_exact_and_one_sided() -> None:
    assert gate.mcnemar(0, 0) == 1.0
    assert gate.mcnemar(6, 0) == pytest.approx(1 / 64)
    assert gate.mcnemar(7, 1) == pytest.approx(9 / 256)
    assert gate.mcnemar(1, 7) == pytest.approx(255 / 256)


@pytest.mark.parametrize("margin", [0.05, 0.15, -0.02])
def test_the_test_of_not_worse_keeps_its_level_for_every_rate_of_wins(margin: float) -> None:
    """Every outcome of 40 images is judged; no true rates at the margin give a wrong promotion more often than 5 %."""
    n, alpha = 40, 0.05
    most = [
        max((c for c in range(n - b + 1) if gate.not_worse(b, c, n, margin) <= alpha), default=-1) for b in range(n + 1)
    ]
    for wins in np.linspace(max(0, -margin), (1 - margin) / 2, 50):
        w = np.arange(n + 1)
        lose = (wins + margin) / (1 - wins)
        chance = sum(binom.pmf(b, n, wins) * binom.cdf(most[b], n - b, lose) for b in w if most[b] >= 0)
        assert chance <= alpha + 1e-6, wins


def test_more_losses_never_speak_for_the_challenger() -> None:
    for wins in (0, 2, 5):
        p = [gate.not_worse(wins, losses, 80, 0.05) for losses in range(12)]
        assert p == sorted(p)


def test_with_no_difference_the_test_is_of_the_rule_of_three() -> None:
    """59 images without a loss show 5 %: 0.95^59 < 0.05 (Hanley and Lippman-Hand 1983)."""
    assert gate.not_worse(0, 0, 58, 0.05) > 0.05 * 0.95
    assert gate.not_worse(0, 0, 62, 0.05) < 0.05


def test_beyond_the_exact_range_the_normal_limit_agrees() -> None:
    exact = gate.not_worse(100, 300, 5000, 0.05)
    assert gate.not_worse(101, 303, 5050, 0.05) == pytest.approx(exact, rel=0.25)


def test_the_interval_ends_about_where_the_exact_test_turns() -> None:
    challenger, champion = pair(3, 1, 80)
    found = gate.paired_gain(challenger.right, champion.right, alpha=0.05, margin=0.05)
    assert found.gain == pytest.approx(2 / 80) and found.low < found.gain < found.high
    assert gate.not_worse(3, 1, 80, -found.low) == pytest.approx(0.05, abs=0.01)
    assert found.bootstrap[0] == pytest.approx(found.low, abs=0.02)
    assert (found.wins, found.losses) == (3, 1)


# --- counted cases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "decision"),
    [
        (78, 80, "promote"),
        (50, 80, "reject"),
        (40, 80, "reject"),
        (66, 80, "inconclusive"),
        (22, 30, "inconclusive"),  # below the floor of 75 %, but its upper bound is 86 %
        (20, 20, "inconclusive"),
    ],
)
def test_the_first_champion_needs_the_floors(right: int, n: int, decision: str) -> None:
    found = gate.decide(POLICY, alone(right, n))
    assert found.decision == decision, found.reason
    assert f"on {n} images" in found.reason
    assert found.claim == ("floors" if decision == "promote" else "")
    if decision == "inconclusive":
        assert found.more_images is not None and found.more_images > 0
        assert f"about {found.more_images} more" in found.reason


@pytest.mark.parametrize(("right", "decision"), [(66, "promote"), (58, "reject")])
def test_the_images_that_the_floor_asks_for_tell(right: int, decision: str) -> None:
    """Above the floor they show that it is reached, below it that it is not."""
    found = gate.decide(POLICY, alone(right, 80))
    assert found.decision == "inconclusive" and found.more_images
    grown = 80 + found.more_images
    assert gate.decide(POLICY, alone(round(right / 80 * grown), grown)).decision == decision


def test_two_missed_pictures_of_a_rare_class_are_not_enough_to_reject() -> None:
    rare = replace(alone(78, 80), labels=["rare"] * 2 + ["grass"] * 78)
    found = gate.decide(POLICY, rare)
    assert status(found)["recall of rare"] == "unsure" and found.decision == "inconclusive", found.reason
    many = replace(alone(70, 80), labels=["rare"] * 10 + ["grass"] * 70)
    assert status(gate.decide(POLICY, many))["recall of rare"] == "failed"


def test_a_class_that_no_test_image_shows_is_not_taken_on_trust() -> None:
    found = gate.decide(POLICY, replace(alone(78, 80), classes=["dandelion", "grass", "moss"]))
    assert status(found)["recall of moss"] == "unsure" and found.decision == "inconclusive", found.reason
    assert gate.decide(POLICY, replace(alone(78, 80), classes=["dandelion", "grass"])).decision == "promote"


def test_an_answer_is_constant_by_its_probabilities_and_not_by_its_class() -> None:
    varied = np.linspace(0.1, 0.4, 20)
    evaluate.must_vary(np.stack([varied, 1 - varied], axis=1), ["dandelion", "grass"])
    with pytest.raises(evaluate.UnusableModel, match="'grass' whatever the picture shows"):
        evaluate.must_vary(np.tile([0.4, 0.6], (20, 1)), ["dandelion", "grass"])


def test_no_test_images_is_no_decision() -> None:
    assert gate.decide(POLICY, alone(0, 0)).decision == "inconclusive"


@pytest.mark.parametrize(
    ("wins", "losses", "n", "reasons", "decision", "claim"),
    [
        (12, 1, 80, (), "promote", "better"),
        (1, 1, 80, ("new data",), "promote", "not worse"),
        (1, 1, 80, (), "inconclusive", ""),  # not worse, but why change
        (0, 0, 80, ("new data",), "promote", "not worse"),
        (0, 0, 30, ("new data",), "inconclusive", ""),  # 39: thirty images cannot show a margin of 5 %
        (2, 5, 80, ("new data",), "inconclusive", ""),
        (0, 12, 80, ("new data",), "reject", ""),  # 39: worse
    ],
)
def test_39_the_gate_on_counted_cases(
    wins: int, losses: int, n: int, reasons: tuple[str, ...], decision: str, claim: str
) -> None:
    found = gate.decide(POLICY, *pair(wins, losses, n), reasons)
    assert (found.decision, found.claim) == (decision, claim), found.reason
    assert f"{wins} won, {losses} lost" in found.reason
    assert found.comparison is not None and found.comparison["reasons"] == list(reasons)
    if claim == "not worse":
        assert "new data" in found.reason


def test_one_class_may_not_pay_for_another() -> None:
    """Better overall, but eight of forty dandelions are lost."""
    challenger, champion = pair(0, 0, 80)
    dandelion = np.array([label == "dandelion" for label in challenger.labels])
    champion.right[np.flatnonzero(~dandelion)[:20]] = False
    challenger.right[np.flatnonzero(dandelion)[:8]] = False
    found = gate.decide(POLICY, challenger, champion, ("new data",))
    assert status(found)["accuracy against champion"] == "passed"
    assert status(found)["dandelion against champion"] == "failed"
    assert found.decision == "reject" and "dandelion: 0 won, 8 lost" in found.reason


def test_a_class_too_small_to_show_anything_does_not_stop_the_rest() -> None:
    challenger, champion = pair(0, 0, 200)
    labels = ["rare"] * 5 + list(challenger.labels[5:])
    found = gate.decide(POLICY, replace(challenger, labels=labels), replace(champion, labels=labels), ("new data",))
    assert status(found)["rare against champion"] == "not judged"
    assert found.decision == "promote"


@pytest.mark.parametrize(
    ("name", "worse", "decision"),
    [
        ("calibration", {"ece": {"value": 0.3, "low": 0.2, "high": 0.4}}, "reject"),
        ("calibration", {"ece": {"value": 0.16, "low": 0.05, "high": 0.3}}, "inconclusive"),
        ("unknown", {"unknown": np.ones(80, bool)}, "reject"),
        ("unknown", {"unknown": np.arange(80) < 16}, "inconclusive"),
        ("robustness", {"robust": {"dark": np.arange(80) % 2 == 0}}, "inconclusive"),
        ("robustness", {"robust": {"dark": np.arange(80) % 4 == 0}}, "reject"),
        ("latency", {"latency_ms": 300.0}, "reject"),
        ("size", {"model_bytes": 60_000_000}, "reject"),
        ("calibration against champion", {"losses": np.full(80, 0.5)}, "reject"),
        ("latency against champion", {"latency_ms": 20.0}, "reject"),
        ("robustness against champion", {"robust": {"dark": np.arange(80) % 4 > 0}}, "reject"),
    ],
)
def test_each_limit_stops_a_promotion_alone(name: str, worse: dict, decision: str) -> None:
    measured = {
        "losses": np.full(80, 0.1),
        "ece": {"value": 0.02, "low": 0.01, "high": 0.05},
        "unknown": np.arange(80) < 12,
        "robust": {"dark": np.ones(80, bool)},
        "latency_ms": 10.0,
        "model_bytes": 9_000_000,
    }
    challenger, champion = (replace(one, **measured) for one in pair(0, 0, 80))
    assert gate.decide(POLICY, challenger, champion, ("new data",)).decision == "promote"
    found = gate.decide(POLICY, replace(challenger, **worse), champion, ("new data",))
    assert found.decision == decision, found.reason
    assert status(found)[name] == ("failed" if decision == "reject" else "unsure")


def test_every_threshold_of_the_policy_is_in_use() -> None:
    """A setting that decides nothing would be a promise to nobody."""
    text = "".join(Path(module.__file__).read_text() for module in (gate, evaluate))
    assert [name for name in GateSettings.model_fields if f"policy.{name}" not in text] == []


def test_the_number_of_images_to_tell_is_enough_when_collected() -> None:
    challenger, champion = pair(1, 1, 50)
    found = gate.decide(POLICY, challenger, champion, ("new data",))
    assert found.decision == "inconclusive" and found.more_images
    grown = 50 + found.more_images
    same = round(grown / 50)
    assert gate.decide(POLICY, *pair(same, same, grown), ("new data",)).decision == "promote"


# --- the promises -------------------------------------------------------------------------------------------


def promoted(wins: float, losses: float, reasons: tuple[str, ...], *, n: int = 80, runs: int = 400) -> float:
    """Share of challengers promoted that truly win and lose these shares of the images."""
    rng = np.random.default_rng([5, n, round(1000 * losses)])
    found = 0
    for _ in range(runs):
        won, lost, _ = rng.multinomial(n, [wins, losses, 1 - wins - losses])
        found += gate.decide(POLICY, *pair(int(won), int(lost), n), reasons).decision == "promote"
    return found / runs


ALLOWED = POLICY.alpha + 3 * np.sqrt(POLICY.alpha * (1 - POLICY.alpha) / 400)


@pytest.mark.parametrize("n", [80, 200])
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_no_better_challengers_are_hardly_ever_called_better(rate: float, n: int) -> None:
    assert promoted(rate, rate, (), n=n) <= ALLOWED


@pytest.mark.parametrize("n", [80, 200])
@pytest.mark.parametrize("wins", [0.0, 0.02, 0.1])
def test_truly_worse_challengers_are_hardly_ever_promoted(wins: float, n: int) -> None:
    """The paired bootstrap in place of the exact test fails here: 9 % of those that only lose, on 80 images."""
    assert promoted(wins, wins + POLICY.margin, ("new data",), n=n) <= ALLOWED


def test_a_clearly_better_challenger_is_found() -> None:
    assert promoted(0.10, 0.02, (), n=200) > 0.8


@pytest.mark.parametrize(
    ("change", "speedup", "wanted"),
    [(-0.005, 1.6, "passed"), (0.01, 1.1, "passed"), (-0.0063, 1.6, "failed"), (0.01, 1.05, "failed")],
)
def test_a_reduced_graph_must_cost_next_to_nothing_and_be_worth_it(change: float, speedup: float, wanted: str) -> None:
    """Two of 320 images are 0.63 points."""
    model = replace(alone(78, 80), variant=gate.Reduced("int8", 320, change, speedup))
    verdict = gate.decide(POLICY, model)
    assert status(verdict)["served variant"] == wanted
    assert verdict.decision == ("promote" if wanted == "passed" else "reject")
    assert "served variant" not in status(gate.decide(POLICY, alone(78, 80)))
