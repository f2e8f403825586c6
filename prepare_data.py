"""Turn text into the token files that train.py reads.

python prepare_data.py shakespeare                         tiny Shakespeare, downloaded, one token per character
python prepare_data.py python_docs                         Python's own reference manual: needs no network
python prepare_data.py NAME --input PATH --tokenizer=gpt2  your own text

PATH is a file, a folder, a pattern in quotes, or hf:OWNER/DATASET[:CONFIG] for a dataset of the Hugging Face hub. Files
are UTF-8 text, gzipped or not; .jsonl and .json files have JSON objects with a "text" each, one per line or in an array
(which is read whole). A document is a text file, an object or a row of the hub; the end-of-text token, if the tokenizer
has one, separates documents. Up to 100 text files are split by position: the last tenth of the characters is for
validation. Otherwise a hash of a document's text says to which split it goes, so adding documents moves none.

Writes data/NAME/train.bin and val.bin, token ids as little-endian uint16 (uint32 if there are more than 65,536), and
meta.json with the tokenizer. An interrupted preparation leaves the previous dataset NAME as it was, and starts again.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
import time
import urllib.request
import zlib
from collections import defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from support.checkpoint import lock, write_json
from support.dataset import DATA
from support.pretrained import load_pretrained_tokenizer
from support.settings import UserError, optional, run_script, setting, user_error
from support.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer, train_bpe

CHUNK_CHARS = 1 << 20  # read at a time: memory stays a small multiple of it
AHEAD = 2 * (os.cpu_count() or 1)  # batches of half as much that wait for a thread
SAMPLE_CHARS = 1 << 25  # what a BPE is learned from, at most
MOST_FILES = 100  # text files that are split by position
WORD_END = re.compile(r".*[^\W_](?=\s)", re.DOTALL)  # up to the last letter or digit before white space
JSON = re.compile(r"\.(json|jsonl|ndjson)(\.gz)?$", re.IGNORECASE)


@dataclass
class Settings:
    name: str = setting("", "name of the dataset: data/NAME is written")
    input: str = setting("", "your text: a file, a folder, a pattern in quotes or hf:OWNER/DATASET")
    tokenizer: str = setting("char", "char, byte, gpt2 or another of tiktoken's, bpe:4096 (learned), a model's folder")
    val_share: float = setting(0.1, "share of the text for validation", low=0.001, high=0.9)


def shakespeare() -> tuple[str, str]:
    """(source, text) of tiny Shakespeare (Karpathy 2015), downloaded and checked."""
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    hint = "python prepare_data.py shakespeare --input FILE takes a copy of it; python_docs needs no network"
    with user_error("tiny Shakespeare can't be downloaded", Exception, advice=hint):  # a network fails in many ways
        with urllib.request.urlopen(url, timeout=20) as response:
            text = response.read(2_000_000)
        if hashlib.sha256(text).hexdigest() != "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed":
            raise ValueError(f"{url} has another text")
    return url, text.decode("utf-8")


def python_docs() -> tuple[str, str]:
    """(source, text) of the reference manual that Python carries for its help()."""
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return f"the reference manual in Python {sys.version.split()[0]} (pydoc_data.topics)", text


BUILT_IN = {"shakespeare": shakespeare, "python_docs": python_docs}
Source = namedtuple("Source", "name read size")  # read(name) yields (does a document begin?, text); size 0: unknown


def find_sources(name: str, input: str) -> list[Source]:
    """What --input=input names, files sorted by path and without hidden ones; without input, the built-in text name."""
    if not input:
        source, text = BUILT_IN[name]()
        return [Source(source, lambda _: [(True, text)], 0)]
    if input.startswith("hf:"):
        return [Source(input, read_hub, 0)]
    pattern = glob.escape(input) + "/**" * Path(input).is_dir() if Path(input).exists() else input
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not paths:
        raise UserError(f"no file or folder {input}, or nothing in it")
    return [Source(str(p), read_json if JSON.search(p.name) else read_text, p.stat().st_size) for p in paths]


@contextmanager
def opened(path):
    """The binary file at path, unzipped if it is gzip. Damage found while it is read is a UserError."""
    with open(path, "rb") as raw, user_error(f"{path} is damaged", EOFError, zlib.error, gzip.BadGzipFile):
        file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw  # never in UTF-8
        try:
            yield file
        except UnicodeDecodeError as error:
            offset = file.tell() - len(error.object) + error.start
            hint = f"if it is Latin-1, convert it: iconv -f latin1 -t utf-8 {path} > OUT"
            raise UserError(f"{path} is not UTF-8 text: invalid byte at offset {offset}; {hint}") from error


def read_text(path):
    """A text file, without a byte-order mark, in pieces that end between a letter or digit and white space.

    No byte-pair encoding has a token with these two in a row, so the ids of the pieces are those of the whole text.
    """
    with opened(path) as file:
        decoded, text, starts = io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), "", True
        while chunk := decoded.read(CHUNK_CHARS):
            head = WORD_END.match(text)
            end = head.end() if head else len(text) * (len(text) > CHUNK_CHARS)  # no space: memory must stay bounded
            if end > 0:
                yield starts, text[:end]
                starts = False
            text = text[end:] + chunk
        if text:
            yield starts, text


def read_json(path):
    """A file of JSON objects, one per line or in an array."""
    with opened(path) as file:
        is_array = file.peek(4).removeprefix(b"\xef\xbb\xbf").startswith(b"[")
        for number, line in enumerate([file.read()] if is_array else file, 1):
            problem = f'{path}, line {number}: expected JSON objects with a "text" each, one per line or in an array'
            with user_error(problem, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                if not line.isspace():
                    for row in json.loads(line) if is_array else [json.loads(line)]:
                        yield True, text_of(row)


def read_hub(input):
    """The training split of hf:OWNER/DATASET or hf:OWNER/DATASET:CONFIG, streamed."""
    load_dataset = optional("datasets").load_dataset
    path, _, config = input.removeprefix("hf:").partition(":")
    with user_error(f"{input} can't be read", Exception):  # the network, a dozen file formats, a name that is not there
        for row in load_dataset(path, config or None, split="train", streaming=True):
            yield True, text_of(row)


def text_of(row):
    """row["text"]; half a surrogate pair is replaced, as tiktoken does."""
    return row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_all(sources, doing):
    """Yield what the sources' read functions yield, with a line of progress on stderr every 5 seconds."""
    size, n_chars, shown = sum(source.size for source in sources), 0, time.monotonic()
    for source in sources:
        for starts, text in source.read(source.name):
            yield starts, text
            n_chars += len(text)
            if time.monotonic() > shown + 5:
                shown = time.monotonic()
                total = f" of {size / 1e6:,.0f} MB" if size else ""
                print(f"{doing}: {n_chars / 1e6:,.0f} million characters{total}", file=sys.stderr, flush=True)


def survey(sources: list[Source], tokenizer: str) -> tuple[int, ByteTokenizer | None]:
    """Read all text once. Returns its number of characters and, if the tokenizer is made of the text, the tokenizer."""
    n_chars, chars, sample, room = 0, set(), [], SAMPLE_CHARS
    stride = 1 + sum(source.size for source in sources) // SAMPLE_CHARS
    for i, (_, text) in enumerate(read_all(sources, "reading")):
        n_chars += len(text)
        if tokenizer == "char":
            chars.update(text)
        elif tokenizer.startswith("bpe:") and i % stride == 0:  # evenly spread
            sample.append(text[:room])
            room -= len(sample[-1])
    if tokenizer == "char":
        return n_chars, CharTokenizer(sorted(chars))
    return n_chars, train_bpe(sample, int(tokenizer[4:])) if tokenizer.startswith("bpe:") else None


class TokenFile:
    """A file of token ids: encode makes them from batches of texts, in the threads of pool."""

    def __init__(self, path, pool, encode):
        self.file, self.pool, self.encode = path.open("wb"), pool, encode
        self.batch, self.n_chars, self.futures, self.n_tokens, self.n_bytes = [], 0, deque(), 0, 0

    def add(self, starts, text):
        if text:
            self.batch.append((starts and self.n_bytes > 0, text))
            self.n_bytes += len(text.encode("utf-8"))
            self.n_chars += len(text)
        if self.n_chars >= CHUNK_CHARS // 2:
            self.write(AHEAD)

    def write(self, ahead=0):  # at most `ahead` batches stay unfinished
        self.futures.append(self.pool.submit(self.encode, self.batch))
        self.batch, self.n_chars = [], 0
        while len(self.futures) > ahead:
            ids = self.futures.popleft().result()
            self.file.write(ids)
            self.n_tokens += len(ids)

    def close(self):
        self.write()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def open_tokenizer(name: str) -> ByteTokenizer | None:
    """The tokenizer called name, or that of a model's folder; None for one that is made of the text."""
    if name == "char" or (re.fullmatch(r"bpe:\d+", name) and int(name[4:]) > 256):
        return None
    if not (file := Path(name) / "tokenizer.json").is_file():
        return load_tokenizer({"tokenizer": name})
    if tokenizer := load_pretrained_tokenizer(name):
        return tokenizer
    raise UserError(f"{file} is not a tokenizer that this program can read, or not the model's")


def prepare(name: str, input: str = "", tokenizer: str = "char", val_share: float = 0.1, workers: int = 0) -> dict:
    """Write data/name from input or the built-in text name, with `workers` threads (0: all cores). Returns its meta."""
    if not name or Path(name).name != name or not (input or name in BUILT_IN):
        need = f"(only {' and '.join(BUILT_IN)} need no --input)"
        raise UserError(f"expected a plain name and a text: python prepare_data.py NAME --input PATH {need}")
    encoder = open_tokenizer(tokenizer)  # first: it may have to be downloaded
    sources = find_sources(name, input)
    by_position = len(sources) <= MOST_FILES and not any(source.read in (read_json, read_hub) for source in sources)
    if by_position or encoder is None:
        n_chars, learned = survey(sources, tokenizer)
        n_train = n_chars * round(1e6 * (1 - val_share)) // 10**6
        encoder = encoder or learned
    dtype = np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")
    folder, partial, digest = DATA / name, DATA / name / "partial", hashlib.sha256()
    partial.mkdir(parents=True, exist_ok=True)
    tokenizers = defaultdict(lambda: load_tokenizer(encoder.meta))  # per thread: sharing one costs a quarter

    def encode(texts):
        return tokenizers[threading.get_ident()].encode_texts(texts).astype(dtype)

    with lock(folder / "lock"), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        train, val = (TokenFile(partial / f"{split}.bin", pool, encode) for split in ("train", "val"))
        for starts, text in read_all(sources, "encoding"):
            data = text.encode("utf-8")
            digest.update(data)
            if starts and not by_position:
                fraction = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
                n_train = 0 if fraction < val_share else sys.maxsize  # the whole document
            train.add(starts, text[:n_train])
            val.add(starts, text[n_train:])
            n_train = max(0, n_train - len(text))
        train.close()
        val.close()
        if min(train.n_tokens, val.n_tokens) < 2:
            counts = f"{train.n_tokens} training and {val.n_tokens} validation tokens"
            raise UserError(f"{counts} are too few: give more text or documents, or another --val_share")
        source = sources[0].name if len(sources) == 1 else f"{len(sources)} files in {input}"
        meta = {"dataset": name, "source": source, "sha256": digest.hexdigest(), "vocab_size": encoder.vocab_size}
        meta |= {"dtype": dtype.name, "train_tokens": train.n_tokens, "val_tokens": val.n_tokens}
        meta |= {"train_bytes": train.n_bytes, "val_bytes": val.n_bytes} | encoder.meta
        write_json(partial / "meta.json", meta)  # until it moves, open_dataset refuses the dataset
        for file in ("train.bin", "val.bin", "meta.json"):
            os.replace(partial / file, folder / file)
        shutil.rmtree(partial)
    return meta


def main(s: Settings) -> None:
    sys.setswitchinterval(2e-4)  # else threads with much to encode wait long for the one that reads: JSON lines +20 %
    meta = prepare(s.name, s.input, s.tokenizer, s.val_share)
    counts = f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
    print(f"data/{s.name}: {counts}, vocabulary of {meta['vocab_size']:,} ({meta['tokenizer']}), from {meta['source']}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__, OSError, positional="name")
