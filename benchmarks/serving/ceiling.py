"""The in-process ceiling: the same decode and the same graph, two threads, no HTTP; and what it costs in CPU.

python benchmarks/serving/ceiling.py MODEL.tflite --photos DIR --seconds 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import threading
import time
from pathlib import Path

from lawnwatch import bundle, images


def measure(model: bytes, photos: list[bytes], seconds: float, threads: int) -> dict[str, float]:
    """Images a second and CPU seconds an image."""
    done = [0] * threads
    end = time.perf_counter() + seconds

    def work(number: int, graph: bundle.Graph) -> None:
        for data in itertools.cycle(photos[number:] + photos[:number]):
            _, rgb = images.inspect_and_decode(data, size=graph.size, max_pixels=50_000_000)
            graph(rgb)
            done[number] += 1
            if time.perf_counter() > end:
                return

    graphs = [bundle.Graph(model, classes=2) for _ in range(threads)]
    workers = [threading.Thread(target=work, args=pair) for pair in enumerate(graphs)]
    begun, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {
        "rate": sum(done) / (time.perf_counter() - begun),
        "cpu_ms": 1000 * (time.process_time() - cpu) / sum(done),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    files = [given.photos] if given.photos.is_file() else sorted(given.photos.rglob("*.jpg"))
    found = measure(given.model.read_bytes(), [f.read_bytes() for f in files], given.seconds, given.threads)
    print(json.dumps(found))
