"""The object store: one protocol, a directory or an S3 server behind it.

A reader sees a whole object or none. Keys are relative paths with forward slashes; none leads out of the store.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from lawnwatch.config import Settings
from lawnwatch.errors import InputError, IntegrityError, NotFound, SettingsError, Unavailable

_KEY = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9_.=-]*(/[A-Za-z0-9_=-][A-Za-z0-9_.=-]*)*")
PART_BYTES = 16 * 1024 * 1024


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
            if_absent: leave an object that is there already as it is.
            sha256: what the data must hash to, 64 hexadecimal digits.

        Raises:
            IntegrityError: the data does not hash to `sha256`; nothing is stored.
        """
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises NotFound."""
        ...

    def open(self, key: str) -> AbstractContextManager[BinaryIO]:
        """The object as a binary stream, in a `with`. Raises NotFound."""
        ...

    def stat(self, key: str) -> ObjectInfo | None:
        """What is known of the object; None when there is none."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key begins with prefix, in order of key."""
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
        InputError: empty, absolute, with `..`, or with a character outside A-Z a-z 0-9 _ . = - and the slash.
    """
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise InputError(f"{key[:80]!r} is not an object key.", hint="Keys are like images/ab/abcd.jpg.")
    return key


def sha256_of(data: bytes | Path) -> str:
    """SHA-256 of bytes or of a file's content, 64 hexadecimal digits."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verified(key: str, data: bytes | Path, sha256: str | None) -> None:
    if sha256 is not None and (received := sha256_of(data)) != sha256:
        raise IntegrityError(f"The data for {key} has SHA-256 {received}; expected {sha256}. Nothing was stored.")


# --- a directory ----------------------------------------------------------------------------------------------


class LocalStore:
    """A directory; an object is written beside its place, flushed to disk, then renamed into it."""

    def __init__(self, root: Path) -> None:
        self.root = root

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
        _verified(key, data, sha256)
        if if_absent and target.exists():
            return ObjectInfo(key, target.stat().st_size)
        with _local_faults(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=".put-")
            try:
                with os.fdopen(handle, "wb") as stream:
                    if isinstance(data, bytes):
                        stream.write(data)
                    else:
                        with data.open("rb") as source:
                            while block := source.read(1 << 20):
                                stream.write(block)
                    stream.flush()
                    os.fsync(stream.fileno())
                if if_absent:
                    with suppress(FileExistsError):  # link, unlike rename, never replaces what somebody else just put
                        os.link(name, target)
                else:
                    Path(name).replace(target)
            finally:
                Path(name).unlink(missing_ok=True)
            return ObjectInfo(key, target.stat().st_size, sha256)

    def get(self, key: str) -> bytes:
        with self.open(key) as stream:
            return stream.read()

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        try:
            stream = path.open("rb")
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound(f"The store has no object {key}.") from None
        except OSError as error:
            raise Unavailable(f"The store cannot read {key}: {error.strerror}.") from error
        with stream:
            yield stream

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        return ObjectInfo(key, path.stat().st_size) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if prefix.strip("/"):
            checked_key(prefix.rstrip("/"))
        folder = self.root / prefix.rpartition("/")[0]
        found = (
            (path.relative_to(self.root).as_posix(), path)
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".put-")
        )
        for key, path in sorted(found):
            if key.startswith(prefix):
                yield ObjectInfo(key, path.stat().st_size)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)


@contextmanager
def _local_faults(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"The store cannot write {key}: {error.strerror}.",
            hint="Is the disk full, or the folder read-only?",
        ) from error


# --- an S3 server ---------------------------------------------------------------------------------------------


class S3Store:
    """A bucket of MinIO or any other S3 server; the server makes each put visible whole or not at all."""

    def __init__(
        self,
        *,
        endpoint: str,
        bucket: str,
        prefix: str,
        access_key: str,
        secret_key: str,
        region: str,
        create: bool,
    ) -> None:
        address = urlsplit(endpoint if "//" in endpoint else f"http://{endpoint}")
        if not bucket or not address.netloc:
            raise SettingsError(
                f"LAWNWATCH_STORE_URL needs a bucket and LAWNWATCH_STORE_ENDPOINT a host; received bucket {bucket!r} "
                f"and endpoint {endpoint!r}."
            )
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.endpoint = f"{address.scheme}://{address.netloc}"
        self._client = Minio(
            address.netloc,
            access_key=access_key,
            secret_key=secret_key,
            secure=address.scheme == "https",
            region=region,
            # The client's own default waits 300 s and more for a server that is gone.
            http_client=urllib3.PoolManager(
                maxsize=64,
                timeout=urllib3.Timeout(connect=5, read=30),
                retries=urllib3.Retry(total=3, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504)),
            ),
        )
        with self._faults(""):
            if not self._client.bucket_exists(bucket):
                if not create:
                    raise SettingsError(
                        f"The store at {self.endpoint} has no bucket {bucket!r}.",
                        hint="Create it, or name another.",
                    )
                with suppress(S3Error):  # two processes may start at once
                    self._client.make_bucket(bucket)

    def put(
        self,
        key: str,
        data: bytes | Path,
        *,
        content_type: str = "application/octet-stream",
        if_absent: bool = False,
        sha256: str | None = None,
    ) -> ObjectInfo:
        name = self._name(key)
        _verified(key, data, sha256)
        if if_absent and (found := self.stat(key)) is not None:
            return found
        digest = sha256 or sha256_of(data)
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        with self._faults(key), BytesIO(data) if isinstance(data, bytes) else data.open("rb") as stream:
            self._client.put_object(
                self.bucket,
                name,
                cast(BinaryIO, stream),
                size,
                content_type=content_type,
                metadata={"sha256": digest},
                part_size=PART_BYTES,
            )
        return ObjectInfo(key, size, digest)

    def get(self, key: str) -> bytes:
        with self.open(key) as stream:
            return stream.read()

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        with self._faults(key):
            response = self._client.get_object(self.bucket, self._name(key))
            try:
                yield cast(BinaryIO, response)
            finally:
                response.close()
                response.release_conn()

    def stat(self, key: str) -> ObjectInfo | None:
        try:
            with self._faults(key):
                found = self._client.stat_object(self.bucket, self._name(key))
        except NotFound:
            return None
        metadata = {name.lower(): value for name, value in (found.metadata or {}).items()}
        return ObjectInfo(key, int(found.size or 0), metadata.get("x-amz-meta-sha256"))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._faults(prefix):
            for found in self._client.list_objects(self.bucket, prefix=self.prefix + prefix, recursive=True):
                yield ObjectInfo(str(found.object_name).removeprefix(self.prefix), int(found.size or 0))

    def delete(self, key: str) -> None:
        with self._faults(key):
            self._client.remove_object(self.bucket, self._name(key))

    def _name(self, key: str) -> str:
        return self.prefix + checked_key(key)

    @contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        """Whatever the client or the network raises, as one of our errors."""
        try:
            yield
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchObject"):
                raise NotFound(f"The store has no object {key}.") from None
            if error.code == "NoSuchBucket":
                raise SettingsError(
                    f"The store at {self.endpoint} has no bucket {self.bucket!r}.",
                    hint="Create it, or name another.",
                ) from None
            if error.code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
                raise SettingsError(
                    f"The store at {self.endpoint} refused the keys ({error.code}).",
                    hint="Check LAWNWATCH_STORE_ACCESS_KEY and LAWNWATCH_STORE_SECRET_KEY.",
                ) from None
            raise Unavailable(
                f"The store at {self.endpoint} answered {error.code} for {key or 'the bucket'}."
            ) from error
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(
                f"The store at {self.endpoint} does not answer ({type(error).__name__}).",
                hint="Is the server running, and LAWNWATCH_STORE_ENDPOINT right?",
            ) from error
