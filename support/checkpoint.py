"""Files that are whole at every moment, and a run's folder: checkpoints, metrics and a lock."""

import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

from support.runtime import Ranks
from support.settings import UserError, user_error

ADVICE = "try a lower --learning_rate, a longer --warmup_iters, a --grad_clip of 1.0, or --dtype=float32"
RANDOM_INIT = ("auto", "resume", "scratch")  # init_from where a run begins with random weights
FORMATS = {"loss": "loss {:7.4f}", "lr": "lr {:.2e}", "grad_norm": "grad norm {:7.3f}"}  # of what log prints
FORMATS |= {"tokens_per_sec": "{:>9,.0f} tok/s", "mfu": "MFU {:.1%}", "val_loss": "validation loss {:.4f}"}
FORMATS |= {"perplexity": "perplexity {:.2f}", "bits_per_byte": "{:.3f} bits per byte"}


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write path by write(file), so that at every moment path is a whole file, the old one or the new one."""
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
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def lock(path: Path) -> TextIO:
    """Lock the file at path until this process ends, however it ends. Raises UserError if another process has it."""
    with user_error(f"can't write to {path.parent}", OSError):
        file = path.open("a")
    problem, held = f"another process is writing to {path.parent}", (BlockingIOError, PermissionError)
    with suppress(OSError), user_error(problem, *held, advice="wait for it, or write elsewhere"):  # or has no locks
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def read_checkpoint(path: str | Path, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """The checkpoint at path, on the CPU; with mmap its tensors are read when they are used. Runs no code in it.

    Raises UserError for a file that is not there, not whole or not a checkpoint; verify looks at its checksums.
    """
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not look
                    raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return state | {key: state[key] for key in ("model", "model_args", "tokenizer", "step")}  # it has these
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train first, or give another --out_dir") from error
    except Exception as error:  # damage can show as any
        raise UserError(f"{path} is not a whole checkpoint of this program ({type(error).__name__})") from error


def find_checkpoint(out_dir: str | Path, name: str = "") -> Path:
    """The checkpoint called name, with or without .pt, in out_dir; by default best.pt, else last.pt."""
    names = [name.removesuffix(".pt") + ".pt"] if name else ["best.pt", "last.pt"]
    for path in (Path(out_dir, name) for name in names):
        if path.exists():
            return path
    runs = " or ".join(sorted({f"--out_dir={p.parent.as_posix()}" for p in Path("out").glob("*/*.pt")}))
    raise UserError(f"no checkpoint {path}: {'try ' + runs if runs else 'train first, or give another --out_dir'}")


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy weights, read from path, into model. Raises UserError where names or shapes do not match."""
    wanted, found = ({name: list(p.shape) for name, p in state.items()} for state in (model.state_dict(), weights))
    for name in wanted.keys() | found.keys():
        if wanted.get(name) != found.get(name):
            raise UserError(f"{path} is of another model: {name} is {found.get(name)} there, {wanted.get(name)} here")
    model.load_state_dict(weights)


class Run:
    """A run's folder, out_dir: last.pt to resume from, best.pt, metrics.jsonl and a lock.

    Rank 0 writes, and nobody where the run is read_only.
    """

    def __init__(self, out_dir: str | Path, ranks: Ranks, read_only: bool = False):
        self.folder, self.ranks, self.writes = Path(out_dir), ranks, ranks.rank == 0 and not read_only
        self.last, self.metrics = self.folder / "last.pt", self.folder / "metrics.jsonl"
        self.lock, self.unsaved, self.last_save = None, set(), time.monotonic()

    def resume(self, init_from: str) -> dict[str, Any] | None:
        """The state in last.pt; None for a new run. Raises UserError where init_from insists on the other."""
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, with the same command
        if self.writes and self.folder.exists():
            self.lock = lock(self.folder / "lock")
        if init_from == "scratch" and self.last.exists() and not restarted:
            raise UserError(f"{self.last} is a run already: resume it without --init_from, or give another --out_dir")
        state = None
        if init_from == "resume" or self.last.exists():
            # On a CPU the optimiser would keep the mapping.
            state = read_checkpoint(self.last, self.ranks.device.type != "cpu", verify=self.ranks.rank == 0)
            if "init_from" not in state:
                raise UserError(f"{self.last} is of an earlier version: resume it there, or give another --out_dir")
        else:
            origin = "random weights" if init_from in RANDOM_INIT else f"the weights of {init_from}"
            self.ranks.say(f"no run in {self.folder} yet: a new model with {origin}")
        step = state["step"] if state else -1
        if self.ranks.maximum(step, -step) != [step, -step]:
            raise UserError(f"not all ranks found the same {self.last}: out_dir must be where all machines see it")
        return state

    def check(self, state: dict[str, Any], text: dict[str, Any], settings: dict[str, Any]) -> None:
        """Raise UserError where state, read from last.pt, is of another text, optimiser or model than these."""
        saved = state["tokenizer"]
        if any(saved.get(key) != text[key] for key in text if key not in ("dataset", "source")):
            texts = f"trained on {saved['source']}; data/{text['dataset']}, from {text['source']}, is a different text"
            advice = f"use the dataset it was trained on or another --out_dir, or delete {self.folder} to start over"
            raise UserError(f"{self.last} was {texts}: {advice}")
        saved = state["config"] | {"init_from": state["init_from"]}
        sizes = [name for name in state["model_args"] if name in settings and name != "dropout"]
        names = ["optimizer", *(sizes if state["init_from"] in RANDOM_INIT else ["block_size"])]  # the others are given
        names += ["init_from"] * (settings["init_from"] not in RANDOM_INIT)
        if different := [name for name in names if saved[name] != settings[name]]:
            changes = ", ".join(f"{name} {saved[name]}, not {settings[name]}" for name in different)
            flags = " ".join(f"--{name}={saved[name]}" for name in different)
            raise UserError(f"{self.last} was trained with {changes}: give {flags}, or another --out_dir")
        changed = ", ".join(f"{k} {saved.get(k)} -> {v}" for k, v in settings.items() if v != saved.get(k))
        self.ranks.say(f"resuming {self.last} at step {state['step']}" + (f", changed: {changed}" if changed else ""))

    def start(self, step: int, seconds: float) -> None:
        """Begin to write: make the folder, lock it, and drop the metrics after step, which will be written again."""
        self.start_time = time.perf_counter() - seconds
        if not self.writes:
            return
        with user_error(f"can't write to {self.folder}", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.lock, kept = self.lock or lock(self.folder / "lock"), []
        with user_error(f"{self.metrics} is damaged", OSError, ValueError, TypeError, KeyError):
            for line in self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
            write_whole(self.metrics, lambda file: file.write(b"".join(kept)))

    def log(self, step: int, max_iters: int, note: str = "", **values: float | None) -> None:
        """Print values, and append them to metrics.jsonl; JSON has no NaN, so that is null."""
        parts = [form.format(values[key]) for key, form in FORMATS.items() if values.get(key) is not None]
        line = " | ".join([f"step {step:>{len(str(max_iters))}}/{max_iters}", *parts, *([note] if note else [])])
        self.ranks.say(f"------ {line}" if "val_loss" in values else line)
        if not self.writes:
            return
        record = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        record = {"step": step} | record | {"seconds": time.perf_counter() - self.start_time}
        size = self.metrics.stat().st_size
        try:
            with self.metrics.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk, mostly: no half line may stay
            os.truncate(self.metrics, size)
            print(f"error: can't write {self.metrics}: {error}", file=sys.stderr)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write state, plain values and tensors, to out_dir/name; where that fails, say so and let the run go on."""
        self.last_save = time.monotonic()
        if not self.writes:
            return
        if not all(p.isfinite().all() for p in state["model"].values()):
            raise UserError(f"the weights are not finite at step {state['step']} and not saved: {ADVICE}")
        try:
            write_whole(self.folder / name, lambda file: torch.save(state, file))
            self.unsaved.discard(name)
        except (OSError, RuntimeError) as error:  # torch makes some of the former into the latter
            self.unsaved.add(name)
            reason = str(error).splitlines()[0]
            print(f"error: can't save {self.folder / name} ({reason}): the next save tries again", file=sys.stderr)
