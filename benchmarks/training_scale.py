"""Features of 50,000 pictures: memory, and images a second against the ceiling of decoding and of the network.

    python benchmarks/training_scale.py [IMAGES]

Photographs from LAWNWATCH_TEST_PHOTOS are stored again and again with other bytes after their end, so each is a
picture of its own to the store, the cache and the network; without them drawn samples. Weights from LAWNWATCH_WEIGHTS.
Memory is the resident set after each tenth of the pictures. The ceiling is what the same process does in turns without
a store and without caches: decode, then run the network on batches that lie in memory.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "infra"))
import samples  # noqa: E402
from lawnwatch import dataset, images, model  # noqa: E402
from lawnwatch.config import Settings  # noqa: E402
from lawnwatch.store import ObjectStore, open_store  # noqa: E402
from lawnwatch.train.features import Extractor, Pictures  # noqa: E402

ROUNDS = 5
BATCH = 32


def stored(store: ObjectStore, photos: list[Path], count: int) -> dataset.Snapshot:
    """A snapshot of so many pictures, all of them for training."""
    rows = []
    for i in range(count):
        file = photos[i % len(photos)]
        data = file.read_bytes() + i.to_bytes(4, "big")
        sha = hashlib.sha256(data).hexdigest()
        key = f"images/{sha[:2]}/{sha}.jpg"
        store.put(key, data)
        rows.append(dataset.Row(sha, key, file.parent.name, "train", str(i), f"http://a/{i}", 224, 224, 0.5, 9.0))
    classes = sorted({row.label for row in rows})
    return dataset.Snapshot("0" * 64, datetime.now(UTC), classes, {}, False, rows)


def ceiling(network: model.Network, photos: list[Path]) -> tuple[float, float]:
    """Median images a second of decoding, one thread, and of the network."""
    tf = model.tensorflow()

    @tf.function(input_signature=[tf.TensorSpec([BATCH, 224, 224, 3], tf.uint8)])
    def forward(batch: object) -> object:
        return tf.reduce_mean(network.top(network.bottom(batch, training=False), training=False), [1, 2])

    raw = [file.read_bytes() for file in photos[:BATCH]]
    decoding, running = [], []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        batch = np.stack([images.decode(data, size=model.SIZE, max_pixels=10**8) for data in raw])
        decoded = time.perf_counter()
        forward(batch)
        decoding.append(len(raw) / (decoded - begun))
        running.append(len(raw) / (time.perf_counter() - decoded))
    return statistics.median(decoding[1:]), statistics.median(running[1:])


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    with tempfile.TemporaryDirectory() as folder:
        given = os.environ.get("LAWNWATCH_TEST_PHOTOS")
        photos = sorted((Path(given) if given else samples.draw(Path(folder) / "photos")).glob("*/*.jpg"))
        photos = sorted(photos, key=lambda file: file.name)[: len(photos) // BATCH * BATCH]
        settings = Settings(home=Path(folder), weights=os.environ.get("LAWNWATCH_WEIGHTS", "none"))
        store = open_store(settings)
        snapshot = stored(store, photos, count)
        model.start(17, settings.train.device)
        weights = model.find_weights(settings.weights)
        network = model.load_network(weights)
        decoding, running = ceiling(network, photos)
        process, memory, begun = psutil.Process(), [], time.perf_counter()
        cpu = sum(process.cpu_times()[:2])
        extractor = Extractor(settings, store, network, weights.sha256)
        pictures = Pictures.of(snapshot, "train")
        for part in np.array_split(np.arange(count), 10):
            some = Pictures([pictures.rows[i] for i in part], pictures.labels[part], pictures.groups[part])
            extractor.features(
                some, Path(folder), classes=snapshot.classes, name="pictures", views=0, progress=lambda line: None
            )
            memory.append(process.memory_info().rss / 1e6)
        seconds, cpu = time.perf_counter() - begun, sum(process.cpu_times()[:2]) - cpu
    rate, best = count / seconds, 1 / (1 / running + 1 / decoding)
    print(f"{count} images in {seconds:.0f} s: {rate:.0f} images/s, {1e3 * cpu / count:.1f} ms of CPU an image")
    print(f"ceiling: decode {decoding:.0f}/s on one thread, network {running:.0f}/s; in turns {best:.0f}/s")
    print(f"{rate / best:.2f} of decode and network in turns, {rate / running:.2f} of the network alone")
    print(f"resident after each tenth, MB: {', '.join(f'{size:.0f}' for size in memory)}")


if __name__ == "__main__":
    main()
