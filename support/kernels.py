"""Which kernels compute a model: torch's own on a GPU, and on a CPU faster forms of three of its functions."""

import ctypes
import math
import os
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
import torch.nn.functional as F
from torch.autograd import Function

A, B = math.sqrt(8 / math.pi), 0.044715  # GELU's tanh form is x sigmoid(A (x + B x^3))


class OneDNNLinear(Function):
    """F.linear in float32 by oneDNN; torch takes MKL, which on AMD's CPUs does not use AVX-512."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (need_x, need_weight, need_bias) = ctx.saved_tensors, ctx.needs_input_grad
        grad_x = product(grad, weight.mT) if need_x else None
        x, grad = (t.reshape(-1, t.size(-1)).mT for t in (x, grad))
        wide = len(x) < len(grad)  # oneDNN likes the smaller one first
        grad_weight = (product(x, grad).mT if wide else product(grad, x)) if need_weight else None
        return grad_x, grad_weight, grad.sum(1) if need_bias else None


class SigmoidGELU(Function):
    """GELU's tanh form by a sigmoid, which is faster than torch's tanh."""

    @staticmethod
    def forward(ctx, x):
        s = torch.addcmul(x.new_tensor(A), x, x, value=A * B).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, grad):
        x, s = ctx.saved_tensors  # the slope is s + x A (1 + 3 B x^2) s (1 - s)
        inner = torch.addcmul(x.new_tensor(A), x, x, value=3 * A * B).mul_(x)
        return torch.ops.aten.sigmoid_backward(inner, s).add_(s).mul_(grad)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, (..., n_in) -> (..., n_out), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x, weight, bias=None):
    amd = "AMD" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")  # torch 2.11 does not tell
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    fits = x.shape[-1:] == weight.shape[1:]  # else torch says it better
    return OneDNNLinear.apply(x, weight, bias) if amd and plain and fits else TORCHS["linear"](x, weight, bias)


def gelu(x, approximate="none"):
    plain = x.dtype == torch.float32 and approximate == "tanh"
    return SigmoidGELU.apply(x) if plain else TORCHS["gelu"](x, approximate=approximate)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """In 16 bits the formula: there the fused kernel takes two to four times as long."""
    T, D = q.shape[-2:]
    if not is_causal or options or q.dtype == torch.float32 or T > 1024:  # or the T x T scores would be too many
        return TORCHS["scaled_dot_product_attention"](q, k, v, attn_mask, dropout_p, is_causal, **options)
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    weights = ((q / math.sqrt(D)) @ k.mT + future).softmax(-1)
    return F.dropout(weights, dropout_p) @ v


FASTER = {"linear": linear, "gelu": gelu, "scaled_dot_product_attention": attention}
TORCHS = {name: getattr(F, name) for name in FASTER}


class CPUKernels:
    """Inside, models call these functions in place of those of torch.nn.functional."""

    def __enter__(self):
        vars(F).update(FASTER)

    def __exit__(self, *error):
        vars(F).update(TORCHS)


def choose_kernels(device: torch.device, compiled: bool = False, deterministic: bool = False) -> AbstractContextManager:
    """Let torch use the fastest kernels there are, or those that always give the same bits.

    Returns a context in which to run a model, forward and backward.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch._inductor.config.deterministic = True
    elif device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    with suppress(AttributeError, TypeError, OSError):  # only glibc: without this the system gets back what a step
        mallopt = ctypes.CDLL(None).mallopt  # frees, and clears it for the next one
        mallopt(-3, 1 << 30) and mallopt(-1, (1 << 31) - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    return CPUKernels() if device.type == "cpu" and not compiled else nullcontext()
