"""Which kernels compute a model: torch's own on a GPU, faster versions of two functions on a CPU."""

import ctypes
import math
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.autograd.function import Function, once_differentiable

TORCHS_GELU, TORCHS_ATTENTION = F.gelu, F.scaled_dot_product_attention
A, B = math.sqrt(8 / math.pi), 0.044715  # GELU's tanh form is x sigmoid(A (x + B x^3))


class SigmoidGELU(Function):
    """GELU's tanh form in float32, computed by a sigmoid, which is faster than torch's tanh."""

    @staticmethod
    def forward(ctx, x):
        s = torch.addcmul(x.new_tensor(A), x, x, value=A * B).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, s = ctx.saved_tensors  # the slope is s + x A (1 + 3 B x^2) s (1 - s)
        inner = torch.addcmul(x.new_tensor(A), x, x, value=3 * A * B).mul_(x)
        return torch.ops.aten.sigmoid_backward(inner, s).add_(s).mul_(grad)


def gelu(input, approximate="none"):
    plain = input.dtype == torch.float32 and approximate == "tanh"
    return SigmoidGELU.apply(input) if plain else TORCHS_GELU(input, approximate=approximate)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """Causal attention in 16 bits by its formula: torch's fused kernel takes several times as long there."""
    T, D = query.shape[-2:]
    plain = is_causal and attn_mask is None and not options and key.shape == query.shape
    if not plain or query.element_size() > 2 or query[..., 0].numel() * T > 1 << 25:  # 64 MB of scores per layer
        return TORCHS_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    future = torch.full((T, T), -math.inf, dtype=query.dtype).triu(1)
    weights = ((query / math.sqrt(D)) @ key.mT + future).softmax(-1)
    return F.dropout(weights, dropout_p) @ value


def choose_kernels(device: torch.device, compiled: bool = False, deterministic: bool = False) -> AbstractContextManager:
    """A context in which to run a model, forward and backward: with the fastest kernels, or if deterministic with
    those that always give the same bits."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch._inductor.config.deterministic = True
    elif device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type != "cpu":
        return nullcontext()
    # glibc returns freed memory to the system, which clears it again for the next step: keep up to 2 GB
    with suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25), mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD; glibc before 2.35 refuses more than 32 MB
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    return nullcontext() if compiled else patch.multiple(F, gelu=gelu, scaled_dot_product_attention=attention)
