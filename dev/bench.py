"""Measure how fast this machine trains and decodes, beside its limits and other programs.

python -m dev.bench                                           MiniGPT alone
python -m dev.bench --transformers --nanogpt=PATH             beside both
python -m dev.bench --work=train:gpt2 --rows=12 --dtype=float16 --file=results.jsonl

Run it in the repository. PATH is a clone of nanoGPT. All train the same model with AdamW on the
same number of tokens, compiled on a GPU. nanoGPT and transformers train as they are published: on a
CPU in float32, on a GPU in --dtype. Programs take turns, A B A B, each in a process of its own, so
that none finds memory, threads or compiled code of another. What warms up or compiles is not timed.
"""

import json
import math
import platform
import runpy
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
from model import GPTConfig, MiniGPT
from sample import generate
from support.fast import CompiledDecoder, pack
from support.kernels import choose_kernels
from support.runtime import cpu_features, pick_device, precision
from support.settings import UserError, optional, run_script, setting

CHAR = GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False)
BABY = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
GPT2 = GPTConfig(bias=False)
WORK = {  # name: (model, sequences at a time on a CPU, on a GPU, tokens to decode or 0 to train)
    "train:char": (CHAR, 12, 12, 0),
    "train:baby": (BABY, 16, 64, 0),
    "train:gpt2": (GPT2, 1, 12, 0),
    "decode:baby": (BABY, 1, 1, 500),
    "decode:gpt2": (GPT2, 1, 1, 96),
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Settings:
    work: str = setting(",".join(WORK), "what to measure")
    transformers: bool = setting(False, "beside transformers' GPT-2")
    nanogpt: str = setting("", "beside nanoGPT: the folder of a clone")
    rounds: int = setting(3, "measurements of each, of which the median counts", low=1)
    steps: int = setting(0, "training steps or texts per measurement, 0 for six seconds", low=0)
    rows: int = setting(0, "sequences at a time, 0 for those of the work", low=0)
    device: str = setting("auto", "cpu, cuda, ...; auto is the best available")
    dtype: str = setting("auto", "of matrix products in training", choices=DTYPES)
    decode_dtype: str = setting("float32", "of all weights in decoding", choices=DTYPES[1:])
    file: str = setting("", "add each measurement to this file, as a line of JSON")


def figure(values: Sequence[float], form: str = ",.1f") -> str:
    """The median of values and, of more than one, their spread, marked above a fifth."""
    text = f"{np.median(values):{form}}"
    if len(values) > 1:
        spread = np.ptp(values) / np.median(values)
        text += f" ({spread:.0%})"
        if spread > 0.2:
            text += " (!)"
    return text


def seconds(action: Callable[[], object], repeat: int = 0) -> float:
    """The median time of action, or the mean of repeat times, after two that warm up."""
    action()
    timer = Timer("action()", globals={"action": action}, num_threads=torch.get_num_threads())
    if repeat > 0:
        return timer.timeit(repeat).median
    return timer.blocked_autorange(min_run_time=6).median


def build(program: str, config: GPTConfig, s: Settings) -> torch.nn.Module:
    """The model of a program, with random weights."""
    if program == "MiniGPT":
        return MiniGPT(config)
    if program == "nanoGPT":
        theirs = runpy.run_path(f"{s.nanogpt}/model.py", run_name="nanogpt")
        sizes = asdict(config)
        sizes["vocab_size"] = math.ceil(config.vocab_size / 64) * 64  # as its train.py does
        return theirs["GPT"](theirs["GPTConfig"](**sizes))
    transformers = optional("transformers")
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    hf_config = transformers.GPT2Config(
        n_positions=1024, bos_token_id=None, eos_token_id=None, **sizes, **dropouts
    )
    return transformers.GPT2LMHeadModel(hf_config)


def dtype_of(s: Settings, program: str, device: torch.device) -> str:
    """The data type in which a program trains."""
    if program != "MiniGPT" and device.type == "cpu":
        return "float32"
    return precision(s.dtype, device)[0]


def training_step(
    s: Settings, program: str, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], None]:
    """A function that trains program's model for one step on inputs x and targets y."""
    device = x.device
    dtype = dtype_of(s, program, device)
    if program == "MiniGPT":
        optimizer = train.make_optimizer(model, train.Settings())
        choose_kernels(device, dtype, len(x) * model.config.n_head * x.size(1) ** 2)
    if program == "nanoGPT":
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    if program == "transformers":
        fused = device.type == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=fused
        )
    network = model
    if device.type == "cuda":
        network = torch.compile(model)
    _, autocast = precision(dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    def step():
        with autocast:
            if program == "transformers":
                loss = network(x, labels=x, use_cache=False).loss
            else:
                loss = network(x, y)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def decoding(
    s: Settings, program: str, model: torch.nn.Module, idx: torch.Tensor, n: int
) -> Callable[[], object]:
    """A function that continues idx by n tokens, greedily."""
    model = model.to(getattr(torch, s.decode_dtype)).eval()
    if program == "nanoGPT":
        return lambda: model.generate(idx, n, top_k=1)
    if program == "transformers":
        return lambda: model.generate(idx, max_new_tokens=n, do_sample=False)
    fast = CompiledDecoder(model) if idx.is_cuda else pack(model, len(idx))
    return lambda: generate(fast, idx, n, temperature=0)


def rows_of(s: Settings, name: str, device: torch.device) -> int:
    _, cpu_rows, gpu_rows, _ = WORK[name]
    if s.rows > 0:
        return s.rows
    return cpu_rows if device.type == "cpu" else gpu_rows


def measure(s: Settings, name: str, program: str) -> float:
    """One measurement: tokens per second."""
    sys.stdout = sys.stderr  # nanoGPT says how large it is
    device = pick_device(s.device)
    config, _, _, n = WORK[name]
    rows = rows_of(s, name, device)
    model = build(program, config, s).to(device)
    x = torch.randint(config.vocab_size, (rows, config.block_size), device=device)
    y = torch.randint(config.vocab_size, (rows, config.block_size), device=device)
    if n > 0:
        return rows * n / seconds(decoding(s, program, model, x[:, :1], n), s.steps)
    return x.numel() / seconds(training_step(s, program, model, x, y), s.steps)


def limits(s: Settings, device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of reading) of the machine."""
    dtype, _ = precision(s.dtype, device)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    ones = torch.ones(2**28, device=device)
    products = 2 * n**3 / seconds(lambda: a @ a, s.steps)
    reading = 2**30 / seconds(lambda: ones.sum(), s.steps)
    print(f"{products / 1e9:,.1f} GFLOP/s in {dtype} products, {reading / 1e9:.1f} GB/s of reading")
    return products, reading


def limit_of(s: Settings, name: str, rows: int, products: float, reading: float) -> float:
    """The tokens per second at which a program would be at the machine's limit.

    It is set for training by the matrix products, and for decoding by reading all weights.
    """
    config, _, _, n = WORK[name]
    with torch.device("meta"):
        model = MiniGPT(config).to(getattr(torch, s.decode_dtype))
    if n == 0:
        return products / model.flops_per_token()
    weights = sum(p.nbytes for p in model.parameters()) - model.wpe.weight.nbytes
    return rows * reading / weights


def describe(device: torch.device) -> str:
    """The machine, torch and the date, in a line."""
    name = platform.processor()
    if name == "":  # as in many containers
        name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    kernels = torch.backends.cpu.get_cpu_capability()
    for feature in sorted(cpu_features() & {"avx512_bf16", "amx_bf16"}):
        kernels += f" {feature}"
    return (
        f"{name}, {kernels}, {cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )


def main(s: Settings) -> None:
    names = s.work.split(",")
    for name in names:
        if name not in WORK:
            raise UserError(f"unknown work {name}: there is {', '.join(WORK)}")
    programs = ["MiniGPT"]
    if s.nanogpt:
        programs.append("nanoGPT")
        if not Path(s.nanogpt, "model.py").exists():
            raise UserError(f"no {s.nanogpt}/model.py: --nanogpt is the folder of a clone")
    if s.transformers:
        programs.append("transformers")
        optional("transformers")
    device = pick_device(s.device)
    machine = describe(device)
    print(machine)
    products, reading = limits(s, device)
    print("\n| work | rows | program | tokens/s | of the limit | MiniGPT / this |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        rows = rows_of(s, name, device)
        limit = limit_of(s, name, rows, products, reading)
        speeds = {program: [] for program in programs}
        for _ in range(s.rounds):
            for program in programs:
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    speed = process.submit(measure, s, name, program).result()
                speeds[program].append(speed)
                if s.file:
                    _, _, _, n = WORK[name]
                    dtype = s.decode_dtype
                    if n == 0:
                        dtype = dtype_of(s, program, device)
                    line = {"machine": machine, "work": name, "rows": rows, "dtype": dtype}
                    line |= {"program": program, "tokens_per_sec": speed}
                    with open(s.file, "a", encoding="utf-8", newline="\n") as file:
                        file.write(json.dumps(line) + "\n")
        for program, values in speeds.items():
            share = f"{np.median(values) / limit:.0%}"
            ratio = figure(np.divide(speeds["MiniGPT"], values), ".2f")
            print(f"| {name} | {rows} | {program} | {figure(values)} | {share} | {ratio} |")
    print("\nin brackets: (max - min) / median over the rounds; (!) above a fifth: not trustworthy")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
