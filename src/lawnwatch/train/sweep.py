"""The optional search for better numbers than the usual ones, within a stated time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lawnwatch.config import Settings
from lawnwatch.train.candidates import FINE_TUNING, PROBE_C, FineTuning
from lawnwatch.train.features import Progress

Trials = list[dict[str, Any]]


def probe_sweep(
    settings: Settings, loss_of: Callable[[bool, float], float], progress: Progress
) -> tuple[list[tuple[bool, float]], Trials]:
    """The probe's strength, and whether it sees the augmented views, by the log loss of its cross-validation.

    Args:
        loss_of: whether it sees the views, and C, to a log loss.

    Returns:
        The one setting that was best, and all trials.
    """

    def ask(trial: Any) -> float:
        return loss_of(trial.suggest_categorical("views", [False, True]), trial.suggest_float("C", 1e-4, 1, log=True))

    best, trials = _search(settings, "linear_probe", ask, {"views": False, "C": PROBE_C[1]}, progress)
    return [(bool(best["views"]), float(best["C"]))], trials


def tuning_sweep(
    settings: Settings, loss_of: Callable[[FineTuning], float], progress: Progress
) -> tuple[FineTuning, Trials]:
    """Fine-tuning's learning rate and the length of its schedule, by the validation log loss.

    Args:
        loss_of: a setting to a log loss.
    """
    most = settings.train.fine_tune_epochs

    def ask(trial: Any) -> float:
        rate = trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)
        return loss_of(FineTuning(rate, trial.suggest_int("epochs", 1, most)))

    usual = {"learning_rate": FINE_TUNING.learning_rate, "epochs": most}
    best, trials = _search(settings, "fine_tuned", ask, usual, progress)
    return FineTuning(float(best["learning_rate"]), int(best["epochs"])), trials


def _search(
    settings: Settings, name: str, ask: Callable[[Any], float], usual: dict[str, Any], progress: Progress
) -> tuple[dict[str, Any], Trials]:
    """Half of the sweep's seconds for each of the two; the usual numbers come first, so nothing worse is found."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.train.seed))
    study.enqueue_trial(usual)
    # A loss that is no number ends a trial, not the sweep.
    study.optimize(ask, timeout=settings.train.sweep_seconds / 2)
    trials = [
        {**trial.params, "log_loss": trial.value, "seconds": trial.duration.total_seconds() if trial.duration else None}
        for trial in study.trials
        if trial.value is not None and math.isfinite(trial.value)
    ]
    if not trials:
        return usual, trials
    progress(f"{name}: {len(trials)} trials; best log loss {study.best_value:.4f} with {study.best_params}.")
    return dict(study.best_params), trials
