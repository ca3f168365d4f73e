"""What only a folder can suffer; the contract it shares with S3: tests/integration/test_store_contract.py."""

from __future__ import annotations

import fcntl
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lawnwatch.config import Settings
from lawnwatch.errors import InputError, Unavailable
from lawnwatch.store import LocalStore, open_store

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    opened = open_store(Settings(home=tmp_path / "a home"))
    assert isinstance(opened, LocalStore)
    return opened


def files(store: LocalStore) -> list[str]:
    return sorted(path.relative_to(store.root).as_posix() for path in store.root.rglob("*") if path.is_file())


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: a full disk that needs no mount and no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("if_absent", [False, True])
def test_35_a_full_disk_is_unavailable_and_leaves_nothing(store: LocalStore, tmp_path: Path, if_absent: bool) -> None:
    store.put("a", b"old")
    large = tmp_path / "large"
    large.write_bytes(b"x" * 3_000_000)
    for key, data in (("a", b"x" * 200_000), ("b", large)):
        with room_for(100_000), pytest.raises(Unavailable, match="too large") as caught:
            store.put(key, data, if_absent=if_absent)
        assert "disk full" in caught.value.hint and str(tmp_path) not in str(caught.value)
    assert store.get("a") == b"old"
    assert files(store) == ["a"]


def test_35_a_disk_that_is_full_only_when_flushed(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems tell at fsync that there was no room."""
    store.put("a", b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(Unavailable, match="No space left"):
        patched.setattr("os.fsync", full)
        store.put("a", b"new")
    assert store.get("a") == b"old"
    assert files(store) == ["a"]


def test_an_object_is_on_disk_before_it_has_its_name_and_the_name_before_put_returns(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fsync, in order: the content while it has no key yet, the new folders, the name."""
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def noting(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        flushed.append((path.name, (store.root / "ab/cd/key").exists()))
        fsync(handle)

    store.put("other", b"x")
    monkeypatch.setattr("os.fsync", noting)
    store.put("ab/cd/key", b"x")
    assert [name for name, _ in flushed[1:]] == ["store", "ab", "cd"]
    assert [visible for _, visible in flushed] == [False, False, False, True]


def test_what_a_killed_writer_left_is_swept_and_a_living_writers_is_not(store: LocalStore) -> None:
    store.put("a", b"x")
    staging = store.root / store.STAGING
    hour_ago = time.time() - 3600
    for name in ("dead", "living", "young"):
        (staging / name).write_bytes(b"half an obj")
    for name in ("dead", "living"):
        os.utime(staging / name, (hour_ago, hour_ago))
    with (staging / "living").open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        LocalStore(store.root).put("b", b"x")
    assert [info.key for info in store.list()] == ["a", "b"]
    assert sorted(path.name for path in staging.iterdir()) == ["living", "young"]


def test_a_put_holds_a_lock_that_the_sweep_sees(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file looks an hour old, as after a suspended machine; another process' first put leaves it alone."""
    fsync = os.fsync

    def slow(handle: int) -> None:
        monkeypatch.setattr("os.fsync", fsync)
        os.utime(handle, (0, 0))
        LocalStore(store.root).put("b", b"other")
        fsync(handle)

    store.put("warm", b"x")
    monkeypatch.setattr("os.fsync", slow)
    store.put("a", b"slow")
    assert store.get("a") == b"slow" and store.get("b") == b"other"


def test_objects_are_readable_as_the_umask_says(store: LocalStore) -> None:
    """Another user's server may serve what this one wrote; only a temporary file is for its writer alone."""
    old = os.umask(0o022)
    try:
        store.put("a", b"x")
    finally:
        os.umask(old)
    assert (store.root / "a").stat().st_mode & 0o777 == 0o644


def test_a_key_is_an_object_or_a_folder(store: LocalStore) -> None:
    store.put("a/b", b"x")
    for key in ("a", "a/b/c"):
        for if_absent in (False, True):
            with pytest.raises(InputError, match="both"):
                store.put(key, b"x", if_absent=if_absent)
    assert files(store) == ["a/b"]


def test_a_folder_that_is_a_file_or_beyond_reach(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", Path("/proc/lawnwatch")):
        store = LocalStore(root)
        with pytest.raises((InputError, Unavailable), match="cannot write a"):
            store.put("a", b"x")
        assert store.stat("a") is None and list(store.list()) == []


def test_a_disk_that_cannot_read_is_unavailable(store: LocalStore) -> None:
    """/proc/self/mem opens and then answers every read at 0 with an input/output error, as a dying disk does."""
    store.root.mkdir(parents=True)
    (store.root / "a").symlink_to("/proc/self/mem")
    with pytest.raises(Unavailable, match="cannot read a: Input/output error"):
        store.get("a")
    with store.open("a") as stream, pytest.raises(Unavailable):
        stream.read(10)


def test_what_is_beside_the_objects_is_no_object(store: LocalStore) -> None:
    store.put("a/b", b"x")
    for name in (".hidden", "a/.DS_Store", "a/with space"):
        (store.root / name).write_bytes(b"")
    (store.root / "a/loop").symlink_to(store.root)
    assert [info.key for info in store.list()] == ["a/b"]
