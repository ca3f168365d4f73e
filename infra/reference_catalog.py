"""The reference catalog: 400 photographs of lawns on the web, 200 with dandelions and 200 of grass alone.

python infra/reference_catalog.py > urls.csv && lawnwatch catalog import urls.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ORIGIN = "https://raw.githubusercontent.com/btphan95/greenr-airflow/refs/heads/master/data/"
# Nobody can own a name below .invalid: a drawn picture's address can never be mistaken for a real one.
SAMPLE_ORIGIN = "https://samples.invalid/"
LABELS = ("dandelion", "grass")


def records(origin: str = ORIGIN, per_label: int = 200) -> Iterator[tuple[str, str]]:
    """(url, label) of every picture: `<origin><label>/<8 digits>.jpg`."""
    for label in LABELS:
        for number in range(per_label):
            yield f"{origin}{label}/{number:08}.jpg", label


def write(file: Path, rows: Iterable[tuple[str, str]]) -> Path:
    """Write the CSV that `lawnwatch catalog import` reads."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("url", "label"))
        writer.writerows(rows)
    return file


if __name__ == "__main__":
    write(Path("/dev/stdout"), records()) if len(sys.argv) == 1 else sys.exit(__doc__)
