"""Draw the losses, learning rate and gradient norm of a run, or of two. Needs matplotlib; run it in the repository.

python -m extras.plot --out_dir=out/shakespeare                        to out/shakespeare/loss.png, also during the run
python -m extras.plot --out_dir=out/shakespeare --compare=out/mine     two runs in one picture

A run is read from out_dir/metrics.jsonl: per line a JSON object of numbers, or null, with `step`, `seconds` since the
run began, and `loss`, `lr`, `grad_norm` (a training step) or `val_loss` (an evaluation). Any program can write that.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.checkpoint import write_atomically
from support.settings import UserError, optional, run_script, setting, user_error

MUTED, GRID = "#6b7280", "#e5e7eb"
COLORS = ("#1d5fbf", "#d9640f")  # of the runs; also told apart without seeing red or green
STYLE = {
    "axes.grid": True,
    "grid.color": GRID,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
STYLE |= {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.which": "both",
    "text.parse_math": False,
}


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    compare: str = setting("", "the out_dir of a second run, to draw with the first")
    file: str = setting("", "picture to write: .png, .svg or .pdf; by default loss.png in out_dir")


def read_metrics(out_dir: str | Path) -> list[dict[str, float]]:
    """The records of the run in out_dir, one per line, without what is null. A last line without its end is left out:
    it is being written. Raises UserError where there are none, and for a line that is not a record."""
    path, records = Path(out_dir, "metrics.jsonl"), []
    text = path.read_bytes() if path.is_file() else b""
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        problem = f"{path} has a line that is not one of metrics: {line[:60]!r}"
        with user_error(problem, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            record = {
                key: float(value) for key, value in json.loads(line).items() if value is not None
            }
            records.append(record | {"step": int(record["step"]), "seconds": record["seconds"]})
    if not records:
        raise UserError(f"no metrics in {path}: train first, or give another out_dir")
    return records


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the width values around each, fewer at the ends."""
    return np.array(
        [values[max(0, i - width // 2) : i + width // 2 + 1].mean() for i in range(len(values))]
    )


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator:
    """Give an empty matplotlib Figure of that many inches, which needs no display, to draw in; then write it to path.

    Raises UserError without matplotlib, for a kind of picture unknown to it, and for a path that can't be written.
    """
    new_figure = optional("matplotlib.figure").Figure
    with optional("matplotlib").rc_context(STYLE):
        figure = new_figure(figsize=(width, height), layout="constrained")
        yield figure
        with user_error(f"can't write {path}", OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            dpi = min(140, 10_000 / max(width, height))
            write_atomically(
                path,
                lambda file: figure.savefig(
                    file, format=path.suffix[1:], dpi=dpi, bbox_inches="tight"
                ),
            )


def drawable(text: str) -> str:
    """text with an escape such as \\u4e2d for each character that matplotlib's font lacks."""
    fonts = optional("matplotlib.font_manager")
    glyphs = fonts.get_font(fonts.findfont(fonts.FontProperties())).get_charmap()
    return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in text)


def draw_run(out_dir: str | Path, compare: str | Path = "", file: str | Path = "") -> Path:
    """Draw the run in out_dir, and the one in compare, to file, by default out_dir/loss.png. Returns its path.

    From top to bottom loss, learning rate and gradient norm; on the left against steps, on the right against time.
    Raises UserError as `read_metrics` and `picture` do.
    """
    runs = {Path(name).as_posix(): read_metrics(name) for name in (out_dir, compare) if name}
    width = max(
        sum("loss" in record for record in records) // 60 | 1 for records in runs.values()
    )  # odd: centred
    lines = [
        (0, "loss", 1, {"lw": 0.8, "alpha": 0.3}),
        (0, "loss", width, {"lw": 1.2}),
    ]  # row, key, mean of, look
    lines += [(0, "val_loss", 1, {"lw": 2.4, "marker": "o", "mec": "white"})]
    lines += [(1, "lr", 1, {"lw": 1.6}), (2, "grad_norm", 1, {"lw": 0.9})]
    path = Path(file or Path(out_dir, "loss.png"))
    with picture(path, 12, 7.5) as figure:
        axes = figure.subplots(3, 2, sharex="col", sharey="row", height_ratios=(3.4, 1, 1))
        for (name, records), color in zip(runs.items(), COLORS, strict=False):
            for column, (x, scale) in enumerate((("step", 1), ("seconds", 60))):
                for row, key, n, look in lines:
                    xs, ys = (
                        np.array([(r[x] / scale, r[key]) for r in records if key in r])
                        .reshape(-1, 2)
                        .T
                    )
                    look = {
                        "color": color,
                        "marker": "o" if len(xs) == 1 else None,
                    } | look  # a line needs two points
                    axes[row, column].plot(xs, running_mean(ys, n), **look)
            val_losses = [record["val_loss"] for record in records if "val_loss" in record]
            evaluated = f"   best validation loss {min(val_losses):.3f}" if val_losses else ""
            axes[0, 0].lines[-1].set_label(drawable(name) + evaluated)

        note = "thick: validation\nthin: training"
        note += f", mean of {width} log lines; pale: as logged" if width > 1 else ""
        axes[0, 0].text(
            0.98, 0.95, note, color=MUTED, ha="right", va="top", transform=axes[0, 0].transAxes
        )
        axes[0, 0].set_ylabel("loss (nats per token)")
        axes[1, 0].set_ylabel("learning rate")
        axes[2, 0].set(xlabel="step", ylabel="gradient norm", xlim=(0, None))
        axes[2, 0].set_yscale(
            "log", subs=(2, 5)
        )  # and with it the one beside it, which shares the axis
        axes[2, 0].yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes[2, 1].set(xlabel="time (minutes)", xlim=(0, None))
        title = {
            "weight": "bold",
            "size": min(14, 1200 / (30 + max(map(len, runs)))),
        }  # so that it fits
        figure.legend(loc="outside upper left", labelcolor="linecolor", frameon=False, prop=title)
    return path


def main(s: Settings) -> None:
    print(draw_run(s.out_dir, s.compare, s.file))


if __name__ == "__main__":
    run_script(main, Settings, __doc__, OSError)
