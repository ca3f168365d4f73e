"""API keys: who may ask the API, kept as hashes (`key_table`).

A key is `lw_<id>_<secret>`. The secret is 256 random bits, so that one round of SHA-256 keeps it: there is nothing to
guess, and no slow hash for an attacker to burn our processor with. The id names a key in lists, logs and records.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from datetime import datetime

PREDICT, ADMIN = "predict", "admin"
SCOPES = (PREDICT, ADMIN)
KEY = re.compile(r"lw_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Key:
    """An API key as it is listed.

    Attributes:
        sha256: of the secret, hexadecimal; not printed.
        revoked_at: since when it is refused; None while it is good.
    """

    id: str
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    revoked_at: datetime | None
    sha256: str = field(repr=False)

    def opens(self, secret: str) -> bool:
        """Whether the secret is this key's, found out in a time that does not depend on it."""
        return hmac.compare_digest(hashed(secret), self.sha256)


def parsed(text: str) -> tuple[str, str] | None:
    """Id and secret of what somebody sent as a key; None when it is none."""
    matched = KEY.fullmatch(text)
    return (matched[1], matched[2]) if matched else None


def hashed(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()
