"""How a machine computes fastest: kernels, precision and memory, chosen once before training."""

import ctypes
import os
from contextlib import suppress

import torch

# The attention formula, written out, keeps all scores. On a CPU in 16 bits it is the fastest up
# to this many numbers per layer: 64 MB.
MOST_SCORES = 2**25


def make_deterministic() -> None:
    """Choose kernels that give bitwise the same results in every run.

    Call it before the ranks meet: as NCCL starts, it decides how sums over GPUs are computed.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def choose_kernels(device: torch.device, dtype: str, n_scores: int) -> None:
    """Choose the fastest kernels for training.

    n_scores: numbers in a layer's attention matrices, B H T T.
    """
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "cpu":
        keep_freed_memory()
        # These switches are named after CUDA, but scaled_dot_product_attention obeys them on a
        # CPU too. Its fused kernel for CPUs is slow in 16 bits, so the formula is computed instead.
        formula = dtype != "float32" and n_scores <= MOST_SCORES
        torch.backends.cuda.enable_flash_sdp(not formula)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(formula)


def keep_freed_memory() -> None:
    """Let glibc keep up to 2 GB of freed memory, instead of returning it to the system.

    The system clears each page that it hands out again, at every step. Keeping the pages saves
    about a fifth of a step in bfloat16 and a tenth in float32. Without glibc nothing happens.
    """
    M_TRIM_THRESHOLD = -1  # from malloc.h
    M_MMAP_THRESHOLD = -3
    with suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)  # for glibc before 2.35, which ignores the next line
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
