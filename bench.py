"""Measure how fast this machine trains and decodes, beside its own limits and beside other programs.

python bench.py                                                  MiniGPT alone
python bench.py --peer=transformers --nanogpt=PATH               the same work through others, in turn: A B A B
python bench.py --work=train:gpt2,decode:gpt2 --plot=bench.png   some of it, and a picture

Each measurement is a process of its own, so that none finds memory, threads or compiled code of another. Peers run
as their documentation says: nanoGPT in float32 and uncompiled on a CPU, in bfloat16 and compiled on a GPU.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import UserError, one_line_errors, read_settings, setting

WORK = {  # name: (block_size, vocab_size, n_layer, n_head, n_embd, rows, tokens to decode or 0 to train)
    "train:char": (64, 65, 4, 4, 128, 12, 0),
    "train:baby": (256, 65, 6, 6, 384, 16, 0),
    "train:gpt2": (1024, 50257, 12, 12, 768, 1, 0),
    "train4:gpt2": (1024, 50257, 12, 12, 768, 4, 0),
    "decode:baby": (256, 65, 6, 6, 384, 1, 500),
    "decode:gpt2": (1024, 50257, 12, 12, 768, 1, 96),
    "decode16:gpt2": (1024, 50257, 12, 12, 768, 16, 96),
}


@dataclass
class Settings:
    work: str = setting(",".join(WORK), "what to measure")
    peer: str = setting("", "another program: transformers, which decodes", choices=("", "transformers"))
    nanogpt: str = setting("", "folder of a clone of nanoGPT, which trains and decodes")
    rounds: int = setting(3, "measurements of each, of which the median counts", low=1)
    steps: int = setting(0, "training steps a measurement, 0 for as many as take some seconds", low=0)
    device: str = setting("auto", "cpu, cuda, ...; auto is the best there is")
    dtype: str = setting("auto", "of MiniGPT's matrix products in training", choices=("auto", "float32", "bfloat16"))
    decode_dtype: str = setting("float32", "of the weights in decoding, for all", choices=("float32", "bfloat16"))
    compile: bool = setting(False, "torch.compile MiniGPT in training")
    activation_checkpointing: bool = setting(False, "train MiniGPT with less memory, as train.py's setting does")
    plot: str = setting("", "file for a picture of the table")
    one: str = setting("", "WORK/PROGRAM: measure it once and print JSON (what the processes run)")


if __name__ == "__main__":
    with one_line_errors():
        settings = read_settings(Settings, sys.argv[1:], __doc__)

import torch

from fast import compile_step, pack
from model import GPTConfig, MiniGPT
from sample import generate
from train import Settings as TrainSettings
from train import best_dtype, choose_attention, flops_per_token, make_optimizer, pick_device, recompute_activations


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(action, device, repeat):
    """The median time of action(), after one call that warms up."""
    times = []
    for _ in range(repeat + 1):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def limits(device, dtype):
    """(FLOP/s of a large matrix product in dtype, bytes/s of reading a large array)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * n**3 / median_seconds(lambda: a @ b, device, 10)
    array = torch.ones(1 << 28, device=device)  # 1 GiB
    return flops, array.nbytes / median_seconds(lambda: array.sum(), device, 5)


def nanogpt(path, config):
    """nanoGPT's own model, of the same sizes, from its clone at path."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{path}/model.py")
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
    # its train.py rounds GPT-2's vocabulary up in this way, and leaves that of a character-level dataset
    return module.GPT(module.GPTConfig(vocab_size=50304 if config.vocab_size == 50257 else config.vocab_size, **sizes))


def training_step(s, program, config, rows, device):
    """A function that trains one step on a random batch of rows sequences."""
    x, y = torch.randint(config.vocab_size, (2, rows, config.block_size), device=device)
    cuda = device.type == "cuda"
    if program == "nanoGPT":
        model = nanogpt(s.nanogpt, config).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        dtype, compiled = ("bfloat16", True) if cuda else ("float32", False)
    else:
        model = MiniGPT(config).to(device)
        optimizer = make_optimizer(model, TrainSettings())
        dtype, compiled = best_dtype(device) if s.dtype == "auto" else s.dtype, s.compile or cuda
        choose_attention(device, dtype, config.block_size)
        if s.activation_checkpointing:
            recompute_activations(model)
    run = torch.compile(model) if compiled else model
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")

    def step():
        with autocast:
            loss = run(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(s, program, config, rows, tokens, device):
    """A function that greedily writes tokens tokens after a prompt of one, in rows texts."""
    idx = torch.zeros(rows, 1, dtype=torch.long, device=device)
    dtype = getattr(torch, s.decode_dtype)
    if program == "nanoGPT":
        model = nanogpt(s.nanogpt, config).to(device, dtype).eval()
        return lambda: model.generate(idx, tokens, top_k=1)
    if program == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = GPT2Config(n_positions=max(config.block_size, tokens + 1), vocab_size=config.vocab_size,
                           n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                           bos_token_id=0, eos_token_id=0)  # fmt: skip
        model = GPT2LMHeadModel(sizes).to(device, dtype).eval()
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        return lambda: model.generate(idx, attention_mask=torch.ones_like(idx), **options)
    model = MiniGPT(config).to(device, dtype).eval()
    if device.type == "cpu":
        pack(model, rows)
    if device.type == "cuda":
        compile_step(model)
    return lambda: generate(model, idx, tokens, temperature=0)


def measure(s, name, program):
    """One measurement, as a dictionary: seconds for `tokens` tokens, peak bytes of memory (None if unknown)."""
    *sizes, rows, tokens = WORK[name]
    config = GPTConfig(*sizes, dropout=0.0, bias=False)
    device = pick_device(s.device)
    torch.manual_seed(0)
    if tokens:
        with torch.inference_mode():
            seconds = median_seconds(decoding(s, program, config, rows, tokens, device), device, 2)
        tokens *= rows
    else:
        step = training_step(s, program, config, rows, device)
        step(), step()
        once = median_seconds(step, device, 2)
        seconds = median_seconds(step, device, s.steps or min(50, max(3, int(4 / once))))
        tokens = rows * config.block_size
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif Path("/proc/self/status").exists():  # getrusage would also count the process that started this one
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    else:
        peak = None
    return {"seconds": seconds, "tokens": tokens, "peak": peak}


def in_a_process(s, name, program):
    command = [sys.executable, __file__, f"--one={name}/{program}", f"--nanogpt={s.nanogpt}", f"--steps={s.steps}",
               f"--device={s.device}", f"--dtype={s.dtype}", f"--decode_dtype={s.decode_dtype}",
               f"--compile={s.compile}", f"--activation_checkpointing={s.activation_checkpointing}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{name} with {program}: {(done.stderr.strip().splitlines() or ['it ended'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def plot(path, rows):
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    names = list(dict.fromkeys(name for name, *_ in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [(program, speed) for n, program, speed in rows if n == name]
        axis.bar([p for p, _ in mine], [v for _, v in mine], color=["tab:blue", "tab:gray", "tab:olive"][: len(mine)])
        axis.set(title=name, ylabel="tokens/s")
    figure.savefig(path, dpi=120)


@one_line_errors()
def main(s):
    if s.one:
        print(json.dumps(measure(s, *s.one.split("/"))))
        return
    names = s.work.split(",")
    if unknown := [name for name in names if name not in WORK]:
        raise UserError(f"unknown work {', '.join(unknown)}: there is {', '.join(WORK)}")
    device = pick_device(s.device)
    dtype = best_dtype(device) if s.dtype == "auto" else s.dtype
    peak_flops, bandwidth = limits(device, getattr(torch, dtype))
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, torch {torch.__version__}")
    print(f"limits: {peak_flops / 1e9:,.0f} GFLOP/s in a {dtype} matrix product, {bandwidth / 1e9:.1f} GB/s of reading")
    print(f"\n| work | program | tokens/s | GFLOP/s | of the limit | peak memory | MiniGPT is |\n|{' --- |' * 7}")
    pictured = []
    for name in names:
        *sizes, rows, tokens = WORK[name]
        with torch.device("meta"):
            model = MiniGPT(GPTConfig(*sizes, dropout=0.0, bias=False))
        programs = ["MiniGPT"] + ["nanoGPT"] * bool(s.nanogpt) + ["transformers"] * bool(s.peer and tokens)
        results = {program: [] for program in programs}
        for _ in range(s.rounds):
            for program in programs:
                results[program].append(in_a_process(s, name, program))
        speed = {p: statistics.median(r["tokens"] / r["seconds"] for r in results[p]) for p in programs}
        for program in programs:
            # forward only is a third of training's work; at batch 1 decoding reads every weight once a token
            flops = speed[program] * flops_per_token(model) / (3 if tokens else 1)
            weights = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")
            read = speed[program] / rows * weights * torch.empty(0, dtype=getattr(torch, s.decode_dtype)).itemsize
            share = f"{read / bandwidth:.0%} of reading" if tokens else f"{flops / peak_flops:.0%} of the products"
            peak = max(r["peak"] or 0 for r in results[program])
            memory = f"{peak / 2**20:,.0f} MiB" if peak else "not measured"
            ratios = [a["seconds"] for a in results["MiniGPT"]], [b["seconds"] for b in results[program]]
            ratio = statistics.median(b / a for a, b in zip(*ratios, strict=True))
            figures = f"{speed[program]:,.1f} | {flops / 1e9:,.1f} | {share} | {memory}"
            faster = "" if program == "MiniGPT" else f"{ratio:.2f} x as fast"
            print(f"| {name} | {program} | {figures} | {faster} |", flush=True)
            pictured.append((name, program, speed[program]))
    if s.plot:
        plot(s.plot, pictured)


if __name__ == "__main__":
    main(settings)
