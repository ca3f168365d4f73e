"""Every error lawnwatch raises on purpose, and what it means to a caller.

LawnwatchError                 500  exit 1   code internal
├── InputError                 400  exit 2   bad_request      the caller sent something wrong
│   ├── SettingsError          500  exit 2   settings         a setting is missing, wrong or unsafe here
│   ├── ImageError             422  exit 2   corrupt          not a picture that we can use
│   │   ├── UnsupportedMedia   415  exit 2   unsupported_media
│   │   └── ImageTooLarge      413  exit 2   too_large        more bytes than allowed
│   │       └── TooManyPixels  422  exit 2   too_many_pixels  few bytes that would decode to too much
│   ├── BlockedSource          400  exit 2   blocked          a URL that must not be fetched
│   └── NotFound               404  exit 2   not_found        no such snapshot, version, prediction, object …
├── DataError                  409  exit 3   data             the data cannot carry the step (too few images, …)
├── IntegrityError             409  exit 4   integrity        bytes are not what their hash or manifest says
├── Unavailable                503  exit 5   unavailable      a server does not answer; try again
│   ├── NoModel                503  exit 5   no_model         nothing verified to serve yet
│   └── Overloaded             503  exit 5   overloaded       refused to stay fast; retry after `retry_after` s
├── Conflict                   409  exit 6   conflict         somebody else changed it first; re-evaluate
└── RolloutFailed              500  exit 7   rollout_failed   the new model did not come up; the old one serves

Beside these, exit code 99 means "nothing to do" (Airflow marks the task as skipped).

A message says what was wrong and what was received; `hint` says what to do next.
"""

from __future__ import annotations

from typing import ClassVar

NOTHING_TO_DO = 99


class LawnwatchError(Exception):
    """Base of all errors that lawnwatch raises on purpose.

    Args:
        message: one sentence for a person: what was wrong, what was received.
        hint: one sentence: what to do next.
    """

    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InputError(LawnwatchError):
    """The caller sent something wrong."""

    status, exit_code, code = 400, 2, "bad_request"


class SettingsError(InputError):
    """A setting is missing, malformed or unsafe in this environment."""

    status, code = 500, "settings"


class ImageError(InputError):
    """The bytes are not a picture that we can use: truncated, empty, undecodable."""

    status, code = 422, "corrupt"


class UnsupportedMedia(ImageError):
    """The bytes are not JPEG, PNG or WebP, whatever their name or content type says."""

    status, code = 415, "unsupported_media"


class ImageTooLarge(ImageError):
    """More bytes or pixels than the caps allow; decided before decoding."""

    status, code = 413, "too_large"


class TooManyPixels(ImageTooLarge):
    """The header promises more pixels than the cap; the body itself may be small."""

    status, code = 422, "too_many_pixels"


class BlockedSource(InputError):
    """A URL whose scheme, port or address must never be fetched."""

    code = "blocked"


class NotFound(InputError):
    """No such image record, snapshot, model version, bundle, prediction or object."""

    status, code = 404, "not_found"


class DataError(LawnwatchError):
    """The data cannot carry the step: empty catalog, a class with too few images, an unknown label."""

    status, exit_code, code = 409, 3, "data"


class IntegrityError(LawnwatchError):
    """Bytes are not what their hash, manifest or golden answers say."""

    status, exit_code, code = 409, 4, "integrity"


class Unavailable(LawnwatchError):
    """A server does not answer, in a bounded time and after bounded retries."""

    status, exit_code, code = 503, 5, "unavailable"


class NoModel(Unavailable):
    """There is no verified model to serve."""

    code = "no_model"


class Overloaded(Unavailable):
    """Refused so that the accepted requests stay fast."""

    code = "overloaded"

    def __init__(self, message: str, *, hint: str = "", retry_after: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Conflict(LawnwatchError):
    """Somebody else changed the thing first; read it again and decide again."""

    status, exit_code, code = 409, 6, "conflict"


class RolloutFailed(LawnwatchError):
    """The new model did not come up; the old one is serving."""

    status, exit_code, code = 500, 7, "rollout_failed"
