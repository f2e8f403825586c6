import math

import pytest
import torch
import torch.nn.functional as F

from model import CausalSelfAttention, GPTConfig, KVCache, MiniGPT


def small(**changes):
    sizes = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32} | changes
    torch.manual_seed(0)
    return MiniGPT(GPTConfig(**sizes)).eval()


def random_ids(model, batch_size=2, length=None):
    config = model.config
    return torch.randint(config.vocab_size, (batch_size, length or config.block_size))


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


@pytest.mark.parametrize("vocab_size", [65, 128, 50257])
def test_logits_equal_transformers_gpt2_with_the_same_weights(vocab_size):
    transformers = pytest.importorskip("transformers")
    model = small(vocab_size=vocab_size, n_layer=3)
    for p in model.parameters():  # also what begins as zero or one
        torch.nn.init.normal_(p, std=0.1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_positions=16, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=32
        )
    ).eval()
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
    idx = random_ids(model)
    torch.testing.assert_close(model(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)
    loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), idx.flatten())
    torch.testing.assert_close(model(idx, idx)[1], loss)


def test_the_future_does_not_change_the_past():
    model = small()
    idx = random_ids(model)
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 65
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [7, 1, 1, 1, 6], [1, 15], [5, 5, 6]])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_cached_logits_equal_uncached(chunks, batch_size):
    model = small()
    idx = random_ids(model, batch_size)
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
    model = small()
    idx = random_ids(model)
    assert model.wte.weight.shape == (128, 32)
    logits, loss = model(idx)[0], model(idx, idx)[1]
    assert logits.shape == (2, 16, 65)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten()))
    loss.backward()
    assert model.wte.weight.grad[:65].abs().sum() > 0
    assert model.wte.weight.grad[65:].abs().sum() == 0


def test_logits_beside_a_loss_are_those_without_and_have_no_gradient():
    model = small()
    idx = random_ids(model)
    logits, _ = model(idx, idx)
    torch.testing.assert_close(logits, model(idx)[0])
    assert not logits.requires_grad


def test_targets_of_minus_100_are_ignored():
    model = small()
    idx, targets = random_ids(model), random_ids(model)
    targets[:, ::2] = -100
    logits, loss = model(idx)[0], model(idx, targets)[1]
    log_probs = logits.log_softmax(-1)[:, 1::2].gather(-1, targets[:, 1::2, None])
    torch.testing.assert_close(loss, -log_probs.mean())


def test_the_output_head_is_the_token_embedding():
    model = small(n_layer=1)
    model.ln_f.register_forward_hook(lambda module, args, x: torch.ones_like(x))
    torch.testing.assert_close(model(random_ids(model))[0][0, 0], model.wte.weight[:65].sum(1))


def test_initialisation_is_gpt2s():
    model = small(n_layer=8, n_embd=128, vocab_size=1000, block_size=256)
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
    model = small(vocab_size=1000)
    assert abs(model(random_ids(model), random_ids(model))[1] - math.log(1000)) < 0.1


def test_bias_false_leaves_no_biases():
    assert not [name for name in small(bias=False).state_dict() if name.endswith("bias")]


def test_dropout_acts_in_train_mode_only():
    model = small(dropout=0.5)
    idx = random_ids(model)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_one_batch_can_be_overfitted():
    model = small().train()
    x, y = random_ids(model), random_ids(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
    assert loss < 0.02


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_embd": 30}, "divisible by n_head"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"dropout": 1.5}, "dropout probability has to be between 0 and 1"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_wrong_ids_and_lengths_are_refused():
    model = small()
    idx = random_ids(model)
    with pytest.raises(ValueError, match="17 tokens exceed block_size"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="no tokens"):
        model(idx[:, :0])
    for bad in (65, 127, -1):  # 127 has a row in the padded embedding
        idx[1, 3] = bad
        with pytest.raises(
            ValueError, match=f"token ids from .*{bad}.* are outside the vocabulary"
        ):
            model(idx)
    with pytest.raises(IndexError, match="Target -1 is out of bounds"):  # PyTorch's own check
        model(random_ids(model), idx)
