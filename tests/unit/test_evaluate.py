"""The statistics against published and hand-computed values, and the gate's error rates by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from lawnwatch import evaluate
from lawnwatch.config import GateSettings
from lawnwatch.train import fit_temperature

pytestmark = pytest.mark.unit

GATE = GateSettings()


def pair(wins: int, losses: int, n: int) -> evaluate.PairedGain:
    challenger, champion = np.ones(n, bool), np.ones(n, bool)
    champion[:wins] = False
    challenger[wins : wins + losses] = False
    return evaluate.paired_gain(challenger, champion, alpha=GATE.alpha)


def test_wilson_agrees_with_the_textbook() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert evaluate.wilson(successes, n) == pytest.approx((low, high), abs=1e-4)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_is_exact() -> None:
    assert evaluate.mcnemar(0, 0) == 1.0
    assert evaluate.mcnemar(6, 0) == pytest.approx(2 / 64)
    assert evaluate.mcnemar(1, 7) == pytest.approx(2 * 9 / 256)


def test_figures_of_a_case_counted_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    found = evaluate.figures(p, np.array([0, 1, 0, 1]))
    assert found["accuracy"] == 0.5
    assert found["balanced_accuracy"] == 0.5
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.2, 0.4, 0.7]).mean())
    assert found["brier"] == pytest.approx(2 * np.mean([0.01, 0.64, 0.36, 0.09]))
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.6 + 0.3) / 4)


def test_measure_gives_an_interval_around_every_figure() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 120)
    p = rng.dirichlet([1, 1, 1], 120) * 0.4 + np.eye(3)[labels] * 0.6
    found = evaluate.measure(p, labels, ["a", "b", "c"])
    assert found["images"] == 120
    for name, one in found["metrics"].items():
        assert one["low"] <= one["high"], name
        if name != "ece":  # the bootstrap of a mean of absolute values is biased upwards
            assert one["low"] <= one["value"] <= one["high"], name
    assert np.array(found["confusion"]["matrix"]).sum() == 120
    assert found["per_class"]["a"]["support"] == int((labels == 0).sum())


def test_a_class_that_is_never_predicted_has_no_precision() -> None:
    found = evaluate.measure(np.array([[0.9, 0.1]] * 4), np.array([0, 0, 1, 1]), ["a", "b"])
    assert found["per_class"]["b"]["precision"]["value"] is None
    assert found["per_class"]["b"]["recall"]["value"] == 0


def test_temperature_recovers_overconfidence_and_survives_a_perfect_split() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, size=(4000, 2))
    shares = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    labels = (rng.random(4000) < shares).astype(np.int64)
    assert fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.1)
    perfect = np.array([[4.0, -4.0]] * 30 + [[-4.0, 4.0]] * 30)
    assert fit_temperature(perfect, np.repeat([0, 1], 30)) > 0.5


@pytest.mark.parametrize(
    ("right", "n", "decision"),
    [(78, 80, "promote"), (50, 80, "reject"), (40, 80, "reject"), (66, 80, "inconclusive"), (20, 20, "inconclusive")],
)
def test_the_first_champion_needs_the_floors(right: int, n: int, decision: str) -> None:
    found = evaluate.judge_floors(right, n, GATE)
    assert found.decision == decision
    assert f"on {n} images" in found.reason
    if decision == "inconclusive":
        assert found.more_images is not None and found.more_images > 0
        assert f"about {found.more_images} more" in found.reason


def test_no_test_images_is_no_decision() -> None:
    assert evaluate.judge_floors(0, 0, GATE).decision == "inconclusive"


@pytest.mark.parametrize(
    ("wins", "losses", "n", "why", "decision"),
    [
        (12, 1, 80, "", "promote"),  # shown to be better
        (1, 1, 80, "new data", "promote"),  # not worse, with a reason
        (1, 1, 80, "", "inconclusive"),  # not worse, but why change
        (0, 0, 80, "new data", "promote"),
        (0, 0, 30, "new data", "inconclusive"),  # 39: thirty images cannot show a margin of 5 %
        (2, 5, 80, "new data", "inconclusive"),
        (0, 12, 80, "new data", "reject"),  # 39: worse
    ],
)
def test_39_the_gate_on_counted_cases(wins: int, losses: int, n: int, why: str, decision: str) -> None:
    found = evaluate.judge_challenger(pair(wins, losses, n), GATE, why)
    assert found.decision == decision, found.reason
    assert f"{wins} images won, {losses} lost" in found.reason


def test_the_number_of_images_to_tell_is_enough_when_collected() -> None:
    seen = pair(1, 1, 30)
    more = evaluate.images_to_tell(seen, GATE)
    grown = pair(round((30 + more) / 30), round((30 + more) / 30), 30 + more)
    assert evaluate.judge_challenger(grown, GATE, "new data").decision == "promote"


def simulated(better: float, worse: float, n: int = 200, runs: int = 400) -> list[evaluate.Decision]:
    """Verdicts on challengers that truly win `better` and lose `worse` of the pictures."""
    rng = np.random.default_rng(5)
    decisions = []
    for _ in range(runs):
        wins, losses, _ = rng.multinomial(n, [better, worse, 1 - better - worse])
        decisions.append(evaluate.judge_challenger(pair(int(wins), int(losses), n), GATE, ""))
    return decisions


def test_no_better_challengers_are_hardly_ever_called_better() -> None:
    share = np.mean([one.decision == "promote" for one in simulated(0.04, 0.04)])
    assert share <= GATE.alpha / 2 + 0.015  # one side of a two-sided test, plus noise of 400 runs


def test_truly_worse_challengers_are_hardly_ever_promoted_as_not_worse() -> None:
    rng = np.random.default_rng(6)
    promoted = 0
    for _ in range(400):
        wins, losses, _ = rng.multinomial(200, [0.02, 0.07, 0.91])  # worse by exactly the margin
        verdict = evaluate.judge_challenger(pair(int(wins), int(losses), 200), GATE, "new data")
        promoted += verdict.decision == "promote"
    assert promoted / 400 <= GATE.alpha + 0.03


def test_a_clearly_better_challenger_is_found() -> None:
    assert np.mean([one.decision == "promote" for one in simulated(0.10, 0.02)]) > 0.8
