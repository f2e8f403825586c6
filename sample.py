"""Generate text with a trained GPT.

python sample.py "ROMEO:" --out_dir=out/shakespeare
python sample.py "ROMEO:" "JULIET:" --out_dir=out/shakespeare      one after the other
python sample.py "Once upon a time" --init_from=gpt2               GPT-2's weights, or a folder
python sample.py --out_dir=out/shakespeare --prompt_file=- --num_samples=3 --top_k=50 < prompt.txt

The text goes to stdout, the first of several samples as it is generated; all else to stderr.
"""

import codecs
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import KVCache, MiniGPT
from support.checkpoint import find_checkpoint, model_from_checkpoint, read_checkpoint
from support.fast import CompiledDecoder, pack
from support.pretrained import load_pretrained, load_pretrained_tokenizer
from support.runtime import best_dtype, pick_device
from support.settings import UserError, run_script, setting, user_error
from support.tokenizer import Tokenizer, load_tokenizer

SEPARATOR = "---------------"  # between texts


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    checkpoint: str = setting(
        "", "best or last, or another file in out_dir; by default best, else last"
    )
    init_from: str = setting(
        "", "instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a model's folder"
    )
    prompt: list[str] | None = setting(
        None, "text to continue, by default a new line; several are continued one after the other"
    )
    prompt_file: str = setting("", "file to read the prompt from, - for standard input")
    num_samples: int = setting(1, "texts to generate, in one batch", low=1)
    max_new_tokens: int = setting(500, "tokens to generate", low=1)
    temperature: float = setting(
        0.8, "lower is more predictable, 0 always takes the likeliest token", low=0.0
    )
    top_k: int | None = setting(None, "choose among the k likeliest tokens only", low=1)
    top_p: float = setting(
        1.0,
        "choose among the likeliest tokens that together have this probability",
        low=1e-6,
        high=1.0,
    )
    repetition_penalty: float = setting(
        1.0, "above 1 makes tokens that are in the text already less likely", low=1.0
    )
    stop_at_eos: bool = setting(True, "end a text at the tokenizer's end-of-text token")
    seed: int = setting(1337, "random seed: the same one generates the same text", low=0)
    device: str = setting("auto", "cpu, cuda, mps, ...; auto is the best available")
    dtype: str = setting(
        "auto", "data type of the weights", choices=("auto", "float32", "bfloat16", "float16")
    )
    compile: bool = setting(
        False, "torch.compile the decoding step: for long texts on GPUs, slow to start"
    )


def next_token_probs(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Logits to the probabilities of the next token, both (B, vocab_size); in float32.

    First the logits are divided by temperature; 0 gives all probability to the likeliest token.
    Then all but the top_k likeliest tokens are excluded (Fan et al. 2018), except for ties with the
    last of them. Then all but the likeliest ones that together reach probability top_p (nucleus
    sampling, Holtzman et al. 2020).
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
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, likeliest, 1.0)
    # Subtracting the largest changes no probability, and a tiny temperature can't overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature

    if top_k is not None and top_k < logits.size(-1):
        lowest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)

    if top_p is not None and top_p < 1:
        ascending, order = logits.sort(-1)
        # from the least likely up, those that together have at most 1 - top_p
        in_tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        in_tail[..., -1] = False  # the likeliest always stays
        excluded = torch.empty_like(in_tail).scatter(-1, order, in_tail)  # in the tokens' order
        logits = logits.masked_fill(excluded, -torch.inf)

    return logits.softmax(-1)


@torch.inference_mode()
def stream(
    model: MiniGPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the tokens that follow idx, (B, T) token ids: up to max_new_tokens tensors, (B,) each.

    temperature, top_k and top_p as in `next_token_probs`. repetition_penalty divides the positive
    logits of tokens that are in the text already and multiplies their negative ones (Keskar et al.
    2019, section 4.1, as transformers does it). A row that has drawn eos_token is padded with it;
    when every row has, the text ends, on a GPU up to 15 tokens later. generator: on idx's device.

    A text may be longer than block_size: whenever the cache is full, it is filled again with the
    last half of the context, so the cost of a token stays bounded. An empty prompt raises
    ValueError when the first token is asked for.
    """
    B, T = idx.shape
    if T == 0:
        raise ValueError("the prompt is empty: it needs at least one token")
    block_size = model.config.block_size
    # Not cuDNN's attention, which is planned anew, for 20 to 40 ms, for each length. The switch is
    # global.
    torch.backends.cuda.enable_cudnn_sdp(False)
    weight = next(model.parameters())
    size = min(block_size, T + max_new_tokens)  # of the cache, in tokens
    cache = KVCache(model.config, B, idx.device, weight.dtype, size)

    text = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
    seen = torch.zeros(B, model.config.vocab_size, dtype=torch.bool, device=idx.device)
    seen.scatter_(1, idx, True)
    done = torch.zeros(B, dtype=torch.bool, device=idx.device)

    uncached = idx[:, -block_size:]
    for end in range(T, T + max_new_tokens):  # text[:, :end] is known, text[:, end] is next
        if cache.length + uncached.size(1) > cache.size:
            cache.length = 0
            half = max(1, block_size // 2)
            uncached = text[:, end - half : end]
        logits, _ = model(uncached, cache=cache)
        logits = logits[:, -1]  # (B, vocab_size)
        if repetition_penalty != 1.0:
            penalized = torch.where(
                logits < 0, logits * repetition_penalty, logits / repetition_penalty
            )
            logits = torch.where(seen, penalized, logits)

        if temperature == 0:
            token = logits.argmax(-1)  # without noise
        else:
            probs = next_token_probs(logits, temperature, top_k, top_p)
            # The argmax of p_i / Exp(1) is i with probability p_i. torch.multinomial does the same,
            # but synchronises with the device.
            noise = torch.empty_like(probs).exponential_(generator=generator)
            token = (probs / noise).argmax(-1)
        if eos_token is not None:
            token = token.masked_fill(done, eos_token)
            done |= token == eos_token
        text[:, end] = token
        seen.scatter_(1, token[:, None], True)
        uncached = token[:, None]
        yield token

        if eos_token is not None:
            # on a GPU rarely, since it synchronises
            checking = idx.device.type == "cpu" or (end - T) % 16 == 15
            if checking and done.all():
                return


def generate(
    model: MiniGPT, idx: torch.Tensor, max_new_tokens: int, **options: Any
) -> torch.Tensor:
    """idx and what follows it: (B, T) token ids to (B, T + new), with new <= max_new_tokens.

    options as in `stream`. On a CPU, `generate(pack(model), ...)` is faster (support/fast.py).
    """
    tokens = list(stream(model, idx, max_new_tokens, **options))
    if not tokens:
        return idx
    return torch.cat([idx, torch.stack(tokens, dim=1)], dim=1)


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[MiniGPT, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, checkpoint) from a checkpoint or a run's folder.

    Raises UserError where it is missing or damaged.
    """
    if Path(path).is_dir():
        path = find_checkpoint(path)
    state = read_checkpoint(path)
    model = model_from_checkpoint(state, path)
    return model.to(device).eval(), load_tokenizer(state["tokenizer"]), state


def open_model(s: Settings, device: torch.device) -> tuple[MiniGPT, Tokenizer, str]:
    """(model on device, tokenizer, description in a line), of a run or pretrained, as s asks."""
    if s.init_from:
        description = s.init_from
        tokenizer = load_pretrained_tokenizer(s.init_from)
        if tokenizer is None:
            raise UserError(f"{s.init_from} has no tokenizer.json: without it there is no text")
        model = load_pretrained(s.init_from, vocab_size=tokenizer.vocab_size)  # in eval mode
    else:
        path = find_checkpoint(s.out_dir, s.checkpoint)
        model, tokenizer, state = load_model(path, device)
        description = f"{path}: step {state['step']}, trained on {state['tokenizer']['source']}"
    dtype = s.dtype
    if dtype == "auto":
        # On a CPU in bfloat16, the same seed would generate other texts than on another machine.
        dtype = best_dtype(device) if device.type == "cuda" else "float32"
    model = model.to(device, getattr(torch, dtype))
    tokenizer.special_in_text = True  # whoever writes <|endoftext|> in a prompt means the token
    return model, tokenizer, f"{description}; {device.type}, {dtype}"


def read_prompts(s: Settings, tokenizer: Tokenizer) -> list[str]:
    """The prompts that the settings ask for. Raises UserError for an empty one."""
    if s.prompt and s.prompt_file:
        raise UserError("give --prompt or --prompt_file, not both")
    if s.prompt:
        prompts = s.prompt
        if any("\\n" in prompt for prompt in prompts):
            print(
                r"note: \n stays a backslash and an n; a line break comes from --prompt_file, "
                r"or in bash from $'A\nB'",
                file=sys.stderr,
            )
    elif s.prompt_file:
        source = 0 if s.prompt_file == "-" else s.prompt_file  # 0 is standard input
        problem = f"can't read the prompt in {s.prompt_file}"
        with (
            user_error(problem, OSError, UnicodeDecodeError),
            open(source, encoding="utf-8", newline="") as file,
        ):
            prompts = [file.read()]
    else:
        prompts = [default_prompt(tokenizer)]
    for prompt in prompts:
        if not tokenizer.encode(prompt):
            raise UserError("the prompt is empty: it needs at least one character")
    return prompts


def default_prompt(tokenizer: Tokenizer) -> str:
    """A line break, or the first token where the tokenizer has none."""
    try:
        ids = tokenizer.encode("\n")
    except UserError:  # a character tokenizer that does not know it
        ids = []
    if ids:
        return "\n"
    return tokenizer.decode([0])


def in_blocks(steps: Iterator[torch.Tensor], n: int) -> Iterator[list[int]]:
    """The tokens of each step as a list, copied from the device n steps at a time."""
    block = []
    for tokens in steps:
        block.append(tokens)
        if len(block) == n:
            yield from torch.stack(block).tolist()
            block = []
    if block:
        yield from torch.stack(block).tolist()


def sampling_options(s: Settings, tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """The options of `stream` that the settings ask for."""
    return {
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "repetition_penalty": s.repetition_penalty,
        "eos_token": tokenizer.eos_token if s.stop_at_eos else None,
        "generator": torch.Generator(device).manual_seed(s.seed),
    }


def print_samples(model: MiniGPT, tokenizer: Tokenizer, prompt: str, s: Settings) -> int:
    """Print prompt and its continuations, the first as it is generated.

    Returns the number of tokens in all continuations.
    """
    device = next(model.parameters()).device
    idx = torch.tensor([tokenizer.encode(prompt)], device=device).expand(s.num_samples, -1)
    options = sampling_options(s, tokenizer, device)
    eos_token = options["eos_token"]
    steps = stream(model, idx, s.max_new_tokens, **options)
    texts = [[] for _ in range(s.num_samples)]
    # A character may be several tokens: the decoder holds its bytes back until it is complete.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    block_length = 1 if device.type == "cpu" else 8
    for tokens in in_blocks(steps, block_length):
        for text, token in zip(texts, tokens, strict=True):
            if token != eos_token:
                text.append(token)
        if tokens[0] != eos_token:
            new = tokenizer.decode_bytes(tokens[:1])
            print(decoder.decode(new), end="", flush=True)
    print(decoder.decode(b"", final=True))
    for text in texts[1:]:
        print(f"{SEPARATOR}\n{prompt}{tokenizer.decode(text)}")
    return sum(len(text) for text in texts)


def main(s: Settings) -> None:
    device = pick_device(s.device)
    model, tokenizer, description = open_model(s, device)
    prompts = read_prompts(s, tokenizer)
    if s.compile:
        model = CompiledDecoder(model)
    elif device.type == "cpu":
        model = pack(model, s.num_samples)  # a copy with weights laid out for this CPU
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    start = time.perf_counter()
    n_tokens = 0
    for i, prompt in enumerate(prompts):
        if i > 0:
            print(SEPARATOR)
        n_tokens += print_samples(model, tokenizer, prompt, s)
    seconds = time.perf_counter() - start
    if n_tokens == 0:
        print(
            "note: the text ended at once; give another prompt, or --stop_at_eos=False",
            file=sys.stderr,
        )
    print(
        f"{description}; {n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_script(main, Settings, __doc__, positional="prompt")
