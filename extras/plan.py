"""Plan a run before paying for it: parameters, memory, FLOPs, tokens per second and days.

python -m extras.plan config/gpt2.py --ranks=8             any settings of train.py, and those at the end of --help

Memory is that of a rank at its peak; torch.compile needs less. Activation checkpointing adds a third to the time.
"""

from dataclasses import dataclass, replace

import torch

import train
from model import GPTConfig, MiniGPT
from support.runtime import PEAK, share
from support.settings import run_script, setting


@dataclass
class Settings(train.Settings):
    ranks: int = setting(1, "GPUs", 1)
    vocab_size: int = setting(50257, "size of the dataset's vocabulary", 1)
    gpu: str = setting("H100", "for the peak of its matrix units", choices=tuple(PEAK))
    peak_share: float = setting(
        0.4, "share of that peak that training reaches: 0.3 to 0.5", 0.01, 1.0
    )


def memory(s: Settings, model: MiniGPT, rows: int) -> dict[str, float]:
    """The GiB of each part, at the peak of a step of `rows` sequences per micro-batch.

    Autograd keeps of a token in a block the stream twice and 14 widths of other numbers, and three rows of logits.
    """
    size, n = 4 if s.dtype == "float32" else 2, sum(p.numel() for p in model.parameters())
    muon = sum(p.numel() for p in model.h.parameters() if p.dim() == 2 and s.optimizer == "muon")
    embedding, tokens = 4 * model.wte.weight.numel(), rows * s.block_size
    block = (
        tokens * s.n_embd * (2 * 4 + 14 * size + 2 * (s.dropout > 0))
    )  # dropout keeps a byte per number
    logits, kept = (
        4 * tokens * model.wte.num_embeddings,
        4 * tokens * s.n_embd if s.activation_checkpointing else block,
    )
    backward = 8 * tokens * s.n_embd * size + (
        block if s.activation_checkpointing else 0
    )  # of a block
    parts = {
        "weights": 4 * n + (size * n if size == 2 else 0),  # and a copy in 16 bits
        "gradients": 4 * n,
        "moments": 4 * (2 * n - muon),  # Muon has one
        "activations": s.n_layer
        * kept,  # and for a moment logits, or half of the embedding's gradient and a block
        "logits": max(3 * logits, logits + embedding, embedding + backward),
    }
    return {name: size / 2**30 for name, size in (parts | {"in all": sum(parts.values())}).items()}


def fitting(s: Settings, model: MiniGPT, gib: float) -> str:
    """How a step of as many sequences fits gib GiB on each rank."""
    sequences = s.batch_size * s.gradient_accumulation_steps
    for recompute in (s.activation_checkpointing, True):
        for rows in (n for n in range(s.batch_size, 0, -1) if sequences // s.ranks % n == 0):
            if memory(replace(s, activation_checkpointing=recompute), model, rows)["in all"] < gib:
                flags = {"batch_size": rows, "gradient_accumulation_steps": sequences // rows}
                flags |= {"activation_checkpointing": recompute}
                flags = [
                    f"--{name}={value}"
                    for name, value in flags.items()
                    if value != getattr(s, name)
                ]
                return "fits" + (f" with {' '.join(flags)}" if flags else "")
    return "does not fit: a smaller model, or one sharded over ranks, would"


def main(s: Settings) -> None:
    with torch.device("meta"):  # shapes without memory
        model = MiniGPT(
            GPTConfig(s.block_size, s.vocab_size, s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias)
        )
    rows, micro_steps = share(s.batch_size, s.gradient_accumulation_steps, s.ranks)
    parts = memory(s, model, rows)
    flops = model.flops_per_token()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {flops:,} FLOPs per token")
    print(
        f"memory of each rank, {micro_steps} x {rows} sequences of {s.block_size:,} tokens per step:"
    )
    print(*(f"  {name:<12}{gib:8.2f} GiB" for name, gib in parts.items()), sep="\n")
    rate = (
        s.ranks
        * s.peak_share
        * PEAK[s.gpu]
        * 1e12
        / flops
        * (0.75 if s.activation_checkpointing else 1)
    )
    tokens = s.max_iters * s.batch_size * s.gradient_accumulation_steps * s.block_size
    days = f"{tokens / 1e9:,.1f} billion tokens in {tokens / rate / 86400:,.2f} days"
    print(
        f"{s.ranks} x {s.gpu} at {s.peak_share:.0%} of {PEAK[s.gpu]} TFLOP/s: {rate:,.0f} tokens/s, {days}"
    )
    for card in (24, 40, 80, 141):
        print(
            f"{card:>4} GB: {fitting(s, model, 0.9 * card)}"
        )  # the rest is for CUDA itself and for gaps


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
