"""Snapshots (FAULTS 24-27, 29): one input, one id; a split is for life; contradictions are quarantined."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from PIL import Image

from lawn import Lawn, Picture, jpeg, scene
from lawnwatch import cli, dataset
from lawnwatch.catalog import ImageRecord, SnapshotRecord
from lawnwatch.dataset import create, splits
from lawnwatch.dataset.verify import LOOK_ALIKE, candidates, look_alikes
from lawnwatch.errors import DataError, InputError, IntegrityError, NotFound, Unavailable
from lawnwatch.store import LocalStore, ObjectInfo

pytestmark = pytest.mark.unit


@pytest.fixture
def lawn(tmp_path: Path) -> Lawn:
    return Lawn(tmp_path)


def split_of(snapshot: dataset.Snapshot) -> dict[str, str]:
    return {row.sha256: row.split for row in snapshot.rows}


def test_same_input_same_snapshot(lawn: Lawn) -> None:
    lawn.fill(20)
    first, again = lawn.snapshot(), lawn.snapshot()
    assert first.created and not again.created
    assert (again.id, again.rows, again.counts, again.classes) == (first.id, first.rows, first.counts, first.classes)
    assert first.classes == ["dandelion", "grass"]
    assert dataset.load_snapshot(lawn.catalog, lawn.store, first.id[:9]).rows == first.rows
    assert [each["snapshot"] for each in dataset.list_snapshots(lawn.catalog)] == [first.id]


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    one, two = Lawn(tmp_path / "one"), Lawn(tmp_path / "two")
    one.fill(20)
    for number in reversed(range(20)):
        two.fill(1, first=number)
    assert one.snapshot().id == two.snapshot().id


def test_the_shares_of_the_first_snapshot(lawn: Lawn) -> None:
    lawn.fill(40)
    assert lawn.snapshot().counts == {
        "train": {"dandelion": 26, "grass": 26},
        "validation": {"dandelion": 6, "grass": 6},
        "test": {"dandelion": 8, "grass": 8},
    }


def test_26_a_split_is_for_life_and_the_test_split_does_not_grow(lawn: Lawn) -> None:
    lawn.fill(30)
    before = split_of(lawn.snapshot())
    lawn.fill(30, first=100)
    after = lawn.snapshot()
    assert after.created
    assert {sha: split for sha, split in split_of(after).items() if sha in before} == before
    newcomers = Counter(split for sha, split in split_of(after).items() if sha not in before)
    assert newcomers["test"] == 0 and newcomers["train"] > newcomers["validation"] > 0


def test_26_copies_and_resizings_share_a_split_at_once_and_later(lawn: Lawn) -> None:
    lawn.fill(20)
    for number in range(20):
        lawn.put(f"small{number}.jpg", "grass", jpeg(scene(number).resize((90, 70)), 80))
    first = lawn.snapshot()
    groups = defaultdict(set)
    for row in first.rows:
        groups[row.group].add(row.split)
    assert len(first.rows) == 60 and len(groups) == 40
    assert all(len(split) == 1 for split in groups.values())
    for number in range(20):
        lawn.put(f"later{number}.jpg", "dandelion", jpeg(scene(10_000 + number), 55))
    later = lawn.snapshot()
    for number in range(20):
        copy, origin = lawn.record(f"later{number}.jpg"), lawn.record(f"d{number}.jpg")
        assert (copy.split, copy.group_id) == (origin.split, origin.group_id)
    assert later.counts["test"]["dandelion"] == 2 * first.counts["test"]["dandelion"]


def test_26_a_newcomer_that_bridges_two_splits_is_quarantined(lawn: Lawn) -> None:
    lawn.fill(20)
    first = lawn.snapshot()
    train, test = (next(row for row in first.rows if (row.split, row.label) == (s, "grass")) for s in ("train", "test"))
    sha = lawn.put("bridge.jpg", "grass", jpeg(scene(777)))
    # Hashes four bits from each: within the distance of both, while the two are eight apart.
    with lawn.catalog.session() as session:
        for row_sha, value in ((train.sha256, 0b0), (test.sha256, 0b11111111), (sha, 0b1111)):
            session.execute(
                sa.update(ImageRecord).where(ImageRecord.sha256 == row_sha).values(phash=f"{value << 32:016x}")
            )
    after = lawn.snapshot()
    record = lawn.record("bridge.jpg")
    assert record.state == "quarantined" and (record.reason or "").startswith("split_bridge: ")
    assert (after.id, split_of(after)) == (first.id, split_of(first))


def test_25_one_picture_with_two_labels_is_trained_under_neither(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.put("same.jpg", "dandelion", jpeg(scene(3)))
    snapshot = lawn.snapshot()
    assert snapshot.quarantined == 2
    assert hashlib.sha256(jpeg(scene(3))).hexdigest() not in split_of(snapshot)
    for name in ("g3.jpg", "same.jpg"):
        assert (lawn.record(name).reason or "").startswith("label_conflict: ")
    lawn.put("third.jpg", "grass", jpeg(scene(3), 70))
    assert lawn.snapshot().id == snapshot.id, "a further copy does not slip through"


def test_25_a_correction_frees_all_copies(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.put("same.jpg", "dandelion", jpeg(scene(3)))
    lawn.snapshot()
    lawn.catalog.relabel("https://photos.example/same.jpg", "grass")
    healed = lawn.snapshot()
    assert healed.quarantined == 0 and hashlib.sha256(jpeg(scene(3))).hexdigest() in split_of(healed)
    assert {lawn.record(name).state for name in ("g3.jpg", "same.jpg")} == {"stored"}


@pytest.mark.parametrize(("grass", "dandelion"), [(0, 0), (9, 0), (9, 4)])
def test_27_too_few_images_write_nothing(lawn: Lawn, grass: int, dandelion: int) -> None:
    for number in range(grass):
        lawn.put(f"g{number}.jpg", "grass", jpeg(scene(number)))
    for number in range(dandelion):
        lawn.put(f"d{number}.jpg", "dandelion", jpeg(scene(100 + number)))
    with pytest.raises(DataError) as caught:
        lawn.snapshot()
    assert caught.value.hint
    assert list(lawn.store.list("snapshots/")) == []
    with lawn.catalog.session() as session:
        assert session.scalar(sa.select(sa.func.count(ImageRecord.split))) == 0
    with pytest.raises(NotFound):
        dataset.load_snapshot(lawn.catalog, lawn.store)


def test_27_copies_do_not_make_a_class_large_enough(lawn: Lawn) -> None:
    lawn.fill(5)
    for number in range(9):
        lawn.put(f"copy{number}.jpg", "daisy", jpeg(scene(500)))
    with pytest.raises(DataError, match="daisy has 1"):
        lawn.snapshot()


def test_samples_are_marked(lawn: Lawn) -> None:
    lawn.fill(6)
    assert not lawn.snapshot().samples
    lawn.put("drawn.jpg", "grass", jpeg(scene(300)), source="sample")
    snapshot = lawn.snapshot()
    assert snapshot.samples and "drawn samples" in snapshot.summary()["message"]
    assert dataset.load_snapshot(lawn.catalog, lawn.store).samples


class Dying(LocalStore):
    """A store that goes away before a put."""

    def __init__(self, root: Path, at: str) -> None:
        super().__init__(root)
        self.at = at

    def put(self, key: str, data: bytes | Path, **options: object) -> ObjectInfo:
        if key.endswith(self.at):
            raise Unavailable("The store does not answer.")
        return super().put(key, data, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["manifest.parquet", "snapshot.json"])
def test_29_32_a_snapshot_cut_off_is_none_and_a_rerun_reaches_the_same(lawn: Lawn, at: str) -> None:
    lawn.fill(20)
    with pytest.raises(Unavailable):
        dataset.create_snapshot(lawn.settings, lawn.catalog, Dying(lawn.store.root, at))
    with pytest.raises(NotFound):
        dataset.load_snapshot(lawn.catalog, lawn.store)
    rerun = lawn.snapshot()
    untouched = Lawn(lawn.settings.home / "untouched")
    untouched.fill(20)
    assert rerun.id == untouched.snapshot().id


def test_29_a_missing_object_makes_no_snapshot(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.store.delete(str(lawn.record("g3.jpg").object_key))
    lawn.store.put(str(lawn.record("d5.jpg").object_key), b"cut off")
    with pytest.raises(IntegrityError, match=r"d5\.jpg \(object of 7 bytes.*g3\.jpg \(object missing\)") as caught:
        lawn.snapshot()
    assert "data recheck" in caught.value.hint
    assert list(lawn.store.list("snapshots/")) == []
    with lawn.catalog.session() as session:
        assert session.scalar(sa.select(sa.func.count(SnapshotRecord.id))) == 0


def test_an_altered_manifest_is_refused(lawn: Lawn) -> None:
    lawn.fill(20)
    snapshot = lawn.snapshot()
    key = f"snapshots/{snapshot.id}/manifest.parquet"
    data = bytearray(lawn.store.get(key))
    data[len(data) // 2] ^= 1
    lawn.store.put(key, bytes(data))
    with pytest.raises(IntegrityError):
        dataset.load_snapshot(lawn.catalog, lawn.store)
    # An altered manifest whose recorded hash was altered with it still does not give the id.
    buffer = io.BytesIO()
    rows = [{**asdict(row), "split": "train"} for row in snapshot.rows]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    summary = json.loads(lawn.store.get(f"snapshots/{snapshot.id}/snapshot.json"))
    summary["manifest_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    lawn.store.put(key, buffer.getvalue())
    lawn.store.put(f"snapshots/{snapshot.id}/snapshot.json", json.dumps(summary).encode())
    with pytest.raises(IntegrityError, match="does not give its id"):
        dataset.load_snapshot(lawn.catalog, lawn.store)


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "summary cut off": ("snapshot.json", lambda data: data[:200]),
    "summary not text": ("snapshot.json", lambda data: b"\xff" + data),
    "summary of something else": ("snapshot.json", lambda _: b"[]"),
    "summary without its hash": ("snapshot.json", lambda _: b"{}"),
    "summary gone": ("snapshot.json", lambda _: None),
    "manifest cut off": ("manifest.parquet", lambda data: data[:200]),
    "manifest altered": ("manifest.parquet", lambda data: data[:200] + b"?" + data[201:]),
    "manifest gone": ("manifest.parquet", lambda _: None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_said_with_exit_code_4_and_written_again(
    lawn: Lawn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    lawn.fill(20)
    snapshot = lawn.snapshot()
    name, damaged = DAMAGE[damage]
    key = f"snapshots/{snapshot.id}/{name}"
    data = damaged(lawn.store.get(key))
    if data is None:
        lawn.store.delete(key)
    else:
        lawn.store.put(key, data)
    with pytest.raises(IntegrityError) as caught:
        dataset.load_snapshot(lawn.catalog, lawn.store)
    assert snapshot.id[:12] in caught.value.message and "snapshot create" in caught.value.hint
    monkeypatch.setattr(cli, "opened", lambda: (lawn.settings, lawn.catalog, lawn.store))
    assert cli.app(["snapshot", "verify"], standalone_mode=False) == 4
    assert "snapshot create" in json.loads(capsys.readouterr().out)["message"]
    assert cli.app(["snapshot", "create"], standalone_mode=False) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["snapshot"], said["created"], said["renewed"]) == (snapshot.id, False, True)
    assert dataset.load_snapshot(lawn.catalog, lawn.store).rows == snapshot.rows
    assert cli.app(["snapshot", "verify"], standalone_mode=False) == 0


def test_a_damaged_snapshot_whose_images_changed_since_makes_way_for_a_new_one(lawn: Lawn) -> None:
    lawn.fill(20)
    old = lawn.snapshot()
    lawn.store.delete(f"snapshots/{old.id}/snapshot.json")
    lawn.fill(5, first=100)
    new = lawn.snapshot()
    assert new.created and dataset.load_snapshot(lawn.catalog, lawn.store).id == new.id
    with pytest.raises(IntegrityError):
        dataset.load_snapshot(lawn.catalog, lawn.store, old.id)


def test_snapshots_by_their_beginning(lawn: Lawn) -> None:
    lawn.fill(20)
    lawn.snapshot()
    with lawn.catalog.session() as session:
        session.add(SnapshotRecord(id="f" * 64, counts={}, samples=False))
    for wrong in ("", "zz", "%", "_"):
        with pytest.raises(NotFound):
            dataset.load_snapshot(lawn.catalog, lawn.store, wrong)


# --- a split is for life, whatever comes (26) -----------------------------------------------------------------------


def flipped(phash: int, bits: list[int]) -> int:
    return phash ^ sum(1 << bit for bit in bits)


def arrivals(seed: int) -> list[Picture]:
    """Chains of near duplicates in random order: each picture is four bits from the last, the ends far apart."""
    rng = np.random.default_rng(seed)
    found = []
    for chain in range(60):
        phash = int(rng.integers(0, 2**63))
        free = rng.permutation(64).tolist()
        for link in range(int(rng.integers(1, 7))):
            found.append(Picture(f"{chain}-{link}.jpg", "grass" if chain % 2 else "dandelion", phash=phash))
            phash = flipped(phash, [free.pop() for _ in range(4)])
    return [found[number] for number in rng.permutation(len(found))]


@pytest.mark.parametrize("seed", range(2))
def test_26_whatever_the_order_no_group_ever_spans_two_splits(tmp_path: Path, seed: int) -> None:
    pictures = arrivals(seed)
    together, apart = Lawn(tmp_path / "together"), Lawn(tmp_path / "apart")
    together.put_all(pictures)
    whole = together.snapshot()
    assert len({row.group for row in whole.rows}) == 60, "a chain is one group, though its ends are far apart"
    before: dict[str, str] = {}
    for part in np.array_split(np.array(pictures, dtype=object), 4):
        apart.put_all(list(part))
        snapshot = apart.snapshot()
        assert apart.snapshot().id == snapshot.id, "again changes nothing"
        now = split_of(snapshot)
        assert {sha: split for sha, split in now.items() if sha in before} == {s: before[s] for s in now if s in before}
        before |= now
        of_chain = {hashlib.sha256(p.name.encode()).hexdigest(): p.name.partition("-")[0] for p in pictures}
        phashes = {hashlib.sha256(p.name.encode()).hexdigest(): p.phash or 0 for p in pictures}
        of_group: dict[str, set[str]] = defaultdict(set)
        for row in snapshot.rows:
            of_group[row.group].add(row.split)
            assert row.group in of_chain and of_chain[row.group] == of_chain[row.sha256]
        assert all(len(found) == 1 for found in of_group.values())
        for one, two in combinations(now, 2):
            if (phashes[one] ^ phashes[two]).bit_count() <= 6:
                assert now[one] == now[two], "no picture resembles one of another split"
    bridges = sum((apart.record(p.name).reason or "").startswith("split_bridge: ") for p in pictures)
    assert len(before) + bridges == len(pictures)


def test_26_a_picture_that_left_still_holds_the_split_of_its_group(lawn: Lawn) -> None:
    lawn.fill(20)
    first = lawn.snapshot()
    for row in first.rows:
        if row.split == "test":
            lawn.change(row.url.rpartition("/")[2], state="gone", reason="http_404: not there any more")
    names = [row.url.rpartition("/")[2] for row in first.rows if row.split == "test"]
    for name in names:
        lawn.put(f"copy-{name}", lawn.record(name).label.name, jpeg(Image.open(io.BytesIO(stored(lawn, name))), 60))
    later = lawn.snapshot()
    assert {row.url.rpartition("/")[2]: row.split for row in later.rows if "copy-" in row.url} == {
        f"copy-{name}": "test" for name in names
    }
    lawn.change(names[0], state="stored", reason=None)
    assert split_of(lawn.snapshot())[str(lawn.record(names[0]).sha256)] == "test"


def stored(lawn: Lawn, name: str) -> bytes:
    return lawn.store.get(str(lawn.record(name).object_key))


def test_26_a_picture_that_changed_into_one_of_another_split_is_set_aside(lawn: Lawn) -> None:
    lawn.fill(20)
    first = lawn.snapshot()
    train, test = (next(row for row in first.rows if (row.split, row.label) == (s, "grass")) for s in ("train", "test"))
    name = train.url.rpartition("/")[2]
    copy = jpeg(Image.open(io.BytesIO(lawn.store.get(test.object_key))), 50)
    lawn.put("copy.jpg", "grass", copy)  # what the source of the training picture gives from now on
    new = lawn.record("copy.jpg")
    lawn.change(name, sha256=new.sha256, object_key=new.object_key, phash=new.phash, bytes=new.bytes)
    after = lawn.snapshot()
    assert (lawn.record(name).reason or "").startswith("split_bridge: ") and lawn.record(name).split == "train"
    assert (
        split_of(after)[test.sha256] == "test" and after.counts["train"]["grass"] == first.counts["train"]["grass"] - 1
    )


def test_26_a_relabelled_picture_keeps_its_split(lawn: Lawn) -> None:
    lawn.fill(20)
    first = lawn.snapshot()
    row = next(row for row in first.rows if row.split == "test" and row.label == "grass")
    lawn.catalog.relabel(row.url, "dandelion")
    second = lawn.snapshot()
    assert next((r.label, r.split) for r in second.rows if r.sha256 == row.sha256) == ("dandelion", "test")
    difference = dataset.diff_snapshots(lawn.catalog, lawn.store, first.id, "latest")
    assert difference["relabelled"] == {
        "count": 1,
        "counts": {"grass → dandelion": 1},
        "first": [{"sha256": row.sha256, "url": row.url, "from": "grass", "to": "dandelion"}],
    }
    assert [difference[kind]["count"] for kind in ("added", "removed", "moved")] == [0, 0, 0]


def test_the_test_split_grows_by_a_recorded_act_only(lawn: Lawn) -> None:
    lawn.fill(20)
    before = lawn.snapshot()
    assert before.made_by["new_to_test"] == 0.0
    lawn.fill(20, first=100)
    grown = lawn.snapshot(new_to_test=0.5)
    sizes = {split: sum(grown.counts[split].values()) - sum(before.counts[split].values()) for split in dataset.SPLITS}
    assert 10 < sizes["test"] < 30 and sizes["train"] > 0
    assert {sha: split for sha, split in split_of(grown).items() if sha in split_of(before)} == split_of(before)
    assert dataset.load_snapshot(lawn.catalog, lawn.store).made_by["new_to_test"] == 0.5
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError):
            lawn.snapshot(new_to_test=wrong)


# --- settling -------------------------------------------------------------------------------------------------------


def test_settling_records_groups_and_quarantines_and_splits_nobody_new(lawn: Lawn) -> None:
    lawn.fill(6)
    lawn.put("same.jpg", "dandelion", jpeg(scene(3)))
    small = lawn.put("small.jpg", "grass", jpeg(scene(4).resize((90, 70))))
    settled = dataset.settle(lawn.settings, lawn.catalog)
    assert (settled.images, settled.groups, settled.label_conflicts, settled.split_bridges) == (12, 11, 2, 0)
    assert settled.near_duplicates == [tuple(sorted((small, str(lawn.record("g4.jpg").sha256))))]
    assert lawn.record("small.jpg").group_id == lawn.record("g4.jpg").group_id
    assert set(lawn.splits().values()) == {None}
    assert dataset.settle(lawn.settings, lawn.catalog) == settled
    lawn.snapshot()
    lawn.put("late.jpg", "grass", jpeg(scene(5), 50))
    dataset.settle(lawn.settings, lawn.catalog)
    assert lawn.record("late.jpg").split == lawn.record("g5.jpg").split is not None


def test_what_changes_while_it_is_judged_is_judged_again(lawn: Lawn, monkeypatch: pytest.MonkeyPatch) -> None:
    lawn.fill(20)
    judge, looks = splits._judge, 0

    def meanwhile(*given: object) -> dataset.Settled:
        nonlocal looks
        looks += 1
        if looks == 1:
            lawn.catalog.relabel("https://photos.example/g3.jpg", "dandelion")
        return judge(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(splits, "_judge", meanwhile)
    snapshot = lawn.snapshot()
    assert looks == 2
    assert next(row.label for row in snapshot.rows if row.url.endswith("/g3.jpg")) == "dandelion"


# --- verifying ------------------------------------------------------------------------------------------------------


def verify(lawn: Lawn, **options: bool) -> dict[str, Any]:
    return dataset.verify_snapshot(lawn.settings, lawn.catalog, lawn.store, **options)


def test_a_whole_snapshot_is_verified_pixel_by_pixel(lawn: Lawn) -> None:
    lawn.fill(10)
    lawn.put("black.png", "grass", jpeg(Image.new("RGB", (40, 40))))
    lawn.snapshot()
    report = verify(lawn, pixels=True)
    assert (report["ok"], report["images"], report["not_comparable"], report["faults"]) == (True, 21, 1, {})


def test_26_a_copy_smuggled_into_another_split_is_found_by_its_pixels(lawn: Lawn) -> None:
    lawn.fill(20)
    row = next(row for row in lawn.snapshot().rows if row.split == "test")
    picture = Image.open(io.BytesIO(lawn.store.get(row.object_key)))
    copy = jpeg(picture.resize((100, 90)), 40)
    lawn.put("copy.jpg", row.label, copy, phash=0x0123456789ABCDEF)  # a hash that resembles no other
    lawn.change("copy.jpg", split="train", group_id=hashlib.sha256(copy).hexdigest())
    lawn.snapshot()
    assert verify(lawn)["ok"], "its group and its hash say nothing"
    report = verify(lawn, pixels=True)
    assert not report["ok"] and list(report["faults"]) == ["look_alikes"]
    (said,) = report["faults"]["look_alikes"]["first"]
    assert "copy.jpg (train)" in said and f"{row.url} (test)" in said


def test_look_alikes_are_all_found_by_looking_at_few_pairs() -> None:
    rng = np.random.default_rng(0)
    scenes = rng.standard_normal((2_000, 16, 16, 3)).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(scene, (0, 0), 2) for scene in scenes]).reshape(len(scenes), -1)
    copies = smooth[:300] + rng.uniform(0, 0.06, (300, 1)) * rng.standard_normal((300, smooth.shape[1]))
    flat = np.zeros((200, smooth.shape[1]))
    vectors = np.concatenate([smooth, copies, flat]).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    held = rng.choice(dataset.SPLITS, len(vectors), p=[0.7, 0.15, 0.15])
    apart = np.triu(held[:, None] != held[None, :], 1)
    alike = np.argwhere(apart & (vectors @ vectors.T >= LOOK_ALIKE))
    found = list(look_alikes(list(held), vectors))
    assert 20 < len(alike) < 280, "some of the copies are near enough, some are not"
    assert sorted(tuple(sorted(pair[:2])) for pair in found) == [tuple(pair) for pair in alike]
    looked_at = sum(len(others) for _, others in candidates(list(held), vectors))
    assert looked_at < apart.sum() / 1000


def test_rotten_and_missing_objects_are_found(lawn: Lawn) -> None:
    lawn.fill(10)
    snapshot = lawn.snapshot()
    data = bytearray(lawn.store.get(snapshot.rows[0].object_key))
    data[-20] ^= 1
    lawn.store.put(snapshot.rows[0].object_key, bytes(data))
    lawn.store.delete(snapshot.rows[1].object_key)
    report = verify(lawn)
    assert not report["ok"] and {kind: entry["count"] for kind, entry in report["faults"].items()} == {
        "altered_object": 1,
        "missing_object": 1,
    }
    assert snapshot.rows[0].url in report["faults"]["altered_object"]["first"][0]


def test_the_command_line_says_what_is_wrong_with_exit_code_4(
    lawn: Lawn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lawn.fill(10)
    snapshot = lawn.snapshot()
    monkeypatch.setattr(cli, "opened", lambda: (lawn.settings, lawn.catalog, lawn.store))

    def run(*argv: str) -> tuple[int, dict[str, Any]]:
        code = cli.app(["snapshot", *argv], standalone_mode=False)
        return int(code or 0), json.loads(capsys.readouterr().out)

    assert run("verify", "--pixels") == (0, {**verify(lawn, pixels=True)})
    assert run("diff", snapshot.id[:8])[1]["message"].endswith("0 moved to another split.")
    lawn.store.delete(snapshot.rows[3].object_key)
    code, report = run("verify", snapshot.id[:12])
    assert (code, report["ok"], report["faults"]["missing_object"]["count"]) == (4, False, 1)
    assert run("create", "--new-to-test", "0.3")[0] == 99


def test_a_group_in_two_splits_is_found(lawn: Lawn) -> None:
    lawn.fill(20)
    rows = lawn.snapshot().rows
    train, test = (next(r for r in rows if (r.split, r.label) == (s, "grass")) for s in ("train", "test"))
    lawn.change(train.url.rpartition("/")[2], group_id=test.group)
    lawn.snapshot()
    assert list(verify(lawn)["faults"]) == ["group_in_two_splits"]


def test_what_is_shown_of_a_snapshot(lawn: Lawn) -> None:
    lawn.fill(10)
    lawn.put("same.jpg", "dandelion", jpeg(scene(3)))
    snapshot = lawn.snapshot()
    shown = dataset.show_snapshot(lawn.catalog, lawn.store)
    manifest = lawn.store.get(f"snapshots/{snapshot.id}/manifest.parquet")
    assert shown["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert shown["made_by"]["program"].startswith("lawnwatch ") and shown["created_at"]
    assert shown["quarantined_now"]["label_conflict"]["count"] == 2
    assert {entry["url"] for entry in shown["quarantined_now"]["label_conflict"]["first"]} == {
        "https://photos.example/same.jpg",
        "https://photos.example/g3.jpg",
    }


def test_what_came_and_went_between_two_snapshots(lawn: Lawn) -> None:
    lawn.fill(20)
    first = lawn.snapshot()
    lawn.fill(15, first=100)
    gone = first.rows[0]
    lawn.change(gone.url.rpartition("/")[2], state="gone", reason="http_410: gone")
    second = lawn.snapshot()
    difference = dataset.diff_snapshots(lawn.catalog, lawn.store, first.id[:10], second.id[:10])
    assert (difference["from"], difference["to"]) == (first.id, second.id)
    assert (difference["added"]["count"], len(difference["added"]["first"])) == (30, 20)
    assert difference["removed"]["first"] == [
        {"sha256": gone.sha256, "url": gone.url, "label": gone.label, "split": gone.split}
    ]
    assert sum(sum(counts.values()) for counts in difference["added"]["counts"].values()) == 30
    assert difference["counts"] == {"from": first.counts, "to": second.counts}


def test_35_the_newest_snapshot_is_the_last_one_made_whatever_the_clock_says(
    lawn: Lawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    lawn.fill(6)
    lawn.snapshot()
    lawn.fill(6, first=100)
    monkeypatch.setattr(create, "utc_now", lambda: datetime(2001, 1, 1, tzinfo=UTC))
    second = lawn.snapshot()
    assert dataset.load_snapshot(lawn.catalog, lawn.store, "latest").id == second.id


def test_a_correction_taken_back_makes_the_snapshot_before_it_the_latest_again(
    lawn: Lawn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lawn.fill(20)
    url = str(lawn.record("g3.jpg").url)
    right = lawn.snapshot()
    objects = list(lawn.store.list("snapshots/"))
    lawn.catalog.relabel(url, "dandelion")
    mistaken = lawn.snapshot()
    lawn.catalog.relabel(url, "grass")
    monkeypatch.setattr(cli, "opened", lambda: (lawn.settings, lawn.catalog, lawn.store))
    said = []
    for code in (0, 99):
        assert cli.app(["snapshot", "create"], standalone_mode=False) == code
        said.append(json.loads(capsys.readouterr().out))
        latest = dataset.load_snapshot(lawn.catalog, lawn.store)
        assert (latest.id, latest.rows) == (right.id, right.rows), "training reads the corrected labels"
    assert [(one["snapshot"], one["created"], one["renewed"]) for one in said] == [
        (right.id, False, True),
        (right.id, False, False),
    ]
    assert latest.created_at > mistaken.created_at > right.created_at
    assert [each["snapshot"] for each in dataset.list_snapshots(lawn.catalog)] == [right.id, mistaken.id]
    assert [info for info in lawn.store.list("snapshots/") if right.id in info.key] == objects, "written once"


# --- pictures -------------------------------------------------------------------------------------------------------


def keep(store: LocalStore, *contents: bytes) -> list[tuple[str, str]]:
    """Store objects; (key, SHA-256) of each."""
    found = [(f"images/{hashlib.sha256(data).hexdigest()}", hashlib.sha256(data).hexdigest()) for data in contents]
    for (key, _), data in zip(found, contents, strict=True):
        store.put(key, data)
    return found


def test_a_cached_copy_is_verified_at_every_reading(tmp_path: Path) -> None:
    store, cache = LocalStore(tmp_path / "store"), dataset.ObjectCache(tmp_path / "cache", 10**6)
    ((key, sha),) = keep(store, b"picture")
    assert cache.read(store, key, sha) == b"picture"
    (copy,) = (tmp_path / "cache").glob("*/*")
    copy.write_bytes(b"altered")
    assert cache.read(store, key, sha) == b"picture" == copy.read_bytes(), "a rotten copy is fetched anew"
    store.put(key, b"altered")
    assert cache.read(store, key, sha) == b"picture", "the cache serves while the store is wrong"
    with pytest.raises(IntegrityError, match=key):
        dataset.ObjectCache(tmp_path / "other", 10**6).read(store, key, sha)
    assert not list((tmp_path / "other").glob("*/*"))


def test_the_least_recently_used_copies_go_first(tmp_path: Path) -> None:
    store, cache = LocalStore(tmp_path / "store"), dataset.ObjectCache(tmp_path / "cache", 100_000)
    objects = keep(store, *(bytes([number]) * 5_000 for number in range(20)))
    for number, (key, sha) in enumerate(objects):
        cache.read(store, key, sha)
        os.utime(tmp_path / "cache" / sha[:2] / sha, (1_000_000 + number,) * 2)
    cache.read(store, *objects[0])  # used just now
    (tmp_path / "cache" / "00").mkdir(exist_ok=True)
    left = tmp_path / "cache" / "00" / ".part-left by a killed process"
    left.write_bytes(b"half")
    os.utime(left, (1_000_000,) * 2)
    for key, sha in keep(store, b"a" * 5_000, b"b" * 5_000):
        cache.read(store, key, sha)
    there = {path.name for path in (tmp_path / "cache").glob("*/*")}
    assert objects[0][1] in there and objects[1][1] not in there and objects[19][1] in there
    assert left.name not in there
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*")) <= 100_000


def test_no_cache_and_no_room_for_one_are_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = LocalStore(tmp_path / "store")
    ((key, sha), (large, large_sha)) = keep(store, b"picture", b"p" * 2_000)
    none = dataset.ObjectCache(tmp_path / "none", 0)
    assert none.read(store, key, sha) == b"picture" and not (tmp_path / "none").exists()
    small = dataset.ObjectCache(tmp_path / "small", 1_000)
    assert small.read(store, large, large_sha) and not (tmp_path / "small").exists()
    (tmp_path / "file").write_text("a file where the folder should be")
    for _ in range(2):
        broken = dataset.ObjectCache(tmp_path / "file", 10**6)
        assert broken.read(store, key, sha) == b"picture" and broken.read(store, key, sha) == b"picture"


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_near_pairs_are_those_of_the_slow_way() -> None:
    rng = np.random.default_rng(5)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for number in range(0, 300, 3):  # neighbours at every distance from 0 to 9
        flips = rng.choice(64, number % 10, replace=False)
        hashes[number + 1] = hashes[number] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
    for distance in (0, 1, 6, 16):
        slow = [
            (one, two)
            for one in range(300)
            for two in range(one + 1, 300)
            if int(hashes[one] ^ hashes[two]).bit_count() <= distance
        ]
        found = {(int(one), int(two)) for pairs in dataset.near_pairs(hashes, distance) for one, two in pairs}
        assert sorted(found) == slow


def test_thousands_of_blank_pictures_are_one_group_in_no_time() -> None:
    roots, pairs = dataset.duplicate_groups(np.zeros(20_000, np.uint64), 6)
    assert not roots.any() and len(pairs) == 1_000
