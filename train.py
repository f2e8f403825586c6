"""Train a GPT.

python train.py config/shakespeare.py                      start here: minutes, on anything
python train.py config/shakespeare.py --max_iters=200      settings come from config files and flags
python train.py --out_dir=out/shakespeare                  resume a run with its own settings
torchrun --standalone --nproc_per_node=8 train.py          GPT-2 (124M) on eight GPUs:
                                                           config/gpt2.py says how to get its text

Run the same command again to resume. A run writes to out_dir: last.pt (to resume from), best.pt
(the lowest validation loss so far) and metrics.jsonl.
"""

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from model import GPTConfig, MiniGPT
from prepare_data import BUILT_IN, prepare
from support.checkpoint import RANDOM_INIT, Run, model_from_checkpoint, previous_settings
from support.dataset import DATA, check_length, open_dataset
from support.kernels import choose_kernels, make_deterministic
from support.muon import Muon
from support.pretrained import HUB, ignored_sizes, load_weights_of
from support.runtime import (
    Ranks,
    StopSignals,
    advice,
    compile_now,
    mfu,
    precision,
    settle_buckets,
    share,
)
from support.settings import UserError, run_script, setting, user_error

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (B, T) each


@dataclass
class Settings:
    # the defaults train GPT-2 (124M) on half a million tokens per step
    out_dir: str = setting("out", "folder for checkpoints and metrics")
    init_from: str = setting(
        "auto", "auto (resume a run in out_dir, else scratch), resume, scratch, gpt2, or a folder"
    )
    seed: int = setting(
        1337, "random seed for initial weights, batches and dropout", low=0, high=2**63 - 1
    )
    # data
    dataset: str = setting("openwebtext", "folder in data/, made by prepare_data.py")
    batch_size: int = setting(12, "sequences per micro-batch, at most", low=1, high=1 << 24)
    gradient_accumulation_steps: int = setting(
        40, "micro-batches of batch_size per step, over all ranks", low=1, high=1 << 24
    )
    block_size: int = setting(1024, "context length: tokens per sequence", low=1, high=1 << 24)
    # model
    n_layer: int = setting(12, "transformer blocks", low=1, high=10_000)
    n_head: int = setting(12, "attention heads per block", low=1, high=10_000)
    n_embd: int = setting(768, "width, a multiple of n_head", low=1, high=1 << 20)
    dropout: float = setting(
        0.0, "share of activations set to zero: for large models on little text", low=0.0, high=0.99
    )
    bias: bool = setting(False, "give Linear and LayerNorm layers biases, as GPT-2 has")
    # optimiser
    optimizer: str = setting(
        "adamw", "muon: for the blocks' matrices, adamw for the rest", choices=("adamw", "muon")
    )
    learning_rate: float = setting(6e-4, "peak learning rate", low=0.0)
    max_iters: int = setting(600_000, "steps to train for", low=1)
    weight_decay: float = setting(
        0.1, "on matrices and embeddings, not on biases and norms", low=0.0
    )
    beta1: float = setting(0.9, "decay of the gradient's running mean", low=0.0, high=0.9999)
    beta2: float = setting(
        0.95, "decay of the squared gradient's running mean", low=0.0, high=0.99999
    )
    grad_clip: float = setting(1.0, "largest gradient norm, 0 for no limit", low=0.0)
    decay_lr: bool = setting(True, "warm up, then decay the learning rate; False keeps it constant")
    warmup_iters: int | None = setting(
        None, "steps of linear warm-up, by default a tenth of the run, at most 2000", low=0
    )
    lr_decay_iters: int | None = setting(
        None, "step at which the learning rate reaches min_lr, by default max_iters", low=1
    )
    min_lr: float | None = setting(
        None, "final learning rate, by default a tenth of the peak", low=0.0
    )
    # evaluation, logs, checkpoints
    eval_interval: int = setting(2000, "steps between evaluations, each of which also saves", low=1)
    eval_iters: int = setting(
        200, "batches per evaluation, 0 for the whole validation split", low=0
    )
    eval_only: bool = setting(False, "evaluate once and exit")
    patience: int = setting(
        0, "stop after this many evaluations without improvement, 0 for never", low=0
    )
    save_interval: int = setting(0, "steps between saves, 0 for only with evaluations", low=0)
    keep_interval: int = setting(0, "steps between checkpoints that are kept, 0 for none", low=0)
    save_minutes: float = setting(
        10.0, "minutes between saves, at most; 0 to save after every step", low=0.0
    )
    log_interval: int = setting(10, "steps between log lines", low=1)
    # system
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, ...; auto is the best available")
    dtype: str = setting(
        "auto", "data type of matrix products", choices=("auto", "float32", "bfloat16", "float16")
    )
    compile: bool = setting(True, "torch.compile the model: slow to start, then faster")
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    deterministic: bool = setting(False, "bitwise the same results in every run, maybe slower")
    backend: str = setting(
        "auto", "of torch.distributed; auto is nccl on GPUs", choices=("auto", "nccl", "gloo")
    )
    timeout: int = setting(600, "seconds that a rank waits for another", low=1)

    def __post_init__(self):
        self.given = asdict(self)  # what a checkpoint stores: before None is replaced below
        # A run that is resumed does not read init_from again, which may be gone.
        resuming = Path(self.out_dir, "last.pt").exists()
        known = RANDOM_INIT + HUB
        if self.init_from not in known and not Path(self.init_from).exists() and not resuming:
            raise UserError(
                f"--init_from={self.init_from} is not a folder, a checkpoint or one of "
                f"{', '.join(known)}"
            )
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters
        if self.warmup_iters is None:
            self.warmup_iters = min(2000, self.lr_decay_iters // 10)
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.warmup_iters > self.lr_decay_iters:
            raise UserError(
                f"warmup_iters ({self.warmup_iters}) is more than "
                f"lr_decay_iters ({self.lr_decay_iters})"
            )
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr ({self.min_lr}) is above learning_rate ({self.learning_rate})")


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up, then half a cosine from learning_rate down to min_lr.

    Loshchilov & Hutter 2017, equation 5. Steps count from 0.
    """
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

    With optimizer=muon, Muon (Jordan et al. 2024) updates the matrices of the blocks instead. Its
    update is scaled to the size of AdamW's (Liu et al. 2025), so both share one schedule.
    """
    matrices = []
    vectors = []
    muon_matrices = []
    muon_qkv = []  # Q, K and V in one: Muon treats the three separately
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif s.optimizer == "adamw" or not name.startswith("h."):
            matrices.append(p)
        elif name.endswith("c_attn.weight"):
            muon_qkv.append(p)
        else:
            muon_matrices.append(p)
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    options = {
        "lr": s.learning_rate,
        "betas": (s.beta1, s.beta2),
        "weight_decay": s.weight_decay,
        # One kernel, which also skips a step whose gradient is not finite (GradScaler, see main):
        # nothing waits for the device. On mps it may not skip (PyTorch pull request 186360).
        "fused": matrices[0].device.type != "mps",
    }
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    # splits: the number of matrices stacked in a parameter; Muon uses AdamW where it is not given
    groups.append({"params": muon_matrices, "splits": 1})
    groups.append({"params": muon_qkv, "splits": 3})
    return Muon(groups, **options)


def load_windows(tokens: np.ndarray, starts: np.ndarray, config: GPTConfig) -> Batch:
    """Inputs and targets, (len(starts), block_size) each: a token's target is the next token.

    Raises UserError for an id outside the vocabulary: on a GPU an embedding would crash without
    saying why.
    """
    windows = np.stack([tokens[start : start + config.block_size + 1] for start in starts])
    windows = windows.astype(np.int64)
    if windows.max() >= config.vocab_size:
        raise UserError(
            f"the data has the token id {windows.max()}, outside the vocabulary of "
            f"{config.vocab_size}"
        )
    # contiguous, so that a pinned copy can go to a GPU as it is
    x = torch.from_numpy(windows[:, :-1].copy())
    y = torch.from_numpy(windows[:, 1:].copy())
    return x, y


def training_batch(
    tokens: np.ndarray, config: GPTConfig, seed: int, step: int, first: int, n: int
) -> Batch:
    """Sequences first to first + n of a step's global batch.

    They depend on nothing but the seed, the step and their place in the batch: neither on the
    number of ranks nor on where the run was interrupted.
    """
    rng = np.random.default_rng((seed, step))
    # Each call draws from the start of the global batch, and drops what comes before first.
    starts = rng.integers(len(tokens) - config.block_size, size=first + n)
    return load_windows(tokens, starts[first:], config)


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """A seed of its own for each micro-batch, so that a resumed run draws the same masks."""
    return int(np.random.SeedSequence((seed, step, micro_step, rank)).generate_state(1)[0])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on device. From pinned memory, the copy to CUDA does not synchronise."""
    x, y = batch
    if device.type != "cuda":
        return x.to(device), y.to(device)
    x = x.pin_memory().to(device, non_blocking=True)
    y = y.pin_memory().to(device, non_blocking=True)
    return x, y


@torch.no_grad()
def evaluate(
    model: MiniGPT,
    tokens: np.ndarray,
    batch_size: int,
    eval_iters: int = 0,
    ranks: Ranks | None = None,
    signals: StopSignals | None = None,
) -> float | None:
    """Mean loss over evenly spaced, non-overlapping windows of tokens, always the same ones.

    All of the split for eval_iters = 0, otherwise at most eval_iters x batch_size windows. Each
    rank evaluates its share. Returns None if any rank has received one of `signals`.
    """
    device = next(model.parameters()).device
    config = model.config
    rank, n_ranks = 0, 1
    if ranks is not None:
        rank, n_ranks = ranks.rank, ranks.size
    n_windows = (len(tokens) - 1) // config.block_size
    n = n_windows
    if eval_iters > 0:
        n = min(n_windows, eval_iters * batch_size)
    windows = np.arange(n) * n_windows // n  # the numbers of n windows, evenly spaced
    starts = windows * config.block_size
    # The logits of a batch in float32 stay within 1 GB.
    max_rows = max(1, 2**28 // (config.block_size * config.vocab_size))
    batches = np.array_split(starts, math.ceil(n / min(batch_size, max_rows)))

    total = torch.zeros((), device=device)
    shown = time.monotonic()
    model.eval()
    for first in range(0, len(batches), n_ranks):
        # A rank for which no batch is left evaluates the last one again and does not count it: the
        # ranks wait for each other in agreed(), and in the model if it is sharded (forks/fsdp).
        index = first + rank
        batch = batches[min(index, len(batches) - 1)]
        x, y = to_device(load_windows(tokens, batch, config), device)
        loss = model(x, y)[1]  # [1], so that the large logits are freed
        if index < len(batches):
            total += loss * len(batch)
        if signals is not None and signals.agreed() > 0:
            model.train()
            return None
        if ranks is not None and time.monotonic() > shown + 10:
            shown = time.monotonic()
            ranks.say(f"evaluating: {first / len(batches):.0%}")
    model.train()
    if ranks is not None:
        ranks.sum(total)
    return total.item() / n


def ensure_dataset(name: str) -> str:
    """Prepare the dataset name if it is built in and missing. Returns the name to train on.

    That is python_docs where shakespeare can't be downloaded.
    """
    if (DATA / name / "train.bin").exists() or name not in BUILT_IN:
        return name
    try:
        with user_error(f"can't write {DATA / name}", OSError):
            prepare(name)
        return name
    except UserError as error:
        if name != "shakespeare":
            raise
        print(f"{error}. Training on python_docs instead.", flush=True)
        return ensure_dataset("python_docs")


def random_model(s: Settings, vocab_size: int) -> MiniGPT:
    """A model of the sizes in s, with random weights."""
    return MiniGPT(
        GPTConfig(
            block_size=s.block_size,
            vocab_size=vocab_size,
            n_layer=s.n_layer,
            n_head=s.n_head,
            n_embd=s.n_embd,
            dropout=s.dropout,
            bias=s.bias,
        )
    )


def initial_model(init_from: str, s: Settings, meta: dict[str, Any]) -> MiniGPT:
    """A model for a new run: with random weights, those of another run, or pretrained ones.

    The last two keep their own block_size where s has the default. Raises UserError for a
    block_size that the model can't have, and for a dataset with other tokens than its own.
    """
    if init_from in RANDOM_INIT:  # auto or scratch; for resume, run.load found a run or raised
        return random_model(s, meta["vocab_size"])
    block_size = None
    if s.block_size != Settings.block_size:  # which is the default
        block_size = s.block_size
    return load_weights_of(init_from, block_size, s.dropout, meta)


def checkpoint_state(
    model: MiniGPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    s: Settings,
    meta: dict[str, Any],
    **progress: Any,
) -> dict[str, Any]:
    """All that a run needs to resume bit for bit. meta describes the dataset."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "config": s.given,  # the settings; this name and the next are nanoGPT's
        "model_args": asdict(model.config),
        "tokenizer": meta,  # describes the dataset's text and its tokenizer
        **progress,
    }


def metrics_of(val_loss: float, meta: dict[str, Any]) -> dict[str, float]:
    """A validation loss in nats per token, as perplexity, and in bits per byte of text.

    Only the last can be compared across tokenizers.
    """
    values = {"val_loss": val_loss, "perplexity": math.exp(min(val_loss, 700))}  # exp overflows
    if "val_bytes" in meta:
        tokens_per_byte = meta["val_tokens"] / meta["val_bytes"]
        values["bits_per_byte"] = val_loss / math.log(2) * tokens_per_byte
    return values


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps, or never for 0, is due after step."""
    return interval > 0 and step > 0 and step % interval == 0


def time_left(step: int, s: Settings, step_seconds: float, eval_seconds: float) -> str:
    """How long the rest of the run takes, with its evaluations and saves: 1:02:03 left."""
    # all evaluations less those before this step: the one that may be due now is still to come
    n_evals = math.ceil(s.max_iters / s.eval_interval) - (step - 1) // s.eval_interval
    seconds = (s.max_iters - step) * step_seconds + n_evals * eval_seconds
    return f"{timedelta(seconds=round(seconds))} left"


@advice()  # prints a hint after an out-of-memory or communication error
def main(s: Settings) -> None:
    if s.deterministic:
        make_deterministic()
    # one process per rank, each with a device and its share of a step
    ranks = Ranks(s.device, s.backend, s.timeout)
    device = ranks.device
    micro_batch_size, micro_steps = share(s.batch_size, s.gradient_accumulation_steps, ranks.size)
    dtype, autocast = precision(s.dtype, device)

    # data
    dataset = ranks.run_on_first(ensure_dataset, s.dataset)
    train_tokens, val_tokens, meta = open_dataset(dataset)

    # model: that of the run in out_dir, or a new one
    run = Run(s.out_dir, ranks, read_only=s.eval_only)
    state = run.load(s.init_from)
    torch.manual_seed(s.seed)
    if state is not None:
        run.check(state, meta, s.given)  # the same data and sizes; prints other changes
        init_from = state["init_from"]
        model = model_from_checkpoint(state, run.last, s.dropout)
    else:
        init_from = s.init_from
        model = initial_model(init_from, s, meta)
        ignored = ignored_sizes(model.config, s)
        if ignored:
            ranks.say(f"ignored: {', '.join(ignored)}; the model of {init_from} has its own sizes")
    model.activation_checkpointing = s.activation_checkpointing
    model.to(device)
    config = model.config
    check_length(meta, config.block_size)
    # attention scores in one layer: their number decides which kernel is fastest on a CPU
    n_scores = micro_batch_size * config.n_head * config.block_size**2
    choose_kernels(device, dtype, n_scores)

    optimizer = make_optimizer(model, s)
    # The scaler skips steps whose gradient is not finite. In float16 it also multiplies the loss,
    # so that small gradients stay above zero (Micikevicius et al. 2018); otherwise by 1.
    scaling = dtype == "float16"
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if scaling else 1.0)

    step = 0
    evaluated = 0  # step of the last evaluation
    best_val_loss = math.inf
    worse_evals = 0  # evaluations since the best one
    seconds = 0.0
    if state is not None:
        # The moments are those of the run; learning rate, betas, ... are those of this command.
        state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state["optimizer"])
        if scaling and state.get("dtype") == dtype:  # the run was in float16 before
            scaler.load_state_dict(state["scaler"])
        step = state["step"]
        evaluated = state["evaluated"]
        best_val_loss = state["best_val_loss"]
        worse_evals = state["worse_evals"]
        seconds = state["seconds"]
    del state  # frees a copy of the weights and moments

    tokens_per_step = s.batch_size * s.gradient_accumulation_steps * config.block_size
    epochs = s.max_iters * tokens_per_step / len(train_tokens)
    ranks.say(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {config}\n"
        f"data: {meta['dataset']}, from {meta['source']}\n"
        f"      {len(train_tokens):,} training tokens, vocabulary of {meta['vocab_size']:,}\n"
        f"step: {tokens_per_step:,} tokens on {ranks.size} x {device}, {dtype}, "
        f"{micro_steps} x {micro_batch_size} sequences each\n"
        f"run: {s.max_iters:,} steps, {epochs:,.1f} epochs: "
        f"each token is read {epochs:,.1f} times on average"
    )
    if epochs > 20:
        ranks.say("     more than 20 epochs may overfit: docs/your_text.md has better numbers")
    if s.eval_only:
        with autocast:
            val_loss = evaluate(model, val_tokens, s.batch_size, s.eval_iters, ranks)
        run.log(step, s.max_iters, **metrics_of(val_loss, meta))
        ranks.leave()
        return
    stopped_early = 0 < s.patience <= worse_evals
    if stopped_early or evaluated >= s.max_iters:
        limit = "--patience" if stopped_early else "--max_iters"
        ranks.say(
            f"nothing to train: {run.folder} is finished at step {step}, "
            f"with a best validation loss of {best_val_loss:.4f}\n"
            f"to train longer raise {limit}, to start over delete {run.folder}"
        )
        ranks.leave()
        return

    # A training step calls network: model, compiled and in DDP, with the same weights. model itself
    # is saved, and evaluated: other batch sizes would be compiled again.
    network = model
    if s.compile:
        options = {"deterministic": True} if s.deterministic else None
        network = torch.compile(model, options=options)
    if ranks.size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    batch = training_batch(train_tokens, config, s.seed, 0, 0, micro_batch_size)
    batch = to_device(batch, device)
    if s.compile:
        compile_now(network, model, batch, autocast, ranks)
    if ranks.size > 1:
        # a step without an update, after which DDP adds gradients in the same order in every step
        settle_buckets(network, batch, autocast)

    signals = StopSignals(ranks)
    run.start(step, evaluated, seconds)  # drops metrics that will be logged again
    log_step = step  # of the last log line
    log_time = time.perf_counter()
    paused = 0.0  # seconds since then that were not spent on training
    eval_seconds = 0.0
    fastest = 0.0  # tokens per second
    not_finite = 0  # log lines in a row
    skipped = torch.zeros((), device=device)
    max_norm = s.grad_clip if s.grad_clip > 0 else math.inf

    def save():  # what `if state is not None` above restores
        progress = {
            "init_from": init_from,
            "dtype": dtype,
            "step": step,
            "evaluated": evaluated,
            "best_val_loss": best_val_loss,
            "worse_evals": worse_evals,
            "seconds": run.seconds(),
        }
        run.save(checkpoint_state(model, optimizer, scaler, s, meta, **progress))

    while True:
        # What is due? All ranks come to the same answer.
        overdue = run.minutes_unsaved() > s.save_minutes
        stop_signal, overdue = ranks.maximum(signals.received, overdue)  # a signal's number, or 0
        finished = step >= s.max_iters
        evaluating = evaluated < step and (finished or due(step, s.eval_interval))
        keeping = due(step, s.keep_interval)
        saving = stop_signal or overdue or evaluating or keeping or due(step, s.save_interval)

        # Save first: an evaluation may take long, and be interrupted.
        if saving and device.type != "cpu":
            torch.accelerator.synchronize()  # queued steps are training, not a pause
        pause_start = time.perf_counter()
        if saving and run.saved_step < step:
            save()
        if keeping:
            run.link_last_as(f"step_{step:07}.pt")
        if stop_signal:
            break

        # Evaluate.
        if evaluating:
            with autocast:
                val_loss = evaluate(model, val_tokens, s.batch_size, s.eval_iters, ranks, signals)
            if val_loss is None:
                continue  # interrupted by a signal: the next turn stops
            evaluated = step
            if val_loss < best_val_loss:
                best_val_loss = val_loss
                worse_evals = 0
                run.link_last_as("best.pt")  # last.pt is of this step: saved above
            else:
                worse_evals += 1
            run.log(step, s.max_iters, **metrics_of(val_loss, meta))
            if worse_evals == 2 and not s.patience:
                ranks.say(
                    f"no better than {best_val_loss:.4f} in two evaluations in a row: best.pt has "
                    "the best weights; --patience=2 would stop here, a lower --max_iters earlier"
                )
            eval_seconds = time.perf_counter() - pause_start
        stopped_early = 0 < s.patience <= worse_evals
        if finished or stopped_early:
            break
        paused += time.perf_counter() - pause_start

        # Train one step.
        lr = learning_rate(step, s)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            first = (micro_step * ranks.size + ranks.rank) * micro_batch_size
            batch = training_batch(train_tokens, config, s.seed, step, first, micro_batch_size)
            x, y = to_device(batch, device)
            if s.dropout > 0:
                torch.manual_seed(dropout_seed(s.seed, step, micro_step, ranks.rank))
            gradient_sync = nullcontext()
            if ranks.size > 1 and micro_step < micro_steps - 1:
                gradient_sync = network.no_sync()  # all-reduce after the last micro-batch only
            with gradient_sync:
                with autocast:
                    micro_loss = network(x, y)[1]  # [1], so that the large logits are freed
                scaler.scale(micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)  # skipped where the gradient is not finite
        scaler.update(None if scaling else 1.0)  # 1.0, or it would double after 2000 steps
        model.zero_grad()
        skipped += grad_norm.isfinite().logical_not()  # stays on the device
        step += 1

        # Log.
        if step == 1 or due(step, s.log_interval):
            loss = ranks.sum(loss).item() / ranks.size  # waits for the device
            grad_norm = grad_norm.item()
            now = time.perf_counter()
            step_seconds = (now - log_time - paused) / (step - log_step)
            log_time = now
            log_step = step
            paused = 0.0
            tokens_per_sec = tokens_per_step / step_seconds
            flops_per_rank = tokens_per_sec * model.flops_per_token() / ranks.size
            note = time_left(step, s, step_seconds, eval_seconds)
            fastest = max(fastest, tokens_per_sec)
            if device.type == "cpu" and tokens_per_sec < fastest / 2:
                note += " | slowed down: if the cores are shared, set OMP_WAIT_POLICY=passive"
            if skipped > 0:
                note += f" | {int(skipped)} skipped: gradient not finite"
                skipped.zero_()
            run.log(
                step,
                s.max_iters,
                note,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens_per_sec=tokens_per_sec,
                ms_per_step=1000 * step_seconds,
                mfu=mfu(flops_per_rank, device),
            )
            # In float16, infinite gradients are how the scaler finds its scale.
            if math.isfinite(loss) and (scaling or math.isfinite(grad_norm)):
                not_finite = 0
            else:
                not_finite += 1
            if not_finite == 3:
                raise UserError(
                    f"loss or gradient not finite in three log lines in a row, up to step {step}: "
                    f"{run.way_back()}"
                )

    if not stop_signal:
        save()  # now with the last evaluation
    signals.restore()
    if run.unsaved:
        names = " and ".join(sorted(run.unsaved))
        raise UserError(f"{names} could not be saved in {run.folder}: see above")
    if stop_signal:
        ranks.say(f"interrupted: saved at step {step}; run the same command to resume")
    else:
        early = ", stopped early" if stopped_early else ""
        ranks.say(f"done: best validation loss {best_val_loss:.4f}{early}")
        ranks.say(f"next: python sample.py --out_dir={s.out_dir}")
    del network  # DDP before its process group: the other way round, they may deadlock
    ranks.leave()
    if stop_signal:
        signal.raise_signal(stop_signal)  # so that a shell or torchrun sees why this process ended


if __name__ == "__main__":
    script = record(run_script)  # record lets torchrun say which rank failed, and why
    # Without a config file, the settings of a run in --out_dir are the defaults.
    script(main, Settings, __doc__, previous=previous_settings)
