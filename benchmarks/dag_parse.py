"""CPU time that Airflow spends on each DAG file beyond its own import. Target: less than 1 s each.

python benchmarks/dag_parse.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DAGS = Path(__file__).resolve().parent.parent / "dags"
LIMIT_SECONDS = 1.0

# A process for each file, for a second file would find the first one's imports already made.
MEASURE = """
import json, sys, time
import airflow.sdk, airflow.sdk.configuration, airflow.providers.standard.decorators.branch_python
from airflow.dag_processing.dagbag import DagBag
begun = time.process_time()
bag = DagBag(sys.argv[1])
seconds = time.process_time() - begun
assert not bag.import_errors, bag.import_errors
print(json.dumps({"seconds": seconds, "dags": len(bag.dags)}))
"""


def main() -> int:
    slow = False
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"AIRFLOW_HOME": home, "AIRFLOW__CORE__LOAD_EXAMPLES": "false"}
        for file in sorted(DAGS.glob("*.py")):
            seconds = []
            for _ in range(3):
                done = subprocess.run(
                    [sys.executable, "-c", MEASURE, str(file)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                result = json.loads(done.stdout.splitlines()[-1])
                assert result["dags"] == 1, f"{file.name} holds {result['dags']} DAGs"
                seconds.append(result["seconds"])
            slow |= min(seconds) >= LIMIT_SECONDS
            print(f"{file.name:28} {min(seconds):.2f} s CPU (best of 3; worst {max(seconds):.2f})")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
