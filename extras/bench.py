"""Measure how fast this machine trains and decodes, beside its limits and other programs. Run it in the repository.

python -m extras.bench                                           MiniGPT alone
python -m extras.bench --peer=transformers --nanogpt=PATH        the same work by others too; PATH is a clone of nanoGPT
python -m extras.bench --work=train:char,decode:gpt2 --rounds=5  some of it, more often
python -m extras.bench --nanogpt=PATH --race=matched             nanoGPT's CPU recipe by both: who is faster?
python -m extras.bench --nanogpt=PATH --race=recipe              config/shakespeare.py against that: who learns more?

Programs take turns, A B A B, each in a process of its own. All train with AdamW, but for a race of recipes. nanoGPT
runs as it says: in float32 and uncompiled on a CPU, in bfloat16 and compiled on a GPU.

A race times both programs' whole commands on tiny Shakespeare, which must be prepared for both, and evaluates the best
checkpoints of both with the same function. The last round's curves stay in out/race:
python -m extras.plot --out_dir=out/race/MiniGPT --compare=out/race/nanoGPT --file=docs/race.png
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import train
from model import GPTConfig, MiniGPT
from sample import generate
from support.dataset import open_dataset
from support.fast import CompiledReader
from support.runtime import best_dtype, choose_kernels, flops_per_token, pick_device
from support.settings import UserError, read_settings, setting

WORK = {  # name: (block_size, vocab_size, n_layer, n_head, n_embd, rows, tokens to decode or 0 to train)
    "train:char": (64, 65, 4, 4, 128, 12, 0),
    "train:baby": (256, 65, 6, 6, 384, 16, 0),
    "train:gpt2": (1024, 50257, 12, 12, 768, 1, 0),
    "train4:gpt2": (1024, 50257, 12, 12, 768, 4, 0),
    "decode:baby": (256, 65, 6, 6, 384, 1, 500),
    "decode:gpt2": (1024, 50257, 12, 12, 768, 1, 96),
    "decode16:gpt2": (1024, 50257, 12, 12, 768, 16, 96),
}
RECIPE = (  # nanoGPT's for a CPU: the flags of its README and what config/train_shakespeare_char.py sets
    "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --gradient_accumulation_steps=1 --dropout=0.0 "
    "--max_iters=2000 --lr_decay_iters=2000 --warmup_iters=100 --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 "
    "--eval_interval=250 --log_interval=10 --device=cpu --dtype=float32 --compile=False"
).split()
PRINTED = {"val_loss": r"step (\d+): .*val loss ([\d.]+)", "loss": r"iter (\d+): loss ([\d.]+)"}  # by nanoGPT
HIDING = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # instructions that the CPU has


@dataclass
class Settings:
    work: str = setting(",".join(WORK), "what to measure")
    race: str = setting("", "train with nanoGPT's recipe, or each with its own", choices=("", "matched", "recipe"))
    flags: str = setting("", "more settings of MiniGPT's train.py in a race, such as --dtype=bfloat16")
    peer: str = setting("", "another program: transformers, which decodes", choices=("", "transformers"))
    nanogpt: str = setting("", "folder of a clone of nanoGPT, which trains and decodes")
    rounds: int = setting(3, "measurements of each, of which the median counts", 1)
    steps: int = setting(0, "training steps or texts per measurement, 0 for as many as take some seconds", 0)
    device: str = setting("auto", "cpu, cuda, ...; auto is the best available; races are on the CPU")
    dtype: str = setting("auto", "of MiniGPT's matrix products in training", choices=("auto", "float32", "bfloat16"))
    decode_dtype: str = setting("float32", "of all weights in decoding", choices=("float32", "bfloat16"))
    compile: bool = setting(False, "torch.compile MiniGPT in training")
    activation_checkpointing: bool = setting(False, "train MiniGPT with less memory, as train.py's setting does")
    one: str = setting("", "WORK/PROGRAM: measure it once and print JSON (what the processes run)")


def figure(values: list[float], form: str = ",.1f") -> str:
    """The median of values with their spread, marked above a fifth."""
    spread = (max(values) - min(values)) / median(values)
    note = f"{spread:.0%}" if len(values) > 1 else "one round"
    return f"{median(values):{form}} ({note}{', !' if spread > 0.2 else ''})"


def seconds(action: Callable, device: torch.device, repeat: int = 0) -> list[float]:
    """The times of repeat calls, or of 3 to 50 that take some seconds, after one that warms up."""
    times, (least, most) = [], (repeat, repeat) if repeat else (3, 50)
    while len(times) <= least or (len(times) <= most and sum(times[1:]) < 4):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def nanogpt(folder: str, config: GPTConfig) -> torch.nn.Module:
    """nanoGPT's own model, of the same sizes, from its clone in folder."""
    spec = importlib.util.spec_from_file_location("nanogpt", f"{folder}/model.py")
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vocab_size = 50304 if config.vocab_size == 50257 else config.vocab_size  # it pads GPT-2's only
    return module.GPT(module.GPTConfig(**asdict(config) | {"vocab_size": vocab_size}))


def training(s: Settings, program: str, config: GPTConfig, rows: int, device: torch.device) -> Callable:
    """A function that trains one step on a random batch of rows sequences."""
    x, y = torch.randint(config.vocab_size, (2, rows, config.block_size), device=device)
    cuda = device.type == "cuda"
    if program == "nanoGPT":
        model = nanogpt(s.nanogpt, config).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        dtype, compiled = ("bfloat16", True) if cuda else ("float32", False)
    else:
        model = MiniGPT(config).to(device)
        optimizer = train.make_optimizer(model, train.Settings())
        dtype, compiled = best_dtype(device) if s.dtype == "auto" else s.dtype, s.compile or cuda
        choose_kernels(device, dtype, config.block_size, deterministic=False)
        if s.activation_checkpointing:
            model.h = torch.nn.ModuleList(map(checkpoint_wrapper, model.h))
    network = torch.compile(model) if compiled else model
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")

    def step():
        with autocast:
            loss = network(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(s: Settings, program: str, config: GPTConfig, rows: int, n: int, device: torch.device) -> Callable:
    """A function that greedily writes n tokens after a prompt of one, in rows texts."""
    idx, dtype = torch.zeros(rows, 1, dtype=torch.long, device=device), getattr(torch, s.decode_dtype)
    if program == "nanoGPT":
        model = nanogpt(s.nanogpt, config).to(device, dtype).eval()
        return lambda: model.generate(idx, n, top_k=1)
    if program == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        sizes |= {"n_positions": max(config.block_size, n + 1), "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**sizes)).to(device, dtype).eval()
        options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0}
        return lambda: model.generate(idx, attention_mask=torch.ones_like(idx), **options)
    model = MiniGPT(config).to(device, dtype).eval()
    read = CompiledReader(model) if device.type == "cuda" else None
    return lambda: generate(model, idx, n, temperature=0, read=read)


def measure(s: Settings, name: str, program: str) -> dict[str, float]:
    """One measurement: tokens per second, and the peak of memory in MiB, 0 where it is not known."""
    *sizes, rows, n = WORK[name]
    config, device = GPTConfig(*sizes, bias=False), pick_device(s.device)
    torch.manual_seed(0)
    action = decoding(s, program, config, rows, n, device) if n else training(s, program, config, rows, device)
    speed = rows * (n or config.block_size) / median(seconds(action, device, s.steps))
    peak, status = 0, Path("/proc/self/status")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    elif status.exists():  # getrusage would also count the process that started this one
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return {"speed": speed, "peak": peak}


def measure_apart(s: Settings, name: str, program: str) -> dict[str, float]:
    """The same in a process of its own, which finds no memory, threads or compiled code of another."""
    flags = [f"--{key}={value}" for key, value in (asdict(s) | {"one": f"{name}/{program}"}).items()]
    done = subprocess.run([sys.executable, "-m", "extras.bench", *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name} with {program} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def table(s: Settings, device: torch.device) -> None:
    """Print the limits of the machine, and the speed of all work by all programs."""
    names = s.work.split(",")
    if unknown := [name for name in names if name not in WORK]:
        raise UserError(f"unknown work {', '.join(unknown)}: there is {', '.join(WORK)}")
    dtype = best_dtype(device) if s.dtype == "auto" else s.dtype
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
    products = [2 * n**3 / t / 1e9 for t in seconds(lambda: a @ b, device)]
    array = torch.ones(1 << 28, device=device)  # 1 GiB
    reading = [array.nbytes / t / 1e9 for t in seconds(lambda: array.sum(), device)]
    print(f"limits: {figure(products)} GFLOP/s in a {dtype} matrix product, {figure(reading)} GB/s of reading\n")
    print(f"| work | program | tokens/s | of the limit | peak memory | MiniGPT is |\n|{' --- |' * 6}")
    for name in names:
        *sizes, rows, n = WORK[name]
        with torch.device("meta"):
            model = MiniGPT(GPTConfig(*sizes, bias=False))
        kind, limit, cost = "the products", median(products), flops_per_token(model)
        if n:  # every weight is read once for the next token of all rows
            weights = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
            kind, limit, cost = "reading", median(reading), weights * getattr(torch, s.decode_dtype).itemsize / rows
        programs = ["MiniGPT"] + ["nanoGPT"] * bool(s.nanogpt) + ["transformers"] * bool(s.peer and n)
        rounds = [{program: measure_apart(s, name, program) for program in programs} for _ in range(s.rounds)]
        for program in programs:
            speeds, peaks = ([r[program][key] for r in rounds] for key in ("speed", "peak"))
            share = f"{median(speeds) * cost / limit / 1e9:.0%} of {kind}"
            peak = f"{max(peaks):,.0f} MiB" if max(peaks) else "not measured"
            ratios = [r["MiniGPT"]["speed"] / r[program]["speed"] for r in rounds]
            faster = "" if program == "MiniGPT" else f"{figure(ratios, '.2f')} x as fast"
            print(f"| {name} | {program} | {figure(speeds)} | {share} | {peak} | {faster} |", flush=True)


def run_script(command: list[str], folder: str = ".") -> tuple[float, list[dict[str, float]]]:
    """Run a Python script in folder. Returns its seconds, and the metrics that it prints if it is nanoGPT's train.py:
    their seconds count from its first line, when its imports are done."""
    start, first, records = time.perf_counter(), None, []
    command = [sys.executable, "-u", *command]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            now = time.perf_counter()
            first = first or now
            for name, pattern in PRINTED.items():
                if found := re.match(pattern, line):
                    records.append({"step": int(found[1]), name: float(found[2]), "seconds": now - first})
    if process.returncode:
        raise UserError(f"{command[2]} in {folder} ended with status {process.returncode}")
    return time.perf_counter() - start, records


def load_nanogpt(path: Path) -> MiniGPT:
    """nanoGPT's checkpoint as a MiniGPT: the same parameters under the same names, but for a prefix and the padding."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = MiniGPT(GPTConfig(**state["model_args"]))
    weights = {name.removeprefix("transformer."): p for name, p in state["model"].items() if name != "lm_head.weight"}
    missing = len(model.wte.weight) - len(weights["wte.weight"])
    model.load_state_dict(weights | {"wte.weight": torch.nn.functional.pad(weights["wte.weight"], (0, 0, 0, missing))})
    return model


def race(s: Settings) -> None:
    """Train with both programs in turn, and print their times and losses."""
    val_tokens, path = open_dataset("shakespeare")[1], Path(s.nanogpt, "data", "shakespeare_char", "val.bin")
    if not path.exists() or not np.array_equal(np.fromfile(path, "<u2"), val_tokens):
        raise UserError(f"{path} is not of the text of data/shakespeare: prepare both from the same file")
    mine, theirs = (Path("out", "race", program).resolve() for program in ("MiniGPT", "nanoGPT"))
    matched = [*RECIPE, "--dataset=shakespeare", "--eval_iters=40", f"--out_dir={mine}"]  # nanoGPT's are 20 + 20
    recipe = ["config/shakespeare.py", "--device=cpu", f"--out_dir={mine}"]
    command = [*(matched if s.race == "matched" else recipe), *s.flags.split()]
    changed, base = (asdict(read_settings(train.Settings, flags, "")) for flags in (command, matched))
    if changed["dtype"] == "auto":
        changed["dtype"] = best_dtype(torch.device("cpu"))

    times, losses, reached = [], [], []
    for _ in range(s.rounds):
        shutil.rmtree(mine, ignore_errors=True)
        my_time, _ = run_script([train.__file__, *command])
        nanogpt_flags = ["config/train_shakespeare_char.py", *RECIPE, "--eval_iters=20", f"--out_dir={theirs}"]
        their_time, records = run_script(["train.py", *nanogpt_flags], s.nanogpt)
        ...
