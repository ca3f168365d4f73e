"""The web app as its image starts it: the page, and its metrics on a port of their own from the first moment on.

Arguments are Streamlit's: `python webapp/serve.py --server.port=8501`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prometheus_client import start_http_server
from pydantic import ValidationError
from streamlit.web import cli

import metrics
from settings import WebSettings, unusable


def main() -> None:
    try:
        settings = WebSettings()
    except ValidationError as error:
        sys.exit(unusable(error))
    start_http_server(settings.webapp_metrics_port, settings.webapp_metrics_host, metrics.registry)
    # Pages run in this process, so what they count is what is exported.
    sys.argv = ["streamlit", "run", str(Path(__file__).with_name("app.py")), *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    main()
