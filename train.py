"""Train a GPT.

python train.py config/shakespeare.py                      begin here: minutes, on anything
python train.py config/shakespeare.py --max_iters=200      any setting can be given, the last one wins
torchrun --standalone --nproc_per_node=8 train.py          GPT-2 (124M) on eight GPUs

Run the same command again to go on where it stopped. Everything it makes is in out_dir: last.pt (to go on from),
best.pt (the lowest validation loss), metrics.jsonl and, at the end, its picture loss.png.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from config import UserError, one_line_errors, read_settings, setting


@dataclass
class Settings:
    # the defaults train GPT-2 (124M) on half a million tokens a step
    out_dir: str = setting("out", "folder for checkpoints and metrics")
    init_from: str = setting(
        "auto", "auto: go on from out_dir/last.pt if there is one; resume: insist on it; scratch: insist on a new run; "
        "else begin with these weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder like the hub's"
    )  # fmt: skip
    seed: int = setting(1337, "of the initial weights, the batches and dropout", 0, 2**63 - 1)
    # data
    dataset: str = setting("openwebtext", "folder in data/ that prepare_data.py made")
    batch_size: int = setting(12, "sequences a micro-batch", 1, 1 << 24)
    gradient_accumulation_steps: int = setting(40, "micro-batches a step, of all ranks together", 1, 1 << 24)
    block_size: int = setting(1024, "tokens a sequence, the most the model can see", 1, 1 << 24)
    # model
    n_layer: int = setting(12, "transformer blocks", 1, 10_000)
    n_head: int = setting(12, "attention heads a block", 1, 10_000)
    n_embd: int = setting(768, "width, a multiple of n_head", 1, 1 << 20)
    dropout: float = setting(0.0, "share of activations set to zero; 0 for pretraining, 0.1 and more for little data",
                             low=0.0, high=0.99)  # fmt: skip
    bias: bool = setting(False, "biases in Linear and LayerNorm layers, as GPT-2 has them")
    # optimiser
    optimizer: str = setting("adamw", "adamw, or muon for the matrices of the blocks and adamw for the rest",
                             choices=("adamw", "muon"))  # fmt: skip
    learning_rate: float = setting(6e-4, "its highest value", low=0.0)
    max_iters: int = setting(600_000, "steps to train for", low=1)
    weight_decay: float = setting(0.1, "on matrices and embeddings, not on biases and norms", low=0.0)
    beta1: float = setting(0.9, "decay of the gradient's running mean", low=0.0, high=0.9999)
    beta2: float = setting(0.95, "decay of the squared gradient's running mean", low=0.0, high=0.99999)
    grad_clip: float = setting(1.0, "largest norm of the gradient, 0 for no limit", low=0.0)
    decay_lr: bool = setting(True, "warm up, then decay the learning rate; otherwise it is constant")
    warmup_iters: int | None = setting(None, "steps of linear warm-up, by default 2000 or a tenth of the run", low=0)
    lr_decay_iters: int | None = setting(None, "step at which it reaches min_lr, by default max_iters", low=1)
    min_lr: float | None = setting(None, "the learning rate's last value, by default a tenth of its highest", low=0.0)
    max_bad_steps: int = setting(8, "end after so many steps in a row whose gradient is not finite; each is skipped",
                                 low=1)  # fmt: skip
    # evaluation, logs, checkpoints
    eval_interval: int = setting(2000, "steps between evaluations, each of which also saves", low=1)
    eval_iters: int = setting(200, "micro-batches an evaluation reads, 0 for the whole validation split", low=0)
    eval_only: bool = setting(False, "evaluate once and end")
    patience: int = setting(0, "stop after so many evaluations without a better one, 0 for never", low=0)
    save_interval: int = setting(0, "steps between saves, 0 for only with evaluations", low=0)
    save_minutes: float = setting(10.0, "minutes between saves, whatever the step", low=0.0)
    log_interval: int = setting(10, "steps between log lines", low=1)
    plot: bool = setting(True, "draw out_dir/loss.png at the end (needs matplotlib)")
    tensorboard: bool = setting(
        False, "write the metrics for TensorBoard too, to out_dir/tensorboard (needs tensorboard)"
    )
    # finding mistakes
    overfit: bool = setting(False, "train on one batch again and again and write nothing: a model that learns gets its "
                                   "loss to near zero")  # fmt: skip
    log_stats: bool = setting(False, "with each log line, activations, gradients, weights and updates layer by layer")
    # system
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, ...; auto is the best there is")
    dtype: str = setting(
        "auto", "of matrix products: auto is bfloat16 where the hardware has it fast, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    compile: bool = setting(True, "torch.compile the model: slow to start, faster to run")
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    deterministic: bool = setting(False, "the same bits in every run also where that is slower")
    backend: str = setting("auto", "of torch.distributed: auto is nccl on GPUs and gloo on CPUs",
                           choices=("auto", "nccl", "gloo"))  # fmt: skip
    timeout: int = setting(600, "seconds that a rank waits for another", low=1)

    def __post_init__(self):
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters
        if self.warmup_iters is None:
            self.warmup_iters = min(2000, self.lr_decay_iters // 10)
        if self.min_lr is None:
            self.min_lr = self.learning_rate / 10
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.warmup_iters > self.lr_decay_iters:
            raise UserError(f"warmup_iters ({self.warmup_iters}) must not be more than the run ({self.lr_decay_iters})")
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr ({self.min_lr}) must not be above learning_rate ({self.learning_rate})")
        if self.overfit:
            self.dropout = 0.0  # it is there to hinder this


if __name__ == "__main__":  # before torch is loaded, which takes seconds: --help and mistakes are answered at once
    with one_line_errors():
        settings = read_settings(Settings, sys.argv[1:], __doc__)

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from checkpoint import (
    check_same_run,
    cut_metrics,
    load_checkpoint,
    model_config,
    refused,
    restore,
    save_checkpoint,
)
from dataset import DATA, Tokens, open_dataset
from files import lock
from model import GPTConfig, MiniGPT
from plot import draw_run
from prepare_data import BUILT_IN, prepare
from pretrained import check_same_tokens, load_pretrained
from stats import layer_stats

# dense bfloat16 FLOP/s by the makers' data sheets, by a part of the device's name; the first that fits counts
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip

T = TypeVar("T")
ADVICE = "try a lower --learning_rate, a longer --warmup_iters, a --grad_clip of 1.0, or --dtype=float32"


def pick_device(name: str) -> torch.device:
    """The torch.device called name; for "auto" a GPU if there is one: cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each rank
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # unknown, not compiled in, or not there
        raise UserError(f"--device={name} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def best_dtype(device: torch.device) -> str:
    """bfloat16 where the device has matrix instructions for it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell
        fast = device.type == "cpu" and capabilities.get("avx512_bf16", False)
    return "bfloat16" if fast else "float32"


def choose_attention(device: torch.device, dtype: str, block_size: int) -> None:
    """Turn the fused attention off where it is slow, in bfloat16 on CPUs: up to 128 tokens a step takes a tenth to a
    fifth less without it."""
    slow = device.type == "cpu" and dtype == "bfloat16" and block_size <= 128
    torch.backends.cuda.enable_flash_sdp(not slow)  # says cuda, but is for all devices


def flops_per_token(model: MiniGPT) -> int:
    """Floating-point operations to train on one token (Chowdhery et al. 2022, appendix B): a weight is a multiply-add
    forward and two backward, and so is each of the T C products in both of a layer's attention matrices."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")  # that is looked up
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def learning_rate(step: int, s: Settings) -> float:
    """The learning rate of the update after `step` updates: linear warm-up, then half a cosine (Loshchilov & Hutter
    2017, equation 5) from learning_rate down to min_lr."""
    if not s.decay_lr:
        return s.learning_rate
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step >= s.lr_decay_iters:
        return s.min_lr
    progress = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + (s.learning_rate - s.min_lr) * (1 + math.cos(math.pi * progress)) / 2


class MuonAndAdamW:
    """Two optimisers that are used as one."""

    def __init__(self, muon, adamw):
        self.optimizers = (muon, adamw)

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def make_optimizer(model: MiniGPT, s: Settings) -> torch.optim.AdamW | MuonAndAdamW:
    """AdamW (Loshchilov & Hutter 2019) in two groups: matrices and embeddings decay, biases and norms do not.

    With optimizer=muon the matrices of the blocks go to Muon (Jordan et al. 2024) instead, whose update is their
    momentum made orthogonal. It is scaled to the size of AdamW's (Liu et al. 2025), so both share one schedule.
    """
    muon, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif s.optimizer == "muon" and name.startswith("h."):
            muon.append(p)
        else:
            matrices.append(p)
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)
    if not muon:
        return adamw
    return MuonAndAdamW(torch.optim.Muon(muon, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw"), adamw)


def load_windows(tokens: Tokens, starts: np.ndarray, config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (len(starts), block_size): the target of a token is the token after it.

    Raises UserError for an id outside the vocabulary: on a GPU an embedding would crash without saying why.
    """
    windows = np.stack([tokens[start : start + config.block_size + 1] for start in starts])
    windows = torch.from_numpy(windows.astype(np.int64))
    if windows.max() >= config.vocab_size:
        where = getattr(tokens, "filename", "the data")
        raise UserError(f"{where} has the token id {windows.max()}, outside the vocabulary of {config.vocab_size}")
    return windows[:, :-1], windows[:, 1:]


def training_batch(
    tokens: Tokens, config: GPTConfig, seed: int, step: int, first: int, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences first to first + n of step's global batch. They depend on nothing but the seed, the step and their
    place in the batch: not on the number of ranks, nor on where the run was interrupted."""
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - config.block_size, size=first + n)[first:]
    return load_windows(tokens, starts, config)


def prefetch(load: Callable[..., T], keys: Iterable[tuple]) -> Iterator[T]:
    """Yield load(*key) for each key, loading the next in a thread while the last is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for key in keys:
            current, coming = coming, pool.submit(load, *key)
            if current:
                yield current.result()
        if coming:
            yield coming.result()


@torch.inference_mode()
def evaluate(
    model: MiniGPT, tokens: Tokens, batch_size: int, eval_iters: int = 0, rank: int = 0, world_size: int = 1
) -> float:
    """Mean loss over evenly spaced, non-overlapping windows of tokens, the same ones every time.

    All of the split for eval_iters = 0, otherwise eval_iters batches; every rank reads its share.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    n_windows = (len(tokens) - 1) // block_size
    n = min(n_windows, eval_iters * batch_size) or n_windows
    starts = np.arange(n) * n_windows // n * block_size
    batches = np.array_split(starts, math.ceil(n / batch_size))[rank::world_size]
    total = torch.zeros((), device=device)
    model.eval()
    for batch in batches:
        x, y = load_windows(tokens, batch, model.config)
        total += model(x.to(device), y.to(device))[1] * len(batch)
    model.train()
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / n


def in_parts(sum_of_losses: Callable, x: torch.Tensor, targets: torch.Tensor, n: int = 256) -> torch.Tensor:
    """sum_of_losses(x, targets), n tokens at a time: the logits of a large vocabulary are the largest tensor of all."""
    return sum(sum_of_losses(*part) for part in zip(x.split(n), targets.split(n), strict=True))


def recompute_activations(model: MiniGPT) -> None:
    """Let what a block computes inside, and the logits, be computed again in the backward pass, not kept for it (Chen
    et al. 2016)."""
    for block in model.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    model.sum_of_losses = partial(in_parts, partial(checkpoint, model.sum_of_losses, use_reentrant=False))


def find_dataset(name: str) -> str:
    """Prepare the dataset if it is missing and built in. Returns the name of the one to train on."""
    if (DATA / name / "train.bin").exists():
        return name
    if name not in BUILT_IN:
        raise UserError(
            f"no data/{name}: make it with python prepare_data.py {name} --input PATH --tokenizer=gpt2; to begin, "
            "run python train.py config/shakespeare.py, which needs no preparation"
        )
    try:
        prepare(name)
        return name
    except UserError as error:
        if name != "shakespeare":
            raise
        print(f"{error}. Training on python_docs instead.", flush=True)
        return find_dataset("python_docs")


def join_ranks(backend: str, timeout: timedelta) -> None:
    """dist.init_process_group, also where torchrun starts the job again after a failure.

    The store in which ranks find each other outlives the failure, and has the addresses of dead processes (PyTorch
    issue 135712). So the ranks first agree on a name for this attempt, of which the old ones know nothing: all of
    their random words, once every rank has seen the same ones.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set(f"word/{rank}", os.urandom(8).hex())
    deadline, attempt = time.monotonic() + timeout.total_seconds(), None
    while attempt is None or any(store.get(f"seen/{r}") != attempt for r in range(world_size)):
        if time.monotonic() > deadline:
            raise UserError("timed out waiting for the other ranks to start")
        time.sleep(0.02 if attempt else 0)
        attempt = b"".join(store.get(f"word/{r}") for r in range(world_size))
        store.set(f"seen/{rank}", attempt.decode())
    store = dist.PrefixStore(attempt.decode(), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do about those of torch's errors that a user can put right."""
    try:
        yield
    except RuntimeError as error:
        for sign, advice in (
            ("out of memory", "a smaller --batch_size with more --gradient_accumulation_steps needs less"),
            ("can't allocate memory", "a smaller model or --batch_size needs less"),
            ("deterministic implementation", "--deterministic=False does without"),
            ("imed out", "another rank has stopped or is slower than --timeout"),
            ("by peer", "another rank has stopped"),
        ):
            if sign in str(error):
                raise UserError(f"{str(error).splitlines()[0][:150]} ({advice})") from error
        raise


@one_line_errors()
@explained()
def main(s: Settings) -> None:
    # ranks: torchrun starts one process a rank and tells each its place
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if s.gradient_accumulation_steps % world_size:
        raise UserError(
            f"gradient_accumulation_steps ({s.gradient_accumulation_steps}) must be a multiple of the number of "
            f"ranks ({world_size}): each rank does its share of the micro-batches"
        )
    micro_steps = s.gradient_accumulation_steps // world_size
    device = pick_device(s.device)
    dtype = best_dtype(device) if s.dtype == "auto" else s.dtype
    autocast = torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
    choose_attention(device, dtype, s.block_size)
    if s.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs tensorboard: pip install tensorboard, or leave it out") from error
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world_size > 1:
        backend = ("nccl" if device.type == "cuda" else "gloo") if s.backend == "auto" else s.backend
        join_ranks(backend, timedelta(seconds=s.timeout))
        cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=s.timeout))

    def say(line):
        if rank == 0:
            print(line, flush=True)

    # data
    found = [find_dataset(s.dataset) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(found)
    s.dataset = found[0]
    train_tokens, val_tokens, tokenizer = open_dataset(s.dataset)
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        if len(tokens) <= s.block_size:
            where = f"data/{s.dataset}/{split}.bin"
            raise UserError(f"{where} has {len(tokens)} tokens, no more than block_size ({s.block_size})")

    # a run to go on with
    out_dir = Path(s.out_dir)
    last, best, metrics = out_dir / "last.pt", out_dir / "best.pt", out_dir / "metrics.jsonl"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, with the same command
    if s.init_from == "scratch" and last.exists() and not restarted:
        raise UserError(f"{last} is a run already: leave --init_from out to go on with it, or give another --out_dir")
    going_on = (s.init_from == "resume" or last.exists()) and not s.overfit
    state = load_checkpoint(last) if going_on else None

    # model and optimiser
    torch.manual_seed(s.seed)
    raw_model = None
    if s.init_from not in ("auto", "resume", "scratch"):  # weights, which bring their sizes
        if not state:
            raw_model = load_pretrained(s.init_from, s.block_size, s.dropout).train()
            check_same_tokens(s.init_from, raw_model.config.vocab_size, tokenizer)
        with refused(last):
            sizes = raw_model.config if raw_model else model_config(state)
        vars(s).update({k: v for k, v in asdict(sizes).items() if k not in ("vocab_size", "block_size", "dropout")})
    try:
        sizes = {f.name: getattr(s, f.name) for f in fields(GPTConfig) if hasattr(s, f.name)}
        config = GPTConfig(vocab_size=tokenizer["vocab_size"], **sizes)
    except ValueError as error:
        raise UserError(str(error)) from error
    raw_model = (raw_model or MiniGPT(config)).to(device)
    optimizer = make_optimizer(raw_model, s)
    # Scales the loss so that small float16 gradients do not become zero (Micikevicius et al. 2018). For the other
    # types the scale is 1, and what is left is wanted there too: it skips a step whose gradient is not finite.
    scale, interval = (2.0**16, 2000) if dtype == "float16" else (1.0, 2**31 - 1)
    scaler = torch.amp.GradScaler(device.type, scale, growth_interval=interval, enabled=device.type != "mps")

    # resume
    step, best_val_loss, worse_evals, seconds, bad_steps, skipped = 0, math.inf, 0, 0.0, 0, 0
    if state:
        with refused(last):
            check_same_run(last, state, config, tokenizer)
            step, worse_evals, bad_steps, skipped = restore(state, raw_model, optimizer, scaler)
            best_val_loss, seconds = float(state["best_val_loss"]), float(state["seconds"])
            old = state["config"]
            if s.init_from not in ("auto", "resume", "scratch", old["init_from"]):
                raise UserError(f"{last} is a run that did not begin with {s.init_from}: give another --out_dir")
            s.init_from = old["init_from"]  # what the run began with stays known
            changed = [f"{k} {old.get(k)} -> {v}" for k, v in asdict(s).items() if v != old.get(k)]
        say(f"going on from {last} at step {step}" + (f", changed: {', '.join(changed)}" if changed else ""))
    del state  # as large as the model and its optimiser
    if world_size > 1:
        steps = [None] * world_size
        dist.all_gather_object(steps, step, group=cpu_group)
        if len(set(steps)) > 1:
            raise UserError(f"not all ranks found the same {last}: out_dir must be where all machines see it")

    # report
    n_params = sum(p.numel() for p in raw_model.parameters())
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak_flops = world_size * next((v for k, v in PEAK_FLOPS.items() if k in device_name), math.nan)
    tokens_per_step = s.gradient_accumulation_steps * s.batch_size * s.block_size
    say(f"model: {n_params:,} parameters, {s.n_layer} layers, {s.n_head} heads, {s.n_embd} wide")
    say(
        f"data: {s.dataset}, from {tokenizer['source']}: {len(train_tokens):,} training tokens of {config.vocab_size:,}"
    )
    micro_batches = f"{s.gradient_accumulation_steps} x {s.batch_size} sequences of {s.block_size}"
    say(f"a step: {tokens_per_step:,} tokens ({micro_batches}) on {world_size} x {device_name}, {dtype}")
    if not s.eval_only and (step >= s.max_iters or 0 < s.patience <= worse_evals):
        say(f"{out_dir} is finished: step {step}, best validation loss {best_val_loss:.4f}; --max_iters can be raised")
        return

    # speed: compiled, on several ranks, with less memory
    if s.activation_checkpointing:
        recompute_activations(raw_model)
    model = raw_model
    if s.compile:
        try:
            model = torch.compile(raw_model)
            with autocast:  # it compiles when it is first called
                loss = model(*(t.to(device) for t in training_batch(train_tokens, config, 0, 0, 0, s.batch_size)))[1]
            loss.backward()
            raw_model.zero_grad()
        except Exception as error:  # as many kinds as there are compilers
            say(f"not compiling, {type(error).__name__} in torch.compile: --compile=False does without this attempt")
            model = raw_model
    if world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    begun = time.perf_counter() - seconds  # so that the time of earlier runs counts

    def evaluate_now():
        """Print and log the validation loss, and return it."""
        with autocast:
            val_loss = evaluate(raw_model, val_tokens, s.batch_size, s.eval_iters, rank, world_size)
        perplexity = math.exp(min(val_loss, 700.0))
        bits_per_byte = None
        if "val_bytes" in tokenizer:
            bits_per_byte = val_loss / math.log(2) * tokenizer["val_tokens"] / tokenizer["val_bytes"]
        say(
            f"step {step}/{s.max_iters} | validation loss {val_loss:.4f} | perplexity {perplexity:.2f}"
            + (f" | {bits_per_byte:.3f} bits per byte" if bits_per_byte else "")
        )
        log(val_loss=val_loss, perplexity=perplexity, bits_per_byte=bits_per_byte)
        return val_loss

    def log(**record):
        """Append a line to metrics.jsonl; JSON has no NaN, so that is null."""
        if rank > 0 or s.eval_only or s.overfit:
            return
        record = {"step": step, **record, "seconds": time.perf_counter() - begun}
        line = json.dumps({k: v if v is None or math.isfinite(v) else None for k, v in record.items()})
        size = metrics.stat().st_size
        try:
            with metrics.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")
        except OSError as error:  # a full disk, mostly: no half line may stay
            os.truncate(metrics, size)
            print(f"error: can't write {metrics}: {error}", file=sys.stderr)
        if s.tensorboard:
            try:
                for key in record.keys() - {"step", "seconds"}:
                    if record[key] is not None:
                        board.add_scalar(key, record[key], step)
                board.flush()  # so that a crash loses nothing
            except OSError as error:
                print(f"error: can't write for TensorBoard: {error}", file=sys.stderr)

    unsaved = set()  # files whose last save failed

    def save(path):
        if rank > 0 or s.overfit:
            return
        if not all(p.isfinite().all() for p in raw_model.parameters()):
            raise UserError(f"weights are not finite at step {step}, and not saved: {ADVICE}")
        state = {
            "model": raw_model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "step": step,
            "best_val_loss": best_val_loss,
            "worse_evals": worse_evals,
            "bad_steps": int(bad_steps),
            "skipped": int(skipped),
            "seconds": time.perf_counter() - begun,
            "config": asdict(s),
            "model_args": asdict(config),
            "tokenizer": tokenizer,
        }
        try:
            save_checkpoint(path, state)
            unsaved.discard(path)
        except (OSError, RuntimeError) as error:  # torch makes some of the former into the latter
            unsaved.add(path)
            reason = str(error).splitlines()[0]
            print(f"error: can't save {path} ({reason}): training goes on, the next save tries again", file=sys.stderr)

    if s.eval_only:
        evaluate_now()
        return
    if s.overfit:
        say(
            "overfitting: every step trains on the same batch, nothing is evaluated or saved; the loss should near zero"
        )
    elif rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        out_dir_lock = lock(out_dir / "lock")  # noqa: F841 (held as long as this name is)
        cut_metrics(metrics, step)
        if s.tensorboard:  # drops there too what came after the checkpoint
            board = SummaryWriter(out_dir / "tensorboard", purge_step=step + 1)

    def picture():
        """Draw loss.png; that it can't be drawn, for whatever reason, is one line and no more."""
        if rank == 0 and s.plot and not s.overfit:
            try:
                say(f"picture: {draw_run(out_dir)}")
            except Exception as error:
                say(f"no loss.png: {' '.join(str(error).split())[:200]}")

    signals = []  # (number, time) of each SIGINT and SIGTERM

    def on_signal(number, frame):
        signals.append((number, time.monotonic()))
        if world_size == 1:
            signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        elif signals[-1][1] - signals[0][1] > 1:  # there torchrun echoes the first one
            end_by_signal(number)

    def end_by_signal(number):
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    # train
    def load(step, micro_step):
        first = (micro_step * world_size + rank) * s.batch_size
        if s.overfit:
            step = first = 0
        return training_batch(train_tokens, config, s.seed, step, first, s.batch_size)

    batches = prefetch(load, ((i, j) for i in range(step, s.max_iters) for j in range(micro_steps)))
    interval_start, interval_step, last_save = time.perf_counter(), step, time.perf_counter()
    while step < s.max_iters:
        lr = learning_rate(step, s)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            x, y = next(batches)
            if device.type == "cuda":  # from pinned memory the copy needs no wait
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if s.dropout:  # masks that depend on nothing but these four can be drawn again after a resume
                torch.manual_seed(int(np.random.SeedSequence((s.seed, step, micro_step, rank)).generate_state(1)[0]))
            last_micro_step = micro_step == micro_steps - 1
            with nullcontext() if world_size == 1 or last_micro_step else model.no_sync():  # one all-reduce a step
                with autocast:
                    micro_loss = model(x, y)[1] / micro_steps
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), s.grad_clip or math.inf)
        logging = (step + 1) % s.log_interval == 0 or step == 0
        weights_before = None
        if s.log_stats and logging and rank == 0:
            weights_before = [p.detach().clone() for p in raw_model.parameters()]
        scaler.step(optimizer)  # does nothing where the gradient is not finite
        scaler.update()
        stats = {}
        if weights_before:
            with autocast:
                stats = layer_stats(raw_model, x, weights_before)
        raw_model.zero_grad()
        bad = ~grad_norm.isfinite()  # stays on the device, so that nothing waits
        bad_steps, skipped = (bad_steps + 1) * bad, skipped + bad
        step += 1

        if logging:
            if world_size > 1:
                dist.all_reduce(loss)
            loss, grad_norm = loss.item() / world_size, grad_norm.item()  # the only wait for the device
            now = time.perf_counter()
            step_time = (now - interval_start) / (step - interval_step)
            interval_start, interval_step = now, step
            tokens_per_sec = tokens_per_step / step_time
            mfu = tokens_per_sec * flops_per_token(raw_model) / peak_flops
            left = timedelta(seconds=round((s.max_iters - step) * step_time))
            say(
                f"step {step}/{s.max_iters} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f} | "
                f"{step_time * 1000:.1f} ms/step | {tokens_per_sec:,.0f} tok/s | "
                f"MFU {'n/a' if math.isnan(mfu) else f'{mfu:.1%}'} | {left} left"
                + (f" | {int(skipped)} steps skipped" if skipped else "")
            )
            log(loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_sec=tokens_per_sec, ms_per_step=step_time * 1000,
                mfu=mfu, skipped=int(skipped),
                **{f"{k}/{layer}": v for k, column in stats.items() for layer, v in column.items()})  # fmt: skip
            if stats:
                say("".join(f"{title:>12}" for title in ("layer", *stats)))
                for layer in stats["weight"]:
                    say(f"{layer:>12}" + "".join(f"{column[layer]:12.2e}" for column in stats.values()))
            if bad_steps >= s.max_bad_steps:
                raise UserError(f"the gradient was not finite in {int(bad_steps)} steps up to step {step}: {ADVICE}")

        pause = time.perf_counter()
        stop = torch.tensor(signals[0][0] if signals else 0)
        if world_size > 1:  # one rank's signal stops all of them, at the same step
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=cpu_group)
        evaluating = (step % s.eval_interval == 0 or step == s.max_iters) and not s.overfit
        if evaluating:
            val_loss = evaluate_now()
            worse_evals += 1
            if val_loss < best_val_loss:
                best_val_loss, worse_evals = val_loss, 0
                save(best)
        if (
            evaluating
            or stop
            or (s.save_interval and step % s.save_interval == 0)
            or (pause - last_save > 60 * s.save_minutes)
        ):
            save(last)
            last_save = time.perf_counter()
        if stop:
            if not unsaved and not s.overfit:
                say(f"{signal.Signals(int(stop)).name}: stopped after step {step}; the same command goes on from there")
            picture()
            if world_size > 1:  # torchrun kills the others when one has ended, and rank 0 may still be saving
                dist.barrier(group=cpu_group)
            end_by_signal(int(stop))
        if 0 < s.patience <= worse_evals:
            say(f"stopping early: {worse_evals} evaluations without a better one")
            break
        interval_start += time.perf_counter() - pause

    if unsaved:
        raise UserError(f"{', '.join(map(str, unsaved))} could not be saved: see above")
    if s.overfit:
        say("done: where this loss is not near zero, training on more than a batch can't work either")
        return
    picture()
    say(f"done: best validation loss {best_val_loss:.4f}; let it write with python sample.py --out_dir={s.out_dir}")


if __name__ == "__main__":
    record(main)(settings)  # lets torchrun say which rank failed, and why
    if dist.is_initialized():
        dist.barrier()  # no rank leaves while another may still talk to it
        dist.destroy_process_group()
