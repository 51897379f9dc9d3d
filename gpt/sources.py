"""Files to documents, in an order and in pieces that depend on the text alone; no ids, no split.

A text file is one document, each row of .jsonl, .csv and .parquet is one. Everything streams: files
are read in chunks, long documents come in pieces of at most `PIECE_CHARS`.
"""

import codecs
import csv
import difflib
import glob
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt.config import DataConfig
from gpt.errors import UserError
from gpt.files import open_plain
from gpt.tokenizer import clean_text

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet")
READ_BYTES = 1 << 20
PIECE_CHARS = 1 << 20

_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)
_RUN_FILES = frozenset({"config.yaml", "metrics.jsonl"})
# Cutting here leaves the ids as they are: no pattern of `ranks.PATTERNS` joins what stands before
# with what comes after (o200k_base joins a "/" to the newlines before it, hence no cut there).
_LINE_CUT = re.compile(r"(?<=\S)\n(?=[^\s/])")
_WORD_CUT = re.compile(r"(?<=\S)(?= \S)")
_CUT_WINDOW = 1 << 16


@dataclass(frozen=True)
class Document:
    """One text: where it stands, and how to read it."""

    where: str
    chunks: Callable[[], Iterable[str]]

    def pieces(self) -> Iterator[str]:
        """The text in order, cut where cutting does not change the ids."""
        return cut_pieces(self.chunks())


def source_files(config: DataConfig) -> list[Path]:
    """The files of the source, in an order that does not depend on where they lie.

    Raises UserError for entries that name none, and for an encoding that none could be read in.
    """
    entries = [config.source] if isinstance(config.source, str) else config.source
    found: dict[Path, Path] = {}
    problems: list[str] = []
    for entry in entries:
        try:
            for path in _entry_files(entry):
                found.setdefault(path.resolve(), path)
        except UserError as error:
            problems += error.lines
        except (OSError, RuntimeError) as error:  # a name too long, a folder closed, no such ~user
            problems.append(f"data.source: {entry[:200]} cannot be read: {error}; check the path")
    if problems:
        raise UserError(*problems)
    _text_encoding(config)
    return list(found.values())


def file_stat(path: Path) -> os.stat_result:
    """Size and times of a file of the source; UserError where it is there no more."""
    try:
        return path.stat()
    except OSError as error:
        raise UserError(
            f"data.source: {path} is gone, or closed, since it was found ({error.strerror}); "
            "start again when nothing moves there"
        ) from None


def _entry_files(entry: str) -> list[Path]:
    """The files that one entry names; `UserError` where there are none."""
    path = Path(entry).expanduser()
    if _is_library_name(entry):
        files = [file for file in _walk(stdlib_folder(), _NOT_LIBRARY) if _is_library(file)]
        lack = f"{stdlib_folder()} holds no .py files; this Python comes without its sources"
    elif path.is_dir():
        files = [file for file in _walk(path) if file.suffix.lower() in SUFFIXES]
        lack = f"{entry} holds no {' '.join(SUFFIXES)} files; name the files themselves"
    elif path.exists():
        files, lack = [path], ""
    else:
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns)
        files = [Path(name) for name in names if Path(name).is_file()]
        lack = f"{entry} does not exist{_nearest(path)}"
        if glob.has_magic(entry):
            lack = f"{entry} matches no file; check the pattern"
    if not files:
        raise UserError(f"data.source: {lack}")
    return files


def _nearest(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; check the path"


def _walk(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below a folder in sorted order, each folder once (links).

    Without hidden ones, and without folders of runs (see `rundir`): a run whose own log is its text
    could not go on. OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    files = []
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        is_run = _RUN_FILES.issubset(names) and "checkpoints" in folders and folder != str(root)
        if real in seen or is_run:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in skipped)
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return iter(sorted(files, key=lambda file: file.relative_to(root).parts))


def stdlib_folder() -> Path:
    """Where the interpreter's own library lies."""
    return Path(sysconfig.get_path("stdlib"))


def _is_library(file: Path) -> bool:
    """Whether a file is a source of the library: not one that this machine's build made."""
    return file.suffix == ".py" and not file.name.startswith("_sysconfigdata")


def documents(config: DataConfig, files: Iterable[Path] | None = None) -> Iterator[Document]:
    """All documents in order, empty ones too; `files` are the source's, if they are known."""
    library, encoding = _is_library_name(config.source), _text_encoding(config)
    for path in source_files(config) if files is None else files:
        read = partial(read_text, path, encoding)
        match path.suffix.lower():
            case ".jsonl":
                rows = _jsonl_rows(path, read(), config.text_field)
            case ".csv":
                rows = _csv_rows(path, read(), config.text_field)
            case ".parquet":
                rows = _parquet_rows(path, config.text_field)
            case _:
                if not library or _is_utf8(path):
                    yield Document(str(path), read)
                continue
        for where, text in rows:
            yield Document(where, partial(iter, (clean_text(text),)))


def _text_encoding(config: DataConfig) -> str:
    """The encoding of the files, which is a name that Python knows; the library has its own."""
    name = config.encoding
    if _is_library_name(config.source):
        return "utf-8"
    try:
        "".encode(name)
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        raise UserError(
            f"data.encoding: {name} is not a text encoding that Python knows; name one, like "
            "utf-8, latin-1 or gb18030"
        ) from None
    return name


def _is_library_name(source: str | list[str]) -> bool:
    """Whether that alone is named, and means the library: nothing here is called so."""
    return source == STDLIB and not Path(STDLIB).exists()


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except (UnicodeDecodeError, OSError):
        return False
    return True


def read_text(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """A text file in chunks, its line ends as they are, without a leading byte order mark."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, first = 0, True
    try:
        with open_plain(path) as file:
            while True:
                raw = file.read(READ_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(raw, final=not raw)
                    text.encode()  # some encodings have halves of characters
                except UnicodeError as error:
                    what = f"near byte {offset}: {error}"
                    if isinstance(error, UnicodeDecodeError):
                        wrong = error.object[error.start]
                        what = f"byte {offset - pending + error.start} is 0x{wrong:02x}"
                    raise UserError(
                        f"{path}: not {encoding} text: {what}; convert the file, "
                        "or name its encoding in data.encoding"
                    ) from None
                if "\0" in text:
                    place = offset - pending + len(text[: text.index("\0")].encode(encoding))
                    raise UserError(f"{path}: not text: a NUL at byte {place}; give a text file")
                if text:
                    yield text.removeprefix("\ufeff") if first else text
                    first = False
                offset += len(raw)
                if not raw:
                    return
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; check the path and its rights"
        ) from None


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; only a newline ends one."""
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield f"{line}\n"
    if rest:
        yield rest


def _jsonl_rows(path: Path, chunks: Iterable[str], field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(chunks), 1):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", "nested too deeply, or a number too long")
            raise UserError(
                f"{where}: not valid JSON: {why}; one object a line is needed"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f'{where}: not an object; one like {{"{field}": "..."}} is needed')
        if field not in row:
            raise _no_field(where, field, row)
        yield where, _text_of(row[field], where, field)


def _csv_rows(path: Path, chunks: Iterable[str], field: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(_lines(chunks), strict=True)
    try:
        names = next(rows, [])
        if field not in names:
            raise _no_field(f"{path}:1", field, names)
        column = names.index(field)
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if len(row) not in (0, len(names)):
                raise UserError(
                    f"{where}: {len(row)} fields, where the header has {len(names)}; put text that "
                    'holds commas between "quotes", or mend that line'
                )
            if row:
                yield where, row[column]
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not valid CSV: {error}; fix that line") from None


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet needs pyarrow; install the extra: pip install 'pyarrow'"
        ) from None
    try:
        with open_plain(path) as raw, pq.ParquetFile(raw) as file:
            schema = file.schema_arrow
        if field not in schema.names:
            raise _no_field(str(path), field, schema.names)
        column = schema.types[schema.names.index(field)]
        if pa.types.is_nested(column) or pa.types.is_temporal(column):  # not every one is readable
            raise _not_text(str(path), field, str(column))
        # As a dictionary where the file has one: a text that it repeats is then there once.
        with open_plain(path) as raw, pq.ParquetFile(raw, read_dictionary=[field]) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    where = f"{path}: row {number}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise UserError(
                            f"{where}: not utf-8 text: byte {error.start} is "
                            f"0x{error.object[error.start]:02x}; write the file again as utf-8"
                        ) from None
                    yield where, _text_of(text, where, field)
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable .parquet file: {why}; write it again") from None


def _text_of(value: object, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _not_text(where, field, type(value).__name__)
    return value


def _not_text(where: str, field: str, kind: str) -> UserError:
    return UserError(f"{where}: {field} is {kind}, not text; name another field in data.text_field")


def _no_field(where: str, field: str, names: Iterable[str]) -> UserError:
    shown = ", ".join(list(names)[:10]) or "none"
    return UserError(f"{where}: no field {field!r}; set data.text_field to one of: {shown}")


def cut_pieces(chunks: Iterable[str], limit: int = PIECE_CHARS) -> Iterator[str]:
    """Chunks of any size to pieces of at most `limit` characters; the cuts depend on the text only.

    Cuts after a newline between two other characters, else before a space between two words, so
    that the ids are those of the whole text; a text without either is cut at the limit.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > limit:
            cut = _cut(rest, start, start + limit)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _cut(text: str, start: int, end: int) -> int:
    window = max(start + 1, end - _CUT_WINDOW)
    for pattern in (_LINE_CUT, _WORD_CUT):
        last = 0
        for match in pattern.finditer(text, window, end + 1):
            last = match.end() if match.end() <= end else last
        if last:
            return last
    return end


def source_name(config: DataConfig) -> str:
    """The source as people named it."""
    return config.source if isinstance(config.source, str) else ", ".join(config.source)
