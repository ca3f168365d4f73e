"""Rollouts against a stand-in for the API's /model/info that follows the pointer as told."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update

from lawnwatch import rollout
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, InputError, IntegrityError, NotFound, RolloutFailed
from lawnwatch.rollout import TARGET_KEY, LocalRollout, ReleaseTarget, RolloutRow, read_target
from lawnwatch.store import ObjectStore, open_store
from rollout_bundles import publish

pytestmark = pytest.mark.unit


class Follower:
    """Serves /model/info: whatever the pointer names, except bundles that it refuses or ignores."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.refuses: set[str] = set()
        self.ignores: set[str] = set()
        self.current: dict[str, Any] | None = None
        self.answers = {"a": 1.0, "b": 0.0}  # what `publish` recorded as golden
        self.asked_with: list[str | None] = []  # the API key of each picture
        follower = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(follower.info()).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                follower.asked_with.append(self.headers["X-API-Key"])
                body = json.dumps({"model": follower.current, "probabilities": follower.answers}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def info(self) -> dict[str, Any]:
        target = read_target(self.store)
        rejected = None
        if target is not None:
            wanted = target.stable
            if wanted.sha256 in self.refuses:
                rejected = {"sha256": wanted.sha256, "reason": "golden answers differ"}
            elif wanted.sha256 not in self.ignores:
                self.current = {"name": "m", "version": wanted.model_version, "sha256": wanted.sha256}
        return {
            "state": "ready" if self.current else "no_model",
            "reason": "",
            "model": self.current,
            "golden": {"ok": True, "max_error": 0.0} if self.current else None,
            "rejected": rejected,
        }


class World:
    """A store, a catalog, an API that follows, and three released versions."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home)
        self.store = open_store(settings)
        self.follower = Follower(self.store)
        self.settings = settings.model_copy(update={"api_url": self.follower.url})
        self.catalog = Catalog(self.settings)
        self.catalog.migrate()
        self.v1, self.v2, self.v3 = (publish(self.store, version) for version in (1, 2, 3))

    def rollout(self) -> LocalRollout:
        return LocalRollout(self.settings, self.catalog, self.store)

    def abandon(self) -> None:
        """The driver of the rollout under way is gone for longer than its lease."""
        with self.catalog.session() as session:
            session.execute(
                update(RolloutRow)
                .where(RolloutRow.active == 1)
                .values(lease_until=datetime.now(UTC) - timedelta(minutes=1), controller="gone")
            )

    def states(self) -> list[tuple[int, str]]:
        return [(one.model_version, one.state) for one in self.rollout().history()]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "home")
    yield world
    world.follower.server.shutdown()


def test_a_rollout_moves_the_pointer_and_is_confirmed(world: World) -> None:
    said: list[str] = []
    record = world.rollout().start(world.v1, timeout=5, progress=said.append)
    assert record.state == "complete" and record.previous_version is None and record.finished_at is not None
    assert read_target(world.store) == world.v1 and said
    second = world.rollout().start(world.v2, timeout=5)
    assert (second.previous_version, second.previous_sha256) == (1, world.v1.stable.sha256)
    status = world.rollout().status()
    assert status.target == world.v2 and status.serving and status.serving["version"] == 2
    assert "v2" in status.message


def test_the_same_rollout_again_changes_nothing(world: World) -> None:
    first = world.rollout().start(world.v1, timeout=5)
    world.rollout().start(world.v2, timeout=5)
    again = world.rollout().start(world.v2, timeout=5)
    assert again.id != first.id and len(world.states()) == 2
    assert world.rollout().undo(timeout=5).model_version == 1, "repeating must not forget what was before"


@pytest.mark.parametrize("how", ["refuses", "ignores"])
def test_a_model_that_does_not_come_up_leaves_the_old_target(world: World, how: str) -> None:
    world.rollout().start(world.v1, timeout=5)
    getattr(world.follower, how).add(world.v2.stable.sha256)
    with pytest.raises(RolloutFailed, match="v1 goes on serving"):
        world.rollout().start(world.v2, timeout=1)
    assert read_target(world.store) == world.v1
    assert world.states() == [(2, "failed"), (1, "complete")]
    assert world.rollout().history()[0].reason


def test_a_pointer_that_somebody_else_moved_meanwhile_is_left_to_them(world: World) -> None:
    world.rollout().start(world.v1, timeout=5)
    world.follower.ignores.add(world.v2.stable.sha256)

    def meddle(line: str) -> None:
        if "waiting" in line:
            world.store.put(TARGET_KEY, world.v3.to_bytes())

    with pytest.raises(RolloutFailed, match="what somebody else wrote meanwhile stays"):
        world.rollout().start(world.v2, timeout=1, progress=meddle)
    assert read_target(world.store) == world.v3 and world.states()[0] == (2, "failed")


def test_the_first_rollout_that_fails_leaves_no_target(world: World) -> None:
    world.follower.ignores.add(world.v1.stable.sha256)
    with pytest.raises(RolloutFailed, match="no model before"):
        world.rollout().start(world.v1, timeout=0.5)
    assert read_target(world.store) is None


def test_nothing_changes_for_a_bundle_that_is_not_whole(world: World) -> None:
    world.rollout().start(world.v1, timeout=5)
    with pytest.raises(NotFound):
        world.rollout().start(ReleaseTarget.single(9, "f" * 64), timeout=1)
    with pytest.raises(InputError, match="v2"):
        world.rollout().start(ReleaseTarget.single(7, world.v2.stable.sha256), timeout=1)
    world.store.put(f"bundles/{world.v3.stable.sha256}/model.tflite", b"other")
    with pytest.raises(IntegrityError):
        world.rollout().start(world.v3, timeout=1)
    assert read_target(world.store) == world.v1 and world.states() == [(1, "complete")]


def test_undo_goes_back_and_undoing_that_comes_back(world: World) -> None:
    with pytest.raises(NotFound, match="no earlier model"):
        world.rollout().undo(timeout=1)
    world.rollout().start(world.v1, timeout=5)
    with pytest.raises(NotFound, match="no earlier model"):
        world.rollout().undo(timeout=1)
    world.rollout().start(world.v2, timeout=5)
    assert world.rollout().undo(timeout=5).model_version == 1
    assert world.states() == [(1, "complete"), (2, "undone"), (1, "complete")]
    assert world.rollout().undo(timeout=5).model_version == 2
    assert read_target(world.store) == world.v2


def test_a_failed_rollout_is_not_what_undo_goes_back_to(world: World) -> None:
    world.rollout().start(world.v1, timeout=5)
    world.rollout().start(world.v2, timeout=5)
    world.follower.refuses.add(world.v3.stable.sha256)
    with pytest.raises(RolloutFailed):
        world.rollout().start(world.v3, timeout=5)
    assert world.rollout().undo(timeout=5).model_version == 1


def test_a_second_rollout_must_wait_for_the_first(world: World) -> None:
    world.rollout().start(world.v1, timeout=5)
    world.follower.ignores.add(world.v2.stable.sha256)
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            world.rollout().start(world.v2, timeout=3)
        except RolloutFailed as error:
            errors.append(error)

    first = threading.Thread(target=drive)
    first.start()
    while read_target(world.store) != world.v2:
        pass
    with pytest.raises(Conflict, match="under way"):
        world.rollout().start(world.v3, timeout=1)
    assert read_target(world.store) == world.v2
    first.join()
    assert len(errors) == 1 and read_target(world.store) == world.v1
    assert world.rollout().start(world.v3, timeout=5).state == "complete"


def test_of_many_that_start_at_once_one_drives(world: World) -> None:
    world.follower.ignores |= {world.v1.stable.sha256, world.v2.stable.sha256}
    results: list[str] = []
    gate = threading.Barrier(4)

    def drive(target: ReleaseTarget) -> None:
        mine = world.rollout()
        gate.wait()
        try:
            mine.start(target, timeout=3)
        except (Conflict, RolloutFailed) as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=drive, args=(target,)) for target in (world.v1, world.v2) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["Conflict"] * 3 + ["RolloutFailed"]
    assert read_target(world.store) is None and len(world.states()) == 1


class Killed(BaseException):
    """As SIGKILL: nothing after this line runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, world: World, method: str) -> None:
    """Start v2 with a driver that dies where `method` is called, and let its lease run out."""
    with monkeypatch.context() as patch:

        def die(*_: Any, **__: Any) -> None:
            raise Killed

        patch.setattr(LocalRollout, method, die)
        patch.setattr(LocalRollout, "_release_lease_quietly", lambda *_: None)
        with pytest.raises(Killed):
            world.rollout().start(world.v2, timeout=1)
    with pytest.raises(Conflict):
        world.rollout().start(world.v3, timeout=1)
    world.abandon()


@pytest.mark.parametrize("method", ["_fault", "_finish", "_restore"])
def test_a_rollout_whose_driver_was_killed_is_resumed(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    world.rollout().start(world.v1, timeout=5)
    if method == "_restore":
        world.follower.refuses.add(world.v2.stable.sha256)
    kill_at(monkeypatch, world, method)
    world.follower.refuses.clear()
    assert world.rollout().start(world.v2, timeout=5).previous_version == 1
    assert world.states() == [(2, "complete"), (1, "complete")]


def test_a_rollout_whose_driver_was_killed_is_superseded_and_never_gone_back_to(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.rollout().start(world.v1, timeout=5)
    world.follower.ignores.add(world.v2.stable.sha256)
    kill_at(monkeypatch, world, "_fault")
    assert read_target(world.store) == world.v2
    world.follower.ignores.add(world.v3.stable.sha256)
    with pytest.raises(RolloutFailed, match="v1 goes on serving"):
        world.rollout().start(world.v3, timeout=1)
    assert read_target(world.store) == world.v1
    assert world.states() == [(3, "failed"), (2, "failed"), (1, "complete")]


def test_without_waiting_status_completes_it_later(world: World) -> None:
    record = world.rollout().start(world.v1, wait=False)
    assert record.state == "progressing"
    latest = world.rollout().status().latest
    assert latest is not None and latest.state == "complete"


def test_a_pointer_that_cannot_be_read_is_said_and_replaced(world: World) -> None:
    world.store.put(TARGET_KEY, b'{"entries": []}')
    with pytest.raises(IntegrityError, match=r"rollout/target\.json"):
        read_target(world.store)


def test_weights_add_up(world: World) -> None:
    entry = world.v1.stable
    with pytest.raises(ValueError, match="100"):
        ReleaseTarget(entries=[entry, world.v2.stable])
    canary = ReleaseTarget(
        entries=[entry.model_copy(update={"weight": 90}), world.v2.stable.model_copy(update={"weight": 10})]
    )
    assert ReleaseTarget.model_validate_json(canary.to_bytes()) == canary


def test_an_api_that_does_not_answer_is_said(world: World) -> None:
    settings = world.settings.model_copy(update={"api_url": "http://127.0.0.1:9"})
    quiet = LocalRollout(settings, world.catalog, world.store)
    with pytest.raises(RolloutFailed, match="does not answer"):
        quiet.start(world.v1, timeout=0.5)
    with pytest.raises(InputError, match="API_URL"):
        LocalRollout(settings.model_copy(update={"api_url": "file:///etc"}), world.catalog, world.store).status()


def test_the_factory_gives_what_the_settings_ask_for(world: World) -> None:
    made: Callable[..., Any] = rollout.target
    assert isinstance(made(world.settings, world.catalog, world.store), LocalRollout)


def test_verify_asks_what_a_client_would(world: World) -> None:
    with pytest.raises(NotFound):
        rollout.verify(world.settings, world.store)
    world.rollout().start(world.v1, timeout=5)
    assert rollout.verify(world.settings, world.store).model_version == 1
    world.follower.answers = {"a": 0.6, "b": 0.4}
    with pytest.raises(RolloutFailed, match="golden answers"):
        rollout.verify(world.settings, world.store, timeout=0.5)
    world.follower.answers = {"a": 1.0, "b": 0.0}
    world.follower.ignores.add(world.v2.stable.sha256)
    world.rollout().start(world.v2, timeout=5, wait=False)
    with pytest.raises(RolloutFailed, match=r"v2 .* it serves another model"):
        rollout.verify(world.settings, world.store, timeout=0.5)
    world.follower.server.shutdown()
    world.follower.server.server_close()
    with pytest.raises(RolloutFailed, match="does not answer"):
        rollout.verify(world.settings, world.store, timeout=0.5)


def test_48_a_key_that_is_none_is_not_sent_and_not_shown(world: World) -> None:
    world.rollout().start(world.v1, timeout=5)
    good = f"lw_{'0' * 16}_{'A' * 43}"
    for kept in (good, f"{good}\n"):  # as a mounted secret may end
        rollout.verify(world.settings.model_copy(update={"api_key": SecretStr(kept)}), world.store)
    rollout.verify(world.settings, world.store)
    assert world.follower.asked_with == [good, good, None]
    for bad in ("canary\r\nHost: x", "canär"):
        with pytest.raises(RolloutFailed, match="LAWNWATCH_API_KEY") as failed:
            rollout.verify(world.settings.model_copy(update={"api_key": SecretStr(bad)}), world.store, timeout=0)
        assert "can" not in str(failed.value)
    assert len(world.follower.asked_with) == 3
