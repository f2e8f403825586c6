"""GPT-2's weights and tokenizers in and out, in the layout of the Hugging Face hub.

A model folder has config.json (the sizes), model.safetensors or its shards (the weights), tokenizer.json and
tokenizer_config.json. MiniGPT's parameters have the released names, but GPT-2's matrices are stored transposed,
(in, out), and its token embedding has no padding.
"""

import json
import operator
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
import torch

from model import GPTConfig, MiniGPT
from support.checkpoint import write_json
from support.settings import UserError, optional, user_error
from support.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)
SIZES = (
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
)  # as GPTConfig and config.json call them, in GPTConfig's order
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# What MiniGPT is, in the names of transformers' GPT2Config, whose defaults these are
ARCHITECTURE = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
ARCHITECTURE |= dict.fromkeys(("scale_attn_weights", "tie_word_embeddings"), True)
ARCHITECTURE |= dict.fromkeys(("scale_attn_by_inverse_layer_idx", "add_cross_attention"), False)


def read_json(path: Path) -> dict[str, Any]:
    with user_error(f"{path} can't be read", OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def open_folder(name_or_path: str | Path) -> tuple[Path, GPTConfig]:
    """The folder for a path, or for a name in HUB (downloaded unless the hub's cache has it), and the sizes in its
    config.json. Raises UserError if it is missing, damaged or of another architecture."""
    folder = Path(name_or_path)
    if name_or_path in HUB and not folder.is_dir():
        hub = optional("huggingface_hub")
        with user_error(
            f"{name_or_path} can't be downloaded", Exception, advice="give its folder instead"
        ):
            folder = Path(
                hub.snapshot_download(
                    f"openai-community/{name_or_path}", allow_patterns=list(FILES)
                )
            )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"no {folder / 'config.json'}: expected {', '.join(HUB)}, or a folder with it and the weights"
        )
    hf_config = read_json(folder / "config.json")
    with user_error(
        f"{folder / 'config.json'} has sizes that no GPT-2 can have",
        KeyError,
        TypeError,
        ValueError,
    ):
        config = GPTConfig(
            *(operator.index(hf_config[name]) for name in ("n_positions", *SIZES)), bias=True
        )
    for name, value in {**ARCHITECTURE, "n_inner": 4 * config.n_embd}.items():
        if hf_config.get(name) not in (
            None,
            value,
            {"gelu_new": "gelu_pytorch_tanh"}.get(value),
        ):  # the same formula
            raise UserError(
                f"{folder} is of another architecture: {name} {hf_config[name]!r}, not {value!r}"
            )
    return folder, config


def open_weights(folder: Path, config: GPTConfig) -> dict[str, Any]:
    """{parameter's name: tensor, read when indexed by [...]} of a folder's weights. Raises UserError where they can't
    be read, or don't have the sizes of config.json."""
    safetensors = optional("safetensors")
    index, shards, weights = folder / "model.safetensors.index.json", {"": "model.safetensors"}, {}
    if not (folder / "model.safetensors").exists():
        if not index.exists():
            raise UserError(
                f"{folder} has no {index.name}; if it has a pickle (.bin), let transformers save it again"
            )
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or any(
            Path(str(name)).name != name for name in shards.values()
        ):
            raise UserError(f"{index} does not name files in its folder")
    for name in set(shards.values()):
        with user_error(f"{folder / name} can't be read", OSError, safetensors.SafetensorError):
            file = safetensors.safe_open(folder / name, framework="pt")
            for key in file.keys():  # noqa: SIM118
                if not key.endswith(
                    (".attn.bias", ".attn.masked_bias")
                ):  # the causal masks in older files
                    weights[key.removeprefix("transformer.")] = file.get_slice(key)
    # Compared before a model is built, which would be as large as config.json says.
    expected = {
        "wte.weight": [config.vocab_size, config.n_embd],
        "wpe.weight": [config.block_size, config.n_embd],
    }
    found, last = (
        {name: weights[name].get_shape() for name in expected if name in weights},
        f"h.{config.n_layer - 1}.",
    )
    if expected | found != expected or not any(name.startswith(last) for name in weights):
        raise UserError(
            f"{folder}: its config.json asks for {expected} and {last}*, its weights have others"
        )
    return weights


def as_in_file(name: str, p: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """A parameter, or the part of it that GPT-2's files have, as they have it: a view without gradient."""
    p = p.detach()[: config.vocab_size] if name == "wte.weight" else p.detach()
    return p.transpose(0, -1) if name.endswith(TRANSPOSED) else p


def load_pretrained(
    name_or_path: str | Path, block_size: int | None = None, dropout: float = 0.0
) -> MiniGPT:
    """A MiniGPT in eval mode, in float32 on the CPU, from "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" or from a
    model folder. A block_size that is shorter than the model's crops its positions.

    Raises UserError where there is no such model, or where it is damaged or of another architecture.
    """
    folder, config = open_folder(name_or_path)
    weights = open_weights(folder, config)
    if block_size and block_size > config.block_size:
        raise UserError(
            f"{folder} has positions for {config.block_size} tokens: that is the largest --block_size"
        )
    model = MiniGPT(replace(config, block_size=block_size or config.block_size, dropout=dropout))
    parameters = dict(model.named_parameters())
    head = weights.pop("lm_head.weight", None)
    if different := sorted(parameters.keys() ^ weights.keys()):
        raise UserError(f"{folder} does not fit MiniGPT: only one of them has {different[0]}")
    if head is not None and not torch.equal(head[...], weights["wte.weight"][...]):
        raise UserError(
            f"{folder} is of another architecture: its lm_head is not its token embedding"
        )
    model.wte.weight.detach()[model.config.vocab_size :] = 0  # the padding
    for name, p in parameters.items():
        p = as_in_file(name, p, model.config)
        weight = weights[name][: len(p)] if name == "wpe.weight" else weights[name][...]
        if weight.shape != p.shape:
            raise UserError(
                f"{folder}: {name} has the shape {list(weight.shape)}, not {list(p.shape)}"
            )
        if not (weight.is_floating_point() and weight.float().isfinite().all()):
            raise UserError(f"{folder}: {name} has values that are not finite numbers")
        p.copy_(weight)
    return model.eval()


def load_pretrained_tokenizer(name_or_path: str | Path) -> Tokenizer | None:
    """The tokenizer of a name or folder as in load_pretrained; None if it is missing or from_fast does not know it."""
    (folder, config), tokenizer = open_folder(name_or_path), None
    if (folder / "tokenizer.json").exists():
        with suppress(
            LookupError, TypeError, AttributeError, ValueError, OverflowError
        ):  # it may hold anything
            tokenizer = from_fast(read_json(folder / "tokenizer.json"))
    elif config.vocab_size == 50257:
        tokenizer = load_tokenizer({"tokenizer": "gpt2"})
    return tokenizer if tokenizer and tokenizer.vocab_size == config.vocab_size else None


def check_same_tokens(name: str, vocab_size: int, dataset_meta: dict[str, Any]) -> None:
    """Raise UserError unless the token ids of a dataset are those that the weights called name were trained with."""
    ours, theirs = load_tokenizer(dataset_meta), None
    with suppress(UserError):  # without theirs, only the number of tokens is compared
        theirs = load_pretrained_tokenizer(name)
    same = ours.vocab_size == vocab_size
    if not same or (
        theirs
        and any(ours.decode_bytes([i]) != theirs.decode_bytes([i]) for i in range(vocab_size))
    ):
        source, kind = f"data/{dataset_meta['dataset']}", "gpt2" if vocab_size == 50257 else name
        raise UserError(
            f"{source} has other tokens than {name}: prepare it with --tokenizer={kind}"
        )


def save_pretrained(model: MiniGPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write model, and its tokenizer if given, to folder, for transformers' GPT2LMHeadModel and AutoTokenizer.

    config.json is written last: without it a folder is not a model's. Raises UserError where writing fails.
    """
    save_file, config, folder = optional("safetensors.torch").save_file, model.config, Path(folder)
    if tokenizer and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"a tokenizer of {tokenizer.vocab_size} tokens for a model of {config.vocab_size}"
        )
    weights = {}
    for name, p in model.named_parameters():
        weights[f"transformer.{name}"] = as_in_file(name, p, config).cpu().contiguous()
        if (
            not config.bias and name.endswith("weight") and not name.startswith(("wte", "wpe"))
        ):  # GPT-2 always has one
            weights[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(
                len(p), dtype=p.dtype
            )

    eos_token = tokenizer and tokenizer.eos_token
    hf_config = (
        ARCHITECTURE
        | {name: getattr(config, name) for name in SIZES}
        | {"n_positions": config.block_size}
    )
    hf_config |= {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    hf_config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    hf_config |= dict.fromkeys(("bos_token_id", "eos_token_id"), eos_token)
    contents = {"config.json": hf_config}
    if tokenizer:
        options = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.block_size,
        }
        options |= {} if eos_token is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        options["clean_up_tokenization_spaces"] = False
        contents = {
            "tokenizer.json": to_fast(tokenizer),
            "tokenizer_config.json": options,
        } | contents
    with user_error(f"{folder} can't be written", OSError, optional("safetensors").SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in contents.items():
            write_json(folder / name, content)
        shutil.copymode(
            folder / "config.json", folder / "model.safetensors"
        )  # safetensors makes it the owner's only


# Tokenizers, as the tokenizer.json of the package tokenizers. There a byte is written as a character: those that are
# printable in Latin-1 as themselves, the others, in their order, as U+0100 and what follows (Radford et al. 2019).

UNPRINTABLE = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
TO_CHAR = [chr(0x100 + UNPRINTABLE.index(b) if b in UNPRINTABLE else b) for b in range(256)]
TO_BYTE = {char: b for b, char in enumerate(TO_CHAR)}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def merges(vocab: dict[str, int]) -> list[str]:
    """The pair that makes each token of {token: id}, as "left right": the two parts left when its characters are merged
    in the order of ids, as tiktoken does. Raises UserError where there is none."""
    pairs = []
    for token, i in sorted(vocab.items(), key=lambda item: item[1]):
        parts = list(token)
        while len(parts) > 2:
            ids = [vocab.get(left + right, i) for left, right in pairwise(parts)]
            n = ids.index(min(ids))
            if ids[n] >= i:
                raise UserError(
                    f"no tokenizer.json can hold this tokenizer: {token} is not a pair of earlier tokens"
                )
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        if len(parts) == 2:
            pairs.append(" ".join(parts))
    return pairs


def to_fast(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as the contents of tokenizer.json. Raises UserError for a kind that has no such form."""
    vocab, special, pairs, splits, decoder = TO_BYTE, {}, [], BYTE_LEVEL, BYTE_LEVEL
    if isinstance(tokenizer, CharTokenizer):
        vocab, splits, decoder = (
            {char: i for i, char in enumerate(tokenizer.chars)},
            None,
            {"type": "Fuse"},
        )
    elif isinstance(tokenizer, BPETokenizer):
        ranks, special = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._special_tokens
        vocab = {"".join(TO_CHAR[b] for b in token): rank for token, rank in ranks.items()}
        pairs = merges(vocab)
        # In tiktoken x{1,3}+ is possessive; in tokenizers it would repeat x{1,3}.
        pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", tokenizer.encoding._pat_str)
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        splits = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    elif type(tokenizer) is not ByteTokenizer:
        raise UserError(
            f"a {type(tokenizer).__name__} has no form in tokenizer.json: save the model without it"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {
        "special": True
    }
    added = [
        {"id": i, "content": token, **flags}
        for token, i in sorted(special.items(), key=lambda item: item[1])
    ]
    fast = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splits,
        "decoder": decoder,
    }
    return fast | {"model": {"type": "BPE", "vocab": vocab, "merges": pairs}}


def from_fast(fast: dict[str, Any]) -> Tokenizer:
    """The tokenizer in a tokenizer.json's contents. Raises an Exception unless to_fast wrote it or it is GPT-2's."""
    model, splits = fast["model"], fast["pre_tokenizer"]
    special = {token["content"]: token["id"] for token in fast["added_tokens"]}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    of_gpt2 = splits and {"use_regex": True} | splits == BYTE_LEVEL | {"use_regex": True}
    tokenizer, ids = None, {*vocab.values(), *special.values()}
    if splits is None:
        tokenizer = load_tokenizer(
            {"tokenizer": "char", "chars": "".join(sorted(vocab, key=vocab.get))}
        )
    elif vocab == TO_BYTE and not (of_gpt2 or special):
        tokenizer = ByteTokenizer()
    elif TO_BYTE.keys() <= vocab.keys() and len(ids) == len(vocab) + len(special):
        pattern = GPT2_PATTERN if of_gpt2 else splits["pretokenizers"][0]["pattern"]["Regex"]
        ranks = {bytes(TO_BYTE[c] for c in token): i for token, i in vocab.items()}
        encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        tokenizer = BPETokenizer(encoding)
    ours = to_fast(tokenizer)
    if (
        fast["normalizer"]
        or pairs != ours["model"]["merges"]
        or not (of_gpt2 or splits == ours["pre_tokenizer"])
    ):
        raise ValueError("this program would encode otherwise")
    return tokenizer
