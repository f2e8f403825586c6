"""How a model decodes as fast as the hardware lets it: weights packed for a CPU, a step compiled for a GPU."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from model import KVCache, MiniGPT


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function x -> F.linear(x, weight, bias), fastest on a CPU for x of `rows` rows. In bench.py's decoding of
    GPT-2 it was worth 2.1 times the speed in float32, 1.4 in bfloat16, 2.4 with 16 rows in float32."""
    if rows == 1 and weight.dtype == torch.float32:
        # F.linear reads them with one core only; as a batch of products with a part of the weights each, all do
        parts = weight.view(math.gcd(weight.size(0), 16), -1, weight.size(1))

        def product(x):
            if x.numel() > weight.size(1):  # a prompt
                return F.linear(x, weight, bias)
            y = torch.bmm(parts, x.view(1, -1).t().expand(len(parts), -1, -1)).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias

        return product
    try:  # oneDNN reorders weights to suit its kernels: F.linear has it done again for each token
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except (AttributeError, RuntimeError):  # a build or CPU without it
        return partial(F.linear, weight=weight, bias=bias)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@torch.inference_mode()
def pack(model: MiniGPT, rows: int) -> MiniGPT:
    """Make a model on the CPU fast at reading one more token of `rows` texts. It can't be trained any more."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = packed_linear(module.weight, module.bias, rows)
    head, vocab_size = packed_linear(model.wte.weight, None, rows), model.config.vocab_size
    model.head = lambda x: head(x)[..., :vocab_size]
    return model


def compile_step(model: MiniGPT, **options) -> MiniGPT:
    """Compile how a model reads one more token, by default to a CUDA graph where there is CUDA."""
    model.compiled = torch.compile(model.forward, fullgraph=True, **(options or {"mode": "reduce-overhead"}))
    return model


class StaticKVCache(KVCache):
    """The same keys and values for one token at a time, in shapes that never change: what torch.compile can turn into
    one CUDA graph. A token looks at the whole buffer, and a mask hides what is not filled yet."""

    def __init__(self, cache):
        self.keys, self.values, self.size, self.length = cache.keys, cache.values, cache.size, 0
        self.positions = torch.zeros(1, dtype=torch.long, device=cache.keys.device)  # of the token to read

    def advance(self, T):
        return self.positions

    def append(self, layer, k, v):
        self.keys[layer].index_copy_(2, self.positions, k)
        self.values[layer].index_copy_(2, self.positions, v)
        mask = torch.arange(self.size, device=k.device) <= self.positions[:, None]
        return self.keys[layer], self.values[layer], mask
