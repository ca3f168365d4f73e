"""The pictures of a snapshot: a size-capped cache of their bytes, and a stream for training."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch import images, log
from lawnwatch.config import Settings
from lawnwatch.dataset.snapshot import Row
from lawnwatch.errors import IntegrityError
from lawnwatch.store import ObjectStore

PARALLEL = 8  # objects read at once: a store answers in milliseconds, decoding takes two cores
PART = ".part-"
PART_SECONDS = 3600
RESCAN_SHARE = 0.05
FREED_SHARE = 0.1

logger = log.get(__name__)

Prepare = Callable[[Row, bytes], NDArray[np.uint8]]


class ObjectCache:
    """Local copies of objects, for several processes at once; each is verified by its hash at every reading.

    The least recently used go when the folder outgrows `max_bytes`. Another process' copies are seen when the folder is
    looked through, after each twentieth of `max_bytes` written: the folder stays within 1.05 × `max_bytes` a process.
    A disk that is full or read-only ends the caching and nothing else.

    Args:
        folder: where; made when the first copy is.
        max_bytes: largest size of all copies together; 0: keep none.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._keeps = max_bytes > 0
        self._unseen: int | None = None  # bytes written since the folder was looked through; None: never was
        self._lock = threading.Lock()

    @classmethod
    def of(cls, settings: Settings) -> ObjectCache:
        """The cache of this machine, as the settings say."""
        return cls(settings.home / "cache" / "images", settings.data.cache_bytes)

    def read(self, store: ObjectStore, key: str, sha256: str) -> bytes:
        """An object's bytes, from the cache when a true copy lies there.

        Raises:
            NotFound: the store has no such object.
            IntegrityError: the object is not what its SHA-256 says.
            Unavailable: the store does not answer.
        """
        file = self.folder / sha256[:2] / sha256
        try:
            data = file.read_bytes()
        except OSError:
            pass
        else:
            if hashlib.sha256(data).hexdigest() == sha256:
                with suppress(OSError):  # evicted meanwhile, or a read-only disk
                    os.utime(file)
                return data
        data = store.get(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(
                f"The object {key} is not the picture that was stored.",
                hint="`lawnwatch data recheck` fetches it anew where its source still has it.",
            )
        self._keep(file, data)
        return data

    def _keep(self, file: Path, data: bytes) -> None:
        if not self._keeps or len(data) > self.max_bytes:
            return
        part = file.with_name(f"{PART}{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(data)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
            with self._lock:
                if self._unseen is None or self._unseen + len(data) > self.max_bytes * RESCAN_SHARE:
                    self._evict()
                    self._unseen = 0
                else:
                    self._unseen += len(data)
        except OSError as error:
            self._keeps = False
            logger.warning(
                "pictures are read without a cache from here on: it cannot be written",
                error=error.strerror or type(error).__name__,
            )

    def _evict(self) -> None:
        """Delete the least recently used copies until a tenth of the room is free; not while another process does."""
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            found: list[tuple[float, int, str]] = []
            for entry in self._entries():
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    # Half a copy that a killed process left is the first to go.
                    left = entry.name.startswith(PART) and time.time() - stat.st_mtime > PART_SECONDS
                    found.append((0.0 if left else stat.st_mtime, stat.st_size, entry.path))
            size = sum(each for _, each, _ in found)
            if size <= self.max_bytes and (not found or min(found)[0] > 0):
                return
            for used, each, path in sorted(found):
                if size <= self.max_bytes * (1 - FREED_SHARE) and used > 0:
                    break
                Path(path).unlink(missing_ok=True)
                size -= each

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.is_dir():
                    with os.scandir(folder) as entries:
                        yield from entries


class Stream:
    """Pictures in batches, fetched and prepared by tf.data in other threads while earlier batches are used.

    `dataset` is the tf.data.Dataset of ((b, *shape) uint8, (b,) int32 class numbers). Iterating over the stream gives
    the same as NumPy arrays, and raises what really happened (NotFound, IntegrityError, Unavailable, ImageError) where
    TensorFlow would only quote it. In memory are the pictures under way and two batches.

    Args:
        rows: the pictures, in their order.
        classes: a label's index here is its class number.
        batch: pictures in a batch; the last one may have fewer.
        prepare: a row and its bytes to a uint8 array; called in several threads.
        shape: of what `prepare` returns.
        shuffle_seed: another order, which depends on this number alone.
        parallel: pictures under way at once.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        store: ObjectStore,
        cache: ObjectCache,
        *,
        classes: Sequence[str],
        batch: int,
        prepare: Prepare,
        shape: tuple[int, ...],
        shuffle_seed: int | None = None,
        parallel: int = PARALLEL,
    ) -> None:
        import tensorflow as tf

        self._rows = rows
        self._store = store
        self._cache = cache
        self._prepare = prepare
        self._fault: Exception | None = None
        labels = np.array([classes.index(row.label) for row in rows], np.int32)
        order = np.arange(len(rows))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)

        def load(number: Any, label: Any) -> Any:
            picture = tf.numpy_function(self._read, [number], tf.uint8, stateful=False)
            picture.set_shape(shape)
            return picture, label

        options = tf.data.Options()
        options.threading.private_threadpool_size = parallel  # the shared pool has a thread a core: few for waiting
        self.dataset = (
            tf.data.Dataset.from_tensor_slices((order, labels[order]))
            .map(load, num_parallel_calls=parallel, deterministic=True)
            .batch(batch)
            .prefetch(2)
            .with_options(options)
        )

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
        import tensorflow as tf

        try:
            yield from self.dataset.as_numpy_iterator()
        except tf.errors.OpError:
            if self._fault is None:
                raise
            raise self._fault from None

    def _read(self, number: int) -> NDArray[np.uint8]:
        row = self._rows[number]
        try:
            return self._prepare(row, self._cache.read(self._store, row.object_key, row.sha256))
        except Exception as error:
            self._fault = self._fault or error
            raise


def decoder(size: int, *, max_pixels: int) -> Prepare:
    """A picture's bytes to (size, size, 3) uint8 RGB, as serving decodes them."""

    def decode(_row: Row, data: bytes) -> NDArray[np.uint8]:
        return images.decode(data, size=size, max_pixels=max_pixels)

    return decode
