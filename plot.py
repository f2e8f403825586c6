"""Draw a training run, or what a model attends to. Needs matplotlib.

python plot.py --out_dir=out/shakespeare                          the run, to out/shakespeare/loss.png
python plot.py --out_dir=out/shakespeare --compare=out/other      two runs on one picture
python plot.py --out_dir=out/shakespeare --attention="To be, or not to be"     a heat map for each head

A run is read from metrics.jsonl in its out_dir: a JSON object a line with `step`, `seconds` since the run began, and
`loss`, `lr`, `grad_norm` (a training step) or `val_loss` (an evaluation). Any program can write that.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from config import UserError, one_line_errors, read_settings, setting


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    compare: str = setting("", "the out_dir of another run, drawn beside the first")
    attention: str = setting("", "draw the attention of the run's model to this text instead")
    file: str = setting("", "the picture to write: .png, .svg or .pdf; by default loss.png or attention.png in out_dir")


if __name__ == "__main__":  # before torch is loaded, which takes seconds: --help and mistakes are answered at once
    with one_line_errors():
        settings = read_settings(Settings, sys.argv[1:], __doc__)

import numpy as np
import torch

from files import write_whole
from model import MiniGPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = ("#1d5fbf", "#d9640f")  # of the runs; told apart also by those who see no red or no green


def new_figure(width: float, height: float) -> "Figure":
    """An empty matplotlib Figure of that many inches, which needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"{path}: pictures are written as .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=140))


def read_series(out_dir: str | Path) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """The curves in out_dir's metrics.jsonl: {"loss" | "val_loss" | "lr" | "grad_norm": (steps, seconds, values)}.

    A value that was not finite is NaN; a last line without its end, from a run that is being written, is left out.
    """
    path = Path(out_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}: train first, or give another out_dir")
    series = {name: ([], [], []) for name in ("loss", "val_loss", "lr", "grad_norm")}
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            step, seconds = int(record["step"]), float(record["seconds"])
            for name in series.keys() & record.keys():
                value = math.nan if record[name] is None else float(record[name])
                for values, x in zip(series[name], (step, seconds, value), strict=True):
                    values.append(x)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number} is not a line of metrics ({type(error).__name__})") from error
    if not any(values for _, _, values in series.values()):
        raise UserError(f"{path} has no metrics yet")
    return series


def running_mean(values: list[float], width: int) -> list[float]:
    """The mean of the width values around each, of fewer at the ends; NaN counts for nothing."""
    known = ~np.isnan(np.array(values, float))
    sums = np.cumsum([0.0, *np.where(known, values, 0.0)])
    counts = np.cumsum([0, *known])
    place = np.arange(len(values))
    first, end = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):  # where all are NaN, so is the mean
        return ((sums[end] - sums[first]) / (counts[end] - counts[first])).tolist()


def draw_run(out_dir: str | Path, compare: str = "", file: str = "") -> Path:
    """Draw the run in out_dir, and the one in compare, to file. Returns its path.

    From top to bottom loss, learning rate and gradient norm; on the left against steps, on the right against time.
    Raises UserError where a run or matplotlib is missing.
    """
    out_dir = Path(out_dir)
    names = [out_dir.as_posix(), Path(compare).as_posix()] if compare else [out_dir.as_posix()]
    runs = [read_series(name) for name in names]
    longest = max(seconds[-1] for run in runs for _, seconds, _ in run.values() if seconds)
    unit, size = ("seconds", 1) if longest < 200 else ("minutes", 60) if longest < 12_000 else ("hours", 3600)
    figure = new_figure(12, 7.5)
    from matplotlib.ticker import LogLocator, NullLocator

    axes = figure.subplots(3, 2, sharex="col", sharey="row", height_ratios=(3.4, 1, 1))
    labels = []  # (height, text, colour) of what stands at the end of a curve
    width = max(len(run["loss"][2]) // 60 | 1 for run in runs)  # odd, so that the mean is centred
    for run, color in zip(runs, COLORS, strict=False):
        mean = running_mean(run["loss"][2], width)
        for column, scale in ((0, 1), (1, size)):
            x = {key: [value / scale for value in run[key][column]] for key in run}
            loss, rate, norm = axes[:, column]
            loss.plot(x["loss"], run["loss"][2], color=color, linewidth=0.8, alpha=0.3 if width > 1 else 1)
            loss.plot(x["loss"], mean, color=color, linewidth=1.2 if width > 1 else 0)
            loss.plot(x["val_loss"], run["val_loss"][2], color=color, linewidth=2.4, marker="o", markersize=6,
                      markeredgecolor="white")  # fmt: skip
            rate.plot(x["lr"], run["lr"][2], color=color, linewidth=1.6)
            norm.plot(x["grad_norm"], run["grad_norm"][2], color=color, linewidth=0.9)
        for kind, values in (("validation", run["val_loss"][2]), ("training", mean)):
            if values and math.isfinite(values[-1]):
                best = f" (best {min(values):.3f})" if kind == "validation" and min(values) < values[-1] else ""
                labels.append((values[-1], f"{kind} {values[-1]:.3f}{best}", color))

    style(figure, axes, ("loss (nats a token)", "learning rate", "gradient norm"), ("step", f"time ({unit})"))
    axes[2, 0].set_yscale("log")  # and with it the one beside it, which shares the axis
    axes[2, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[2, 0].yaxis.set_minor_locator(NullLocator())
    axes[2, 0].yaxis.set_major_formatter("{x:g}")
    low, high = axes[0, 0].get_ylim()
    free = -math.inf
    for height, text, color in sorted(labels):  # each at its height, or above the one below it
        free = max(height, free + (high - low) / 22)
        axes[0, 1].text(1.02, free, text, color=color, va="center", transform=axes[0, 1].get_yaxis_transform())
    for place, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        figure.text(0.065 + 0.3 * place, 0.99, name, color=color, fontsize=14, fontweight="bold", va="top")
    note = "thick: validation, thin: training"
    if width > 1:
        note += f"\n(pale: as logged, dark: mean of {width} log lines)"
    axes[0, 0].text(0.98, 0.95, note, color=MUTED, ha="right", va="top", transform=axes[0, 0].transAxes)
    path = Path(file) if file else out_dir / "loss.png"
    save_figure(figure, path)
    return path


def style(figure: "Figure", axes: np.ndarray, y_labels: tuple[str, ...], x_labels: tuple[str, ...]) -> None:
    """Thin grey where matplotlib is black, names on the outer axes only."""
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.95))  # room for the title
    for row, y_label in zip(axes, y_labels, strict=True):
        row[0].set_ylabel(y_label, color=INK)
        for axis in row:
            axis.grid(color=GRID, linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(GRID)
            axis.tick_params(color=GRID, labelcolor=MUTED)
    for axis, x_label in zip(axes[-1], x_labels, strict=True):
        axis.set_xlabel(x_label, color=INK)


def attention_maps(model: MiniGPT, idx: torch.Tensor) -> torch.Tensor:
    """What each token attends to: (T,) token ids -> (n_layer, n_head, T, T), rows summing to 1.

    softmax(Q K^T / sqrt(D) + M) (Vaswani et al. 2017, equation 1, and the causal mask), written out. Q and K are what
    the layers of the model compute, taken from them in one forward pass.
    """
    seen = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda *call: seen.append(call[-1])) for block in model.h]
    try:
        with torch.inference_mode():
            model(idx[None])
    finally:
        for hook in hooks:
            hook.remove()
    T, H, C = len(idx), model.config.n_head, model.config.n_embd
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    maps = []
    for qkv in seen:
        q, k, _ = qkv.view(T, 3, H, C // H).permute(1, 2, 0, 3)  # each (H, T, D)
        scores = q @ k.transpose(1, 2) / math.sqrt(C // H)
        maps.append(scores.masked_fill(future, -math.inf).softmax(-1))
    return torch.stack(maps)


def draw_attention(out_dir: str | Path, prompt: str, file: str = "") -> Path:
    """Draw a heat map for each head of the model in out_dir as it reads prompt, to file. Returns its path.

    A row is a layer, a column a head; in each map a row is the token that looks and a column what it looks at.
    """
    from sample import find_checkpoint, load_model

    out_dir = Path(out_dir)
    model, tokenizer, _ = load_model(find_checkpoint(out_dir))
    ids = tokenizer.encode(prompt)
    if len(ids) > model.config.block_size:
        raise UserError(f"{len(ids)} tokens are more than the model can see at once ({model.config.block_size})")
    maps = attention_maps(model, torch.tensor(ids))
    layers, heads, T, _ = maps.shape
    tokens = [tokenizer.decode([i]).replace("\n", "\\n").replace(" ", "\N{OPEN BOX}") for i in ids]
    side = min(max(1.6, 0.17 * T), 4.0)  # inches a map
    figure = new_figure(heads * side + 1.2, layers * side + 0.8)
    axes = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in range(layers):
        for head in range(heads):
            axis = axes[layer, head]
            picture = axis.imshow(maps[layer, head].masked_fill(future, math.nan).numpy(), cmap="Blues", vmin=0, vmax=1)
            axis.set_facecolor(GRID)  # the future, which is masked
            axis.spines[:].set_visible(False)
            axis.tick_params(labelcolor=INK, labelsize=8, length=0)
            axis.tick_params(axis="x", labelrotation=90 if max(map(len, tokens)) > 1 else 0)
            if layer == 0:
                axis.set_title(f"head {head}", color=INK, fontsize=11)
        axes[layer, 0].set_ylabel(f"layer {layer}", color=INK, fontsize=11)
    if T <= 48:  # more could not be read; all maps share these
        axes[0, 0].set_xticks(range(T), tokens)
        axes[0, 0].set_yticks(range(T), tokens)
    bar = figure.colorbar(picture, ax=axes, shrink=0.4, aspect=30)
    bar.set_label("attention: share of each token to the left (a row sums to 1)", color=MUTED)
    bar.outline.set_visible(False)
    path = Path(file) if file else out_dir / "attention.png"
    save_figure(figure, path)
    return path


@one_line_errors()
def main(s: Settings) -> None:
    print(draw_attention(s.out_dir, s.attention, s.file) if s.attention else draw_run(s.out_dir, s.compare, s.file))


if __name__ == "__main__":
    main(settings)
