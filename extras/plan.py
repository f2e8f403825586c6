"""Plan a run before paying for it: parameters, memory, FLOPs, tokens per second and days.

python -m extras.plan config/gpt2.py --ranks=8             any settings of train.py, and those at the end of --help

Memory is that of a rank at its peak, without torch.compile, which needs less. FLOPs are those of Chowdhery et al.
(2022, appendix B); activation checkpointing adds a third to their time.
"""

from dataclasses import dataclass, replace

import torch

import train
from model import GPTConfig, MiniGPT
from support.runtime import PEAK, Ranks, flops_per_token
from support.settings import command_line, one_line_errors, setting

USABLE = 0.9  # of a card's memory: the rest is for CUDA itself and for gaps between tensors


@dataclass
class Settings(train.Settings):
    ranks: int = setting(1, "GPUs", 1)
    vocab_size: int = setting(50257, "size of the dataset's vocabulary", 1)
    gpu: str = setting("H100", "for the peak of its matrix units", choices=tuple(PEAK))
    peak_share: float = setting(0.4, "share of that peak that training reaches: 0.3 to 0.5", 0.01, 1.0)


def build(s: Settings) -> MiniGPT:
    """The model of these settings, with shapes but no memory."""
    with torch.device("meta"):
        return MiniGPT(GPTConfig(s.block_size, s.vocab_size, s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias))


def memory(s: Settings, model: MiniGPT, rows: int) -> dict[str, float]:
    """The bytes of each part, at the peak of a step of `rows` sequences per micro-batch.

    Counted from what autograd keeps for the backward pass: of a token in a block the stream twice and 14 widths of
    matrix inputs and outputs; of a token's logits three times the vocabulary in float32.
    """
    size = 4 if s.dtype == "float32" else 2
    n = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.h.parameters() if p.dim() == 2)
    embedding, tokens = 4 * model.wte.weight.numel(), rows * s.block_size
    block = tokens * s.n_embd * (2 * 4 + 14 * size + 2 * (s.dropout > 0))  # dropout keeps a byte per number
    logits = 4 * tokens * model.wte.num_embeddings
    backward = 8 * tokens * s.n_embd * size + (block if s.activation_checkpointing else 0)  # of a block
    return {
        "weights": 4 * n + (size * n if size == 2 else 0),  # and a copy in 16 bits
        "gradients": 4 * n,
        "moments": 4 * (2 * n - (matrices if s.optimizer == "muon" else 0)),
        "activations": s.n_layer * (4 * tokens * s.n_embd if s.activation_checkpointing else block),
        # what is there for a moment: the logits, or the embedding's gradient, which waits for its second half
        "logits": max(3 * logits, logits + embedding, embedding + backward),
    }


def fitting(s: Settings, model: MiniGPT, card: float) -> str:
    """The flags with which a step of as many sequences fits the memory of a card, in GiB; "" where none do."""
    sequences = s.batch_size * s.gradient_accumulation_steps
    for recompute in (s.activation_checkpointing, True):
        for rows in (n for n in range(s.batch_size, 0, -1) if sequences // s.ranks % n == 0):
            if sum(memory(replace(s, activation_checkpointing=recompute), model, rows).values()) < card * 2**30:
                flags = f"--batch_size={rows} --gradient_accumulation_steps={sequences // rows}"
                return flags + (" --activation_checkpointing=True" if recompute else "")
    return ""


@one_line_errors()
def main(s: Settings) -> None:
    model, job = build(s), Ranks("cpu")
    job.size = s.ranks
    rows, micro_steps = job.share(s.batch_size, s.gradient_accumulation_steps)
    parts = memory(s, model, rows)
    parts["in all"], flops = sum(parts.values()), flops_per_token(model)
    rate = s.ranks * s.peak_share * PEAK[s.gpu] * 1e12 / flops * (0.75 if s.activation_checkpointing else 1)
    tokens = s.max_iters * s.ranks * micro_steps * rows * s.block_size
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {flops:,} FLOPs per token")
    print(f"memory of each rank, {micro_steps} x {rows} sequences of {s.block_size:,} tokens per step:")
    for name, size in parts.items():
        print(f"  {name:<12}{size / 2**30:8.2f} GiB")
    days = f"{tokens / 1e9:,.1f} billion tokens in {tokens / rate / 86400:,.2f} days"
    print(f"{s.ranks} x {s.gpu} at {s.peak_share:.0%} of {PEAK[s.gpu]} TFLOP/s: {rate:,.0f} tokens/s, {days}")
    for card in (24, 40, 80, 141):
        flags = fitting(s, model, USABLE * card)
        advice = f"fits with {flags}" if flags else "does not fit: a smaller model, or one sharded over ranks, would"
        print(f"{card:>4} GB: " + ("fits" if parts["in all"] < USABLE * card * 2**30 else advice))


if __name__ == "__main__":
    main(command_line(Settings, __doc__))
