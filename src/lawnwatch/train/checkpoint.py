"""Trained candidates on their way from one process, or one pod, to the step that picks among them."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch.errors import NotFound
from lawnwatch.store import ObjectStore
from lawnwatch.train.candidates import Candidate

Arrays = dict[str, NDArray[Any]]


class Checkpoint:
    """What was trained under one fingerprint, in the object store below `train/<fingerprint>/`.

    A candidate is two objects: its arrays, and then a JSON that names their SHA-256. Where one of them is missing,
    cut off or altered the candidate counts as not trained, and is trained again.

    Args:
        fingerprint: of all that training reads; what was trained from another input is never found.
    """

    def __init__(self, store: ObjectStore, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._store = store
        self._folder = f"train/{fingerprint}/"

    def load(self, name: str) -> tuple[Candidate, Arrays] | None:
        """A candidate and its arrays; None when it is not there whole. Raises Unavailable."""
        try:
            facts = json.loads(self._store.get(f"{self._folder}{name}.json"))
            data = self._store.get(f"{self._folder}{name}.npz")
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                return None
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return Candidate(**facts["candidate"]), dict(arrays)
        except (NotFound, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None

    def save(self, name: str, candidate: Candidate, arrays: Arrays) -> None:
        """Keep a candidate. Raises Unavailable."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        data = buffer.getvalue()
        sha256 = hashlib.sha256(data).hexdigest()
        facts = {"candidate": asdict(candidate), "sha256": sha256}
        self._store.put(f"{self._folder}{name}.npz", data, sha256=sha256)
        self._store.put(f"{self._folder}{name}.json", json.dumps(facts).encode(), content_type="application/json")

    def clear(self) -> None:
        """Remove what is kept: the run that it was for is complete. Raises Unavailable."""
        for found in list(self._store.list(self._folder)):
            self._store.delete(found.key)
