"""What prepare_data.py writes to data/NAME, as train.py reads it.

train.bin and val.bin hold token ids, one after the other, as little-endian uint16 or uint32; meta.json has the
tokenizer, the counts, and the source and sha256 of the text.
"""

import json
from pathlib import Path

import numpy as np

from support.settings import UserError, user_error
from support.tokenizer import load_tokenizer

DATA = Path("data")


def open_dataset(name: str, block_size: int = 0) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return (training tokens, validation tokens, meta) of data/name, the tokens as memory-mapped arrays of shape (n,).

    A folder without meta.json is nanoGPT's: GPT-2 tokens as uint16. Raises UserError for damage and too few tokens.
    """
    folder = DATA / name
    if Path(name).name != name or not folder.is_dir():
        command = f"python prepare_data.py {name or 'NAME'} --input PATH"
        raise UserError(f"no {folder} here: {command} makes it; config/shakespeare.py needs no preparation")
    if (folder / "partial" / "meta.json").exists():
        raise UserError(f"an interruption left {folder} half replaced: prepare the dataset again")
    meta = dict(dataset=name, source=f"nanoGPT's {folder}", tokenizer="gpt2", vocab_size=50257, dtype="uint16")
    if (path := folder / "meta.json").exists():
        with user_error(f"{path} is damaged", Exception, advice="prepare the dataset again"):  # it may hold anything
            meta = json.loads(path.read_text(encoding="utf-8")) | {"dataset": name}
            same_size = meta["vocab_size"] == load_tokenizer(meta).vocab_size
            if not (same_size and meta["dtype"] in ("uint16", "uint32") and meta["val_bytes"] > 0 and meta["source"]):
                raise ValueError("its entries do not agree")
    elif (folder / "meta.pkl").exists():
        raise UserError(f"{folder / 'meta.pkl'} is a pickle, which is not opened: prepare the text itself again")
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    splits = []
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size / dtype.itemsize != meta.setdefault(f"{split}_tokens", size // dtype.itemsize):
            raise UserError(f"{path} is missing or has a wrong size ({size:,} bytes): prepare the dataset again")
        splits.append(np.memmap(path, dtype, mode="r").view(np.ndarray))
        if len(splits[-1]) <= block_size:
            needed = f"block_size {block_size} needs at least {block_size + 1}: give more text"
            raise UserError(f"{path} has only {len(splits[-1])} tokens; {needed} or a smaller --block_size")
    return *splits, meta
