"""From a snapshot to a training run: candidates, the best of them by validation, and the graph that will be served.

Every training picture is seen as it is and in a fixed number of augmented views. The frozen part of the network runs
once for each view and its results are cached by content, so that training a head takes seconds and fine-tuning runs
the top blocks only. The candidates:

    color_baseline  colour and texture statistics, no network: shows what the network is worth; never served
    linear_probe    logistic regression on the frozen embedding, its strength chosen by cross-validation
    fine_tuned      starts from the probe and trains the top blocks, batch norm in inference mode
    small_input     the frozen network on a picture of 160 pixels, its head distilled from the better of the two above

Which weights are exported: of probe and fine-tuned network the one that adapted less whose validation log loss (at its
fitted temperature) is within one standard error of the smaller (Breiman et al. 1984): what cannot be told apart on so
few pictures is decided for the simpler. Which graph of them is served: cost counts among those that are as accurate.
There are float32, int8, and `small_int8`, the graph of small_input; the fastest is served whose accuracy is at most
half a point below the Keras model's and whose log loss is within one standard error of it, on the same pictures.

Temperature and the threshold of "unknown" rest on pictures that the answering head has not seen: by cross-validation
for the probe, on the validation split for a network that was tuned on the rest. A trained candidate is kept in the
object store below `train/<fingerprint>`, where a run that was killed, or whose MLflow went away, finds it again, and
where candidates that were trained as steps of their own (`run_candidate`) are handed over to `run`.

Read in this order: `step` (what is done when), `materials`, `features`, `candidates`, `sweep`, `checkpoint`, `export`,
`tracking`.
"""

from lawnwatch.train.candidates import CANDIDATES, fit_temperature, log_loss
from lawnwatch.train.export import Calibration, load_calibration
from lawnwatch.train.step import CandidateResult, Check, TrainResult, check, run, run_candidate

__all__ = [
    "CANDIDATES",
    "Calibration",
    "CandidateResult",
    "Check",
    "TrainResult",
    "check",
    "fit_temperature",
    "load_calibration",
    "log_loss",
    "run",
    "run_candidate",
]
