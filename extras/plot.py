"""Draw the losses, learning rate and gradient norm of a run, or of two. Needs matplotlib; run it in the repository.

python -m extras.plot --out_dir=out/shakespeare                        to out/shakespeare/loss.png, also during the run
python -m extras.plot --out_dir=out/shakespeare --compare=out/mine     two runs in one picture

A run is read from out_dir/metrics.jsonl: per line a JSON object of numbers, or null, with `step`, `seconds` since the
run began, and `loss`, `lr`, `grad_norm` (a training step) or `val_loss` (an evaluation). Any program can write that.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.checkpoint import write_whole
from support.settings import UserError, one_line_errors, read_settings, setting

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = ("#1d5fbf", "#d9640f")  # of the runs; also told apart without seeing red or green


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    compare: str = setting("", "the out_dir of a second run, to draw with the first")
    file: str = setting("", "picture to write: .png, .svg or .pdf; by default loss.png in out_dir")


def parse_metrics(text: bytes, path: Path) -> list[dict[str, float]]:
    """The records in text, read from path: one per line, without what is null. A last line without its end is left out:
    it is being written. Raises UserError for a line that is not a record."""
    records = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            record = {key: float(value) for key, value in json.loads(line).items() if value is not None}
            records.append(record | {"step": int(record["step"]), "seconds": record["seconds"]})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} has a line that is not one of metrics: {line[:60]!r}") from error
    return records


def read_series(out_dir: str | Path) -> dict[str, np.ndarray]:
    """The curves of the run in out_dir: "loss", "val_loss", "lr", "grad_norm" -> (3, n): steps, seconds, values."""
    path = Path(out_dir) / "metrics.jsonl"
    records = parse_metrics(path.read_bytes(), path) if path.is_file() else []
    if not records:
        raise UserError(f"no metrics in {path}: train first, or give another out_dir")
    points = {
        name: [(record["step"], record["seconds"], record[name]) for record in records if name in record]
        for name in ("loss", "val_loss", "lr", "grad_norm")
    }
    return {name: np.array(rows, float).reshape(-1, 3).T for name, rows in points.items()}


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the width values around each, fewer at the ends."""
    return np.array([values[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(len(values))])


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Any]:
    """Give an empty matplotlib Figure of that many inches, which needs no display, to draw in; then write it to path.

    Raises UserError without matplotlib, for an unknown kind of picture, and for a path that can't be written.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path}: pictures are written as .png, .svg or .pdf")
    with matplotlib.rc_context():  # thin grey where matplotlib is black
        matplotlib.rc("axes", grid=True, edgecolor=GRID, labelcolor=INK, labelsize=12)
        matplotlib.rc("axes.grid", which="both")
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc(("xtick", "ytick"), color=GRID, labelcolor=MUTED)
        matplotlib.rc("grid", color=GRID)
        matplotlib.rc("text", parse_math=False)  # a $ is a $
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        yield figure
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dpi = min(140, 10_000 / max(width, height))
            write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi, bbox_inches="tight"))
        except OSError as error:
            raise UserError(f"can't write {path}: {error}") from error


def drawable(text: str) -> str:
    """text with an escape such as \\u4e2d for each character that matplotlib's font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in text)


def draw_run(out_dir: str | Path, compare: str | Path = "", file: str | Path = "") -> Path:
    """Draw the run in out_dir, and the one in compare, to file, by default out_dir/loss.png. Returns its path.

    From top to bottom loss, learning rate and gradient norm; on the left against steps, on the right against time.
    Raises UserError as `read_series` and `picture` do.
    """
    runs = {Path(name).as_posix(): read_series(name) for name in (out_dir, compare) if name}
    longest = max(seconds.max(initial=0) for run in runs.values() for _, seconds, _ in run.values())
    unit, size = ("seconds", 1) if longest < 200 else ("minutes", 60) if longest < 12_000 else ("hours", 3600)
    width = max(run["loss"].shape[1] // 60 | 1 for run in runs.values())  # odd, so that the mean is centred
    path = Path(file or Path(out_dir, "loss.png"))
    with picture(path, 12, 7.5) as figure:
        axes = figure.subplots(3, 2, sharex="col", sharey="row", height_ratios=(3.4, 1, 1))
        for (name, run), color in zip(runs.items(), COLORS, strict=False):
            evaluated = f"   best validation loss {run['val_loss'][2].min():.3f}" if run["val_loss"].size else ""
            thin = {"color": color, "marker": "o" if run["loss"].shape[1] == 1 else None}  # a line needs two points
            for column, scale in enumerate((1, size)):
                loss, rate, norm = axes[:, column]
                x = {key: curve[column] / scale for key, curve in run.items()}
                loss.plot(x["loss"], run["loss"][2], linewidth=0.8, alpha=0.3, **thin)
                loss.plot(x["loss"], running_mean(run["loss"][2], width), linewidth=1.2, **thin)
                (thick,) = loss.plot(x["val_loss"], run["val_loss"][2], color=color, linewidth=2.4, marker="o")
                thick.set(markeredgecolor="white", label="" if column else drawable(name) + evaluated)
                rate.plot(x["lr"], run["lr"][2], linewidth=1.6, **thin)
                norm.plot(x["grad_norm"], run["grad_norm"][2], linewidth=0.9, **thin)

        note = "thick: validation, thin: training"
        note += f"\n(pale: as logged, dark: mean of {width} log lines)" if width > 1 else ""
        axes[0, 0].text(0.98, 0.95, note, color=MUTED, ha="right", va="top", transform=axes[0, 0].transAxes)
        axes[0, 0].set_ylabel("loss (nats per token)")
        axes[1, 0].set_ylabel("learning rate")
        axes[2, 0].set(xlabel="step", ylabel="gradient norm", xlim=(0, None))
        axes[2, 0].set_yscale("log", subs=(2, 5))  # and with it the one beside it, which shares the axis
        axes[2, 0].yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes[2, 1].set(xlabel=f"time ({unit})", xlim=(0, None))
        title = {"weight": "bold", "size": min(14, 1200 / (30 + max(map(len, runs))))}  # so that it fits
        figure.legend(loc="outside upper left", labelcolor="linecolor", frameon=False, prop=title)
    return path


@one_line_errors(OSError)
def main(s: Settings) -> None:
    print(draw_run(s.out_dir, s.compare, s.file))


if __name__ == "__main__":
    with one_line_errors():
        settings = read_settings(Settings, sys.argv[1:], __doc__)
    main(settings)
