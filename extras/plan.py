"""Plan a run before paying for it: parameters, memory, FLOPs, tokens per second and time.

python -m extras.plan config/gpt2.py --ranks=8 --gpu=H100
python -m extras.plan config/shakespeare.py            on this machine, measured where it has no GPU

It takes any settings of train.py, and those at the end of --help. Memory is that of a rank at its
peak; torch.compile needs less. Figures for GPUs are estimates.
"""

import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

import train
from model import MiniGPT
from support.dataset import DATA, open_dataset
from support.kernels import choose_kernels
from support.runtime import PEAK, kind_of_gpu, pick_device, precision, share
from support.settings import run_script, setting

MEASURED_TOKENS = 2**14  # at most, in a micro-batch that is measured
ENOUGH_TOKENS = 41 * 1024  # in a micro-batch; with more, torch.compile's kernels are no faster
CARDS = (24, 40, 80, 141)  # GB


@dataclass
class Settings(train.Settings):
    ranks: int = setting(1, "GPUs", low=1)
    vocab_size: int | None = setting(
        None, "size of the vocabulary, by default the dataset's, or 50257", low=1
    )
    gpu: str = setting(
        "auto", "kind of GPU; auto: this machine's, or its CPU", choices=("auto", *PEAK)
    )
    peak_share: float = setting(
        0.4, "share of the GPU's peak that training reaches: 0.3 to 0.5", low=0.01, high=1.0
    )


def memory(s: Settings, model: MiniGPT, rows: int) -> dict[str, float]:
    """The GiB of each part, at the peak of a step of `rows` sequences per micro-batch.

    Of a token in a block, autograd keeps the stream twice and 14 widths of other numbers.
    """
    number_size = 4 if s.dtype == "float32" else 2  # in bytes
    n = sum(p.numel() for p in model.parameters())
    tokens = rows * s.block_size
    weights = 4 * n
    if number_size == 2:
        weights += 2 * n  # a copy in 16 bits
    moments = 8 * n
    if s.optimizer == "muon":  # has one, not two
        moments -= 4 * sum(p.numel() for p in model.h.parameters() if p.dim() == 2)

    block = tokens * s.n_embd * (2 * 4 + 14 * number_size)
    if s.dropout > 0:
        block += 2 * tokens * s.n_embd  # a byte per number
    backward = 8 * tokens * s.n_embd * number_size  # of a block
    kept = block
    if s.activation_checkpointing:
        kept = 4 * tokens * s.n_embd
        backward += block
    # At one moment three copies of the logits are there, at others the embedding's gradient.
    logits = 4 * tokens * model.wte.num_embeddings
    embedding = 4 * model.wte.weight.numel()
    peak = max(3 * logits, logits + embedding, embedding + backward)

    gradients = 4 * n
    sequences = s.batch_size * s.gradient_accumulation_steps
    if s.ranks > 1 and rows * s.ranks < sequences:  # until they are summed, beside DDP's buckets
        gradients *= 2
    parts = {
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "activations": s.n_layer * kept,
        "logits": peak,
    }
    parts["in all"] = sum(parts.values())
    return {name: size / 2**30 for name, size in parts.items()}


def fitting(s: Settings, model: MiniGPT, gib: float) -> str:
    """The largest micro-batches with which the same step fits gib GiB on each rank."""
    sequences = s.batch_size * s.gradient_accumulation_steps
    most = max(s.batch_size, ENOUGH_TOKENS // s.block_size)
    for recompute in (s.activation_checkpointing, True):
        tried = replace(s, activation_checkpointing=recompute)
        for rows in range(min(most, sequences // s.ranks), 0, -1):
            if sequences // s.ranks % rows == 0 and memory(tried, model, rows)["in all"] < gib:
                answer = f"--batch_size={rows} --gradient_accumulation_steps={sequences // rows}"
                if recompute:
                    answer += " --activation_checkpointing=True"
                return answer
    return "does not fit: a smaller model, or one sharded over ranks, would"


def measure(s: Settings, model: MiniGPT, rows: int) -> float:
    """Seconds that a step takes on this CPU, from its micro-batches, after a first one."""
    rows = min(rows, max(1, MEASURED_TOKENS // s.block_size))
    device = torch.device("cpu")
    dtype, autocast = precision(s.dtype, device)
    choose_kernels(device, dtype, rows * s.n_head * s.block_size**2)
    optimizer = train.make_optimizer(model, s)
    x = torch.randint(model.config.vocab_size, (rows, s.block_size))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with autocast:
            loss = model(x, x)[1]
        loss.backward()
        computed = time.perf_counter()
        optimizer.step()
        model.zero_grad()
        n_batches = s.batch_size * s.gradient_accumulation_steps / rows
        seconds.append((computed - start) * n_batches + time.perf_counter() - computed)
    return min(seconds[1:])


def main(s: Settings) -> None:
    vocab_size = s.vocab_size
    if vocab_size is None and (DATA / s.dataset).is_dir():
        vocab_size = open_dataset(s.dataset)[2]["vocab_size"]
        print(f"vocabulary of data/{s.dataset}: {vocab_size:,}")
    elif vocab_size is None:
        vocab_size = 50257
        print(f"no data/{s.dataset} here: planning with GPT-2's vocabulary of {vocab_size:,}")
    with torch.device("meta"):  # shapes without memory
        model = train.random_model(s, vocab_size)
    on_cpu = s.gpu == "auto" and s.ranks == 1 and not torch.cuda.is_available()
    if on_cpu:
        s = replace(s, dtype=precision(s.dtype, torch.device("cpu"))[0])
    flops = model.flops_per_token()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {flops:,} FLOPs per token")
    rows, micro_steps = share(s.batch_size, s.gradient_accumulation_steps, s.ranks)
    print(f"memory of each rank, {micro_steps} x {rows} sequences of {s.block_size:,} tokens:")
    for name, gib in memory(s, model, rows).items():
        print(f"  {name:<12}{gib:8.2f} GiB")

    step_tokens = s.batch_size * s.gradient_accumulation_steps * s.block_size
    tokens = s.max_iters * step_tokens
    if on_cpu:
        step_seconds = measure(s, train.random_model(s, vocab_size), rows)
        rate = step_tokens / step_seconds
        machine = f"this CPU, measured on a few steps: {1000 * step_seconds:,.0f} ms per step"
    else:
        gpu = s.gpu
        if gpu == "auto":
            gpu = kind_of_gpu(pick_device("auto")) or "H100"
        rate = s.ranks * s.peak_share * PEAK[gpu] * 1e12 / flops
        if s.activation_checkpointing:
            rate *= 0.75  # a third more to compute
        machine = f"{s.ranks} x {gpu} at {s.peak_share:.0%} of {PEAK[gpu]} TFLOP/s, an estimate"
    duration = timedelta(seconds=round(tokens / rate))
    print(f"{machine}: {rate:,.0f} tokens/s, {tokens:,} tokens in {duration}")
    if not on_cpu:
        for card in CARDS:
            usable = 0.9 * card  # the rest is for CUDA itself and for gaps
            print(f"{card:>4} GB: {fitting(s, model, usable)}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
