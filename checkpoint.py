"""What a run keeps in its out_dir: checkpoints that are whole at every moment, a lock, and metrics that fit them."""

import json
import operator
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from config import UserError
from files import write_whole
from model import GPTConfig


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write state, a dictionary of plain values and tensors, to path. Raises OSError or RuntimeError if it can't."""
    write_whole(path, lambda file: torch.save(state, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at path, on the CPU. Runs no code that may be in it, and takes no more memory than it is large;
    raises whatever Exception the damage leads to."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("compressed")
        if archive.testzip():  # torch.load does not look at the checksums
            raise ValueError("a checksum is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not all(p.is_contiguous() for p in state["model"].values()):  # a small storage can pose as a large tensor
        raise ValueError("strided")
    if missing := {"model_args", "tokenizer", "step"} - state.keys():
        raise KeyError(*missing)
    return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """read_checkpoint, with a UserError if it fails that names the newest checkpoint beside it that is whole."""
    try:
        return read_checkpoint(path)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train first, or give another --out_dir") from error
    except Exception as error:
        message = f"{path} is not a whole checkpoint of this program ({type(error).__name__})"
        for other in sorted(path.parent.glob("*.pt"), key=os.path.getmtime, reverse=True):
            with suppress(Exception):
                message += f"; {other} is, from step {read_checkpoint(other)['step']}: copy it there to go on from it"
                break
        raise UserError(message) from error


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """What is read from path may be anything: turn what it leads to into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit this program ({type(error).__name__}: {reason})") from error


def model_config(state: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a checkpoint. Raises an Exception for what can't be one."""
    config = GPTConfig(**state["model_args"])
    if config.n_layer > len(state["model"]):  # before it is built, layer by layer
        raise ValueError(f"{config.n_layer} layers")
    return config


def check_same_run(path: Path, state: dict[str, Any], config: GPTConfig, tokenizer: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint from path is of a model with other sizes, or was trained on other data."""

    def differing(theirs, ours, but):
        return [k for k in sorted({**theirs, **ours}) if k not in but and theirs.get(k) != ours.get(k)]

    theirs, ours = state["tokenizer"], tokenizer
    if differing(theirs, ours, but=("dataset", "source")):
        raise UserError(
            f"{path} was trained on {theirs['source']}, and data/{ours['dataset']}, from {ours['source']}, is not that "
            "or has changed: give its --dataset, or another --out_dir"
        )
    theirs, ours = asdict(model_config(state)), asdict(config)
    if sizes := differing(theirs, ours, but=("dropout",)):
        sizes = ", ".join(f"{k} {theirs.get(k)}, not {ours.get(k)}" for k in sizes)
        raise UserError(f"{path} is of another model ({sizes}): give its sizes, or another --out_dir")


def restore(state: dict[str, Any], model: torch.nn.Module, optimizer: Any, scaler: torch.amp.GradScaler) -> list[int]:
    """Load a checkpoint into model, optimiser (its momenta: the settings are those of this run) and scaler.

    Returns its counts: step, worse_evals, bad_steps, skipped. Raises an Exception for whatever does not fit.
    """
    model.load_state_dict(state["model"])
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)
    for part in getattr(optimizer, "optimizers", [optimizer]):
        for p, momenta in part.state.items():
            if set(momenta) not in ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}):
                raise ValueError(f"an optimiser with {sorted(momenta)}")
            if any(m.shape != p.shape for name, m in momenta.items() if name != "step"):
                raise ValueError("momenta of another shape")
    growth = 0
    if scaler.is_enabled():
        scale, growth = float(state["scaler"]["scale"]), operator.index(state["scaler"]["_growth_tracker"])
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": growth})
    counts = [operator.index(state[name]) for name in ("step", "worse_evals", "bad_steps", "skipped")]
    if not all(0 <= count < 2**31 for count in (*counts, growth)):
        raise ValueError("a count is out of range")
    return counts


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of path that came after step, and a torn last one: the run will write them again."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):
            break
        kept.append(line)
    write_whole(path, lambda file: file.write(b"".join(kept)))
