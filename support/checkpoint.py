"""Files that are written atomically, and a run's folder: checkpoints, metrics and a lock."""

import json
import math
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

from model import GPTConfig, MiniGPT
from support.runtime import Ranks
from support.settings import UserError, user_error

RANDOM_INIT = ("auto", "resume", "scratch")  # init_from where a run begins with random weights

# what a log line shows of the values, in this order
FORMATS = {
    "loss": "loss {:7.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:7.3f}",
    "tokens_per_sec": "{:>9,.0f} tok/s",
    "mfu": "MFU {:.1%}",
    "val_loss": "validation loss {:.4f}",
    "perplexity": "perplexity {:,.4g}",
    "bits_per_byte": "{:.3f} bits per byte",
}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write path by write(file): a crash leaves the old file or the new one, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def link_atomically(path: Path, source: Path) -> None:
    """Make path a second name of the file source, or a copy where the file system has no links."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(path: Path) -> TextIO:
    """Lock the file at path until it is closed or this process ends, in whatever way.

    Raises UserError if another process holds the lock. A file system without locks is not locked.
    """
    with user_error(f"can't write to {path.parent}", OSError):
        file = path.open("a")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"another process is writing to {path.parent}: wait for it, or write elsewhere"
        ) from error
    except OSError:
        pass
    return file


def read_checkpoint(path: str | Path, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """The checkpoint at path, on the CPU. Loading it runs no code.

    With mmap its tensors are read when they are used; verify compares checksums. Raises UserError
    for a file that is missing, damaged or not a checkpoint.
    """
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not check
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for key in ("model", "model_args", "tokenizer", "step"):
            if key not in state:
                raise ValueError(f"it has no {key}")
        return state
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train first, or give another --out_dir") from error
    except (PermissionError, MemoryError) as error:
        raise UserError(f"{path} can't be read ({error or 'out of memory'})") from error
    except Exception as error:  # damage can show as any
        kind = type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({kind})") from error


def find_checkpoint(out_dir: str | Path, name: str = "") -> Path:
    """The checkpoint called name in out_dir, with or without .pt, or at the path name.

    By default best.pt, else last.pt. out_dir may also be a checkpoint itself.
    """
    if not name and Path(out_dir).is_file():
        return Path(out_dir)
    if not name:
        candidates = [Path(out_dir, "best.pt"), Path(out_dir, "last.pt")]
    else:
        name = name.removesuffix(".pt") + ".pt"
        candidates = [Path(out_dir, name), Path(name)]
    for path in candidates:
        if path.is_file():
            return path
    folders = sorted({path.parent.as_posix() for path in Path("out").glob("*/*.pt")})
    advice = "train first, or give another --out_dir"
    if folders:
        advice = "try " + " or ".join(f"--out_dir={folder}" for folder in folders)
    raise UserError(f"no checkpoint {candidates[0]}: {advice}")


def model_from_checkpoint(state: dict[str, Any], path: str | Path, dropout: float = 0.0) -> MiniGPT:
    """The model of a checkpoint that was read from path, in train mode."""
    model = MiniGPT(replace(GPTConfig(**state["model_args"]), dropout=dropout))
    load_weights(model, state["model"], path)
    return model


def load_weights(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | Path
) -> None:
    """Copy weights, read from path, into model. Raises UserError where names or shapes differ."""
    here = {name: list(p.shape) for name, p in model.state_dict().items()}
    there = {name: list(p.shape) for name, p in weights.items()}
    for name in here | there:
        if here.get(name) != there.get(name):
            raise UserError(
                f"{path} is of another model: "
                f"{name} is {there.get(name)} there, {here.get(name)} here"
            )
    model.load_state_dict(weights)


def previous_settings(flags: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the run in the folder that flags name as out_dir; None if there is no run."""
    if "out_dir" not in flags:
        return None
    path = Path(flags["out_dir"], "last.pt")
    if not path.is_file():
        if len(flags) == 1:
            print(f"note: no run in {path.parent} to resume: a new one", file=sys.stderr)
        return None
    return read_checkpoint(path, mmap=True, verify=False).get("config")


class Run:
    """A run's folder, out_dir: last.pt to resume from, best.pt, metrics.jsonl and a lock.

    Rank 0 writes, and nobody where the run is read_only.
    """

    def __init__(self, out_dir: str | Path, ranks: Ranks, read_only: bool = False):
        self.folder = Path(out_dir)
        self.last = self.folder / "last.pt"
        self.metrics = self.folder / "metrics.jsonl"
        self.ranks = ranks
        self.writes = ranks.rank == 0 and not read_only
        self.unsaved = set()  # names of files that could not be written
        self.saved_step = -1
        self.save_time = time.monotonic()  # of the last save
        self.start_time = time.perf_counter()
        if self.writes:
            # Locked before last.pt is looked for, so that two jobs can't both begin a new run.
            with user_error(f"can't write to {self.folder}", OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder / "lock")

    def load(self, init_from: str) -> dict[str, Any] | None:
        """The state in last.pt, or None for a new run.

        Raises UserError where init_from asks for the other, or where ranks see different files.
        """
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun
        if init_from == "scratch" and self.last.exists() and not restarted:
            raise UserError(
                f"{self.last} is a run already: resume it without --init_from, "
                "or give another --out_dir"
            )
        state = None
        step = -1
        if init_from == "resume" or self.last.exists():
            # The tensors are copied to a GPU, but on a CPU the optimiser would keep those of a
            # mapped file, which the next save replaces.
            mmap = self.ranks.device.type != "cpu"
            state = read_checkpoint(self.last, mmap=mmap, verify=self.ranks.rank == 0)
            if "evaluated" not in state:
                raise UserError(
                    f"{self.last} is of an earlier version: resume it there, "
                    "or give another --out_dir"
                )
            step = state["step"]
        elif init_from in RANDOM_INIT:
            self.ranks.say(f"no run in {self.folder} yet: a new model with random weights")
        else:
            self.ranks.say(f"no run in {self.folder} yet: starts with the weights of {init_from}")
        highest, minus_lowest = self.ranks.maximum(step, -step)
        if highest != -minus_lowest:
            raise UserError(
                f"not all ranks found the same {self.last}: "
                "out_dir must be where all machines see it"
            )
        return state

    def check(self, state: dict[str, Any], meta: dict[str, Any], settings: dict[str, Any]) -> None:
        """Raise UserError where state, read from last.pt, is of another dataset or model.

        Otherwise print the settings that differ from the run's, a line for each.
        """
        saved = state["tokenizer"]
        for key in meta:
            if key not in ("dataset", "source") and saved.get(key) != meta[key]:
                raise UserError(
                    f"{self.last} was trained on {saved['source']}; data/{meta['dataset']}, from "
                    f"{meta['source']}, is a different text: use the dataset it was trained on, "
                    f"delete {self.folder} to start over, or begin a new run with its weights: "
                    f"--init_from={self.folder} --out_dir=NEW"
                )
        saved = state["config"] | {"init_from": state["init_from"]}
        fixed = ["optimizer", "block_size"]
        if state["init_from"] in RANDOM_INIT:
            fixed += [name for name in state["model_args"] if name in settings]
            fixed.remove("dropout")
        if settings["init_from"] not in RANDOM_INIT:
            fixed.append("init_from")
        for name in fixed:
            if saved[name] != settings[name]:
                raise UserError(
                    f"{self.last} was trained with {name} {saved[name]}, not {settings[name]}: "
                    f"give --{name}={saved[name]}, or another --out_dir"
                )
        self.ranks.say(f"resuming {self.last} at step {state['step']}")
        for name, value in settings.items():
            if name != "init_from" and value != saved.get(name):
                self.ranks.say(f"  changed: {name} {saved.get(name)} -> {value}")

    def start(self, step: int, evaluated: int, seconds: float) -> None:
        """Begin to write, at step of a run that has taken `seconds` before.

        Drops the metrics that will be written again: those after step, and the evaluation at step
        unless `evaluated`, the step of the last evaluation that counts, is this one.
        """
        self.start_time = time.perf_counter() - seconds
        self.save_time = time.monotonic()
        if self.last.exists():
            self.saved_step = step
        if not self.writes:
            return
        kept = []
        with user_error(f"{self.metrics} is damaged", OSError, ValueError, TypeError, KeyError):
            if self.metrics.exists():
                for line in self.metrics.read_bytes().splitlines(keepends=True):
                    if not line.endswith(b"\n"):  # the power failed while it was written
                        break
                    record = json.loads(line)
                    if record["step"] > step:
                        break
                    if "val_loss" in record and record["step"] == step and evaluated != step:
                        break
                    kept.append(line)
            write_atomically(self.metrics, lambda file: file.write(b"".join(kept)))

    def way_back(self) -> str:
        """What to do when training has diverged: last.pt may hold ruined weights."""
        advice = f"delete {self.folder} and start over"
        best = self.folder / "best.pt"
        if best.exists():
            advice = f"go on from the best weights by --init_from={best} --out_dir=NEW"
        return (
            f"{advice}, with a lower --learning_rate, a longer --warmup_iters, "
            "a --grad_clip of 1.0, or --dtype=float32"
        )

    def minutes_unsaved(self) -> float:
        """Minutes since the last save."""
        return (time.monotonic() - self.save_time) / 60

    def seconds(self) -> float:
        """How long the run has taken so far."""
        return time.perf_counter() - self.start_time

    def log(self, step: int, max_iters: int, note: str = "", **values: float | None) -> None:
        """Print values, and append them to metrics.jsonl. JSON has no NaN: it becomes null."""
        width = len(str(max_iters))
        parts = [f"step {step:>{width}}/{max_iters}"]
        for key, form in FORMATS.items():
            if values.get(key) is not None:
                parts.append(form.format(values[key]))
        if note:
            parts.append(note)
        line = " | ".join(parts)
        if "val_loss" in values:
            line = f"------ {line}"
        self.ranks.say(line)
        if not self.writes:
            return
        record = {"step": step}
        for key, value in values.items():
            finite = value is not None and math.isfinite(value)
            record[key] = value if finite else None
        record["seconds"] = self.seconds()
        self.append_metrics(json.dumps(record) + "\n")

    def append_metrics(self, line: str) -> None:
        """Append line to metrics.jsonl. If that fails, no part of it stays, and the run goes on."""
        size = 0
        with suppress(FileNotFoundError):
            size = self.metrics.stat().st_size
        try:
            with self.metrics.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line)
        except OSError as error:  # mostly a full disk
            with suppress(OSError):
                os.truncate(self.metrics, size)
            print(f"error: can't write {self.metrics}: {error}", file=sys.stderr)

    def save(self, state: dict[str, Any]) -> None:
        """Write state, plain values and tensors, to last.pt. If that fails, the run goes on.

        Raises UserError for weights that are not finite.
        """
        self.save_time = time.monotonic()
        self.saved_step = state["step"]
        if not self.writes:
            return
        if not all(p.isfinite().all() for p in state["model"].values()):
            raise UserError(
                f"the weights are not finite at step {state['step']} and not saved: "
                f"{self.way_back()}"
            )
        self.write("last.pt", write_atomically, lambda file: torch.save(state, file))

    def link_last_as(self, name: str) -> None:
        """Give last.pt, which `save` has just written, a second name that stays."""
        if not self.writes:
            return
        if "last.pt" in self.unsaved:  # it holds an earlier step
            self.unsaved.add(name)
            return
        self.write(name, link_atomically, self.last)

    def write(self, name: str, write: Callable, content: object) -> None:
        """Call write(path, content) for the file called name. If it fails, say and remember it."""
        try:
            write(self.folder / name, content)
            self.unsaved.discard(name)
        except (OSError, RuntimeError) as error:  # torch makes some of the former into the latter
            self.unsaved.add(name)
            reason = str(error).splitlines()[0]
            print(
                f"error: can't save {self.folder / name} ({reason}): the next save tries again",
                file=sys.stderr,
            )
