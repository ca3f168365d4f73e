"""The API beyond one picture: batches, URLs, heat maps, the inference protocol, keys, history, documents."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pytest
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import update
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

import serving_bundle as sb
from api_process import Answer, Api, form, peak_memory, problem, wait_for
from lawnwatch import history, images, key_table, rollout
from lawnwatch.catalog import Catalog
from lawnwatch.config import Settings
from lawnwatch.errors import RolloutFailed

pytestmark = pytest.mark.integration

MOST = 8


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A host of pictures: good, slow, huge, none, and redirects to where nobody may go."""

    class Web(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, where = self.path.partition("?")
            body = sb.picture(sb.YELLOW)
            if path == "/slow.jpg":
                time.sleep(4)
            if path == "/huge.jpg":
                body = b"\xff\xd8\xff" + bytes(3_000_000)
            if path == "/page.html":
                body = b"<html>no picture</html>"
            self.send_response({"/gone.jpg": 404, "/go": 302}.get(path, 200))
            if path == "/go":
                self.send_header("Location", unquote(where))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, graphs: Path) -> Iterator[Api]:
    """An API whose model explains itself, with small limits, that may fetch from the host of `web`."""
    folder = tmp_path_factory.mktemp("api")
    env = {
        "MAX_BATCH_PICTURES": str(MOST),
        "MAX_BATCH_BYTES": "5000000",
        "MAX_UPLOAD_BYTES": "2500000",
        "URL_HOSTS": '["127.0.0.1"]',
        "URL_TIMEOUT": "2",
        "URL_CONCURRENCY": "2",
        "CORS_ORIGINS": '["https://lawn.example"]',
    }
    settings = {f"LAWNWATCH_SERVING__{name}": value for name, value in env.items()}
    api = Api(folder / "home", folder / "log", settings | {"LAWNWATCH_FETCH__ALLOW_CIDRS": '["127.0.0.0/8"]'})
    api.point_at(sb.publish(api.store, graphs, graph="cam"))
    api.start()
    yield api
    assert api.stop() == 0, api.log_text()[-3000:]
    assert "Traceback" not in api.log_text(), api.log_text()[-3000:]


def batch(api: Api, files: list[bytes], *, name: str = "file", filename: str = "x.jpg") -> Answer:
    content_type, body = form([(name, filename, data) for data in files])
    return api.ask("POST", "/predict/batch", body, {"Content-Type": content_type})


# --- many pictures ------------------------------------------------------------------------------------------


def test_each_picture_of_a_batch_has_its_own_answer_or_problem(api: Api) -> None:
    yellow, green = sb.picture(sb.YELLOW), sb.picture(sb.GREEN)
    answer = batch(api, [yellow, b"<html>", green, yellow[:2000], b"", b"\xff\xd8\xff" + bytes(2_600_000)])
    assert answer.status == 200, answer.body
    said = answer.json
    assert [item["index"] for item in said["items"]] == list(range(6))
    assert [item["prediction"] and item["prediction"]["label"] for item in said["items"]] == [
        "dandelion", None, "grass", None, None, None,
    ]  # fmt: skip
    codes = [item["problem"] and item["problem"]["code"] for item in said["items"]]
    assert codes == [None, "unsupported_media", None, "corrupt", "unsupported_media", "too_large"]
    assert (said["answered"], said["failed"], said["model"]["version"]) == (2, 4, 1)
    alone = api.predict(yellow).json
    assert alone["probabilities"] == said["items"][0]["prediction"]["probabilities"]
    made = {item["prediction"]["prediction_id"] for item in said["items"] if item["prediction"]}
    wait_for(lambda: made <= {item["prediction_id"] for item in api.get("/predictions").json.get("items", [])})


def test_a_batch_has_limits(api: Api) -> None:
    one = sb.picture(sb.YELLOW)
    assert batch(api, [one] * MOST).json["answered"] == MOST
    assert str(MOST) in problem(batch(api, [one] * (MOST + 1)), 422, "bad_upload")["detail"]
    problem(batch(api, [b"x"] * 5000), 422, "bad_upload")
    problem(batch(api, [bytes(1_800_000)] * 3), 413, "too_large")
    problem(batch(api, []), 422, "bad_upload")
    assert "'photo'" in problem(batch(api, [one], name="photo"), 422, "bad_upload")["detail"]
    problem(api.ask("POST", "/predict/batch", one, {"Content-Type": "image/jpeg"}), 415, "unsupported_media")
    for name in ("../../../etc/passwd", "ü\u202e\ud83c\udf3c".encode("utf-8", "replace").decode(), "a" * 3000):
        assert batch(api, [one], filename=name).json["answered"] == 1
    content_type, body = form([("file", "a.jpg", one)])
    problem(api.ask("POST", "/predict/batch", body[:-30], {"Content-Type": content_type}), 422, "bad_upload")
    assert api.metric("lawnwatch_places_taken") == 0 and api.metric("lawnwatch_body_held_bytes") == 0


# --- a picture by its URL -----------------------------------------------------------------------------------


def by_url(api: Api, url: Any, query: str = "") -> Answer:
    body = json.dumps({"url": url}).encode()
    return api.ask("POST", f"/predict/url{query}", body, {"Content-Type": "application/json"})


def test_a_picture_is_fetched_from_an_allowed_host(api: Api, web: str) -> None:
    answer = by_url(api, f"{web}/photo.jpg")
    assert answer.status == 200, answer.body
    assert answer.json["label"] == "dandelion" and answer.json["image"]["bytes"] == len(sb.picture(sb.YELLOW))
    assert "fetch;dur=" in answer.headers["server-timing"]
    assert by_url(api, f"{web}/go?{quote(web)}/photo.jpg").status == 200
    assert by_url(api, f"{web}/photo.jpg", "?explain=true").json["explanation"]["class"] == "dandelion"
    problem(by_url(api, f"{web}/gone.jpg"), 502, "fetch_failed")
    problem(by_url(api, f"{web}/slow.jpg"), 502, "fetch_failed")
    problem(by_url(api, f"{web}/huge.jpg"), 413, "too_large")
    problem(by_url(api, f"{web}/page.html"), 415, "unsupported_media")


def test_15_16_17_no_other_url_is_fetched(api: Api, web: str) -> None:
    blocked = [
        "file:///etc/passwd", "gopher://127.0.0.1/x", "data:image/png;base64,AAAA", "http://user:pw@127.0.0.1/",
        "http://example.org/x.jpg", "http://127.0.0.1.example.org/", "http://localhost/", "http://[::1]/",
        "http://169.254.169.254/latest/meta-data", "http://0x7f000001/", "http://2130706433/", "http://①②⑦.0.0.2/",
        "//127.0.0.1/x", "not a url", "http://", "http://127.0.0.1\\@example.org/",
        f"{web}/go?{quote('http://169.254.169.254/')}", f"{web}/go?{quote('http://example.org/')}", f"{web}/go?file:/x",
        f"{web}/go?{quote('http://[/x')}",
    ]  # fmt: skip
    for url in blocked:
        problem(by_url(api, url), 400, "blocked")
    problem(by_url(api, "http://127.0.0.1:1/closed.jpg"), 502, "fetch_failed")


def test_16_an_allowed_name_that_leads_inside_is_not_reached(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__URL_HOSTS='["localhost"]')
    said = problem(by_url(api, "http://localhost/x.jpg"), 400, "blocked")
    assert "127.0.0.1" not in json.dumps(said) and "::1" not in json.dumps(said)


def test_fetching_by_url_is_off_by_default(start: Callable[..., Api]) -> None:
    api = start()
    assert "URL_HOSTS" in problem(by_url(api, "http://example.org/x.jpg"), 403, "not_enabled")["hint"]


def test_the_body_that_names_a_url_is_small_and_json(api: Api, web: str) -> None:
    json_type = {"Content-Type": "application/json"}
    for body in (b"", b"[]", b"{", b'{"url": 5}', b'{"uri": "x"}', b"[" * 9000, b'{"url": ""}', b'{"url": "\xff"}'):
        problem(api.ask("POST", "/predict/url", body, json_type), 422, "bad_upload")
    problem(by_url(api, "http://127.0.0.1/" + "x" * 3000), 422, "bad_upload")
    problem(api.ask("POST", "/predict/url", b'"' + b"x" * 50_000, json_type), 413, "too_large")
    problem(api.ask("POST", "/predict/url", b"{}", {"Content-Type": "text/plain"}), 415, "unsupported_media")


def test_slow_hosts_hold_no_place_from_others(api: Api, web: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(by_url, api, f"{web}/slow.jpg") for _ in range(4)]
        wait_for(lambda: api.metric("lawnwatch_http_requests_in_flight") >= 3)
        assert api.metric("lawnwatch_places_taken") == 0
        assert api.predict(sb.picture(sb.GREEN)).status == 200
        statuses = sorted(one.result().status for one in asked)
    assert statuses == [502, 502, 503, 503]


def url_request(url: str) -> bytes:
    body = json.dumps({"url": url}).encode()
    return b"POST /predict/url HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + (
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def asking(api: Api, url: str, source: str) -> socket.socket:
    """A connection from this address of the loopback network on which a URL was asked for."""
    sock = socket.create_connection(("127.0.0.1", api.port), timeout=30, source_address=(source, 0))
    sock.sendall(url_request(url))
    return sock


def refused(api: Api, reason: str) -> float:
    return api.metric(f'lawnwatch_predict_refused_total{{reason="{reason}"}}')


def test_12_one_client_cannot_keep_all_fetches(api: Api, web: str) -> None:
    before = refused(api, "pushed_out"), refused(api, "queue_full")
    in_flight = api.metric("lawnwatch_http_requests_in_flight")
    flood = [asking(api, f"{web}/slow.jpg", "127.0.0.2") for _ in range(2)]
    wait_for(lambda: api.metric("lawnwatch_http_requests_in_flight") == in_flight + 2)
    assert asking(api, f"{web}/photo.jpg", "127.0.0.2").recv(4096).startswith(b"HTTP/1.1 503")
    assert asking(api, f"{web}/photo.jpg", "127.0.0.3").recv(4096).startswith(b"HTTP/1.1 200")
    answers = sorted(sock.recv(4096)[:12] for sock in flood)
    assert answers == [b"HTTP/1.1 502", b"HTTP/1.1 503"]
    assert (refused(api, "pushed_out"), refused(api, "queue_full")) == (before[0] + 1, before[1] + 1)


def test_13_a_fetch_ends_with_its_client(api: Api, web: str) -> None:
    before = refused(api, "gone")
    with asking(api, f"{web}/slow.jpg", "127.0.0.2"), asking(api, f"{web}/slow.jpg", "127.0.0.2"):
        wait_for(lambda: api.metric("lawnwatch_http_requests_in_flight") >= 3)
    wait_for(lambda: refused(api, "gone") == before + 2, 1)  # the host would let them wait for 2 s
    assert by_url(api, f"{web}/photo.jpg").status == 200


def test_requests_by_url_are_counted_as_others_are(api: Api, web: str, start: Callable[..., Api]) -> None:
    before = refused(api, "media"), refused(api, "too_large")
    api.ask("POST", "/predict/url", b"{}", {"Content-Type": "text/plain"})
    by_url(api, f"{web}/huge.jpg")
    assert (refused(api, "media"), refused(api, "too_large")) == (before[0] + 1, before[1] + 1)
    locked = start(LAWNWATCH_SERVING__REQUIRE_KEYS="true", LAWNWATCH_SERVING__URL_HOSTS='["127.0.0.1"]')
    by_url(locked, f"{web}/photo.jpg")
    locked.get("/predictions/00000000-0000-7000-8000-000000000000")
    locked.get("/predictions/0/1/2/3")
    for method, route in (("POST", "/predict/url"), ("GET", "/predictions/{prediction_id}"), ("GET", "other")):
        name = f'lawnwatch_http_requests_total{{method="{method}",route="{route}",status="401"}}'
        assert locked.metric(name) == 1


# --- why ----------------------------------------------------------------------------------------------------


def test_an_explanation_marks_what_speaks_for_the_class(api: Api, start: Callable[..., Api]) -> None:
    half = np.zeros((200, 400, 3), np.uint8)
    half[:, :200], half[:, 200:] = sb.YELLOW, sb.GREY
    buffer = io.BytesIO()
    Image.fromarray(half).save(buffer, "PNG")
    assert "explanation" not in api.predict(buffer.getvalue()).json
    content_type, body = form([("file", "x.png", buffer.getvalue())])
    answer = api.ask("POST", "/predict?explain=true", body, {"Content-Type": content_type})
    why = answer.json["explanation"]
    assert why["class"] == "dandelion" and "explain;dur=" in answer.headers["server-timing"]
    documented = api.get("/openapi.json").json["components"]["schemas"]["Timings"]["properties"]
    assert set(answer.json["timings_ms"]) == set(documented)
    shown = Image.open(io.BytesIO(base64.b64decode(why["png_base64"])))
    assert shown.format == "PNG" and shown.size == (320, 160)
    changed = np.abs(np.asarray(shown).astype(int) - np.asarray(Image.fromarray(half).resize((320, 160)))).sum(axis=2)
    assert changed[:, :120].mean() > 3 * changed[:, 200:].mean() + 10
    both = form([("file", "x.png", buffer.getvalue()), ("file", "y.png", b"no picture")])
    items = api.ask("POST", "/predict/batch?explain=true", both[1], {"Content-Type": both[0]}).json["items"]
    assert items[0]["prediction"]["explanation"] == why and items[1]["problem"]["code"] == "unsupported_media"
    problem(api.ask("POST", "/predict?explain=perhaps", body, {"Content-Type": content_type}), 422, "bad_request")
    silent = start()  # a graph without a map
    said = silent.ask("POST", "/predict?explain=true", body, {"Content-Type": content_type})
    assert said.status == 200 and said.json["explanation"] is None


# --- the Open Inference Protocol, by Triton's own client ----------------------------------------------------


@pytest.fixture
def client(api: Api) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(api.url.removeprefix("http://")) as client:
        yield client


def encoded(*files: bytes, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("file", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=object), binary_data=binary)
    return tensor


def test_v2_state_and_metadata(api: Api, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("lawnwatch") and client.is_model_ready("lawnwatch", "1")
    assert not client.is_model_ready("lawnwatch", "2") and not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    said = client.get_model_metadata("lawnwatch", "1")
    assert said["versions"] == ["1"] and said["parameters"]["classes"] == sb.CLASSES
    assert said["inputs"][0] == {"name": "image", "datatype": "UINT8", "shape": [-1, 224, 224, 3]}
    assert [one["name"] for one in said["outputs"]] == [
        "label", "confidence", "probabilities", "unknown_score", "embedding",
    ]  # fmt: skip
    with pytest.raises(InferenceServerException, match="No such model"):
        client.get_model_metadata("other")


@pytest.mark.parametrize("binary", [True, False])
def test_v2_pixels_and_pictures_have_the_answers_of_predict(
    api: Api, client: triton.InferenceServerClient, binary: bool
) -> None:
    files = [sb.picture(sb.YELLOW), sb.picture(sb.GREEN)]
    expected = [api.predict(data).json for data in files]
    pixels = triton.InferInput("image", [2, 224, 224, 3], "UINT8")
    decoded = np.stack([images.decode(data, size=224, max_pixels=10**6) for data in files])
    pixels.set_data_from_numpy(decoded, binary_data=binary)
    sent = files if binary else [base64.b64encode(data) for data in files]  # JSON holds text
    pictures = encoded(*sent, binary=binary)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "probabilities", "embedding")]
    for tensor in (pixels, pictures):
        answer = client.infer("lawnwatch", [tensor], outputs=wanted, request_id="mine")
        labels = [one.decode() if isinstance(one, bytes) else one for one in answer.as_numpy("label")]
        assert labels == ["dandelion", "grass"] and answer.get_response()["id"] == "mine"
        shares = [[one["probabilities"][name] for name in sb.CLASSES] for one in expected]
        np.testing.assert_allclose(answer.as_numpy("probabilities"), shares, rtol=1e-6)
        assert answer.as_numpy("embedding").shape == (2, 16)
    plain = client.infer("lawnwatch", [encoded(files[0])], model_version="1")
    assert plain.as_numpy("label").tolist() == [b"dandelion"] and plain.as_numpy("embedding") is None


def test_v2_errors_reach_its_client(api: Api, client: triton.InferenceServerClient) -> None:
    wrong = triton.InferInput("image", [1, 100, 100, 3], "UINT8")
    wrong.set_data_from_numpy(np.zeros((1, 100, 100, 3), np.uint8))
    with pytest.raises(InferenceServerException, match="224"):
        client.infer("lawnwatch", [wrong])
    with pytest.raises(InferenceServerException, match="Picture 1"):
        client.infer("lawnwatch", [encoded(sb.picture(sb.YELLOW), b"<html>")])
    with pytest.raises(InferenceServerException, match="No such model"):
        client.infer("lawnwatch", [encoded(b"x")], model_version="7")
    with pytest.raises(InferenceServerException, match=f"1 to {MOST}"):
        client.infer("lawnwatch", [encoded(*[b"x"] * (MOST + 1))])


def test_v2_malformed_requests_are_said_so(api: Api) -> None:
    good = {"name": "file", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}

    def infer(body: bytes, **headers: str) -> Answer:
        return api.ask("POST", "/v2/models/lawnwatch/infer", body, {"Content-Type": "application/json", **headers})

    documents: list[Any] = [
        [], {}, {"inputs": []}, {"inputs": [good, good]}, {"inputs": [5]}, {"inputs": [good | {"name": "x"}]},
        {"inputs": [good | {"datatype": "FP32"}]}, {"inputs": [good | {"shape": [True]}]},
        {"inputs": [good | {"shape": [0]}]}, {"inputs": [good | {"shape": [10**30]}]},
        {"inputs": [good | {"shape": []}]},
        {"inputs": [good | {"data": ["ü"]}]}, {"inputs": [good | {"data": [5]}]}, {"inputs": [good | {"data": None}]},
        {"inputs": [good], "outputs": [{"name": "logits"}]}, {"inputs": [good], "id": 5},
        {"inputs": [good | {"parameters": {"binary_data_size": 9}}]}, {"inputs": [good | {"parameters": []}]},
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 224, 224, 3], "data": [[1], [2, 3]]}]},
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 224, 224, 3], "data": [0.5] * 150_528}]},
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 224, 224, 3], "data": [300] * 150_528}]},
    ]  # fmt: skip
    for document in documents:
        assert problem(infer(json.dumps(document).encode()), 400, "bad_request")["error"], document
    for body in (b"", b"{", b"\xff", b"[" * 100_000, b"NaN"):
        problem(infer(body), 400, "bad_request")
    for length in ("-1", "x", "99999999999999999999", "٣", "5 5"):
        assert infer(b"{}", **{"Inference-Header-Content-Length": quote(length)}).status == 400
    raw = good | {"data": None, "parameters": {"binary_data_size": 8}}
    head = json.dumps({"inputs": [raw]}).encode()
    for tail in (b"\xff\xff\xff\xff" + b"abcd", b"\x00" * 8, b"\x05\x00\x00\x00" + b"abcd"):
        problem(infer(head + tail, **{"Inference-Header-Content-Length": str(len(head))}), 400, "bad_request")
    problem(infer(head, **{"Content-Type": "image/jpeg"}), 415, "unsupported_media")
    problem(infer(bytes(5_100_000)), 413, "too_large")
    assert problem(api.ask("POST", "/v2/models/other/infer", b"{}", {"Content-Type": ""}), 404, "not_found")["error"]


# --- who may ask --------------------------------------------------------------------------------------------


def test_keys_open_what_their_scope_says(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__REQUIRE_KEYS="true")
    catalog = Catalog(api.settings)
    catalog.migrate()
    asks, sees = key_table.create(catalog, "web", ["predict"]), key_table.create(catalog, "owner", ["admin"])
    data = sb.picture(sb.YELLOW)
    # Made a moment ago and never seen by this server: good at once.
    answer = wait_for(lambda: (found := api.predict(data, **{"X-API-Key": asks.key})).status == 200 and found)
    assert api.predict(data, Authorization=f"Bearer {sees.key}").status == 200
    refused = problem(api.predict(data), 401, "unauthorized")
    assert "lawnwatch key create" in refused["hint"]
    for bad in ("x", asks.key[:-1] + ("A" if asks.key[-1] != "A" else "B"), "lw_" + "0" * 16 + "_" + "A" * 43, "ü"):
        said = api.predict(data, **{"X-API-Key": quote(bad)})
        problem(said, 401, "unauthorized")
        assert said.headers["www-authenticate"].startswith("Bearer")
    for path in ("/predictions", f"/predictions/{answer.json['prediction_id']}/image", "/reports/quality/latest"):
        problem(api.get(path), 401, "unauthorized")
        problem(api.get(path, **{"X-API-Key": asks.key}), 403, "forbidden")
        assert api.get(path, **{"X-API-Key": sees.key}).status in {200, 404}
    for path in ("/health", "/ready", "/metrics", "/model/info", "/v2/health/ready", "/docs", "/openapi.json"):
        assert api.get(path).status == 200, path
    problem(api.get("/v2/models/lawnwatch"), 401, "unauthorized")

    def mine() -> Any:
        return api.get(f"/predictions?client={asks.id}", **{"X-API-Key": sees.key}).json.get("items")

    wait_for(mine)
    assert [item["prediction_id"] for item in mine()] == [answer.json["prediction_id"]] and mine()[0][
        "client"
    ] == asks.id
    key_table.revoke(catalog, asks.id)
    wait_for(lambda: api.predict(data, **{"X-API-Key": asks.key}).status == 401)
    # 48: neither log, metrics nor database hold a secret.
    kept = api.log_text() + api.get("/metrics").body.decode() + repr(key_table.list_keys(catalog))
    stored = b"".join(file.read_bytes() for file in api.home.glob("catalog.db*"))
    for key in (asks.key, sees.key):
        assert key not in kept and key.rpartition("_")[2].encode() not in stored


def test_a_rollout_shows_its_key_for_the_golden_pictures(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__REQUIRE_KEYS="true")
    catalog = Catalog(api.settings)
    catalog.migrate()
    key = key_table.create(catalog, "rollout", ["predict"]).key
    with pytest.raises(RolloutFailed, match=r"status 401: .*LAWNWATCH_API_KEY"):
        rollout.verify(api.settings, api.store, timeout=0)
    settings = Settings(home=api.home, api_url=api.url, api_key=SecretStr(key))
    assert rollout.verify(settings, api.store, timeout=10).model_version == 1
    assert key not in repr(settings)


def test_a_refused_key_costs_no_body(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__REQUIRE_KEYS="true")
    with socket.create_connection(("127.0.0.1", api.port), timeout=5) as sock:
        sock.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 9000\r\n\r\n\xff"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 401")
    assert api.metric("lawnwatch_places_taken") == 0
    assert api.metric('lawnwatch_predict_refused_total{reason="key"}') == 1


def test_28_a_database_that_goes_away_locks_out_no_known_key(
    start: Callable[..., Api], start_mariadb: Callable[[], Any]
) -> None:
    database = start_mariadb()
    url = database.fresh()
    api = start(LAWNWATCH_SERVING__REQUIRE_KEYS="true", LAWNWATCH_DATABASE_URL=url)
    catalog = Catalog(api.settings.model_copy(update={"database_url": type(api.settings.database_url)(url)}))
    catalog.migrate()
    key = key_table.create(catalog, "web", ["predict"]).key
    wait_for(lambda: api.predict(sb.picture(sb.YELLOW), **{"X-API-Key": key}).status == 200)
    database.server.stop()
    stranger = "lw_" + "0" * 16 + "_" + "A" * 43
    end = time.monotonic() + 7  # longer than the ring waits between two readings
    while time.monotonic() < end:
        assert api.predict(sb.picture(sb.YELLOW), **{"X-API-Key": key}).status == 200
        problem(api.predict(sb.picture(sb.YELLOW), **{"X-API-Key": stranger}), 401, "unauthorized")
    second = start(
        bundle=False, home=api.home, LAWNWATCH_SERVING__REQUIRE_KEYS="true", LAWNWATCH_DATABASE_URL=url
    )  # never read a key: it cannot say that one is wrong
    problem(second.predict(sb.picture(sb.YELLOW), **{"X-API-Key": key}), 503, "unavailable")


def test_other_origins_are_let_in_by_name_only(api: Api, start: Callable[..., Api]) -> None:
    asked = {"Origin": "https://lawn.example", "Access-Control-Request-Method": "POST"}
    assert (
        api.ask("OPTIONS", "/predict", headers=asked).headers["access-control-allow-origin"] == "https://lawn.example"
    )
    said = api.get("/model/info", Origin="https://lawn.example").headers
    assert said["access-control-allow-origin"] == "https://lawn.example" and said["x-request-id"]
    assert "access-control-allow-origin" not in api.get("/model/info", Origin="https://evil.example").headers
    closed = start()
    assert "access-control-allow-origin" not in closed.get("/health", Origin="https://lawn.example").headers


# --- history ------------------------------------------------------------------------------------------------


def test_history_is_filtered_and_pages_stay_when_new_ones_come(start: Callable[..., Api]) -> None:
    api = start(LAWNWATCH_SERVING__RECORD_IMAGES="sampled", LAWNWATCH_SERVING__RECORD_SAMPLE="0.5")
    before = datetime.now(UTC)
    made = [api.predict(sb.picture(colour)).json for colour in (sb.YELLOW, sb.GREY, sb.GREEN) * 8]
    after = datetime.now(UTC)
    wait_for(lambda: api.get(f"/predictions/{made[-1]['prediction_id']}").status == 200)

    def ids(query: str) -> list[str]:
        return [item["prediction_id"] for item in api.get(f"/predictions?limit=200&{query}").json["items"]]

    everything = [one["prediction_id"] for one in reversed(made)]
    assert ids("") == everything
    assert ids("max_confidence=0.8") == [one["prediction_id"] for one in reversed(made) if one["confidence"] <= 0.8]
    assert ids("min_confidence=0.8&label=grass") == [
        one["prediction_id"] for one in reversed(made) if one["label"] == "grass"
    ]
    assert ids("version=1") == everything and ids("version=2") == [] and ids("client=" + "0" * 16) == []
    assert ids(f"from={quote(before.isoformat())}&to={quote(after.isoformat())}") == everything
    assert ids(f"to={quote(before.isoformat())}") == [] and ids(f"from={quote(after.isoformat())}") == []
    middle = api.get(f"/predictions/{everything[10]}").json["created_at"]
    assert ids(f"from={quote(middle)}") == everything[:11] and ids(f"to={quote(middle)}") == everything[11:]
    for query in ("min_confidence=2", "version=0", "client=x", "from=yesterday", f"version={2**40}"):
        problem(api.get(f"/predictions?{query}"), 422, "bad_request")
    problem(api.get("/predictions?from=0001-01-01T00:00:00%2B14:00"), 400, "bad_request")
    assert ids("from=0001-01-01T00:00:00") == everything and ids("to=9999-12-31T23:59:59") == everything
    seen, page = [], api.get("/predictions?limit=7").json
    while True:
        seen += [item["prediction_id"] for item in page["items"]]
        api.predict(sb.picture(sb.YELLOW))
        if page["next"] is None:
            break
        page = api.get(f"/predictions?limit=7&before={page['next']}").json
    assert seen == everything
    kept = [api.get(f"/predictions/{one}").json["image_url"] is not None for one in everything]
    assert 2 < sum(kept) < 22, "half of them, by chance: beyond this once in 30,000 runs"


def test_what_is_older_than_the_retention_is_deleted_with_its_picture(start: Callable[..., Api]) -> None:
    api = start()
    old, new = (api.predict(sb.picture(sb.YELLOW)).json["prediction_id"] for _ in range(2))
    wait_for(lambda: api.get(f"/predictions/{new}/image").status == 200)
    catalog = Catalog(api.settings)
    record = history.get_prediction(catalog, old)
    key, long_ago = record.image_key, record.created_at - timedelta(days=31)
    assert key is not None
    with catalog.transaction() as connection:
        table = history.PREDICTIONS
        connection.execute(update(table).where(table.c.id == old).values(created_at=long_ago))
    assert history.prune(catalog, api.store, days=0).records == 0
    done = history.prune(catalog, api.store, days=30)
    assert (done.records, done.pictures) == (1, 1) and api.store.stat(key) is None
    problem(api.get(f"/predictions/{old}"), 404, "not_found")
    assert api.get(f"/predictions/{new}/image").status == 200
    assert history.prune(catalog, api.store, days=30).records == 0


# --- documents ----------------------------------------------------------------------------------------------


def test_an_evaluation_report_is_shown_as_it_is_now(api: Api) -> None:
    run = "0123456789abcdef" * 2
    problem(api.get(f"/reports/evaluation/{run}"), 404, "not_found")
    for page in (b"<p>first", b"<p>judged again"):
        api.store.put(f"reports/evaluation/{run}.html", page)
        shown = api.get(f"/reports/evaluation/{run}")
        assert (shown.status, shown.body) == (200, page)
        assert (
            shown.headers["content-type"] == "text/html; charset=utf-8" and shown.headers["cache-control"] == "no-store"
        )
        assert "script" not in shown.headers["content-security-policy"]
    for bad in ("latest", "A" * 32, "a" * 31, "..%2f..%2fbundles", run + "%0a", "%00"):
        problem(api.get(f"/reports/evaluation/{bad}"), 404, "not_found")


def test_the_documentation_comes_from_here_alone(api: Api) -> None:
    page = api.get("/docs")
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert parts and not any(part.startswith(("http", "//")) for part in parts)
    for part in parts:
        assert part.startswith("data:") or api.get(f"/{part}").status == 200, part
    policy = page.headers["content-security-policy"]
    assert "http" not in policy and "'unsafe-inline'" not in policy.split("style-src")[0]
    problem(api.get("/docs/other.js"), 404, "not_found")


def test_the_documentation_draws_itself_where_no_name_resolves(api: Api, chromium: str) -> None:
    """A real browser that can reach this server only, and holds the page to its content security policy."""
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    argv = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", offline]
    ended = subprocess.run([*argv, "--dump-dom", f"{api.url}/docs"], capture_output=True, text=True, timeout=120)
    assert "/predict/batch" in ended.stdout and "Authorize" in ended.stdout, ended.stdout[-2000:] + ended.stderr[-2000:]


def test_every_error_of_every_address_is_documented(api: Api) -> None:
    document = api.get("/openapi.json").json
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            said = operation["responses"]
            assert operation["summary"] and "500" in said, (path, method)
            for status, response in said.items():
                if int(status) >= 400:
                    assert "application/problem+json" in response["content"] and "`" in response["description"]
            assert ("401" in said) == path.startswith(("/predict", "/reports", "/v2/models")), path


def test_14_clients_cannot_invent_series_at_the_new_addresses(api: Api) -> None:
    def storm(seed: int) -> int:
        for n in range(10):
            api.ask("POST", f"/v2/models/m{seed}{n}/versions/{seed}{n}/infer", b"{}")
            api.get(f"/v2/models/m{seed}{n}")
            api.get(f"/reports/evaluation/{seed}{n}")
            api.get(f"/docs/{seed}{n}")
            api.ask(f"X{seed}{n}", "/predict/batch")
            by_url(api, f"http://h{seed}{n}.example/", f"?explain={seed}{n}")
            api.get(f"/health?a={seed}{n}", **{"X-API-Key": f"k{seed}{n}", "X-Forwarded-For": f"10.0.{seed}.{n}"})
        return len(api.get("/metrics").body.splitlines())

    storm(1)
    api.get("/metrics")
    assert storm(2) == storm(3)


# --- strangers ----------------------------------------------------------------------------------------------


def test_the_api_does_what_its_document_says(api: Api, tmp_path: Path) -> None:
    """Requests made from the OpenAPI document, and against it: no 5xx, and only what the document announces."""
    program = Path(sys.executable).with_name("schemathesis")
    config = Path(__file__).parents[1] / "schemathesis.toml"
    # One worker: two of them trip over each other inside the tool.
    argv = [program, "--config-file", config, "run", f"{api.url}/openapi.json", "--workers=1", "--no-color"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=tmp_path)  # it keeps a cache there
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert f"{len(api.get('/openapi.json').json['paths'])} selected" in ended.stdout


def test_08_two_thousand_mutants_never_break_the_server(api: Api) -> None:
    """Eight byte flips, cuts, repeats and splices of valid pictures, in batches; memory stays where it was."""
    random = np.random.default_rng(8)
    wholes = [
        sb.picture(sb.YELLOW, size=(40, 30), format=format, **options)
        for format, options in (
            ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
        )
    ]  # fmt: skip
    mutants = [mutant(random, wholes) for _ in range(2000)]
    batch(api, mutants[:MOST])
    before = peak_memory(api)
    codes: dict[str, int] = {}
    for at in range(0, 2000, MOST):
        answer = batch(api, mutants[at : at + MOST])
        assert answer.status == 200, answer.body
        for item in answer.json["items"]:
            code = item["problem"]["code"] if item["problem"] else "answered"
            codes[code] = codes.get(code, 0) + 1
    assert set(codes) <= {"answered", "corrupt", "unsupported_media", "too_many_pixels"} and sum(codes.values()) == 2000
    assert min(codes.get("answered", 0), codes.get("corrupt", 0)) > 200, "the mutants must reach the decoders"
    assert api.get("/ready").status == 200 and peak_memory(api) - before < 40_000_000


def mutant(random: np.random.Generator, wholes: list[bytes]) -> bytes:
    data = bytearray(wholes[int(random.integers(len(wholes)))])
    kind = random.integers(5)
    if kind == 0:
        return bytes(data[: int(random.integers(1, len(data)))])
    if kind == 1:
        at, length = int(random.integers(len(data))), int(random.integers(1, 64))
        return bytes(data[:at] + data[at : at + length] * 8 + data[at:])
    if kind == 2:
        other = wholes[int(random.integers(len(wholes)))]
        return bytes(data[: int(random.integers(len(data)))]) + other[int(random.integers(len(other))) :]
    for _ in range(int(random.integers(1, 9))):
        data[int(random.integers(len(data)))] = int(random.integers(256))
    return bytes(data)


def test_the_load_test_passes_and_can_fail(api: Api) -> None:
    """A few seconds of `make load`; the second run must fail: no answer comes within a millisecond."""

    def load(seconds: int, **thresholds: str) -> subprocess.CompletedProcess[str]:
        argv = [Path(sys.executable).with_name("locust"), "-f", "tests/load/locustfile.py", "--headless"]
        argv += ["--only-summary", "--host", api.url, "--users", "4", "--spawn-rate", "9", "--run-time", f"{seconds}s"]
        root = Path(__file__).parents[2]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=root, env=os.environ | thresholds)

    calm = load(4, LOAD_P99_MS="20000", LOAD_MAX_REFUSED="1")
    assert calm.returncode == 0, calm.stderr[-4000:]
    assert load(1, LOAD_P99_MS="1").returncode == 1
