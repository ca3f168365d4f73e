"""
### From a table of image URLs to a snapshot, daily and on demand

1. **plan** counts the image records that are pending, or claimed by a run that may have been killed, and
   divides them into batches.
2. **fetch** runs once for each batch: it claims image records, fetches and validates their pictures and stores
   each under its SHA-256. A URL that fails is recorded with its reason and does not stop the others. What
   other runs have claimed is waited for. Without anything to fetch it is skipped.
3. **recheck**, when asked for, asks the sources again whether they still give the same picture, reads the
   stored objects, and repairs those that rotted.
4. **quality** looks for duplicates, contradicting labels and everything else that must not be trained on, and
   writes the quality report (the button *Report* beside the task). A failed check stops the run with the
   sentence that says what to do; `force` with a `reason` overrules it, and the report says so.
5. **snapshot** freezes what is stored now, with the split of every picture. It is skipped when the latest snapshot
   already holds exactly that; a new one, or an older one that is the latest again, starts `training_pipeline`.

Beside it, **prune** deletes predictions older than `LAWNWATCH_SERVING__RETENTION_DAYS`, with their pictures.

Running it again changes nothing: nothing is fetched or stored twice. The fetches share the pool
`lawnwatch_fetch` (`airflow pools import infra/pools.json` makes it).
"""

from datetime import timedelta
from typing import Any

from airflow.sdk import CronTriggerTimetable, Param, dag

from lawnwatch.pipeline import DEFAULTS, FETCH_POOL, SNAPSHOT, mapped_step, step


@dag(  # type: ignore[untyped-decorator]
    schedule=CronTriggerTimetable("0 3 * * *", timezone="UTC"),
    max_active_runs=1,
    default_args=DEFAULTS,
    doc_md=__doc__,
    tags=["lawnwatch", "data"],
    params={
        "labels": Param(
            None,
            type=["null", "string"],
            description="Only these labels, separated by commas; empty: all.",
        ),
        "limit": Param(
            None, type=["null", "integer"], minimum=1, description="Fetch at most so many images; empty: all."
        ),
        "recheck": Param(
            False,
            type="boolean",
            description="Ask the sources again and read every stored object; repairs what rotted.",
        ),
        "force": Param(
            False,
            type="boolean",
            description="Go on although a quality check fails; the report keeps the reason.",
        ),
        "reason": Param(
            None, type=["null", "string"], description="Why a failed check may be overruled; needed with force."
        ),
    },
)
def data_pipeline() -> None:
    batches = step(
        "plan",
        "ingest",
        "--plan",
        "--labels={{ params.labels or '' }}",
        "{{ '--limit=%d' % params.limit if params.limit else '' }}",
        returns="batches",
    )
    long: dict[str, Any] = {"pool": FETCH_POOL, "execution_timeout": timedelta(hours=6)}
    fetched = mapped_step("fetch", "ingest", batches, **long)
    rechecked = step("recheck", "data", "recheck", when="{{ params.recheck }}", **long)
    quality = step(
        "quality",
        "data",
        "quality",
        "{{ '--force' if params.force else '' }}",
        "--reason={{ params.reason or '' }}",
        report=True,
        trigger_rule="none_failed",
    )
    snapshot = step("snapshot", "snapshot", "create", outlets=(SNAPSHOT,))
    [fetched, rechecked] >> quality >> snapshot
    step("prune", "predictions", "prune")


data_pipeline()
