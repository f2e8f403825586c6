"""GPT-2's weights and tokenizers in and out, in the layout of the Hugging Face hub.

python pretrained.py --out_dir=out/shakespeare --folder=FOLDER     a run's model as a folder that transformers loads

A folder has config.json (the sizes), model.safetensors or its shards (the weights), tokenizer.json and
tokenizer_config.json. MiniGPT's parameters have the released names; what differs is that GPT-2's matrices are stored
transposed, (in, out), and that its embedding has no padding.
"""

import base64
import json
import math
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from config import UserError, one_line_errors, read_settings, setting


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    checkpoint: str = setting("", "a file in out_dir; by default best.pt, or last.pt where there is none")
    folder: str = setting("", "folder to write; by default OUT_DIR/pretrained")


if __name__ == "__main__":  # before torch is loaded, which takes seconds: --help and mistakes are answered at once
    with one_line_errors():
        settings = read_settings(Settings, sys.argv[1:], __doc__)

import torch

from checkpoint import refused
from files import write_json
from model import GPTConfig, MiniGPT
from tokenizer import END_OF_TEXT, GPT2_PATTERN, BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "model.safetensors")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# What MiniGPT is, by the names and defaults of transformers' GPT2Config
ARCHITECTURE = {
    "model_type": (None, "gpt2"),
    "activation_function": ("gelu_new", "gelu_new", "gelu_pytorch_tanh"),  # one formula, two names
    "layer_norm_epsilon": (1e-5, 1e-5),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "add_cross_attention": (False, False),
    "tie_word_embeddings": (True, True),
}  # name: (default, accepted, ...)


def missing(package):
    return UserError(f"this needs the package {package}: pip install {package}")


# ---------------------------------------------------------------------------------------------------------------
# In.


def find(name_or_path: str | Path) -> Path:
    """The folder for one of the names in HUB, downloaded if it is not in the hub's cache, or for a path."""
    folder = Path(name_or_path)
    if name_or_path not in HUB or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no {folder / 'config.json'}: expected {', '.join(HUB)}, or a folder with config.json and "
                "model.safetensors, as python pretrained.py and transformers' save_pretrained make them"
            )
        return folder
    try:
        import huggingface_hub
    except ImportError as error:
        raise missing("huggingface_hub") from error
    try:
        return Path(huggingface_hub.snapshot_download(f"openai-community/{name_or_path}", allow_patterns=list(FILES)))
    except Exception as error:  # as many kinds as there are ways for a network to fail
        raise UserError(
            f"{name_or_path} can't be downloaded from the hub ({type(error).__name__}): with a copy of its config.json "
            "and model.safetensors give the folder that has them"
        ) from error


def read_config(folder: Path, block_size: int | None = None, dropout: float = 0.0) -> tuple[GPTConfig, int]:
    """(GPTConfig, number of positions) of folder's config.json. Raises UserError for what is not GPT-2."""
    path = folder / "config.json"
    with refused(path):
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError("not a dictionary")
        differences = [
            f"{name} {theirs.get(name, default)!r}, not {accepted[0]!r}"
            for name, (default, *accepted) in ARCHITECTURE.items()
            if theirs.get(name, default) not in accepted
        ]
        if differences:
            raise UserError(f"{folder} is of another architecture: {', '.join(differences)}")
        sizes = [theirs[name] for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
        if any(type(size) is not int for size in sizes):
            raise ValueError("a size is not a whole number")
        n_positions, *sizes = sizes
        if theirs.get("n_inner") not in (None, 4 * sizes[-1]):
            raise UserError(f"{folder} is of another architecture: n_inner {theirs['n_inner']}, not {4 * sizes[-1]}")
        if block_size and block_size > n_positions:
            raise UserError(
                f"{folder} has positions for {n_positions} tokens, fewer than block_size ({block_size}): "
                f"--block_size={n_positions} is the most"
            )
        return GPTConfig(block_size or n_positions, *sizes, dropout, bias=True), n_positions


def open_weights(folder):
    """{parameter's name: (open file, its name there)} for all of folder's weights."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise missing("safetensors") from error
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).exists() and index.exists():
        with refused(index):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("a file that is not in the folder")
    elif not (folder / names[0]).exists():
        if list(folder.glob("*.bin")):
            raise UserError(
                f"{folder} has its weights as a pickle (.bin), which is not opened because it could run code: if you "
                "trust it, transformers' from_pretrained and save_pretrained turn it into a model.safetensors"
            )
        raise UserError(f"no {folder / names[0]}")
    weights = {}
    for name in names:
        with refused(folder / name):
            file = safe_open(folder / name, framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                if not key.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks, in older files
                    weights[key.removeprefix("transformer.")] = file, key
    return weights


def load_pretrained(name_or_path: str | Path, block_size: int | None = None, dropout: float = 0.0) -> MiniGPT:
    """A MiniGPT in eval mode, in float32 on the CPU, from "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" or from a
    folder in that layout. A block_size that is shorter than the model's crops its positions.

    Raises UserError where there is no such thing, or where it is damaged or of another architecture.
    """
    folder = find(name_or_path)
    config, n_positions = read_config(folder, block_size, dropout)
    weights = open_weights(folder)
    with refused(folder):
        head = weights.pop("lm_head.weight", None)
        if head and not torch.equal(head[0].get_tensor(head[1]), read_tensor(weights, "wte.weight")):
            raise UserError(f"{folder} is of another architecture: its lm_head is not its token embedding")
        if config.n_layer > len(weights):  # before it is built, layer by layer
            raise ValueError(f"{config.n_layer} layers")
        with torch.device("meta"):  # takes no memory
            model = MiniGPT(config)
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        shapes["wte.weight"][0], shapes["wpe.weight"][0] = config.vocab_size, n_positions
        if different := sorted(shapes.keys() ^ weights.keys()):
            raise ValueError(f"{different[0]} is {'missing' if different[0] in shapes else 'not of GPT-2'}")
        for name, (file, key) in weights.items():
            shape = file.get_slice(key).get_shape()
            if shape != (shapes[name][::-1] if name.endswith(TRANSPOSED) else shapes[name]):
                raise ValueError(f"{name} has the shape {shape}")
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, p in model.named_parameters():
                weight = read_tensor(weights, name)
                if not weight.is_floating_point() or not weight.isfinite().all():
                    raise ValueError(f"{name} has values that are not finite numbers")
                rows = min(len(p), len(weight))  # fewer positions, or more tokens
                p[:rows] = weight[:rows]
                p[rows:] = 0
    return model.eval()


def read_tensor(weights, name):
    file, key = weights[name]
    tensor = file.get_tensor(key)
    return tensor.t() if name.endswith(TRANSPOSED) else tensor


def load_pretrained_tokenizer(name_or_path: str | Path) -> ByteTokenizer | None:
    """The tokenizer of a name or folder as in load_pretrained; None if it has none that this program can be sure of."""
    folder = find(name_or_path)
    config, _ = read_config(folder)
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        with suppress(KeyError, TypeError, AttributeError, IndexError, ValueError):  # it may hold anything
            tokenizer = from_fast(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    elif config.vocab_size == 50257:
        tokenizer = load_tokenizer({"tokenizer": "gpt2"})
    return tokenizer if tokenizer and tokenizer.vocab_size == config.vocab_size else None


def check_same_tokens(name: str, vocab_size: int, dataset: dict) -> None:
    """Raise UserError if the token ids of a dataset (its meta data) are not those that the weights called name know."""
    theirs = None
    with suppress(UserError):  # where it can't be had, the number of tokens must do
        theirs = load_pretrained_tokenizer(name)
    same = dataset["vocab_size"] == vocab_size
    if same and theirs:
        ours = load_tokenizer(dataset)
        same = all(ours.decode_bytes([i]) == theirs.decode_bytes([i]) for i in range(vocab_size))
    if not same:
        raise UserError(
            f"the {vocab_size:,} tokens of {name} are not the {dataset['vocab_size']:,} of data/{dataset['dataset']}: "
            f"prepare the text with --tokenizer={'gpt2' if vocab_size == 50257 else name}"
        )


# ---------------------------------------------------------------------------------------------------------------
# Out.


def save_pretrained(model: MiniGPT, folder: str | Path, tokenizer: ByteTokenizer | None = None) -> None:
    """Write model, and its tokenizer if it has one, to folder, where transformers.GPT2LMHeadModel and AutoTokenizer
    find them. config.json comes last: without it a folder that was not written to its end does not look whole."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise missing("safetensors") from error
    config, folder = model.config, Path(folder)
    if tokenizer and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"a tokenizer of {tokenizer.vocab_size} for a model of {config.vocab_size}")
    weights = {}
    for name, p in model.named_parameters():
        p = p.detach().cpu()
        if name == "wte.weight":
            p = p[: config.vocab_size]
        weights["transformer." + name] = (p.t() if name.endswith(TRANSPOSED) else p).contiguous()
        if name.endswith("weight") and not config.bias and not name.startswith(("wte", "wpe")):
            weights[f"transformer.{name.removesuffix('weight')}bias"] = p.new_zeros(len(p))  # GPT-2 always has them

    eos_token = tokenizer.eos_token if tokenizer else None
    fast = to_fast(tokenizer) if tokenizer else None

    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:  # of safetensors' own kind, also for a full disk
        (folder / "model.safetensors").unlink(missing_ok=True)
        raise UserError(f"can't write {folder / 'model.safetensors'}: {error}") from error
    if fast:
        write_json(folder / "tokenizer.json", fast)
        options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
        if eos_token is not None:
            options |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        write_json(folder / "tokenizer_config.json", options | {"clean_up_tokenization_spaces": False})
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "bos_token_id": eos_token,
        "eos_token_id": eos_token,
    })  # fmt: skip
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which safetensors makes for its owner only


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers, as the tokenizer.json of the package tokenizers. There a byte is written as a character: those that are
# printable in Latin-1 as themselves, the others, in their order, as U+0100 and what follows (Radford et al. 2019).

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
TO_CHAR = {b: chr(b) for b in PRINTABLE}
TO_CHAR |= {b: chr(0x100 + n) for n, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
TO_BYTE = {char: b for b, char in TO_CHAR.items()}


def to_chars(token):
    return "".join(TO_CHAR[b] for b in token)


def merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pairs that make the tokens, in the order of ranks. tiktoken merges any two parts that are a token together,
    a tokenizer.json names one pair a token: the two that are left when its bytes are merged by the ranks below its own.
    Raises UserError where the ranks are not those of a byte-pair encoding."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            below = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
            i = below.index(min(below))
            if below[i] >= rank:
                raise UserError(
                    f"this tokenizer has no tokenizer.json: its token {token} is not a pair of earlier ones"
                )
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((to_chars(parts[0]), to_chars(parts[1])))
    return pairs


def to_fast(tokenizer: ByteTokenizer) -> dict:
    """A tokenizer as the contents of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special, pairs, splits, decoder = {}, [], byte_level, byte_level
    if isinstance(tokenizer, CharTokenizer):
        vocab, splits, decoder = {char: i for i, char in enumerate(tokenizer.chars)}, None, {"type": "Fuse"}
    elif isinstance(tokenizer, BPETokenizer):
        meta = tokenizer.meta
        ranks, special = tokenizer.encoding._mergeable_ranks, meta["special_tokens"]
        vocab, pairs = {to_chars(token): rank for token, rank in ranks.items()}, merges(ranks)
        # x{1,3}+ does not give back what it took in tiktoken's expressions, and repeats x{1,3} in those of tokenizers
        pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", meta["pattern"])
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        splits = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    elif type(tokenizer) is ByteTokenizer:
        vocab = {TO_CHAR[b]: b for b in range(256)}
    else:
        raise UserError(f"a {type(tokenizer).__name__} has no form in tokenizer.json: save the model without it")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags} for token, i in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": splits,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": [f"{left} {right}" for left, right in pairs],
        },
    }  # fmt: skip


def from_fast(fast: dict) -> ByteTokenizer:
    """The tokenizer that the contents of a tokenizer.json describe. Raises an Exception for other kinds than to_fast's
    and GPT-2's own."""
    vocab, splits = fast["model"]["vocab"], fast["pre_tokenizer"]
    if fast["model"]["type"] != "BPE" or fast["normalizer"] or fast["model"].get("byte_fallback"):
        raise ValueError("not a byte-level BPE")
    if splits is None:
        if fast["decoder"] != {"type": "Fuse"} or fast["added_tokens"]:
            raise ValueError("not a character tokenizer")
        return load_tokenizer({"tokenizer": "char", "chars": "".join(sorted(vocab, key=vocab.get))})
    parts = splits.get("pretokenizers", [splits])
    if parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"] or len(parts) > 2:
        raise ValueError("not a byte-level BPE")
    special = {token["content"]: token["id"] for token in fast["added_tokens"]}
    ranks = {bytes(TO_BYTE[c] for c in token): i for token, i in vocab.items() if token not in special}
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in fast["model"]["merges"]]
    if pairs != merges(ranks):
        raise ValueError("merges in another order than that of the ids")
    if len(parts) == 2:
        if parts[0]["behavior"] != "Isolated" or parts[0]["invert"] or parts[-1]["use_regex"]:
            raise ValueError("not a byte-level BPE")
        pattern = parts[0]["pattern"]["Regex"]
    elif parts[0].get("use_regex", True):
        pattern = GPT2_PATTERN
    elif not pairs:
        return ByteTokenizer()
    else:
        raise ValueError("a BPE over whole texts")
    lines = "\n".join(f"{base64.b64encode(token).decode()} {i}" for token, i in ranks.items())
    return load_tokenizer({"tokenizer": "bpe", "pattern": pattern, "special_tokens": special, "ranks": lines})


@one_line_errors()
def main(s):
    from sample import find_checkpoint, load_model

    path = find_checkpoint(s.out_dir, s.checkpoint)
    model, tokenizer, state = load_model(path)
    folder = Path(s.folder or path.with_name("pretrained"))
    save_pretrained(model, folder, tokenizer)
    print(f'{folder}: {path} of step {state["step"]}, for transformers.GPT2LMHeadModel.from_pretrained("{folder}")')


if __name__ == "__main__":
    main(settings)
