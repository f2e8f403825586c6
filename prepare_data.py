"""Turn text into the token files that train.py reads.

python prepare_data.py shakespeare        tiny Shakespeare, downloaded, one token per character
python prepare_data.py python_docs        Python's own reference manual: needs no network
python prepare_data.py NAME --input PATH --tokenizer=gpt2                    your own text
python prepare_data.py NAME --input codes.npy --tokenizer=ids:1024           your own token ids

PATH is a file, a folder, a pattern in quotes, or hf:OWNER/DATASET[:CONFIG] for a dataset of the
Hugging Face hub. A file, gzipped or not, is one of these:

- text in UTF-8, or with the byte-order mark of UTF-16: one document
- .jsonl or .json: objects, one per line or in an array, each a document in its "text"
- .csv or .tsv, with --field=COLUMN: rows, each a document

--field=NAME takes another key of the objects. The tokenizer's end-of-text token separates
documents. Up to 100 text files are split by position: the last tenth of the characters, or
--val_share of them, is for validation. Otherwise each document goes to one split by a hash of its
text (its first million characters), so that adding documents moves none.

Writes data/NAME/train.bin and val.bin, token ids as little-endian uint16 (uint32 for vocabularies
of more than 65,536), and meta.json with the tokenizer. Until it has finished, the previous dataset
NAME stays; an interrupted preparation starts over.
"""

import hashlib
import os
import re
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from support.bpe import train_bpe
from support.checkpoint import lock, write_json
from support.dataset import DATA, is_plain_name, open_dataset, token_dtype, write_ids
from support.pretrained import find_tokenizer
from support.settings import UserError, run_script, setting
from support.sources import BUILT_IN, CHUNK_CHARS, Pieces, Source, find_sources, read_all
from support.tokenizer import END_OF_TEXT, CharTokenizer, IdsTokenizer, Tokenizer, load_tokenizer

# Text is read in pieces, (is_new, text): is_new is True for the first piece of a document.

BATCH_CHARS = CHUNK_CHARS // 2  # pieces are collected for a thread until they have this many
BATCHES_AHEAD = 2 * (os.cpu_count() or 1)  # batches of a split that may wait for a thread
SAMPLE_CHARS = 1 << 25  # a BPE is learned from at most this many
MAX_FILES = 100  # text files that are split by position


@dataclass
class Settings:
    name: str = setting("", "name of the dataset: data/NAME is written")
    input: str = setting("", "your text: a file, a folder, a pattern in quotes or hf:OWNER/DATASET")
    tokenizer: str = setting(
        "char",
        "char, byte, bpe:4096 (learned), gpt2 or another of tiktoken's, a run's or model's folder; "
        "ids:1024 for token ids in a .npy or a raw file",
    )
    field: str = setting("", "where the text is in a JSON object, by default text, or a CSV row")
    special_tokens: bool = setting(
        False, "read special tokens in the text, such as <|endoftext|>, as such: if you trust it"
    )
    val_share: float = setting(0.1, "share of the text for validation", low=0.001, high=0.9)


def existing_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer called name, or that of a folder; None for one to be made from the text."""
    if name == "char":
        return None
    bpe = re.fullmatch(r"bpe:(\d+)", name)
    if bpe and int(bpe[1]) > 256:
        return None
    return find_tokenizer(name)  # which refuses a smaller bpe:N too


def first_pass(sources: list[Source], tokenizer: str, count: bool) -> tuple[int, Tokenizer | None]:
    """Read the text once: its number of characters, and its own tokenizer for char and bpe:N.

    Without count, reading ends when the tokenizer needs no more.
    """
    n_chars = 0
    chars = set()
    sample = []
    room = SAMPLE_CHARS
    # A BPE learns from every stride-th piece, so that the sample spans the text. Of gzipped files,
    # and of the hub, whose lengths are not known, it is from the beginning.
    stride = 1 + sum(source.size for source in sources) // SAMPLE_CHARS
    is_bpe = tokenizer.startswith("bpe:")
    for i, (_, text) in enumerate(read_all(sources, "reading")):
        n_chars += len(text)
        if tokenizer == "char":
            chars.update(text)
        elif is_bpe and room > 0 and i % stride == 0:
            sample.append(text[:room])
            room -= len(sample[-1])
        if is_bpe and room == 0 and not count:
            break
    if tokenizer == "char":
        return n_chars, CharTokenizer(sorted(chars))
    if is_bpe:
        return n_chars, train_bpe(sample, int(tokenizer.removeprefix("bpe:")))
    return n_chars, None


def split_by_position(pieces: Pieces, n_train: int) -> Iterator[tuple[str, bool, str]]:
    """Yield (split, is_new, text): the first n_train characters are for training."""
    for is_new, text in pieces:
        if n_train > 0:
            yield "train", is_new, text[:n_train]
        if len(text) > n_train:
            yield "val", is_new, text[n_train:]
        n_train = max(0, n_train - len(text))


def split_by_hash(pieces: Pieces, val_share: float) -> Iterator[tuple[str, bool, str]]:
    """Yield (split, is_new, text): whole documents, by a hash of their first piece."""
    for is_new, text in pieces:
        if is_new:
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            fraction = int.from_bytes(digest[:8], "big") / 2**64
            split = "val" if fraction < val_share else "train"
        yield split, is_new, text


class TokenFile:
    """Writes text to a file as token ids, which the threads of pool compute by encode(batch).

    encode also inserts the end-of-text tokens.
    """

    def __init__(self, file: BinaryIO, pool: Executor, encode: Callable):
        self.file = file
        self.pool = pool
        self.encode = encode
        self.batch = []  # (whether an end-of-text token comes first, text)
        self.batch_chars = 0
        self.encoded = deque()  # one future per batch, in order
        self.n_documents = 0
        self.n_bytes = 0
        self.n_tokens = 0

    def add(self, is_new: bool, text: str) -> None:
        """Add a piece of text; is_new where a document begins."""
        if not text:
            return
        if is_new:
            self.n_documents += 1
        self.batch.append((is_new and self.n_bytes > 0, text))
        self.batch_chars += len(text)
        self.n_bytes += len(text.encode("utf-8"))
        if self.batch_chars >= BATCH_CHARS:
            self.write(BATCHES_AHEAD)

    def write(self, ahead: int = 0) -> None:
        """Hand the batch to a thread, then write batches until at most `ahead` are waiting."""
        self.encoded.append(self.pool.submit(self.encode, self.batch))
        self.batch = []
        self.batch_chars = 0
        while len(self.encoded) > ahead:
            ids = self.encoded.popleft().result()
            self.file.write(ids.tobytes())
            self.n_tokens += len(ids)

    def finish(self) -> None:
        """Write the rest, and wait until it is on the disk."""
        self.write()
        self.file.flush()
        os.fsync(self.file.fileno())


def notes_on(text: str, tokenizer: Tokenizer) -> set[str]:
    """What the user should know about a piece of the text."""
    notes = set()
    if "\r\n" in text:
        notes.add(r"lines end in \r\n, and the model learns that; sed 's/\r$//' cuts the \r")
    if tokenizer.special_in_text:
        return notes
    for marker in {END_OF_TEXT, *tokenizer.special_tokens}:
        if marker in text and marker in tokenizer.special_tokens:
            notes.add(f"{marker} in the text is ordinary text without --special_tokens=True")
        elif marker in text:
            notes.add(f"{marker} in the text is no token of this tokenizer")
    return notes


def write_splits(
    folder: Path,
    pieces: Iterator[tuple[str, bool, str]],
    tokenizer: Tokenizer,
    workers: int,
) -> dict[str, str | int]:
    """Write the tokens of pieces to train.bin and val.bin in folder. Returns digest and counts."""
    dtype = token_dtype(tokenizer.vocab_size)
    thread = threading.local()

    def start_thread():
        # a copy, with the same options: threads that share one are slower
        thread.tokenizer = load_tokenizer(tokenizer.meta)

    def encode(batch):
        return thread.tokenizer.encode_texts(batch).astype(dtype)

    digest = hashlib.sha256()
    notes = set()
    with (
        open(folder / "train.bin", "wb") as train_file,
        open(folder / "val.bin", "wb") as val_file,
        ThreadPoolExecutor(workers, initializer=start_thread) as pool,
    ):
        train = TokenFile(train_file, pool, encode)
        val = TokenFile(val_file, pool, encode)
        for split, is_new, text in pieces:
            file = train if split == "train" else val
            file.add(is_new, text)
            digest.update(text.encode("utf-8"))
            notes |= notes_on(text, tokenizer)
        train.finish()
        val.finish()
    if max(train.n_documents, val.n_documents) > 1 and tokenizer.eos_token is None:
        notes.add(
            "nothing separates documents: unlike bpe:4096 and gpt2, this tokenizer has no "
            "end-of-text token"
        )
    for note in sorted(notes):
        print(f"note: {note}", file=sys.stderr)
    if min(train.n_tokens, val.n_tokens) < 2:
        raise UserError(
            f"{train.n_tokens} training and {val.n_tokens} validation tokens are too few: "
            "give more text or documents, or another --val_share"
        )
    return {
        "sha256": digest.hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "train_tokens": train.n_tokens,
        "val_tokens": val.n_tokens,
        "train_bytes": train.n_bytes,
        "val_bytes": val.n_bytes,
    }


@contextmanager
def new_dataset(name: str) -> Iterator[Path]:
    """A folder for new files. When they are complete, they replace those of data/name."""
    folder = DATA / name
    new = folder / "partial"
    new.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock"):  # until the file is closed
        yield new
        # meta.json is written last and moved last: while it is in partial/, the files may be half
        # replaced, and open_dataset refuses them.
        for file in ("train.bin", "val.bin", "meta.json"):
            os.replace(new / file, folder / file)
        shutil.rmtree(new)


def write_meta(
    folder: Path, name: str, source: str, tokenizer: Tokenizer, counts: dict[str, str | int]
) -> dict:
    """Write meta.json, which describes a dataset, to folder. Returns what it says."""
    meta = {"dataset": name, "source": source, **counts, **tokenizer.meta}
    write_json(folder / "meta.json", meta)
    return meta


def prepare(
    name: str,
    input: str = "",
    tokenizer: str = "char",
    val_share: float = 0.1,
    field: str = "",
    special_tokens: bool = False,
    workers: int = 0,
) -> dict:
    """Write data/name from input or the built-in text name. Returns its meta.

    Parameters as in Settings; workers: threads that encode, 0 for all cores. Raises UserError.
    """
    if not is_plain_name(name) or not (input or name in BUILT_IN):
        raise UserError(
            "expected a plain name and a text: python prepare_data.py NAME --input PATH "
            f"(only {' and '.join(BUILT_IN)} need no --input)"
        )
    text_tokenizer = existing_tokenizer(tokenizer)  # first: it may have to be downloaded
    if isinstance(text_tokenizer, IdsTokenizer):
        with new_dataset(name) as folder:
            counts = write_ids(folder, Path(input), text_tokenizer.vocab_size, val_share)
            return write_meta(folder, name, input, text_tokenizer, counts)

    sources = find_sources(name, input, field)
    by_position = len(sources) <= MAX_FILES and all(source.is_document for source in sources)
    if by_position or text_tokenizer is None:
        n_chars, learned = first_pass(sources, tokenizer, count=by_position)
        if text_tokenizer is None:
            text_tokenizer = learned
    if special_tokens and not text_tokenizer.special_tokens:
        raise UserError(
            f"--tokenizer={tokenizer} has no special tokens: bpe:4096, gpt2 and model folders do"
        )
    text_tokenizer.special_in_text = special_tokens
    pieces = read_all(sources, "encoding")
    if by_position:
        # in whole numbers, since 90 * 0.7 is 62.99999999999999
        n_train = n_chars * round(1e6 * (1 - val_share)) // 10**6
        pieces = split_by_position(pieces, n_train)
    else:
        pieces = split_by_hash(pieces, val_share)

    source = sources[0].name if len(sources) == 1 else f"{len(sources)} files in {input}"
    if workers == 0:
        workers = os.cpu_count()
    with new_dataset(name) as folder:
        counts = write_splits(folder, pieces, text_tokenizer, workers)
        return write_meta(folder, name, source, text_tokenizer, counts)


def main(s: Settings) -> None:
    # By default Python switches threads every 5 ms. Switching more often lets the thread that reads
    # keep those that encode busy: JSON lines take a fifth less time.
    sys.setswitchinterval(2e-4)
    meta = prepare(s.name, s.input, s.tokenizer, s.val_share, s.field, s.special_tokens)
    print(
        f"data/{s.name}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation "
        f"tokens, vocabulary of {meta['vocab_size']:,} ({meta['tokenizer']}), from {meta['source']}"
    )
    tokens, _, _ = open_dataset(s.name)
    first = tokens[:12].tolist()
    tokenizer = load_tokenizer(meta)
    if not isinstance(tokenizer, IdsTokenizer):
        first = [tokenizer.decode([i]) for i in first]
    print(f"the first tokens: {first}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__, positional="name", user_errors=(OSError,))
