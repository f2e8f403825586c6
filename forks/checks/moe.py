"""forks/moe.patch against the plain MLP, a loop over tokens, and the formula of the balance loss."""

import math

import pytest
import torch

from model import MLP, GPTConfig, MiniGPT, MoE, balance_loss


def sizes(**changes):
    return GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, **changes)


def mixture(n_expert, experts_per_token):
    torch.manual_seed(0)
    moe = MoE(sizes(n_expert=n_expert, experts_per_token=experts_per_token))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return moe


def test_one_expert_is_the_plain_mlp_to_the_bit():
    moe = mixture(1, 1)
    plain = MLP(sizes())
    plain.load_state_dict(moe.experts[0].state_dict())
    x = torch.randn(3, 16, 32)
    assert torch.equal(moe(x), plain(x))


def test_one_expert_trains_as_the_plain_mlp_does_to_the_bit():
    torch.manual_seed(0)
    plain = MiniGPT(sizes())
    mixed = MiniGPT(sizes(n_expert=1, experts_per_token=1))
    weights = plain.state_dict()
    renamed = {name.replace(".mlp.", ".mlp.experts.0."): w for name, w in weights.items()}
    missing, unexpected = mixed.load_state_dict(renamed, strict=False)
    assert not unexpected and all("router" in name for name in missing)
    idx = torch.randint(65, (2, 16))
    assert torch.equal(plain.eval()(idx)[0], mixed.eval()(idx)[0])
    plain(idx, idx)[1].backward()
    mixed(idx, idx)[1].backward()
    for name, p in plain.named_parameters():
        name = name.replace(".mlp.", ".mlp.experts.0.")
        assert torch.equal(p.grad, mixed.get_parameter(name).grad)


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_k_of_n_experts_equal_a_loop_over_tokens(experts_per_token):
    moe = mixture(4, experts_per_token)
    x = torch.randn(2, 16, 32)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(16):
            token = x[b, t]
            scores = [math.exp(row @ token) for row in moe.router.weight.detach()]
            best = sorted(range(4), key=lambda i: -scores[i])[:experts_per_token]
            for i in best:
                expected[b, t] += scores[i] / sum(scores) * moe.experts[i](token)
    torch.testing.assert_close(moe(x), expected, atol=1e-5, rtol=1e-5)


def test_the_router_learns_also_where_a_token_takes_one_expert():
    moe = mixture(4, 1)
    moe(torch.randn(1, 5, 32)).sum().backward()
    assert moe.router.weight.grad.any()


def test_the_gradients_of_unused_experts_are_zero():
    moe = mixture(4, 1)
    with torch.no_grad():
        moe.router.weight[2:] = -moe.router.weight[:2]
    x = moe.router.weight[0].detach().expand(1, 5, -1)  # experts 0 and 2 have opposite scores
    moe(x).square().sum().backward()
    used = int(moe.router(x[0, 0]).argmax())
    for i, expert in enumerate(moe.experts):
        for p in expert.parameters():
            assert p.grad is not None
            assert bool(p.grad.any()) == (i == used)


def test_the_balance_loss_is_the_formula_and_1_where_all_is_even():
    torch.manual_seed(0)
    probs = torch.randn(2, 6, 4).softmax(-1)
    chosen = probs.topk(1).indices
    expected = 0.0
    for b in range(2):
        for i in range(4):
            f = sum(int(chosen[b, t, 0]) == i for t in range(6)) / 6
            p = sum(float(probs[b, t, i]) for t in range(6)) / 6
            expected += 4 * f * p / 2
    assert balance_loss(probs, chosen).item() == pytest.approx(expected, rel=1e-6)
    even = torch.full((1, 4, 4), 0.25)
    assert balance_loss(even, torch.arange(4).view(1, 4, 1)).item() == 1.0
    alone = torch.tensor([[[1.0, 0, 0, 0]] * 4])
    assert balance_loss(alone, torch.zeros(1, 4, 1, dtype=torch.long)).item() == 4.0


def test_the_balance_loss_counts_in_training_alone():
    torch.manual_seed(0)
    model = MiniGPT(sizes(n_expert=4))
    idx = torch.randint(65, (3, 16))
    logits, loss = model(idx, idx)
    balance = sum(block.mlp.balance_loss for block in model.h).item()
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()).item()
    assert balance >= 2 * 0.99
    assert loss.item() == pytest.approx(plain + 0.01 * balance, rel=1e-6)
    assert model.eval()(idx, idx)[1].item() == pytest.approx(plain, rel=1e-6)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = MiniGPT(sizes(n_expert=4))
        model.activation_checkpointing = recompute
        idx = torch.randint(65, (3, 16))
        model(idx, idx)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_compiled_training_gives_the_same_loss():
    torch.manual_seed(0)
    model = MiniGPT(sizes(n_expert=4))
    idx = torch.randint(65, (3, 16))
    expected = model(idx, idx)[1]
    torch.testing.assert_close(torch.compile(model, backend="eager")(idx, idx)[1], expected)
