"""The API as the web app sees it: five calls, typed answers, and errors whose texts a person can read.

Every figure on the pages comes through this module and so from the API over HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError


class ApiError(Exception):
    """The API did not give the answer; for a person, `message` says what happened and `hint` what to do.

    `code` is the API's own (`corrupt`, `no_model`, …) or one of `unreachable`, `slow`, `garbled`.
    """

    def __init__(self, message: str, *, hint: str = "", code: str, status: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        self.status = status


class Unreachable(ApiError):
    """Nothing answers at the API's address."""


class TooSlow(ApiError):
    """The API took the request and did not answer in time."""


class Refused(ApiError):
    """The API answered with an error: a 4xx, or a 5xx such as "no model yet"."""


class Garbled(ApiError):
    """Something answered, and it is not what the API's contract says: another program, or another version."""


class _Answer(BaseModel):
    # A newer API may say more than this page knows; it must not break the page.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ModelName(_Answer):
    """Which model: its registered name, version and bundle hash."""

    name: str
    version: int
    sha256: str


class ImageFacts(_Answer):
    """What the API found in the uploaded bytes."""

    format: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0


class Explanation(_Answer):
    """What in the picture speaks for a class: the picture with it marked, a PNG in base64."""

    of: str = Field(alias="class")
    png_base64: Base64Bytes


class Prediction(_Answer):
    """The answer of `POST /predict`; `label` is `unknown` for a picture unlike all the model has seen."""

    prediction_id: str
    label: str
    confidence: float
    probabilities: dict[str, float]
    unknown_score: float | None = None
    model: ModelName
    image: ImageFacts = ImageFacts()
    timings_ms: dict[str, float] = {}
    explanation: Explanation | None = None


class Range(_Answer):
    """Where a figure would lie in 95 % of cases."""

    low: float
    high: float


class Interval(_Answer):
    """A measured value and its 95 % interval; no bounds when none could be computed.

    `expected`: where the value would lie if all were as it should be; a calibration error has one.
    """

    value: float
    low: float | None = None
    high: float | None = None
    expected: Range | None = None


class ClassFigures(_Answer):
    """Precision and recall of one class on the test split; `support` is its number of test images."""

    precision: Interval | None = None
    recall: Interval | None = None
    support: int = 0


class Confusion(_Answer):
    """Counts of test images; rows are the true labels, columns the model's answers."""

    labels: list[str] = []
    matrix: list[list[int]] = []


class Verdict(_Answer):
    """Why this version may serve."""

    decision: str = ""
    reason: str = ""


class Evaluation(_Answer):
    """What was measured before the release, on the frozen test split."""

    split: str = "test"
    images: int = 0
    metrics: dict[str, Interval] = {}
    per_class: dict[str, ClassFigures] = {}
    confusion: Confusion = Confusion()
    verdict: Verdict = Verdict()


class Golden(_Answer):
    """Whether this machine gives the answers that were recorded when the bundle was made."""

    ok: bool
    max_error: float | None = None


class Target(_Answer):
    """What the release target asks the API to serve."""

    version: int
    sha256: str


class Rejected(_Answer):
    """A bundle that the API refused to serve, and why."""

    sha256: str
    reason: str


class ModelInfo(_Answer):
    """The answer of `GET /model/info`."""

    state: str
    reason: str | None = None
    model: ModelName | None = None
    classes: list[str] = []
    samples: bool = False
    evaluation: Evaluation | None = None
    lineage: dict[str, Any] = {}
    thresholds: dict[str, Any] | None = None
    loaded_at: datetime | None = None
    load_seconds: float | None = None
    golden: Golden | None = None
    target: Target | None = None
    rejected: Rejected | None = None


class Record(_Answer):
    """One answered prediction; `image_url` is a path below the API, None when the picture was not kept."""

    prediction_id: str
    created_at: datetime
    label: str
    confidence: float
    probabilities: dict[str, float] = {}
    model_version: int | None = None
    image: ImageFacts | None = None
    image_url: str | None = None


class History(_Answer):
    """One page of predictions, newest first; `next` is where the next page begins."""

    items: list[Record]
    next: str | int | None = Field(None)


A = TypeVar("A", bound=_Answer)


class Api:
    """A client of the lawnwatch API. Safe to share between threads; every call ends within its timeout.

    Args:
        url: base address, such as `http://127.0.0.1:8000`.
        key: API key, empty where none is required.
        predict_timeout: seconds to wait for the answer to a picture.
        read_timeout: seconds to wait for anything else.
        failed: is told of every call that gave no answer, before the error is raised.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        predict_timeout: float = 35.0,
        read_timeout: float = 8.0,
        failed: Callable[[ApiError], None] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._failed = failed
        self._predict_timeout = httpx.Timeout(predict_timeout, connect=3.0)
        # The address is an operator's; a proxy from the environment would only send pictures somewhere else.
        self._http = httpx.Client(
            base_url=self.url,
            headers={"X-API-Key": key} if key else {},
            timeout=httpx.Timeout(read_timeout, connect=3.0),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def predict(self, picture: bytes, content_type: str, *, explain: bool = False) -> Prediction:
        """Ask what is in a picture, and why when `explain`. The name of the user's file stays with the user."""
        response = self._send(
            "POST",
            "/predict",
            params={"explain": "true"} if explain else {},
            files={"file": ("picture", picture, content_type or "application/octet-stream")},
            timeout=self._predict_timeout,
        )
        return self._parse(Prediction, response)

    def model_info(self) -> ModelInfo:
        """What is serving, how good it was measured to be, and where it comes from."""
        return self._parse(ModelInfo, self._send("GET", "/model/info"))

    def history(self, *, limit: int, before: str | int | None = None, label: str | None = None) -> History:
        """Recent predictions, newest first.

        Args:
            limit: most items of the page.
            before: the `next` of the page before; None for the newest page.
            label: only predictions with this answer.
        """
        wanted = {"limit": limit, "before": before, "label": label}
        response = self._send(
            "GET", "/predictions", params={name: value for name, value in wanted.items() if value is not None}
        )
        return self._parse(History, response)

    def prediction(self, prediction_id: str) -> Record:
        """One recorded prediction."""
        return self._parse(Record, self._send("GET", f"/predictions/{prediction_id}"))

    def picture(self, path: str) -> bytes:
        """The bytes of a kept picture.

        Args:
            path: the `image_url` of a record; anything but a path below the API is refused.
        """
        if not path.startswith("/") or path.startswith("//"):
            raise self._told(Garbled(f"The API named a picture outside itself: {path!r}.", code="garbled"))
        return self._send("GET", path).content

    def _send(self, method: str, path: str, **wanted: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **wanted)
        except httpx.TimeoutException as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise self._told(self._unreachable()) from error
            slow = TooSlow(
                "The API did not answer in time.",
                hint="It may be busy or starting. Wait a moment and try again.",
                code="slow",
            )
            raise self._told(slow) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._told(self._unreachable()) from error
        if response.is_success:
            return response
        raise self._told(_refusal(response))

    def _told(self, error: ApiError) -> ApiError:
        if self._failed is not None:
            self._failed(error)
        return error

    def _unreachable(self) -> Unreachable:
        return Unreachable(
            f"The API at {self.url} cannot be reached.",
            hint="Start it with `make demo` or `lawnwatch serve`, or set LAWNWATCH_API_URL to where it runs.",
            code="unreachable",
        )

    def _parse(self, kind: type[A], response: httpx.Response) -> A:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            garbled = Garbled(
                f"What answers at {self.url} is not the API this page was made for.",
                hint="Check LAWNWATCH_API_URL, and that the page and the API are of the same release.",
                code="garbled",
            )
            raise self._told(garbled) from error


def _refusal(response: httpx.Response) -> Refused:
    """The error a response stands for: the API's own words if it sent problem+json, else the bare status."""
    problem: dict[str, Any] = {}
    if "json" in response.headers.get("content-type", ""):
        try:
            body = response.json()
        except ValueError:
            body = None
        problem = body if isinstance(body, dict) else {}
    detail = problem.get("detail")
    message = detail if isinstance(detail, str) and detail else str(problem.get("title") or "")
    if not message:
        message = f"The API answered with status {response.status_code} and no explanation."
    hint = str(problem.get("hint") or "")
    retry_after = response.headers.get("retry-after", "")
    if not hint and retry_after.isdigit():
        hint = f"Try again in {retry_after} s."
    return Refused(message, hint=hint, code=str(problem.get("code") or "http"), status=response.status_code)
