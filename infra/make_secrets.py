"""Write .env from .env.example, with a new password at every empty name. A password that .env holds already stays."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    file = ROOT / ".env"
    known = dict(_pairs(file.read_text())) if file.exists() else {}
    lines = []
    for line in (ROOT / ".env.example").read_text().splitlines():
        name, mark, value = line.partition("=")
        if mark and not line.startswith("#"):
            line = f"{name}={known.pop(name, '') or value or _new(name)}"
        lines.append(line)
    lines += [f"{name}={value}" for name, value in known.items()]
    draft = file.with_name(".env.part")
    draft.touch(mode=0o600)
    draft.write_text("\n".join(lines) + "\n")
    draft.replace(file)
    print(f"{file.name} holds a password for every server; only you can read it")


def _pairs(text: str) -> list[tuple[str, str]]:
    return [
        (name, value)
        for name, mark, value in (line.partition("=") for line in text.splitlines())
        if mark and not name.startswith("#")
    ]


def _new(name: str) -> str:
    if name == "AIRFLOW_FERNET_KEY":
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return secrets.token_hex(20)


if __name__ == "__main__":
    main()
