"""The exception tree: what each error means to a caller, and that the table in its module is true."""

from __future__ import annotations

import re

import pytest

from lawnwatch import errors
from lawnwatch.errors import LawnwatchError, Overloaded, SettingsError

pytestmark = pytest.mark.unit


def every(kind: type[LawnwatchError] = LawnwatchError) -> list[type[LawnwatchError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in every(child))]


def ours() -> list[type[LawnwatchError]]:
    return [kind for kind in every() if kind.__module__ == errors.__name__]


def test_the_table_in_the_module_says_what_the_classes_do() -> None:
    rows = re.findall(r"(\w+)\s+(\d{3})  exit (\d+)\s+(?:code )?(\w+)", errors.__doc__ or "")
    told = {name: (int(status), int(exit_code), code) for name, status, exit_code, code in rows}
    assert told == {kind.__name__: (kind.status, kind.exit_code, kind.code) for kind in ours()}


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in ours()]
    assert sorted(codes) == sorted(set(codes))


def test_no_exit_code_is_taken_for_success_or_for_nothing_to_do() -> None:
    for kind in every():
        assert kind.exit_code not in (0, errors.NOTHING_TO_DO, 130), kind


def test_an_error_says_its_message_and_what_to_do() -> None:
    error = SettingsError("X is missing.", hint="Set X.")
    assert str(error) == "X is missing. Set X."
    assert (error.message, error.hint) == ("X is missing.", "Set X.")
    assert str(SettingsError("X is missing.")) == "X is missing."


def test_a_refusal_to_stay_fast_says_when_to_come_back() -> None:
    assert Overloaded("busy", retry_after=3).retry_after == 3
    assert Overloaded("busy").status == 503
