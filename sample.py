"""Let a trained GPT write.

python sample.py --out_dir=out/shakespeare --prompt="ROMEO:"
python sample.py --init_from=gpt2 --prompt="Once upon a time"      GPT-2's weights, or a folder in their layout
python sample.py --out_dir=out/shakespeare --prompt_file=- --num_samples=3 --top_k=50 < prompt.txt

The text goes to stdout as it is made, with several samples the first one; all else goes to stderr.
"""

import codecs
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from model import GPTConfig, KVCache, MiniGPT
from support.checkpoint import find_checkpoint, load_weights, read_checkpoint
from support.fast import CompiledReader, reader
from support.pretrained import load_pretrained, load_pretrained_tokenizer
from support.runtime import best_dtype, pick_device
from support.settings import UserError, run_script, setting, user_error
from support.tokenizer import ByteTokenizer, load_tokenizer


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    checkpoint: str = setting("", "best or last, or another file in out_dir; by default best, else last")
    init_from: str = setting("", "instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a model's folder")
    prompt: str | None = setting(None, "text to continue, by default a new line")
    prompt_file: str = setting("", "file to read the prompt from, - for standard input")
    num_samples: int = setting(1, "texts to write, in one batch", 1)
    max_new_tokens: int = setting(500, "tokens to write", 1)
    temperature: float = setting(0.8, "lower is more predictable, 0 always takes the likeliest token", 0.0)
    top_k: int | None = setting(None, "choose among the k likeliest tokens only", 1)
    top_p: float = setting(1.0, "choose among the likeliest tokens that together have this probability", 1e-6, 1.0)
    repetition_penalty: float = setting(1.0, "above 1 makes tokens that are in the text already less likely", 1.0)
    stop_at_eos: bool = setting(True, "end a text at the tokenizer's end-of-text token")
    seed: int = setting(1337, "random seed: the same one writes the same text", 0)
    device: str = setting("auto", "cpu, cuda, mps, ...; auto is the best available")
    dtype: str = setting("auto", "number type of the weights", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(False, "torch.compile the reading of a token: for long texts on GPUs, slow to start")


def next_token_probs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """The probabilities to draw the next token from: (B, vocab_size) logits -> (B, vocab_size), float32.

    First the logits are divided by temperature (0 gives all probability to the likeliest token); then all but the
    top_k likeliest tokens are excluded (Fan et al. 2018), ties with the last of them kept; then all but the
    likeliest ones that together reach probability top_p (nucleus sampling, Holtzman et al. 2020).
    Raises ValueError for temperature < 0, top_k < 1 and top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # less the largest, which changes no probability, so that a tiny temperature can't overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort(-1)
        excluded = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        excluded[..., -1] = False  # the likeliest always stays
        logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
    return logits.softmax(-1)


@torch.inference_mode()
def stream(
    model: MiniGPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token: int | None = None,
    generator: torch.Generator | None = None,
    read: Callable | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the tokens that follow idx, (B, T) token ids: max_new_tokens times a (B,) tensor.

    temperature, top_k and top_p as in `next_token_probs`. repetition_penalty divides the positive logits of tokens
    that are in the text already and multiplies their negative ones (Keskar et al. 2019, section 4.1). With eos_token
    a row that has drawn it is filled up with it, and all ends when every row has, on a GPU up to 15 tokens later.
    Draws from generator, a torch.Generator on idx's device. Any length can be asked for: whenever block_size tokens are
    in the cache, the last half of them is read again, so the cost of a token stays bounded. read(idx, cache=cache)
    stands for the model, by default `reader`. Raises ValueError for an empty prompt.
    """
    B, T = idx.shape
    if T == 0:
        raise ValueError("the prompt is empty: it needs at least one token")
    read, block_size = read or reader(model, B), model.config.block_size
    text = torch.cat([idx, idx.new_empty(B, max_new_tokens)], dim=1)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=idx.device).scatter(1, idx, True)
    done = torch.zeros(B, dtype=torch.bool, device=idx.device)

    cache = KVCache(model.config, B, idx.device, model.wte.weight.dtype, min(block_size, T + max_new_tokens))
    n_rows = 1 if B > 1 and T > 1 and (idx == idx[0]).all() else B  # a prompt that all rows share is read once
    unread = idx[:n_rows, -block_size:]
    for end in range(T, T + max_new_tokens):
        if cache.length + unread.size(1) > block_size:  # full: continue from the last half of the context
            cache.length = 0
            unread = text[:, max(0, end - max(1, block_size // 2)) : end]
        logits = read(unread, cache=cache)[0][:, -1].expand(B, -1)  # (B, vocab_size)
        if repetition_penalty != 1.0:
            penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = next_token_probs(logits, temperature, top_k, top_p)
            # argmax of p_i / Exp(1) is i with probability p_i: torch.multinomial's way, without its wait for the device
            token = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
        if eos_token is not None:
            token = token.masked_fill(done, eos_token)
            done |= token == eos_token
        text[:, end] = token
        if repetition_penalty != 1.0:
            seen.scatter_(1, token[:, None], True)
        unread = token[:, None]
        yield token
        check_done = idx.device.type == "cpu" or (end - T) % 16 == 15  # seldom on a GPU, which it waits for
        if eos_token is not None and check_done and done.all():
            return


def generate(model: MiniGPT, idx: torch.Tensor, max_new_tokens: int, *options: Any, **named: Any) -> torch.Tensor:
    """idx and what follows it: (B, T) token ids -> (B, T + new), new at most max_new_tokens. Options as in `stream`."""
    tokens = list(stream(model, idx, max_new_tokens, *options, **named))
    return torch.cat([idx, torch.stack(tokens, dim=1)], dim=1) if tokens else idx


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[MiniGPT, ByteTokenizer, dict]:
    """(model in eval mode, tokenizer, checkpoint) of the checkpoint at path. Raises UserError for a damaged one."""
    state = read_checkpoint(path)
    model = MiniGPT(GPTConfig(**state["model_args"]))
    load_weights(model, state["model"], path)
    return model.to(device).eval(), load_tokenizer(state["tokenizer"]), state


def read_prompt(s: Settings, tokenizer: ByteTokenizer) -> str:
    """The prompt that the settings ask for."""
    if s.prompt is not None and s.prompt_file:
        raise UserError("give --prompt or --prompt_file, not both")
    prompt = s.prompt
    if s.prompt_file:
        source = 0 if s.prompt_file == "-" else s.prompt_file
        problem = user_error(f"can't read the prompt in {s.prompt_file}", OSError, UnicodeDecodeError)
        with problem, open(source, encoding="utf-8", newline="") as file:
            prompt = file.read()
    elif prompt is None:  # a character tokenizer may lack the new line
        prompt = "\n" if "\n" in getattr(tokenizer, "chars", "\n") else tokenizer.decode([0])
    if not prompt:
        raise UserError("the prompt is empty: it needs at least one character")
    return prompt


def open_model(s: Settings, device: torch.device) -> tuple[MiniGPT, ByteTokenizer, str]:
    """(model, tokenizer, what they are) as the settings ask for: a run's, or pretrained, on device."""
    if s.init_from:
        model, tokenizer, source = load_pretrained(s.init_from), load_pretrained_tokenizer(s.init_from), s.init_from
        if tokenizer is None:
            raise UserError(f"{source} has no tokenizer.json of a kind that this program knows: it can't read text")
    else:
        path = find_checkpoint(s.out_dir, s.checkpoint)
        model, tokenizer, state = load_model(path, device)
        source = f"{path}: step {state['step']}, trained on {state['tokenizer']['source']}"
    dtype = s.dtype.replace("auto", best_dtype(device) if device.type == "cuda" else "float32")
    return model.to(device, getattr(torch, dtype)), tokenizer, f"{source}; {device.type}, {dtype}"


def write(model: MiniGPT, tokenizer: ByteTokenizer, s: Settings, paint=lambda text, token: text, read=None) -> int:
    """Print the prompt and its continuations: the first as it is made, in what paint(text, token) makes of each token's
    text. read as in `stream`. Returns the number of tokens."""
    device, prompt = model.wte.weight.device, read_prompt(s, tokenizer)
    idx = torch.tensor([tokenizer.encode(prompt)], device=device).expand(s.num_samples, -1)
    eos_token = tokenizer.eos_token if s.stop_at_eos else None
    generator = torch.Generator(device).manual_seed(s.seed)
    options = (s.temperature, s.top_k, s.top_p, s.repetition_penalty, eos_token, generator)
    texts = [[] for _ in range(s.num_samples)]
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    # a character may be several tokens: the decoder holds their bytes back until it is whole
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    steps = stream(model, idx, s.max_new_tokens, *options, read)
    while some := list(islice(steps, 1 if device.type == "cpu" else 8)):  # on a GPU one wait for eight tokens
        for tokens in torch.stack(some).tolist():
            for text, token in zip(texts, tokens, strict=True):
                if token != eos_token:
                    text.append(token)
            if tokens[0] != eos_token:
                print(paint(decoder.decode(tokenizer.decode_bytes(tokens[:1])), tokens[0]), end="", flush=True)
    print(decoder.decode(b"", final=True))
    for text in texts[1:]:
        print(f"---------------\n{prompt}{tokenizer.decode(text)}")
    return sum(map(len, texts))


def main(s: Settings) -> None:
    model, tokenizer, source = open_model(s, pick_device(s.device))
    start = time.perf_counter()
    n_tokens = write(model, tokenizer, s, read=CompiledReader(model) if s.compile else None)
    seconds = time.perf_counter() - start
    print(f"{source}; {n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
