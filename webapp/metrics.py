"""What the page sees, as Prometheus metrics: uploads, how long a person waits for an answer, and what the API refused.

Sessions are counted by Streamlit itself, at `/_stcore/metrics` of the page's own port.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from api import ApiError, Garbled, Prediction, Refused, TooSlow

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
OUTCOMES = ("answered", "unknown", "failed")
KINDS = ("unreachable", "slow", "garbled", "refused", "no_model", "server")

registry = CollectorRegistry()
_uploads = Counter(
    "lawnwatch_web_uploads", "Pictures that were asked about, by outcome.", ["outcome"], registry=registry
)
_seconds = Histogram(
    "lawnwatch_web_upload_seconds", "Time from a picture's arrival to its answer.", buckets=SECONDS, registry=registry
)
_errors = Counter("lawnwatch_web_api_errors", "Calls of the API that gave no answer.", ["kind"], registry=registry)
# A series that begins with its first event hides that event from rate().
for _outcome in OUTCOMES:
    _uploads.labels(_outcome)
for _kind in KINDS:
    _errors.labels(_kind)


def uploaded(answer: Prediction | ApiError, seconds: float) -> None:
    """One picture was asked about."""
    outcome = "failed" if isinstance(answer, ApiError) else "unknown" if answer.label == "unknown" else "answered"
    _uploads.labels(outcome).inc()
    _seconds.observe(seconds)


def failed(error: ApiError) -> None:
    """One call of the API gave no answer."""
    _errors.labels(_kind_of(error)).inc()


def _kind_of(error: ApiError) -> str:
    if isinstance(error, TooSlow):
        return "slow"
    if isinstance(error, Garbled):
        return "garbled"
    if not isinstance(error, Refused):
        return "unreachable"
    if error.code == "no_model":
        return "no_model"
    return "server" if error.status is not None and error.status >= 500 else "refused"
