"""Settings: the embedded defaults, what is refused where, and that no message ever holds a secret (faults 48, 49)."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from lawnwatch.config import PLACEHOLDERS, Settings, get_settings
from lawnwatch.errors import SettingsError

pytestmark = pytest.mark.unit

CANARY = "canary-7f3a9c"


def read(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return get_settings()


def refused(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """The message of the refusal, and everything else an error could carry into a log."""
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, **environment)
    assert caught.value.hint
    return "".join(traceback.format_exception(caught.value)).split("SettingsError: ")[-1]


def test_with_nothing_set_all_is_below_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = read(monkeypatch)
    assert settings.home == tmp_path / "var"
    assert settings.database_url.get_secret_value() == f"sqlite:///{tmp_path}/var/catalog.db"
    assert settings.store_url == f"file://{tmp_path}/var/store"
    assert settings.mlflow_tracking_uri == f"sqlite:///{tmp_path}/var/mlflow.db"


def test_a_group_is_reached_with_two_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(
        monkeypatch, LAWNWATCH_SERVING__PORT="9001", LAWNWATCH_FETCH__ORIGIN_MAP='{"https://a/": "http://b/"}'
    )
    assert settings.serving.port == 9001
    assert settings.fetch.origin_map == {"https://a/": "http://b/"}


def test_people_find_the_api_where_programs_do_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, LAWNWATCH_API_URL="http://api:8000").public_url == "http://api:8000"
    assert read(monkeypatch, LAWNWATCH_PUBLIC_URL="https://lawn.example.org").public_url == "https://lawn.example.org"


def test_mlflows_own_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, MLFLOW_TRACKING_URI="http://mlflow:5000").mlflow_tracking_uri == "http://mlflow:5000"


@pytest.mark.parametrize("password", [*sorted(PLACEHOLDERS), "ADMIN", "ChangeMe", "%61dmin"])
def test_a_database_password_that_everybody_knows_is_refused(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    said = refused(monkeypatch, LAWNWATCH_DATABASE_URL=f"mysql+pymysql://lawnwatch:{password}@db/lawnwatch")
    assert "LAWNWATCH_DATABASE_URL has a blank or well-known password" in said


def test_a_database_url_without_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "blank or well-known" in refused(monkeypatch, LAWNWATCH_DATABASE_URL="mysql+pymysql://root@db/lawnwatch")


@pytest.mark.parametrize("key", ["", "minioadmin", "MINIOADMIN", "changeme"])
def test_a_store_key_that_everybody_knows_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    said = refused(
        monkeypatch,
        LAWNWATCH_STORE_URL="s3://lawnwatch",
        LAWNWATCH_STORE_ENDPOINT="http://minio:9000",
        LAWNWATCH_STORE_ACCESS_KEY="lawnwatch",
        LAWNWATCH_STORE_SECRET_KEY=key,
    )
    assert "LAWNWATCH_STORE_SECRET_KEY is blank or well-known" in said


def test_an_own_password_is_taken_for_both_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(
        monkeypatch,
        LAWNWATCH_DATABASE_URL=f"mysql+pymysql://lawnwatch:{CANARY}@db/lawnwatch",
        LAWNWATCH_STORE_URL="s3://lawnwatch",
        LAWNWATCH_STORE_ENDPOINT="http://minio:9000",
        LAWNWATCH_STORE_SECRET_KEY=CANARY,
    )
    assert CANARY in settings.database_url.get_secret_value()


def test_an_s3_store_without_its_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, LAWNWATCH_STORE_URL="s3://lawnwatch", LAWNWATCH_STORE_SECRET_KEY=CANARY)
    assert "LAWNWATCH_STORE_ENDPOINT" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LAWNWATCH_FETCH__ALLOW_CIDRS", '["127.0.0.0/8"]'),
        ("LAWNWATCH_FETCH__ORIGIN_MAP", '{"https://a/": "http://127.0.0.1/"}'),
    ],
)
def test_what_is_for_development_only_is_refused_in_production(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert read(monkeypatch, **{name: value})
    assert "for development only" in refused(monkeypatch, **{name: value}, LAWNWATCH_ENVIRONMENT="production")


def test_a_wrong_value_is_named_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, LAWNWATCH_SERVING__PORT="many")
    assert "LAWNWATCH_SERVING__PORT" in said


@pytest.mark.parametrize(
    "environment",
    [
        {"LAWNWATCH_DATABASE_URL": f"mysql+pymysql://u:{CANARY}@db/x", "LAWNWATCH_SERVING__PORT": "many"},
        {"LAWNWATCH_DATABASE_URL": f"mysql+pymysql://u:{CANARY}@db/x", "LAWNWATCH_STORE_URL": "s3://bucket"},
        {"LAWNWATCH_STORE_URL": f"https://key:{CANARY}@minio/bucket"},
        {"LAWNWATCH_STORE_URL": CANARY},
        {"LAWNWATCH_STORE_SECRET_KEY": CANARY, "LAWNWATCH_ENVIRONMENT": "prod"},
        {"LAWNWATCH_FETCH__ORIGIN_MAP": f"not json {CANARY}"},
        {"LAWNWATCH_FETCH__ALLOW_HOSTS": f'["{CANARY}'},
        {"LAWNWATCH_SERVING__PORT": CANARY},
        {"LAWNWATCH_FETCH": CANARY},
    ],
)
def test_no_refusal_holds_a_value(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    assert CANARY not in refused(monkeypatch, **environment)


def test_settings_in_a_log_line_or_a_dump_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(
        monkeypatch,
        LAWNWATCH_DATABASE_URL=f"mysql+pymysql://lawnwatch:{CANARY}@db/lawnwatch",
        LAWNWATCH_STORE_URL="s3://lawnwatch",
        LAWNWATCH_STORE_ENDPOINT="http://minio:9000",
        LAWNWATCH_STORE_SECRET_KEY=CANARY,
        MLFLOW_TRACKING_URI=f"http://lawnwatch:{CANARY}@mlflow:5000",
    )
    assert CANARY not in repr(settings) + str(settings)
    assert CANARY not in settings.model_dump_json(exclude={"mlflow_tracking_uri"})


def test_every_setting_says_what_it_is_for() -> None:
    from pydantic import BaseModel

    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)
            else:
                assert field.description, f"{model.__name__}.{name}"

    walk(Settings)
