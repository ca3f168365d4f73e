"""The service with the model that was trained from photographs, through real sockets: what it says is what was judged,
by every road in; and a change of the model under load costs no request.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from tritonclient import http as triton

import serving_bundle as sb
from api_process import Api, form, wait_for
from lawnwatch import bundle, registry
from lawnwatch.rollout import TARGET_KEY, ReleaseTarget
from road import Road

pytestmark = pytest.mark.integration


def test_the_trained_model_answers_as_it_was_judged_and_is_replaced_under_load(
    champion: Road, start: Callable[..., Api]
) -> None:
    found = bundle.read(champion.store, str(registry.show(champion.settings, champion.catalog).bundle_sha256))
    api = start(bundle=False, home=champion.settings.home, ready=False)
    api.point_at(found)
    wait_for(lambda: api.get("/ready").status == 200, 30, api.log_text)
    rows = champion.snapshot.split("test")
    photos = [champion.store.get(row.object_key) for row in rows]

    answers = [api.predict(photo).json for photo in photos]
    classes = found.manifest.classes
    likeliest = [max(answer["probabilities"], key=answer["probabilities"].__getitem__) for answer in answers]
    confusion = [
        [
            sum((row.label, said) == (true, guess) for row, said in zip(rows, likeliest, strict=True))
            for guess in classes
        ]
        for true in classes
    ]
    assert confusion == api.get("/model/info").json["evaluation"]["confusion"]["matrix"]

    # The other roads in say the same: a batch, Triton's client, a raw body; and the heat map is one.
    content_type, body = form([("file", "x.jpg", photo) for photo in photos[:6]])
    many = api.ask("POST", "/predict/batch", body, {"Content-Type": content_type}).json
    assert [item["prediction"]["probabilities"] for item in many["items"]] == [
        answer["probabilities"] for answer in answers[:6]
    ]
    tensor = triton.InferInput("file", [6], "BYTES")
    tensor.set_data_from_numpy(np.array(photos[:6], dtype=object))
    with triton.InferenceServerClient(api.url.removeprefix("http://")) as client:
        said = client.infer(found.manifest.model_name, [tensor])
    assert [label.decode() for label in said.as_numpy("label")] == [answer["label"] for answer in answers[:6]]
    explained = api.ask("POST", "/predict?explain=true", photos[0], {"Content-Type": "image/jpeg"}).json
    assert explained["probabilities"] == answers[0]["probabilities"]
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(explained["explanation"]["png_base64"]))))
    assert heat.ndim == 3 and heat.std() > 5

    # Under load: a bundle that lies about its golden answers, then the same model as version 2, which is taken.
    stop, seen = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            answer = api.predict(photos[0])
            seen.append((answer.status, json.loads(answer.body)["model"]["version"] if answer.status == 200 else None))

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client_ in clients:
        client_.start()
    try:
        lying = sb.rewrite_manifest(
            api.store,
            found.sha256,
            lambda manifest: [
                one.update(probabilities={name: 1 - share for name, share in one["probabilities"].items()})
                for one in manifest["golden"]
            ],
        )
        point_at(api, found.manifest.model_version, lying)
        refused = wait_for(lambda: api.get("/model/info").json["rejected"], 20, api.log_text)
        assert refused["sha256"] == lying and "golden" in refused["reason"]
        assert api.metric("lawnwatch_model_rejections_total") == 1 and api.get("/ready").status == 200
        second = sb.rewrite_manifest(api.store, found.sha256, lambda manifest: manifest.update(model_version=2))
        point_at(api, 2, second)
        wait_for(lambda: seen and seen[-1] == (200, 2), 20, api.log_text)
    finally:
        stop.set()
        for client_ in clients:
            client_.join()
    assert set(seen) == {(200, found.manifest.model_version), (200, 2)}
    assert api.metric('lawnwatch_records_dropped_total{reason="queue_full"}') == 0
    assert api.stop() == 0 and "Traceback" not in api.log_text()


def point_at(api: Api, version: int, sha256: str) -> None:
    api.store.put(TARGET_KEY, ReleaseTarget.single(version, sha256).to_bytes())
