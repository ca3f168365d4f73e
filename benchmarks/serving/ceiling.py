"""The in-process ceiling: the same decode and the same graph, two threads, no HTTP; and what it costs in CPU.

python benchmarks/serving/ceiling.py MODEL.tflite --photos DIR --seconds 8 [--rate 200]

With --rate pictures arrive so many a second, evenly, and what is measured is how long each takes from then on: what
this machine makes of the bare work, whatever serves it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
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


def open_loop(model: bytes, photos: list[bytes], seconds: float, threads: int, rate: float) -> dict[str, float]:
    """Milliseconds from a picture's arrival to its answer."""
    arrivals: queue.SimpleQueue[tuple[float, bytes] | None] = queue.SimpleQueue()
    taken: list[float] = []

    def work(graph: bundle.Graph) -> None:
        while (arrived := arrivals.get()) is not None:
            due, data = arrived
            _, rgb = images.inspect_and_decode(data, size=graph.size, max_pixels=50_000_000)
            graph(rgb)
            taken.append(1000 * (time.perf_counter() - due))

    workers = [threading.Thread(target=work, args=(bundle.Graph(model, classes=2),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    begun = time.perf_counter()
    for number, data in zip(range(int(seconds * rate)), itertools.cycle(photos), strict=False):
        due = begun + number / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        arrivals.put((due, data))
    for _ in workers:
        arrivals.put(None)
    for worker in workers:
        worker.join()
    ordered = sorted(taken[len(taken) // 10 :])  # the first warm the caches
    return {"p50_ms": ordered[len(ordered) // 2], "p99_ms": ordered[int(0.99 * len(ordered))]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.0)
    given = parser.parse_args()
    files = [given.photos] if given.photos.is_file() else sorted(given.photos.rglob("*.jpg"))
    photos = [file.read_bytes() for file in files]
    if given.rate:
        found = open_loop(given.model.read_bytes(), photos, given.seconds, given.threads, given.rate)
    else:
        found = measure(given.model.read_bytes(), photos, given.seconds, given.threads)
    print(json.dumps(found))
