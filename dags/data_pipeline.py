"""
### From a table of image URLs to a snapshot

1. **ingest** fetches every image record that is pending, validates the picture and stores it under its
   SHA-256. A URL that fails is recorded with its reason and does not stop the others.
2. **snapshot** freezes what is stored now, with the split of every picture. It is skipped when a snapshot
   already holds exactly that; a new one starts `training_pipeline`.

Running it again changes nothing: nothing is fetched or stored twice.
"""

from airflow.sdk import Param, dag

from lawnwatch.pipeline import DEFAULTS, SNAPSHOT, step


@dag(
    schedule=None,
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
        "limit": Param(None, type=["null", "integer"], minimum=1, description="Fetch at most so many images."),
    },
)
def data_pipeline():
    ingested = step(
        "ingest",
        "ingest",
        "--labels={{ params.labels or '' }}",
        "{{ '--limit=%d' % params.limit if params.limit else '' }}",
    )
    snapshot = step("snapshot", "snapshot", "create", outlets=(SNAPSHOT,))
    ingested >> snapshot


data_pipeline()
