"""Where a script runs: its device and number type, the ranks of the job, and the signals that stop it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from model import MiniGPT
from support.settings import UserError, user_error

# dense bfloat16 TFLOP/s by the makers' data sheets, by the first words that are in the device's name
PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}

CHIP = getattr(torch.cpu, "get_capabilities", dict)()  # the CPU's name and instructions; torch 2.11 does not tell
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # False also where ATEN_CPU_CAPABILITY forbids it


def pick_device(name: str) -> torch.device:
    """The torch.device called name; "auto" is a GPU if there is one: cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with user_error(f"--device={name} can't be used here", RuntimeError, AssertionError):  # unknown, or not there
        device = torch.device(name)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each rank
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    return device


def best_dtype(device: torch.device) -> str:
    """bfloat16 where the device has matrix instructions for it, else float16 on CUDA and float32 elsewhere."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if device.type == "cpu" and AVX512 and CHIP.get("avx512_bf16") else "float32"


def flops_per_token(model: MiniGPT) -> int:
    """Floating-point operations to train on one token (Chowdhery et al. 2022, appendix B): a weight is a multiply-add
    forward and two backward, and so is each of the T C products in both of a layer's attention matrices."""
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")  # that is looked up
    return 6 * weights + 12 * model.config.n_layer * model.config.n_embd * model.config.block_size


@contextmanager
def advice() -> Iterator[None]:
    """Add a note to those of torch's errors that a user can put right."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            error.add_note("advice: a smaller --batch_size with more --gradient_accumulation_steps needs less memory")
        elif "imed out" in str(error) or "by peer" in str(error):
            error.add_note("advice: another rank has stopped or is slower than --timeout")
        raise


class Ranks:
    """The processes of a job: this one alone, or `size` that torchrun started, of which it is number `rank`."""

    def __init__(self, device: str = "auto", backend: str = "auto", timeout: float = 600):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.signal = pick_device(device), 0
        if self.size > 1:
            backend = backend.replace("auto", "nccl" if self.device.type == "cuda" else "gloo")
            join(backend, self.device, timedelta(seconds=timeout))
            self.cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def say(self, line: str) -> None:
        """Print line, on one rank."""
        if self.rank == 0:
            print(line, flush=True)

    def share(self, batch_size: int, gradient_accumulation_steps: int) -> tuple[int, int]:
        """(sequences per micro-batch, micro-batches per step) of each rank: equal ones, the largest that fit.

        A step has batch_size x gradient_accumulation_steps sequences, a micro-batch at most batch_size of them.
        Raises UserError for a step that can't be shared evenly.
        """
        sequences, rest = divmod(batch_size * gradient_accumulation_steps, self.size)
        if rest:
            step = f"a step of {batch_size} x {gradient_accumulation_steps} sequences"
            raise UserError(f"{step} can't be shared evenly by {self.size} ranks: change gradient_accumulation_steps")
        rows = next(n for n in range(min(batch_size, sequences), 0, -1) if sequences % n == 0)
        return rows, sequences // rows

    def from_first(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """make(*arguments), called on rank 0 alone and handed to every rank."""
        values = [make(*arguments) if self.rank == 0 else None]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.cpu_group)
        return values[0]

    def mfu(self, model: MiniGPT, tokens_per_sec: float) -> float | None:
        """The share of the devices' peak that training uses; None where the peak is not known."""
        name = torch.cuda.get_device_name(self.device).replace("-", " ") if self.device.type == "cuda" else ""
        peak = next((tflops for key, tflops in PEAK.items() if f" {key} " in f" {name} "), None)
        return tokens_per_sec * flops_per_token(model) / (1e12 * peak * self.size) if peak else None

    def maximum(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.cpu_group)
        return tensor.tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """tensor, summed in place over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def catch_signals(self) -> None:
        """From now on note SIGINT and SIGTERM in `signal`, so that the step can be finished; a second ends at once."""

        def note(number, frame):
            if not self.signal:
                self.signal, self.signal_time = number, time.monotonic()
            if self.size > 1 and time.monotonic() - self.signal_time < 1:
                return  # the first one, or torchrun's echo of it
            signal.signal(number, signal.SIG_DFL)
            if self.size > 1:
                signal.raise_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)

    def leave(self, by_signal: int = 0) -> None:
        """Wait for the others: torchrun ends them when one has ended, and rank 0 may be saving. Then leave the job."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)
            dist.destroy_process_group()
        if by_signal:
            signal.signal(by_signal, signal.SIG_DFL)
            signal.raise_signal(by_signal)


def join(backend: str, device: torch.device, timeout: timedelta) -> None:
    """dist.init_process_group, also where torchrun starts the job again after a failure.

    The store in which ranks find each other outlives the failure, with the addresses of dead processes (PyTorch issue
    135712). So the ranks first agree on a name for this attempt: all their random words, once each has seen the same.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set(f"word/{rank}", os.urandom(8).hex())
    attempt = None
    while attempt is None or any(store.get(f"seen/{r}") != attempt for r in range(size)):
        time.sleep(0.02 if attempt else 0)
        attempt = b"".join(store.get(f"word/{r}") for r in range(size))
        store.set(f"seen/{rank}", attempt.decode())
    store = dist.PrefixStore(attempt.decode(), store)
    device_id = device if device.type == "cuda" and backend == "nccl" else None  # so that NCCL starts at once
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)


def compile_now(network: Callable, model: MiniGPT, batch: tuple, autocast: torch.autocast, ranks: Ranks) -> None:
    """Compile network, model compiled and maybe in DDP, by a step on batch. If that fails, it runs uncompiled.

    A mistake in the model itself is raised as it is without torch.compile.
    """
    ranks.say("compiling: some 20 seconds, which --compile=False saves")

    def step(network):
        with autocast:
            loss = network(*batch)[1]
        loss.backward()

    failure = None
    with network.no_sync() if ranks.size > 1 else nullcontext():
        try:
            step(network)
        except Exception as error:  # as many kinds as there are compilers
            step(model)
            failure = type(error).__name__
    model.zero_grad()
    if any(ranks.maximum(failure is not None)):
        torch.compiler.set_stance("force_eager")
        ranks.say(f"not compiling: {failure or 'an error on another rank'} in torch.compile; --compile=False is faster")
