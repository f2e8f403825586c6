"""Where text comes from: files, folders, datasets of the Hugging Face hub and two built-in texts.

A source's text is read as pieces (is_new, text): is_new is True where a document begins, and a
document may be several pieces.
"""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import re
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TextIO

from support.settings import UserError, optional, user_error

CHUNK_CHARS = 1 << 20  # read at a time: memory stays a small multiple of it
PROGRESS_SECONDS = 5
# up to the last letter or digit before white space
WORD_END = re.compile(r".*[^\W_](?=\s)", re.DOTALL)
JSON = re.compile(r"\.(json|jsonl|ndjson)(\.gz)?$", re.IGNORECASE)
CSV = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
GZIP_MARK = b"\x1f\x8b"
# UTF-32's begins with UTF-16's, so it comes first
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}

# how files begin that are not text
SIGNATURES = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive, as .docx, .xlsx and .epub are",
    b"\xd0\xcf\x11\xe0": "a document of an old Office program",
    b"PAR1": "a Parquet file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x93NUMPY": "an array of NumPy",
}

Pieces = Iterable[tuple[bool, str]]


@dataclass
class Source:
    name: str
    read: Callable[[], Pieces]
    size: int = 0  # in bytes, 0 where it is not known
    is_document: bool = True  # one text, not rows that are a document each


def shakespeare() -> tuple[str, str]:
    """(source, text) of tiny Shakespeare (Karpathy 2015), downloaded and checked."""
    url = (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    advice = (
        "python prepare_data.py shakespeare --input FILE uses a copy of it; "
        "python_docs needs no network"
    )
    # a network fails in many ways
    with user_error("tiny Shakespeare can't be downloaded", Exception, advice=advice):
        with urllib.request.urlopen(url, timeout=20) as response:
            text = response.read(2_000_000)
        if hashlib.sha256(text).hexdigest() != sha256:
            raise ValueError(f"{url} has another text")
    return url, text.decode("utf-8")


def python_docs() -> tuple[str, str]:
    """(source, text) of the reference manual that Python carries for its help()."""
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    version = sys.version.split()[0]
    return f"the reference manual in Python {version} (pydoc_data.topics)", text


BUILT_IN = {"shakespeare": shakespeare, "python_docs": python_docs}


def find_sources(name: str, input: str, field: str = "") -> list[Source]:
    """What input names: a file, folder, pattern or hf:DATASET; without it the built-in text name.

    field: of a row in JSON, CSV or a dataset of the hub, where its text is; by default "text". In a
    folder, files that are not text are skipped and named. Raises UserError where there is nothing.
    """
    if not input:
        source, text = BUILT_IN[name]()
        return [Source(source, lambda: [(True, text)])]
    if input.startswith("hf:"):
        return [Source(input, partial(read_hub, input, field), is_document=False)]
    sources = []
    skipped = []
    files = find_files(input)
    for path in files:
        kind = kind_of_file(path)
        if kind and len(files) == 1:
            advice = "convert it to text first"
            if "NumPy" in kind:
                advice = "token ids need --tokenizer=ids:N"
            raise UserError(f"{path} is not text, it seems to be {kind}: {advice}")
        if kind:
            skipped.append(f"{path} ({kind})")
        else:
            sources.append(file_source(path, field))
    if skipped:
        names = ", ".join(skipped[:3])
        if len(skipped) > 3:
            names += ", ..."
        print(f"note: {len(skipped)} skipped, not text: {names}", file=sys.stderr)
    if not sources:
        raise UserError(f"no text in {input}")
    if field and all(source.is_document for source in sources):
        raise UserError(f"--field is for .jsonl, .json, .csv and .tsv files, not for {input}")
    return sources


def find_files(input: str) -> list[Path]:
    """The files that input names, sorted by path, without hidden ones in a folder.

    One that has several names, by links, counts once.
    """
    pattern = input
    if Path(input).exists():
        pattern = glob.escape(input)
    if Path(input).is_dir():
        pattern += "/**"
    files = {}
    for path in sorted(Path(path) for path in glob.glob(pattern, recursive=True)):
        if path.is_file():
            files.setdefault(path.resolve(), path)
    if not files:
        raise UserError(f"no file or folder {input}, or nothing in it")
    return list(files.values())


def kind_of_file(path: Path) -> str:
    """What a file seems to be by its first bytes, "" for text."""
    with user_error(f"can't read {path}", OSError):
        head = first_bytes(path, open)
    if head.startswith(GZIP_MARK):
        with user_error(f"{path} is damaged", OSError, EOFError, zlib.error):
            head = first_bytes(path, gzip.open)
    if head[257:262] == b"ustar":
        return "a tar archive"
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if b"\x00" not in head or head.startswith(tuple(BYTE_ORDER_MARKS)):
        return ""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "binary data"
    return ""


def first_bytes(path: Path, open_file: Callable) -> bytes:
    with open_file(path, "rb") as file:
        return file.read(4096)


def file_source(path: Path, field: str) -> Source:
    """The text or the rows in a file."""
    size = path.stat().st_size
    if JSON.search(path.name):
        return Source(str(path), partial(read_json, path, field), size, is_document=False)
    if CSV.search(path.name) and field:
        return Source(str(path), partial(read_csv, path, field), size, is_document=False)
    if CSV.search(path.name):
        print(f"note: {path} is read as it is; --field=COLUMN takes a column", file=sys.stderr)
    return Source(str(path), partial(read_text, path), size)


def read_all(sources: list[Source], doing: str) -> Iterator[tuple[bool, str]]:
    """All pieces of the sources; says on stderr every few seconds how far it is."""
    size = sum(source.size for source in sources)
    total = f" of {size / 1e6:,.0f} MB" if size else ""
    n_chars = 0
    shown = time.monotonic()
    for source in sources:
        for is_new, text in source.read():
            yield is_new, text
            n_chars += len(text)
            if time.monotonic() > shown + PROGRESS_SECONDS:
                shown = time.monotonic()
                progress = f"{doing}: {n_chars / 1e6:,.0f} million characters{total}"
                print(progress, file=sys.stderr, flush=True)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file at path as text: UTF-8, or as its byte-order mark says; unzipped if it is gzip.

    Raises UserError where it is damaged or no such text, also while it is read. Line ends stay.
    """
    with (
        open(path, "rb") as raw,
        user_error(f"{path} is damaged", EOFError, zlib.error, gzip.BadGzipFile),
    ):
        file = raw
        if raw.peek(2)[:2] == GZIP_MARK:  # never in text
            file = gzip.GzipFile(fileobj=raw)
        head = file.read(4)
        file.seek(0)
        encoding = "utf-8"
        for mark, marked in BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                encoding = marked
                break
        try:
            yield io.TextIOWrapper(file, encoding=encoding, newline="\n")
        except UnicodeDecodeError as error:
            offset = file.tell() - len(error.object) + error.start
            kind = encoding.upper().removesuffix("-SIG")
            raise UserError(
                f"{path} is not {kind} text: invalid byte at offset {offset}; if it is Western "
                f"text from Windows: iconv -f cp1252 -t utf-8 {path} > OUT; Chinese text may be "
                "gb18030, Japanese cp932"
            ) from error


def read_text(path: Path) -> Pieces:
    """The text file at path, in pieces that end between a letter or digit and white space.

    No byte-pair encoding has a token with these two in a row, so the ids of the pieces are those of
    the whole text. Only a tokenizer.json that puts a mark before each text does so for each piece.
    """
    is_new = True
    text = ""
    with open_text(path) as file:
        while chunk := file.read(CHUNK_CHARS):
            word_end = WORD_END.match(text)
            end = 0
            if word_end:
                end = word_end.end()
            elif len(text) > CHUNK_CHARS:  # no place to cut, but memory must stay bounded
                end = len(text)
            if end > 0:
                yield is_new, text[:end]
                is_new = False
            text = text[end:] + chunk
    if text:
        yield is_new, text


def read_json(path: Path, field: str = "") -> Pieces:
    """The file at path of JSON objects, a document each: one per line, or in an array.

    An array is read into memory as a whole.
    """
    problem = "expected JSON objects with text, one per line or in an array"
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            is_array = number == 1 and line.startswith("[")
            if is_array:
                line += file.read()
            if line.isspace():
                continue
            kinds = (ValueError, TypeError, AttributeError, RecursionError)
            with user_error(f"{path}, line {number}: {problem}", *kinds):
                rows = json.loads(line)
                if not is_array:
                    rows = [rows]
                for row in rows:
                    yield True, text_of(row, field)


def read_csv(path: Path, field: str) -> Pieces:
    """A column of the CSV file at path, whose first line has the names; a document per row."""
    csv.field_size_limit(2**31 - 1)  # characters in a cell; the default is 131,072
    with open_text(path) as file:
        names = file.readline()
    delimiter = max(",;\t", key=names.count)  # the most frequent of these
    with open_text(path) as file, user_error(f"{path} is not a CSV file", csv.Error):
        for number, row in enumerate(csv.DictReader(file, delimiter=delimiter), 1):
            with user_error(f"{path}, row {number}", ValueError, TypeError, AttributeError):
                text = text_of(row, field)
            yield True, text


def read_hub(input: str, field: str = "") -> Pieces:
    """The training split of hf:OWNER/DATASET or hf:OWNER/DATASET:CONFIG, streamed."""
    load_dataset = optional("datasets").load_dataset
    path, _, config = input.removeprefix("hf:").partition(":")
    # the network, a dozen file formats, a name that does not exist
    with user_error(f"{input} can't be read", Exception):
        for row in load_dataset(path, config or None, split="train", streaming=True):
            yield True, text_of(row, field)


def text_of(row: dict[str, Any], field: str) -> str:
    """row[field], by default row["text"]; half a surrogate pair is replaced, as tiktoken does."""
    if not field:
        field = "text"
    if field not in row:
        raise ValueError(f"no {field} here; choose by --field one of {', '.join(map(str, row))}")
    text = row[field]
    if isinstance(text, list):
        raise ValueError(f"{field} is a list: join it to one text, with marks between the parts")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
