"""forks/gqa.patch against attention with as many heads of keys and values as of queries, the shared ones repeated."""

import pytest
import torch

from model import CausalSelfAttention, GPTConfig, KVCache, MiniGPT
from train import Settings, make_optimizer

SIZES = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32}


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_it_equals_multi_head_attention_with_repeated_heads(n_kv_head):
    torch.manual_seed(0)
    grouped, full = (CausalSelfAttention(GPTConfig(**SIZES, n_kv_head=n)) for n in (n_kv_head, 4))
    weights = grouped.state_dict()
    for name in ("c_kv.weight", "c_kv.bias"):
        heads = weights[name].view(2, n_kv_head, 8, -1)
        weights[name] = heads.repeat_interleave(4 // n_kv_head, dim=1).reshape(
            full.state_dict()[name].shape
        )
    full.load_state_dict(weights)
    x = torch.randn(3, 16, 32)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-5, rtol=0)
    # and the formula, head by head: query head i looks at head i // (n_head / n_kv_head)
    q, (k, v) = (
        grouped.c_q(x).view(3, 16, 4, 8),
        grouped.c_kv(x).view(3, 16, 2, n_kv_head, 8).unbind(2),
    )
    future, heads = torch.ones(16, 16, dtype=torch.bool).triu(1), []
    for i in range(4):
        j = i // (4 // n_kv_head)
        scores = (q[:, :, i] @ k[:, :, j].mT / 8**0.5).masked_fill(future, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, :, j])
    torch.testing.assert_close(
        grouped(x), grouped.c_proj(torch.cat(heads, dim=-1)), atol=1e-5, rtol=0
    )


def test_the_cache_shrinks_with_the_heads_and_so_do_the_weights():
    configs = [GPTConfig(**SIZES, n_kv_head=n) for n in (0, 4, 1)]
    sizes = [KVCache(config, 2).keys[0].numel() for config in configs]
    assert sizes[0] == sizes[1] == 4 * sizes[2]
    n_params = [sum(p.numel() for p in MiniGPT(config).parameters()) for config in configs]
    assert n_params[0] - n_params[2] == 2 * 2 * (3 * 8) * (
        32 + 1
    )  # layers, K and V, rows that went, columns and bias


def test_muon_makes_keys_and_values_orthogonal_each_by_itself():
    model = MiniGPT(GPTConfig(**SIZES, n_kv_head=1))
    groups = make_optimizer(model, Settings(optimizer="muon")).param_groups
    splits = {id(p): group["splits"] for group in groups for p in group["params"]}
    assert (
        splits[id(model.h[0].attn.c_kv.weight)] == 2 and splits[id(model.h[0].attn.c_q.weight)] == 1
    )


@pytest.mark.parametrize("n_kv_head", [3, 8])
def test_heads_that_can_not_be_grouped_are_refused(n_kv_head):
    with pytest.raises(
        ValueError, match=f"n_head .4. must be divisible by n_kv_head .{n_kv_head}."
    ):
        GPTConfig(**SIZES, n_kv_head=n_kv_head)
