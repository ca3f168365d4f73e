"""How long the road from snapshot to verdict takes by the command line, and how the usual recipe would compare.

Photographs from LAWNWATCH_TEST_PHOTOS (`<label>/*.jpg`), weights from LAWNWATCH_WEIGHTS; without them drawn samples
and no weights, and the table says so. Prints wall and CPU seconds of each step (a busy machine stretches the first,
not the second), and their ratio to the usual recipe: full fine-tuning at 224² with no cache, every picture decoded and
augmented in every epoch. Of its ten epochs one is measured, after a step that builds the graph, and counted ten times.
"""

from __future__ import annotations

import http.server
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "infra"))
import samples  # noqa: E402

LIMIT_SECONDS = 120.0
USUAL_EPOCHS = 10
BATCH = 32

Cost = tuple[float, float]  # wall and CPU seconds


class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def step(*argv: str) -> tuple[Cost, dict[str, object]]:
    """Run one command; its cost, start of the interpreter included, and what it printed."""
    started, cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "lawnwatch", *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"lawnwatch {' '.join(argv)} failed: {done.stderr[-2000:]}")
    cost = time.perf_counter() - started, cpu_seconds(resource.RUSAGE_CHILDREN) - cpu
    return cost, json.loads(done.stdout)


def usual_epoch(photos: Path, weights: str) -> tuple[Cost, int]:
    """One epoch of full fine-tuning as tutorials do it, on the training share of the photographs."""
    import numpy as np

    from lawnwatch import images, model
    from lawnwatch.train.features import augment

    k = model.keras()
    base = k.applications.MobileNetV2(
        weights=None if weights == "none" else weights, include_top=False, input_shape=(224, 224, 3)
    )
    pooled = k.layers.GlobalAveragePooling2D()(base.output)
    network = k.Model(base.input, k.layers.Dense(2, activation="softmax")(pooled))
    network.compile(optimizer=k.optimizers.Adam(1e-4), loss="sparse_categorical_crossentropy")
    files = sorted(photos.glob("*/*.jpg"))
    labels = sorted({file.parent.name for file in files})
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(files))[: int(len(files) * 0.65) // BATCH * BATCH]  # whole batches: one graph

    def batch(numbers: np.ndarray) -> None:
        pictures = [images.decode(files[i].read_bytes(), size=256, max_pixels=50_000_000) for i in numbers]
        views = np.stack([augment(picture, rng) for picture in pictures]) / np.float32(127.5) - 1
        network.train_on_batch(views, np.array([labels.index(files[i].parent.name) for i in numbers]))

    batch(chosen[:BATCH])
    started, cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)
    for start in range(0, len(chosen), BATCH):
        batch(chosen[start : start + BATCH])
    return (time.perf_counter() - started, cpu_seconds(resource.RUSAGE_SELF) - cpu), len(chosen)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        given = os.environ.get("LAWNWATCH_TEST_PHOTOS")
        photos = Path(given).resolve() if given else samples.draw(home / "photos")
        weights = os.environ.setdefault("LAWNWATCH_WEIGHTS", "none")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_address[1]}"
        os.environ |= {"LAWNWATCH_HOME": folder, "LAWNWATCH_FETCH__ALLOW_CIDRS": '["127.0.0.0/8"]'}
        urls = home / "urls.csv"
        lines = (f"{web}/{file.parent.name}/{file.name},{file.parent.name}" for file in sorted(photos.glob("*/*.jpg")))
        urls.write_text("url,label\n" + "\n".join(lines) + "\n")
        step("catalog", "import", str(urls))
        ingest, report = step("ingest")
        snapshot, _ = step("snapshot", "create")
        train, trained = step("train")
        evaluate, verdict = step("evaluate", "--run", str(trained["run_id"]))
        epoch, pictures = usual_epoch(photos, weights)
    steps = {"snapshot": snapshot, "train": train, "evaluate": evaluate}
    wall, cpu = (sum(cost[i] for cost in steps.values()) for i in (0, 1))
    print(f"pictures: {'given' if given else 'drawn samples'}, weights: {Path(weights).name}")
    print(f"{'ingest':10} {ingest[0]:7.1f} s {ingest[1]:7.1f} s CPU ({report['stored']} images)")
    for name, cost in steps.items():
        print(f"{name:10} {cost[0]:7.1f} s {cost[1]:7.1f} s CPU")
    print(f"snapshot → verdict {wall:.1f} s, {wall / LIMIT_SECONDS:.2f} of the {LIMIT_SECONDS:.0f} s; {cpu:.1f} s CPU")
    usual = [USUAL_EPOCHS * seconds for seconds in epoch]
    print(
        f"usual recipe: 1 epoch of {pictures} images {epoch[0]:.1f} s, {epoch[1]:.1f} s CPU; {USUAL_EPOCHS} epochs, "
        f"without evaluation or export, {usual[0]:.0f} s, {usual[1]:.0f} s CPU: {usual[0] / wall:.2f} times this "
        f"road's seconds, {usual[1] / cpu:.2f} times its CPU"
    )
    print(verdict["message"])


if __name__ == "__main__":
    main()
