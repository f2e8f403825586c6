"""Let a trained GPT write.

python sample.py --out_dir=out/shakespeare --prompt="ROMEO:"
python sample.py --init_from=gpt2 --prompt="Once upon a time"      GPT-2's weights, or a folder in their layout
python sample.py --out_dir=out/shakespeare --prompt_file=- --num_samples=3 --top_k=50 < prompt.txt

The text goes to stdout as it is made, with several samples the first one; all else goes to stderr.
"""

import codecs
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import UserError, one_line_errors, read_settings, setting


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    checkpoint: str = setting("", "a file in out_dir; by default best.pt, or last.pt where there is none")
    init_from: str = setting("", "instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder like the hub's")
    prompt: str = setting("\n", "text to go on from")
    prompt_file: str = setting("", "file to read the prompt from, - for standard input")
    num_samples: int = setting(1, "texts to write, all in one batch", low=1)
    max_new_tokens: int = setting(500, "tokens to write", low=1)
    temperature: float = setting(0.8, "below 1 more predictable, above 1 more varied, 0 always the likeliest", low=0.0)
    top_k: int | None = setting(None, "choose among the k likeliest tokens only", low=1)
    top_p: float = setting(1.0, "choose among the likeliest tokens that together have this probability", 1e-6, 1.0)
    repetition_penalty: float = setting(1.0, "above 1, tokens that were there already get less likely", low=1.0)
    stop_at_eos: bool = setting(True, "end a text at the tokenizer's end-of-text token")
    show_probs: bool = setting(False, "colour each new token by its probability, where the output is a terminal")
    alternatives: int = setting(0, "list so many other likely tokens for each new one of the first text, on stderr",
                                low=0)  # fmt: skip
    seed: int = setting(1337, "the same seed writes the same text", low=0)
    device: str = setting("auto", "cpu, cuda, mps, ...; auto is the best there is")
    dtype: str = setting(
        "auto", "of the weights: auto is bfloat16 on GPUs that have it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    compile: bool = setting(False, "torch.compile the reading of a token: for long texts on GPUs, slow to start")


if __name__ == "__main__":  # before torch is loaded, which takes seconds: --help and mistakes are answered at once
    with one_line_errors():
        settings = read_settings(Settings, sys.argv[1:], __doc__)

import torch

from checkpoint import load_checkpoint, model_config, refused
from fast import StaticKVCache, compile_step, pack
from model import KVCache, MiniGPT
from pretrained import load_pretrained, load_pretrained_tokenizer
from tokenizer import ByteTokenizer, load_tokenizer
from train import best_dtype, pick_device


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
def stream(model: MiniGPT, idx: torch.Tensor, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None,
           repetition_penalty=1.0, eos_token=None, generator=None, observe=None):  # fmt: skip
    """Yield the tokens that follow idx (B, T), one (B,) tensor at a time, as `generate` describes.

    observe(logits) is called before each with what the model predicts, (B, vocab_size).
    """
    B, T = idx.shape
    if T == 0:
        raise ValueError("the prompt is empty: it needs at least one token")
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    text = torch.cat([idx, idx.new_empty(B, max_new_tokens)], dim=1)
    seen = torch.zeros(B, vocab_size, dtype=torch.bool, device=idx.device).scatter(1, idx, True)
    done = torch.zeros(B, dtype=torch.bool, device=idx.device)

    n_read = 1 if B > 1 and (idx == idx[0]).all() else B  # a prompt that all rows share is read once
    cache = KVCache(model.config, n_read, idx.device, model.wte.weight.dtype, min(block_size, T + max_new_tokens))
    compiled, static = vars(model).get("compiled"), None  # see compile_step
    unread = idx[:n_read, -block_size:]
    for end in range(T, T + max_new_tokens):
        if cache.length + unread.size(1) > block_size:  # full: go on from the last half of the context
            cache.length = 0
            unread = text[:, max(0, end - max(1, block_size // 2)) : end]
        if compiled and n_read == B and unread.size(1) == 1:
            static = static or StaticKVCache(cache)
            static.positions.fill_(cache.length)
            cache.length += 1
            logits = compiled(unread, cache=static)[0][:, -1]
        else:
            logits = model(unread, cache=cache)[0][:, -1]  # (B, vocab_size)
        if n_read < B:
            n_read = B
            logits, cache = logits.expand(B, -1), cache.expand(B)
        if observe:
            observe(logits)
        if repetition_penalty != 1.0:  # (Keskar et al. 2019, section 4.1)
            penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = next_token_probs(logits, temperature, top_k, top_p)
            token = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        if eos_token is not None:
            token = token.masked_fill(done, eos_token)
            done |= token == eos_token
        text[:, end] = token
        if repetition_penalty != 1.0:
            seen.scatter_(1, token[:, None], True)
        unread = token[:, None]
        yield token
        if eos_token is not None and done.all():
            return


def generate(model: MiniGPT, idx: torch.Tensor, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None,
             repetition_penalty=1.0, eos_token=None, generator=None):  # fmt: skip
    """Go on from idx: (B, T) token ids -> (B, T + new), new at most max_new_tokens.

    temperature, top_k and top_p as in `next_token_probs`. repetition_penalty divides the positive logits of tokens
    that are in the text already, and multiplies their negative ones. With eos_token a row that has drawn it is
    filled up with it, and all ends when every row has. Draws from generator, a torch.Generator on idx's device.
    Any length can be asked for: whenever block_size tokens are in the cache, their last half is read again, so the
    cost of a token stays bounded.
    """
    options = (temperature, top_k, top_p, repetition_penalty, eos_token, generator)
    tokens = list(stream(model, idx, max_new_tokens, *options))
    return torch.cat([idx, torch.stack(tokens, dim=1)], dim=1) if tokens else idx


def find_checkpoint(out_dir: str | Path, name: str = "") -> Path:
    """The path of the checkpoint called name in out_dir, by default best.pt, or last.pt where there is none."""
    return Path(out_dir) / (name or ("best.pt" if Path(out_dir, "best.pt").exists() else "last.pt"))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[MiniGPT, ByteTokenizer, dict]:
    """Return (model in eval mode, tokenizer, checkpoint) of the checkpoint at path."""
    path = Path(path)
    state = load_checkpoint(path)
    with refused(path):
        config, weights = model_config(state), state["model"]
        with torch.device("meta"):  # takes no memory: load_state_dict checks the shapes, then puts the weights in
            model = MiniGPT(config)
        model.load_state_dict(weights, assign=True)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("weights that are not finite")
        tokenizer = load_tokenizer(state["tokenizer"])
        if "source" not in state["tokenizer"]:
            raise KeyError("source")
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"a tokenizer of {tokenizer.vocab_size} for a model of {config.vocab_size}")
        return model.to(device, torch.float32).eval(), tokenizer, state


COLORS = ((0.9, 114), (0.5, 157), (0.1, 229), (0.01, 216), (0.0, 210))  # probability of at least, xterm colour


def paint(text: str, probability: float) -> str:
    """text in black on green (likely) to red (unlikely), by the escape codes of terminals."""
    code = next(color for low, color in COLORS if probability >= low)
    # the colour ends before a new line: a terminal would fill the rest of the line with it
    return "\n".join(f"\033[30;48;5;{code}m{line}\033[0m" if line else "" for line in text.split("\n"))


def describe_choice(probs, token, n, decode):
    """A line on a token that was drawn: its probability, and the n likeliest others. probs: (vocab_size,)."""
    others = [i for i in probs.topk(min(n + 1, len(probs))).indices.tolist() if i != token][:n]
    return " | ".join(f"{decode([i])!r} {probs[i]:.1%}" for i in [token, *others])


@one_line_errors()
def main(s):
    path = find_checkpoint(s.out_dir, s.checkpoint)
    device = pick_device(s.device)
    dtype = s.dtype
    if dtype == "auto":
        dtype = best_dtype(device) if device.type == "cuda" else "float32"
    if s.init_from:
        model, tokenizer = load_pretrained(s.init_from), load_pretrained_tokenizer(s.init_from)
        if tokenizer is None:
            raise UserError(
                f"{s.init_from} has no tokenizer.json of a kind that this program knows: it can't read text"
            )
        source = s.init_from
    else:
        model, tokenizer, state = load_model(path, device)
        source = f"{path}: step {state['step']}, trained on {state['tokenizer']['source']}"
    model = model.to(device, getattr(torch, dtype))
    if device.type == "cpu":
        pack(model, s.num_samples)
    if s.compile:
        compile_step(model)

    prompt = s.prompt
    if s.prompt_file:
        with open(0 if s.prompt_file == "-" else s.prompt_file, "rb") as file:
            prompt = file.read()
        try:
            prompt = prompt.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{s.prompt_file} is not UTF-8 text: invalid byte at offset {error.start}") from error
    if not prompt:
        raise UserError("the prompt is empty: it needs at least one character")
    idx = torch.tensor([tokenizer.encode(prompt)], device=device).expand(s.num_samples, -1)
    print(f"{source}; {device.type}, {dtype}", file=sys.stderr)

    eos_token = tokenizer.eos_token if s.stop_at_eos else None
    generator = torch.Generator(device).manual_seed(s.seed)
    options = (s.temperature, s.top_k, s.top_p, s.repetition_penalty, eos_token, generator)
    texts = [[] for _ in range(s.num_samples)]
    colored = s.show_probs and sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # (no-color.org)
    probs, choices = None, []

    def observe(logits):
        nonlocal probs
        probs = logits[0].float().softmax(-1)  # of the first text: what the model says, before temperature and the rest

    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    # a character may be several tokens: the decoder holds their bytes back until it is whole
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    start = time.perf_counter()
    print(prompt, end="", flush=True)
    looking = colored or s.alternatives > 0
    for tokens in stream(model, idx, s.max_new_tokens, *options, observe if looking else None):
        for text, token in zip(texts, tokens.tolist(), strict=True):
            if token != eos_token:
                text.append(token)
        if tokens[0] != eos_token:
            piece = decoder.decode(tokenizer.decode_bytes(texts[0][-1:]))
            print(paint(piece, probs[tokens[0]]) if colored else piece, end="", flush=True)
            if s.alternatives:
                choices.append(describe_choice(probs, texts[0][-1], s.alternatives, tokenizer.decode))
    print(decoder.decode(b"", final=True))
    seconds = time.perf_counter() - start
    for text in texts[1:]:
        print(f"---------------\n{prompt}{tokenizer.decode(text)}")
    if colored:
        legend = " ".join(paint(f" from {low:.0%} ", low) for low, _ in COLORS)
        print(f"the model's probability: {legend}", file=sys.stderr)
    for choice in choices:
        print(choice, file=sys.stderr)
    n_tokens = sum(map(len, texts))
    print(f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(settings)
