"""Train MiniGPT against nanoGPT on tiny Shakespeare, whole commands, in turn.

python -m dev.race --nanogpt=PATH --recipe=matched       both by nanoGPT's recipe for a CPU
python -m dev.race --nanogpt=PATH --recipe=own           MiniGPT by config/shakespeare.py
python -m extras.plot out/race/MiniGPT out/race/nanoGPT  their curves

Run it in the repository. PATH is a clone of nanoGPT; both folders need the text prepared. On a GPU,
--device=cuda --nanogpt_flags= runs nanoGPT's config/train_shakespeare_char.py as it is published.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import train
from dev.bench import describe, figure
from extras.plot import read_metrics
from model import GPTConfig, MiniGPT
from sample import load_model
from support.dataset import open_dataset
from support.runtime import best_dtype, pick_device
from support.settings import UserError, read_settings, run_script, setting

# what nanoGPT's README gives for a CPU, and what its config/train_shakespeare_char.py sets
NANOGPT_CPU = (
    "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 "
    "--gradient_accumulation_steps=1 --dropout=0.0 --max_iters=2000 --lr_decay_iters=2000 "
    "--warmup_iters=100 --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --eval_interval=250 "
    "--log_interval=10 --device=cpu --dtype=float32 --compile=False"
)
NANOGPT_GPU = (
    "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 "
    "--gradient_accumulation_steps=1 --dropout=0.2 --max_iters=5000 --lr_decay_iters=5000 "
    "--warmup_iters=100 --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --eval_interval=250 "
    "--log_interval=10"
)


@dataclass
class Settings:
    nanogpt: str = setting("", "folder of a clone of nanoGPT")
    recipe: str = setting("own", "of MiniGPT", choices=("matched", "own"))
    nanogpt_flags: str = setting(NANOGPT_CPU, "of nanoGPT's train.py, after its config file")
    flags: str = setting("", "more settings of MiniGPT's train.py, such as --dtype=bfloat16")
    device: str = setting("cpu", "of MiniGPT")
    rounds: int = setting(3, "races, of which the median counts", low=1)


def run(command: list[str], folder: str = ".") -> tuple[float, list[tuple[float, str]]]:
    """Run a script in folder. Returns its seconds, and its lines with the seconds until each."""
    command = [sys.executable, "-u", *command]
    lines = []
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line))
    if process.returncode != 0:
        raise UserError(f"{command[2]} in {folder} ended with status {process.returncode}")
    return time.perf_counter() - start, lines


def load_nanogpt(path: Path) -> MiniGPT:
    """nanoGPT's checkpoint as a MiniGPT, which names its parameters alike.

    Its embedding has no padding: the padding of MiniGPT's is never read.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = MiniGPT(GPTConfig(**state["model_args"]))
    for name, p in model.named_parameters():
        p.data = state["model"][f"transformer.{name}"]
    model.lm_head.weight = model.wte.weight
    return model


def write_metrics(lines: list[tuple[float, str]], folder: Path) -> None:
    """Write what nanoGPT has printed as metrics.jsonl, to be plotted."""
    start = lines[0][0]
    with (folder / "metrics.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for now, line in lines:
            found = re.match(r"\w+ (\d+): (?:.* (val) )?loss ([\d.]+)", line)
            if found:
                key = "val_loss" if found[2] else "loss"
                record = {"step": int(found[1]), "seconds": now - start, key: float(found[3])}
                file.write(json.dumps(record) + "\n")


def seconds_to(loss: float, out_dir: Path) -> float:
    """Seconds before the end of a run at which its validation loss was at most this; or NaN."""
    evaluations = [record for record in read_metrics(out_dir) if "val_loss" in record]
    for record in evaluations:
        if record["val_loss"] <= loss:
            return evaluations[-1]["seconds"] - record["seconds"]
    return np.nan


def my_flags(s: Settings, out_dir: Path) -> list[str]:
    """The command line of MiniGPT's train.py. A setting in s.flags replaces the recipe's."""
    words = ["config/shakespeare.py", f"--device={s.device}"]
    if s.recipe == "matched":
        words = f"--dataset=shakespeare --eval_iters=40 {s.nanogpt_flags}".split()
    given = s.flags.split()
    changed = [flag.partition("=")[0] for flag in given]
    kept = [word for word in words if word.partition("=")[0] not in changed]
    return [f"--out_dir={out_dir}", *kept, *given]


def differences(s: Settings, flags: list[str]) -> str:
    """The settings in which MiniGPT's run differs from nanoGPT's."""
    ours = asdict(read_settings(train.Settings, flags, ""))
    if ours["dtype"] == "auto":
        ours["dtype"] = best_dtype(pick_device(s.device))
    theirs = s.nanogpt_flags or NANOGPT_GPU
    words = [flags[0], "--dataset=shakespeare", "--eval_iters=40", *theirs.split()]
    base = asdict(read_settings(train.Settings, words, ""))
    changes = [f"{k} {v}, not {base[k]}" for k, v in ours.items() if v != base[k]]
    return ", ".join(changes) if changes else "nothing"


def main(s: Settings) -> None:
    if not Path(s.nanogpt, "model.py").exists():
        raise UserError(f"no {s.nanogpt}/model.py: --nanogpt is the folder of a clone of nanoGPT")
    _, val_tokens, _ = open_dataset("shakespeare")
    path = Path(s.nanogpt, "data/shakespeare_char/val.bin")
    if not path.exists() or not np.array_equal(np.fromfile(path, "<u2"), val_tokens):
        raise UserError(f"{path} is not the text of data/shakespeare: prepare both from one file")
    mine = Path("out/race/MiniGPT")
    theirs = Path("out/race/nanoGPT").resolve()
    flags = my_flags(s, mine)
    config = "config/train_shakespeare_char.py"
    their_command = ["train.py", config, *s.nanogpt_flags.split(), f"--out_dir={theirs}"]
    if s.nanogpt_flags:
        their_command.append("--eval_iters=20")

    my_times = []
    my_losses = []
    their_times = []
    their_losses = []
    reached = []
    for _ in range(s.rounds):
        shutil.rmtree("out/race", ignore_errors=True)
        my_time, _ = run([train.__file__, *flags])
        their_time, lines = run(their_command, s.nanogpt)
        write_metrics(lines, theirs)
        my_losses.append(train.evaluate(load_model(mine / "best.pt")[0], val_tokens, 64))
        their_loss = train.evaluate(load_nanogpt(theirs / "ckpt.pt"), val_tokens, 64)
        my_times.append(my_time)
        their_times.append(their_time)
        their_losses.append(their_loss)
        reached.append(my_time - seconds_to(their_loss, mine))

    print(describe(pick_device(s.device)))
    print("\n| program | seconds | loss, whole validation split |\n| --- | --- | --- |")
    print(f"| MiniGPT | {figure(my_times)} | {figure(my_losses, '.3f')} |")
    print(f"| nanoGPT | {figure(their_times)} | {figure(their_losses, '.3f')} |\n")
    print(f"nanoGPT / MiniGPT in seconds: {figure(np.divide(their_times, my_times), '.2f')}")
    if not np.isnan(reached).any():
        share = figure(np.divide(reached, their_times), ".2f")
        print(f"MiniGPT has nanoGPT's loss after {share} of nanoGPT's seconds")
    print("different:", differences(s, flags))
    print("in brackets: (max - min) / median over the rounds; (!) above a fifth: not trustworthy")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
