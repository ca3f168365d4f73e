"""The references are what the code says, and no page names a file, command, target or setting that is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = re.findall(r"^## (lawnwatch .+)$", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
VARIABLES = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/settings.md").read_text(), re.MULTILINE))
NOT_IN_SETTINGS = {"LAWNWATCH_TEST_PHOTOS", "LAWNWATCH_TEST_MINIO"}  # read by the test suite alone


def each(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_references_match_the_code() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "infra/reference_docs.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_every_command_has_an_example() -> None:
    sections = re.split(r"^## ", (ROOT / "docs/cli.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) == len(COMMANDS) >= 15
    for section in sections:
        name = section.splitlines()[0]
        assert f"Example:\n\n```\n{name}" in section, name


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=each)
def test_commands_targets_and_settings_exist(page: Path) -> None:
    text = page.read_text()
    code = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    known = {word for command in COMMANDS for word in (command, command.rsplit(" ", 1)[0])}
    for used in re.findall(r"\blawnwatch ([a-z]+(?: [a-z]+)?)\b", code):
        words = used.split()
        assert {f"lawnwatch {' '.join(words[:count])}" for count in (1, 2)} & known, f"lawnwatch {used}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"\bmake ((?:[a-z][a-z-]* ?)+)", code):
        assert set(line.split()) <= targets, f"make {line}"
    for variable in re.findall(r"\bLAWNWATCH_[A-Z_]+[A-Z]\b", text):
        assert variable in VARIABLES | NOT_IN_SETTINGS or any(v.startswith(variable) for v in VARIABLES), variable


def test_pictures_of_the_page_are_small_and_described() -> None:
    for name, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert name, f"{target} has no description"
        assert (ROOT / target).stat().st_size <= 300_000
