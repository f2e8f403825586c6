"""The token files of prepare_data.py, as train.py reads them.

data/NAME has train.bin and val.bin: token ids, one after the other, as little-endian uint16 or uint32. A split of more
than SHARD_TOKENS goes on in train_00001.bin and so on, each but the last of the same length. meta.json has the
tokenizer and what can be counted.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from config import UserError
from tokenizer import load_tokenizer

DATA = Path("data")


def shard_name(split: str, number: int) -> str:
    return f"{split}_{number:05d}.bin" if number else f"{split}.bin"


class Tokens:
    """The tokens of a split: its shards, memory-mapped, as one array that can be sliced."""

    def __init__(self, paths: list[Path], dtype: np.dtype):
        self.filename = paths[0]
        self.shards = [np.memmap(path, dtype, mode="r").view(np.ndarray) for path in paths]
        self.shard_tokens = len(self.shards[0])
        if any(len(shard) != self.shard_tokens for shard in self.shards[:-1]):
            raise UserError(f"the shards of {paths[0]} are not of one length: prepare the dataset again")

    def __len__(self) -> int:
        return self.shard_tokens * (len(self.shards) - 1) + len(self.shards[-1])

    def __getitem__(self, positions: slice) -> np.ndarray:
        """The tokens at a slice of positions, an array also where they lie in several shards."""
        start, stop, _ = positions.indices(len(self))
        n = self.shard_tokens
        numbers = range(start // n, max(start, stop - 1) // n + 1)
        parts = [self.shards[i][max(0, start - i * n) : max(0, stop - i * n)] for i in numbers if i < len(self.shards)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.shards[0].dtype), *parts])


def fingerprint(tokens: Tokens) -> str:
    """A hash of a split's length and of up to 256 MB of it, in evenly spaced blocks: changes show, and it is quick."""
    itemsize = tokens.shards[0].itemsize
    size, block, count = len(tokens) * itemsize, 1 << 18, 1 << 10
    digest = hashlib.sha256(str(size).encode())
    for i in range(count):
        start = i * size // count if size > block * count else i * block
        if start < size:
            part = tokens[start // itemsize : (start + block) // itemsize + 1].view(np.uint8)
            digest.update(part[start % itemsize :][:block])
    return digest.hexdigest()


def open_dataset(name: str) -> tuple[Tokens, Tokens, dict]:
    """Return (train tokens, validation tokens, meta) of data/name, the tokens as memory-mapped Tokens.

    A folder without meta.json is nanoGPT's: GPT-2 tokens as uint16. Raises UserError for what can't be trained on.
    """
    folder = DATA / name
    if Path(name).name != name or not folder.is_dir():
        raise UserError(f"no dataset {folder}: python prepare_data.py NAME --input PATH makes one")
    if (folder / "partial" / "meta.json").exists():
        raise UserError(f"{folder} was interrupted while its files were replaced: prepare the dataset again")
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
        paths = [folder / f"{split}.bin", *sorted(folder.glob(f"{split}_[0-9][0-9][0-9][0-9][0-9].bin"))]
        if not paths[0].is_file():
            raise UserError(f"no {paths[0]}: prepare the dataset again")
        size = sum(path.stat().st_size for path in paths)
        damaged = any(path.stat().st_size % dtype.itemsize or path.stat().st_size == 0 for path in paths)
        if damaged or size // dtype.itemsize != meta.get(f"{split}_tokens", size // dtype.itemsize):
            raise UserError(f"{paths[0]} has {size:,} bytes, not what it should have: prepare the dataset again")
        splits.append(Tokens(paths, dtype))
    return *splits, meta | {"fingerprint": [fingerprint(tokens) for tokens in splits]}
