"""The database: connections that give up in time, faults told in our words, the schema's version, locks over processes.

MySQL, or SQLite when embedded. Without the ORM, so that a server that only writes records and reads keys does not carry
it; `catalog` has the tables that are objects.
"""

from __future__ import annotations

import fcntl
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from lawnwatch.config import Settings
from lawnwatch.errors import Conflict, InputError, SettingsError, Unavailable

# Longer than the 50 s after which MySQL itself gives up waiting for a lock, so that its answer (1205: try again) is
# heard; short enough that a frozen server is noticed. `?read_timeout=…` in the URL overrules it.
READ_TIMEOUT = 60
# A migration may build an index over a large table; giving up would leave the server at it, and a re-run in its way.
MIGRATION_TIMEOUT = 3600
# MySQL: lock wait timeout, deadlock, too many connections, connection refused, gone, lost, closed (also at a server's
# shutdown or for idleness).
PASSING = {0, 1205, 1213, 1040, 2002, 2003, 2006, 2013, 1053, 1927, 4031, "SQLITE_BUSY", "SQLITE_LOCKED"}
DISK_FULL = {3, 1021, 1026, 1114, "SQLITE_FULL"}
REFUSED = {1044, 1045, 1049, 1142, 1143, 1698}
WANTS_TLS = {3159}  # MySQL's; MariaDB says 1045
T = TypeVar("T")

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""All tables of lawnwatch."""


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Microseconds, always UTC: stored without a zone, returned with one."""

    impl = sa.DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            from sqlalchemy.dialects import mysql  # all of its drivers' names, which SQLite does without

            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(sa.DateTime())

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise InputError(f"A point in time needs a zone; received {value}.")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value else None


def utc_now() -> datetime:
    """This moment, with its zone."""
    return datetime.now(UTC)


def make_engine(
    address: SecretStr, *, setting: str = "LAWNWATCH_DATABASE_URL", read_timeout: int = READ_TIMEOUT
) -> sa.Engine:
    """An engine whose connections are tested before use and give up in bounded time when the server is gone or frozen.

    An error names the statement and not what it carried, such as a key's hash.

    Args:
        address: the database's URL; timeouts in its query overrule ours.
        setting: where the URL comes from, for messages.
        read_timeout: longest wait for an answer, seconds.

    Raises:
        SettingsError: the URL is not one of MySQL or SQLite.
    """
    try:
        url = sa.make_url(address.get_secret_value())
    except sa.exc.ArgumentError:
        raise SettingsError(
            f"{setting} is not a database URL.", hint="It looks like mysql+pymysql://user:password@host/name."
        ) from None
    if url.get_backend_name() == "sqlite":
        # Few statements are kept compiled: one over a batch of rows takes a megabyte, and each batch is another one.
        engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": 30, "cached_statements": 16})
        sa.event.listen(engine, "connect", _prepare_sqlite)
        return engine
    if url.get_backend_name() not in ("mysql", "mariadb"):
        raise SettingsError(
            f"{setting} must name MySQL or SQLite; received {url.get_backend_name()}.",
            hint="Set it to mysql+pymysql://user:password@host/name.",
        )
    if "ssl_ca" in url.query and not Path(str(url.query["ssl_ca"])).is_file():
        raise SettingsError(
            f"{setting} names a file of CA certificates (ssl_ca) that is not there.",
            hint="Give the path of the CA's ca.crt, or take ssl_ca out of the URL.",
        )
    wanted = {"connect_timeout": 5, "read_timeout": read_timeout, "write_timeout": read_timeout, "charset": "utf8mb4"}
    return sa.create_engine(
        url,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_recycle=1800,
        isolation_level="READ COMMITTED",
        connect_args={name: value for name, value in wanted.items() if name not in url.query},
    )


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions
    # Half a megabyte of pages for each connection instead of two: the system has the file in memory, too.
    pragmas = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000", "cache_size=-512")
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    """A transaction that would write waits at its beginning, where that is free, and does not fail midway."""
    reading = connection.get_execution_options().get("reading", False)  # see Database.reading
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def database_faults(setting: str = "LAWNWATCH_DATABASE_URL") -> Iterator[None]:
    """Turn a driver's faults into ours. The driver's words name hosts and users, so only their number goes on.

    Raises:
        Unavailable: the server does not answer, refuses, or its disk is full; or all connections are in use.
    """
    try:
        yield
    except (OperationalError, InterfaceError, InternalError) as error:
        code = _fault_code(error)
        whose = "The catalog database" if setting == "LAWNWATCH_DATABASE_URL" else f"The database of {setting}"
        if code in DISK_FULL:
            raise Unavailable(
                f"{whose} has no space left on its disk ({code}).",
                hint="Make room, then run the same command again: it goes on where it stopped.",
            ) from error
        if code in WANTS_TLS:
            raise Unavailable(
                f"{whose} takes encrypted connections only ({code}).",
                hint=f"Add ?ssl_ca=FILE to {setting}, the CA that signed the server's certificate.",
            ) from error
        if "CERTIFICATE_VERIFY_FAILED" in str(error.orig):
            raise Unavailable(
                f"{whose} has a certificate that the CA of {setting} did not sign, or that is for another host.",
                hint="Is ssl_ca the server's CA, and the host in the URL a name in its certificate?",
            ) from error
        if code in REFUSED:
            raise Unavailable(
                f"{whose} refuses the user, the password or the database name ({code}).",
                hint=f"Is {setting} right? Some servers say so when they want TLS, too: then add ?ssl_ca=FILE.",
            ) from error
        raise Unavailable(
            f"{whose} does not answer as it should ({type(error).__name__} {code}).",
            hint=f"Is the server running, and is {setting} right?",
        ) from error
    except NoConnectionFree as error:
        raise Unavailable(
            "There was no connection free to the database: all of this process wait for its answers.",
            hint="Try again; when it lasts, the server is too slow.",
        ) from error


def _fault_code(error: BaseException | None) -> int | str:
    """MySQL's number or SQLite's name of a fault; empty when it has none."""
    fault = getattr(error, "orig", None)
    if name := getattr(fault, "sqlite_errorname", ""):  # SQLITE_BUSY_SNAPSHOT is a kind of SQLITE_BUSY
        return "_".join(str(name).split("_")[:2])
    code = fault.args[0] if fault is not None and fault.args else ""
    return code if isinstance(code, int | str) else ""


class Database:
    """The database's connections.

    Args:
        settings: where the database is.
        engine: connections to share; None: a pool of its own.
    """

    def __init__(self, settings: Settings, engine: sa.Engine | None = None) -> None:
        self.settings = settings
        self.engine = engine or self._engine()

    def _engine(self, **options: Any) -> sa.Engine:
        engine = make_engine(self.settings.database_url, **options)
        if engine.dialect.name == "sqlite":
            if engine.url.database:
                Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
            sa.event.listen(engine, "begin", _begin_sqlite)
        return engine

    @property
    def is_mysql(self) -> bool:
        return self.engine.dialect.name in ("mysql", "mariadb")

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Committed at the end, rolled back on any exception.

        Raises:
            Unavailable: the server does not answer, or the transaction lost against another (try again).
        """
        with database_faults(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that writes nothing: in SQLite it waits for no writer, and none waits for it.

        Raises:
            Unavailable: the server does not answer.
        """
        with database_faults(), self.engine.execution_options(reading=True).begin() as connection:
            yield connection

    def retried(self, work: Callable[[], T], *, patience: float = 20.0) -> T:
        """Do `work`, again while the database deadlocks or restarts, for at most about `patience` seconds.

        For work that may be done twice: a commit whose answer was lost is repeated.

        Raises:
            Unavailable: the database stayed away.
        """
        end = time.monotonic() + patience
        for attempt in range(1000):
            try:
                return work()
            except Unavailable as error:
                pause = random.uniform(0.05, min(0.1 * 2**attempt, 2.0))  # noqa: S311
                if not _passes(error) or time.monotonic() + pause > end:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable: the patience ends first")

    def migrate(self) -> None:
        """Bring the schema up to date; quick when it is, safe when several processes start at once.

        Raises:
            SettingsError: the schema is of a newer lawnwatch than this one.
            Unavailable: the server does not answer.
        """
        known = known_revisions()
        with database_faults():
            if (there := self._revision()) == known[-1]:
                return
            if there and there not in known:
                raise SettingsError(
                    f"The catalog's schema is {there}; this lawnwatch knows only up to {known[-1]}.",
                    hint="Use the newer lawnwatch that migrated it.",
                )
            self._upgrade()

    def _revision(self) -> str:
        with self.engine.connect() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return ""
            return connection.scalar(sa.text("SELECT version_num FROM alembic_version")) or ""

    def _upgrade(self) -> None:
        from alembic import command  # half a second that a command whose schema is up to date does not spend

        engine = self._engine(read_timeout=MIGRATION_TIMEOUT)
        try:
            with self.exclusive("migrate"), engine.connect() as connection:
                command.upgrade(alembic_config(connection), "head")
                connection.commit()
        finally:
            engine.dispose()

    @contextmanager
    def exclusive(self, name: str, *, timeout: float = 60.0) -> Iterator[None]:
        """Hold the lock of that name over all processes that share this database, until the block ends.

        Raises:
            Conflict: another process holds it for longer than `timeout` seconds.
        """
        if self.is_mysql:
            with database_faults(), self.engine.connect() as connection:
                lock = f"lawnwatch:{self.engine.url.database}:{name}"[:64]
                _lock_name(connection, lock, name, timeout)
                try:
                    yield
                finally:
                    with suppress(DBAPIError):  # the server frees the lock of a connection that it lost
                        connection.execute(sa.text("SELECT RELEASE_LOCK(:lock)"), {"lock": lock})
        else:
            folder = self.settings.home / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("w") as file:
                _lock_file(file.fileno(), name, timeout)
                yield


def known_revisions() -> list[str]:
    """The revisions of the schema, oldest first."""
    versions = Path(__file__).parent / "migrations" / "versions"
    return sorted(file.name.partition("_")[0] for file in versions.glob("[0-9]*_*.py"))


def alembic_config(connection: sa.Connection) -> Any:
    """How Alembic finds our migrations, and the connection that they run on."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def _passes(error: Unavailable) -> bool:
    """Whether the fault behind it may be gone in a moment."""
    return _fault_code(error.__cause__) in PASSING


def affected(result: sa.Result[Any]) -> int:
    """How many rows an UPDATE or DELETE changed."""
    return int(result.rowcount) if isinstance(result, sa.CursorResult) else 0


def _lock_name(connection: sa.Connection, lock: str, name: str, timeout: float) -> None:
    """Take a lock of the server, waiting in pieces that are shorter than the connection's read timeout."""
    deadline = time.monotonic() + timeout
    while True:
        wait = min(max(deadline - time.monotonic(), 0), 10)
        if connection.scalar(sa.text("SELECT GET_LOCK(:lock, :wait)"), {"lock": lock, "wait": wait}):
            return
        if time.monotonic() >= deadline:
            raise Conflict(f"Another process is busy with {name}.", hint="Try again when it has finished.")


def _lock_file(handle: int, name: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Conflict(
                    f"Another process is busy with {name}.", hint="Try again when it has finished."
                ) from None
            time.sleep(0.05)
