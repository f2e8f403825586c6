"""Look into a trained model: how sure it is of each token, and where its attention goes.

python -m extras.look --out_dir=out/shakespeare --prompt="ROMEO:"     text coloured by probability
python -m extras.look --out_dir=out/shakespeare --alternatives=3      other likely tokens, too
python -m extras.look --out_dir=out/shakespeare --attention="To be, or not to be"     a picture
python -m extras.look --out_dir=out/shakespeare --prompt="ROMEO:" --html=look.html    a web page

Run it in the repository. It takes the settings of sample.py, except --compile, and generates the
same text. Colours appear in a terminal only. The picture has a map for each attention head. The
page is one file that a browser opens offline; it shows predictions, attention and layers. For the
step from text to ids, a model with --tokenizer=bpe:512 shows more than one of characters.
"""

import base64
import codecs
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
from extras.plot import GRID, drawable, picture
from model import MiniGPT
from support.checkpoint import write_atomically
from support.fast import pack
from support.runtime import pick_device
from support.settings import UserError, run_script, setting, user_error
from support.tokenizer import Tokenizer

# at least this probability: this xterm colour
COLORS = ((0.9, 114), (0.5, 157), (0.1, 229), (0.01, 216), (0.0, 210))

PAGE_TOKENS = 256  # of a text on a page, at most
PAGE_CHOICES = 50  # of the likeliest tokens for each place
PAGE_TEMPERATURES = [step / 10 for step in range(1, 21)]  # of the slider


@dataclass
class Settings(sample.Settings):
    max_new_tokens: int = setting(100, "tokens to generate; 0 looks at the prompt alone", low=0)
    alternatives: int = setting(0, "list this many other likely tokens for each token", low=0)
    attention: str = setting("", "draw how the model's attention looks at this text instead")
    file: str = setting("", "picture to write: .png, .svg or .pdf; else attention.png in out_dir")
    html: str = setting("", "write a web page on the text and the model to this file instead")


def token_logits(model: MiniGPT, idx: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what the model predicts after each token of idx: (T,) ids -> T times (vocab_size,).

    A text longer than block_size is read in windows of block_size tokens. Each begins half a window
    after the one before it, so every later prediction has at least half a window of context.
    """
    block_size = model.config.block_size
    n_predicted = 0
    for begin in range(0, len(idx), max(1, block_size // 2)):
        window = idx[begin : begin + block_size]
        with torch.inference_mode():
            logits, _ = model(window[None])
        yield from logits[0, n_predicted - begin :].float()
        n_predicted = begin + len(window)
        if n_predicted == len(idx):
            return


def module_outputs(
    model: MiniGPT, modules: list[nn.Module], idx: torch.Tensor
) -> list[torch.Tensor]:
    """The output of each of the model's modules, in the order in which they run on idx, (T,) ids.

    Each is without its batch dimension: (T, ...).
    """
    outputs = []

    def keep(module, arguments, output):
        outputs.append(output[0])

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        with torch.inference_mode():
            model(idx[None])
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@torch.inference_mode()
def attention_maps(model: MiniGPT, idx: torch.Tensor) -> torch.Tensor:
    """What each token attends to, softmax(Q K^T / sqrt(D) + mask): (T,) ids -> (n_layer, H, T, T).

    In float32, on the CPU; maps[layer, head, i, j] is how much token i looks at token j. Raises
    UserError for a model that was changed to compute its attention in another way.
    """
    T = len(idx)
    n_head = model.config.n_head
    problem = "this model computes attention in another way than attention_maps does"
    if not all(hasattr(block.attn, "c_attn") for block in model.h):
        raise UserError(problem)
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    maps = []
    qkvs = module_outputs(model, [block.attn.c_attn for block in model.h], idx)
    outputs = module_outputs(model, [block.attn for block in model.h], idx)
    for block, qkv, output in zip(model.h, qkvs, outputs, strict=True):
        q, k, v = qkv.view(T, 3, n_head, -1).permute(1, 2, 0, 3)  # each (H, T, D)
        scores = q.float() @ k.float().transpose(1, 2) / math.sqrt(q.size(-1))  # (H, T, T)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        maps.append(weights.cpu())
        y = weights.to(v.dtype) @ v  # (H, T, D)
        expected = block.attn.c_proj(y.transpose(0, 1).reshape(T, -1))
        if (output - expected).norm() > 0.05 * output.norm():
            raise UserError(problem)
    return torch.stack(maps)


def visible(token: bytes) -> str:
    """The text of a token, with an escape for what can't be seen.

    A new line becomes \\n, and a byte that is only a part of a character \\xe2.
    """
    text = token.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def paint(text: str, probability: float) -> str:
    """text in black on a colour for its probability, from green (likely) to red (unlikely)."""
    code = next(color for low, color in COLORS if probability >= low)
    painted = []
    for line in text.split("\n"):  # a new line in colour would fill the rest of the line with it
        if line:
            line = f"\033[30;48;5;{code}m{line}\033[0m"
        painted.append(line)
    return "\n".join(painted)


def describe_choice(probs: torch.Tensor, token: int, n: int, tokenizer: Tokenizer) -> str:
    """A line on a token: its probability, then the n likeliest others. probs: (vocab_size,)."""
    likeliest = probs.topk(min(n + 1, len(probs))).indices.tolist()
    others = [i for i in likeliest if i != token]
    parts = []
    for i in [token, *others[:n]]:
        text = f"'{visible(tokenizer.decode_bytes([i]))}'"
        parts.append(f"{text:>8} {probs[i]:6.1%}")
    return " | ".join(parts)


def generate_texts(
    model: MiniGPT, tokenizer: Tokenizer, ids: list[int], s: Settings
) -> list[list[int]]:
    """num_samples continuations of ids as token ids, drawn as sample.py would draw them.

    One in which the end-of-text token was drawn ends before it.
    """
    device = model.wte.weight.device
    options = sample.sampling_options(s, tokenizer, device)
    if device.type == "cpu":
        model = pack(model, s.num_samples)
    text = sample.generate(
        model,
        torch.tensor([ids], device=device).expand(s.num_samples, -1),
        s.max_new_tokens,
        **options,
    )
    eos_token = options["eos_token"]
    continuations = text[:, len(ids) :].tolist()
    return [list(takewhile(lambda token: token != eos_token, row)) for row in continuations]


def show_text(
    model: MiniGPT, tokenizer: Tokenizer, prompt: str, new: list[int], n_alternatives: int
) -> None:
    """Print the prompt and its continuation new, coloured by the model's own probabilities.

    They are those before temperature, top_k, top_p and repetition_penalty. Then, where
    n_alternatives is not 0, a line per token with as many others that were likely.
    """
    ids = tokenizer.encode(prompt)
    if not new:  # nothing was generated: look at the prompt itself
        ids, new = ids[:1], ids[1:]
        prompt = tokenizer.decode(ids)
    logits = token_logits(model, torch.tensor(ids + new, device=model.wte.weight.device))
    choices = []
    # a character may be several tokens: the decoder holds their bytes back until it is complete
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="")
    for i, prediction in enumerate(logits, start=1):  # of the token i
        if i < len(ids) or i == len(ids) + len(new):
            continue
        token = new[i - len(ids)]
        probs = sample.next_token_probs(prediction)
        text = decoder.decode(tokenizer.decode_bytes([token]))
        if is_colored():
            text = paint(text, probs[token].item())
        print(text, end="")
        choices.append(describe_choice(probs, token, n_alternatives, tokenizer))
    print(decoder.decode(b"", final=True))
    if n_alternatives > 0:
        print("\neach token, and the likeliest others:", *choices, sep="\n")


def is_colored() -> bool:
    """Whether to print colours: in a terminal, unless NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def show_texts(model: MiniGPT, tokenizer: Tokenizer, s: Settings) -> None:
    """Generate the texts that s asks for and print them, coloured in a terminal."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    separator = ""
    for prompt in sample.read_prompts(s, tokenizer):
        for new in generate_texts(model, tokenizer, tokenizer.encode(prompt), s):
            print(separator, end="")
            separator = f"{sample.SEPARATOR}\n"
            show_text(model, tokenizer, prompt, new, s.alternatives)
    if is_colored():
        legend = [paint(f" from {low:.0%} ", low) for low, _ in COLORS]
        print("the model's probability:", *legend, file=sys.stderr)


def draw_attention(model: MiniGPT, tokenizer: Tokenizer, text: str, path: Path) -> None:
    """Draw a heat map for each head of the model as it reads text.

    Raises UserError for a text of more than block_size tokens.
    """
    ids = tokenizer.encode(text)
    check_length(ids, model.config.block_size)
    maps = attention_maps(model, torch.tensor(ids, device=model.wte.weight.device))
    n_layer, n_head, n, _ = maps.shape
    labels = []
    for i in ids:
        label = visible(tokenizer.decode_bytes([i]))
        labels.append(drawable(label.replace(" ", "\N{MIDDLE DOT}")))
    rotation = 90 if max(map(len, labels)) > 1 else 0
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    maps = maps.masked_fill(future, math.nan)  # NaN is not drawn
    inches = max(1.6, 0.2 * n)  # of a map
    with picture(path, n_head * inches + 1, n_layer * inches + 1.5) as figure:
        options = {"facecolor": GRID, "xticks": [], "yticks": []}
        axes = figure.subplots(n_layer, n_head, squeeze=False, subplot_kw=options)
        for layer in range(n_layer):
            for head in range(n_head):
                axis = axes[layer, head]
                heat_map = axis.imshow(maps[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
                axis.set_title(f"layer {layer}, head {head}", size=12)
                axis.tick_params(labelcolor="black", labelsize=9, length=0)
                axis.grid(False)
        for axis in axes[:, 0]:
            axis.set_yticks(range(n), labels)
        for axis in axes[-1]:
            axis.set_xticks(range(n), labels, rotation=rotation)
        figure.supxlabel("token looked at")
        figure.supylabel("token that looks")
        label = "attention (a row sums to 1)"
        figure.colorbar(
            heat_map, ax=axes, location="top", pad=0.01, shrink=0.5, aspect=50, label=label
        )


def check_length(ids: list[int], longest: int) -> None:
    """Raise UserError for more than longest token ids."""
    if len(ids) > longest:
        raise UserError(f"{len(ids)} tokens are more than the {longest} that can be looked at")


@torch.inference_mode()
def layer_guesses(model: MiniGPT, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each layer would predict if it were the last (the logit lens, nostalgebraist 2020).

    (T,) token ids -> the likeliest token after each of them and its probability, both (n_layer, T).
    """
    tokens = []
    probs = []
    for x in module_outputs(model, list(model.h), idx):  # (T, C)
        logits = model.lm_head(model.ln_f(x))[:, : model.config.vocab_size]
        best = sample.next_token_probs(logits).max(-1)
        tokens.append(best.indices)
        probs.append(best.values)
    return torch.stack(tokens), torch.stack(probs)


def packed(tensor: torch.Tensor, dtype: str) -> str:
    """The numbers of a tensor, row by row, as base64 of a numpy dtype."""
    return base64.b64encode(tensor.cpu().numpy().astype(dtype).tobytes()).decode()


@torch.inference_mode()
def page_data(model: MiniGPT, tokenizer: Tokenizer, ids: list[int]) -> dict:
    """What extras/look.html shows of a text of T token ids.

    Row i of what is predicted belongs to the token after token i, which nobody knows for the last.
    """
    T = len(ids)
    idx = torch.tensor(ids, device=model.wte.weight.device)
    logits = torch.stack(list(token_logits(model, idx)))  # (T, vocab_size)
    choices = logits.topk(min(PAGE_CHOICES, logits.size(1)))
    rest = []  # for each temperature, the probability of all tokens that are not among choices
    for temperature in PAGE_TEMPERATURES:
        probs = sample.next_token_probs(logits, temperature)
        rest.append(1 - probs.gather(1, choices.indices).sum(1))
    probs = sample.next_token_probs(logits)
    actual = logits[:-1].gather(1, idx[1:, None])  # (T - 1, 1)
    guesses, guess_probs = layer_guesses(model, idx)
    maps = attention_maps(model, idx)
    rows, columns = torch.tril_indices(T, T)
    used = torch.cat([idx, choices.indices.flatten(), guesses.flatten()]).unique().tolist()
    return {
        "ids": ids,
        "bytes": [tokenizer.decode_bytes([i]).hex(" ") for i in ids],
        "texts": {i: visible(tokenizer.decode_bytes([i])) for i in used},
        "vocab_size": model.config.vocab_size,
        "n_layer": model.config.n_layer,
        "n_head": model.config.n_head,
        "n_choices": choices.indices.size(1),
        "choices": packed(choices.indices, "<i4"),  # (T, n_choices)
        "logits": packed(choices.values, "<f4"),  # (T, n_choices)
        "rest": packed(torch.stack(rest), "<f4"),  # (temperatures, T)
        "loss": F.cross_entropy(logits[:-1], idx[1:], reduction="none").tolist(),
        "rank": ((logits[:-1] > actual).sum(1) + 1).tolist(),
        "entropy": torch.special.entr(probs).sum(1).tolist(),
        "guesses": packed(guesses, "<i4"),  # (n_layer, T)
        "guess_probs": packed(guess_probs, "<f4"),  # (n_layer, T)
        # rows of what a token may look at, one after another, in 255ths
        "attention": packed(maps[:, :, rows, columns].mul(255).round(), "u1"),
    }


def write_page(model: MiniGPT, tokenizer: Tokenizer, source: str, s: Settings, path: Path) -> None:
    """Write a web page on the prompt and its continuation, as far as there is room for it.

    Raises UserError for a prompt longer than block_size or PAGE_TOKENS.
    """
    prompts = sample.read_prompts(s, tokenizer)
    if len(prompts) > 1 or s.num_samples > 1:
        raise UserError("a page has one text: give one prompt and no --num_samples")
    ids = tokenizer.encode(prompts[0])
    longest = min(PAGE_TOKENS, model.config.block_size)
    check_length(ids, longest)
    s = replace(s, max_new_tokens=min(s.max_new_tokens, longest - len(ids)))
    (new,) = generate_texts(model, tokenizer, ids, s)
    data = page_data(model, tokenizer, ids + new)
    data["n_prompt"] = len(ids)
    data["source"] = (
        f"{source}; text drawn with temperature {s.temperature}, top_k {s.top_k}, top_p {s.top_p}, "
        f"repetition_penalty {s.repetition_penalty}, seed {s.seed}"
    )
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # in JSON a < can be escaped, so that no text can end the script element
    page = template.replace("{data}", json.dumps(data).replace("<", "\\u003c"))
    with user_error(f"can't write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(page.encode()))
    print(f"{path}: {len(ids + new)} tokens, {len(page.encode()) / 1e6:.1f} MB")


def main(s: Settings) -> None:
    if s.compile:
        raise UserError("--compile is for sample.py: here it has no effect")
    model, tokenizer, source = sample.open_model(s, pick_device(s.device))
    if s.html:
        write_page(model, tokenizer, source, s, Path(s.html))
    elif s.attention:
        path = Path(s.file) if s.file else Path(s.out_dir, "attention.png")
        draw_attention(model, tokenizer, s.attention, path)
        print(path)
    else:
        show_texts(model, tokenizer, s)


if __name__ == "__main__":
    run_script(main, Settings, __doc__, positional="prompt")
