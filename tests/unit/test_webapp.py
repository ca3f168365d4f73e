"""The web app against a small HTTP server that speaks the API's contract or breaks it (fault 47)."""

from __future__ import annotations

import base64
import gc
import http.server
import io
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image, ImageChops, ImageOps
from streamlit.components.v2 import manifest_scanner
from streamlit.testing.v1 import AppTest

pytestmark = [pytest.mark.unit, pytest.mark.no_cover]  # nothing of the package runs here

WEBAPP = Path(__file__).resolve().parents[2] / "webapp"
OURS = ("api", "charts", "metrics", "parts", "serve", "settings")
SHA = "3f" * 32
Answer = tuple[int, dict[str, str], bytes]


def jpeg(width: int = 64, height: int = 48, colour: str = "green") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "JPEG")
    return out.getvalue()


def as_json(body: object, status: int = 200, kind: str = "application/json", **headers: str) -> Answer:
    return status, {"content-type": kind, **headers}, json.dumps(body).encode()


def problem(status: int, code: str, detail: str, hint: str = "", **headers: str) -> Answer:
    body = {
        "type": f"about:{code}",
        "title": "x",
        "status": status,
        "detail": detail,
        "code": code,
        "hint": hint,
    }
    return as_json(body, status, "application/problem+json", **headers)


def measured(value: float, width: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": min(1.0, value + width)}


def model_info(**changes: Any) -> dict[str, Any]:
    return {
        "state": "ready",
        "reason": "",
        "model": {"name": "lawnwatch", "version": 3, "sha256": SHA},
        "classes": ["dandelion", "grass"],
        "samples": False,
        "evaluation": {
            "split": "test",
            "images": 80,
            "metrics": {
                "accuracy": measured(0.95),
                "balanced_accuracy": measured(0.949),
                "macro_f1": measured(0.95),
                "log_loss": {"value": 0.1234, "low": 0.05, "high": 0.21},
                "brier": {"value": 0.06, "low": None, "high": None},
                "auc": measured(0.99),
                "ece": {"value": 0.021, "low": 0.0, "high": 0.067, "expected": {"low": 0.004, "high": 0.046}},
            },
            "per_class": {
                "dandelion": {"precision": measured(0.93), "recall": measured(0.975, 0.02), "support": 40},
                "grass": {"precision": measured(0.97, 0.02), "recall": measured(0.925), "support": 40},
            },
            "confusion": {"labels": ["dandelion", "grass"], "matrix": [[39, 1], [3, 37]]},
            "verdict": {"decision": "promote", "reason": "First champion; lower bound 0.88 is above 0.75."},
        },
        "lineage": {
            "snapshot": "ab" * 32,
            "run_id": "0123456789abcdef0123456789abcdef",
            "git_commit": "d5195ff",
            "weights": "imagenet",
            "samples": False,
            "candidate": "linear_probe",
            "created_at": "2026-11-20T10:11:12+00:00",
        },
        "thresholds": {"temperature": 1.31, "unknown": {"method": "knn", "threshold": 0.42}},
        "loaded_at": (datetime.now(UTC) - timedelta(minutes=5)).isoformat(),
        "load_seconds": 0.8,
        "golden": {"ok": True, "max_error": 1.2e-6},
        "target": {"version": 3, "sha256": SHA},
        "rejected": None,
    } | changes


def no_model() -> dict[str, Any]:
    empty = {"model": None, "evaluation": None, "golden": None, "loaded_at": None, "target": None}
    return model_info(
        state="no_model", reason="Nothing has been released to this store.", classes=[], lineage={}, **empty
    )


def prediction(**changes: Any) -> dict[str, Any]:
    return {
        "prediction_id": "01JD0000000000000000000042",
        "label": "dandelion",
        "confidence": 0.982,
        "probabilities": {"dandelion": 0.982, "grass": 0.018},
        "unknown_score": 0.11,
        "model": {"name": "lawnwatch", "version": 3, "sha256": SHA},
        "image": {"format": "JPEG", "width": 64, "height": 48, "bytes": 700},
        "timings_ms": {"decode": 2.1, "infer": 17.9, "total": 21.4},
    } | changes


def records(count: int) -> list[dict[str, Any]]:
    """Newest first: number `count` down to 1, alternating labels."""
    return [
        {
            "prediction_id": f"p{number}",
            "created_at": (datetime.now(UTC) - timedelta(minutes=3 * (count - number) + 2)).isoformat(),
            "label": "dandelion" if number % 2 else "grass",
            "confidence": 0.9,
            "probabilities": {"dandelion": 0.9, "grass": 0.1},
            "model_version": 3,
            "image": {"format": "JPEG", "width": 64, "height": 48, "bytes": 700},
            "image_url": f"/predictions/p{number}/image" if number % 5 else None,
        }
        for number in range(count, 0, -1)
    ]


class Stub:
    """The API's contract on loopback. `answers` replaces the answer of a path; `asked` lists what came in."""

    def __init__(self, history: int = 0) -> None:
        self.records = records(history)
        self.picture = jpeg()
        self.delay = 0.0
        self.closed = False
        self.answers: dict[str, Callable[[], Answer]] = {}
        self.asked: list[tuple[str, str, bytes]] = []
        self.keys: set[str | None] = set()
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def answer_it(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                stub.asked.append((self.command, self.path, body))
                stub.keys.add(self.headers.get("x-api-key"))
                if stub.closed:  # a connection kept from before: cut, as a killed process would
                    self.close_connection = True
                    return
                if stub.delay:
                    time.sleep(stub.delay)
                status, headers, content = stub.answer(self.command, self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer_it  # noqa: N815 - the names that http.server looks for

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.closed = True
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, target: str) -> Answer:
        path = urlsplit(target).path
        if path in self.answers:
            return self.answers[path]()
        if (method, path) == ("POST", "/predict"):
            return as_json(prediction())
        if path == "/model/info":
            return as_json(model_info())
        if path == "/predictions":
            return as_json(self.page(parse_qs(urlsplit(target).query)))
        if path.endswith("/image"):
            return 200, {"content-type": "image/jpeg"}, self.picture
        return problem(404, "not_found", f"There is nothing at {path}.")

    def page(self, query: dict[str, list[str]]) -> dict[str, Any]:
        found = [each for each in self.records if query.get("label", [each["label"]]) == [each["label"]]]
        ids = [each["prediction_id"] for each in found]
        start = ids.index(query["before"][0]) + 1 if "before" in query else 0
        limit = int(query["limit"][0])
        items = found[start : start + limit]
        return {"items": items, "next": items[-1]["prediction_id"] if len(found) > start + limit else None}

    def paths(self, method: str) -> list[str]:
        return [path for sent, path, _ in self.asked if sent == method]


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """What `AppTest` does for each app and what a server does once, or with less in memory.

    It reads the metadata of every installed package, and collects all garbage after each run of a page.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_scanner, "scan_component_manifests", cache(manifest_scanner.scan_component_manifests))
        yield
    gc.unfreeze()


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub(history=30)
    yield stub
    stub.close()


@pytest.fixture(autouse=True)
def webapp(monkeypatch: pytest.MonkeyPatch, stub: Stub) -> Iterator[None]:
    """The app finds its own modules as `streamlit run` would have it, and the stub as its API."""
    import streamlit as st

    monkeypatch.syspath_prepend(str(WEBAPP))
    monkeypatch.setenv("LAWNWATCH_API_URL", stub.url)
    st.cache_data.clear()
    st.cache_resource.clear()
    yield
    st.cache_data.clear()
    st.cache_resource.clear()
    for name in OURS:
        sys.modules.pop(name, None)


def ours(name: str) -> ModuleType:
    """A module of the web app, imported only now that the fixture has made it findable."""
    return import_module(name)


def open_page(name: str) -> AppTest:
    app = AppTest.from_file(str(WEBAPP / "app.py"), default_timeout=20).run()
    if name != "predict":
        app.switch_page(f"pages/{name}.py").run()
    return app


def text(app: AppTest) -> str:
    """All that the page says, HTML and tables included."""
    said = [str(getattr(element.proto, "body", "")) for element in app.get("html")]
    said += [element.value for kind in (app.title, app.subheader, app.markdown, app.caption) for element in kind]
    said += [element.value for kind in (app.error, app.warning, app.info) for element in kind]
    said += [f"{metric.label} {metric.value}" for metric in app.metric]
    said += [table.value.to_string() for table in app.table]
    return "\n".join(said).replace("\\", "")


def assert_calm(app: AppTest) -> None:
    """No traceback, on the page or in a message."""
    assert not app.exception, app.exception
    for hint in ("Traceback", "httpx", "site-packages", "ConnectError", "ValidationError"):
        assert hint not in text(app)


def upload(app: AppTest, picture: bytes, name: str = "photo.jpg", kind: str = "image/jpeg") -> AppTest:
    return app.file_uploader[0].upload(name, picture, kind).run()


PAGES = ["predict", "model", "history"]


# ── the answers ─────────────────────────────────────────────────────────────────────────────────────────────


def test_predict_shows_label_confidence_every_class_and_where_the_answer_comes_from(stub: Stub) -> None:
    app = upload(open_page("predict"), jpeg())
    assert_calm(app)
    said = text(app)
    for wanted in (
        "dandelion",
        "98.2 %",
        "grass",
        "1.8 %",
        "lawnwatch v3",
        "01JD0000000000000000000042",
        "21 ms",
    ):
        assert wanted in said, wanted
    assert len(app.get("image")) == 1


def test_a_picture_is_asked_about_once_however_often_the_page_runs(stub: Stub) -> None:
    app = upload(open_page("predict"), jpeg())
    app.run()
    app.run()
    assert stub.paths("POST") == ["/predict?explain=true"]


def test_the_name_of_the_users_file_is_not_sent(stub: Stub) -> None:
    upload(open_page("predict"), jpeg(), name="my-private-name.jpg")
    (sent,) = [body for method, _, body in stub.asked if method == "POST"]
    assert b"my-private-name" not in sent
    assert jpeg() in sent


def test_what_speaks_for_the_class_is_marked_on_wish_without_asking_again(stub: Stub) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "PNG")
    why = {"class": "dandelion", "png_base64": base64.b64encode(buffer.getvalue()).decode()}
    stub.answers["/predict"] = lambda: as_json(prediction(explanation=why))
    app = upload(open_page("predict"), jpeg())
    plain = app.get("image")[0].proto.SerializeToString()
    (toggle,) = app.toggle
    assert "dandelion" in toggle.label and toggle.value is False
    app = toggle.set_value(True).run()
    assert_calm(app)
    assert app.get("image")[0].proto.SerializeToString() != plain
    assert len(stub.paths("POST")) == 1
    stub.answers["/predict"] = lambda: as_json(prediction(explanation=None))
    assert not upload(open_page("predict"), jpeg(), name="other.jpg").toggle


def test_the_api_key_is_sent_and_never_shown(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWNWATCH_API_KEY", "lw_secret")
    import_module("streamlit").cache_resource.clear()
    app = upload(open_page("predict"), jpeg())
    assert stub.keys == {"lw_secret"} and "lw_secret" not in text(app)


def test_an_unknown_picture_is_explained_and_claims_no_class(stub: Stub) -> None:
    answer = prediction(label="unknown", confidence=0.55, probabilities={"dandelion": 0.55, "grass": 0.45})
    stub.answers["/predict"] = lambda: as_json(answer)
    app = upload(open_page("predict"), jpeg())
    assert_calm(app)
    said = text(app)
    assert "Not recognised" in said
    assert "unlike the pictures the model was trained on" in said
    assert "If it had to choose, it would say **dandelion**" in said
    assert "55.0 % confidence" not in said


def test_labels_are_data_and_never_markup(stub: Stub) -> None:
    wicked = "<img src=x onerror=alert(1)>"
    answer = prediction(label=wicked, probabilities={wicked: 0.9, "grass": 0.1})
    stub.answers["/predict"] = lambda: as_json(answer)
    app = upload(open_page("predict"), jpeg())
    assert_calm(app)
    html = "\n".join(element.proto.body for element in app.get("html"))
    assert "<img" not in html
    assert "&lt;img" in html


def test_a_transparent_picture_is_shown_on_white_and_a_broken_one_not_at_all(stub: Stub) -> None:
    parts = ours("parts")
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(out, "PNG")
    with Image.open(io.BytesIO(parts.upright(out.getvalue()))) as shown:
        assert min(shown.convert("RGB").getpixel((4, 4))) > 250
    for broken in (b"", b"<html>", jpeg()[:300], jpeg()[:600]):
        with pytest.raises(OSError):
            parts.upright(broken)


def test_the_model_page_shows_what_was_measured_with_intervals(stub: Stub) -> None:
    app = open_page("model")
    assert_calm(app)
    said = text(app)
    for wanted in (
        "Serving v3", "5 min ago", "Golden check passed", SHA[:12],
        "95.0 % (90.0 – 100.0)", "0.123 (0.050 – 0.210)", "0.060",
        "0.021 (0.004 – 0.046 if calibrated)", "AUC", "0.990 (0.940 – 1.000)",
        "97.5 % (95.5 – 99.5)", "80 images of the test split", "Verdict: promote", "linear_probe",
        "d5195ff", "0.42",
    ):  # fmt: skip
        assert wanted in said, wanted
    assert "95.0 % (90.0" in said
    assert len(app.get("vega_lite_chart")) == 2


def test_the_confusion_chart_holds_the_counts_with_the_truth_in_rows(stub: Stub) -> None:
    charts, api = ours("charts"), ours("api")
    counts = api.Confusion(labels=["dandelion", "grass"], matrix=[[39, 1], [3, 37]])
    spec = charts.confusion(counts).to_dict()
    (rows,) = spec["datasets"].values()
    assert {(row["truth"], row["answer"]): row["count"] for row in rows} == {
        ("dandelion", "dandelion"): 39, ("dandelion", "grass"): 1,
        ("grass", "dandelion"): 3, ("grass", "grass"): 37,
    }  # fmt: skip
    assert "grass: 3 answered dandelion, 37 answered grass" in charts.confusion_in_words(counts)
    assert charts.confusion(api.Confusion(labels=["a", "b"], matrix=[[1]])) is None


def test_a_model_of_samples_says_so_on_every_page_that_shows_its_answers(stub: Stub) -> None:
    stub.answers["/model/info"] = lambda: as_json(model_info(samples=True))
    for name in PAGES:
        app = open_page(name)
        assert any("generated sample pictures" in each.value for each in app.warning), name
    stub.answers.clear()
    assert not open_page("model").warning


def test_a_refused_bundle_and_a_failed_golden_check_are_said(stub: Stub) -> None:
    rejected = {"sha256": "9c" * 32, "reason": "golden/1.jpg differs by 0.3, allowed 0.001."}
    stub.answers["/model/info"] = lambda: as_json(model_info(rejected=rejected, golden={"ok": False, "max_error": 0.3}))
    app = open_page("model")
    assert_calm(app)
    (error,) = app.error
    assert "9c9c9c9c9c9c" in error.value
    assert "golden/1.jpg differs by 0.3" in error.value.replace("\\", "")
    assert "Golden check failed" in text(app)


def test_a_release_on_its_way_is_said(stub: Stub) -> None:
    stub.answers["/model/info"] = lambda: as_json(model_info(target={"version": 4, "sha256": "77" * 32}))
    assert any("Version 4 is on its way" in each.value for each in open_page("model").info)


def test_history_pages_through_everything_once_and_back(stub: Stub) -> None:
    app = open_page("history")
    assert_calm(app)
    seen = []
    for _ in range(3):
        seen += [each.key for each in app.button if (each.key or "").startswith("details-")]
        older = next(each for each in app.button if each.label == "Older")
        if older.disabled:
            break
        older.click().run()
    assert seen == [f"details-p{number}" for number in range(30, 0, -1)]
    assert next(each for each in app.button if each.label == "Older").disabled
    for _ in range(2):
        next(each for each in app.button if each.label == "Newer").click().run()
    assert next(each for each in app.button if each.label == "Newer").disabled
    assert "details-p30" in [each.key for each in app.button]


def test_history_filters_by_label(stub: Stub) -> None:
    app = open_page("history")
    app.pills(key="label").select("grass").run()
    keys = [each.key for each in app.button if (each.key or "").startswith("details-")]
    assert keys == [f"details-p{number}" for number in range(30, 6, -2)]


def test_history_tells_a_picture_that_was_not_kept_from_one_that_was(stub: Stub) -> None:
    app = open_page("history")
    unkept = [number for number in range(30, 18, -1) if number % 5 == 0]
    assert text(app).count("picture not kept") == len(unkept)
    assert len(app.get("image")) == 12 - len(unkept)


def test_an_empty_history_says_how_to_fill_it(stub: Stub) -> None:
    stub.records = []
    app = open_page("history")
    assert_calm(app)
    assert "No predictions yet." in text(app)


def test_a_prediction_opens_in_full(stub: Stub) -> None:
    app = open_page("history")
    next(each for each in app.button if each.key == "details-p29").click().run()
    assert_calm(app)
    assert "p29" in text(app)


# ── when things go wrong ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PAGES)
def test_an_api_that_is_down_gets_a_sentence(name: str, stub: Stub) -> None:
    stub.close()
    app = open_page(name)
    assert_calm(app)
    (error,) = app.error
    assert f"The API at {stub.url} cannot be reached." in error.value.replace("\\", "")
    assert "make demo" in error.value


def test_an_api_that_goes_down_before_the_upload_gets_a_sentence_and_a_second_try(stub: Stub) -> None:
    app = open_page("predict")
    stub.close()
    upload(app, jpeg())
    assert_calm(app)
    assert len(app.error) == 1
    assert "Try again" in [each.label for each in app.button]


@pytest.mark.parametrize("name", PAGES)
def test_an_api_that_is_slow_gets_a_sentence_in_bounded_time(
    name: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAWNWATCH_WEBAPP_READ_TIMEOUT", "0.2")
    monkeypatch.setenv("LAWNWATCH_WEBAPP_TIMEOUT", "0.2")
    stub.delay = 1.0
    begun = time.monotonic()
    app = open_page(name)
    if name == "predict":
        upload(app, jpeg())
    assert time.monotonic() - begun < 10
    assert_calm(app)
    assert any("did not answer in time" in each.value for each in app.warning)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (problem(415, "unsupported_media", "This is HTML, not a picture.", "Send a JPEG."), "Send a JPEG."),
        (problem(422, "corrupt", "The picture is cut off."), "The picture is cut off."),
        (problem(422, "too_many_pixels", "81000000 pixels are too many."), "81000000 pixels are too many."),
        (problem(503, "overloaded", "32 requests wait.", **{"retry-after": "2"}), "Try again in 2 s."),
        (problem(503, "no_model", "Nothing is verified.", "Run training."), "Nothing is verified."),
        (problem(500, "internal", "A fault of ours."), "A fault of ours."),
        (as_json({"detail": [{"loc": ["body"]}]}, 422), "status 422"),
        ((502, {"content-type": "text/html"}, b"<h1>Bad gateway</h1>"), "status 502"),
        ((200, {"content-type": "text/html"}, b"<h1>Another program</h1>"), "is not the API"),
        (as_json({"label": "dandelion"}), "is not the API"),
    ],
    ids=["html", "cut", "bomb", "busy", "no-model", "fault", "fastapi", "proxy", "stranger", "old-contract"],
)  # fmt: skip
def test_every_refusal_is_said_in_the_apis_own_words(stub: Stub, answer: Answer, said: str) -> None:
    stub.answers["/predict"] = lambda: answer
    app = upload(open_page("predict"), jpeg())
    assert_calm(app)
    assert said in text(app)
    assert "dandelion" not in text(app)


def test_a_second_try_asks_again(stub: Stub) -> None:
    stub.answers["/predict"] = lambda: problem(503, "overloaded", "Busy.")
    app = upload(open_page("predict"), jpeg())
    stub.answers.clear()
    next(each for each in app.button if each.label == "Try again").click().run()
    assert_calm(app)
    assert "98.2 %" in text(app)
    assert stub.paths("POST") == ["/predict?explain=true"] * 2


def test_a_file_that_is_no_picture_is_refused_without_a_broken_image(stub: Stub) -> None:
    stub.answers["/predict"] = lambda: problem(415, "unsupported_media", "This is not a picture.")
    app = upload(open_page("predict"), b"<html>", name="page.jpg")
    assert_calm(app)
    assert not app.get("image")
    assert "cannot be shown as a picture" in text(app)


@pytest.mark.parametrize("name", ["predict", "model"])
def test_no_model_yet_is_said_with_the_reason_and_what_to_do(name: str, stub: Stub) -> None:
    stub.answers["/model/info"] = lambda: as_json(no_model())
    app = open_page(name)
    assert_calm(app)
    (info,) = app.info
    assert "Nothing has been released to this store." in info.value.replace("\\", "")
    assert "training_pipeline" in info.value


@pytest.mark.parametrize("name", PAGES)
def test_a_stranger_at_the_apis_address_gets_a_sentence(name: str, stub: Stub) -> None:
    for path in ("/model/info", "/predictions"):
        stub.answers[path] = lambda: as_json(["no", "contract"])
    app = open_page(name)
    assert_calm(app)
    assert "is not the API this page was made for" in text(app)


def test_a_thumbnail_that_is_gone_does_not_take_the_page_with_it(stub: Stub) -> None:
    stub.answers["/predictions/p29/image"] = lambda: problem(404, "not_found", "It was deleted.")
    stub.answers["/predictions/p28/image"] = lambda: (200, {"content-type": "image/jpeg"}, b"not a picture")
    app = open_page("history")
    assert_calm(app)
    assert "details-p27" in [each.key for each in app.button]


def test_a_page_mark_that_the_api_forgot_does_not_lock_the_history(stub: Stub) -> None:
    app = open_page("history")
    next(each for each in app.button if each.label == "Older").click().run()
    stub.answers["/predictions"] = lambda: problem(404, "not_found", "There is no prediction p19.")
    app.run()
    assert_calm(app)
    stub.answers.clear()
    app.run()
    assert "details-p30" in [each.key for each in app.button]


@pytest.mark.parametrize("status", [401, 429, 503])
def test_a_picture_that_could_not_be_asked_for_is_not_said_to_be_gone(stub: Stub, status: int) -> None:
    stub.records = stub.records[1:5]
    app = open_page("history")
    said = text(app).count("picture not kept")
    for record in stub.records:
        stub.answers[f"/predictions/{record['prediction_id']}/image"] = lambda: problem(status, "x", "Not now.")
    next(each for each in app.button if each.key == "details-p29").click().run()
    assert_calm(app)
    assert text(app).count("picture not kept") == said and "Not now." in text(app)
    sys.modules["streamlit"].cache_data.clear()
    app.run()
    assert_calm(app)
    assert text(app).count("picture not kept") == said and text(app).count("Not now.") == 1


def test_a_busy_api_does_not_turn_the_history_back_to_its_first_page(stub: Stub) -> None:
    app = open_page("history")
    next(each for each in app.button if each.label == "Older").click().run()
    stub.answers["/predictions"] = lambda: problem(503, "busy", "Too many requests.", **{"retry-after": "2"})
    app.run()
    assert "Try again in 2 s." in text(app)
    stub.answers.clear()
    app.run()
    assert "details-p18" in [each.key for each in app.button]


def test_exif_that_is_broken_does_not_break_the_page(stub: Stub) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0"
    exif += struct.pack("<HHI4s", 0x0112, 3, 1, b"\x06\0\0\0")  # turned by a quarter
    exif += struct.pack("<HHI4s", 0x0100, 2, 2, b"x\0\0\0") + b"\0\0\0\0"  # a width that is a word
    out = io.BytesIO()
    Image.new("RGB", (64, 48), "green").save(out, "JPEG", exif=exif)
    app = upload(open_page("predict"), out.getvalue())
    assert_calm(app)
    assert app.get("image"), "the API answers for it, and a person sees it"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_shown_as_a_person_holds_it(orientation: int) -> None:
    picture = Image.new("RGB", (64, 48), "black")
    picture.paste("red", (0, 0, 32, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=95, exif=exif)
    with Image.open(io.BytesIO(ours("parts").upright(out.getvalue()))) as shown:
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(out.getvalue())))
        assert shown.size == wanted.size
        difference = ImageChops.difference(shown, wanted.convert("RGB")).getextrema()
    assert max(high for _, high in difference) < 64


def test_a_picture_is_never_fetched_from_elsewhere(stub: Stub) -> None:
    api = ours("api")
    with api.Api(stub.url) as client:
        for path in ("http://example.com/x.jpg", "//example.com/x.jpg", "file:///etc/passwd"):
            with pytest.raises(api.Garbled):
                client.picture(path)
    assert not stub.asked


def test_a_setting_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWNWATCH_WEBAPP_TIMEOUT", "soon")
    app = open_page("model")
    assert_calm(app)
    assert "LAWNWATCH_WEBAPP_TIMEOUT" in text(app)


@pytest.mark.parametrize(
    ("name", "value"),
    [("LAWNWATCH_API_KEY", "schlüssel-canary"), ("LAWNWATCH_WEBAPP_METRICS_PORT", "canary")],
)
def test_a_setting_that_cannot_be_used_is_named_without_its_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    app = open_page("model")
    assert_calm(app)
    assert f"not usable: {name}" in text(app) and "canary" not in text(app)
    with pytest.raises(SystemExit) as end:
        import_module("serve").main()
    assert name in str(end.value) and "canary" not in str(end.value)


def test_the_newline_at_the_end_of_a_keys_file_is_not_part_of_the_key(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAWNWATCH_API_KEY", "lw_key\n")
    assert_calm(open_page("model"))
    assert stub.keys == {"lw_key"}


# ── the writing of figures ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.982, "98.2 %"), (0.99999, ">99.9 %"), (1.0, "100.0 %"), (0.00001, "<0.1 %"), (0.0, "0.0 %")],
)
def test_a_share_is_never_rounded_into_certainty(share: float, said: str) -> None:
    assert ours("parts").percent(share) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "just now"), (10, "just now"), (60, "1 min ago"), (3540, "59 min ago"), (3600, "1 h ago"),
     (90000, "1 day ago"), (864000, "10 days ago"), (8640000, "2026-08-13")],
)  # fmt: skip
def test_times_are_told_as_a_person_would(seconds: int, said: str) -> None:
    now = datetime(2026, 11, 21, 12, tzinfo=UTC)
    assert ours("parts").ago(now - timedelta(seconds=seconds), now) == said


def test_markdown_shows_data_as_it_is_and_commands_as_commands() -> None:
    assert ours("parts").plain("a_b *c* `make demo X=a_b` [d](e)") == r"a\_b \*c\* `make demo X=a_b` \[d\](e)"


# ── what the page counts ────────────────────────────────────────────────────────────────────────────────────


def counted(name: str, **labels: str) -> float | None:
    value: float | None = ours("metrics").registry.get_sample_value(name, labels)
    return value


def test_an_upload_is_counted_and_timed_once_with_its_outcome(stub: Stub) -> None:
    app = upload(open_page("predict"), jpeg())
    app.run()
    assert counted("lawnwatch_web_uploads_total", outcome="answered") == 1
    assert counted("lawnwatch_web_upload_seconds_count") == 1
    stub.answers["/predict"] = lambda: as_json(prediction(label="unknown"))
    upload(app, jpeg(colour="red"))
    assert counted("lawnwatch_web_uploads_total", outcome="unknown") == 1
    assert counted("lawnwatch_web_uploads_total", outcome="failed") == 0


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (problem(422, "corrupt", "x"), "refused"),
        (problem(503, "no_model", "x"), "no_model"),
        (problem(503, "overloaded", "x"), "server"),
        ((200, {"content-type": "text/html"}, b"<h1>Another program</h1>"), "garbled"),
    ],
    ids=["refused", "no_model", "server", "garbled"],
)
def test_an_error_of_the_api_is_counted_by_a_kind_of_a_closed_set(stub: Stub, answer: Answer, kind: str) -> None:
    stub.answers["/predict"] = lambda: answer
    upload(open_page("predict"), jpeg())
    metrics = ours("metrics")
    assert {each: counted("lawnwatch_web_api_errors_total", kind=each) for each in metrics.KINDS} == {
        each: float(each == kind) for each in metrics.KINDS
    }
    assert counted("lawnwatch_web_uploads_total", outcome="failed") == 1


def test_an_api_that_is_down_or_slow_is_counted(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAWNWATCH_WEBAPP_READ_TIMEOUT", "0.1")
    stub.delay = 0.4
    app = open_page("predict")
    assert counted("lawnwatch_web_api_errors_total", kind="slow") == 1
    stub.close()
    app.run()
    assert counted("lawnwatch_web_api_errors_total", kind="unreachable") == 1


def test_the_web_app_needs_nothing_of_lawnwatch() -> None:
    """Its image installs Streamlit and a few small packages; an import of lawnwatch would break there."""
    for source in WEBAPP.rglob("*.py"):
        # Not with `ast`, which in Python 3.11 fails now and then beside another thread that parses, as Streamlit's do.
        assert not re.search(r"^\s*(import|from)\s+lawnwatch\b", source.read_text(), re.MULTILINE), source
