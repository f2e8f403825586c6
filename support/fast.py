"""Faster text generation: packed weights for a CPU, a compiled decoding step for a GPU.

generate(pack(model), idx, 500)             on a CPU
generate(CompiledDecoder(model), idx, 500)  on a GPU
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import KVCache, MiniGPT


class PackedLinear(nn.Module):
    """An nn.Linear for inference on a CPU, its weight laid out for an input of `rows` rows.

    F.linear rearranges the whole weight for oneDNN's kernels on every call, which for a single
    token takes longer than the product. Here it is done once. Input of any other size works too.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.weight = linear.weight.detach()  # (out, in)
        self.bias = linear.bias
        # There is no public interface for these two calls. Without them, or on a CPU that oneDNN
        # does not support in this data type, forward computes F.linear.
        try:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        except (AttributeError, RuntimeError):
            self.packed = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module, rows: int = 1) -> nn.Module:
    """A copy of model with a PackedLinear for each nn.Linear, to generate `rows` texts at a time.

    It is for inference on a CPU and does not follow later changes of model.
    """
    packed = copy.deepcopy(model)
    for module in list(packed.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child, rows))
    return packed.eval()


class StaticKVCache(nn.Module):
    """A KVCache for one token at a time whose tensors never change shape or place.

    CUDA graphs need that. A token attends to the whole buffer, and a mask hides what is not filled.
    """

    def __init__(self, cache: KVCache, size: int):
        super().__init__()
        self.size = size
        self.register_buffer("positions", cache.positions.new_zeros(1))
        for layer, keys in enumerate(cache.keys):
            rows, n_head, _, width = keys.shape
            self.register_buffer(f"keys_{layer}", keys.new_zeros(rows, n_head, size, width))
            self.register_buffer(f"values_{layer}", keys.new_zeros(rows, n_head, size, width))

    def copy_from(self, cache: KVCache) -> None:
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            self.get_buffer(f"keys_{layer}")[:, :, : cache.size] = keys
            self.get_buffer(f"values_{layer}")[:, :, : cache.size] = values

    def advance(self, T: int) -> torch.Tensor:
        return self.positions  # T is 1, and CompiledDecoder has set the position

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        keys = getattr(self, f"keys_{layer}")
        values = getattr(self, f"values_{layer}")
        keys.index_copy_(2, self.positions, k)
        values.index_copy_(2, self.positions, v)
        mask = torch.arange(self.size, device=k.device) <= self.positions[:, None]
        return keys, values, mask


class CompiledDecoder(nn.Module):
    """A model for generating text: prompts as they are, single tokens by a compiled step.

    With CUDA the step is a CUDA graph. There is one static cache for each number of rows and power
    of two of the length, so the number of graphs is bounded.
    """

    def __init__(self, model: MiniGPT, **compile_options):
        super().__init__()
        self.model = model
        self.config = model.config
        if not compile_options:
            compile_options = {"mode": "reduce-overhead"}
        # a compilation for each static cache, where otherwise more than 8 are an error
        torch._dynamo.config.recompile_limit = 64
        self.step = torch.compile(model.forward, fullgraph=True, dynamic=False, **compile_options)
        self.static_caches = nn.ModuleDict()
        self.current = None  # the cache whose prompt the static cache holds

    def forward(self, idx: torch.Tensor, cache: KVCache):
        static = self.static_cache(cache)
        if idx.size(1) > 1:
            logits, _ = self.model(idx, cache=cache)
            static.copy_from(cache)
            self.current = cache
            return logits, None
        if cache.length == 0:
            self.current = cache  # a prompt of one token needs no copy
        if self.current is not cache:
            raise ValueError("a CompiledDecoder generates one batch of texts at a time")
        static.positions.copy_(cache.advance(1))
        return self.step(idx.clone(), cache=static)

    def static_cache(self, cache: KVCache) -> StaticKVCache:
        rows = cache.keys[0].size(0)
        size = min(self.config.block_size, 2 ** math.ceil(math.log2(cache.size)))
        key = f"{rows} x {size}"
        if key not in self.static_caches:
            self.static_caches[key] = StaticKVCache(cache, size)
        return self.static_caches[key]
