"""The figures against published and hand-computed values."""

from __future__ import annotations

from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest

from lawnwatch import measure
from lawnwatch.train import fit_temperature

pytestmark = pytest.mark.unit


def test_wilson_agrees_with_the_textbook() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert measure.wilson(successes, n) == pytest.approx((low, high), abs=1e-4)
    assert measure.wilson(0, 0) == (0.0, 1.0)


def test_figures_of_a_case_counted_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    found = measure.figures(p, np.array([0, 1, 0, 1]))
    assert found["accuracy"] == 0.5
    assert found["balanced_accuracy"] == 0.5
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.2, 0.4, 0.7]).mean())
    assert found["brier"] == pytest.approx(2 * np.mean([0.01, 0.64, 0.36, 0.09]))
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.6 + 0.3) / 4)
    assert found["auc"] == pytest.approx(3 / 4)  # of the four pairs of a 0 and a 1, three are in order


def test_the_area_under_the_curve_counts_ties_half_and_needs_two_classes() -> None:
    tied = np.full((6, 2), 0.5)
    assert measure.area_under_curve(tied, np.array([0, 1, 0, 1, 1, 1])) == 0.5
    assert measure.area_under_curve(tied, np.ones(6, np.int64)) is None
    perfect = np.eye(3)[[0, 1, 2, 0]]
    assert measure.area_under_curve(perfect, np.array([0, 1, 2, 0])) == 1.0


def test_measure_gives_every_figure_and_every_count() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 120)
    p = rng.dirichlet([1, 1, 1], 120) * 0.4 + np.eye(3)[labels] * 0.6
    found = measure.measure(p, labels, ["a", "b", "c"])
    assert found["images"] == 120
    assert set(found["metrics"]) == {
        "accuracy", "balanced_accuracy", "macro_f1", "log_loss", "brier", "ece", "auc",
    }  # fmt: skip
    assert np.array(found["confusion"]["matrix"]).sum() == 120
    assert found["per_class"]["a"]["support"] == int((labels == 0).sum())
    assert sum(one["images"] for one in found["reliability"]) == 120


def good_model(rng: np.random.Generator, n: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(n, classes) honest probabilities and labels; right in 97.5 % of cases where there are two classes."""
    labels = np.arange(n) % classes
    away = NormalDist().inv_cdf(0.975) * np.sqrt(2)
    seen = rng.standard_normal((n, classes)) + away * np.eye(classes)[labels]
    powers = np.exp(away * (seen - seen.max(axis=1, keepdims=True)))
    return powers / powers.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize(("n", "classes"), [(40, 2), (80, 2), (90, 3)])
def test_of_a_good_model_the_intervals_of_few_images_hold_the_truth(n: int, classes: int) -> None:
    rng = np.random.default_rng(6)
    truth = measure.figures(*good_model(rng, 400_000, classes)) | {"ece": 0.0}
    assert truth["accuracy"] == pytest.approx(0.975, abs=1e-3) or classes > 2
    held = Counter(dict.fromkeys(truth, 0))
    names = [str(k) for k in range(classes)]
    for _ in range(100):
        found = measure.measure(*good_model(rng, n, classes), names)["metrics"]
        held.update(name for name in truth if found[name]["low"] <= truth[name] <= found[name]["high"])
    assert min(held.values()) >= 89, held  # 95 are promised; 89 is 2.7 standard errors below


@pytest.mark.parametrize("n", [40, 80])
def test_without_a_mistake_no_share_is_certain(n: int) -> None:
    labels = np.arange(n) % 2
    found = measure.measure(np.where(np.eye(2)[labels] > 0, 0.97, 0.03), labels, ["a", "b"])["metrics"]
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc"):
        assert found[name]["value"] == found[name]["high"] == 1
        assert 1 - 5 / n < found[name]["low"] < 1 - 2 / n, name
    # An answer in 34 may have been wrong; what a wrong one costs is in the answers.
    assert found["log_loss"]["high"] > 2 * found["log_loss"]["value"]


def test_bounds_of_the_means_agree_with_what_they_come_from() -> None:
    # Newcombe 2006 turns an area and its counts into bounds that lie where the area is 1.96 standard errors away.
    said = np.array([[0.1, 0.9]] * 27 + [[0.9, 0.1]] * 23)
    low, high = measure.area_interval(said, np.repeat([1, 0, 1, 0], [20, 7, 10, 13]))
    area = (20 / 30 * 13 / 20) + 0.5 * (20 / 30 * 7 / 20 + 10 / 30 * 13 / 20)
    for bound in (low, high):
        pairs = 1 + 24 * (1 - bound) / (2 - bound) + 24 * bound / (1 + bound)
        assert abs(area - bound) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) * pairs / (30 * 20)), rel=1e-4)
    # Two classes of the same counts: MOVER's distance is Wilson's divided by the root of two.
    wide, narrow = measure.wilson(36, 40), measure.balanced_accuracy_interval(np.array([[36, 4], [4, 36]]))
    assert (0.9 - narrow[0]) * np.sqrt(2) == pytest.approx(0.9 - wide[0])
    # The same mistakes count in both F1, whose mean is then as uncertain as each of them.
    j = measure.wilson(36, 44)
    assert measure.macro_f1_interval(np.array([[36, 4], [4, 36]])) == pytest.approx([2 * x / (1 + x) for x in j])


def test_the_range_of_an_honest_calibration_error_holds_the_honest_and_not_the_overconfident() -> None:
    rng = np.random.default_rng(7)
    honest = boastful = 0
    for _ in range(40):
        p, labels = good_model(rng, 200)
        low, high = measure.calibrated_range(p)
        honest += low <= measure.expected_calibration_error(p, labels) <= high
        p = p**3 / (p**3).sum(axis=1, keepdims=True)
        boastful += measure.expected_calibration_error(p, labels) > measure.calibrated_range(p)[1]
    assert honest >= 36 and boastful >= 30


def test_a_class_that_is_never_predicted_has_no_precision() -> None:
    found = measure.measure(np.array([[0.9, 0.1]] * 4), np.array([0, 0, 1, 1]), ["a", "b"])
    assert found["per_class"]["b"]["precision"]["value"] is None
    assert found["per_class"]["b"]["recall"]["value"] == 0


def test_leaving_out_the_unsure_leaves_out_their_mistakes() -> None:
    sure = np.linspace(0.99, 0.51, 100)
    labels = np.zeros(100, np.int64)
    labels[90:] = 1  # the ten least sure are wrong
    found = measure.coverage(np.stack([sure, 1 - sure], axis=1), labels)
    errors = {round(step["coverage"], 2): step["error"]["value"] for step in found["steps"]}
    assert errors[1.0] == pytest.approx(0.1) and errors[0.9] == 0.0
    assert found["curve"][-1] == [1.0, pytest.approx(0.1)]
    assert 0 < found["area"] < 0.1


def test_a_part_is_called_worse_only_beyond_chance_and_never_on_a_few_images() -> None:
    right = np.ones(200, bool)
    right[:12] = False  # all mistakes lie in the first forty
    places = ["bad"] * 40 + ["good"] * 150 + ["rare"] * 10
    found = {one["part"]: one for one in measure.slices(right, {"host": places})}
    assert found["bad"]["low"] and not found["good"]["low"]
    assert found["rare"]["few"] and not found["rare"]["low"]
    right[190:] = False
    assert not {one["part"]: one for one in measure.slices(right, {"host": places})}["rare"]["low"]


def test_of_many_parts_without_a_difference_hardly_any_is_called_worse() -> None:
    rng = np.random.default_rng(3)
    blamed = 0
    for _ in range(100):
        places = [f"h{i}" for i in rng.integers(0, 10, 400)]
        blamed += any(one["low"] for one in measure.slices(rng.random(400) < 0.9, {"host": places}))
    assert blamed <= 11  # 5 of 100 are promised; 11 is three standard errors above


def test_equal_values_are_never_parted() -> None:
    names = measure.thirds(np.array([1.0] * 9 + [2.0]), ("low", "middle", "high"), "{:.0f} px")
    assert len(set(names[:9])) == 1
    assert names[0] == "low (to 1 px)"


def test_the_bootstrap_of_a_mean_covers_as_it_says() -> None:
    rng = np.random.default_rng(4)
    below = above = 0
    for seed in range(300):
        mean, low, high = measure.bootstrap_mean(rng.exponential(1.0, 80), 0.05, resamples=400, seed=seed)
        assert low < mean < high
        below += low > 1.0
        above += high < 1.0
    assert below <= 27 and above <= 36  # 15 are promised; a skewed mean's upper bound is known to fall short


def test_temperature_recovers_overconfidence_and_survives_a_perfect_split() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, size=(4000, 2))
    shares = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    labels = (rng.random(4000) < shares).astype(np.int64)
    assert fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.1)
    perfect = np.array([[4.0, -4.0]] * 30 + [[-4.0, 4.0]] * 30)
    assert fit_temperature(perfect, np.repeat([0, 1], 30)) > 0.5
