"""Logging: one line an event on stderr, for people on a terminal and JSON elsewhere, with one run id across steps."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import cast

# structlog would import rich for coloured tracebacks, a tenth of a second and some megabytes of every process.
_has_rich = "rich" in sys.modules
if not _has_rich:
    sys.modules["rich"] = cast(ModuleType, None)  # how Python says: there is none
import structlog  # noqa: E402

if not _has_rich:
    del sys.modules["rich"]


def configure(*, level: str = "INFO", json: bool | None = None, run_id: str = "") -> None:
    """Send structlog and the standard library's logging to stderr in one format.

    Args:
        level: the lowest level shown, a name of `logging`.
        json: True for one JSON object a line, False for coloured text; None decides by whether stderr is a terminal.
        run_id: bound to every line, so that the lines of all steps of one pipeline run can be found together.
    """
    if json is None:
        json = not sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info if json else structlog.dev.set_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=str) if json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for chatty in ("alembic", "httpx", "httpcore", "urllib3"):  # their INFO is our DEBUG
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    if run_id:
        structlog.contextvars.bind_contextvars(run_id=run_id)


def get(name: str) -> structlog.stdlib.BoundLogger:
    """A structured logger: `log.info("fetched", url=url, bytes=n)`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger
