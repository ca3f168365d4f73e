"""
### From a snapshot to a released model, if it has earned it

1. **check** looks whether anything that training reads has changed. If not, **unchanged** says which
   version stays.
2. **train** trains the candidates and picks one on the validation split.
3. **evaluate** measures it on the frozen test split, against the champion, and gives a verdict.
4. **promote** makes it champion when the verdict says so; else **keep_champion** says why not.
5. **release** publishes the champion's bundle, which starts `inference_pipeline`. Publishing twice changes
   nothing, so it also mends a run that was cut off between promotion and release.

Starts when `data_pipeline` makes a new snapshot, or by hand: press Trigger.
"""

from airflow.sdk import Param, dag, task

from lawnwatch.pipeline import DEFAULTS, RELEASE, SNAPSHOT, say, step


@task.branch
def anything_new(unchanged: bool) -> str:
    return "unchanged" if unchanged else "train"


@task.branch
def verdict(decision: str) -> str:
    return "promote" if decision == "promote" else "keep_champion"


@dag(
    schedule=[SNAPSHOT],
    max_active_runs=1,
    default_args=DEFAULTS,
    doc_md=__doc__,
    tags=["lawnwatch", "training"],
    params={
        "force": Param(False, type="boolean", description="Train even when nothing has changed."),
        "reason": Param(
            None,
            type=["null", "string"],
            description="Why; recorded, and required to promote a model that is merely not worse.",
        ),
        "snapshot": Param(None, type=["null", "string"], description="Snapshot id; empty: the newest."),
    },
)
def training_pipeline():
    wish = (
        "--snapshot={{ params.snapshot or '' }}",
        "{{ '--force' if params.force else '' }}",
        "--reason={{ params.reason or '' }}",
    )
    checked = step("check", "train", "--check", *wish)
    unchanged = say.override(task_id="unchanged")(checked["message"])
    trained = step("train", "train", *wish)
    evaluated = step("evaluate", "evaluate", "--run", trained["run_id"])
    promoted = step("promote", "model", "promote", "--run", trained["run_id"])
    kept = say.override(task_id="keep_champion")(evaluated["message"])
    released = step("release", "release", outlets=(RELEASE,), trigger_rule="none_failed_min_one_success")

    anything_new(checked["unchanged"]) >> [unchanged, trained]
    verdict(evaluated["decision"]) >> [promoted, kept]
    [unchanged, promoted] >> released


training_pipeline()
