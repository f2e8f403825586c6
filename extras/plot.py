"""Draw the losses, learning rate and gradient norm of runs. Needs matplotlib.

python -m extras.plot out/shakespeare             to out/shakespeare/loss.png, also during a run
python -m extras.plot out/shakespeare out/mine    several runs in one picture

Run it in the repository. A run is read from metrics.jsonl in its folder: per line a JSON object of
numbers, or null, with `step`, `seconds` since the run began, and `loss`, `lr`, `grad_norm` (a
training step) or `val_loss` (an evaluation). Any program can write that.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from support.checkpoint import write_atomically
from support.settings import UserError, optional, run_script, setting, user_error

MUTED = "#6b7280"
GRID = "#e5e7eb"
COLORS = ("#1d5fbf", "#d9640f", "#0f8a6a", "#b0569b")  # also told apart without red or green
STYLE = {
    "axes.grid": True,
    "axes.grid.which": "both",
    "grid.color": GRID,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.parse_math": False,
}

Records = list[dict[str, float]]


@dataclass
class Settings:
    out_dir: list[str] | None = setting(None, "the out_dir of a training run, or of several")
    file: str = setting("", "picture to write: .png, .svg or .pdf; by default loss.png in out_dir")


def read_metrics(out_dir: str | Path) -> Records:
    """The records of the run in out_dir, one per line, without what is null.

    A last line without its end is left out: it is being written. Raises UserError where there are
    none, and for a line that is not a record.
    """
    path = Path(out_dir, "metrics.jsonl")
    text = path.read_bytes() if path.is_file() else b""
    records = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        problem = f"{path} has a line that is not one of metrics: {line[:60]!r}"
        with user_error(problem, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            record = {}
            for key, value in json.loads(line).items():
                if value is not None:
                    record[key] = float(value)
            record["step"] = int(record["step"])
            if "seconds" not in record:
                raise KeyError("seconds")
            records.append(record)
    if not records:
        raise UserError(f"no metrics in {path}: train first, or give another out_dir")
    return records


def values_of(records: Records, x: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(values of x, values of key) of the records that have key."""
    chosen = [record for record in records if key in record]
    return np.array([record[x] for record in chosen]), np.array([record[key] for record in chosen])


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the width values around each, fewer at the ends."""
    means = []
    for i in range(len(values)):
        means.append(values[max(0, i - width // 2) : i + width // 2 + 1].mean())
    return np.array(means)


def loss_limits(runs: list[Records]) -> tuple[float, float] | None:
    """Limits of the loss axis: a long run's first tenth, which falls steeply, may be cut off."""
    shown = []
    for records in runs:
        losses = [record for record in records if "loss" in record]
        if len(losses) < 20:
            return None
        for record in records[len(records) // 10 :]:
            shown += [record[key] for key in ("loss", "val_loss") if key in record]
    margin = 0.05 * (max(shown) - min(shown))
    return min(shown) - margin, max(shown) + margin


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator:
    """Give an empty matplotlib Figure of that many inches to draw in, then write it to path.

    It needs no display. Raises UserError without matplotlib, for a kind of picture unknown to it,
    and for a path that can't be written.
    """
    new_figure = optional("matplotlib.figure").Figure
    with optional("matplotlib").rc_context(STYLE):
        figure = new_figure(figsize=(width, height), layout="constrained")
        yield figure
        options = {
            "format": path.suffix[1:],
            "dpi": min(140, 10_000 / max(width, height)),
            "bbox_inches": "tight",
        }
        with user_error(f"can't write {path}", OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: figure.savefig(file, **options))


def drawable(text: str) -> str:
    """text with an escape such as \\u4e2d for each character that matplotlib's font lacks."""
    fonts = optional("matplotlib.font_manager")
    glyphs = fonts.get_font(fonts.findfont(fonts.FontProperties())).get_charmap()
    return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in text)


def draw_curves(axes: np.ndarray, records: Records, color: str, width: int) -> None:
    """Draw a run in the 3 x 2 axes: loss, learning rate, gradient norm; over steps, over time."""
    curves = (  # row, key, log lines in a mean, look
        (0, "loss", 1, {"lw": 0.8, "alpha": 0.3}),
        (0, "loss", width, {"lw": 1.2}),
        (0, "val_loss", 1, {"lw": 2.4, "marker": "o", "mec": "white"}),
        (1, "lr", 1, {"lw": 1.6}),
        (2, "grad_norm", 1, {"lw": 0.9}),
    )
    for column, (x, scale) in enumerate((("step", 1), ("seconds", 60))):
        for row, key, n, look in curves:
            xs, ys = values_of(records, x, key)
            if len(xs) == 1:
                look = {**look, "marker": "o"}  # a line needs two points
            axes[row, column].plot(xs / scale, running_mean(ys, n), color=color, **look)


def draw_runs(out_dirs: list[str | Path], file: str | Path = "") -> Path:
    """Draw the runs to file, by default loss.png in the folder of the first. Returns its path.

    From top to bottom loss, learning rate and gradient norm; on the left against steps, on the
    right against time. Raises UserError as `read_metrics` and `picture` do.
    """
    path = Path(out_dirs[0], "loss.png")
    if file:
        path = Path(file)
    runs = [read_metrics(out_dir) for out_dir in out_dirs]
    n_logged = max(sum("loss" in record for record in records) for records in runs)
    width = 2 * (n_logged // 120) + 1  # odd, so that a mean is centred
    names = [drawable(Path(out_dir).as_posix()) for out_dir in out_dirs]
    with picture(path, 12, 7.5) as figure:
        axes = figure.subplots(3, 2, sharex="col", sharey="row", height_ratios=(3.4, 1, 1))
        for name, records, color in zip(names, runs, cycle(COLORS), strict=False):
            draw_curves(axes, records, color, width)
            _, val_losses = values_of(records, "step", "val_loss")
            if len(val_losses) > 0:
                name += f"   best validation loss {val_losses.min():.3f}"
            axes[0, 0].lines[-1].set_label(name)

        note = "thick: validation\nthin: training"
        if width > 1:
            note += f", mean of {width} log lines; pale: as logged"
        corner = {"ha": "right", "va": "top", "transform": axes[0, 0].transAxes}
        axes[0, 0].text(0.98, 0.95, note, color=MUTED, **corner)
        axes[0, 0].set(ylabel="loss (nats per token)", ylim=loss_limits(runs))
        axes[1, 0].set_ylabel("learning rate")
        axes[2, 0].set(xlabel="step", ylabel="gradient norm", xlim=(0, None))
        axes[2, 0].set_yscale("log", subs=(2, 5))  # and the one beside it, which shares the axis
        axes[2, 0].yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes[2, 1].set(xlabel="time (minutes)", xlim=(0, None))
        size = min(14, 1200 / (30 + max(map(len, names))))  # so that a long name fits
        title = {"weight": "bold", "size": size}
        figure.legend(loc="outside upper left", labelcolor="linecolor", frameon=False, prop=title)
    return path


def main(s: Settings) -> None:
    out_dirs = s.out_dir
    if not out_dirs:
        out_dirs = ["out"]
    print(draw_runs(out_dirs, s.file))


if __name__ == "__main__":
    run_script(main, Settings, __doc__, positional="out_dir", user_errors=(OSError,))
