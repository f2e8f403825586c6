"""Turn text into token files that train.py reads.

python prepare_data.py shakespeare                         tiny Shakespeare, downloaded, a token a character
python prepare_data.py python_docs                         Python's own reference manual: needs no network
python prepare_data.py NAME --input PATH --tokenizer=gpt2  your own UTF-8 text, or JSON lines with a "text" each

PATH is a file, a folder, a pattern in quotes, - for standard input, or hf:OWNER/DATASET[:CONFIG] for a dataset of the
Hugging Face hub; gzip is unpacked. A document is a text file, a JSON line or a row of the hub. The end-of-text token,
if the tokenizer has one, stands between two documents.

Up to 100 text files are split by position: the last tenth of the characters is for validation. Of more files, of JSON
lines and of rows, whole documents are chosen by a hash of their text, so that adding some moves none.

Writes data/NAME/train.bin and val.bin: token ids, one after the other, as little-endian uint16, or uint32 for more than
65,536 of them, with train_00001.bin and so on when they are many; and meta.json, which has the tokenizer. Stopped
half-way, the same command goes on from there.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from config import UserError, one_line_errors, read_settings, setting
from dataset import DATA, shard_name
from files import lock, write_json
from tokenizer import LEARNED, ByteTokenizer, load_tokenizer, train_bpe

CHUNK_BYTES = 1 << 20  # what is read and encoded at a time: memory stays a small multiple of it
SHARD_TOKENS = 1 << 29  # the length of a token file: one or two GiB
SAMPLE_CHARS = 1 << 25  # what a BPE is learned from, at most
JOURNAL_SECONDS = 5  # the work that an interruption costs, at most
MOST_FILES = 100  # text files that are split by position


@dataclass
class Settings:
    name: str = setting("", "the dataset's name: data/NAME is written")
    input: str = setting("", "the text: a file, a folder, ... (default: a built-in dataset called NAME)")
    tokenizer: str = setting(
        "char",
        "char, byte, gpt2 or another tiktoken encoding; bpe:4096, learned from the text; or a model's folder",
    )
    val_share: float = setting(0.1, "share of the text that is for validation", low=0.0, high=0.9)


# ---------------------------------------------------------------------------------------------------------------
# Text. A source has documents; a document is an iterable of its text in chunks.


@dataclass
class Source:
    name: str
    open: Callable  # returns a binary stream, or rows
    size: int | None  # in bytes, where it is known
    rows: bool = False  # JSON lines, or dictionaries: a document each


def shakespeare():
    """Tiny Shakespeare (Karpathy 2015), downloaded and checked."""
    import http.client
    import urllib.request

    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            text = response.read(2_000_000)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"tiny Shakespeare can't be downloaded ({error}); with a copy of it run "
            "python prepare_data.py shakespeare --input FILE, or use python_docs, which needs no network"
        ) from error
    if hashlib.sha256(text).hexdigest() != "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed":
        raise UserError(f"{url} is not tiny Shakespeare: {len(text):,} bytes with another sha256")
    return [Source(url, lambda: io.BytesIO(text), len(text))]


def python_docs():
    """The reference manual that Python carries for its help()."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode("utf-8")
    source = f"the reference manual in Python {sys.version.split()[0]} (pydoc_data.topics)"
    return [Source(source, lambda: io.BytesIO(text), len(text))]


BUILT_IN = {"shakespeare": shakespeare, "python_docs": python_docs}


def find_sources(input: str) -> list[Source]:
    """The sources that --input=input names: files in the order of their names, without hidden ones."""
    if input.startswith("hf:"):
        return [hub(input.removeprefix("hf:"))]
    if input == "-":
        return [standard_input()]
    path = Path(input)
    if path.is_dir():
        paths = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    else:
        paths = [path] if path.exists() else [Path(p) for p in glob.glob(input, recursive=True)]
    paths = sorted(p for p in paths if p.is_file())
    if not paths:
        raise UserError(f"no file or folder {input}, or nothing in it")
    rows = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
    return [Source(str(p), lambda p=p: p.open("rb"), p.stat().st_size, p.name.lower().endswith(rows)) for p in paths]


def standard_input():
    """A copy of it on disk, since it may be read twice: JSON lines if its first line is one, else text."""
    spool = tempfile.NamedTemporaryFile()  # noqa: SIM115 (gone when the process ends)
    shutil.copyfileobj(sys.stdin.buffer, spool)
    spool.flush()

    def open_spool():
        spool.seek(0)
        return io.BufferedReader(io.FileIO(spool.fileno(), closefd=False))

    with open_spool() as raw:
        try:
            rows = "text" in json.loads(unzipped(raw).readline(CHUNK_BYTES * 16))
        except (ValueError, TypeError, OSError, EOFError, zlib.error):
            rows = False
    return Source("standard input", open_spool, os.fstat(spool.fileno()).st_size, rows)


def hub(name):
    """The training split of OWNER/DATASET or OWNER/DATASET:CONFIG, read from the hub as a stream."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("--input hf:... needs the package datasets: pip install datasets") from error
    path, _, config = name.partition(":")

    def rows():
        try:
            yield from datasets.load_dataset(path, config or None, split="train", streaming=True)
        except Exception as error:  # of the network, of a dozen file formats, of a name that is not there
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"hf:{name} can't be read ({type(error).__name__}: {reason})") from error

    return Source(f"hf:{name}", rows, None, rows=True)


def unzipped(raw):
    """The binary stream raw, or what gzip packed in it: no UTF-8 text begins with those two bytes."""
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if packed else raw


def read_documents(sources, on_read=lambda n: None):
    """Yield every document, to be used up before the next; on_read is told how many bytes of the sources are read."""

    def watched(source, raw, items):
        position = 0
        try:
            for item in items:
                on_read(raw.tell() - position)
                position = raw.tell()
                yield item
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{source.name} is damaged: {error}") from error

    for source in sources:
        if source.size is None:
            for document in read_rows(source, source.open()):
                on_read(sum(map(len, document)))
                yield document
            continue
        with source.open() as raw:
            if source.rows:
                yield from read_rows(source, watched(source, raw, unzipped(raw)))
            else:
                yield watched(source, raw, read_text(source, unzipped(raw)))


def read_text(source, stream):
    """Yield the text of a stream in chunks of at most CHUNK_BYTES."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        data = stream.read(CHUNK_BYTES)
        pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            where = offset - pending + error.start
            raise UserError(f"{source.name} is not UTF-8 text: invalid byte at offset {where}") from error
        if not data:
            return
        offset += len(data)
        yield text


def read_rows(source, rows):
    """Yield the "text" of each row, a line of JSON or a dictionary, as a document."""
    for number, row in enumerate(rows, 1):
        try:
            text = (json.loads(row) if isinstance(row, bytes) else row)["text"]
            text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair: replaced, as tiktoken does
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f'{source.name}, line {number}: expected a JSON object with a "text" ({type(error).__name__}: {error})'
            ) from error
        yield [text[i : i + CHUNK_BYTES] for i in range(0, len(text), CHUNK_BYTES)]


def cut(document):
    """Yield a document's text in pieces, cut where a tokenizer would cut anyway.

    No byte-pair encoding has a token with a letter or digit and then white space in it, so the ids of the pieces
    are those of the whole text.
    """
    pending = ""
    for text in document:
        end = len(pending) - 1
        while end > 0 and not (pending[end].isspace() and pending[end - 1].isalnum()):
            end -= 1
        if end <= 0 and len(pending) > CHUNK_BYTES:
            end = len(pending)  # a text without a space: memory must stay bounded
        if end > 0:
            yield pending[:end]
            pending = pending[end:]
        pending += text
    if pending:
        yield pending


def in_batches(documents, n_train, val_share):
    """Yield (split, texts, digest): what is encoded at a time, about CHUNK_BYTES of a split's text.

    texts are (does end of text come before it?, text); digest is the sha256 of all text read until then. The first
    n_train characters are for training. With None, a document goes where the hash of its first piece says.
    """
    batches, lengths, begun = {"train": [], "val": []}, {"train": 0, "val": 0}, set()
    digest, n_chars = hashlib.sha256(), 0
    for document in documents:
        split, starts = None, True
        for text in cut(document):
            data = text.encode("utf-8")
            digest.update(data)
            if n_train is None:
                if split is None:
                    fraction = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
                    split = "val" if fraction < val_share else "train"
                parts = {split: text}
            else:
                head = max(0, n_train - n_chars)
                parts = {"train": text[:head], "val": text[head:]}
                n_chars += len(text)
            for name, part in parts.items():
                if not part:
                    continue
                batches[name].append((starts and name in begun, part))
                lengths[name] += len(part)
                begun.add(name)
                starts = False
                if lengths[name] >= CHUNK_BYTES // 2:
                    yield name, batches[name], digest.copy()
                    batches[name], lengths[name] = [], 0
    for name, texts in batches.items():
        if texts:
            yield name, texts, digest.copy()


def survey(sources, tokenizer):
    """Read all text once. Returns (number of characters, tokenizer made of it: one of LEARNED, or a BPE)."""
    n_chars, units, sample, sample_chars = 0, set(), [], 0
    size = sum(source.size or 0 for source in sources)
    progress = Progress("reading", size)
    for i, document in enumerate(read_documents(sources, progress.add)):
        for j, text in enumerate(cut(document)):
            n_chars += len(text)
            if tokenizer in LEARNED:
                units.update(LEARNED[tokenizer].split(text))
            elif tokenizer.startswith("bpe:") and (i + j) % (1 + size // SAMPLE_CHARS) == 0:  # evenly spread
                text = text[: SAMPLE_CHARS - sample_chars]
                sample_chars += len(text)
                sample.append(text)
    if tokenizer in LEARNED:
        return n_chars, LEARNED[tokenizer](sorted(units))
    return n_chars, train_bpe(sample, int(tokenizer[4:])) if tokenizer.startswith("bpe:") else None


# ---------------------------------------------------------------------------------------------------------------
# Token files. They grow in data/NAME/partial, with a journal of how much of them is sure, and move when all are whole.


class Progress:
    """A line on stderr with share, MB/s and time left, from the second second on; for a total of 0 nobody knows it."""

    def __init__(self, what, total):
        self.what, self.total = what, total
        self.done, self.start, self.shown = 0, time.perf_counter(), 0.0

    def add(self, n):
        self.done += n
        seconds = time.perf_counter() - self.start
        if seconds > 2 and (seconds - self.shown > 0.5 or self.done == self.total):
            self.shown = seconds
            rate = self.done / 1e6 / seconds
            line = f"{self.done / 1e6:,.0f} MB, {rate:.1f} MB/s "
            if self.total:
                left = (self.total - self.done) / 1e6 / max(rate, 1e-9)
                line = (
                    f"{self.done / self.total:4.0%} of {self.total / 1e6:,.0f} MB, {rate:.1f} MB/s, {left:.0f} s left "
                )
            print(f"\r{self.what}: {line}", end="\n" if self.done == self.total else "", file=sys.stderr, flush=True)


class ShardWriter:
    """Appends tokens to the shards of a split in folder, from its token n_tokens on; what was after it is dropped."""

    def __init__(self, folder, split, dtype, n_tokens):
        self.folder, self.split, self.dtype, self.n_tokens = folder, split, dtype, n_tokens
        number = max(0, n_tokens - 1) // SHARD_TOKENS
        self.file = (folder / shard_name(split, number)).open("ab")
        self.file.truncate((n_tokens - number * SHARD_TOKENS) * dtype.itemsize)
        while (later := folder / shard_name(split, number := number + 1)).exists():
            later.unlink()

    def append(self, ids):
        while len(ids):
            if self.n_tokens and self.n_tokens % SHARD_TOKENS == 0:
                self.close()
                self.file = (self.folder / shard_name(self.split, self.n_tokens // SHARD_TOKENS)).open("ab")
            part = ids[: SHARD_TOKENS - self.n_tokens % SHARD_TOKENS]
            self.file.write(part.tobytes())
            self.n_tokens += len(part)
            ids = ids[len(part) :]

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.sync()
        self.file.close()


def go_on(partial, task, batches):
    """Return (journal, batches): what an interrupted preparation of the same task had done, and the batches after it;
    a fresh journal and all batches if there was none or the text is another one."""
    fresh = {"task": task, "batches": 0, "tokens": {"train": 0, "val": 0}, "bytes": {"train": 0, "val": 0}}
    path = partial / "journal.json"
    journal = json.loads(path.read_text(encoding="utf-8")) if path.exists() else fresh
    if journal["task"] == task and journal["batches"]:
        rest = batches()
        last = deque(islice(rest, journal["batches"]), maxlen=1)  # reading is much faster than encoding
        if last and last[0][2].hexdigest() == journal["sha256"]:
            print(f"going on after {sum(journal['bytes'].values()) / 1e6:,.0f} MB of text", file=sys.stderr)
            return journal, rest
    path.unlink(missing_ok=True)  # first: what it speaks of will be overwritten
    return fresh, batches()


def encode(partial, encoder, dtype, journal, batches, workers):
    """Encode batches into the shards in partial, in order, and keep the journal. Returns it."""

    mine = threading.local()

    def begin():  # a tokenizer for each thread: two threads that share one take a quarter longer
        mine.encoder = load_tokenizer(encoder.meta)

    def ids_and_bytes(texts):
        return mine.encoder.encode_texts(texts).astype(dtype), sum(len(text.encode("utf-8")) for _, text in texts)

    writers = {split: ShardWriter(partial, split, dtype, n) for split, n in journal["tokens"].items()}
    saved = time.monotonic()

    def write(split, digest, coming):
        nonlocal saved
        ids, n_bytes = coming.result()
        writers[split].append(ids)
        journal["tokens"][split] += len(ids)
        journal["bytes"][split] += n_bytes
        journal["batches"] += 1
        journal["sha256"] = digest.hexdigest()
        if time.monotonic() - saved >= JOURNAL_SECONDS:
            for writer in writers.values():
                writer.sync()
            write_json(partial / "journal.json", journal)
            saved = time.monotonic()

    queue = deque()  # the pool's own would take in the whole text
    try:
        with ThreadPoolExecutor(workers, initializer=begin) as pool:
            for split, texts, digest in batches:
                queue.append((split, digest, pool.submit(ids_and_bytes, texts)))
                if len(queue) > 2 * workers:
                    write(*queue.popleft())
            while queue:
                write(*queue.popleft())
    finally:
        for writer in writers.values():
            writer.close()
    return journal


def publish(partial, folder):
    """Move a whole dataset from partial to folder. Interrupted, it is to be done again: open_dataset sees to that."""
    meta = json.loads((partial / "meta.json").read_text(encoding="utf-8"))
    for path in partial.glob("*.bin"):
        os.replace(path, folder / path.name)
    for split in ("train", "val"):
        number = max(1, -(-meta[f"{split}_tokens"] // SHARD_TOKENS))
        while (older := folder / shard_name(split, number)).exists():
            older.unlink()
            number += 1
    os.replace(partial / "meta.json", folder / "meta.json")
    shutil.rmtree(partial)
    return meta


def prepare(
    name: str, input: str = "", tokenizer: str = "char", val_share: float = 0.1, workers: int | None = None
) -> dict:
    """Write data/name from the text that input names, or from the built-in dataset name. Returns the meta data."""
    if not name or Path(name).name != name:
        raise UserError(
            f"a dataset needs a plain name, not {name!r}: python prepare_data.py NAME --input PATH, a pattern in quotes"
        )
    if not input and name not in BUILT_IN:
        raise UserError(
            f"{name} is not built in ({', '.join(BUILT_IN)} are): give its text with --input PATH, a file or a folder"
        )
    learned = tokenizer in LEARNED or tokenizer.startswith("bpe:")
    if tokenizer.startswith("bpe:") and not (tokenizer[4:].isdecimal() and 257 <= int(tokenizer[4:]) <= 1 << 20):
        raise UserError(f"--tokenizer={tokenizer}: expected bpe: and the number of tokens, from 257 on, as in bpe:4096")
    if not learned:  # first: it may have to be downloaded
        encoder = ByteTokenizer() if tokenizer == "byte" else load_tokenizer({"tokenizer": tokenizer})
    sources = find_sources(input) if input else BUILT_IN[name]()

    n_train = None
    by_position = len(sources) <= MOST_FILES and not any(source.rows for source in sources)
    if by_position or learned:
        n_chars, of_text = survey(sources, tokenizer)
        encoder = of_text or encoder
        if n_chars < 20:
            raise UserError(f"{input or name} has {n_chars} characters: too few to split into training and validation")
        if by_position:
            n_train = n_chars * round(1e6 * (1 - val_share)) // 10**6
    dtype = np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")

    folder = DATA / name
    partial = folder / "partial"
    partial.mkdir(parents=True, exist_ok=True)
    folder_lock = lock(folder / "lock")  # noqa: F841 (held as long as this name is)
    if (partial / "meta.json").exists():
        publish(partial, folder)
        partial.mkdir()

    def batches():
        progress = Progress("encoding", sum(source.size or 0 for source in sources))
        return in_batches(read_documents(sources, progress.add), n_train, val_share)

    task = [[s.name for s in sources], encoder.meta, n_train, val_share, CHUNK_BYTES, SHARD_TOKENS, dtype.name]
    task = hashlib.sha256(json.dumps(task).encode()).hexdigest()
    journal, rest = go_on(partial, task, batches)
    journal = encode(partial, encoder, dtype, journal, rest, workers or os.cpu_count() or 1)
    for split, n in journal["tokens"].items():
        if n == 0:
            shutil.rmtree(partial)
            raise UserError(
                f"no document of {input} fell into the {split} split: give more documents or another --val_share, or "
                "one text file, which is split by position"
            )
    meta = {
        "dataset": name,
        "source": sources[0].name if len(sources) == 1 else f"{len(sources)} files in {input}",
        "sha256": journal["sha256"],
        "vocab_size": encoder.vocab_size,
        "dtype": dtype.name,
        **{f"{split}_tokens": n for split, n in journal["tokens"].items()},
        **{f"{split}_bytes": n for split, n in journal["bytes"].items()},
        **encoder.meta,
    }
    write_json(partial / "meta.json", meta)
    return publish(partial, folder)


@one_line_errors()
def main():
    settings = read_settings(Settings, sys.argv[1:], __doc__, positional="name")
    sys.setswitchinterval(2e-4)  # else threads with much to encode wait long for the one that reads: JSON lines +20 %
    meta = prepare(settings.name, settings.input, settings.tokenizer, settings.val_share)
    print(
        f"data/{meta['dataset']}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, "
        f"{meta['tokenizer']} tokenizer with a vocabulary of {meta['vocab_size']:,}, from {meta['source']}"
    )


if __name__ == "__main__":
    main()
