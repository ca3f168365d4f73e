"""The object store: one protocol, a directory or an S3 server behind it.

A reader sees a whole object or none. Keys are relative paths with forward slashes; none leads out of the store.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

from lawnwatch.config import Settings
from lawnwatch.errors import InputError, IntegrityError, NotFound, Unavailable

KEY = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9_.=-]{0,254}(/[A-Za-z0-9_=-][A-Za-z0-9_.=-]{0,254})*")


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its key, its size in bytes, and its SHA-256 where the store remembers one."""

    key: str
    size: int
    sha256: str | None = None


class ObjectStore(Protocol):
    """What every store does. Each method raises Unavailable when the store does not answer in bounded time."""

    def put(
        self,
        key: str,
        data: bytes | Path,
        *,
        content_type: str = "application/octet-stream",
        if_absent: bool = False,
        sha256: str | None = None,
    ) -> ObjectInfo:
        """Store an object whole, or not at all.

        Args:
            key: where.
            data: the bytes, or the file that holds them.
            content_type: media type, where the store keeps one.
            if_absent: leave an object that is there already as it is. Of several writers at once exactly one wins,
                and each learns from the answer's sha256 what is stored now.
            sha256: what the data must hash to, 64 hexadecimal digits.

        Raises:
            InputError: no such key is possible, or the file cannot be read.
            IntegrityError: the data does not hash to `sha256`, or arrived damaged; nothing is stored.
            Conflict: `if_absent`, and the other's object was deleted just then.
        """
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes, as stored: compare a hash where one is known. Raises NotFound."""
        ...

    def open(self, key: str) -> AbstractContextManager[BinaryIO]:
        """The object as a binary stream to be read once, forward, in a `with`.

        Raises:
            NotFound: there is none.
            Unavailable: also while reading, when the connection breaks; what was read until then is not the object.
        """
        ...

    def stat(self, key: str) -> ObjectInfo | None:
        """What is known of the object; None when there is none."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key begins with prefix, in order of key (byte by byte), in bounded memory; no hashes."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; no object is no error."""
        ...


def open_store(settings: Settings) -> ObjectStore:
    """The store that the settings name; the embedded folder, or a bucket outside production, is made when missing.

    Raises:
        SettingsError: the bucket does not exist (production), or the keys are refused.
        Unavailable: the server does not answer.
    """
    url = urlsplit(settings.store_url)
    if url.scheme == "file":
        return LocalStore(Path(unquote(url.path)))
    from lawnwatch.store.s3 import S3Store  # its client is a tenth of what a server without S3 has to import

    return S3Store(
        endpoint=settings.store_endpoint,
        bucket=url.netloc,
        prefix=url.path.strip("/"),
        access_key=settings.store_access_key,
        secret_key=settings.store_secret_key.get_secret_value(),
        region=settings.store_region,
        create=settings.environment != "production",
    )


def checked_key(key: str) -> str:
    """The key itself, when it is one.

    Raises:
        InputError: empty, absolute, with `..`, with a character outside A-Z a-z 0-9 _ . = - and the slash, or too
            long (512 characters in all, 255 between slashes).
    """
    if not KEY.fullmatch(key) or len(key) > 512:
        raise InputError(f"{key[:80]!r} is not an object key.", hint="Keys are like images/ab/abcd.jpg.")
    return key


def check_prefix(prefix: str) -> None:
    if prefix:
        checked_key(prefix.removesuffix("/"))


def sha256_of(data: bytes | Path) -> str:
    """SHA-256 of bytes or of a file's content, 64 hexadecimal digits."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def source_of(key: str, data: bytes | Path) -> Iterator[BinaryIO]:
    try:
        stream = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    except OSError as error:
        raise InputError(f"The file to be stored as {key} cannot be read: {error.strerror}.") from error
    with stream:
        yield stream


def verify(key: str, received: str, expected: str | None) -> None:
    if expected is not None and received != expected:
        raise IntegrityError(f"The data for {key} has SHA-256 {received}; expected {expected}. Nothing was stored.")


class Stream(io.RawIOBase):
    """An object's bytes as they come: a fault of disk or network while reading is one of our errors.

    Only the reading: what the reader's own `with` block raises, such as a full disk of its own, stays what it is.
    """

    def __init__(self, source: Any, faults: Callable[[], AbstractContextManager[None]]) -> None:
        self.source_of, self._faults = source, faults

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._faults():
            return int(self.source_of.readinto(buffer))


# --- a directory ----------------------------------------------------------------------------------------------


class LocalStore:
    """A directory; an object is written aside, flushed to disk, then renamed into its place."""

    STAGING = ".put"  # begins like no key

    def __init__(self, root: Path) -> None:
        self.root = root
        self._swept = False

    def put(
        self,
        key: str,
        data: bytes | Path,
        *,
        content_type: str = "application/octet-stream",
        if_absent: bool = False,
        sha256: str | None = None,
    ) -> ObjectInfo:
        target = self._path(key)
        with source_of(key, data) as source, _local_faults(f"write {key}"), self._staged() as staged:
            digest = hashlib.sha256()
            while block := source.read(1 << 20):
                digest.update(block)
                staged.write(block)
            verify(key, digest.hexdigest(), sha256)
            size = staged.tell()
            staged.flush()
            os.fsync(staged.fileno())
            _make_folder(target.parent)
            if if_absent:
                try:
                    os.link(staged.name, target)  # unlike rename, never replaces what somebody else just put
                except FileExistsError:
                    return ObjectInfo(key, target.stat().st_size, sha256_of(target))
            else:
                Path(staged.name).replace(target)
            _flush_folder(target.parent)
            return ObjectInfo(key, size, digest.hexdigest())

    def get(self, key: str) -> bytes:
        with self.open(key) as stream:
            return stream.read()

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        faults = partial(_local_faults, f"read {key}")
        with faults():
            try:
                file = path.open("rb", buffering=0)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NotFound(f"The store has no object {key}.") from None
        with file, io.BufferedReader(Stream(file, faults), 1 << 16) as stream:
            yield cast(BinaryIO, stream)

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with _local_faults(f"read {key}"):
            return ObjectInfo(key, path.stat().st_size) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with _local_faults(f"list {prefix or 'itself'}"):
            yield from self._walk(prefix.rpartition("/")[0], prefix)

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        """One folder's names in memory at a time; a folder sorts as its name with the slash, which is key order."""
        try:
            with os.scandir(self.root / folder) as found:
                entries = {entry.name + "/" * entry.is_dir(follow_symlinks=False): entry for entry in found}
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in sorted(entries):
            key = f"{folder}/{name}" if folder else name
            if key.endswith("/"):
                if (key.startswith(prefix) or prefix.startswith(key)) and not name.startswith("."):
                    yield from self._walk(key[:-1], prefix)
            elif key.startswith(prefix) and KEY.fullmatch(key) and entries[name].is_file():
                with suppress(FileNotFoundError):  # deleted while the list was made
                    yield ObjectInfo(key, entries[name].stat().st_size)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _local_faults(f"delete {key}"), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextmanager
    def _staged(self) -> Iterator[BinaryIO]:
        """A new file that no key names, on the objects' file system; gone at the end unless it was renamed."""
        folder = self.root / self.STAGING
        _make_folder(folder)
        if not self._swept:
            self._sweep(folder)
        path = folder / secrets.token_hex(16)
        try:
            with path.open("xb") as stream:
                with suppress(OSError):  # some network file systems have no locks; there nothing is swept
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield stream
        finally:
            path.unlink(missing_ok=True)

    def _sweep(self, folder: Path) -> None:
        """Remove what killed writers left behind. A living writer has locked its file in the first minute."""
        self._swept = True
        for path in folder.iterdir():
            with suppress(OSError), path.open("rb") as left:
                if time.time() - os.fstat(left.fileno()).st_mtime > 60:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def _make_folder(folder: Path) -> None:
    """As `mkdir -p`, and flushed: after a power cut an object is in its folder, and the folder in its own."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _local_faults(action: str) -> Iterator[None]:
    try:
        yield
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise InputError(
            f"The store cannot {action}: a key cannot be both an object and a folder of objects.",
            hint="Choose another key.",
        ) from error
    except OSError as error:
        raise Unavailable(
            f"The store cannot {action}: {error.strerror}.",
            hint="Is the disk full, or the folder not accessible to this user?",
        ) from error
