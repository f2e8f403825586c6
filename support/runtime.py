"""Where a script runs: its device and data type, the ranks of a job, signals that stop it."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.settings import UserError, user_error

# dense bfloat16 TFLOP/s from the data sheets, by words in the device's name
PEAK = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
}


def pick_device(name: str) -> torch.device:
    """The torch.device called name; "auto" is the best available: cuda, else mps, else cpu."""
    if name == "auto":
        name = best_device()
    with user_error(f"--device={name} can't be used here", RuntimeError, AssertionError):
        device = torch.device(name)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            local_rank = int(os.environ["LOCAL_RANK"])
            n_gpus = torch.cuda.device_count()
            if 0 < n_gpus <= local_rank:
                raise UserError(
                    f"more processes than GPUs here: --nproc_per_node={n_gpus}, "
                    "or --device=cuda:0 --backend=gloo to share one"
                )
            device = torch.device("cuda", local_rank)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    return device


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def best_dtype(device: torch.device) -> str:
    """The fastest data type for matrix products on device.

    bfloat16 where the hardware multiplies it, else float16 on CUDA and float32 elsewhere.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float16"
    if device.type == "cpu" and "avx512_bf16" in cpu_features():
        return "bfloat16"
    return "float32"


def precision(dtype: str, device: torch.device) -> tuple[str, torch.autocast]:
    """(data type, context for the forward pass) for --dtype; auto is best_dtype."""
    if dtype == "auto":
        dtype = best_dtype(device)
    enabled = dtype != "float32"
    return dtype, torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=enabled)


def cpu_features() -> set[str]:
    """The instruction sets that torch can use on this CPU, such as avx512_bf16.

    None if ATEN_CPU_CAPABILITY forbids AVX-512, and none on torch 2.11, which cannot tell.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return set()
    if not hasattr(torch.cpu, "get_capabilities"):
        return set()
    capabilities = torch.cpu.get_capabilities()
    return {name for name, present in capabilities.items() if present is True}


def kind_of_gpu(device: torch.device) -> str | None:
    """Which GPU in PEAK device is, or None."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    for kind in PEAK:
        if all(word in words for word in kind.split()):
            return kind
    return None


def mfu(flops_per_sec: float, device: torch.device) -> float | None:
    """Model FLOPs utilisation: the share of device's peak. None where the peak is not known."""
    kind = kind_of_gpu(device)
    if kind is None:
        return None
    return flops_per_sec / (PEAK[kind] * 1e12)


def share(batch_size: int, gradient_accumulation_steps: int, size: int) -> tuple[int, int]:
    """(sequences per micro-batch, micro-batches per step) of each of `size` ranks.

    A step has batch_size x gradient_accumulation_steps sequences. All micro-batches are equal, and
    as large as possible up to batch_size. Raises UserError for a step that can't be shared evenly.
    """
    sequences, rest = divmod(batch_size * gradient_accumulation_steps, size)
    if rest:
        raise UserError(
            f"a step of {batch_size} x {gradient_accumulation_steps} sequences can't be shared "
            f"evenly by {size} ranks: change gradient_accumulation_steps"
        )
    micro_batch_size = min(batch_size, sequences)
    while sequences % micro_batch_size != 0:
        micro_batch_size -= 1
    return micro_batch_size, sequences // micro_batch_size


def say(line: str) -> None:
    """Print line. Where that fails, say so once on stderr: a full disk must not end training."""
    try:
        print(line, flush=True)
    except (OSError, ValueError) as error:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        with suppress(OSError, ValueError):
            print(f"error: can't print ({error}): going on silently", file=sys.stderr, flush=True)


@contextmanager
def advice() -> Iterator[None]:
    """Print advice below those of torch's errors that a user can fix."""
    try:
        yield
    except RuntimeError as error:
        hint = ""
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            hint = (
                "a smaller --batch_size with more --gradient_accumulation_steps needs less memory"
            )
        elif "timed out" in str(error).lower() or "by peer" in str(error):
            hint = "another rank has stopped or is slower than --timeout"
        if hint:
            print(f"advice: {hint}", file=sys.stderr)
        raise


class Ranks:
    """The processes of a job: this one alone, or the `size` that torchrun has started.

    This process is number `rank`, and computes on `device`.
    """

    def __init__(self, device: str = "auto", backend: str = "auto", timeout: float = 600):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.size > 1:
            if backend == "auto":
                backend = "nccl" if self.device.type == "cuda" else "gloo"
            join(backend, self.device, timedelta(seconds=timeout))
            self.cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def say(self, line: str) -> None:
        """Print line, on one rank."""
        if self.rank == 0:
            say(line)

    def run_on_first(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """make(*arguments), called on rank 0 alone; its value is sent to every rank."""
        values = [None]
        if self.rank == 0:
            values = [make(*arguments)]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.cpu_group)
        return values[0]

    def maximum(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        tensor = torch.tensor(values)
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.cpu_group)
        return tensor.tolist()

    def any(self, value: bool) -> bool:
        """Whether value is true on any rank."""
        return self.maximum(int(value)) == [1]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """tensor, summed in place over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self) -> None:
        """Wait for the other ranks, then leave the job.

        torchrun ends all ranks as soon as one has ended, and rank 0 may be saving.
        """
        if self.size > 1:
            dist.barrier(group=self.cpu_group)
            dist.destroy_process_group()


class StopSignals:
    """Notes the first SIGINT, SIGTERM or SIGHUP in `received`, which is 0 before, until `restore`.

    A second signal ends the process at once. Under nohup, SIGHUP stays ignored.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.received = 0
        self.time = 0.0
        self.previous = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if not hasattr(signal, name):  # Windows has no SIGHUP
                continue
            number = getattr(signal, name)
            # torchrun reacts to SIGHUP even under nohup, and passes it on as it ends.
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not ignored or "TORCHELASTIC_RUN_ID" in os.environ:
                self.previous[number] = signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        if self.received:
            if self.ranks.size > 1 and time.monotonic() - self.time < 1:
                return  # torchrun's echo of the first signal
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.received = number
        self.time = time.monotonic()
        if self.ranks.size == 1:
            signal.signal(number, signal.SIG_DFL)  # ends the process even inside a long kernel
        if self.ranks.rank == 0:
            with suppress(OSError):  # os.write, as print itself may be what is interrupted
                os.write(2, b"stopping after this step; again to quit without saving\n")

    def agreed(self) -> int:
        """The number of a signal that any rank has received, or 0. All ranks call this together."""
        return self.ranks.maximum(self.received)[0]

    def restore(self) -> None:
        """Hand the signals back to whoever handled them before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def join(backend: str, device: torch.device, timeout: timedelta) -> None:
    """dist.init_process_group, also where torchrun starts the job again after a failure.

    The store in which ranks find each other outlives the failure, with the addresses of dead
    processes (PyTorch issue 135712). So the ranks first agree on a name for this attempt: the
    random words of all ranks, once each rank has seen the same.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set(f"word/{rank}", os.urandom(8).hex())
    attempt = b""
    while not attempt or any(store.get(f"seen/{r}") != attempt for r in range(size)):
        time.sleep(0.02)
        attempt = b"".join(store.get(f"word/{r}") for r in range(size))
        store.set(f"seen/{rank}", attempt.decode())
    store = dist.PrefixStore(attempt.decode(), store)
    device_id = None
    if device.type == "cuda" and backend == "nccl":
        device_id = device  # so that NCCL starts at once
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id
    )


def settle_buckets(network: DistributedDataParallel, batch: tuple, autocast: Any) -> None:
    """Take a step after which DDP no longer changes its buckets of gradients.

    After its first backward pass DDP sorts the gradients into new buckets, by the order in which
    they came. With three ranks or more, the buckets decide in which order a gradient's parts are
    added. Without this step, the first one after a resume would round differently.
    """
    with autocast:
        loss = network(*batch)[1]
    loss.backward()
    network.zero_grad()


def compile_now(
    network: Callable, model: torch.nn.Module, batch: tuple, autocast: Any, ranks: Ranks
) -> None:
    """Compile network, which is model compiled and maybe in DDP, by one step on batch.

    If that fails on any rank, all run uncompiled from now on. A mistake in the model itself is
    raised as it is without torch.compile.
    """
    ranks.say("compiling: about 20 seconds, which --compile=False saves")

    def step(network):
        with autocast:
            loss = network(*batch)[1]
        loss.backward()

    failure = ""
    no_sync = network.no_sync() if ranks.size > 1 else nullcontext()
    with no_sync:
        try:
            step(network)
        except Exception as error:  # as many kinds as there are compilers
            step(model)
            failure = type(error).__name__
    model.zero_grad()
    if ranks.any(failure != ""):
        torch.compiler.set_stance("force_eager")
        reason = failure if failure else "an error on another rank"
        ranks.say(f"not compiling: {reason} in torch.compile; --compile=False is faster")
