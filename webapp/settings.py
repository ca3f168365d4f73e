"""Settings of the web app, read on their own: its image holds Streamlit and an HTTP client, no lawnwatch."""

from __future__ import annotations

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class WebSettings(BaseSettings):
    """Where the API is, and how long the page waits for it."""

    model_config = SettingsConfigDict(env_prefix="LAWNWATCH_", extra="ignore")

    api_url: str = Field("http://127.0.0.1:8000", description="Where the web app finds the API.")
    api_key: SecretStr = Field(SecretStr(""), description="API key with the scope `admin`, where the API requires one.")
    webapp_timeout: float = Field(
        35.0, gt=0, description="Seconds the web app waits for an answer to an uploaded picture."
    )
    webapp_read_timeout: float = Field(
        8.0, gt=0, description="Seconds the web app waits for anything else, such as the state of the model."
    )
    webapp_metrics_host: str = Field("127.0.0.1", description="Where the web app's metrics listen.")
    webapp_metrics_port: int = Field(9106, ge=1, le=65535, description="Their port; `webapp/serve.py` opens it.")
