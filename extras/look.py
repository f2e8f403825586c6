"""Look into a trained model: how sure it is of each token, and where its attention goes. Run it in the repository.

python -m extras.look --out_dir=out/shakespeare --prompt="ROMEO:"     a text, coloured by probability in a terminal
python -m extras.look --out_dir=out/shakespeare --alternatives=3      and a line per token with other likely ones
python -m extras.look --out_dir=out/shakespeare --attention="To be, or not to be"     a picture with a map per head

It takes the settings of sample.py, except --compile, and writes the same text; the first of several is coloured.
"""

import os
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import sample
from extras.plot import GRID, drawable, picture
from model import MiniGPT
from support.fast import reader
from support.runtime import pick_device
from support.settings import UserError, run_script, setting
from support.tokenizer import ByteTokenizer

COLORS = ((0.9, 114), (0.5, 157), (0.1, 229), (0.01, 216), (0.0, 210))  # probability of at least, xterm colour


@dataclass
class Settings(sample.Settings):
    alternatives: int = setting(0, "list this many other likely tokens for each token", 0)
    attention: str = setting("", "draw how the model's attention looks at this text instead")
    file: str = setting("", "picture to write: .png, .svg or .pdf; by default attention.png in out_dir")


def paint(text: str, probability: float) -> str:
    """text in black on green (likely) to red (unlikely); no new line in colour, which would fill the line with it."""
    code = next(color for low, color in COLORS if probability >= low)
    return "\n".join(f"\033[30;48;5;{code}m{line}\033[0m" if line else "" for line in text.split("\n"))


def visible(token: bytes) -> str:
    """The text of a token, with an escape for what can't be seen: \\n, or \\xe2 for a part of a character."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token.decode(errors="backslashreplace"))


def describe_choice(probs: torch.Tensor, token: int, n: int, tokenizer: ByteTokenizer) -> str:
    """A line on a token that was drawn: its probability, then the n likeliest others. probs: (vocab_size,)."""
    others = [i for i in probs.topk(min(n + 1, len(probs))).indices.tolist() if i != token][:n]
    texts = {i: f"'{visible(tokenizer.decode_bytes([i]))}'" for i in (token, *others)}
    return " | ".join(f"{text:>8} {probs[i]:6.1%}" for i, text in texts.items())


def write(model: MiniGPT, tokenizer: ByteTokenizer, s: Settings) -> None:
    """Print the text that sample.py would, coloured in a terminal, then the lines that alternatives ask for.

    The probabilities are the model's own: before temperature, top_k, top_p and repetition_penalty.
    """
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # (no-color.org)
    predicted, choices = deque(), ["\neach token, and the likeliest others:"] if s.alternatives else []

    def read(idx, cache):
        logits, _ = reader(model, s.num_samples)(idx, cache=cache)
        predicted.append(logits[0, -1].float().softmax(-1))
        return logits, None

    def paint_token(text, token):
        probs = predicted.popleft()
        if s.alternatives:
            choices.append(describe_choice(probs, token, s.alternatives, tokenizer))
        return paint(text, probs[token]) if colored else text

    sample.write(model, tokenizer, s, paint_token, read)
    print(*choices, sep="\n", end="\n" if choices else "")
    if colored:
        print("the model's probability:", *(paint(f" from {low:.0%} ", low) for low, _ in COLORS), file=sys.stderr)


def attention_maps(model: MiniGPT, idx: torch.Tensor) -> torch.Tensor:
    """What each token attends to, softmax(Q K^T / sqrt(D) + M): (T,) token ids -> (n_layer, n_head, T, T).

    Each attention that the model computes, softmax(...) V, is computed with the identity for V too.
    """
    maps, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        identity = torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        maps.append(attend(q, k, identity, **options))
        return attend(q, k, v, **options)

    with torch.inference_mode(), patch.object(F, "scaled_dot_product_attention", watched):
        model(idx[None])
    return torch.cat(maps).float().cpu()


def draw_attention(model: MiniGPT, tokenizer: ByteTokenizer, text: str, path: Path) -> None:
    """Draw a heat map for each head of the model as it reads text. Raises UserError for more than block_size tokens."""
    ids = tokenizer.encode(text)
    if len(ids) > model.config.block_size:
        raise UserError(f"{len(ids)} tokens are more than the model can see at once ({model.config.block_size})")
    maps = attention_maps(model, torch.tensor(ids, device=model.wte.weight.device))
    n_layer, n_head, n, _ = maps.shape
    maps = maps.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), torch.nan)  # the future, which is not seen
    image = F.pad(maps, (0, 2, 2, 0)).transpose(1, 2).reshape(n_layer * (n + 2), n_head * (n + 2))  # side by side
    inch = max(0.2, 1.6 / (n + 2))  # of a cell: room for labels and titles
    with picture(path, image.size(1) * inch + 3, image.size(0) * inch + 4) as figure:
        axis = figure.subplots(subplot_kw={"facecolor": GRID})
        colors = axis.imshow(image.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        for layer, head in np.ndindex(n_layer, n_head):
            axis.text(head * (n + 2), layer * (n + 2) + 1, f"layer {layer}, head {head}", size=12)
        labels = [drawable(visible(tokenizer.decode_bytes([i])).replace(" ", "\N{MIDDLE DOT}")) for i in ids]
        columns, rows = np.arange(image.size(1)).reshape(n_head, -1), np.arange(image.size(0)).reshape(n_layer, -1)
        axis.set_xticks(columns[:, :n].ravel(), labels * n_head, rotation=90 if max(map(len, labels)) > 1 else 0)
        axis.set_yticks(rows[:, 2:].ravel(), labels * n_layer)
        axis.tick_params(labelcolor="black", labelsize=11, length=0)
        axis.set(xlabel="token looked at", ylabel="token that looks")
        axis.grid(False)
        figure.colorbar(colors, location="top", shrink=0.5, aspect=50, pad=0.01, label="attention (a row sums to 1)")


def main(s: Settings) -> None:
    model, tokenizer, _ = sample.open_model(s, pick_device(s.device))
    if s.attention:
        path = Path(s.file or Path(s.out_dir, "attention.png"))
        draw_attention(model, tokenizer, s.attention, path)
        print(path)
    else:
        write(model, tokenizer, s)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
