"""forks/rotary.patch against transformers' rotary positions of Llama."""

import pytest
import torch

import sample
from model import CausalSelfAttention, GPTConfig, KVCache, MiniGPT, rotate


def small(**changes):
    torch.manual_seed(0)
    sizes = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32} | changes
    model = MiniGPT(GPTConfig(**sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def turned_as_llama_does(q, k, positions):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    return llama.apply_rotary_pos_emb(q, k, *llama.LlamaRotaryEmbedding(config)(q, positions[None]))


@pytest.mark.parametrize("start", [0, 5, 1000])
def test_queries_and_keys_are_turned_as_llamas(start):
    q, k, positions = (
        torch.randn(2, 4, 9, 16),
        torch.randn(2, 4, 9, 16),
        torch.arange(start, start + 9),
    )
    expected, atol = (
        turned_as_llama_does(q, k, positions),
        1e-3 if start else 1e-5,
    )  # float32 angles near 1000
    torch.testing.assert_close(
        (rotate(q, positions), rotate(k, positions)), expected, atol=atol, rtol=0
    )


def test_attention_turns_queries_and_keys_and_not_values():
    attention, x = CausalSelfAttention(GPTConfig(16, 65, 2, 4, 64)), torch.randn(2, 9, 64)
    q, k, v = attention.c_attn(x).view(2, 9, 3, 4, 16).permute(2, 0, 3, 1, 4)
    q, k = turned_as_llama_does(q * 10, k, torch.arange(9))  # larger, so that the scores matter
    attention.c_attn.weight.data[:64] *= 10
    attention.c_attn.bias.data[:64] *= 10
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = attention.c_proj(y.transpose(1, 2).reshape(2, 9, 64))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=0)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    scores = [
        rotate(q, torch.tensor([n + 7])) @ rotate(k, torch.tensor([n])).mT for n in (0, 3, 500)
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(scores[0], scores[2], atol=1e-3, rtol=0)
    farther = rotate(q, torch.tensor([8])) @ rotate(k, torch.tensor([0])).mT
    assert not torch.allclose(scores[0], farther, atol=1e-3)


def test_no_position_has_a_parameter_and_the_order_of_tokens_still_matters():
    model = small()
    assert not any("wpe" in name for name in model.state_dict())
    idx = torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(
        model(idx)[0][0, -1], model(idx[:, [1, 0, 2, 3]])[0][0, -1], atol=1e-3
    )


def test_a_longer_cache_reads_past_block_size():
    """The weights are the same for any block_size, so a longer model is the oracle."""
    model, longer = small(), small(block_size=48)
    longer.load_state_dict(model.state_dict())
    idx, cache = torch.randint(65, (2, 48)), KVCache(model.config, 2, size=48)
    for end, chunk in enumerate(idx.split([20] + [1] * 28, dim=1), start=20):
        logits = model(chunk, cache=cache)[0]
        torch.testing.assert_close(logits, longer(idx[:, :end])[0][:, -1:], atol=1e-4, rtol=0)


def test_a_compiled_step_writes_the_same():
    """StaticKVCache hands its positions over in a buffer."""
    from support.fast import CompiledDecoder

    model, idx = small(), torch.randint(65, (1, 5))
    compiled = CompiledDecoder(model, backend="eager")
    assert torch.equal(
        sample.generate(compiled, idx, 30, temperature=0),
        sample.generate(model, idx, 30, temperature=0),
    )
