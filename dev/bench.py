"""Measure how fast this machine trains and decodes, beside its limits and other programs. Run it in the repository.

python -m dev.bench --peer=transformers --nanogpt=PATH  a table of speeds; without these two, of MiniGPT alone
python -m dev.bench --nanogpt=PATH --race=matched       both programs train by nanoGPT's recipe for a CPU
python -m dev.bench --nanogpt=PATH --race=recipe        nanoGPT by that one, MiniGPT by config/shakespeare.py

PATH is a clone of nanoGPT, which runs as it says: uncompiled in float32 on a CPU, compiled in bfloat16 on a GPU.
Programs take turns, A B A B, each in a process of its own, so that none finds memory, threads or compiled code of
another. In the table all train with AdamW. A race needs tiny Shakespeare prepared in both folders and keeps its curves:
python -m extras.plot out/race/MiniGPT out/race/nanoGPT
"""

import json
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import cpu_count, get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

import train
from extras.plot import read_metrics
from model import GPTConfig, MiniGPT
from sample import generate, load_model
from support.dataset import open_dataset
from support.fast import CompiledDecoder, pack
from support.kernels import choose_kernels
from support.runtime import best_dtype, cpu_features, pick_device
from support.settings import UserError, optional, read_settings, run_script, setting

WORK = {  # name: (block_size, vocab_size, n_layer, n_head, n_embd, rows, tokens to decode or 0 to train)
    "train:char": (64, 65, 4, 4, 128, 12, 0),
    "train:baby": (256, 65, 6, 6, 384, 16, 0),
    "train:gpt2": (
        1024,
        50304,
        12,
        12,
        768,
        1,
        0,
    ),  # GPT-2's vocabulary, padded as all but transformers do
    "decode:baby": (256, 65, 6, 6, 384, 1, 500),
    "decode:gpt2": (1024, 50304, 12, 12, 768, 1, 96),
}
RECIPE = (  # nanoGPT's for a CPU: the flags of its README, and what its config/train_shakespeare_char.py sets
    "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --gradient_accumulation_steps=1 --dropout=0.0 "
    "--max_iters=2000 --lr_decay_iters=2000 --warmup_iters=100 --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 "
    "--eval_interval=250 --log_interval=10 --device=cpu --dtype=float32 --compile=False"
)


@dataclass
class Settings:
    work: str = setting(",".join(WORK), "what to measure")
    peer: str = setting(
        "", "another program: transformers, which decodes", choices=("", "transformers")
    )
    nanogpt: str = setting("", "folder of a clone of nanoGPT, which trains and decodes")
    rounds: int = setting(3, "measurements of each, of which the median counts", 1)
    steps: int = setting(0, "training steps or texts per measurement, 0 for some seconds", 0)
    device: str = setting("auto", "cpu, cuda, ...; auto is the best available; races are on a CPU")
    dtype: str = setting(
        "auto", "of MiniGPT's matrix products in training", choices=("auto", "float32", "bfloat16")
    )
    decode_dtype: str = setting(
        "float32", "of all weights in decoding", choices=("float32", "bfloat16")
    )
    race: str = setting(
        "", "instead of the table, train MiniGPT against nanoGPT", choices=("", "matched", "recipe")
    )
    flags: str = setting(
        "", "more settings of MiniGPT's train.py in a race, such as --dtype=bfloat16"
    )


def figure(values: Sequence[float], form: str = ",.1f") -> str:
    """The median of values and, of more than one, their spread, which is marked above a fifth."""
    spread = np.ptp(values) / np.median(values)
    note = f" ({spread:.0%}){' (!)' if spread > 0.2 else ''}" if len(values) > 1 else ""
    return f"{np.median(values):{form}}{note}"


def seconds(code: str, repeat: int = 0, **names: object) -> float:
    """The median time of code, or the mean of repeat times, after one or two that warm up."""
    timer = Timer(code, globals=names, num_threads=torch.get_num_threads())
    return (timer.timeit(repeat) if repeat else timer.blocked_autorange(min_run_time=6)).median


def training_step(
    s: Settings, program: str, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable:
    """A function that trains program's model one step on inputs x and targets y."""
    if program == "MiniGPT":
        optimizer = train.make_optimizer(model, train.Settings())
        dtype, compiled = best_dtype(x.device) if s.dtype == "auto" else s.dtype, x.is_cuda
        rows, block_size = x.shape
        choose_kernels(x.device, dtype, rows * model.config.n_head * block_size**2)
    else:
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), x.device.type)
        dtype, compiled = ("bfloat16", True) if x.is_cuda else ("float32", False)
    network = torch.compile(model) if compiled else model
    autocast = torch.autocast(x.device.type, getattr(torch, dtype), enabled=dtype != "float32")

    def step():
        with autocast:
            loss = network(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(s: Settings, name: str, program: str) -> float:
    """One measurement: tokens per second."""
    *sizes, rows, n = WORK[name]
    config, device = GPTConfig(*sizes, bias=False), pick_device(s.device)
    sys.stdout = sys.stderr  # nanoGPT says how large it is
    if program == "MiniGPT":
        model = MiniGPT(config).to(device)
    elif program == "nanoGPT":
        theirs = runpy.run_path(f"{s.nanogpt}/model.py", run_name="nanogpt")
        model = theirs["GPT"](theirs["GPTConfig"](**asdict(config))).to(device)
    else:
        transformers = optional("transformers")
        hf_config = transformers.GPT2Config(
            **asdict(config), n_positions=1024, bos_token_id=None, eos_token_id=None
        )
        model = transformers.GPT2LMHeadModel(hf_config).to(device)
    x, y = torch.randint(config.vocab_size, (2, rows, config.block_size), device=device)
    if not n:
        action = training_step(s, program, model, x, y)
    else:
        model.to(getattr(torch, s.decode_dtype)).eval()
        fast = model
        if program == "MiniGPT":
            fast = CompiledDecoder(model) if device.type == "cuda" else pack(model, rows)
        action = {  # greedily, after a prompt of one token
            "MiniGPT": lambda: generate(fast, x[:, :1], n, temperature=0),
            "nanoGPT": lambda: model.generate(x[:, :1], n, top_k=1),
            "transformers": lambda: model.generate(x[:, :1], max_new_tokens=n, do_sample=False),
        }[program]
    return rows * (n or config.block_size) / seconds("action()", s.steps, action=action)


def table(s: Settings, device: torch.device, machine: str) -> None:
    """Print the limits of the machine, and the speed of each program at each work."""
    names, programs = (
        s.work.split(","),
        ["MiniGPT", *["nanoGPT"] * bool(s.nanogpt), *[s.peer] * bool(s.peer)],
    )
    if unknown := [name for name in names if name not in WORK]:
        raise UserError(f"unknown work {', '.join(unknown)}: there is {', '.join(WORK)}")
    dtype, n = (
        best_dtype(device) if s.dtype == "auto" else s.dtype,
        8192 if device.type == "cuda" else 2048,
    )
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    products = 2 * n**3 / seconds("a @ a", s.steps, a=a)
    reading = 2**30 / seconds("a.sum()", s.steps, a=torch.ones(2**28, device=device))
    print(
        f"{machine}\n{products / 1e9:,.1f} GFLOP/s in {dtype} matrix products, {reading / 1e9:.1f} GB/s of reading\n"
    )
    print(f"| work | program | tokens/s | of the limit | MiniGPT / this |\n|{' --- |' * 5}")
    for name in names:
        *sizes, rows, n = WORK[name]
        model = MiniGPT(GPTConfig(*sizes, bias=False)).to(
            "meta", getattr(torch, s.decode_dtype)
        )  # for its size
        nbytes = sum(
            p.nbytes for name, p in model.named_parameters() if name != "wpe.weight"
        )  # read for each token
        limit = (
            rows * reading / nbytes if n else products / model.flops_per_token()
        )  # tokens per second
        results = {program: [] for program in programs if n or program != "transformers"}
        for program in [*results] * s.rounds:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                results[program].append(process.submit(measure, s, name, program).result())
        for program, speeds in results.items():
            ratio = figure(np.divide(results["MiniGPT"], speeds), ".2f")
            print(
                f"| {name} | {program} | {figure(speeds)} | {np.median(speeds) / limit:.0%} | {ratio} |",
                flush=True,
            )


def run(command: list[str], folder: str = ".") -> tuple[float, list[tuple[float, str]]]:
    """Run a script in folder. Returns its seconds, and the lines that it prints, each with the seconds until then."""
    start, command = time.perf_counter(), [sys.executable, "-u", *command]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
    if process.returncode:
        raise UserError(f"{command[2]} in {folder} ended with status {process.returncode}")
    return time.perf_counter() - start, lines


def load_nanogpt(path: Path) -> MiniGPT:
    """nanoGPT's checkpoint as a MiniGPT, which names its parameters alike and pads the embedding for speed only."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = MiniGPT(GPTConfig(**state["model_args"]))
    for name, p in model.named_parameters():
        p.data = state["model"][f"transformer.{name}"]
    model.lm_head.weight = model.wte.weight
    return model


def race(s: Settings, device: torch.device, machine: str) -> None:
    """Train with both programs in turn. Print the whole commands' seconds and the losses of the best checkpoints."""
    val_tokens, path = (
        open_dataset("shakespeare")[1],
        Path(s.nanogpt, "data/shakespeare_char/val.bin"),
    )
    if not path.exists() or not np.array_equal(np.fromfile(path, "<u2"), val_tokens):
        raise UserError(
            f"{path} is not of the text of data/shakespeare: prepare both from the same file"
        )
    mine, theirs = Path("out/race/MiniGPT"), Path("out/race/nanoGPT").resolve()
    matched, recipe = (
        f"--dataset=shakespeare --eval_iters=40 {RECIPE}",
        "config/shakespeare.py --device=cpu",
    )
    changed = [flag.partition("=")[0] for flag in s.flags.split()]
    flags = [f"--out_dir={mine}"]
    for flag in (matched if s.race == "matched" else recipe).split():
        if flag.partition("=")[0] not in changed:
            flags.append(flag)
    flags += s.flags.split()
    ours, base = (
        asdict(read_settings(train.Settings, argv, ""))
        for argv in (flags, [flags[0], *matched.split()])
    )
    ours["dtype"] = ours["dtype"].replace("auto", best_dtype(device))
    command = [
        *f"train.py config/train_shakespeare_char.py --eval_iters=20 {RECIPE}".split(),
        f"--out_dir={theirs}",
    ]
    results = []
    for _ in range(s.rounds):
        shutil.rmtree("out/race", ignore_errors=True)
        my_time, _ = run([train.__file__, *flags])
        their_time, lines = run(command, s.nanogpt)
        with (theirs / "metrics.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for now, line in lines:
                if found := re.match(r"\w+ (\d+): (?:.* (val) )?loss ([\d.]+)", line):
                    loss = {"val_loss" if found[2] else "loss": float(found[3])}
                    file.write(
                        json.dumps({"step": int(found[1]), "seconds": now - lines[0][0]} | loss)
                        + "\n"
                    )
        my_loss = train.evaluate(load_model(mine / "best.pt")[0], val_tokens, 64)
        their_loss = train.evaluate(load_nanogpt(theirs / "ckpt.pt"), val_tokens, 64)
        evals = [r for r in read_metrics(mine) if "val_loss" in r]
        since_end = (
            next((r["seconds"] for r in evals if r["val_loss"] <= their_loss), np.nan)
            - evals[-1]["seconds"]
        )
        at = {r["step"]: r["val_loss"] for r in read_metrics(theirs) if "val_loss" in r}
        gap = max(
            (abs(r["val_loss"] - at[r["step"]]) for r in evals if r["step"] in at), default=np.nan
        )
        results.append((my_time, my_loss, their_time, their_loss, my_time + since_end, gap))
    my_time, my_loss, their_time, their_loss, reached, gap = np.transpose(results)
    print(f"{machine}\n\n| program | seconds | loss, whole validation split |\n|{' --- |' * 3}")
    print(f"| MiniGPT | {figure(my_time)} | {figure(my_loss, '.3f')} |")
    print(f"| nanoGPT | {figure(their_time)} | {figure(their_loss, '.3f')} |\n")
    print(
        f"nanoGPT / MiniGPT: {figure(their_time / my_time, '.2f')} in seconds; curves differ by {figure(gap, '.3f')}"
    )
    if not np.isnan(reached).any():
        print(
            f"MiniGPT has nanoGPT's loss after {figure(reached / their_time, '.2f')} of nanoGPT's seconds"
        )
    print(
        "different:",
        ", ".join(f"{k} {v}, not {base[k]}" for k, v in ours.items() if v != base[k]) or "nothing",
    )


def main(s: Settings) -> None:
    if s.nanogpt and not Path(s.nanogpt, "model.py").exists():
        raise UserError(f"no {s.nanogpt}/model.py: --nanogpt is the folder of a clone of nanoGPT")
    device = pick_device("cpu" if s.race else s.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    kernels = torch.backends.cpu.get_cpu_capability()
    kernels += "".join(f" {k}" for k in ("avx512_bf16", "amx_bf16") if k in cpu_features())
    machine = f"{name}, {kernels}, {cpu_count()} cores, {torch.get_num_threads()} threads"
    (race if s.race else table)(
        s, device, f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    print(
        "\nin brackets: the spread over the rounds, (max - min) / median; (!) is above a fifth: not to be trusted"
    )


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
