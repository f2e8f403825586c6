"""GPT-2's weights and tokenizers in and out, in the layout of the Hugging Face hub.

A model folder has config.json (the sizes), model.safetensors or its shards (the weights),
tokenizer.json and tokenizer_config.json. MiniGPT's parameters have the released names, but GPT-2's
matrices are stored transposed, (in, out), and its token embedding has no padding.
"""

import json
import operator
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from model import GPTConfig, MiniGPT
from support.checkpoint import (
    find_checkpoint,
    model_from_checkpoint,
    read_checkpoint,
    write_atomically,
    write_json,
)
from support.settings import UserError, optional, user_error
from support.tokenizer import (
    BYTE_LEVEL,
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    IdsTokenizer,
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
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# what MiniGPT is, in the names of transformers' GPT2Config, whose defaults these are
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def read_json(path: Path) -> dict[str, Any]:
    with user_error(f"{path} can't be read", OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def open_folder(name_or_path: str | Path) -> tuple[Path, GPTConfig]:
    """(folder, the sizes in its config.json) of a folder or a name in HUB.

    A name is downloaded unless the hub's cache has it. Raises UserError for a folder that is
    missing, damaged or of another architecture.
    """
    folder = Path(name_or_path)
    if name_or_path in HUB and not folder.is_dir():
        hub = optional("huggingface_hub")
        problem = f"{name_or_path} can't be downloaded"
        with user_error(problem, Exception, advice="give its folder instead"):
            repository = f"openai-community/{name_or_path}"
            folder = Path(hub.snapshot_download(repository, allow_patterns=list(FILES)))
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no {path}: expected {', '.join(HUB)}, or a folder with it and weights")
    hf_config = read_json(path)
    problem = f"{path} has sizes that no GPT-2 can have"
    # operator.index is int() that refuses text and fractions
    with user_error(problem, KeyError, TypeError, ValueError):
        config = GPTConfig(
            block_size=operator.index(hf_config["n_positions"]),
            vocab_size=operator.index(hf_config["vocab_size"]),
            n_layer=operator.index(hf_config["n_layer"]),
            n_head=operator.index(hf_config["n_head"]),
            n_embd=operator.index(hf_config["n_embd"]),
            bias=True,
        )
    if hf_config.get("activation_function") == "gelu_pytorch_tanh":
        hf_config["activation_function"] = "gelu_new"  # the same formula
    expected = {**ARCHITECTURE, "n_inner": 4 * config.n_embd}
    for name, value in expected.items():
        if hf_config.get(name) not in (None, value):
            raise UserError(
                f"{folder} is of another architecture: {name} {hf_config[name]!r}, not {value!r}"
            )
    return folder, config


def gpt2_shapes(config: GPTConfig) -> dict[str, list[int]]:
    """{name: shape} of the weights in the files of a GPT-2 of these sizes."""
    C = config.n_embd
    shapes = {"wte.weight": [config.vocab_size, C], "wpe.weight": [config.block_size, C]}
    for layer in range(config.n_layer):
        block = f"h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": [C], f"{block}{norm}.bias": [C]}
        for linear, n_in, n_out in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, 4 * C),
            ("mlp.c_proj", 4 * C, C),
        ):
            shapes |= {f"{block}{linear}.weight": [n_in, n_out], f"{block}{linear}.bias": [n_out]}
    return shapes | {"ln_f.weight": [C], "ln_f.bias": [C]}


def as_in_file(name: str, p: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """The part of a parameter that GPT-2's files have, as they have it: a view, no gradient."""
    p = p.detach()
    if name == "wte.weight":
        p = p[: config.vocab_size]
    if name.endswith(TRANSPOSED):
        p = p.transpose(0, -1)
    return p


def check_is_gpt2(model: MiniGPT) -> None:
    """Raise UserError where the parameters are not GPT-2's, as in a changed model.py.

    Without bias in the config, the biases may be missing: they are zero.
    """
    config = model.config
    expected = gpt2_shapes(config)
    here = {name: list(as_in_file(name, p, config).shape) for name, p in model.named_parameters()}
    for name in here | expected:
        if name not in here and name.endswith("bias") and not config.bias:
            continue
        if here.get(name) != expected.get(name):
            raise UserError(
                f"this model is not a GPT-2, for which the folder is: {name} is {here.get(name)} "
                f"here and {expected.get(name)} there"
            )


def open_weights(folder: Path, config: GPTConfig) -> dict[str, Any]:
    """{name: weight, which is read when it is indexed by [...]} of a model folder.

    Raises UserError where they can't be read or are not those of a GPT-2 of these sizes.
    """
    weights = {}
    safetensors = optional("safetensors")
    for name in weight_files(folder):
        with user_error(f"{folder / name} can't be read", OSError, safetensors.SafetensorError):
            file = safetensors.safe_open(folder / name, framework="pt")
            for key in file.keys():  # noqa: SIM118
                # the causal masks in older files are no weights
                if not key.endswith((".attn.bias", ".attn.masked_bias")):
                    weights[key.removeprefix("transformer.")] = file.get_slice(key)
    head = weights.pop("lm_head.weight", None)
    # compared before a model is built, which would be as large as config.json says
    if config.n_layer > len(weights):
        raise UserError(
            f"{folder}: config.json has {config.n_layer} layers, the weights have fewer"
        )
    expected = gpt2_shapes(config)
    for name in expected | weights:
        if name not in weights or name not in expected:
            raise UserError(f"{folder} does not fit MiniGPT: only one of them has {name}")
        shape = weights[name].get_shape()
        if shape != expected[name]:
            raise UserError(
                f"{folder}: {name} has the shape {shape}, by config.json {expected[name]}"
            )
    if head is not None and not torch.equal(head[...], weights["wte.weight"][...]):
        raise UserError(
            f"{folder} is of another architecture: its lm_head is not its token embedding"
        )
    return weights


def weight_files(folder: Path) -> set[str]:
    """The names of a model folder's files of weights."""
    if (folder / "model.safetensors").exists():
        return {"model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise UserError(
            f"{folder} has no {index.name}; if it has a pickle (.bin), "
            "let transformers save it again"
        )
    shards = read_json(index).get("weight_map")
    if isinstance(shards, dict):
        names = list(shards.values())
        if all(isinstance(name, str) and Path(name).name == name for name in names):
            return set(names)
    raise UserError(f"{index} does not name files in its folder")


def load_pretrained(
    name_or_path: str | Path,
    block_size: int | None = None,
    dropout: float = 0.0,
    vocab_size: int | None = None,
) -> MiniGPT:
    """A MiniGPT in eval mode, in float32 on the CPU, from a name in HUB or a model folder.

    A block_size below the model's crops its positions, and a vocab_size its token embedding, which
    often has more rows than the tokenizer has tokens. Raises UserError where there is no such
    model, or where it is damaged or of another architecture.
    """
    folder, config = open_folder(name_or_path)
    weights = open_weights(folder, config)
    if block_size is None:
        block_size = config.block_size
    if vocab_size is None:
        vocab_size = config.vocab_size
    if block_size > config.block_size:
        raise UserError(
            f"{folder} has positions for {config.block_size} tokens: "
            f"give --block_size={config.block_size} or less"
        )
    if vocab_size > config.vocab_size:
        raise UserError(f"{folder} has {config.vocab_size} tokens, not {vocab_size}")
    model = MiniGPT(replace(config, block_size=block_size, vocab_size=vocab_size, dropout=dropout))
    check_is_gpt2(model)
    with torch.no_grad():
        model.wte.weight.zero_()  # the padding too
        for name, p in model.named_parameters():
            p = as_in_file(name, p, model.config)
            weight = weights[name][...]
            if not (weight.is_floating_point() and weight.float().isfinite().all()):
                raise UserError(f"{folder}: {name} has values that are not finite numbers")
            p.copy_(weight[: len(p)])
    return model.eval()


def load_pretrained_tokenizer(name_or_path: str | Path) -> Tokenizer | None:
    """The tokenizer of a name or folder as in load_pretrained, or None.

    Raises UserError where it is damaged or has more tokens than the model.
    """
    folder, config = open_folder(name_or_path)
    path = folder / "tokenizer.json"
    tokenizer = None
    if path.exists():
        tokenizer = read_tokenizer(path)
    elif config.vocab_size == 50257:
        tokenizer = load_tokenizer({"tokenizer": "gpt2"})
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, but the model only {config.vocab_size}"
        )
    return tokenizer


def read_tokenizer(path: Path) -> HFTokenizer:
    """The tokenizer in a tokenizer.json; tokenizer_config.json beside it names its end of text."""
    options = {}
    if path.with_name("tokenizer_config.json").exists():
        options = read_json(path.with_name("tokenizer_config.json"))
    eos = options.get("eos_token")
    if isinstance(eos, dict):
        eos = eos.get("content")
    if not isinstance(eos, str):
        eos = END_OF_TEXT
    with user_error(f"{path} can't be read", OSError, UnicodeDecodeError):
        contents = path.read_text(encoding="utf-8")
    return HFTokenizer(contents, eos)


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called name, or that of a run or of a model folder at this path."""
    path = Path(name)
    if path.name == "tokenizer.json" and path.is_file():
        return read_tokenizer(path)
    if path.is_file() or (path / "last.pt").is_file():
        return load_tokenizer(read_checkpoint(find_checkpoint(name))["tokenizer"])
    if (path / "tokenizer.json").is_file():
        return read_tokenizer(path / "tokenizer.json")
    if re.fullmatch(r"ids:[1-9]\d*", name):
        return IdsTokenizer(int(name.removeprefix("ids:")))
    return load_tokenizer({"tokenizer": name})


def check_same_tokens(
    name: str, dataset_meta: dict[str, Any], theirs: Tokenizer | None = None
) -> None:
    """Raise UserError unless a dataset has the token ids that the weights called name know.

    theirs: the tokenizer of these weights, by default that of the model folder.
    """
    ours = load_tokenizer(dataset_meta)
    if theirs is None:
        theirs = load_pretrained_tokenizer(name)
    if theirs is None:
        _, config = open_folder(name)
        same = ours.vocab_size == config.vocab_size
    else:
        same = ours.vocab_size == theirs.vocab_size and all(
            ours.decode_bytes([i]) == theirs.decode_bytes([i]) for i in range(ours.vocab_size)
        )
    if not same:
        tokenizer = name
        if theirs is None or name in HUB:
            tokenizer = "gpt2"
        raise UserError(
            f"data/{dataset_meta['dataset']} has other tokens than {name}: "
            f"prepare it with --tokenizer={tokenizer}"
        )


def load_weights_of(
    init_from: str, block_size: int | None, dropout: float, dataset_meta: dict[str, Any]
) -> MiniGPT:
    """The model of a run, a checkpoint, a name in HUB or a model folder, in train mode.

    Raises UserError where it has other tokens than the dataset, or can't have that block_size.
    """
    path = Path(init_from)
    if path.is_file() or (path / "last.pt").is_file():
        path = find_checkpoint(init_from)
        state = read_checkpoint(path)
        model = model_from_checkpoint(state, path, dropout)
        check_same_tokens(init_from, dataset_meta, load_tokenizer(state["tokenizer"]))
        if block_size not in (None, model.config.block_size):
            raise UserError(
                f"{path} has a block_size of {model.config.block_size}: "
                f"give --block_size={model.config.block_size}"
            )
        return model
    check_same_tokens(init_from, dataset_meta)
    return load_pretrained(init_from, block_size, dropout, dataset_meta["vocab_size"]).train()


def ignored_sizes(config: GPTConfig, settings: Any) -> list[str]:
    """The sizes, as "name=value", that the user chose in settings and a loaded model lacks."""
    ignored = []
    for name, own in asdict(config).items():
        if name == "vocab_size":  # comes from the dataset
            continue
        chosen = getattr(settings, name)
        is_default = chosen == getattr(type(settings), name)
        if chosen != own and not is_default:
            ignored.append(f"{name}={chosen}")
    return ignored


def save_pretrained(model: MiniGPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write model, and its tokenizer if given, for transformers' GPT2LMHeadModel, AutoTokenizer.

    config.json is written last: without it a folder is not a model's. Raises UserError where
    writing fails or the model has parameters that GPT-2 has not.
    """
    safetensors = optional("safetensors.torch")
    folder = Path(folder)
    config = model.config
    check_is_gpt2(model)
    weights = {}
    for name, p in model.named_parameters():
        weights[f"transformer.{name}"] = as_in_file(name, p, config).cpu().contiguous()
    for name, shape in gpt2_shapes(config).items():  # GPT-2 always has biases
        dtype = model.wte.weight.dtype
        weights.setdefault(f"transformer.{name}", torch.zeros(shape, dtype=dtype))

    eos_token = None
    files = {}
    if tokenizer is not None:
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"a tokenizer of {tokenizer.vocab_size} tokens for a model of {config.vocab_size}"
            )
        eos_token = tokenizer.eos_token
        options = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.block_size,
            "clean_up_tokenization_spaces": False,
        }
        if eos_token is not None:
            options["bos_token"] = tokenizer.decode([eos_token])
            options["eos_token"] = tokenizer.decode([eos_token])
        files["tokenizer.json"] = json.loads(to_hf(tokenizer).to_str())
        files["tokenizer_config.json"] = options
    files["config.json"] = ARCHITECTURE | {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": eos_token,
        "eos_token_id": eos_token,
    }
    data = safetensors.save(weights, metadata={"format": "pt"})
    with user_error(f"{folder} can't be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        write_atomically(folder / "model.safetensors", lambda file: file.write(data))
        for name, content in files.items():
            write_json(folder / name, content)


def to_hf(tokenizer: Tokenizer) -> Any:
    """tokenizer as a Tokenizer of the package tokenizers.

    Raises UserError for a kind that has no such form.
    """
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.tokenizer
    package = optional("tokenizers")
    if isinstance(tokenizer, CharTokenizer):
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        result = package.Tokenizer(package.models.BPE(vocab, []))
        result.decoder = package.decoders.Fuse()
        return result
    split_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if type(tokenizer) is ByteTokenizer:
        result = package.Tokenizer(package.models.BPE(BYTE_LEVEL, []))
        result.pre_tokenizer = split_bytes
    elif isinstance(tokenizer, BPETokenizer):
        chars = {byte: char for char, byte in BYTE_LEVEL.items()}
        vocab = {}
        for token, rank in tokenizer.ranks.items():
            vocab["".join(chars[byte] for byte in token)] = rank
        result = package.Tokenizer(package.models.BPE(vocab, merges(vocab)))
        # In tiktoken x{1,3}+ is possessive; in tokenizers it would repeat x{1,3}.
        pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", tokenizer.encoding._pat_str)
        split = package.pre_tokenizers.Split(package.Regex(pattern), "isolated")
        result.pre_tokenizer = package.pre_tokenizers.Sequence([split, split_bytes])
    else:
        raise UserError(
            f"a {type(tokenizer).__name__} has no form in tokenizer.json: save the model without it"
        )
    result.decoder = package.decoders.ByteLevel()
    for token in tokenizer.special_tokens:
        result.add_special_tokens([package.AddedToken(token, special=True, normalized=False)])
        if result.token_to_id(token) != tokenizer.special_ids[token]:  # it takes the next free id
            raise UserError(
                f"no tokenizer.json can give {token} its id: save the model without its tokenizer"
            )
    return result


def merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pair that makes each token of {token: id}, in the order of ids.

    It is what is left when the token's characters are merged in that order, as tiktoken does.
    Raises UserError where it is no pair.
    """
    pairs = []
    for token, i in sorted(vocab.items(), key=lambda item: item[1]):
        parts = list(token)
        while len(parts) > 2:
            ids = [vocab.get(left + right, i) for left, right in pairwise(parts)]
            n = ids.index(min(ids))
            if ids[n] >= i:
                raise UserError(
                    f"no tokenizer.json can hold this tokenizer: "
                    f"{token} is not a pair of earlier tokens"
                )
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs
