"""The object store in a folder: whole objects or none, and no key that leads out.

The same on a real S3 server: tests/integration/test_data_plane.py.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lawnwatch.config import Settings
from lawnwatch.errors import InputError, IntegrityError, NotFound, Unavailable
from lawnwatch.store import LocalStore, open_store

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    opened = open_store(Settings(home=tmp_path / "a home"))
    assert isinstance(opened, LocalStore)
    return opened


def test_put_get_stat_list_delete(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    assert store.put("b/2", source).size == 11
    store.put("b/1", b"one")
    store.put("ba", b"beside")
    assert store.get("b/2") == b"from a file"
    with store.open("b/1") as stream:
        assert stream.read(2) == b"on"
    assert [info.key for info in store.list()] == ["b/1", "b/2", "ba"]
    assert [info.key for info in store.list("b")] == ["b/1", "b/2", "ba"]
    assert [info.key for info in store.list("b/")] == ["b/1", "b/2"]
    assert list(store.list("nothing/")) == []
    store.delete("b/1")
    store.delete("b/1")
    assert store.stat("b/1") is None
    with pytest.raises(NotFound):
        store.get("b/1")
    with pytest.raises(NotFound):
        store.get("b")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a\x00b", "a\\b", "a/", "ä"])
def test_no_key_leads_out(store: LocalStore, key: str) -> None:
    for attempt in (lambda: store.put(key, b"x"), lambda: store.get(key), lambda: store.delete(key)):
        with pytest.raises(InputError):
            attempt()


def test_no_prefix_leads_out(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", b"x")
    (tmp_path / "secret").write_text("x")
    for prefix in ("../", "/", "a/../../"):
        try:
            assert [info.key for info in store.list(prefix)] == []
        except InputError:
            continue


def test_wrong_digest_stores_nothing(store: LocalStore) -> None:
    store.put("a", b"old")
    with pytest.raises(IntegrityError):
        store.put("a", b"new", sha256=hashlib.sha256(b"other").hexdigest())
    assert store.get("a") == b"old"
    assert [info.key for info in store.list()] == ["a"]


def test_if_absent_lets_the_first_win(store: LocalStore) -> None:
    threads = [
        threading.Thread(target=store.put, args=("a", bytes([number]) * 100_000), kwargs={"if_absent": True})
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = store.get("a")
    assert len(first) == 100_000 and len(set(first)) == 1
    store.put("a", b"later", if_absent=True)
    assert store.get("a") == first


def test_a_reader_sees_old_or_new_when_the_writer_is_killed(store: LocalStore) -> None:
    """SIGKILL before the rename: the old object stays, and what was half written is no object."""
    store.put("a", b"old")
    script = (
        "import os, pathlib, signal, sys\nfrom lawnwatch.store import LocalStore\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "LocalStore(pathlib.Path(sys.argv[1])).put('a', b'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", script, store.root]).returncode < 0
    assert store.get("a") == b"old"
    assert [info.key for info in store.list()] == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_35_a_write_that_fails_is_unavailable_and_leaves_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Unavailable, match="No space left"):
        store.put("a", b"new")
    monkeypatch.undo()
    assert store.get("a") == b"old"
    assert [path.name for path in store.root.rglob("*") if path.is_file()] == ["a"]
