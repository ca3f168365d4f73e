"""
### From a released model to answers

1. **rollout** points the API at the champion's bundle and waits until `/model/info` confirms it. The API
   loads a bundle only when it reproduces its golden answers; if it does not come up, the old model goes on
   serving.
2. **verify** asks the API as a client would: health, readiness, and the golden pictures through `POST
   /predict`.

Starts when `training_pipeline` releases a model, or by hand. Rolling out what is already served changes
nothing.
"""

from airflow.sdk import Param, dag

from lawnwatch.pipeline import DEFAULTS, RELEASE, step


@dag(  # type: ignore[untyped-decorator]
    schedule=[RELEASE],
    max_active_runs=1,
    default_args=DEFAULTS,
    doc_md=__doc__,
    tags=["lawnwatch", "inference"],
    params={
        "version": Param("champion", type="string", description="Released version number or alias to serve."),
    },
)
def inference_pipeline() -> None:
    rolled_out = step("rollout", "rollout", "start", "--version={{ params.version }}")
    verified = step("verify", "rollout", "verify")
    rolled_out >> verified


inference_pipeline()
