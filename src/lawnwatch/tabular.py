"""Tabular files: CSV, JSON lines and Parquet, read and written row by row in bounded memory.

A row that cannot be read is a row with a fault, so that a reader goes on after it and its line number is known.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from lawnwatch.errors import InputError

ENDINGS = (".csv", ".jsonl", ".parquet")
MAX_LINE = 1_000_000  # characters; a file without line ends must not fill the memory
MAX_RECORD = 100  # lines of a CSV file that may be one row, where a column that nobody reads holds line ends
OPEN_QUOTE = "a quote is not closed"
PARQUET_BATCH = 5000


class Row(NamedTuple):
    """One labelled URL as it was found: `line` is its line, row number or key; `fault` says why it is no row."""

    line: int | str
    url: str
    label: str
    fault: str = ""


class Rows(Protocol):
    """Rows that are read once, in order."""

    def __iter__(self) -> Iterator[Row]: ...

    def share(self) -> float | None:
        """How much has been read, 0 to 1; None when that cannot be known."""


def text_of(value: object) -> str:
    """A cell as text: nothing is the empty text, whole numbers are their digits. Raises ValueError for the others."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bytes):
        return value.decode()
    raise ValueError(f"a {type(value).__name__} where text is expected")


def row_of(line: int | str, url: object, label: object) -> Row:
    """A row whose cells may be of any type."""
    try:
        return Row(line, text_of(url), text_of(label))
    except ValueError as error:
        return Row(line, str(url), str(label), str(error))


# --- reading --------------------------------------------------------------------------------------------------------


def open_rows(file: Path) -> Rows:
    """The labelled URLs of a file with the columns `url` and `label`; its other columns are passed over.

    Raises:
        InputError: no such file, an unknown ending, or a file without those columns.
    """
    if not file.is_file():
        raise InputError(f"There is no file {file}.", hint=f"Name a file that ends in {', '.join(ENDINGS)}.")
    readers: dict[str, Callable[[Path], Rows]] = {".csv": CsvRows, ".jsonl": JsonRows, ".parquet": ParquetRows}
    if file.suffix not in readers:
        raise InputError(f"{file.name} ends in {file.suffix or 'nothing'}; expected {', '.join(ENDINGS)}.")
    return readers[file.suffix](file)


class _TextRows:
    """What CSV and JSON lines share: bounded lines, and the position in bytes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.size = file.stat().st_size
        self.position = 0

    def share(self) -> float | None:
        return self.position / self.size if self.size else None

    def _lines(self) -> Iterator[str]:
        with self.file.open("rb") as raw:
            if raw.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:  # the mark that some programs begin a file with
                raw.seek(0)
            while line := raw.readline(MAX_LINE):
                whole = line
                while len(line) == MAX_LINE and not line.endswith(b"\n"):  # the rest of a line that is too long
                    line = raw.readline(MAX_LINE)
                # Only here and not for every line: raw.tell() would cost as much as the line.
                self.position += len(whole)
                yield whole.decode("utf-8", errors="replace")


class CsvRows(_TextRows):
    """A CSV file with a header."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        try:
            self.header = next(csv.reader(self._lines()), [])
        except csv.Error as error:
            raise InputError(f"The first line of {file.name} is not a row of CSV: {error}.") from None
        self.position = 0
        hint = "The header must be `url,label`, separated by commas." if len(self.header) < 2 else ""
        _need_columns(file, self.header, hint=hint)
        self.url, self.label = self.header.index("url"), self.header.index("label")

    def __iter__(self) -> Iterator[Row]:
        lines = self._lines()
        header = csv.reader(lines)
        next(header)
        held: list[str] = []  # the lines of a row, more than one while a quote is open
        first = header.line_num + 1  # the number of the first of them
        for line in lines:
            if held and (_too_long(held) or self._is_row(line)):
                yield from self._each(first, held)
                first, held = first + len(held), []
            held.append(line)
            row = self._row(first, held)
            if row is not None and row.fault == OPEN_QUOTE:
                continue
            if row is not None and len(held) > 1 and (row.fault or "\n" in row.url + row.label):
                yield from self._each(first, held)  # a stray quote must not take the rows after it along
            elif row is not None:
                yield row
            first, held = first + len(held), []
        yield from self._each(first, held)

    def _row(self, number: int, lines: Sequence[str]) -> Row | None:
        """The row that these lines are together; None when they are empty."""
        reader = csv.reader([*lines, "\n"])
        try:
            cells = next(reader)
        except csv.Error as error:
            return Row(number, "", "", f"not a row of CSV: {error}")
        open_quote = reader.line_num > len(lines)
        if len(cells) == len(self.header) and not open_quote:
            return Row(number, cells[self.url], cells[self.label])
        if not cells:
            return None
        # An unquoted comma inside a URL must not shift the label.
        fault = OPEN_QUOTE if open_quote else f"{len(cells)} cells where the header has {len(self.header)}"
        shown = dict(zip(self.header, map(str.strip, cells), strict=False))
        return Row(number, shown.get("url", ""), shown.get("label", ""), fault)

    def _each(self, number: int, lines: Sequence[str]) -> Iterator[Row]:
        """The rows that these lines are one by one, the first of them with this number."""
        found = (self._row(at, [line]) for at, line in enumerate(lines, start=number))
        return (row for row in found if row is not None)

    def _is_row(self, line: str) -> bool:
        """Whether a line after an open quote is a row by itself; one that closes a quote has an odd number of them."""
        row = self._row(0, [line])
        whole = row is not None and not row.fault and row.url.startswith(("http://", "https://"))
        return whole and line.count('"') % 2 == 0


def _too_long(lines: Sequence[str]) -> bool:
    return len(lines) >= MAX_RECORD or sum(map(len, lines)) >= MAX_LINE


class JsonRows(_TextRows):
    """One JSON object a line."""

    def __iter__(self) -> Iterator[Row]:
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                parsed = json.loads(line)
            except (ValueError, RecursionError):
                yield Row(number, line.strip()[:200], "", "not JSON")
                continue
            if isinstance(parsed, dict):
                yield row_of(number, parsed.get("url"), parsed.get("label"))
            else:
                yield Row(number, line.strip()[:200], "", "not a JSON object")


class ParquetRows:
    """A Parquet file, batch by batch."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.faults = (pa.ArrowException, OSError)
        self.file = file
        self.done = 0
        try:
            self.parquet = pq.ParquetFile(file, pre_buffer=False)  # a row group need not fit into memory
        except self.faults as error:
            raise InputError(f"{file.name} is not a Parquet file that can be read: {error}.") from None
        _need_columns(file, self.parquet.schema_arrow.names)

    def share(self) -> float | None:
        rows = self.parquet.metadata.num_rows
        return self.done / rows if rows else None

    def __iter__(self) -> Iterator[Row]:
        try:
            for batch in self.parquet.iter_batches(batch_size=PARQUET_BATCH, columns=["url", "label"]):
                for url, label in zip(_cells_of(batch["url"]), _cells_of(batch["label"]), strict=True):
                    self.done += 1
                    yield row_of(self.done, url, label)
        except self.faults as error:
            raise InputError(f"{self.file.name} cannot be read after row {self.done:,}: {error}.") from None


def _cells_of(column: Any) -> list[object]:
    """The cells of an Arrow array; those whose text is not UTF-8 are their bytes, which `row_of` finds at fault."""
    try:
        cells: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        cells = [_cell_of(value) for value in column]
    return cells


def _cell_of(value: Any) -> object:
    try:
        cell: object = value.as_py()
    except UnicodeDecodeError as error:
        return error.object
    return cell


def _need_columns(file: Path, names: Sequence[str], *, hint: str = "") -> None:
    if missing := {"url", "label"} - set(names):
        raise InputError(
            f"{file.name} has no column {' and no column '.join(sorted(missing))}; it has {list(names)[:50]}.",
            hint=hint,
        )


# --- writing --------------------------------------------------------------------------------------------------------


def write_rows(file: Path, columns: Mapping[str, type], pages: Iterable[Sequence[Sequence[Any]]]) -> int:
    """Write pages of rows to a file that exists whole or not at all; returns how many rows.

    Args:
        columns: name and type (str, int, float, datetime) of each column; times carry their zone.
        pages: rows in the order of `columns`, a page at a time; None is a cell without a value.

    Raises:
        InputError: an unknown ending, or a file that cannot be written.
    """
    writers = {".csv": _csv_writer, ".jsonl": _json_writer, ".parquet": _parquet_writer}
    if file.suffix not in writers:
        raise InputError(f"{file.name} ends in {file.suffix or 'nothing'}; expected {', '.join(ENDINGS)}.")
    count = 0
    with replaced(file) as part, writers[file.suffix](part, columns) as write:
        for page in pages:
            write(page)
            count += len(page)
    return count


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A file beside `file`, which takes its place at the end of the block and vanishes on any exception.

    Raises:
        InputError: it cannot be written, such as a full disk.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(file)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}.", hint="Name another file.") from None
    finally:
        part.unlink(missing_ok=True)


Write = Callable[[Sequence[Sequence[Any]]], None]


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value


@contextmanager
def _csv_writer(file: Path, columns: Mapping[str, type]) -> Iterator[Write]:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        yield lambda page: writer.writerows([_plain(cell) for cell in row] for row in page)
        _to_disk(stream)


@contextmanager
def _json_writer(file: Path, columns: Mapping[str, type]) -> Iterator[Write]:
    with file.open("w", encoding="utf-8") as stream:

        def write(page: Sequence[Sequence[Any]]) -> None:
            for row in page:
                cells = dict(zip(columns, map(_plain, row), strict=True))
                stream.write(json.dumps(cells, ensure_ascii=False) + "\n")

        yield write
        _to_disk(stream)


@contextmanager
def _parquet_writer(file: Path, columns: Mapping[str, type]) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types.get(kind, pa.timestamp("us", tz="UTC"))) for name, kind in columns.items()])
    with file.open("wb") as stream:
        with pq.ParquetWriter(stream, schema) as writer:

            def write(page: Sequence[Sequence[Any]]) -> None:
                cells = [list(column) for column in zip(*page, strict=True)] or [[] for _ in columns]
                writer.write_batch(pa.record_batch(cells, schema=schema))

            yield write
        _to_disk(stream)


def _to_disk(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
