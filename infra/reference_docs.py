"""Write docs/settings.md and docs/cli.md from the code (`make docs`); a test compares them with it.

python infra/reference_docs.py [--check]
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer.main
from pydantic import AliasChoices, BaseModel, SecretStr
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "webapp"))

from lawnwatch import cli  # noqa: E402
from lawnwatch.config import Settings  # noqa: E402
from settings import WebSettings  # noqa: E402  (the web app's own, in webapp/)

SETTINGS_HEAD = """# Settings

<!-- Generated from src/lawnwatch/config.py and webapp/settings.py by `make docs`; do not edit. -->

Every setting is an environment variable. With none set, everything is kept below one folder (`./var`): the embedded
mode. A list or an object is written as JSON. Settings marked *development only* are refused when
`LAWNWATCH_ENVIRONMENT=production`; a blank or well-known password for a real server is refused everywhere.
"""

CLI_HEAD = """# Commands

<!-- Generated from src/lawnwatch/cli.py by `make docs`; do not edit. -->

Progress goes to stderr, one JSON object to stdout, so `lawnwatch STEP | jq` works. Every command takes `--help`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a fault of lawnwatch |
| 2 | wrong input or settings |
| 3 | the data cannot carry the step |
| 4 | bytes are not what their hash or manifest says |
| 5 | a server does not answer |
| 6 | somebody else changed it first |
| 7 | the rollout failed; the old model serves |
| 99 | nothing to do |
| 130 | interrupted (SIGINT) |
| 143 | told to stop (SIGTERM) |
"""


# --- settings -------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """The whole of docs/settings.md."""
    top, groups = [], []
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            groups.append((name, field.annotation))
        else:
            top.append(row(variable(name, field), field))
    parts = [SETTINGS_HEAD, "## General\n", table(top)]
    for name, group in groups:
        rows = [row(f"LAWNWATCH_{name}__{member}".upper(), field) for member, field in group.model_fields.items()]
        parts += [f"## {(group.__doc__ or name).strip().rstrip('.')}\n", table(rows)]
    web = [row(f"LAWNWATCH_{name}".upper(), field) for name, field in WebSettings.model_fields.items()]
    parts += [
        "## The web app\n",
        "Read by the web app alone. Its address and port are Streamlit's own `STREAMLIT_SERVER_ADDRESS` and "
        "`STREAMLIT_SERVER_PORT` (127.0.0.1 and 8501).\n",
        table(web),
    ]
    return "\n".join(parts).rstrip() + "\n"


def variable(name: str, field: FieldInfo) -> str:
    """The environment variable of a top-level setting; an alias comes first when there is one."""
    if isinstance(field.validation_alias, AliasChoices):
        return str(field.validation_alias.choices[0])
    return f"LAWNWATCH_{name}".upper()


def row(name: str, field: FieldInfo) -> str:
    text = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {kind(field.annotation)}{limits(field)} | {default(field)} | {text} |"


def table(rows: list[str]) -> str:
    return "\n".join(["| variable | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def kind(annotation: Any) -> str:
    """A type in words."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(kind(part) for part in get_args(annotation) if part is not type(None))
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "folder"}
    names |= {SecretStr: "secret text"}
    return names.get(annotation) or {list: "JSON list", dict: "JSON object"}[get_origin(annotation)]


def limits(field: FieldInfo) -> str:
    """Bounds, such as `, ≥ 1, < 2`."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return "".join(
        f", {sign} {getattr(bound, name):,}"
        for bound in field.metadata
        for name, sign in signs.items()
        if getattr(bound, name, None) is not None
    )


def default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return ""
    return f"`{json.dumps(value)}`" if isinstance(value, list | dict | bool) else f"`{value}`"


# --- commands -------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """The whole of docs/cli.md."""
    root = typer.main.get_command(cli.app)
    parts = [CLI_HEAD]
    for path, command in commands(root, ["lawnwatch"]):
        parts.append(section(path, command))
    return "\n".join(parts).rstrip() + "\n"


ROAD = ("catalog", "ingest", "snapshot", "train", "evaluate", "model", "release", "rollout", "serve")


def commands(command: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Every command that does something, in the order of the road."""
    members = getattr(command, "commands", None)
    if members is None:
        yield path, command
        return
    place = {name: number for number, name in enumerate(ROAD)}
    for name, member in sorted(members.items(), key=lambda item: place.get(item[0], len(ROAD))):
        if not member.hidden:
            yield from commands(member, [*path, name])


def section(path: list[str], command: Any) -> str:
    """One command: what it does, what it takes, an example."""
    name = " ".join(path)
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    usage = " ".join(
        [name, *(["[OPTIONS]"] if options else [])]
        + [(metavar(each) if each.required else f"[{metavar(each)}]") for each in arguments]
    )
    lines = [f"## {name}\n", " ".join((command.help or "").split()) + "\n", f"```\n{usage}\n```\n"]
    if arguments or options:
        lines += ["| argument | meaning | default |", "|---|---|---|"]
        lines += [f"| `{metavar(each)}` | {meaning(each)} | {shown(each)} |" for each in arguments]
        lines += [f"| `{each.opts[0]}{value(command, each)}` | {meaning(each)} | {shown(each)} |" for each in options]
        lines.append("")
    epilog = getattr(command, "epilog", None) or ""
    if epilog.startswith("Example: "):
        lines.append(f"Example:\n\n```\n{epilog.removeprefix('Example: ')}\n```\n")
    return "\n".join(lines)


def metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name).upper()


def value(command: Any, option: Any) -> str:
    """What follows an option, in words, from the annotation of the command's function."""
    if option.is_flag:
        return ""
    wanted = get_type_hints(inspect.unwrap(command.callback))[option.name]
    parts = [part for part in get_args(wanted) or (wanted,) if part is not type(None)]
    return " " + {int: "INTEGER", float: "NUMBER", Path: "FILE"}.get(parts[0], "TEXT")


def meaning(parameter: Any) -> str:
    text = " ".join((parameter.help or "").split()).replace("|", "\\|")
    return text + (" Required." if parameter.required and parameter.param_type_name == "option" else "")


def shown(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or value in ("", False) or callable(value) or parameter.required else f"`{value}`"


PAGES = {"settings.md": settings_page, "cli.md": cli_page}


def main() -> None:
    stale = []
    for name, page in PAGES.items():
        file, text = ROOT / "docs" / name, page()
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(f"docs/{name}")
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    if stale and "--check" in sys.argv:
        sys.exit(f"{' and '.join(stale)} differ from the code; run `make docs`")


if __name__ == "__main__":
    main()
