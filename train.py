"""Train a GPT.

python train.py config/shakespeare.py                      start here: minutes, on anything
python train.py config/shakespeare.py --max_iters=200      settings come from config files and flags
torchrun --standalone --nproc_per_node=8 train.py          GPT-2 (124M) on eight GPUs

Run the same command again to resume. A run writes to out_dir: last.pt (to resume from), best.pt (the lowest validation
loss) and metrics.jsonl.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from model import GPTConfig, MiniGPT
from prepare_data import BUILT_IN, prepare
from support.checkpoint import ADVICE, RANDOM_INIT, Run, load_weights
from support.dataset import DATA, open_dataset
from support.kernels import choose_kernels
from support.muon import Muon
from support.pretrained import HUB, check_same_tokens, load_pretrained
from support.runtime import Ranks, advice, best_dtype, compile_now
from support.settings import UserError, run_script, setting

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each (B, T)


@dataclass
class Settings:
    # the defaults train GPT-2 (124M) on half a million tokens per step
    out_dir: str = setting("out", "folder for checkpoints and metrics")
    init_from: str = setting("auto", "auto (resume a run in out_dir, else scratch), resume, scratch, gpt2, or a folder")
    seed: int = setting(1337, "random seed for initial weights, batches and dropout", 0, 2**63 - 1)
    # data
    dataset: str = setting("openwebtext", "folder in data/, made by prepare_data.py")
    batch_size: int = setting(12, "most sequences per micro-batch", 1, 1 << 24)
    gradient_accumulation_steps: int = setting(40, "times batch_size, the sequences per step", 1, 1 << 24)
    block_size: int = setting(1024, "context length: tokens per sequence", 1, 1 << 24)
    # model
    n_layer: int = setting(12, "transformer blocks", 1, 10_000)
    n_head: int = setting(12, "attention heads per block", 1, 10_000)
    n_embd: int = setting(768, "width, a multiple of n_head", 1, 1 << 20)
    dropout: float = setting(0.0, "share of activations set to zero: 0.1 or more for little data", 0.0, 0.99)
    bias: bool = setting(False, "give Linear and LayerNorm layers biases, as GPT-2 has")
    # optimiser
    optimizer: str = setting("adamw", "muon: for the blocks' matrices, adamw for the rest", choices=("adamw", "muon"))
    learning_rate: float = setting(6e-4, "peak learning rate", 0.0)
    max_iters: int = setting(600_000, "steps to train for", 1)
    weight_decay: float = setting(0.1, "on matrices and embeddings, not on biases and norms", 0.0)
    beta1: float = setting(0.9, "decay of the gradient's running mean", 0.0, 0.9999)
    beta2: float = setting(0.95, "decay of the squared gradient's running mean", 0.0, 0.99999)
    grad_clip: float = setting(1.0, "largest gradient norm, 0 for no limit", 0.0)
    decay_lr: bool = setting(True, "warm up, then decay the learning rate; False keeps it constant")
    warmup_iters: int | None = setting(None, "steps of linear warm-up, by default 2000 or a tenth of the run", 0)
    lr_decay_iters: int | None = setting(None, "step at which the learning rate reaches min_lr, or max_iters", 1)
    min_lr: float | None = setting(None, "final learning rate, by default a tenth of the peak", 0.0)
    # evaluation, logs, checkpoints
    eval_interval: int = setting(2000, "steps between evaluations, each of which also saves", 1)
    eval_iters: int = setting(200, "batches per evaluation, 0 for the whole validation split", 0)
    eval_only: bool = setting(False, "evaluate once and exit")
    patience: int = setting(0, "stop after this many evaluations without improvement, 0 for never", 0)
    save_interval: int = setting(0, "steps between saves, 0 for only with evaluations", 0)
    save_minutes: float = setting(10.0, "most minutes between saves, 0 to save after every step", 0.0)
    log_interval: int = setting(10, "steps between log lines", 1)
    # system
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, ...; auto is the best available")
    dtype: str = setting("auto", "number type of matrix products", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = setting(True, "torch.compile the model: slow to start, then faster")
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    deterministic: bool = setting(False, "the same bits in every run, even where that is slower")
    backend: str = setting("auto", "of torch.distributed; auto is nccl on GPUs", choices=("auto", "nccl", "gloo"))
    timeout: int = setting(600, "seconds that a rank waits for another", 1)

    def __post_init__(self):
        resuming = Path(self.out_dir, "last.pt").exists()  # its weights count, and the folder may be gone
        if self.init_from not in RANDOM_INIT + HUB and not Path(self.init_from).is_dir() and not resuming:
            raise UserError(f"--init_from={self.init_from} is not a folder or one of {', '.join(RANDOM_INIT + HUB)}")
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters
        if self.warmup_iters is None:
            self.warmup_iters = min(2000, self.lr_decay_iters // 10)
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.warmup_iters > self.lr_decay_iters:
            raise UserError(f"warmup_iters ({self.warmup_iters}) is more than lr_decay_iters ({self.lr_decay_iters})")
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr ({self.min_lr}) is above learning_rate ({self.learning_rate})")


def learning_rate(step: int, s: Settings) -> float:
    """The learning rate of update number step, from 0: linear warm-up, then half a cosine (Loshchilov & Hutter 2017,
    equation 5) from learning_rate down to min_lr."""
    if not s.decay_lr:
        return s.learning_rate
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step >= s.lr_decay_iters:
        return s.min_lr
    progress = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + (s.learning_rate - s.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: MiniGPT, s: Settings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): matrices and embeddings decay, biases and norms do not.

    With optimizer=muon the matrices of the blocks go to Muon (Jordan et al. 2024) instead, whose update is their
    momentum made orthogonal. It is scaled to the size of AdamW's (Liu et al. 2025), so both share one schedule.
    """
    matrices, vectors, muon, fused = [], [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif s.optimizer != "muon" or not name.startswith("h."):
            matrices.append(p)
        else:
            (fused if name.endswith("c_attn.weight") else muon).append(p)
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    settings = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "weight_decay": s.weight_decay}
    settings["fused"] = matrices[0].device.type != "mps"  # which may skip no step (PyTorch issue 186360)
    if s.optimizer == "muon":
        return Muon([*groups, {"params": muon, "splits": 1}, {"params": fused, "splits": 3}], **settings)  # Q, K and V
    return torch.optim.AdamW(groups, **settings)


def load_windows(tokens: np.ndarray, starts: np.ndarray, config: GPTConfig) -> Batch:
    """Inputs and targets, each (len(starts), block_size): the target of a token is the token after it.

    Raises UserError for an id outside the vocabulary: on a GPU an embedding would crash without saying why.
    """
    windows = np.stack([tokens[start : start + config.block_size + 1] for start in starts]).astype(np.int64)
    if windows.max() >= config.vocab_size:
        raise UserError(f"the data has the token id {windows.max()}, outside the vocabulary of {config.vocab_size}")
    # contiguous, so that a pinned copy can go to a GPU as it is
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())


def training_batch(tokens: np.ndarray, config: GPTConfig, seed: int, step: int, first: int, n: int) -> Batch:
    """Sequences first to first + n of step's global batch. They depend on nothing but the seed, the step and their
    place in the batch: not on the number of ranks, nor on where the run was interrupted."""
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - config.block_size, size=first + n)[first:]
    return load_windows(tokens, starts, config)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on device. To CUDA, from pinned memory, the copy needs no wait."""
    cuda = device.type == "cuda"
    return tuple((t.pin_memory() if cuda else t).to(device, non_blocking=cuda) for t in batch)


@torch.inference_mode()
def evaluate(model: MiniGPT, tokens: np.ndarray, batch_size: int, eval_iters=0, ranks: Ranks | None = None) -> float:
    """Mean loss over evenly spaced, non-overlapping windows of tokens, the same ones every time.

    All of the split for eval_iters = 0, otherwise eval_iters batches; every rank reads its share.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    rank, size = (ranks.rank, ranks.size) if ranks else (0, 1)
    n_windows = (len(tokens) - 1) // block_size
    n = min(n_windows, eval_iters * batch_size) or n_windows
    starts = np.arange(n) * n_windows // n * block_size
    batches = np.array_split(starts, math.ceil(n / batch_size))
    total = torch.zeros((), device=device)
    model.eval()
    for first in range(0, len(batches), size):  # as many on each rank, so that a model that communicates can't hang
        batch = batches[min(first + rank, len(batches) - 1)]
        _, loss = model(*to_device(load_windows(tokens, batch, model.config), device))
        if first + rank < len(batches):
            total += loss * len(batch)
    model.train()
    return (ranks.sum(total) if ranks else total).item() / n


def find_dataset(name: str) -> str:
    """The dataset to train on: name, prepared if it is built in and missing, or python_docs if that fails offline."""
    if (DATA / name / "train.bin").exists() or name not in BUILT_IN:
        return name
    try:
        prepare(name)
        return name
    except UserError as error:
        if name != "shakespeare":
            raise
        print(f"{error}. Training on python_docs instead.", flush=True)
        return find_dataset("python_docs")


@advice()
def main(s: Settings) -> None:
    ranks = Ranks(s.device, s.backend, s.timeout)  # one process per rank, each with a device and its share of a step
    device = ranks.device
    rows, micro_steps = ranks.share(s.batch_size, s.gradient_accumulation_steps)
    dtype = best_dtype(device) if s.dtype == "auto" else s.dtype
    autocast = torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
    kernels = choose_kernels(device, s.compile, s.deterministic)

    # data
    train_tokens, val_tokens, meta = open_dataset(ranks.from_first(find_dataset, s.dataset), s.block_size)

    # model: that of the run in out_dir, or pretrained weights, or a new one
    run = Run(s.out_dir, ranks, read_only=s.eval_only)
    state = run.resume(s.init_from)
    init_from = state["init_from"] if state else s.init_from
    torch.manual_seed(s.seed)
    if state:
        run.check(state, meta, asdict(s))
        model = MiniGPT(GPTConfig(**(state["model_args"] | {"dropout": s.dropout})))
        load_weights(model, state["model"], run.last)
    elif init_from in RANDOM_INIT:
        model = MiniGPT(GPTConfig(s.block_size, meta["vocab_size"], s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias))
    else:
        model = load_pretrained(init_from, s.block_size, s.dropout).train()
        check_same_tokens(init_from, model.config.vocab_size, meta)
    if s.activation_checkpointing:
        for layer, block in enumerate(model.h):
            model.h[layer] = checkpoint_wrapper(block)
    model.to(device)
    optimizer = make_optimizer(model, s)
    # keeps small float16 gradients above zero (Micikevicius et al. 2018), and skips steps that are not finite for all
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if dtype == "float16" else 1.0)

    step, best_val_loss, worse_evals, seconds = 0, math.inf, 0, 0.0
    if state:
        # the optimiser's moments as they were; lr, betas, ... from this command
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        if dtype == "float16" and state["scaler"]["scale"] > 1:  # it is 1 if the run had another type
            scaler.load_state_dict(state["scaler"])
        step, seconds, worse_evals = state["step"], state["seconds"], state["worse_evals"]
        best_val_loss = state["best_val_loss"]
    del state  # as large as the model and its optimiser

    tokens_per_step = ranks.size * micro_steps * rows * s.block_size
    ranks.say(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {model.config}\n"
        f"data: {meta['dataset']}, from {meta['source']}\n"
        f"      {len(train_tokens):,} training tokens, vocabulary of {meta['vocab_size']:,}\n"
        f"step: {tokens_per_step:,} tokens on {ranks.size} x {device}, {dtype}, {micro_steps} x {rows} sequences each"
    )
    if not s.eval_only and (step >= s.max_iters or 0 < s.patience <= worse_evals):
        ranks.say(f"nothing to train: {run.folder} is finished at step {step}, with a loss of {best_val_loss:.4f}")
        ranks.say(f"to train longer raise --max_iters, to start over delete {run.folder}")
        return ranks.leave()

    # network is what a step calls, the model compiled and in DDP; model is what is evaluated and saved
    network = torch.compile(model) if s.compile else model
    if ranks.size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    if s.compile and not s.eval_only:
        batch = to_device(training_batch(train_tokens, model.config, s.seed, 0, 0, rows), device)
        compile_now(network, model, batch, autocast, ranks)

    ranks.catch_signals()
    run.start(step, seconds)
    first_step = log_step = step
    log_time, not_finite, skipped = time.perf_counter(), 0, torch.zeros((), device=device)
    while True:
        # Each turn: evaluate, save and stop where due, then train one step; so the end needs no code of its own.
        # stop is the number of a signal, or 0: all ranks agree on it, and on whether a timed save is due
        stop, overdue = ranks.maximum(ranks.signal, time.monotonic() - run.last_save > 60 * s.save_minutes)
        pause = time.perf_counter()
        finished = step >= s.max_iters
        evaluating = s.eval_only or (step > first_step and (finished or step % s.eval_interval == 0))
        if evaluating:
            with autocast, kernels:
                val_loss = evaluate(model, val_tokens, s.batch_size, s.eval_iters, ranks)
            worse_evals = 0 if val_loss < best_val_loss else worse_evals + 1
            best_val_loss = min(best_val_loss, val_loss)
            bits = val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"] if "val_bytes" in meta else None
            run.log(step, s.max_iters, val_loss=val_loss, perplexity=math.exp(min(val_loss, 700)), bits_per_byte=bits)
        saving = step > first_step and (overdue or (s.save_interval and step % s.save_interval == 0))
        if evaluating or stop or saving:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "step": step,
                "best_val_loss": best_val_loss,
                "worse_evals": worse_evals,
                "seconds": time.perf_counter() - run.start_time,
                "config": asdict(s),
                "init_from": init_from,
                "model_args": asdict(model.config),
                "tokenizer": meta,
            }
            if evaluating and worse_evals == 0:
                run.save("best.pt", state)
            run.save("last.pt", state)
        if finished or stop or s.eval_only or 0 < s.patience <= worse_evals:
            break
        log_time += time.perf_counter() - pause

        # train one step
        lr = learning_rate(step, s)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            first = (micro_step * ranks.size + ranks.rank) * rows
            x, y = to_device(training_batch(train_tokens, model.config, s.seed, step, first, rows), device)
            if s.dropout:  # masks that can be drawn again after a resume
                seeds = np.random.SeedSequence((s.seed, step, micro_step, ranks.rank))
                torch.manual_seed(int(seeds.generate_state(1)[0]))
            syncing = ranks.size == 1 or micro_step == micro_steps - 1  # one all-reduce per step
            with kernels, nullcontext() if syncing else network.no_sync():
                with autocast:
                    _, micro_loss = network(x, y)
                scaler.scale(micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        scaler.step(optimizer)  # skipped where the gradient is not finite
        scaler.update(None if dtype == "float16" else 1.0)
        model.zero_grad()
        skipped += ~grad_norm.isfinite()  # stays on the device, so that nothing waits
        step += 1

        if step % s.log_interval == 0 or step == 1:
            loss, grad_norm = ranks.sum(loss).item() / ranks.size, grad_norm.item()  # the only wait for the device
            now = time.perf_counter()
            step_time, log_time, log_step = (now - log_time) / (step - log_step), now, step
            rate = tokens_per_step / step_time
            speed = {"tokens_per_sec": rate, "ms_per_step": 1000 * step_time, "mfu": ranks.mfu(model, rate)}
            note = f"{timedelta(seconds=round((s.max_iters - step) * step_time))} left"
            note += f" | {int(skipped)} skipped: gradient not finite" if skipped else ""
            run.log(step, s.max_iters, note, loss=loss, lr=lr, grad_norm=grad_norm, **speed)
            good = math.isfinite(loss) and (dtype == "float16" or math.isfinite(grad_norm))
            not_finite = 0 if good else not_finite + 1
            if not_finite == 3:
                raise UserError(f"loss or gradient not finite in three log lines in a row, to step {step}: {ADVICE}")

    if run.unsaved:
        raise UserError(f"{' and '.join(sorted(run.unsaved))} could not be saved in {run.folder}: see above")
    if stop:
        ranks.say(f"interrupted: saved at step {step}; run the same command to resume")
    elif not s.eval_only:
        ranks.say(f"done: best validation loss {best_val_loss:.4f}" + ("" if finished else ", stopping early"))
        ranks.say(f"in this repository: python sample.py --out_dir={s.out_dir}")
    ranks.leave(by_signal=int(stop))


if __name__ == "__main__":
    record(run_script)(main, Settings, __doc__)  # lets torchrun say which rank failed, and why
