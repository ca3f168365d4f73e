"""From a snapshot to a training run: candidates, the best of them by validation, and the graph that will be served.

Every training picture is seen as it is and in a fixed number of augmented views. The frozen part of the network runs
once for each view and its results are cached by content, so that training a head takes seconds and fine-tuning runs
the top blocks only. Three candidates:

    color_baseline  colour and texture statistics, no network: shows what the network is worth; never served
    linear_probe    logistic regression on the frozen embedding, its strength chosen by cross-validation
    fine_tuned      starts from the probe and trains the top blocks, batch norm in inference mode

The simplest servable candidate is exported whose validation log loss (at its fitted temperature) is within one
standard error of the smallest (Breiman et al. 1984): what cannot be told apart on so few pictures is decided for the
model that adapted less. It is exported in float32 and in int8; int8 is served where it is not worse than the Keras
model and is faster. Temperature and the threshold of "unknown" rest on pictures that the answering head has not seen:
by cross-validation for the probe, on the validation split for a network that was tuned on the rest. The computation
is local and checkpointed below `home/cache/train/<fingerprint>`; it is logged to MLflow when it is whole, so a run that
was killed, or whose MLflow went away, continues from what was done.

Read in this order: `step` (what is done when), `features`, `candidates`, `export`, `tracking`.
"""

from lawnwatch.train.candidates import CANDIDATES, fit_temperature, log_loss
from lawnwatch.train.export import Calibration, load_calibration
from lawnwatch.train.step import Check, TrainResult, check, run

__all__ = [
    "CANDIDATES",
    "Calibration",
    "Check",
    "TrainResult",
    "check",
    "fit_temperature",
    "load_calibration",
    "log_loss",
    "run",
]
