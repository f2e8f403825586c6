"""Decoding as fast as the hardware allows: weights packed for a CPU, a step compiled for a GPU."""

import copy
import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import KVCache, MiniGPT


class PackedWeight(torch.Tensor):
    """A weight whose F.linear, without a bias, is its own `product`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return args[1].product(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def fast_product(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function x -> x W^T + bias, fastest on a CPU for x of `rows` rows. weight: (n_out, n_in)."""
    n_out, n_in = weight.shape
    if rows == 1 and weight.dtype == torch.float32:
        # F.linear reads them with one core only; as a batch of products with a part of the weights each, all do
        n_parts = math.gcd(n_out, 16)
        parts = weight.view(n_parts, -1, n_in)

        def product(x):
            if x.shape != (1, 1, n_in):  # a prompt
                return F.linear(x, weight, bias)
            y = torch.bmm(parts, x.as_strided((n_parts, n_in, 1), (0, 1, n_in))).view(1, 1, n_out)
            return y if bias is None else y + bias

        return product
    try:  # oneDNN reorders weights to suit its kernels: F.linear has it done again for each token
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except (AttributeError, RuntimeError):  # a build or CPU without it
        return lambda x: F.linear(x, weight, bias)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


readers = WeakKeyDictionary()  # model: (what it was packed for, its fast copy)


def reader(model: MiniGPT, rows: int) -> MiniGPT:
    """The model, or on a CPU a copy with the same weights that reads one more token of `rows` texts faster.

    The copy is kept until the weights change; the model itself stays as it is, and trainable.
    """
    if model.wte.weight.device.type != "cpu" or model.training:
        return model
    tensors = [*model.parameters(), *model.buffers()]
    state = rows, [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
    if readers.get(model, (None,))[0] != state:
        fast = copy.deepcopy(model, {id(t): t for t in tensors})
        for module in fast.modules():
            call = type(module).forward  # without the layers of torch's __call__, which take a tenth of the time
            if type(module) is nn.Linear:
                call = staticmethod(fast_product(module.weight.detach(), module.bias, rows))
            elif type(module) is nn.Dropout:
                call = staticmethod(lambda x: x)
            if not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)):
                module.__class__ = type(f"Fast{type(module).__name__}", (type(module),), {"__call__": call})
            vars(module).update(module._modules)  # found without torch's slow __getattr__
        weight = fast.wte.weight.detach()
        fast.wte._parameters["weight"] = weight.as_subclass(PackedWeight)
        fast.wte.weight.product = fast_product(weight, None, rows)
        readers[model] = state, fast
    return readers[model][1]


class StaticKVCache(KVCache):
    """The same keys and values for one token at a time, in shapes that never change, as CUDA graphs need. A token looks
    at the whole buffer, and a mask hides what is not filled yet."""

    def __init__(self, cache: KVCache):
        self.keys, self.values, self.size, self.length = cache.keys, cache.values, cache.size, 0
        self.positions = torch.zeros(1, dtype=torch.long, device=cache.keys[0].device)  # of the token to read
        for tensor in (*self.keys, *self.values, self.positions):
            torch._dynamo.mark_static_address(tensor, guard=False)

    def advance(self, T):
        return self.positions

    def append(self, layer, k, v):
        self.keys[layer].index_copy_(2, self.positions, k)
        self.values[layer].index_copy_(2, self.positions, v)
        mask = torch.arange(self.size, device=k.device) <= self.positions[:, None]
        return self.keys[layer], self.values[layer], mask


class CompiledReader:
    """Calls a model, and for one token its compiled step, by default a CUDA graph where there is CUDA."""

    def __init__(self, model: MiniGPT, **options):
        self.model, self.caches = model, WeakKeyDictionary()
        self.step = torch.compile(model.forward, fullgraph=True, **(options or {"mode": "reduce-overhead"}))

    def __call__(self, idx: torch.Tensor, cache: KVCache):
        if idx.size(1) > 1:
            return self.model(idx, cache=cache)
        static = self.caches.get(cache) or self.caches.setdefault(cache, StaticKVCache(cache))
        static.positions.fill_(cache.length)
        cache.length += 1
        return self.step(idx.clone(), cache=static)
