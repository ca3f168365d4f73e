"""Which model serves: follows the release target, proves a new bundle beside the old one, then switches.

A bundle that cannot be proven is rejected and the old one goes on. While the store is down nothing changes.
At start with the store down, or silent for a moment, the bundle that was verified last on this machine is read
from the cache and proven again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from lawnwatch import bundle, log
from lawnwatch.config import Settings
from lawnwatch.errors import IntegrityError, LawnwatchError, NoModel, Unavailable
from lawnwatch.release_target import TargetEntry, target_of_process
from lawnwatch.serving.predictor import Predictor
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

STORE_PATIENCE = 0.5  # at the start: a store answers within milliseconds, or within its time-outs of a minute
RETRY_REJECTED_SECONDS = 30.0  # a bundle that was refused may have been published anew under the same name


@dataclass(frozen=True)
class Loaded:
    """A model that serves."""

    predictor: Predictor
    loaded_at: datetime
    load_seconds: float


@dataclass(frozen=True)
class Rejection:
    """A bundle that was refused."""

    sha256: str
    reason: str
    at: float


class ModelWatcher:
    """Polls the release target in a thread of its own and keeps `current`.

    Readers take `current` once and use what they got: the switch is one assignment, and a replaced model
    lives until its last answer is out.
    """

    def __init__(self, settings: Settings, open_store: Callable[[], ObjectStore]) -> None:
        self._settings = settings
        self._open_store = open_store
        self._store: ObjectStore | None = None
        self._cache = settings.home / "cache" / "bundles"
        self._last_good = settings.home / "cache" / "serving.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-watcher", daemon=True)
        self._impatience = threading.Timer(STORE_PATIENCE, self._start_without_store)
        self._impatience.daemon = True
        self._loading = threading.Lock()
        self.current: Loaded | None = None
        self.target: TargetEntry | None = None
        self.rejected: Rejection | None = None
        self.rejections = 0
        self.reason = "the model is being loaded"
        self.store_reachable = False

    def start(self) -> None:
        """Begin to follow the target; more than once is once."""
        if self._thread.ident is None:
            self._thread.start()
            self._impatience.start()

    def stop(self) -> None:
        """Stop following; the current model stays."""
        self._stop.set()
        self._impatience.cancel()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def require(self) -> Predictor:
        """The model that serves now.

        Raises:
            NoModel: there is none; the message says why.
        """
        loaded = self.current
        if loaded is None:
            raise NoModel(
                f"No model is serving: {self.reason}.",
                hint="Run `lawnwatch rollout start` after a release, or try again soon.",
            )
        return loaded.predictor

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.follow()
            except Exception as error:  # the watcher outlives any fault; the old model goes on
                self.reason = "the model watcher failed; the log says why"
                logger.exception("model watcher failed", error=str(error))
            self._stop.wait(self._settings.serving.poll_seconds)

    def follow(self) -> None:
        """Look at the target once and load what it names."""
        try:
            if self._store is None:
                self._store = self._open_store()
            pointer = target_of_process(self._settings, self._store)
        except Unavailable as error:
            self._store_is_down(error)
            return
        except IntegrityError as error:
            self.store_reachable = True
            self._say(error.message)
            return
        self.store_reachable = True
        if pointer is None:
            self.target = None
            self.reason = "" if self.current else "no model was ever rolled out"
            return
        self.target = pointer.stable
        self._go_to(self._store, pointer.stable)

    def _go_to(self, store: ObjectStore, entry: TargetEntry) -> None:
        if self.current is not None and self.current.predictor.sha256 == entry.sha256:
            self.reason, self.rejected = "", None
            return
        refused = self.rejected
        if (
            refused is not None
            and refused.sha256 == entry.sha256
            and time.monotonic() - refused.at < RETRY_REJECTED_SECONDS
        ):
            self.reason = _refusal(refused.reason)
            return
        try:
            with self._loading:
                self._load(store, entry.sha256, entry.model_version)
        except Unavailable as error:
            self._store_is_down(error)
        except LawnwatchError as error:  # altered, missing, not proven, a golden picture that cannot be decoded …
            self._reject(entry.sha256, error)

    def _load(self, store: ObjectStore, sha256: str, version: int | None) -> None:
        """Read, verify, prove, switch."""
        started = time.perf_counter()
        found = bundle.read(store, sha256, self._cache)
        if version is not None and found.manifest.model_version != version:
            raise IntegrityError(
                f"bundle {sha256[:12]} is v{found.manifest.model_version}; the target says v{version}."
            )
        try:
            predictor = Predictor(
                found,
                threads=self._settings.serving.threads,
                max_pixels=self._settings.images.max_pixels,
            )
        except LawnwatchError:
            raise
        except Exception as error:  # whole by its hashes, and yet its parts do not fit together: as bad as altered
            logger.exception("bundle cannot be used", sha256=sha256, error=str(error))
            raise IntegrityError(
                f"bundle {sha256[:12]} cannot be used ({type(error).__name__}; see the log)."
            ) from error
        seconds = time.perf_counter() - started
        self.current = Loaded(predictor, datetime.now(UTC), seconds)
        self.reason, self.rejected = "", None
        logger.info("model loaded", version=predictor.version, sha256=sha256, seconds=round(seconds, 3))
        self._remember(sha256)

    def _reject(self, sha256: str, error: LawnwatchError) -> None:
        if self.rejected is None or self.rejected.sha256 != sha256:
            logger.error("bundle rejected", sha256=sha256, reason=error.message)
            self.rejections += 1
        self.rejected = Rejection(sha256, error.message, time.monotonic())
        self.reason = _refusal(error.message)

    def _store_is_down(self, error: LawnwatchError) -> None:
        self.store_reachable = False
        reason = f"the object store does not answer ({error.message.rstrip('.')})"
        self._say(reason)
        self._do_without(reason)

    def _start_without_store(self) -> None:
        if not self.store_reachable:
            self._do_without("the object store has not answered yet")

    def _do_without(self, reason: str) -> None:
        with self._loading:
            if self.current is None and self._load_last_good():
                self.reason = f"{reason}; the model is the one that served last"

    def _load_last_good(self) -> bool:
        """Serve the bundle this machine served last, from the cache, verified and proven again."""
        try:
            sha256 = str(json.loads(self._last_good.read_text())["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        try:
            self._load(cast(ObjectStore, _NoStore()), sha256, None)
        except LawnwatchError as error:
            self.reason = f"{self.reason}; the cached model cannot be used: {error.message.rstrip('.')}"
            return False
        logger.warning("serving the cached model, the store is down", sha256=sha256)
        return True

    def _remember(self, sha256: str) -> None:
        try:
            self._last_good.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(f"{self._last_good}.{os.getpid()}")
            draft.write_text(json.dumps({"sha256": sha256}))
            draft.replace(self._last_good)
        except OSError as error:
            logger.warning("the cache cannot be written", error=str(error))

    def _say(self, reason: str) -> None:
        if reason != self.reason and self.current is not None:
            logger.warning("the release target cannot be followed", reason=reason)
        self.reason = reason


def _refusal(reason: str) -> str:
    return f"the target's bundle was rejected: {reason.rstrip('.')}"


class _NoStore:
    """Stands where a store is not to be asked: only the cache counts."""

    def __getattr__(self, _: str) -> object:
        raise Unavailable("the object store does not answer")
