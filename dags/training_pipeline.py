"""
### From a snapshot to a released model, if it has earned it

1. **check** looks whether anything that training reads has changed since the champion was trained, or since a model was
   that was rolled back. If not, **unchanged** says which version stays.
2. **snapshot** verifies the snapshot: every object has its SHA-256 and nothing leaks between the splits. Every later
   step uses this one, even when a newer one appears meanwhile.
3. **candidate** runs once for each kind of model, side by side; what it learned goes to the store.
4. **train** gathers them, trains what is missing, picks one on the validation split and packs it.
5. **evaluate** measures it on the frozen test split, against the champion, and keeps a report (the button *Report*).
6. **gate** reads the verdict: promote, or **keep_champion** says why not. With *approval*, **register** makes the model
   a version, the challenger, and **approve** waits for a person (Required Actions in the menu); no answer is a no.
7. **promote** makes it champion; if somebody else's model was quicker, it is judged again, against that one.
8. **release** publishes the champion's bundle, which starts `inference_pipeline`. Publishing twice changes
   nothing, so it also mends a run that was cut off between promotion and release.

Starts when `data_pipeline` makes a new snapshot, on a retrain decision (an event of the asset `lawnwatch_retrain`,
which trains although nothing changed, for the reason in it), every Sunday, or by hand: press Trigger. A task that is
cleared and run again continues from what was done.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import AssetOrTimeSchedule, CronTriggerTimetable, Param, dag, task

from lawnwatch.pipeline import DEFAULTS, RELEASE, RETRAIN, SNAPSHOT, mapped_step, retrain_reason, say, step

# Who decided to train again: the person at the form, or the asset's event.
REASON = "params.reason or retrain_reason(triggering_asset_events)"
FORCE = "params.force or retrain_reason(triggering_asset_events)"


@task.branch
def anything_new(unchanged: bool) -> str:
    return "unchanged" if unchanged else "snapshot"


@task.branch
def gate(decision: str, params: dict[str, Any] | None = None) -> str:
    if decision != "promote":
        return "keep_champion"
    return "register" if params and params["approval"] else "promote"


@dag(  # type: ignore[untyped-decorator]
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable("0 3 * * 0", timezone="UTC"), assets=SNAPSHOT | RETRAIN
    ),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS,
    doc_md=__doc__,
    tags=["lawnwatch", "training"],
    user_defined_macros={"retrain_reason": retrain_reason},
    params={
        "snapshot": Param(None, type=["null", "string"], description="Snapshot id; empty: the newest."),
        "candidates": Param(
            None,
            type=["null", "array"],
            items={"type": "string"},
            description="Only these candidates, one a line, such as linear_probe; empty: all.",
        ),
        "budget": Param(
            None, type=["null", "integer"], minimum=1, description="Seconds for training; empty: as set for all runs."
        ),
        "force": Param(False, type="boolean", description="Train even when nothing has changed."),
        "reason": Param(
            None,
            type=["null", "string"],
            description="Why; recorded, and a reason to promote a model that is merely not worse.",
        ),
        "approval": Param(False, type="boolean", description="Ask a person before the champion is replaced."),
    },
)
def training_pipeline() -> None:
    wish = (
        "{{ '--candidates=' ~ params.candidates | join(',') if params.candidates else '' }}",
        "{{ '--budget=%d' % params.budget if params.budget else '' }}",
        f"{{{{ '--force' if {FORCE} else '' }}}}",
        f"--reason={{{{ {REASON} }}}}",
    )
    checked = step("check", "train", "--check", "--snapshot={{ params.snapshot or '' }}", *wish, returns="commands")
    unchanged = say.override(task_id="unchanged")(checked["message"])
    snapshot = step("snapshot", "snapshot", "verify", checked["snapshot"])
    candidates = mapped_step("candidate", "train", checked)
    trained = step(
        "train", "train", "--snapshot", snapshot["snapshot"], *wish, trigger_rule="none_failed_min_one_success"
    )
    evaluated = step("evaluate", "evaluate", "--run", trained["run_id"], report=True)
    kept = say.override(task_id="keep_champion")(evaluated["message"])
    registered = step("register", "model", "register", "--run", trained["run_id"])
    approve = ApprovalOperator(
        task_id="approve",
        subject="Make the challenger champion?",
        body="{{ ti.xcom_pull('evaluate', key='message') }}\n\n"
        "[The report]({{ ti.xcom_pull('evaluate', key='report_url') }})",
        defaults=[ApprovalOperator.REJECT],
        response_timeout=timedelta(days=2),
        execution_timeout=None,  # it would cut the waiting short
    )
    promoted = step(
        "promote", "model", "promote", "--run", trained["run_id"], trigger_rule="none_failed_min_one_success"
    )
    released = step("release", "release", outlets=(RELEASE,), trigger_rule="none_failed_min_one_success")

    anything_new(checked["unchanged"]) >> [unchanged, snapshot]
    snapshot >> candidates >> trained
    gate(evaluated["decision"]) >> [registered, promoted, kept]
    registered >> approve >> promoted
    [unchanged, promoted] >> released


training_pipeline()
