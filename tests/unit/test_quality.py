"""The quality report: every check seen failing, every figure what the catalog holds, strangers' text inert."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from lawnwatch import bundle, images, quality
from lawnwatch.catalog import Catalog, ImageRecord, Label, QualityReport, url_hash
from lawnwatch.config import Settings
from lawnwatch.errors import DataError, InputError, NotFound, Unavailable
from lawnwatch.quality.checks import Check, judge
from lawnwatch.quality.facts import Facts, host_of, read_facts
from lawnwatch.quality.noise import Noise, disputed
from lawnwatch.store import LocalStore

pytestmark = pytest.mark.unit


def jpeg(seed: int, size: tuple[int, int] = (120, 90)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def black() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (120, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def no_champion() -> bundle.Bundle:
    raise NotFound("there is no champion yet.")


class Lawn:
    """A catalog whose pictures are stored without a web."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, data={"min_per_class": 4}, **settings)
        self.catalog = Catalog(self.settings)
        self.catalog.migrate()
        self.store = LocalStore(home / "store")

    def put(self, url: str, label: str, data: bytes) -> None:
        self.add([self.record(url, label, data)])

    def record(self, url: str, label: str, data: bytes) -> dict[str, Any]:
        info, rgb = images.inspect_and_decode(data, max_pixels=10**6)
        sha = hashlib.sha256(data).hexdigest()
        key = f"images/{sha[:2]}/{sha}.jpg"
        self.store.put(key, data)
        return {
            "url": url,
            "label": label,
            "state": "stored",
            "sha256": sha,
            "object_key": key,
            "phash": f"{images.phash(rgb):016x}",
            "width": info.width,
            "height": info.height,
            "brightness": images.brightness(rgb),
            "sharpness": images.sharpness(rgb),
        }

    def end(self, url: str, label: str, **values: Any) -> None:
        self.add([{"url": url, "label": label, **values}])

    def add(self, records: list[dict[str, Any]]) -> None:
        """Put records into the catalog as an ingest leaves them, in one transaction."""
        with self.catalog.session() as session:
            labels = {label.name: label for label in session.scalars(sa.select(Label))}
            for values in records:
                label = labels.setdefault(name := values.pop("label"), Label(name=name))
                session.add(
                    ImageRecord(label=label, label_source="import", url_sha256=url_hash(values["url"]), **values)
                )

    def fill(self, count: int, *labels: str, first: int = 0) -> Lawn:
        self.add(
            [
                self.record(f"https://photos.example/{label}/{number}.jpg", label, jpeg(1000 * place + number))
                for place, label in enumerate(labels or ("dandelion", "grass"))
                for number in range(first, first + count)
            ]
        )
        return self

    def look(self, **options: Any) -> quality.QualityResult:
        options = {"find_champion": no_champion, "progress": lambda line: None, **options}
        return quality.report(self.settings, self.catalog, self.store, **options)

    def failing(self) -> list[Check]:
        with pytest.raises(quality.ChecksFailed) as caught:
            self.look()
        failed = [check for check in caught.value.result.checks if not check.passed]
        assert failed
        assert all(check.sentence in caught.value.message and check.advice in caught.value.hint for check in failed)
        return failed

    def html(self, result: quality.QualityResult) -> str:
        return self.store.get(result.object_key).decode()


@pytest.fixture
def lawn(tmp_path: Path) -> Lawn:
    return Lawn(tmp_path)


def test_good_images_pass_and_the_report_lies_in_the_store(lawn: Lawn) -> None:
    result = lawn.fill(6).look()
    assert result.passed and result.created and result.forced is None
    assert result.report_url == f"http://127.0.0.1:8000/reports/quality/{result.report}"
    lawn.settings = lawn.settings.model_copy(update={"public_url": "https://lawn.example.org/"})
    assert lawn.look().report_url == f"https://lawn.example.org/reports/quality/{result.report}"
    page = lawn.html(result)
    assert "The images pass every check" in page and page.count("<svg") == 4  # the logo and three plots
    document = json.loads(lawn.store.get(f"reports/quality/{result.report}.json"))
    assert document["facts"]["images"] == 12 and [c["name"] for c in document["checks"]] == [
        check.name for check in result.checks
    ]
    with lawn.catalog.session() as session:
        row = session.get_one(QualityReport, result.report)
    assert (row.passed, row.forced, row.object_key) == (True, None, result.object_key)


def test_the_same_images_have_the_same_report(lawn: Lawn) -> None:
    first = lawn.fill(5).look()
    before = [(info.key, lawn.store.get(info.key)) for info in lawn.store.list("reports/")]
    again = lawn.look()
    assert not again.created and replace(again, created=True) == first
    assert [(info.key, lawn.store.get(info.key)) for info in lawn.store.list("reports/")] == before
    lawn.fill(1, first=5)
    assert lawn.look().report != first.report


def test_a_lost_page_is_made_again(lawn: Lawn) -> None:
    first = lawn.fill(5).look()
    lawn.store.delete(first.object_key)
    assert lawn.look().report == first.report and lawn.html(first)


def test_the_state_that_came_back_is_the_latest_again(lawn: Lawn) -> None:
    first = lawn.fill(5).look()
    lawn.catalog.relabel("https://photos.example/grass/1.jpg", "dandelion")
    second = lawn.look()
    lawn.catalog.relabel("https://photos.example/grass/1.jpg", "grass")
    assert lawn.look().report == first.report != second.report
    with lawn.catalog.session() as session:
        assert session.scalars(sa.select(QualityReport.id).order_by(QualityReport.created_at.desc())).first() == (
            first.report
        )


def test_an_empty_store_is_a_clear_error(lawn: Lawn) -> None:
    lawn.catalog.add("https://photos.example/1.jpg", "grass")
    with pytest.raises(DataError, match="No image is stored; the catalog's records are: 1 pending") as caught:
        lawn.look()
    assert "lawnwatch ingest" in caught.value.hint


def test_a_small_class_is_named(lawn: Lawn) -> None:
    (failed,) = lawn.fill(6, "dandelion").fill(2, "grass", first=500).failing()
    assert failed.name == "enough_images" and failed.value == 2
    assert "grass has 2 usable images; at least 4 are needed" in failed.sentence


def test_a_class_that_was_never_stored_is_named_and_one_still_pending_is_not(lawn: Lawn) -> None:
    lawn.fill(5)
    lawn.catalog.add("https://photos.example/new.jpg", "clover")
    assert lawn.look().passed
    (claimed,) = lawn.catalog.claim(1, worker="w:1:1")
    lawn.catalog.finish("w:1:1", [(claimed.id, {"state": "failed", "reason": "timeout: too slow"})])
    assert "clover has 0 usable images" in {c.name: c for c in lawn.failing()}["enough_images"].sentence


def test_one_class_is_not_enough(lawn: Lawn) -> None:
    assert [check.name for check in lawn.fill(5, "grass").failing()] == ["enough_classes"]


def test_imbalance(tmp_path: Path) -> None:
    lawn = Lawn(tmp_path, quality={"max_imbalance": 1.5}).fill(8, "dandelion").fill(5, "grass", first=500)
    (failed,) = lawn.failing()
    assert (failed.name, failed.value, failed.found) == ("class_balance", 1.6, "1.6 : 1")


def test_a_picture_with_two_labels(lawn: Lawn) -> None:
    lawn.fill(5)
    lawn.put("https://other.example/same.jpg", "grass", jpeg(3))  # dandelion 3
    (failed,) = lawn.failing()
    assert failed.name == "label_conflicts" and failed.value == pytest.approx(2 / 11)
    page = lawn.html(lawn.look(force=True, reason="known"))
    assert page.count("the same picture is labelled dandelion and grass") == 2


def test_copies(tmp_path: Path) -> None:
    lawn = Lawn(tmp_path, quality={"max_copies": 0.1}).fill(6)
    for number in range(2):
        lawn.put(f"https://other.example/{number}.jpg", "dandelion", jpeg(3))
    (failed,) = lawn.failing()
    assert failed.name == "copies" and failed.value == pytest.approx(2 / 14)


def test_too_small(lawn: Lawn) -> None:
    lawn.fill(5)
    for number in range(2):
        lawn.put(f"https://photos.example/tiny{number}.jpg", "grass", jpeg(90 + number, (31, 200)))
    (failed,) = lawn.failing()
    assert (failed.name, failed.value) == ("too_small", pytest.approx(2 / 12))


def test_blank(lawn: Lawn) -> None:
    lawn.fill(5)
    lawn.put("https://photos.example/black.jpg", "grass", black())
    (failed,) = lawn.failing()
    assert failed.name == "blank" and "1 of 11 images showed next to nothing" in failed.sentence


def test_one_source(tmp_path: Path) -> None:
    lawn = Lawn(tmp_path, quality={"max_one_host": 0.9}).fill(6)
    lawn.put("https://other.example/1.jpg", "grass", jpeg(77))
    (failed,) = lawn.failing()
    assert failed.name == "one_source" and "12 of 13 stored records came from photos.example" in failed.sentence


def test_failed_fetches_count_without_what_comparison_set_aside(lawn: Lawn) -> None:
    lawn.fill(5)
    for number, (state, reason) in enumerate(
        (("gone", "http_404: gone"), ("failed", "timeout: slow"), ("quarantined", "corrupt: cut"), ("blocked", "x: y"))
    ):
        lawn.end(f"https://photos.example/bad{number}", "grass", state=state, reason=reason)
    lawn.end("https://photos.example/bridge", "grass", state="quarantined", reason="split_bridge: resembles both")
    (failed,) = lawn.failing()
    assert failed.name == "failed_fetches" and failed.value == pytest.approx(4 / 15)


def test_force_is_recorded_with_its_reason_and_leaves_the_refusal_as_it_was(lawn: Lawn) -> None:
    lawn.fill(6, "dandelion").fill(2, "grass", first=500)
    with pytest.raises(InputError, match="needs a reason"):
        lawn.look(force=True, reason=" ")
    (failed,) = lawn.failing()
    forced = lawn.look(force=True, reason="a <trial>")
    assert not forced.passed and forced.forced == "a <trial>" and "overruled: a <trial>" in forced.message
    assert "“a &lt;trial&gt;”" in lawn.html(forced)
    assert lawn.look(force=True, reason="a <trial>").report == forced.report
    assert lawn.failing() == [failed]
    with lawn.catalog.session() as session:
        rows = {row.id: row.forced for row in session.scalars(sa.select(QualityReport))}
    assert len(rows) == 2 and rows[forced.report] == "a <trial>"


def test_force_on_good_images_is_no_force(lawn: Lawn) -> None:
    plain = lawn.fill(5).look()
    assert lawn.look(force=True, reason="to be safe") == replace(plain, created=False)


class Page(HTMLParser):
    """What a page would load, run or lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_strangers_text_is_inert(lawn: Lawn) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    lawn.fill(5)
    lawn.fill(5, f"{evil}", first=300)
    lawn.put(f"https://photos.example/x.jpg?{evil}", "grass", jpeg(900))
    lawn.put(f"https://{evil.replace('/', '')}.example/x.jpg", "grass", jpeg(901))
    lawn.put(f"https://photos.example/y.jpg?{evil}", "dandelion", jpeg(900))  # goes to the quarantine sheet
    lawn.end(f"https://photos.example/{evil}", "grass", state="failed", reason=f"odd: {evil}")
    text = lawn.html(lawn.look(force=True, reason=evil))
    page = Page(text)
    assert evil not in text and "&lt;script&gt;" in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for tag, attributes in page.tags:
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/jpeg;base64,")
        if tag == "a" and attributes.get("target"):
            assert attributes["rel"] == "noreferrer noopener"
            assert re.match(r"https?://", str(attributes["href"]))
    assert not re.search(r"url\(\s*['\"]?http|@import", text)


def test_many_classes_and_a_large_sheet_stay_one_small_page(tmp_path: Path) -> None:
    lawn = Lawn(tmp_path, quality={"contact_sheet": 500, "max_copies": 1})
    noise = np.random.default_rng(5)
    records = []
    for number in range(76):  # pictures of noise: the largest JPEGs there are
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (96, 150, 3), dtype=np.uint8)).save(buffer, "JPEG")
        label = f"class {number // 4:02}"
        records.append(lawn.record(f"https://photos.example/{number}.jpg", label, buffer.getvalue()))
    lawn.add(records)
    page = lawn.html(lawn.look())
    assert "smallest classes" in page and page.count("<img") <= 150
    assert len(page) < 3_000_000


def test_facts_are_what_the_catalog_holds(lawn: Lawn) -> None:
    lawn.fill(6)
    lawn.put("https://other.example/copy.jpg", "grass", jpeg(1001))
    lawn.end("https://other.example/gone.jpg", "grass", state="gone", reason="http_404: gone")
    lawn.look()  # settles groups and splits
    facts = read_facts(lawn.catalog)
    with lawn.catalog.session() as session:
        stored = list(session.scalars(sa.select(ImageRecord).where(ImageRecord.state == "stored")))
    distinct = {record.sha256: record for record in sorted(stored, key=lambda record: -record.id)}
    assert len(facts.pictures) == len(distinct) == 12 and facts.records == len(stored) == 13
    assert facts.groups == len({record.group_id for record in stored})
    assert facts.hosts == {"photos.example": 12, "other.example": 1}
    assert facts.states() == {"stored": 13, "gone": 1}
    assert facts.outcomes["gone", "http_404", "grass"] == 1
    for label, splits in facts.balance().items():
        for split, count in splits.items():
            assert count == sum(r.label.name == label and r.split == split for r in distinct.values())
    assert sorted(facts.pictures.brightness) == pytest.approx(sorted(r.brightness for r in distinct.values()))


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://A.example:8443/x", "a.example"),
        ("http://user:pw@a.example?x", "a.example"),
        ("http://[::1]:80/x", "[::1]"),
        ("https://a.example", "a.example"),
    ],
)
def test_hosts(url: str, host: str) -> None:
    assert host_of(url) == host


# --- label noise ----------------------------------------------------------------------------------------------------


def test_confident_learning_finds_the_wrong_labels_and_spares_the_unsure_ones() -> None:
    """Twenty good images of each class, one wrong one, one that the model cannot tell."""
    rng = np.random.default_rng(0)
    first = np.concatenate([rng.uniform(0.8, 1, 20), rng.uniform(0, 0.2, 20), [0.97, 0.55]])
    given = np.array([0] * 20 + [1] * 20 + [1, 1])
    predicted, usual = disputed(np.stack([first, 1 - first], axis=1), given, np.ones(42, bool))
    assert np.flatnonzero(predicted != given).tolist() == [40]
    assert usual[0] == pytest.approx(first[:20].mean())


def test_what_is_usual_comes_from_images_outside_the_training() -> None:
    """A model is surer of what it learned; taking that for usual would hide the wrong labels."""
    p = np.array([[0.99, 0.01]] * 90 + [[0.7, 0.3]] * 10 + [[0.75, 0.25]] + [[0.1, 0.9]] * 10)
    given = np.array([0] * 100 + [1] * 11)
    outside = np.array([False] * 90 + [True] * 21)
    predicted, usual = disputed(p, given, outside)
    assert usual[0] == pytest.approx(0.7) and predicted[100] == 0
    predicted, _ = disputed(p, given, np.ones(111, bool))
    assert predicted[100] == 1


def test_a_class_without_images_is_never_seen() -> None:
    predicted, usual = disputed(np.array([[0.1, 0.2, 0.7]] * 3), np.array([0, 1, 1]), np.ones(3, bool))
    assert 2 not in predicted and np.isinf(usual[2])


def test_suspects_fail_the_check_only_by_their_share(lawn: Lawn) -> None:
    facts: Facts = read_facts(lawn.fill(5).catalog)
    suspect = quality.noise.Suspect(1, "grass", "dandelion", 0.99, 0.01, trained_on=False)
    learned = replace(suspect, trained_on=True)

    def check(suspects: list[Any]) -> Check:
        noise = Noise(1, 10, 10, {}, suspects, "")
        return {check.name: check for check in judge(facts, noise, lawn.settings)}["label_suspects"]

    assert check([suspect] * 2).passed
    assert check([suspect] * 2 + [learned] * 5).passed  # what it learned it cannot judge
    failed = check([suspect] * 3)
    assert not failed.passed and "3 of 10 images" in failed.sentence


def test_a_champion_that_cannot_be_read_leaves_the_section_out(lawn: Lawn) -> None:
    def broken() -> bundle.Bundle:
        raise Unavailable("the store does not answer.")

    lawn.fill(5)
    page = lawn.html(lawn.look(find_champion=broken))
    assert "the champion cannot be read: the store does not answer." in page
    assert lawn.look().report != lawn.look(find_champion=broken).report
