"""The API as a real process, asked through real sockets. Numbers in names are the rows of the fault catalogue."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from PIL import Image
from pydantic import SecretStr

import serving_bundle as sb
from api_process import LAUNCH, Answer, Api, form, peak_memory, problem, wait_for
from lawnwatch.catalog import Catalog, QualityReport
from lawnwatch.config import Settings
from lawnwatch.database import metadata
from lawnwatch.errors import RolloutFailed
from lawnwatch.rollout import TARGET_KEY, LocalRollout, ReleaseTarget
from lawnwatch.store import ObjectStore, open_store

pytestmark = pytest.mark.integration

# --- answers ------------------------------------------------------------------------------------------------


def test_a_picture_is_answered_recorded_and_shown(api: Api) -> None:
    data = sb.picture(sb.YELLOW)
    answer = api.predict(data, **{"X-Request-ID": "my-request.1"})
    assert answer.status == 200, answer.body
    said = answer.json
    assert said["label"] == "dandelion" and said["confidence"] == said["probabilities"]["dandelion"] > 0.9
    assert sum(said["probabilities"].values()) == pytest.approx(1)
    assert said["image"] == {"format": "JPEG", "width": 275, "height": 183, "bytes": len(data)}
    assert said["model"]["version"] == 1 and set(said["timings_ms"]) == {"decode", "infer", "total"}
    assert answer.headers["x-request-id"] == "my-request.1"
    assert re.search(r"infer;dur=[\d.]+", answer.headers["server-timing"])
    assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers
    assert api.predict(sb.picture(sb.GREEN)).json["label"] == "grass"
    unknown = api.predict(sb.picture(sb.GREY)).json
    assert unknown["label"] == "unknown" and unknown["unknown_score"] > 0.45
    assert set(unknown["probabilities"]) == {"dandelion", "grass"}

    record = wait_for(lambda: (found := api.get(f"/predictions/{said['prediction_id']}")).status == 200 and found).json
    assert record["label"] == "dandelion" and record["model_version"] == 1 and record["brightness"] > 0
    kept = api.get(record["image_url"])
    assert kept.body == data and kept.headers["content-type"] == "image/jpeg"


def test_the_body_may_be_the_picture_itself(api: Api) -> None:
    for kind, format in (("image/png", "PNG"), ("image/webp", "WEBP")):
        data = sb.picture(sb.YELLOW, format=format)
        said = api.ask("POST", "/predict", data, {"Content-Type": kind}).json
        assert said["label"] == "dandelion" and said["image"]["format"] == format


def test_predictions_are_paged_and_filtered(api: Api) -> None:
    made = [api.predict(sb.picture(colour)).json for colour in (sb.YELLOW, sb.GREEN, sb.YELLOW)]
    wait_for(lambda: api.get(f"/predictions/{made[-1]['prediction_id']}").status == 200)
    first = api.get("/predictions?limit=2").json
    assert [item["prediction_id"] for item in first["items"]] == [made[2]["prediction_id"], made[1]["prediction_id"]]
    second = api.get(f"/predictions?limit=1&before={first['next']}").json
    assert second["items"][0]["prediction_id"] == made[0]["prediction_id"]
    labels = {item["label"] for item in api.get("/predictions?label=grass").json["items"]}
    assert labels == {"grass"}
    problem(api.get("/predictions?limit=9999"), 422, "bad_request")
    problem(api.get("/predictions/nonsense"), 400, "bad_request")
    problem(api.get("/predictions/00000000-0000-7000-8000-000000000000"), 404, "not_found")


def keep_report(api: Api, number: str, created_at: datetime) -> str:
    """A quality report as `lawnwatch data quality` keeps it; its object key."""
    key = f"reports/quality/{number}.html"
    with Catalog(api.settings).session() as session:
        session.add(QualityReport(id=number, created_at=created_at, passed=True, checks=[], object_key=key))
    return key


def test_quality_reports_are_shown_and_nothing_in_them_runs(api: Api) -> None:
    Catalog(api.settings).migrate()
    problem(api.get("/reports/quality/latest"), 404, "not_found")
    old, new = "a" * 32, "b" * 32
    for number, day in ((new, 2), (old, 1)):
        api.store.put(keep_report(api, number, datetime(2026, 1, day, tzinfo=UTC)), f"<p>{number}".encode())
    assert api.get(f"/reports/quality/{old}").body == b"<p>" + old.encode()
    shown = api.get("/reports/quality/latest")
    assert (shown.status, shown.body) == (200, b"<p>" + new.encode())
    assert shown.headers["content-type"] == "text/html; charset=utf-8"
    assert shown.headers["x-content-type-options"] == "nosniff"
    policy = shown.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'") and "script" not in policy
    for number in ("c" * 32, "A" * 32, "%25", "a" * 31, "a" * 32 + "%0a", "..%2f..%2fsnapshots"):
        problem(api.get(f"/reports/quality/{number}"), 404, "not_found")
    api.store.delete(f"reports/quality/{old}.html")
    problem(api.get(f"/reports/quality/{old}"), 404, "not_found")
    routes = set(re.findall(r'route="([^"]*report[^"]*)"', api.get("/metrics").body.decode()))
    assert routes == {"/reports/quality/{report}"}


def test_a_quality_report_waits_for_its_store(start: Callable[..., Api]) -> None:
    with socket.socket() as closed:  # bound and never listening: nobody else can take the port
        closed.bind(("127.0.0.1", 0))
        api = start(
            bundle=False,
            LAWNWATCH_STORE_URL="s3://bucket",
            LAWNWATCH_STORE_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}",
            LAWNWATCH_STORE_ACCESS_KEY="key",
            LAWNWATCH_STORE_SECRET_KEY="not-a-known-one",
        )
        Catalog(api.settings).migrate()
        keep_report(api, "a" * 32, datetime(2026, 1, 1, tzinfo=UTC))
        answer = api.get("/reports/quality/latest")
    problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"]


def test_state_routes_and_documents(api: Api) -> None:
    assert api.get("/health").json == {"status": "ok"}
    assert api.get("/ready").json["model"]["version"] == 1
    info = api.get("/model/info").json
    assert info["state"] == "ready" and info["classes"] == sb.CLASSES and info["golden"]["ok"] is True
    assert info["target"]["sha256"] == info["model"]["sha256"] and info["rejected"] is None
    assert info["evaluation"]["metrics"]["accuracy"]["low"] == 0.9
    document = api.get("/openapi.json").json
    assert {"/predict", "/predictions/{prediction_id}/image"} <= set(document["paths"])
    assert "Problem" in document["components"]["schemas"]
    assert "swagger" in api.get("/docs").body.decode()
    problem(api.get("/nothing/here"), 404, "not_found")
    problem(api.get("/health/"), 404, "not_found")  # no redirect, which would name the scheme a proxy took off
    problem(api.ask("DELETE", "/predict"), 405, "method_not_allowed")
    assert api.ask("DELETE", "/health").headers["allow"] == "GET, HEAD"


def test_head_is_get_without_its_body(api: Api) -> None:
    for path in ("/health", "/ready", "/metrics", "/model/info", "/docs", "/v2/health/live"):
        said, whole = api.ask("HEAD", path), api.get(path)
        assert (said.status, said.body) == (200, b"") and whole.body, path
        assert said.headers["content-type"] == whole.headers["content-type"]
    assert api.ask("HEAD", "/predict").status == 405 and api.ask("HEAD", "/nothing").status == 404
    assert api.metric('lawnwatch_http_requests_total{method="HEAD",route="/health",status="200"}') == 1


def test_a_request_id_that_is_not_one_is_replaced(api: Api) -> None:
    for bad in ("a b", "x" * 65, "<script>", "ü"):
        given = api.get("/health", **{"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", given)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_answers_has_no_training_library_in_memory(api: Api) -> None:
    assert api.predict(sb.picture(sb.YELLOW)).status == 200 and api.process is not None
    maps = Path(f"/proc/{api.process.pid}/maps").read_text()
    loaded = set(re.findall(r"/site-packages/(\w+)/", maps))
    assert "ai_edge_litert" in loaded, "the libraries of a process are not found in this way"
    assert not loaded & {"tensorflow", "keras", "h5py", "sklearn", "scipy", "pandas", "matplotlib", "pyarrow"}


def test_the_first_answer_waits_for_no_training_library_and_no_database() -> None:
    code = (
        "import sys, lawnwatch.serving.app, lawnwatch.serving.server;"
        "heavy = 'tensorflow keras mlflow airflow sklearn matplotlib sqlalchemy'.split();"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_records_and_keys_are_written_and_read_without_the_orm(settings: Settings) -> None:
    Catalog(settings).migrate()
    code = (
        "import sys; from lawnwatch import history, key_table; from lawnwatch.config import get_settings;"
        "from lawnwatch.database import Database; here = Database(get_settings()); here.migrate();"
        "history.list_predictions(here); key_table.list_keys(here);"
        "print([m for m in ('sqlalchemy', 'sqlalchemy.orm', 'lawnwatch.catalog', 'alembic') if m in sys.modules])"
    )
    environment = os.environ | {"LAWNWATCH_HOME": str(settings.home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "['sqlalchemy']"


# --- pictures that are none (1 - 8) -------------------------------------------------------------------------

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize(
    "data", [b"<html><body>no</body></html>", SVG, EPS, b"GIF89a" + b"\0" * 60, b"\x00" * 100, b"%PDF-1.7 \xff\xd8\xff"]
)
def test_01_what_is_no_picture_is_refused(api: Api, data: bytes) -> None:
    problem(api.predict(data), 415, "unsupported_media")
    problem(api.ask("POST", "/predict", data, {"Content-Type": "image/jpeg"}), 415, "unsupported_media")


def test_01_an_empty_file_is_refused(api: Api) -> None:
    assert api.predict(b"").status in {415, 422}


def test_01_the_content_type_must_hold_a_picture(api: Api) -> None:
    for kind in ("application/json", "text/plain", "", "application/x-www-form-urlencoded"):
        problem(api.ask("POST", "/predict", b"{}", {"Content-Type": kind}), 415, "unsupported_media")


def test_02_truncated_files_are_refused(api: Api) -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        whole = sb.picture(sb.YELLOW, format=format)
        for tenths in range(1, 10):
            answer = api.predict(whole[: len(whole) * tenths // 10])
            assert answer.status == 422 and answer.json["code"] == "corrupt", (format, tenths, answer.body)


def test_03_04_06_odd_but_valid_pictures_are_answered(api: Api) -> None:
    picture = Image.open(io.BytesIO(sb.picture(sb.YELLOW, format="PNG")))
    frames = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    variants: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture.convert("CMYK"), "JPEG", {}),
        (picture.convert("P"), "PNG", {"transparency": 0}),
        (picture.convert("L").convert("LA"), "PNG", {}),
        (Image.fromarray(np.full((40, 60), 40000, np.uint16)), "PNG", {}),
        (frames[0], "WEBP", {"save_all": True, "append_images": frames[1:]}),
    ]
    for image, format, options in variants:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        answer = api.predict(buffer.getvalue())
        assert answer.status == 200, (image.mode, format, answer.body)


def test_05_orientation_does_not_change_the_answer(api: Api) -> None:
    upright = Image.open(io.BytesIO(sb.picture(sb.YELLOW)))
    answers = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        upright.save(buffer, "JPEG", exif=exif)
        answers.append(api.predict(buffer.getvalue()).json["probabilities"]["dandelion"])
    assert max(answers) - min(answers) < 0.01


def test_07_bombs_are_refused_before_they_are_decoded(api: Api) -> None:
    bomb = io.BytesIO()
    Image.new("L", (9000, 9000)).save(bomb, "PNG", compress_level=9)
    before = peak_memory(api)
    problem(api.predict(bomb.getvalue()), 422, "too_many_pixels")
    segments = b"\xff\xd8" + b"\xff\xef\0\2" * 4_000_000
    assert "more than 1,000 segments" in problem(api.predict(segments), 422, "corrupt")["detail"]
    assert peak_memory(api) - before < 50_000_000
    assert api.predict(sb.picture(sb.YELLOW, size=(1, 1), format="PNG")).status == 200


# --- bodies (9 - 11, 13) ------------------------------------------------------------------------------------


def test_09_a_body_that_says_it_is_huge_is_refused_unread(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=5) as sock:
        sock.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 300000000\r\n\r\n"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")


def test_09_a_body_that_was_announced_and_never_asked_for_leaves_no_connection(api: Api) -> None:
    """Whoever sends it nevertheless would have it taken for the next request, or the next request for it."""
    for line, length, status, closes in (
        ("POST /nowhere", 5, b"404", True),
        ("POST /predict", 300_000_000, b"413", True),
        ("POST /predict", 5, b"100", False),
    ):
        head = f"{line} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {length}\r\n"
        with socket.create_connection(("127.0.0.1", api.port), timeout=5) as sock:
            sock.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
            answer = sock.recv(4096)
            assert answer.startswith(b"HTTP/1.1 " + status)
            if not closes:
                sock.sendall(b"12345")
                answer = sock.recv(4096)
                assert answer.startswith(b"HTTP/1.1 415")
            assert (b"connection: close" in answer) is closes


def test_09_an_address_that_ends_in_a_newline_has_the_same_limits(api: Api) -> None:
    kind, body = form([("file", "x.jpg", sb.picture(sb.YELLOW))])
    for path in ("/predict%0A", "/predict/batch%0A", "/v2/models/lawnwatch/infer%0A"):
        assert api.ask("POST", path, body, {"Content-Type": kind}).status in (200, 415)


def test_09_an_endless_body_is_refused_at_the_limit(api: Api) -> None:
    sent = 0
    piece = b"10000\r\n" + b"\xff" * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as sock:
        sock.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sock.setblocking(False)
        answer = b""
        end, left = time.monotonic() + 15, b""
        while time.monotonic() < end and not answer:
            left = left or piece
            with contextlib.suppress(BlockingIOError):
                count = sock.send(left)
                sent, left = sent + count, left[count:]
            with contextlib.suppress(BlockingIOError):
                answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent < 60_000_000
    assert api.predict(sb.picture(sb.YELLOW)).status == 200


def test_10_slow_senders_do_not_stop_the_others(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__QUEUE="2", LAWNWATCH_SERVING__REQUEST_TIMEOUT="4")
    slow = []
    for _ in range(12):
        sock = socket.create_connection(("127.0.0.1", api.port), timeout=20)
        sock.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\n\xff\xd8"
        )
        slow.append(sock)
        time.sleep(0.3)
    time.sleep(1.2)
    assert api.predict(sb.picture(sb.YELLOW)).status == 200
    answers = [sock.recv(4096) for sock in slow]
    assert all(answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 503")) for answer in answers)
    assert any(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    for sock in slow:
        sock.close()
    wait_for(lambda: api.metric("lawnwatch_places_taken") == 0 and api.metric("lawnwatch_slow_senders") == 0)
    assert api.metric("lawnwatch_body_held_bytes") == 0


def test_what_is_no_request_is_answered_like_one_and_counted(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert (answer.status, json.load(answer)["code"]) == (400, "bad_request")
    usual = api.get("/health").headers
    once = {"content-length", "content-type", "date", "x-request-id"}
    for name in usual.keys() - once:
        assert answer.headers[name] == usual[name], name
    assert api.metric('lawnwatch_http_requests_total{method="other",route="other",status="400"}') == 1


def test_10_a_head_that_never_ends_is_cut(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as sock:
        sock.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        begun = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
        assert time.monotonic() - begun < 15


def test_11_forms_that_are_not_one_file(api: Api) -> None:
    data = sb.picture(sb.YELLOW)
    content_type, body = form([(f"part{n}", "x", b"y") for n in range(100)])
    problem(api.ask("POST", "/predict", body, {"Content-Type": content_type}), 422, "bad_upload")
    content_type, body = form([("file", "a.jpg", data), ("file", "b.jpg", data)])
    problem(api.ask("POST", "/predict", body, {"Content-Type": content_type}), 422, "bad_upload")
    assert "'photo'" in problem(api.predict(data, name="photo"), 422, "bad_upload")["detail"]
    for broken in (b"", b"--x1x--\r\n", b"--x1x\r\nContent-Disp", body[:-20], b"garbage"):
        assert api.ask("POST", "/predict", broken, {"Content-Type": content_type}).status == 422
    padded = body[:-4] + b" " * 10_000_000  # the parser would walk it byte by byte, and nobody else be answered
    answer = api.ask("POST", "/predict", padded, {"Content-Type": content_type})
    assert "goes on" in problem(answer, 422, "bad_upload")["detail"]
    assert api.ask("POST", "/predict", body, {"Content-Type": "multipart/form-data"}).status == 422
    long_header = (
        b'--x1x\r\nContent-Disposition: form-data; name="file"\r\nX-Y: ' + b"a" * 20000 + b"\r\n\r\nz\r\n--x1x--\r\n"
    )
    assert api.ask("POST", "/predict", long_header, {"Content-Type": content_type}).status == 422


@pytest.mark.parametrize("name", ["../../../etc/passwd", "a\x00b.jpg", "n" * 10_000 + ".jpg", "CON", "ü\u202e.jpg"])
def test_11_file_names_are_never_used(api: Api, name: str) -> None:
    answer = api.predict(sb.picture(sb.YELLOW), filename=name)
    assert answer.status in {200, 400, 422}
    if answer.status == 200:
        assert answer.json["label"] == "dandelion"


def test_12_excess_is_refused_at_once_and_the_accepted_are_answered(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__QUEUE="2", LAWNWATCH_SERVING__THREADS="1")
    data = sb.picture(sb.YELLOW, size=(3000, 2000))
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: api.predict(data), range(72)))
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {200, 503}, statuses
    refused = next(answer for answer in answers if answer.status == 503)
    assert problem(refused, 503, "overloaded") and int(refused.headers["retry-after"]) >= 1
    assert api.get("/ready").status == 200
    assert api.predict(sb.picture(sb.YELLOW)).status == 200
    assert api.metric('lawnwatch_predict_refused_total{reason="queue_full"}') == statuses.count(503)


def test_12_a_flood_is_answered_or_refused_and_leaves_nothing_behind(start: Callable[..., Api]) -> None:
    """Eight times as many clients as there are places: as much is answered as without, and the rest is told when."""
    api = start(LAWNWATCH_SERVING__QUEUE="2", LAWNWATCH_SERVING__THREADS="2")
    data = sb.picture(sb.YELLOW, size=(1600, 1200))

    def load(clients: int, seconds: float) -> tuple[float, list[Answer]]:
        """Answers a second, and all that was said, to clients that come back as Retry-After tells, or much sooner."""
        end = time.monotonic() + seconds

        def client(_: int) -> list[Answer]:
            answers = []
            while time.monotonic() < end:
                answers.append(api.predict(data))
                if answers[-1].status == 503:
                    time.sleep(0.1)
            return answers

        with ThreadPoolExecutor(clients) as pool:
            said = [answer for answers in pool.map(client, range(clients)) for answer in answers]
        return sum(answer.status == 200 for answer in said) / seconds, said

    load(2, 1)  # warm
    calm, said = load(3, 3)
    assert {answer.status for answer in said} == {200}
    flooded, said = load(32, 3)
    assert {answer.status for answer in said} == {200, 503}, "none may fail or time out"
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in said if answer.status == 503)
    assert flooded >= 0.5 * calm, f"{flooded:.0f} of {calm:.0f} a second"
    assert api.predict(data).status == 200  # 32 threads ended: the flood is over for less than a second
    wait_for(lambda: api.metric("lawnwatch_places_taken") == 0, 5)
    assert api.metric("lawnwatch_body_held_bytes") == 0


def test_13_a_client_that_leaves_frees_its_place(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__THREADS="1", LAWNWATCH_SERVING__QUEUE="60", LAWNWATCH_SERVING__MAX_WAIT="60")
    large = io.BytesIO()
    Image.new("RGB", (8000, 6000), sb.GREEN).save(large, "PNG", compress_level=1)  # half a second's work
    content_type, body = form([("file", "x", sb.picture(sb.YELLOW))])
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    with ThreadPoolExecutor(6) as pool:
        stay = [pool.submit(api.predict, large.getvalue()) for _ in range(6)]
        wait_for(lambda: api.metric("lawnwatch_predict_queue") >= 4)
        left = []
        for _ in range(20):
            sock = socket.create_connection(("127.0.0.1", api.port), timeout=20)
            sock.sendall(head.encode() + body)
            left.append(sock)
        wait_for(lambda: api.metric("lawnwatch_predict_queue") > 20)
        for sock in left:
            sock.close()
        assert {one.result().status for one in stay} == {200}
    answers = [
        line for line in api.get("/metrics").body.decode().splitlines() if "lawnwatch_predictions_total{" in line
    ]
    assert sum(float(line.split()[-1]) for line in answers) == 6, "nothing that nobody waits for may be done"
    assert api.metric('lawnwatch_predict_refused_total{reason="gone"}') == 20
    assert api.metric("lawnwatch_places_taken") == api.metric("lawnwatch_predict_queue") == 0
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as sock:
        sock.sendall(head.encode() + body[:100])
    wait_for(lambda: api.metric("lawnwatch_places_taken") == 0, 2)


def test_14_clients_cannot_invent_series(api: Api) -> None:
    def storm(seed: int) -> int:
        for n in range(30):
            api.ask(f"M{seed}{n}", f"/p{seed}/{n}", headers={f"X-{seed}-{n}": "y"})
            api.get(f"/predictions/x{seed}{n}?label=l{seed}{n}")
            api.predict(b"nothing", name=f"f{seed}{n}")
            api.ask(f"Q{seed}{n}", "/predict")
        return len(api.get("/metrics").body.splitlines())

    storm(1)
    api.get("/metrics")
    assert storm(2) == storm(3)


# --- the model (31, 36 - 38) --------------------------------------------------------------------------------


def test_without_a_model_nothing_is_answered(start: Callable[..., Api], graphs: Path) -> None:
    api = start(bundle=False)
    assert api.get("/health").status == 200
    assert "no model was ever rolled out" in problem(api.predict(sb.picture(sb.YELLOW)), 503, "no_model")["detail"]
    problem(api.get("/ready"), 503, "no_model")
    info = api.get("/model/info").json
    assert info["state"] == "no_model" and info["reason"] and info["model"] is None
    api.point_at(sb.publish(api.store, graphs))
    wait_for(lambda: api.get("/ready").status == 200)
    assert api.predict(sb.picture(sb.YELLOW)).json["label"] == "dandelion"


def test_31_the_cached_model_serves_when_the_store_is_down(start: Callable[..., Api], tmp_path: Path) -> None:
    first = start()
    sha256 = first.get("/model/info").json["model"]["sha256"]
    assert first.stop() == 0
    nowhere = {
        "LAWNWATCH_STORE_URL": "s3://bucket",
        "LAWNWATCH_STORE_ENDPOINT": "http://127.0.0.1:9",
        "LAWNWATCH_STORE_ACCESS_KEY": "someone",
        "LAWNWATCH_STORE_SECRET_KEY": "a-secret-of-our-own",
    }
    second = start(bundle=False, home=first.home, **nowhere)
    assert second.predict(sb.picture(sb.YELLOW)).json["model"]["sha256"] == sha256
    assert second.get("/model/info").json["reason"]
    assert second.metric("lawnwatch_store_up") == 0
    empty = start(bundle=False, home=None, ready=False, LAWNWATCH_HOME=str(tmp_path / "empty"), **nowhere)
    reason = wait_for(lambda: "store" in empty.get("/model/info").json["reason"] and empty.predict(b"x"), 60)
    assert "store" in problem(reason, 503, "no_model")["detail"]
    assert "a-secret-of-our-own" not in empty.log_text() + second.log_text()


def test_31_a_store_that_goes_away_changes_nothing(
    start: Callable[..., Api], start_minio: Callable[[], Any], graphs: Path, tmp_path: Path
) -> None:
    minio = start_minio()
    where = minio.settings("lawn")
    store = open_store(Settings(home=tmp_path / "home", **where))
    made = sb.publish(store, graphs)
    store.put(TARGET_KEY, ReleaseTarget.single(1, made.sha256).to_bytes())
    api = start(
        bundle=False, home=tmp_path / "home", **{f"LAWNWATCH_{name.upper()}": value for name, value in where.items()}
    )
    up = partial(api.metric, "lawnwatch_store_up")
    assert up() == 1
    minio.server.stop(signal.SIGKILL)
    for _ in range(2):  # before anybody noticed, and after
        answer = api.predict(sb.picture(sb.YELLOW))
        assert answer.status == 200 and answer.json["model"]["sha256"] == made.sha256
        wait_for(lambda: up() == 0, 60)
    assert api.get("/ready").status == 200
    assert "does not answer" in api.get("/model/info").json["reason"]
    minio.server.start()
    wait_for(lambda: up() == 1, 60)
    assert api.get("/model/info").json["reason"] == ""


def test_35_a_model_that_cannot_be_cached_serves_all_the_same(start: Callable[..., Api], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "cache").touch()  # a file where the folder should be: nothing can be written there, not even by root
    api = start(home=home)
    assert api.predict(sb.picture(sb.YELLOW)).json["label"] == "dandelion"
    info = api.get("/model/info").json
    assert (info["state"], info["reason"]) == ("ready", "") and api.metric("lawnwatch_store_up") == 1
    assert "cannot be kept on disk" in api.log_text()


def flip(store: ObjectStore, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 0xFF
    store.put(key, bytes(data))


def damage(kind: str, api: Api, graphs: Path) -> tuple[int, str]:
    """Publish version 2 broken in one way; returns version and sha256."""
    store = api.store
    if kind in {"nan", "constant", "swapped", "floats", "renamed", "three"}:
        bundle = sb.publish(store, graphs, version=2, graph=kind)
        return 2, bundle.sha256
    if kind == "detector":  # made for embeddings of another length than the graph's
        return 2, sb.publish(store, graphs, version=2, bank_length=9).sha256
    if kind == "preprocessing":
        return 2, sb.publish(store, graphs, version=2, preprocessing={"size": 299}).sha256
    bundle = sb.publish(store, graphs, version=2, note=kind)
    folder = f"bundles/{bundle.sha256}"
    if kind == "flipped byte":
        flip(store, f"{folder}/model.tflite")
    elif kind == "truncated":
        store.put(f"{folder}/model.tflite", store.get(f"{folder}/model.tflite")[:500])
    elif kind == "missing file":
        store.delete(f"{folder}/golden/1.jpg")
    elif kind == "missing":
        return 2, "a" * 64
    elif kind == "edited manifest":
        store.put(f"{folder}/manifest.json", store.get(f"{folder}/manifest.json").replace(b"grass", b"moss!"))
    elif kind == "class order":
        edit = lambda document: document["classes"].reverse()  # noqa: E731
        return 2, sb.rewrite_manifest(store, bundle.sha256, edit)
    elif kind.startswith("other "):
        part, name, change = OTHER_SPECS[kind.removeprefix("other ")]
        return 2, sb.rewrite_manifest(store, bundle.sha256, lambda document: document[part][name].update(change))
    elif kind == "wrong version":
        return 3, bundle.sha256
    return 2, bundle.sha256


# What a manifest says of the graph's tensors, though the graph is another one.
OTHER_SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "size": ("inputs", "image", {"shape": [1, 299, 299, 3]}),
    "channels": ("inputs", "image", {"shape": [1, 224, 224, 1]}),
    "dtype": ("inputs", "image", {"dtype": "float32"}),
    "embedding": ("outputs", "embedding", {"shape": [1, 1280]}),
    "arithmetic": ("outputs", "logits", {"dtype": "int8"}),
}
BROKEN = [
    "flipped byte", "truncated", "missing file", "missing", "edited manifest", "class order", "wrong version",
    "preprocessing", "nan", "constant", "swapped", "floats", "renamed", "three", "detector",
    *(f"other {what}" for what in OTHER_SPECS),
]  # fmt: skip


def test_36_37_38_no_broken_bundle_ever_serves(start: Callable[..., Api], graphs: Path) -> None:
    """Each is refused with a reason while the old one serves, and none is ready from the start."""
    api = start()
    good = api.get("/model/info").json["model"]
    for count, kind in enumerate(BROKEN, start=1):
        version, sha256 = damage(kind, api, graphs)
        api.store.put(TARGET_KEY, ReleaseTarget.single(version, sha256).to_bytes())
        rejected = wait_for(
            lambda sha256=sha256: (
                (found := api.get("/model/info").json["rejected"]) and found["sha256"] == sha256 and found
            ),
            10,
            lambda kind=kind: f"{kind} was not rejected",
        )
        assert rejected["reason"], kind
        answer = api.predict(sb.picture(sb.YELLOW)).json
        assert answer["model"] == good and answer["label"] == "dandelion", kind
        assert api.get("/ready").status == 200
        assert api.metric("lawnwatch_model_rejected") == 1
        assert api.metric("lawnwatch_model_rejections_total") == count, kind
    better = sb.publish(api.store, graphs, version=4, graph="sharper", golden_from="sharper")
    api.point_at(better)
    wait_for(lambda: api.get("/model/info").json["model"]["version"] == 4)
    assert api.get("/model/info").json["rejected"] is None and api.metric("lawnwatch_model_rejected") == 0


def test_38_a_picture_that_the_model_has_no_number_for_is_the_servers_fault(start: Callable[..., Api]) -> None:
    api = start(graph="brittle")
    image = io.BytesIO()
    Image.new("RGB", (300, 200), (255, 255, 255)).save(image, "PNG")
    kind, body = form([("file", "a.png", image.getvalue()), ("file", "b.jpg", sb.picture(sb.YELLOW))])
    for path in ("/predict", "/predict?explain=true"):
        said = problem(api.ask("POST", path, image.getvalue(), {"Content-Type": "image/png"}), 500, "internal")
        assert said["detail"] == "The model has no answer for this picture."
    items = api.ask("POST", "/predict/batch", body, {"Content-Type": kind}).json["items"]
    assert (items[0]["problem"]["status"], items[0]["problem"]["code"]) == (500, "internal")
    assert items[1]["prediction"]["label"] == "dandelion"
    assert api.metric("lawnwatch_predict_failures_total") == 3
    assert "not finite" in api.log_text()


def test_36_a_broken_bundle_is_never_ready(start: Callable[..., Api], graphs: Path) -> None:
    api = start(bundle=False)
    version, sha256 = damage("flipped byte", api, graphs)
    api.store.put(TARGET_KEY, ReleaseTarget.single(version, sha256).to_bytes())
    wait_for(lambda: api.get("/model/info").json["rejected"])
    problem(api.get("/ready"), 503, "no_model")
    problem(api.predict(sb.picture(sb.YELLOW)), 503, "no_model")
    assert api.get("/health").status == 200


def test_a_cached_copy_that_was_altered_is_fetched_again(start: Callable[..., Api]) -> None:
    first = start()
    sha256 = first.get("/model/info").json["model"]["sha256"]
    assert first.stop() == 0
    copies = list((first.home / "cache").rglob("model.tflite"))
    assert copies
    for copy in copies:
        copy.write_bytes(b"altered")
    second = start(bundle=False, home=first.home)
    assert second.get("/model/info").json["model"]["sha256"] == sha256


# --- rollout through the running API ------------------------------------------------------------------------


def test_a_rollout_is_confirmed_and_undone_without_a_failed_request(start: Callable[..., Api], graphs: Path) -> None:
    api = start(bundle=False)
    settings, store = api.settings, api.store
    catalog = Catalog(settings)
    catalog.migrate()
    rollout = LocalRollout(settings, catalog, store)
    v1 = sb.publish(store, graphs, version=1)
    v2 = sb.publish(store, graphs, version=2, graph="sharper", golden_from="sharper")
    assert rollout.start(ReleaseTarget.single(1, v1.sha256), timeout=20).state == "complete"

    stop, statuses, versions = threading.Event(), [], []

    def load() -> None:
        while not stop.is_set():
            answer = api.predict(sb.picture(sb.YELLOW))
            statuses.append(answer.status)
            versions.append(answer.json["model"]["version"])

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        assert rollout.start(ReleaseTarget.single(2, v2.sha256), timeout=20).state == "complete"
        broken = sb.publish(store, graphs, version=3, graph="swapped")
        with pytest.raises(RolloutFailed, match="refused"):
            rollout.start(ReleaseTarget.single(3, broken.sha256), timeout=20)
        assert api.get("/model/info").json["model"]["version"] == 2
        undone = rollout.undo(timeout=20)
        assert undone.model_version == 1
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert set(statuses) == {200} and len(statuses) > 10
    assert set(versions) == {1, 2}
    assert rollout.status().serving["version"] == 1
    assert [(one.model_version, one.state) for one in rollout.history()] == [
        (1, "complete"), (3, "failed"), (2, "undone"), (1, "complete"),
    ]  # fmt: skip


# --- the end (44) -------------------------------------------------------------------------------------------


def test_44_sigterm_drains_flushes_and_exits_with_zero(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__DRAIN_SECONDS="3", LAWNWATCH_SERVING__THREADS="1")
    data = sb.picture(sb.YELLOW, size=(5000, 4000), progressive=True)  # an eighth of a second each
    with ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(api.predict, data) for _ in range(8)]
        wait_for(lambda: api.metric("lawnwatch_predict_queue") >= 3)
        assert api.process is not None
        api.process.send_signal(signal.SIGTERM)
        problem(wait_for(lambda: (found := api.get("/ready")).status == 503 and found, 2), 503, "draining")
        assert api.get("/health").status == 200
        # A client whose balancer does not know yet, on a connection that it means to keep.
        kind, body = form([("file", "x", data)])
        late = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
        late.request("POST", "/predict", body, {"Content-Type": kind})
        answer = late.getresponse()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        late.close()
        answers = [one.result() for one in waiting]
    assert [answer.status for answer in answers] == [200] * 8
    assert api.process.wait(20) == 0
    assert "Traceback" not in api.log_text()
    again = start(bundle=False, home=api.home)
    recorded = {item["prediction_id"] for item in again.get("/predictions").json["items"]}
    assert {answer.json["prediction_id"] for answer in answers} <= recorded


def test_a_taken_port_is_said_in_a_sentence(api: Api, tmp_path: Path) -> None:
    env = os.environ | {"LAWNWATCH_HOME": str(tmp_path), "LAWNWATCH_SERVING__PORT": str(api.port)}
    ended = subprocess.run([sys.executable, "-c", LAUNCH], env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and "the port is taken" in ended.stderr


def test_a_database_that_is_down_does_not_stop_answers(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_DATABASE_URL="mysql+pymysql://someone:of-our-own@127.0.0.1:9/nothing")
    assert api.predict(sb.picture(sb.YELLOW)).status == 200
    assert api.get("/ready").status == 200
    problem(api.get("/predictions"), 503, "unavailable")
    assert "of-our-own" not in api.log_text()
    begun = time.monotonic()
    assert api.stop() == 0
    assert time.monotonic() - begun < 20


def test_pictures_are_kept_by_policy(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__RECORD_IMAGES="uncertain")
    sure = api.predict(sb.picture(sb.YELLOW)).json["prediction_id"]
    unsure = api.predict(sb.picture(sb.GREY)).json["prediction_id"]
    wait_for(lambda: api.get(f"/predictions/{unsure}").status == 200)
    assert api.get(f"/predictions/{sure}").json["image_url"] is None
    problem(api.get(f"/predictions/{sure}/image"), 404, "not_found")
    assert api.get(f"/predictions/{unsure}/image").status == 200
    shutil.rmtree(api.home / "store" / "predictions")
    problem(api.get(f"/predictions/{unsure}/image"), 404, "not_found")


def test_records_and_rollouts_on_a_real_mariadb(start: Callable[..., Api], graphs: Path, mariadb: str) -> None:
    api = start(bundle=False, LAWNWATCH_DATABASE_URL=mariadb)
    settings = api.settings.model_copy(update={"database_url": SecretStr(mariadb)})
    catalog = Catalog(settings)
    catalog.migrate()
    rollout = LocalRollout(settings, catalog, api.store)
    first = sb.publish(api.store, graphs, version=1)
    second = sb.publish(api.store, graphs, version=2, graph="sharper", golden_from="sharper")
    for bundle in (first, second):
        target = ReleaseTarget.single(bundle.manifest.model_version, bundle.sha256)
        assert rollout.start(target, timeout=20).state == "complete"
    assert rollout.undo(timeout=20).model_version == 1
    made = [api.predict(sb.picture(sb.YELLOW)).json["prediction_id"] for _ in range(3)]
    wait_for(lambda: api.get(f"/predictions/{made[-1]}").status == 200)
    page = api.get("/predictions?limit=2").json
    assert [item["prediction_id"] for item in page["items"]] == made[:0:-1]
    assert api.get(f"/predictions?before={page['next']}").json["items"][0]["prediction_id"] == made[0]
    assert api.get(page["items"][0]["image_url"]).body == sb.picture(sb.YELLOW)
    with catalog.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": False}), metadata)
    ours = [change for change in differences if "predictions" in str(change) or "rollouts" in str(change)]
    assert ours == [], "the migrations must make what the models say"
