import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from model import CausalSelfAttention, GPTConfig, KVCache


def random_ids(batch_size=2, vocab_size=65):
    return torch.randint(vocab_size, (batch_size, 16))


def test_attention_is_softmax_of_scaled_scores_with_a_causal_mask():
    torch.manual_seed(0)
    attention = CausalSelfAttention(GPTConfig(n_head=4, n_embd=32))
    x = torch.randn(2, 10, 32)
    Q, K, V = F.linear(x, attention.c_attn.weight, attention.c_attn.bias).split(32, dim=-1)
    heads = []
    for h in range(4):
        q, k, v = (t[..., 8 * h : 8 * (h + 1)] for t in (Q, K, V))
        scores = q @ k.transpose(1, 2) / math.sqrt(8)
        for i in range(10):
            scores[:, i, i + 1 :] = -math.inf
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ v)
    expected = F.linear(torch.cat(heads, -1), attention.c_proj.weight, attention.c_proj.bias)
    torch.testing.assert_close(attention(x), expected)


def test_attention_equals_pytorchs_own_multi_head_layer():
    torch.manual_seed(0)
    attention = CausalSelfAttention(GPTConfig(n_head=4, n_embd=32))
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    weights = {
        "in_proj_weight": attention.c_attn.weight,
        "in_proj_bias": attention.c_attn.bias,
        "out_proj.weight": attention.c_proj.weight,
        "out_proj.bias": attention.c_proj.bias,
    }
    theirs.load_state_dict(weights)
    x = torch.randn(2, 10, 32)
    future = torch.ones(10, 10, dtype=torch.bool).triu(1)
    torch.testing.assert_close(attention(x), theirs(x, x, x, attn_mask=future)[0])


@pytest.mark.parametrize("vocab_size", [65, 128])
def test_logits_equal_transformers_gpt2_with_the_same_weights(vocab_size):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": vocab_size, "n_layer": 3, "n_head": 4, "n_embd": 32}
    model = tiny_model(std=0.1, **sizes)  # also what begins as zero or one
    config = transformers.GPT2Config(n_positions=16, **sizes)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    weights = {}
    for name, weight in model.state_dict().items():
        if name in ("wte.weight", "lm_head.weight"):
            weight = weight[:vocab_size]
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.t()  # transformers keeps these transposed
        if name != "lm_head.weight":
            name = f"transformer.{name}"
        weights[name] = weight
    theirs.load_state_dict(weights)
    idx = random_ids()
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
    loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), idx.flatten())
    torch.testing.assert_close(model(idx, idx)[1], loss)


def test_the_future_does_not_change_the_past():
    model = tiny_model()
    idx = random_ids()
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 65
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


@pytest.mark.parametrize("batch_size, chunks", [(1, [16]), (3, [1] * 16), (3, [7, 1, 1, 1, 6])])
def test_cached_logits_equal_uncached(chunks, batch_size):
    model = tiny_model()
    idx = random_ids(batch_size)
    cache = KVCache(model.config, batch_size)
    expected = model(idx)[0]
    end = 0
    for chunk in idx.split(chunks, dim=1):
        end += chunk.size(1)
        logits = model(chunk, cache=cache)[0]
        torch.testing.assert_close(logits, expected[:, end - 1 : end], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="17 tokens exceed the size of the cache"):
        model(idx[:, :1], cache=cache)


def test_the_padding_of_the_vocabulary_is_never_seen():
    model = tiny_model()
    idx = random_ids()
    assert model.wte.weight.shape == (128, 32)
    logits, loss = model(idx)[0], model(idx, idx)[1]
    assert logits.shape == (2, 16, 65)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    loss.backward()
    assert model.wte.weight.grad[:65].abs().sum() > 0
    assert model.wte.weight.grad[65:].abs().sum() == 0


def test_logits_beside_a_loss_are_those_without_and_have_no_gradient():
    model = tiny_model()
    idx = random_ids()
    logits, _ = model(idx, idx)
    torch.testing.assert_close(logits, model(idx)[0])
    assert not logits.requires_grad


def test_targets_of_minus_100_are_ignored():
    model = tiny_model()
    idx, targets = random_ids(), random_ids()
    targets[:, ::2] = -100
    logits, loss = model(idx)[0], model(idx, targets)[1]
    log_probs = logits.log_softmax(-1)[:, 1::2].gather(-1, targets[:, 1::2, None])
    torch.testing.assert_close(loss, -log_probs.mean())


def test_the_output_head_is_the_token_embedding():
    model = tiny_model(n_layer=1)
    model.ln_f.register_forward_hook(lambda module, args, x: torch.ones_like(x))
    torch.testing.assert_close(model(random_ids())[0][0, 0], model.wte.weight[:65].sum(1))


def test_initialisation_is_gpt2s():
    model = tiny_model(n_layer=8, n_embd=128, vocab_size=1000, block_size=256)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02
            if name.endswith("c_proj.weight"):
                std = 0.02 / math.sqrt(2 * 8)
            assert abs(p.mean()) < 0.05 * std, name
            assert abs(p.std() / std - 1) < 0.03, name


def test_an_untrained_model_knows_nothing():
    model = tiny_model(vocab_size=1000)
    idx, targets = random_ids(vocab_size=1000), random_ids(vocab_size=1000)
    assert abs(model(idx, targets)[1] - math.log(1000)) < 0.1


def test_bias_false_leaves_no_biases():
    assert not [name for name in tiny_model(bias=False).state_dict() if name.endswith("bias")]


def test_dropout_acts_in_train_mode_only():
    model = tiny_model(dropout=0.5)
    idx = random_ids()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="divisible by n_head"):
        GPTConfig(n_head=4, n_embd=30)
    with pytest.raises(ValueError, match="n_layer must be at least 1"):
        GPTConfig(n_layer=0)


def test_wrong_ids_and_lengths_are_refused():
    model = tiny_model()
    idx = random_ids()
    with pytest.raises(ValueError, match="17 tokens exceed block_size"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="targets or a cache"):
        model(idx, idx, cache=KVCache(model.config, 2))
    with pytest.raises(ValueError, match="no tokens"):
        model(idx[:, :0])
    for bad in (65, 127, -1):  # 127 has a row in the padded embedding
        idx[1, 3] = bad
        with pytest.raises(ValueError, match=f"token ids from .*{bad}.* are outside the voc"):
            model(idx)
