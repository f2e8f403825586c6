"""Turn text into token files that train.py reads.

python prepare_data.py shakespeare                         tiny Shakespeare, downloaded, a token a character
python prepare_data.py python_docs                         Python's own reference manual: needs no network
python prepare_data.py NAME --input PATH --tokenizer=gpt2  your own UTF-8 text: a file, or a folder of files

Writes data/NAME/train.bin (the first 90 % of the characters) and val.bin (the rest): token ids, one after the
other, as little-endian uint16, or uint32 for more than 65,536 of them; and meta.json, which has the tokenizer.
"""

import base64
import codecs
import hashlib
import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from config import UserError, one_line_errors, read_settings, setting

DATA = Path("data")
CHUNK_BYTES = 1 << 20  # what is read and encoded at a time: memory stays a small multiple of it


@dataclass
class Settings:
    name: str = setting("", "the dataset's name: data/NAME is written")
    input: str = setting("", "a UTF-8 text file or a folder of them (default: a built-in dataset called NAME)")
    tokenizer: str = setting(
        "char", "char, byte, gpt2, any other tiktoken encoding, or the folder of a model to fine-tune"
    )


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers. Each has encode(str) -> list of ids, decode(ids) -> str, decode_bytes(ids) -> UTF-8 bytes,
# vocab_size, eos_token (the id of end of text, or None), encode_array(str) -> numpy array of ids, and meta: what
# load_tokenizer needs to build it again.


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token."""

    vocab_size = 256
    eos_token = None
    meta = {"tokenizer": "byte"}  # noqa: RUF012 (never changed)

    def encode_array(self, text):
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids):
        return bytes(ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class CharTokenizer(ByteTokenizer):
    """Every character is a token: its place in `chars`, which is sorted."""

    def __init__(self, chars):
        self.meta = {"tokenizer": "char", "chars": chars}
        self.vocab_size = len(chars)
        self.chars = chars
        self.codes = np.frombuffer(chars.encode("utf-32-le"), np.uint32)

    def encode_array(self, text):
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        unknown = self.codes[ids] != codes
        if unknown.any():
            char = text[unknown.argmax()]
            raise UserError(
                f"the character {char!r} (U+{ord(char):04X}) is not one of the {self.vocab_size} that the text "
                "of this tokenizer had; --tokenizer=byte or gpt2 knows them all"
            )
        return ids

    def decode_bytes(self, ids):
        return "".join(self.chars[i] for i in ids).encode("utf-8")


class BPETokenizer(ByteTokenizer):
    """Byte-pair encoding (Sennrich et al. 2016; over bytes: Radford et al. 2019), done by tiktoken."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eos_token = encoding._special_tokens.get("<|endoftext|>")
        self.bytes = {rank: token for token, rank in encoding._mergeable_ranks.items()}
        self.bytes |= {rank: token.encode("utf-8") for token, rank in encoding._special_tokens.items()}

    @property
    def meta(self):  # the whole vocabulary, so that a checkpoint can be sampled from where it can't be downloaded
        lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in self.encoding._mergeable_ranks.items())
        return {
            "tokenizer": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
            "ranks": "\n".join(lines),  # as in a .tiktoken file
        }

    def encode_array(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids):
        return b"".join(self.bytes.get(i, b"") for i in ids)  # some encodings leave ids unused


def load_tokenizer(meta):
    """The tokenizer that meta describes: a dataset's meta.json, or a checkpoint's "tokenizer" entry."""
    name = meta["tokenizer"]
    if name == "char":
        if list(meta["chars"]) != sorted(set(meta["chars"])):
            raise UserError("the characters of this tokenizer are not sorted: prepare the dataset again")
        return CharTokenizer(meta["chars"])
    if name == "byte":
        return ByteTokenizer()
    if (Path(name) / "tokenizer.json").is_file():  # of a model in the layout of the hub
        from pretrained import load_pretrained_tokenizer

        if tokenizer := load_pretrained_tokenizer(name):
            return tokenizer
        raise UserError(f"{Path(name) / 'tokenizer.json'} is not of a kind that this program knows, or not the model's")
    import tiktoken  # here: the other tokenizers do without

    if "ranks" in meta:
        ranks = (line.split() for line in meta["ranks"].split("\n"))
        ranks = {base64.b64decode(token): int(rank) for token, rank in ranks}
        special = meta["special_tokens"]
        if not all(0 <= i < 2 * (len(ranks) + 500) for i in (*ranks.values(), *special.values())):
            raise UserError("the ids of this tokenizer are not those of a vocabulary: prepare the dataset again")
        return BPETokenizer(
            tiktoken.Encoding(name, pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=special)
        )
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(["char", "byte", *tiktoken.list_encoding_names()])
        raise UserError(f"unknown tokenizer {name}: expected one of {known}")
    try:
        return BPETokenizer(tiktoken.get_encoding(name))
    except Exception as error:  # requests' and urllib3's many, or a damaged file
        raise UserError(
            f"the vocabulary of {name} can't be downloaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a "
            "folder that has it, or use --tokenizer=byte"
        ) from error


# ---------------------------------------------------------------------------------------------------------------
# Text. A document is (where it came from, a function that opens it as a binary stream, its size in bytes).


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
    return [(url, lambda: io.BytesIO(text), len(text))]


def python_docs():
    """The reference manual that Python carries for its help()."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode("utf-8")
    source = f"the reference manual in Python {sys.version.split()[0]} (pydoc_data.topics)"
    return [(source, lambda: io.BytesIO(text), len(text))]


BUILT_IN = {"shakespeare": shakespeare, "python_docs": python_docs}


def files(path):
    """A document for the file path, or for each file in the folder path that is not hidden, in the order of names."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no file or folder {path}")
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return [(str(p), lambda p=p: p.open("rb"), p.stat().st_size) for p in paths]


def read_text(documents, on_bytes=lambda data: None):
    """Yield (document number, piece of text) for all documents; pieces are at most CHUNK_BYTES bytes."""
    for number, (source, open_document, _) in enumerate(documents):
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0
        with open_document() as stream:
            while True:
                data = stream.read(CHUNK_BYTES)
                pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    where = offset - pending + error.start
                    raise UserError(f"{source} is not UTF-8 text: invalid byte at offset {where}") from error
                on_bytes(data)
                if not data:
                    break
                offset += len(data)
                yield number, text


def encodable(documents, n_train):
    """Yield (document number, split, text): read_text's pieces, cut where a tokenizer would cut anyway.

    No byte-pair encoding has a token with a letter or digit and then white space in it, so the ids of the pieces
    are those of the whole text. The first n_train characters are the training split.
    """
    done = 0
    pending, current = "", 0

    def split(text):
        head = max(0, n_train - done)
        return [(current, name, part) for name, part in (("train", text[:head]), ("val", text[head:])) if part]

    for number, text in read_text(documents):
        if number != current:
            yield from split(pending)
            done += len(pending)
            pending, current = "", number
        pending += text
        cut = len(pending) - 1
        while cut > 0 and not (pending[cut].isspace() and pending[cut - 1].isalnum()):
            cut -= 1
        if cut == 0 and len(pending) > CHUNK_BYTES:
            cut = len(pending)  # a text without a space: memory must stay bounded
        yield from split(pending[:cut])
        done += cut
        pending = pending[cut:]
    yield from split(pending)


# ---------------------------------------------------------------------------------------------------------------


class Progress:
    """A line on stderr with share, MB/s and time left, from the second second on."""

    def __init__(self, what, total):
        self.what, self.total = what, total
        self.done, self.start, self.shown = 0, time.perf_counter(), 0.0

    def add(self, n):
        self.done += n
        seconds = time.perf_counter() - self.start
        if seconds > 2 and (seconds - self.shown > 0.5 or self.done >= self.total):
            self.shown = seconds
            left = seconds * (self.total - self.done) / max(1, self.done)
            print(
                f"\r{self.what}: {self.done / max(1, self.total):4.0%} of {self.total / 1e6:,.0f} MB, "
                f"{self.done / 1e6 / seconds:.1f} MB/s, {left:.0f} s left ",
                end="" if self.done < self.total else "\n",
                file=sys.stderr,
                flush=True,
            )


def prepare(name, input="", tokenizer="char"):
    """Write data/name from the text at the path input, or from the built-in dataset name. Returns the meta data."""
    if not name or Path(name).name != name:
        raise UserError(f"a dataset needs a plain name, not {name!r}: python prepare_data.py NAME --input PATH")
    if not input and name not in BUILT_IN:
        raise UserError(
            f"{name} is not built in ({', '.join(BUILT_IN)} are): give its text with --input PATH, a file or a folder"
        )
    if tokenizer not in ("char", "byte"):
        encoder = load_tokenizer({"tokenizer": tokenizer})  # first: it may have to be downloaded
    documents = files(input) if input else BUILT_IN[name]()
    size = sum(document[2] for document in documents)

    # Once through to check the text and count it, once more to encode it: neither keeps more than a chunk.
    digest, chars, n_chars = hashlib.sha256(), set(), 0
    progress = Progress("reading", size)
    for _, text in read_text(documents, digest.update):
        chars.update(text)
        n_chars += len(text)
        progress.add(len(text.encode("utf-8")))
    if n_chars < 20:
        raise UserError(f"{input or name} has {n_chars} characters: too few to split into training and validation")
    if tokenizer == "char":
        encoder = CharTokenizer("".join(sorted(chars)))
    elif tokenizer == "byte":
        encoder = ByteTokenizer()
    dtype = np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")

    folder = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / "meta.json", folder / "train.bin", folder / "val.bin"]  # a folder with tokens has their meaning
    beside = [path.with_name(path.name + ".tmp") for path in outputs]
    try:
        tokens, n_bytes = {"train": 0, "val": 0}, {"train": 0, "val": 0}
        pieces = encodable(documents, n_train=n_chars * 9 // 10)
        progress, last = Progress("encoding", size), 0
        workers = os.cpu_count() or 1
        with beside[1].open("wb") as train, beside[2].open("wb") as val, ThreadPoolExecutor(workers) as pool:
            while group := list(islice(pieces, workers)):  # map alone would read the whole text ahead
                arrays = pool.map(encoder.encode_array, [text for _, _, text in group])
                for (number, split, text), ids in zip(group, arrays, strict=True):
                    if number != last and encoder.eos_token is not None:  # between documents
                        ids = np.concatenate([[encoder.eos_token], ids])
                    last = number
                    ids.astype(dtype).tofile(train if split == "train" else val)
                    tokens[split] += len(ids)
                    n_bytes[split] += len(text.encode("utf-8"))
                    progress.add(len(text.encode("utf-8")))
        source = documents[0][0] if len(documents) == 1 else f"{len(documents)} files in {input}"
        meta = {
            "dataset": name,
            "source": source,
            "sha256": digest.hexdigest(),
            "vocab_size": encoder.vocab_size,
            "dtype": dtype.name,
            **{f"{split}_tokens": n for split, n in tokens.items()},
            **{f"{split}_bytes": n for split, n in n_bytes.items()},
            **encoder.meta,
        }
        with beside[0].open("w", encoding="utf-8", newline="\n") as file:
            json.dump(meta, file, indent=1, ensure_ascii=True)
        for path, temporary in zip(outputs, beside, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in beside:
            temporary.unlink(missing_ok=True)
    return meta


def fingerprint(tokens):
    """A hash of an array's length and of up to 256 MB of it, in evenly spaced blocks: changes show, and it is quick."""
    data = tokens.view(np.uint8)
    block, count = 1 << 18, 1 << 10
    digest = hashlib.sha256(str(len(data)).encode())
    for i in range(count):
        start = i * len(data) // count if len(data) > block * count else i * block
        digest.update(data[start : start + block])
    return digest.hexdigest()


def open_dataset(name):
    """Return (train tokens, validation tokens, meta) of data/name, the tokens as memory-mapped arrays.

    A folder without meta.json is nanoGPT's: GPT-2 tokens as uint16. Raises UserError for what can't be trained on.
    """
    folder = DATA / name
    if Path(name).name != name or not folder.is_dir():
        raise UserError(f"no dataset {folder}: python prepare_data.py NAME --input PATH makes one")
    meta = {"dataset": name, "source": f"{folder}, prepared by nanoGPT", "tokenizer": "gpt2", "dtype": "uint16"}
    meta["vocab_size"] = 50257
    if (folder / "meta.json").exists():
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype {meta['dtype']}")
            if meta["vocab_size"] != load_tokenizer(meta).vocab_size:
                raise ValueError("vocab_size is not the tokenizer's")
            if not all(
                type(meta[f"{split}_{what}"]) is int for split in ("train", "val") for what in ("tokens", "bytes")
            ):
                raise ValueError("the counts are not numbers")
            if type(meta["source"]) is not str or meta["val_bytes"] < 1:
                raise ValueError("no source or no bytes")
        except Exception as error:  # it may hold anything
            raise UserError(f"{folder / 'meta.json'} is damaged ({error}): prepare the dataset again") from error
    elif (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} has nanoGPT's character-level form, whose meta.pkl is a pickle and is not opened: prepare "
            f"the text again, python prepare_data.py {name} --input {folder / 'input.txt'}"
        )
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    splits = []
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if not path.is_file():
            raise UserError(f"no {path}: prepare the dataset again")
        size = path.stat().st_size
        if (
            size == 0
            or size % dtype.itemsize
            or size // dtype.itemsize != meta.get(f"{split}_tokens", size // dtype.itemsize)
        ):
            raise UserError(f"{path} has {size:,} bytes, not what it should have: prepare the dataset again")
        splits.append(np.memmap(path, dtype, mode="r"))
    return *splits, meta | {"fingerprint": [fingerprint(tokens) for tokens in splits]}


@one_line_errors()
def main():
    settings = read_settings(Settings, sys.argv[1:], __doc__, positional="name")
    meta = prepare(settings.name, settings.input, settings.tokenizer)
    print(
        f"data/{meta['dataset']}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, "
        f"{meta['tokenizer']} tokenizer with a vocabulary of {meta['vocab_size']:,}, from {meta['source']}"
    )


if __name__ == "__main__":
    main()
