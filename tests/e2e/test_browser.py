"""A person at the page: real Chromium, the real page, the real API, a model that was trained, judged and released here.

The model learns from few pictures and the gate is opened wide: how good it is does not matter, that every figure on
the page is what the API says does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import reference_catalog
import samples
from processes import Server, answers, free_port, served
from road import floor_variables

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
expect.set_options(timeout=30_000)  # a busy machine takes seconds to draw its first page
CALM = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@dataclass
class World:
    """One installation with a released model, its API and its page."""

    env: dict[str, str]
    api: Server | None
    api_url: str
    page_url: str
    photos: Path
    per_label: int

    def photo(self, label: str, place: int = -1) -> Path:
        return sorted((self.photos / label).glob("*.jpg"))[place]

    def get(self, path: str) -> Any:
        return httpx.get(self.api_url + path, timeout=20).raise_for_status().json()

    def recorded(self, more_than: int = 0) -> list[dict[str, Any]]:
        """The newest predictions, once there are more than so many: they are written a moment after the answer."""
        deadline = time.monotonic() + 20
        while len(found := self.get("/predictions?limit=100")["items"]) <= more_than:
            assert time.monotonic() < deadline, f"{len(found)} predictions are recorded, not more than {more_than}"
            time.sleep(0.1)
        return list(found)

    def lawnwatch(self, *argv: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "lawnwatch", *argv], env=self.env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: str) -> Iterator[World]:
    """API and page; nothing is released yet. With LAWNWATCH_TEST_API_URL and …_PAGE_URL: those, as they are."""
    if "LAWNWATCH_TEST_API_URL" in os.environ:
        api_url, page_url = os.environ["LAWNWATCH_TEST_API_URL"], os.environ["LAWNWATCH_TEST_PAGE_URL"]
        yield World({}, None, api_url, page_url, photos, per_label=0)
        return
    folder = tmp_path_factory.mktemp("browser")
    per_label = 30
    if weights == "none":  # a network that knows nothing needs more pictures, which colour alone tells apart
        per_label = 100
        photos = samples.draw(folder / "photos", per_label)
    ports = free_port(), free_port()
    api_url, page_url = (f"http://127.0.0.1:{port}" for port in ports)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LAWNWATCH_", "MLFLOW_"))} | {
        "LAWNWATCH_HOME": str(folder / "home"),
        "LAWNWATCH_WEIGHTS": weights,
        "LAWNWATCH_API_URL": api_url,
        "LAWNWATCH_SERVING__PORT": str(ports[0]),
        "LAWNWATCH_FETCH__ALLOW_CIDRS": '["127.0.0.0/8"]',
        "LAWNWATCH_TRAIN__FINE_TUNE_EPOCHS": "1" if weights == "none" else "0",
        "LAWNWATCH_GATE__MIN_TEST_IMAGES": "10",
        "LAWNWATCH_GATE__MIN_ACCURACY": "0.05",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **floor_variables(weights),
    }
    api = Server(
        [sys.executable, "-m", "lawnwatch", "serve"], partial(answers, api_url + "/health"), folder / "api.log", env
    )
    page = Server(
        [sys.executable, "-m", "streamlit", "run", str(ROOT / "webapp/app.py"), "--server.port", str(ports[1])],
        partial(answers, page_url + "/_stcore/health"),
        folder / "page.log",
        env,
    )
    world = World(env, api.start(), api_url, page_url, photos, per_label)
    page.start()
    yield world
    page.stop()
    api.stop()


@pytest.fixture(scope="module")
def released(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The road walked: the API serves a real model. (The test without a model comes first in this file.)"""
    if world.api is None:
        return world
    urls = tmp_path_factory.mktemp("catalog") / "urls.csv"
    reference_catalog.write(urls, reference_catalog.records(per_label=world.per_label))
    with served(world.photos) as web:
        world.env["LAWNWATCH_FETCH__ORIGIN_MAP"] = json.dumps({reference_catalog.ORIGIN: web + "/"})
        world.lawnwatch("catalog", "import", str(urls))
        world.lawnwatch("ingest")
        world.lawnwatch("snapshot", "create")
    run = str(world.lawnwatch("train")["run_id"])
    verdict = world.lawnwatch("evaluate", "--run", run)
    assert verdict["decision"] == "promote", verdict["reason"]
    world.lawnwatch("model", "promote", "--run", run)
    world.lawnwatch("release")
    world.lawnwatch("rollout", "start")
    return world


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CALM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh visitor; every uncaught error of the page's own code fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, timezone_id="Europe/Berlin")
    page = context.new_page()
    page.set_default_timeout(30_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors


def upload(page: Page, world: World, file: Path | dict[str, Any]) -> None:
    page.goto(world.page_url)
    page.locator("input[type=file]").set_input_files(file)  # type: ignore[arg-type]


def shares(page: Page) -> dict[str, str]:
    """The bars: class to the percentage beside it."""
    rows = page.locator(".lw-bars .row")
    texts = [rows.nth(place).locator("span").all_inner_texts() for place in range(rows.count())]
    return {text[0]: text[1] for text in texts}


def calm(page: Page) -> None:
    expect(page.get_by_test_id("stException")).to_have_count(0)
    assert "Traceback" not in page.inner_text("body")


def test_before_there_is_a_model_every_page_says_so(world: World, page: Page) -> None:
    page.goto(world.page_url)
    expect(page.get_by_text("There is no model to ask yet.")).to_be_visible()
    upload(page, world, world.photo("grass"))
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    page.goto(world.page_url + "/model")
    expect(page.get_by_text("There is no model to ask yet.")).to_be_visible()
    page.goto(world.page_url + "/history")
    expect(page.get_by_text("No predictions yet.")).to_be_visible()
    calm(page)


def test_an_uploaded_photo_is_answered_beside_its_picture(released: World, page: Page) -> None:
    upload(page, released, released.photo("dandelion"))
    expect(page.get_by_text("Prediction id")).to_be_visible()
    shown = page.get_by_role("img", name=re.compile("The uploaded picture"))
    expect(shown).to_be_visible()
    assert shown.evaluate("image => image.naturalWidth") > 50, "the picture is shown, not its broken frame"
    newest = released.recorded()[0]
    facts = page.locator(".lw-facts").inner_text()
    assert newest["prediction_id"] in facts
    assert f"v{newest['model_version']}" in facts
    said = page.locator(".lw-answer").inner_text()
    assert said == ("Not recognised" if newest["label"] == "unknown" else newest["label"])
    for label, share in newest["probabilities"].items():
        value = float(shares(page)[label].strip("<> %"))
        assert abs(value - 100 * share) <= 0.11, (label, share)
    picture, answer = shown.bounding_box(), page.locator(".lw-answer").bounding_box()
    assert picture and answer and picture["x"] + picture["width"] <= answer["x"], "side by side"
    calm(page)


def test_one_upload_is_one_prediction(released: World, page: Page) -> None:
    before = len(released.get("/predictions?limit=100")["items"])
    upload(page, released, released.photo("grass"))
    expect(page.get_by_text("Prediction id")).to_be_visible()
    page.get_by_role("link", name="Model").click()
    expect(page.get_by_role("heading", name="The model")).to_be_visible()
    page.get_by_role("link", name="Predict").click()
    expect(page.get_by_test_id("stFileUploaderDropzone")).to_be_visible()
    assert len(released.recorded(before)) == before + 1


def test_a_file_that_is_no_picture_gets_the_apis_sentence(released: World, page: Page) -> None:
    upload(page, released, {"name": "page.jpg", "mimeType": "image/jpeg", "buffer": b"<html>no picture</html>"})
    expect(page.get_by_text("not a JPEG, PNG or WebP picture")).to_be_visible()
    expect(page.get_by_text("This file cannot be shown as a picture.")).to_be_visible()
    calm(page)


def test_the_model_page_shows_what_the_api_says(released: World, page: Page) -> None:
    info = released.get("/model/info")
    page.goto(released.page_url + "/model")
    expect(page.get_by_role("heading", name="Confusion matrix")).to_be_visible()
    charts = page.get_by_test_id("stVegaLiteChart")
    expect(charts).to_have_count(2)
    expect(charts.nth(1).locator("canvas, svg").first).to_be_visible()
    expect(page.get_by_text("Golden check")).to_be_visible()
    accuracy = info["evaluation"]["metrics"]["accuracy"]
    shown = f"{100 * accuracy['value']:.1f} % ({100 * accuracy['low']:.1f} – {100 * accuracy['high']:.1f})"
    expect(page.get_by_role("table").first).to_contain_text(shown)  # the part that draws it is loaded after the rest
    text = page.inner_text("body")
    assert f"v{info['model']['version']}" in text
    assert info["model"]["sha256"][:12] in text
    assert info["lineage"]["snapshot"][:12] in text
    assert "passed" in text
    assert ("generated sample pictures" in text) == info["samples"]
    said = page.locator("[aria-label^='Confusion matrix'], [alt^='Confusion matrix']")
    spoken = (said.first.get_attribute("aria-label") or said.first.get_attribute("alt") or "") if said.count() else ""
    for count in info["evaluation"]["confusion"]["matrix"][0]:
        assert str(count) in spoken, "the heat map has a text for those who cannot see it"
    calm(page)


def test_history_shows_thumbnails_filters_and_opens_one(released: World, page: Page) -> None:
    with httpx.Client(base_url=released.api_url, timeout=20) as client:
        for place in range(7):
            for label in ("dandelion", "grass"):
                client.post("/predict", files={"file": released.photo(label, place).read_bytes()}).raise_for_status()
    page.goto(released.page_url + "/history")
    pictures = page.get_by_role("img", name=re.compile("A picture that was answered"))
    expect(pictures).to_have_count(12)
    page.wait_for_function(
        "[...document.querySelectorAll('img[alt^=\"A picture\"]')].every(i => i.complete && i.naturalWidth > 50)"
    )
    page.get_by_role("button", name="Older").click()
    expect(page.get_by_text("page 2")).to_be_visible()
    page.get_by_role("button", name="Newer").click()
    expect(page.get_by_text("page 1")).to_be_visible()
    wanted = released.get("/predictions?limit=1")["items"][0]["label"]
    page.get_by_test_id("stButtonGroup").get_by_text(wanted, exact=True).click()
    expected = min(12, len(released.get(f"/predictions?limit=100&label={wanted}")["items"]))
    expect(page.locator(".lw-card")).to_have_count(expected)
    assert set(page.locator(".lw-card b").all_inner_texts()) == {wanted}
    page.get_by_role("button", name="Details").first.click()
    dialog = page.get_by_role("dialog")
    newest = released.get(f"/predictions?limit=1&label={wanted}")["items"][0]
    expect(dialog.get_by_text(newest["prediction_id"])).to_be_visible()
    calm(page)


def test_a_phone_shows_the_answer_without_scrolling_sideways(released: World, page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    for path in ("", "/model", "/history"):
        page.goto(released.page_url + path)
        expect(page.locator("h1").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path


def test_nothing_is_asked_of_another_host(released: World, page: Page) -> None:
    """No fonts, telemetry or scripts from elsewhere: a page on a private network must be whole."""
    strangers: list[str] = []
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((released.page_url, "data:", "blob:")) else strangers.append(request.url)
        ),
    )
    upload(page, released, released.photo("grass"))
    expect(page.get_by_text("Prediction id")).to_be_visible()
    page.goto(released.page_url + "/model")
    expect(page.get_by_role("heading", name="Confusion matrix")).to_be_visible()
    assert not strangers


def test_47_an_api_that_is_killed_gets_a_sentence_and_its_return_needs_nothing(released: World, page: Page) -> None:
    """Last in this file: it stops the API."""
    page.goto(released.page_url + "/model")
    expect(page.get_by_text("Golden check")).to_be_visible()
    assert released.api is not None
    released.api.stop()
    for path in ("", "/model", "/history"):
        page.goto(released.page_url + path)
        expect(page.get_by_text("cannot be reached")).to_have_count(1)
        calm(page)
    page.goto(released.page_url + "/model")
    expect(page.get_by_text("cannot be reached")).to_be_visible()
    released.api.start()
    expect(page.get_by_text("Golden check")).to_be_visible(timeout=30_000)
