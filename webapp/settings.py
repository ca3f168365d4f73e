"""Settings of the web app, read on their own: its image holds Streamlit and an HTTP client, no lawnwatch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


def _sendable(key: SecretStr) -> SecretStr:
    """A key as a header takes it; a file's last newline is none of it."""
    value = key.get_secret_value().strip()
    if not (value.isascii() and value.isprintable()):
        raise ValueError("a key is of printable ASCII characters")
    return SecretStr(value)


class WebSettings(BaseSettings):
    """Where the API is, and how long the page waits for it."""

    model_config = SettingsConfigDict(env_prefix="LAWNWATCH_", extra="ignore", hide_input_in_errors=True)

    api_url: str = Field("http://127.0.0.1:8000", description="Where the web app finds the API.")
    api_key: Annotated[SecretStr, AfterValidator(_sendable)] = Field(
        SecretStr(""), description="API key with the scope `admin`, where the API requires one."
    )
    webapp_timeout: float = Field(
        35.0, gt=0, description="Seconds the web app waits for an answer to an uploaded picture."
    )
    webapp_read_timeout: float = Field(
        8.0, gt=0, description="Seconds the web app waits for anything else, such as the state of the model."
    )
    webapp_metrics_host: str = Field("127.0.0.1", description="Where the web app's metrics listen.")
    webapp_metrics_port: int = Field(9106, ge=1, le=65535, description="Their port; `webapp/serve.py` opens it.")


def unusable(error: ValidationError) -> str:
    """The sentence that names the settings at fault, without their values."""
    names = sorted({f"LAWNWATCH_{fault['loc'][0]}".upper() for fault in error.errors(include_input=False)})
    return f"The web app's settings are not usable: {', '.join(names)}."
