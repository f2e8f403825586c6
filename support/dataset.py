"""What prepare_data.py writes to data/NAME, as train.py reads it.

train.bin and val.bin hold token ids, one after the other, as little-endian uint16 or uint32;
meta.json has the tokenizer, the counts, and the source and sha256 of the text. For token ids of
your own, a meta.json of {"vocab_size": 1024, "dtype": "uint16"} is enough.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from support.settings import UserError, user_error
from support.tokenizer import load_tokenizer

DATA = Path("data")


def is_plain_name(name: str) -> bool:
    """Whether data/name is a folder directly in data/."""
    return name not in ("", "..") and Path(name).name == name


def open_dataset(name: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(training tokens, validation tokens, meta) of data/name; the tokens are memory-mapped, (n,).

    A folder without meta.json may be nanoGPT's: GPT-2 tokens as uint16. Raises UserError for
    damage.
    """
    folder = DATA / name
    if not is_plain_name(name) and (Path(name) / "train.bin").exists():
        raise UserError(f"--dataset={name} is a path: expected the name of a folder in {DATA}")
    if not is_plain_name(name) or not folder.is_dir():
        command = f"python prepare_data.py {name or 'NAME'} --input PATH"
        raise UserError(
            f"no {folder} here: {command} makes it; config/shakespeare.py needs no preparation"
        )
    if (folder / "partial" / "meta.json").exists():
        raise UserError(f"an interruption left {folder} half replaced: prepare the dataset again")
    meta = read_meta(folder)
    splits = []
    for split in ("train", "val"):
        tokens = open_tokens(folder / f"{split}.bin", meta["dtype"])
        meta.setdefault(f"{split}_tokens", len(tokens))
        if len(tokens) != meta[f"{split}_tokens"]:
            raise UserError(f"{folder / split}.bin has a wrong size: prepare the dataset again")
        splits.append(tokens)
    return *splits, meta


def check_length(meta: dict[str, Any], block_size: int) -> None:
    """Raise UserError where a split of a dataset is too short for a window and its last target."""
    for split in ("train", "val"):
        n = meta[f"{split}_tokens"]
        if n <= block_size:
            raise UserError(
                f"data/{meta['dataset']}/{split}.bin has only {n} tokens; block_size {block_size} "
                f"needs at least {block_size + 1}: give more text or a smaller --block_size"
            )


def read_meta(folder: Path) -> dict[str, Any]:
    """What folder/meta.json says, with the dataset's name. Raises UserError for a damaged one."""
    path = folder / "meta.json"
    if (folder / "meta.pkl").exists() and not path.exists():
        raise UserError(
            f"{folder / 'meta.pkl'} is a pickle, which is not opened: prepare the text itself again"
        )
    if not path.exists():
        check_looks_like_gpt2(folder)
        return {
            "dataset": folder.name,
            "source": f"nanoGPT's {folder}",
            "tokenizer": "gpt2",
            "vocab_size": 50257,
            "dtype": "uint16",
        }
    # it may hold anything
    with user_error(f"{path} is damaged", Exception, advice="prepare the dataset again"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta["dataset"] = folder.name
        meta.setdefault("source", str(folder))
        meta.setdefault("tokenizer", "ids")
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {meta['dtype']}")
        if meta["vocab_size"] != load_tokenizer(meta).vocab_size:
            raise ValueError("its vocab_size is not that of its tokenizer")
        if meta.get("val_bytes", 1) <= 0 or not meta["source"]:
            raise ValueError("its val_bytes or source is empty")
    return meta


def check_looks_like_gpt2(folder: Path) -> None:
    """Raise UserError unless the folder's name or its ids look like text in GPT-2's tokens."""
    if folder.name.startswith("openwebtext") or "gpt2" in folder.name:
        return
    highest = open_tokens(folder / "train.bin", "uint16")[: 1 << 20].max()
    if not 30_000 < highest < 50_257:
        raise UserError(
            f"{folder} has no meta.json, and its ids, up to {highest}, are not GPT-2's: write "
            f'{{"vocab_size": {highest + 1}, "dtype": "uint16"}} to {folder / "meta.json"}, '
            "with the right size"
        )


def open_tokens(path: Path, dtype: str) -> np.ndarray:
    """The token ids in a file, memory-mapped. Raises UserError where it is missing or not whole."""
    dtype = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % dtype.itemsize > 0:
        raise UserError(
            f"{path} is missing or has a wrong size ({size:,} bytes): prepare the dataset again"
        )
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that token ids have in a file."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_ids(folder: Path, path: Path, vocab_size: int, val_share: float) -> dict[str, str | int]:
    """Write the token ids in the file at path, a .npy or raw, to train.bin and val.bin in folder.

    Returns digest and counts. Raises UserError for ids outside the vocabulary.
    """
    dtype = token_dtype(vocab_size)
    if path.suffix == ".npy":
        with user_error(f"{path} can't be read", OSError, ValueError, EOFError):
            ids = np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)
    else:
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % dtype.itemsize > 0:
            raise UserError(
                f"{path} has {size:,} bytes: expected token ids of {dtype.itemsize} bytes each, "
                "or a .npy file"
            )
        ids = open_tokens(path, dtype.name)
    if ids.dtype.kind not in "iu":
        raise UserError(f"{path} has {len(ids)} values of type {ids.dtype}: expected whole numbers")
    n_train = len(ids) - max(2, round(len(ids) * val_share))
    if n_train < 2:
        raise UserError(f"{path} has only {len(ids)} ids: give more, or a smaller --val_share")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"{path} has ids from {ids.min()} to {ids.max()}: not within {vocab_size}")
    digest = hashlib.sha256()
    for split, part in (("train", ids[:n_train]), ("val", ids[n_train:])):
        with open(folder / f"{split}.bin", "wb") as file:
            for start in range(0, len(part), 1 << 24):
                data = part[start : start + (1 << 24)].astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
    return {
        "sha256": digest.hexdigest(),
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "train_tokens": n_train,
        "val_tokens": len(ids) - n_train,
    }
