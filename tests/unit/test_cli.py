"""The command line as its callers see it: JSON on stdout, words on stderr, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from lawnwatch import cli, config

pytestmark = pytest.mark.unit


Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """The program in this process (a process of its own costs seconds): exit code, JSON on stdout, words on stderr."""

    def one(*argv: str, **environment: str) -> tuple[int, dict[str, Any], str]:
        for name, value in {"LAWNWATCH_HOME": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["lawnwatch", *argv])
        config.get_settings.cache_clear()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        lines = out.splitlines()
        assert len(lines) == 1, f"expected one JSON object on stdout; received {out!r} and {err!r}"
        return int(left.value.code or 0), json.loads(lines[0]), err

    before = signal.getsignal(signal.SIGTERM)
    yield one
    signal.signal(signal.SIGTERM, before)


def commands(group: TyperGroup, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    found: list[tuple[tuple[str, ...], object]] = []
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            found += commands(command, (*path, name))
        else:
            found.append(((*path, name), command))
    return found


def every_command() -> list[tuple[tuple[str, ...], object]]:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    return commands(group)


@pytest.mark.parametrize(
    ("path", "command"), every_command(), ids=lambda each: "-".join(each) if isinstance(each, tuple) else ""
)
def test_every_command_has_help_and_an_example_of_itself(path: tuple[str, ...], command: object) -> None:
    assert getattr(command, "help", None)
    assert f"lawnwatch {' '.join(path)}" in (getattr(command, "epilog", None) or "")


def test_the_steps_of_the_road_are_all_there() -> None:
    paths = {" ".join(path) for path, _ in every_command()}
    assert paths >= {
        "catalog add", "catalog import", "catalog status", "ingest", "snapshot create", "snapshot list",
        "snapshot show", "train", "evaluate", "model list", "model show", "model promote", "model rollback",
        "release", "rollout start", "rollout status", "rollout undo", "serve",
    }  # fmt: skip


def test_adding_a_url_is_idempotent_and_a_second_label_is_a_conflict(run: Run) -> None:
    url = "https://example.org/lawn.jpg"
    assert run("catalog", "add", url, "grass")[:2][1]["outcome"] == "added"
    code, said, _ = run("catalog", "add", url, "grass")
    assert (code, said["outcome"]) == (0, "unchanged")
    code, said, words = run("catalog", "add", url, "dandelion")
    assert (code, said["outcome"]) == (6, "conflict")
    assert "relabel" in words


@pytest.mark.parametrize(
    ("argv", "code", "error", "says"),
    [
        (("ingest",), 3, "data", "catalog is empty"),
        (("snapshot", "create"), 3, "data", "at least two classes"),
        (("snapshot", "show"), 2, "not_found", "no snapshot"),
        (("catalog", "show", "https://example.org/none.jpg"), 2, "not_found", "no image record"),
        (("catalog", "import", "none.csv"), 2, "bad_request", "no file none.csv"),
        (
            ("catalog", "add", "ftp://example.org/a.jpg", "grass"),
            2,
            "bad_request",
            "received 'ftp://example.org/a.jpg'",
        ),
        (("catalog", "retry", "--state", "stored"), 2, "bad_request", "received 'stored'"),
        (("mow",), 2, "bad_request", "No such command 'mow'"),
        (("ingest", "--limit", "0"), 2, "bad_request", "--limit"),
        (("catalog", "show", os.fsdecode(b"caf\xe9")), 2, "bad_request", r"received 'caf\udce9'"),
        (("snapshot", "show", os.fsdecode(b"\xff")), 2, "bad_request", "not text in UTF-8"),
        (("key", "create", "--name", os.fsdecode(b"\xff")), 2, "bad_request", "not text in UTF-8"),
        (("catalog", "show", "9" * 30), 2, "not_found", "no image record"),
        (("catalog", "list", "--after", "9" * 30), 2, "bad_request", "--after"),
        (("data", "recheck", "--older-than", "9" * 30), 2, "bad_request", "--older-than"),
        (("predictions", "prune", "--days", "9" * 30), 2, "bad_request", "--days"),
    ],
)
def test_a_fault_is_one_sentence_with_a_hint(run: Run, argv: tuple[str, ...], code: int, error: str, says: str) -> None:
    exit_code, said, words = run(*argv)
    assert (exit_code, said["error"]) == (code, error)
    assert says in str(said["message"])
    assert said["hint"] or error == "bad_request"
    assert words.startswith("error: ")


def test_a_database_that_is_down_is_said_within_seconds_and_without_its_password(run: Run) -> None:
    url = "mysql+pymysql://lawn:canary-7f3a@127.0.0.1:9/lawnwatch"
    code, said, words = run("catalog", "status", LAWNWATCH_DATABASE_URL=url)
    assert (code, said["error"]) == (5, "unavailable")
    assert "canary-7f3a" not in words + json.dumps(said)


def test_an_unusable_setting_is_named_but_its_value_is_not_shown(run: Run) -> None:
    code, said, words = run("catalog", "status", LAWNWATCH_FETCH__CONCURRENCY="canary")
    assert (code, said["error"]) == (2, "settings")
    assert "LAWNWATCH_FETCH__CONCURRENCY" in words
    assert "canary" not in words + json.dumps(said)


def test_a_fault_of_ours_keeps_its_traceback_in_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"this is no database" * 100)
    code, said, _ = run("catalog", "status")
    assert (code, said["error"]) == (1, "internal")
    (kept,) = (tmp_path / "faults").iterdir()
    assert "Traceback" in kept.read_text() and str(kept) in str(said["hint"])


def test_a_home_that_cannot_be_made_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said, words = run("catalog", "status", LAWNWATCH_HOME=str(tmp_path / "file" / "home"))
    assert (code, said["error"]) == (2, "settings")
    assert "LAWNWATCH_HOME" in words and said["hint"]


def test_a_fault_of_ours_is_said_and_kept_even_where_home_takes_no_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    (tmp_path / "catalog.db").write_bytes(b"this is no database" * 100)
    (tmp_path / "faults").touch()
    code, said, _ = run("catalog", "status")
    assert (code, said["error"]) == (1, "internal")
    (kept,) = elsewhere.iterdir()
    assert "Traceback" in kept.read_text() and str(kept) in str(said["hint"])


def test_a_package_that_this_installation_does_without_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the serving image, which has no MLflow."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, said, _ = run("model", "list")
    assert (code, said["error"]) == (2, "settings")
    assert "needs the package mlflow" in said["message"] and "scheduler" in said["hint"]


def test_it_runs_as_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lawnwatch", "catalog", "status"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"LAWNWATCH_HOME": str(tmp_path)},
    )
    assert done.returncode == 0 and json.loads(done.stdout)["total"] == 0
    assert done.stderr == "0 image record(s): none.\n"


def test_importing_twice_changes_nothing_and_bad_lines_go_to_a_reject_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "urls.csv"
    file.write_text("url,label\nhttps://example.org/1.jpg,grass\nnot a url,grass\nhttps://example.org/2.jpg,\n")
    first = run("catalog", "import", str(file))[1]
    assert (first["added"], first["rejected"]) == (1, 2)
    rejects = Path(str(first["reject_file"])).read_text().splitlines()
    assert rejects[1].startswith("3,not a url")
    code, again = run("catalog", "import", str(file))[:2]
    assert (code, again["unchanged"]) == (0, 1)
    assert run("catalog", "status")[1]["total"] == 1
    file.write_text("url,label\nnot a url,grass\n")
    code, none = run("catalog", "import", str(file))[:2]
    assert (code, none["rejected"]) == (3, 1)
