"""The object store on an S3 server."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote_plus, urlsplit
from xml.etree import ElementTree
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.datatypes import CompleteMultipartUploadResult
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from lawnwatch.errors import Conflict, IntegrityError, LawnwatchError, NotFound, SettingsError, Unavailable
from lawnwatch.store import KEY, ObjectInfo, Stream, check_prefix, checked_key, source_of, verify

PART_BYTES = 16 * 1024 * 1024  # of a larger object, what one request carries
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 15.0  # a server that says nothing for so long is asked again, or given up
TRIES = 3


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
        with source_of(key, data) as stream:
            digest = hashlib.file_digest(cast(Any, stream), "sha256").digest()
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            verify(key, digest.hex(), sha256)
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
            verify(key, digest.hexdigest(), sha256)
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
            with io.BufferedReader(Stream(response, faults), 1 << 16) as stream:
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
        check_prefix(prefix)
        query = {"list-type": "2", "encoding-type": "url", "max-keys": "1000", "prefix": self.prefix + prefix}
        while True:
            # The client's own list_objects makes an object of each entry, with owner, class and date: 47 µs.
            with self._faults(prefix):
                answer = self._client._execute("GET", self.bucket, query_params=query)
                page = ElementTree.fromstring(answer.data)  # noqa: S314 - our own server; expat bounds expansion
            xmlns = page.tag.partition("}")[0] + "}" if "}" in page.tag else ""
            for entry in page.iterfind(f"{xmlns}Contents"):
                key = unquote_plus(entry.findtext(f"{xmlns}Key") or "").removeprefix(self.prefix)
                if KEY.fullmatch(key):  # not what others keep in the bucket, such as a console's folder marks
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
