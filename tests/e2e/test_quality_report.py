"""The quality report in a real Chromium, over the real API: it draws, fits, loads nothing and runs nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from processes import Server, answers, free_port, served

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module")
def report_url(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Iterator[str]:
    """A report on 50 photos, one of them with an evil URL, one with two labels, one that is gone."""
    folder = tmp_path_factory.mktemp("quality")
    rows = []
    with served(folder) as web:
        for label in ("dandelion", "grass"):
            for number, photo in enumerate(sorted((photos / label).glob("*.jpg"))[:24]):
                shutil.copy(photo, folder / f"{label}{number}.jpg")
                rows.append((f"{web}/{label}{number}.jpg" + (f"?{EVIL}" if number == 0 else ""), label))
        rows += [(f"{web}/grass1.jpg?again", "dandelion"), (f"{web}/gone.jpg?{EVIL}", "grass")]
        with (folder / "urls.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("url", "label"), *rows])
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LAWNWATCH_", "MLFLOW_"))} | {
            "LAWNWATCH_HOME": str(folder / "home"),
            "LAWNWATCH_API_URL": url,
            "LAWNWATCH_SERVING__PORT": str(port),
            "LAWNWATCH_FETCH__ALLOW_CIDRS": '["127.0.0.0/8"]',
        }
        for argv in (["catalog", "import", str(folder / "urls.csv")], ["ingest"], ["data", "quality"]):
            done = subprocess.run(
                [sys.executable, "-m", "lawnwatch", *argv], env=env, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stdout + done.stderr
    api = Server([sys.executable, "-m", "lawnwatch", "serve"], partial(answers, url + "/health"), folder / "log", env)
    api.start()
    said = json.loads(done.stdout)
    assert said["report_url"] == f"{url}/reports/quality/{said['report']}"
    yield said["report_url"]
    api.stop()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_fits_and_stays_by_itself(report_url: str, chromium: str, width: int) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report_url)
        assert page.locator("h1").inner_text() == "The images pass every check"
        pictures = page.locator(".tile img")
        assert pictures.count() > 40
        assert pictures.evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
        assert page.locator(".plots svg path").count() > 30
        assert page.locator("tbody").first.locator("tr").count() == 10
        # Links to strangers show their address as it is and tell nobody where the reader came from.
        evil = page.get_by_role("link", name=EVIL)
        assert evil.count() == 1 and evil.get_attribute("rel") == "noreferrer noopener"
        # Nothing leaves the page sideways, and no text runs out of its box.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """() => [...document.querySelectorAll("main *:not(svg *)")].filter(one => {
                const box = one.getBoundingClientRect();
                return box.width && (box.right > innerWidth + 1 || one.scrollWidth > one.clientWidth + 1
                    && getComputedStyle(one).display !== "inline" && getComputedStyle(one).overflow === "visible");
            }).map(one => one.outerHTML.slice(0, 200))"""
        )
        assert outside == []
        assert [url for url in requests if not url.startswith("data:")] == [report_url]
        assert said == []
        browser.close()
