"""The contract of the object store, the same for a folder (unit) and for a real MinIO (integration)."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lawnwatch.config import Settings
from lawnwatch.errors import InputError, IntegrityError, NotFound
from lawnwatch.serving.kept import PIECE, Kept
from lawnwatch.store import LocalStore, ObjectInfo, ObjectStore, open_store, s3
from lawnwatch.store.s3 import S3Store

PART = 5 << 20  # the least that S3 takes as a part


@pytest.fixture(
    params=[
        pytest.param("folder", marks=pytest.mark.unit),
        pytest.param("minio", marks=pytest.mark.integration),
    ]
)
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], ObjectStore]:
    """Open the test's own empty store, again and again."""
    if request.param == "folder":
        settings = Settings(home=tmp_path / "a home")
    else:
        named = request.getfixturevalue("minio").settings()
        settings = Settings(home=tmp_path, **named | {"store_url": named["store_url"] + "/deep/down"})
    return lambda: open_store(settings)


@pytest.fixture
def store(reopen: Callable[[], ObjectStore]) -> ObjectStore:
    return reopen()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_put_bytes_or_a_file_and_read_it_back(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    assert store.put("a/file", source) == ObjectInfo("a/file", 11, sha256(b"from a file"))
    assert store.put("a/bytes", b"bytes", content_type="text/plain", sha256=sha256(b"bytes")).size == 5
    assert store.get("a/file") == b"from a file"
    assert store.get("a/bytes") == b"bytes"
    store.put("a/file", b"anew")
    assert store.get("a/file") == b"anew"


def test_an_empty_object_is_an_object(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for key, data in (("bytes", b""), ("file", tmp_path / "empty")):
        assert store.put(key, data).size == 0
        assert store.get(key) == b""
        found = store.stat(key)
        assert found is not None and found.size == 0
        with store.open(key) as stream:
            assert stream.read() == b""


def test_open_streams(store: ObjectStore) -> None:
    data = os.urandom(1_000_000)
    store.put("a", data)
    with store.open("a") as stream:
        assert stream.read(3) == data[:3]
        assert b"".join(iter(lambda: stream.read(70_000), b"")) == data[3:]
    with store.open("a") as stream:  # one that was left half read disturbs none that follows
        stream.read(10)
    assert store.get("a") == data


async def test_an_answer_sends_an_object_in_pieces_and_closes_it(store: ObjectStore) -> None:
    data = os.urandom(300_000)
    store.put("a", data)
    store.put("empty", b"")
    for key, expected in (("a", data), ("empty", b"")):
        answer = Kept(store, key, "image/png")
        sent: list[Any] = []

        async def send(message: Any, into: list[Any] = sent) -> None:
            into.append(message)

        await answer({"type": "http"}, asyncio.Queue().get, send)
        assert sent[0]["status"] == 200 and (b"content-length", str(len(expected)).encode()) in sent[0]["headers"]
        assert b"".join(each["body"] for each in sent[1:]) == expected
        assert max(len(each["body"]) for each in sent[1:]) <= PIECE
        assert answer._pieces.gi_frame is None
    with pytest.raises(NotFound):
        Kept(store, "nothing", "image/png")


async def test_an_answer_whose_reader_goes_away_ends_and_closes_its_object(store: ObjectStore) -> None:
    store.put("a", os.urandom(300_000))
    answer = Kept(store, "a", "image/png")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # nobody reads

    async def receive() -> Any:
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    await asyncio.wait_for(answer({"type": "http"}, receive, send), 5)
    assert answer._pieces.gi_frame is None


def test_what_the_reader_raises_stays_what_it_is(store: ObjectStore) -> None:
    store.put("a", b"data")
    with pytest.raises(OSError, match="my own disk"), store.open("a"):
        raise OSError("my own disk")


def test_what_is_not_there(store: ObjectStore) -> None:
    store.put("a/b", b"x")
    for key in ("a", "a/c", "a/b/c"):
        assert store.stat(key) is None
        with pytest.raises(NotFound):
            store.get(key)
        with pytest.raises(NotFound), store.open(key):
            pass
        store.delete(key)  # no object is no error
    assert keys(store) == ["a/b"]


def test_delete(store: ObjectStore) -> None:
    store.put("a", b"x")
    store.delete("a")
    store.delete("a")
    assert store.stat("a") is None and keys(store) == []


def test_list_is_in_byte_order_with_sizes(store: ObjectStore) -> None:
    """`-` and `.` sort before the slash, digits after it: a folder is not always next to its namesakes."""
    expected = ["B", "a-b", "a.b", "a/-", "a/b/1", "a/b/2", "a/b0", "a0", "a_", "b-/x", "b/x", "ba"]
    for number, key in enumerate(reversed(expected)):
        store.put(key, b"x" * number)
    assert list(store.list()) == [ObjectInfo(key, 11 - number) for number, key in enumerate(expected)]
    assert expected == sorted(expected)
    for prefix in ("a", "a/", "a/b", "a/b/", "a/b/1", "b", "ba", "none", "none/", "a/none/", "ba/"):
        assert keys(store, prefix) == [key for key in expected if key.startswith(prefix)], prefix


def test_list_goes_on_after_a_thousand(store: ObjectStore) -> None:
    expected = [f"many/{number:04d}" for number in range(1_050)]
    threads = [
        threading.Thread(target=lambda part=part: [store.put(key, b"x") for key in expected[part::8]])
        for part in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys(store, "many/") == expected


@pytest.mark.parametrize("digest", [sha256(b"other"), "", "00"])
def test_the_wrong_digest_stores_nothing(store: ObjectStore, tmp_path: Path, digest: str) -> None:
    store.put("a", b"old")
    (tmp_path / "new").write_bytes(b"new")
    for key, data in (("a", b"new"), ("b", b"new"), ("a", tmp_path / "new")):
        with pytest.raises(IntegrityError, match="Nothing was stored"):
            store.put(key, data, sha256=digest)
    assert store.get("a") == b"old" and keys(store) == ["a"]


def test_a_file_that_cannot_be_read_is_the_callers_fault(store: ObjectStore, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read") as caught:
            store.put("a", path)
        assert str(tmp_path) not in str(caught.value)
    assert keys(store) == []


# --- conditional create -----------------------------------------------------------------------------------------


def test_create_leaves_what_is_there_and_says_what_it_is(store: ObjectStore) -> None:
    first = store.put("a", b"first", if_absent=True)
    assert first == ObjectInfo("a", 5, sha256(b"first"))
    assert store.put("a", b"the second", if_absent=True) == first
    assert store.get("a") == b"first"
    with pytest.raises(IntegrityError):
        store.put("a", b"third", if_absent=True, sha256=sha256(b"other"))


def test_of_many_creators_exactly_one_wins(reopen: Callable[[], ObjectStore]) -> None:
    """The object is whole, and every loser learns from the answer that it lost."""
    stores = [reopen() for _ in range(4)]
    for round in range(5):
        key, answers, gate = f"pointer/{round}", [], threading.Barrier(8)

        def create(
            number: int,
            key: str = key,
            answers: list[tuple[str, str | None]] = answers,
            gate: threading.Barrier = gate,
        ) -> None:
            data = bytes([number]) * 100_000
            gate.wait()
            answers.append((sha256(data), stores[number % 4].put(key, data, if_absent=True).sha256))

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = sha256(stores[0].get(key))
        assert [answer for _, answer in answers] == [stored] * 8
        assert sum(mine == stored for mine, _ in answers) == 1


# --- large objects -------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of three S3 parts, the last one short."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * PART) + b"the end")
    return path


def test_a_large_object_goes_in_parts(store: ObjectStore, large: Path) -> None:
    written = store.put("a/large", large)
    assert written == ObjectInfo("a/large", 2 * PART + 7, sha256(large.read_bytes()))
    assert store.get("a/large") == large.read_bytes()
    assert store.stat("a/large") in (written, ObjectInfo("a/large", written.size))
    with store.open("a/large") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == written.sha256  # type: ignore[arg-type]
    assert store.put("a/large", b"small", if_absent=True) == written


def test_large_objects_are_created_once(store: ObjectStore, large: Path) -> None:
    other = large.with_name("other")
    other.write_bytes(os.urandom(PART + 1))
    answers: list[ObjectInfo] = []
    threads = [
        threading.Thread(target=lambda path=path: answers.append(store.put("a", path, if_absent=True)))
        for path in (large, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1]
    assert sha256(store.get("a")) == answers[0].sha256
    assert pending(store) == []


def test_a_file_that_changes_while_it_is_sent_is_not_stored(
    store: ObjectStore, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashed first, sent later: what is stored is what was hashed, or nothing."""
    expected = sha256(large.read_bytes())

    def change() -> None:
        with large.open("r+b") as stream:
            stream.seek(2 * PART)
            stream.write(b"THE END")

    if isinstance(store, S3Store):
        upload = store._client._upload_part

        def changing(*args: object) -> str:
            change()
            return str(upload(*args))

        monkeypatch.setattr(store._client, "_upload_part", changing)
    else:
        change()
    with pytest.raises(IntegrityError):
        store.put("a", large, sha256=expected)
    assert keys(store) == [] and pending(store) == []


def pending(store: ObjectStore) -> list[str]:
    """What is left of uploads that did not end well."""
    if isinstance(store, LocalStore):
        return [path.name for path in (store.root / store.STAGING).iterdir()]
    assert isinstance(store, S3Store)
    return [upload.object_name for upload in store._client._list_multipart_uploads(store.bucket).uploads]


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a\x00b", "a\\b", "a/", "ä", "a b", "a\n", ".put/x",
     "%2e%2e/x", "a?b", "a" * 256, "/".join("a" * 300)],
)  # fmt: skip
def test_no_key_leads_out(store: ObjectStore, key: str) -> None:
    for attempt in (
        lambda: store.put(key, b"x"),
        lambda: store.get(key),
        lambda: store.stat(key),
        lambda: store.delete(key),
        lambda: store.open(key).__enter__(),
    ):
        with pytest.raises(InputError, match="not an object key"):
            attempt()
    assert keys(store) == []


@pytest.mark.parametrize("prefix", ["/", "../", "a/../../", "a\x00", "//", ".put", ".put/"])
def test_no_prefix_leads_out(store: ObjectStore, prefix: str) -> None:
    with pytest.raises(InputError):
        list(store.list(prefix))


def test_the_longest_key_and_the_oddest_characters(store: ObjectStore) -> None:
    for key in ("a" * 255, "/".join(["b" * 255, "c" * 255]), "=/-/_x.=-"):
        store.put(key, key.encode())
        assert store.get(key) == key.encode()
    assert keys(store) == sorted(["a" * 255, "/".join(["b" * 255, "c" * 255]), "=/-/_x.=-"])
