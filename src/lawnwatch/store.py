"""The object store: one protocol, a directory or an S3 server behind it.

A reader sees a whole object or none. Keys are relative paths with forward slashes; none leads out of the store.
"""

from __future__ import annotations

import base64
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
from urllib.parse import unquote, unquote_plus, urlsplit
from xml.etree import ElementTree
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.datatypes import CompleteMultipartUploadResult
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, InputError, IntegrityError, LawnwatchError, NotFound, SettingsError, Unavailable

_KEY = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9_.=-]{0,254}(/[A-Za-z0-9_=-][A-Za-z0-9_.=-]{0,254})*")
PART_BYTES = 16 * 1024 * 1024  # of a larger object, what one request carries
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 15.0  # a server that says nothing for so long is asked again, or given up
TRIES = 3


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
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise InputError(f"{key[:80]!r} is not an object key.", hint="Keys are like images/ab/abcd.jpg.")
    return key


def _check_prefix(prefix: str) -> None:
    if prefix:
        checked_key(prefix.removesuffix("/"))


def sha256_of(data: bytes | Path) -> str:
    """SHA-256 of bytes or of a file's content, 64 hexadecimal digits."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _source(key: str, data: bytes | Path) -> Iterator[BinaryIO]:
    try:
        stream = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    except OSError as error:
        raise InputError(f"The file to be stored as {key} cannot be read: {error.strerror}.") from error
    with stream:
        yield stream


def _verify(key: str, received: str, expected: str | None) -> None:
    if expected is not None and received != expected:
        raise IntegrityError(f"The data for {key} has SHA-256 {received}; expected {expected}. Nothing was stored.")


class _Stream(io.RawIOBase):
    """An object's bytes as they come: a fault of disk or network while reading is one of our errors.

    Only the reading: what the reader's own `with` block raises, such as a full disk of its own, stays what it is.
    """

    def __init__(self, source: Any, faults: Callable[[], AbstractContextManager[None]]) -> None:
        self._source, self._faults = source, faults

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._faults():
            return int(self._source.readinto(buffer))


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
        with _source(key, data) as source, _local_faults(f"write {key}"), self._staged() as staged:
            digest = hashlib.sha256()
            while block := source.read(1 << 20):
                digest.update(block)
                staged.write(block)
            _verify(key, digest.hexdigest(), sha256)
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
        with file, io.BufferedReader(_Stream(file, faults), 1 << 16) as stream:
            yield cast(BinaryIO, stream)

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with _local_faults(f"read {key}"):
            return ObjectInfo(key, path.stat().st_size) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        _check_prefix(prefix)
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
            elif key.startswith(prefix) and _KEY.fullmatch(key) and entries[name].is_file():
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


# --- an S3 server ---------------------------------------------------------------------------------------------


class S3Store:
    """A bucket of MinIO or any other S3 server; the server makes each put visible whole or not at all.

    `if_absent` needs a server that knows conditional writes (`If-None-Match: *`), as MinIO and Amazon S3 do.
    """

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
        if "@" in endpoint:  # not repeated: a password may be in it
            raise SettingsError(
                "LAWNWATCH_STORE_ENDPOINT holds a user or password.",
                hint="Give those in LAWNWATCH_STORE_ACCESS_KEY and LAWNWATCH_STORE_SECRET_KEY.",
            )
        if address.scheme not in ("http", "https") or not address.netloc or address.path.strip("/"):
            raise SettingsError(
                "LAWNWATCH_STORE_ENDPOINT must be http:// or https:// and a host, without a path; "
                f"received {endpoint!r}.",
                hint="The bucket belongs into LAWNWATCH_STORE_URL.",
            )
        if not bucket:
            raise SettingsError(
                "LAWNWATCH_STORE_URL names no bucket.", hint="Set it to s3://bucket or s3://bucket/prefix."
            )
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.endpoint = f"{address.scheme}://{address.netloc}"
        try:
            self._client = Minio(
                address.netloc,
                access_key=access_key,
                secret_key=secret_key,
                secure=address.scheme == "https",
                region=region,
                http_client=_BoundedHttp(),
            )
            with self._faults(""):
                if not self._bucket_exists():
                    if not create:
                        raise self._no_bucket()
                    self._make_bucket(region)
        except ValueError as error:  # the client's own checks of host and bucket name
            raise SettingsError(
                f"The store cannot be at {self.endpoint}, bucket {bucket!r}: {error}.",
                hint="Check LAWNWATCH_STORE_ENDPOINT and LAWNWATCH_STORE_URL.",
            ) from None

    def _bucket_exists(self) -> bool:
        """By a list that finds nothing: unlike a HEAD, a refused GET says why (keys, clock, region)."""
        try:
            next(self._client.list_objects(self.bucket, prefix=f"{self.prefix}.none"), None)
        except S3Error as error:
            if error.code != "NoSuchBucket":
                raise
            return False
        return True

    def _make_bucket(self, region: str) -> None:
        try:
            self._client.make_bucket(self.bucket, location=region)
        except S3Error as error:
            # Two processes may start at once.
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    # minio-py has no public way to send a condition: hence its _put_object, _upload_part and so on below. The contract
    # tests run them against a real server, so that an upgrade that moves them is noticed.

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
        with _source(key, data) as stream:
            digest = hashlib.file_digest(cast(Any, stream), "sha256").digest()
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            _verify(key, digest.hex(), sha256)
            if if_absent and size > PART_BYTES and (found := self.stat(key)) is not None:
                return found  # the condition alone would be met only after everything was sent
            condition = {"If-None-Match": "*"} if if_absent else {}
            headers = {"Content-Type": content_type, "x-amz-meta-sha256": digest.hex()}
            try:
                with self._faults(key):
                    if size > PART_BYTES:
                        self._put_parts(key, stream, headers, condition, digest.hex())
                    else:
                        # The client lets the server check the bytes sent; this, that they are the bytes hashed above.
                        headers["x-amz-checksum-sha256"] = base64.b64encode(digest).decode()
                        self._client._put_object(self.bucket, name, stream.read(), headers | condition)
            except Conflict:
                if (found := self.stat(key)) is None:
                    raise
                return found
        return ObjectInfo(key, size, digest.hex())

    def _put_parts(
        self, key: str, stream: BinaryIO, headers: dict[str, str], condition: dict[str, str], sha256: str
    ) -> None:
        """Send a large object in parts; nothing is visible before the last request, and after a fault nothing stays."""
        name = self._name(key)
        upload = self._client._create_multipart_upload(self.bucket, name, headers)
        try:
            digest, tags = hashlib.sha256(), cast(list[str], [])
            while block := stream.read(PART_BYTES):
                digest.update(block)
                tags.append(self._client._upload_part(self.bucket, name, block, None, upload, len(tags) + 1))
            _verify(key, digest.hexdigest(), sha256)
            parts = "".join(
                f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{tag}&quot;</ETag></Part>"
                for number, tag in enumerate(tags, 1)
            )
            response = self._client._execute(
                "POST",
                self.bucket,
                name,
                body=f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode(),
                headers={"Content-Type": "application/xml"} | condition,
                query_params={"uploadId": upload},
            )
            if CompleteMultipartUploadResult(response).etag is None:  # Amazon's servers may say 200 and then fail
                raise S3Error.fromxml(response)
        except BaseException:
            with suppress(MinioException, urllib3.exceptions.HTTPError, OSError):
                self._client._abort_multipart_upload(self.bucket, name, upload)
            raise

    def get(self, key: str) -> bytes:
        tries = TRIES
        while True:
            with self._faults(key):
                response = self._client.get_object(self.bucket, self._name(key))
                try:
                    return bytes(response.read())
                except urllib3.exceptions.HTTPError:  # in mid-body, where the client itself does not try again
                    tries -= 1
                    if not tries:
                        raise
                finally:
                    response.close()
                    response.release_conn()

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        faults = partial(self._faults, key)
        with faults():
            response = self._client.get_object(self.bucket, self._name(key))
        try:
            with io.BufferedReader(_Stream(response, faults), 1 << 16) as stream:
                yield cast(BinaryIO, stream)
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
        _check_prefix(prefix)
        query = {"list-type": "2", "encoding-type": "url", "max-keys": "1000", "prefix": self.prefix + prefix}
        while True:
            # The client's own list_objects makes an object of each entry, with owner, class and date: 47 µs.
            with self._faults(prefix):
                answer = self._client._execute("GET", self.bucket, query_params=query)
                page = ElementTree.fromstring(answer.data)  # noqa: S314 - our own server; expat bounds expansion
            xmlns = page.tag.partition("}")[0] + "}" if "}" in page.tag else ""
            for entry in page.iterfind(f"{xmlns}Contents"):
                key = unquote_plus(entry.findtext(f"{xmlns}Key") or "").removeprefix(self.prefix)
                if _KEY.fullmatch(key):  # not what others keep in the bucket, such as a console's folder marks
                    yield ObjectInfo(key, int(entry.findtext(f"{xmlns}Size") or 0))
            following = page.findtext(f"{xmlns}NextContinuationToken")
            if not following:
                return
            query["continuation-token"] = following

    def delete(self, key: str) -> None:
        with self._faults(key):
            self._client.remove_object(self.bucket, self._name(key))

    def _name(self, key: str) -> str:
        return self.prefix + checked_key(key)

    @contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        """Whatever the client or the network raises, as one of our errors; none holds a key of the account."""
        try:
            yield
        except S3Error as error:
            raise self._refusal(key, error) from error
        except (InvalidResponseError, ServerError) as error:  # an answer, but not in S3's words
            # The client keeps the number to itself in one of the two.
            status = int(getattr(error, "_code", 0) or getattr(error, "status_code", 0))
            if status >= 500:
                raise Unavailable(
                    f"The store at {self.endpoint} answered {status}.", hint="Is what stands before the server well?"
                ) from error
            raise self._no_s3(f"HTTP {status}") from error
        except ParseError as error:
            raise self._no_s3("something that is not S3's XML") from error
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unavailable(
                f"The store at {self.endpoint} does not answer ({type(reason).__name__}).",
                hint="Is the server running, and LAWNWATCH_STORE_ENDPOINT right?",
            ) from error

    def _refusal(self, key: str, error: Any) -> LawnwatchError:
        """What the server's answer, an S3 error, means to a caller."""
        # The answer to a HEAD has no body, from which the client guesses a code; MinIO says it in a header.
        code = error.response.headers.get("x-minio-error-code") or error.code
        if code in ("NoSuchKey", "NoSuchObject"):
            return NotFound(f"The store has no object {key}.")
        if code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return Conflict(f"The store has an object {key} already.")
        if code == "NoSuchBucket":
            return self._no_bucket()
        if code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return SettingsError(
                f"The store at {self.endpoint} refused the keys ({code}).",
                hint="Check LAWNWATCH_STORE_ACCESS_KEY, LAWNWATCH_STORE_SECRET_KEY and this machine's clock.",
            )
        if code == "InvalidBucketName":
            return SettingsError(
                f"The store at {self.endpoint} says that {self.bucket!r} cannot be a bucket's name.",
                hint="Check LAWNWATCH_STORE_URL.",
            )
        if code == "AuthorizationHeaderMalformed":
            return SettingsError(
                f"The store at {self.endpoint} is in another region.", hint="Check LAWNWATCH_STORE_REGION."
            )
        if code == "RequestTimeTooSkewed":
            return Unavailable(
                f"The clocks of this machine and of the store at {self.endpoint} differ by too much.",
                hint="Set both by NTP.",
            )
        if code in ("XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"):
            return Unavailable(
                f"The store at {self.endpoint} is full ({code}).",
                hint="Give it more room, or delete what is not needed.",
            )
        if code in ("XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "BadDigest"):
            return IntegrityError(
                f"What arrived at the store as {key} is not what was sent ({code}). Nothing was stored.",
                hint="Try again; if it happens often, the network or the memory of a machine is failing.",
            )
        return Unavailable(f"The store at {self.endpoint} answered {code} for {key or 'the bucket'}.")

    def _no_bucket(self) -> SettingsError:
        return SettingsError(
            f"The store at {self.endpoint} has no bucket {self.bucket!r}.", hint="Create it, or name another."
        )

    def _no_s3(self, received: str) -> SettingsError:
        return SettingsError(
            f"What answers at {self.endpoint} is no S3 server; received {received}.",
            hint="Check LAWNWATCH_STORE_ENDPOINT: the port of the API, not of the console.",
        )


class _BoundedHttp(urllib3.PoolManager):
    """The client's connections; no call waits for ever (its own default is 300 s, several times over)."""

    def __init__(self) -> None:
        super().__init__(
            maxsize=64,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=SILENCE_SECONDS),
            retries=urllib3.Retry(
                total=TRIES,
                read=TRIES - 1,
                redirect=False,
                backoff_factor=0.2,
                status_forcelist=(500, 502, 503, 504),
                raise_on_status=False,  # the last answer says more than that there were too many
                respect_retry_after_header=False,  # a starting MinIO says 60 s and more
            ),
        )

    def urlopen(self, method: str, url: str, redirect: bool = True, **options: Any) -> Any:  # type: ignore[override]
        # Bytes are sent by one call under one timeout, which a slow line breaks; a stream goes block by block.
        if isinstance(options.get("body"), bytes) and len(options["body"]) > 1 << 16:
            options["body"] = io.BytesIO(options["body"])
        return super().urlopen(method, url, redirect, **options)
