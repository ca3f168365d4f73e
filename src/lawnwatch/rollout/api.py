"""The API as a client finds it: what it says of itself, and how it answers the golden pictures."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lawnwatch import bundle, keys
from lawnwatch.config import Settings
from lawnwatch.errors import InputError


@dataclass(frozen=True)
class Serving:
    """What the API says of itself; `reason` is why it is not known when the API does not answer."""

    info: Mapping[str, Any] | None
    reason: str

    def proves(self, sha256: str) -> bool:
        """The API serves this bundle and recomputed its golden answers."""
        model, golden = (self.info or {}).get("model") or {}, (self.info or {}).get("golden") or {}
        return model.get("sha256") == sha256 and golden.get("ok") is True

    def rejects(self, sha256: str) -> str:
        """Why the API refused this bundle; empty when it did not."""
        rejected = (self.info or {}).get("rejected") or {}
        return str(rejected.get("reason") or "refused") if rejected.get("sha256") == sha256 else ""


def ask_api(api_url: str, path: str) -> Serving:
    """GET a JSON object from the API; a refusal or silence is a reason, not an exception."""
    url = f"{api_url.rstrip('/')}{path}"
    if not url.startswith(("http://", "https://")):
        raise InputError(f"LAWNWATCH_API_URL must begin with http:// or https://; received {api_url!r}.")
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - the scheme was checked
            info = json.loads(answer.read(4_000_000))
    except (OSError, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        return Serving(None, f"the API at {url} does not answer ({cause})")
    if not isinstance(info, dict):
        return Serving(None, f"{url} is not lawnwatch's API")
    return Serving(info, "" if info.get("state", "ready") == "ready" else str(info.get("reason") or ""))


def golden_fault(settings: Settings, release: bundle.Bundle, *, timeout: float) -> str:
    """Ask the golden pictures through `POST /predict`; empty when all answers are this bundle's, else why not.

    Asked again for `timeout` seconds: a load balancer may still know a server that is ending. The API is shown the key
    of the settings, when they have one.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            report = bundle.check_golden(release, lambda picture: _probabilities(settings, release, picture))
            if report.ok:
                return ""
            fault = (
                f"the golden answers through {settings.api_url} differ by {report.max_error:.4f} at {report.worst}, "
                f"{release.manifest.tolerance} is allowed"
            )
        except _NotTheModel as error:
            fault = str(error)
        if time.monotonic() >= deadline:
            return fault
        time.sleep(0.5)


class _NotTheModel(Exception):
    """The API did not answer, or another model did."""


def _probabilities(settings: Settings, release: bundle.Bundle, picture: bytes) -> dict[str, float]:
    media_type = (
        "image/png" if picture.startswith(b"\x89PNG") else "image/webp" if picture[:4] == b"RIFF" else "image/jpeg"
    )
    api_url = settings.api_url.rstrip("/")
    headers = {"Content-Type": media_type}
    if settings.api_key is not None and (key := settings.api_key.get_secret_value().strip()):
        if keys.parsed(key) is None:  # not sent: what cannot stand in a header would be shown in urllib's complaint
            raise _NotTheModel("LAWNWATCH_API_KEY holds no API key; `lawnwatch key create` makes one")
        headers["X-API-Key"] = key
    request = urllib.request.Request(  # noqa: S310 - `ask_api` checked the scheme
        f"{api_url}/predict", data=picture, headers=headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            answer = json.loads(response.read(1_000_000))
        sha256, probabilities = answer["model"]["sha256"], answer["probabilities"]
    except urllib.error.HTTPError as error:
        advice = ": LAWNWATCH_API_KEY must hold a key with the scope `predict`" if error.code in (401, 403) else ""
        raise _NotTheModel(f"the API at {api_url} answers a golden picture with status {error.code}{advice}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _NotTheModel(f"the API at {api_url} does not answer a golden picture ({error})") from error
    if sha256 != release.sha256:
        raise _NotTheModel(f"the API at {api_url} answers with bundle {str(sha256)[:12]}, not {release.sha256[:12]}")
    return {str(label): float(share) for label, share in probabilities.items()}
