"""What candidates are made from. Each thing is made when it is first asked for: a step of its own needs only some."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from lawnwatch import dataset, model
from lawnwatch.config import Settings
from lawnwatch.errors import DataError
from lawnwatch.store import ObjectStore
from lawnwatch.train.features import (
    PROBE_IMAGES,
    Extractor,
    Features,
    Floats,
    Pictures,
    Progress,
    colors,
    first_pictures,
)


class Materials:
    """The network and what it says of the training and the validation split.

    Args:
        work: folder for files that live as long as this.
        cuts: whether something will be fine-tuned, which wants the cut activations.
    """

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        snapshot: dataset.Snapshot,
        work: Path,
        *,
        cuts: bool,
        progress: Progress,
    ) -> None:
        self.settings = settings
        self.store = store
        self.snapshot = snapshot
        self.weights = model.find_weights(settings.weights)
        self.classes = len(snapshot.classes)
        self._work = work
        self._cuts = cuts
        self._progress = progress

    @cached_property
    def pictures(self) -> tuple[Pictures, Pictures]:
        """Training and validation pictures."""
        return Pictures.of(self.snapshot, "train"), Pictures.of(self.snapshot, "validation")

    @cached_property
    def colors(self) -> tuple[Floats, Floats]:
        """(n, COLOR_FEATURES) of the first PROBE_IMAGES pictures of each split."""
        train, val = (
            colors(self.settings, self.store, self.snapshot, part.rows[:PROBE_IMAGES]) for part in self.pictures
        )
        return train, val

    @cached_property
    def network(self) -> model.Network:
        """MobileNetV2 with its starting weights."""
        self._progress(f"Starting TensorFlow and MobileNetV2 with weights {self.weights.describe()[:60]}.")
        pictures = None
        if self.weights.source == "none":
            self._progress("WARNING: LAWNWATCH_WEIGHTS=none: the network starts from random weights.")
            pictures = first_pictures(self.settings, self.store, self.snapshot)
        network = model.load_network(self.weights, scale_on=pictures)
        self._original = network.top.get_weights()
        return network

    def restore(self) -> None:
        """Give the network its starting weights back, after it was tuned."""
        self.network.top.set_weights(self._original)

    @cached_property
    def small_network(self) -> model.Network:
        """The same network for a smaller picture, which it makes itself."""
        return model.load_network(self.weights, size=model.SMALL_SIZE)

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """What the network says of the training and the validation pictures."""
        basis = self.weights.sha256
        if self.weights.source == "none":
            basis = f"none, scaled on snapshot {self.snapshot.id}"
        extractor = Extractor(self.settings, self.store, self.network, basis)
        train, val = self.pictures
        return self._extract(extractor, train, "training"), self._extract(extractor, val, "validation")

    def small_pooled(self, rows: list[dataset.Row]) -> Floats:
        """(n, 1280) embeddings of some pictures by the small network."""
        numbers = np.zeros(len(rows), np.int64)
        extractor = Extractor(
            self.settings, self.store, self.small_network, f"{self.weights.sha256}|{model.SMALL_SIZE}"
        )
        found = extractor.features(
            Pictures(rows, numbers, numbers),
            self._work,
            classes=self.snapshot.classes,
            name="smaller pictures",
            views=0,
            progress=self._progress,
        )
        return found.pooled

    def _extract(self, extractor: Extractor, part: Pictures, split: str) -> Features:
        found = extractor.features(
            part,
            self._work,
            classes=self.snapshot.classes,
            cuts=self._cuts,
            name=f"{split} split",
            progress=self._progress,
        )
        if not np.isfinite(found.pooled).all():
            raise DataError(
                "the network's features are not finite numbers: the starting weights are broken.",
                hint="Set LAWNWATCH_WEIGHTS to an intact file.",
            )
        return found
