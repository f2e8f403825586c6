"""support/muon.py against singular values, the formula in float64, torch.optim.Muon and torch.optim.AdamW."""

import copy

import pytest
import torch

import support.muon
from support.muon import Muon, orthogonal

SHAPES = [(16, 16), (16, 64), (64, 16), (24, 24)]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(support.muon, "best_dtype", lambda device: "float32")


def parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * scale


def newton_schulz(g):
    """What the paper's five steps give, in float64."""
    x = g.double() / g.double().norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def every_bit(optimizer, params):
    """Copies of all that a step changes."""
    return copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cols", [48, 49, 192])
def test_update_has_the_matrix_s_singular_vectors_and_singular_values_near_one(cols):
    torch.manual_seed(0)
    matrices = torch.randn(3, 48, cols) + 0.3
    u, values, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    kept = (
        u.mT @ orthogonal(matrices).double() @ vt.mT
    )  # diagonal, if the singular vectors are the same
    new = kept.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(kept, torch.diag_embed(new), rtol=0, atol=1e-3)
    large = values > 0.002 * matrices.norm(dim=(1, 2))[:, None]
    assert large.sum() > 0.9 * large.numel()
    assert (new[large] > 0.68).all() and (new < 1.21).all()


@pytest.mark.parametrize("shape", [(32, 32), (32, 128)])
@pytest.mark.parametrize("rank", [1, 4, 32])
def test_float32_equals_the_formula_in_float64_also_for_matrices_of_low_rank(shape, rank):
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    torch.testing.assert_close(
        orthogonal(matrix[None])[0].double(), newton_schulz(matrix), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 128)])
def test_16_bits_are_used_where_they_are_fast_and_are_close(monkeypatch, dtype, shape):
    monkeypatch.setattr(support.muon, "best_dtype", lambda device: dtype)
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    x = orthogonal(matrix[None])[0]
    assert x.dtype == getattr(torch, dtype)
    assert (x - newton_schulz(matrix)).norm() < 0.03 * x.norm()
    low_rank = orthogonal(torch.randn(1, 32, 1) @ torch.randn(1, 1, 128))
    assert low_rank.norm() < 3  # whose norm is the one singular value


def test_zero_gradients_give_finite_updates():
    params = parameters(SHAPES)
    for p in params:
        p.grad = torch.zeros_like(p)
    Muon([{"params": params, "splits": 1}]).step()
    assert all(p.isfinite().all() for p in params)


def test_several_steps_equal_the_formula_in_float64():
    params = parameters(SHAPES)
    weights, means = (
        [p.detach().double() for p in params],
        [torch.zeros_like(p).double() for p in params],
    )
    optimizer = Muon([{"params": params, "splits": 1, "momentum": 0.9}], lr=0.02, weight_decay=0.3)
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
        for i, p in enumerate(params):
            g = p.grad.double()
            means[i] = 0.9 * means[i] + 0.1 * g
            update = 0.2 * max(g.shape) ** 0.5 * newton_schulz(0.9 * means[i] + 0.1 * g)
            weights[i] = weights[i] - 0.02 * (0.3 * weights[i] + update)
    for p, weight in zip(params, weights, strict=True):
        torch.testing.assert_close(p.double(), weight, rtol=0, atol=1e-5)


def test_several_steps_equal_torch_muon_to_bfloat16_precision():
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizers = (
        Muon([{"params": ours, "splits": 1}], lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    for p, q, start in zip(ours, theirs, parameters(SHAPES), strict=True):
        assert (p - q).norm() < 0.03 * (p - start).norm()


def test_updates_are_as_large_as_adamw_s_are_meant_to_be():
    """0.2 to 0.4 root mean square at a learning rate of 1 (Liu et al. 2025, section 2.2)."""
    for p, start in zip(params := parameters(SHAPES), parameters(SHAPES), strict=True):
        set_gradients([p], 0)
        Muon([{"params": [p], "splits": 1}], lr=1.0, weight_decay=0.0).step()
        assert 0.13 < (p - start).square().mean().sqrt() < 0.25
    assert len(params) == len(SHAPES)


def test_groups_without_splits_equal_adamw_to_the_bit():
    shapes = [(7, 5), (16, 16), (9,)]
    ours, theirs, matrices = parameters(shapes), parameters(shapes), parameters(SHAPES)

    def groups(params):
        return [
            {"params": params[:2], "weight_decay": 0.1},
            {"params": params[2:], "weight_decay": 0.0},
        ]

    settings = {"lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-7}
    optimizer = Muon([*groups(ours), {"params": matrices, "splits": 1}], **settings)
    adamw = torch.optim.AdamW(groups(theirs), fused=True, **settings)
    for step in range(5):
        for o in (optimizer, adamw):
            for group in o.param_groups:
                group["lr"] = 0.01 / (step + 1)
        set_gradients(ours + matrices, step)
        set_gradients(theirs, step)
        optimizer.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_split_parameter_equals_its_matrices_apart():
    (fused,) = parameters([(48, 16)])
    apart = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    whole = copy.deepcopy(fused)
    optimizers = [
        Muon([{"params": p, "splits": n}], lr=0.1)
        for p, n in (([fused], 3), (apart, 1), ([whole], 1))
    ]
    for step in range(3):
        set_gradients([fused], step)
        whole.grad = fused.grad.clone()
        for p, g in zip(apart, fused.grad.chunk(3), strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(fused, torch.cat(apart))
    assert not torch.allclose(fused, whole, atol=0.01)


def test_small_batches_change_nothing(monkeypatch):
    results = []
    for limit in (1, 600, 1 << 24):
        monkeypatch.setattr(support.muon, "BATCH", limit)
        params = parameters(SHAPES * 3)
        set_gradients(params, 0)
        Muon([{"params": params, "splits": 1}], lr=0.1).step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=1e-6)


def test_parameters_without_a_gradient_stay():
    params = parameters(SHAPES)
    set_gradients(params[1:], 0)
    Muon([{"params": params, "splits": 1}]).step()
    assert torch.equal(params[0], parameters(SHAPES)[0]) and not torch.equal(
        params[1], parameters(SHAPES)[1]
    )


def some_of_each(seed=0):
    fused, *matrices = parameters([(48, 16), *SHAPES], seed)
    others = parameters([(10, 8), (5,)], seed + 1)
    groups = [
        {"params": [fused], "splits": 3},
        {"params": matrices, "splits": 1},
        {"params": others},
    ]
    return [fused, *matrices, *others], Muon(groups, lr=0.02)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    params, optimizer = some_of_each()
    for step in range(6):
        if step == 3:
            torch.save(
                {"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()},
                tmp_path / "a.pt",
            )
        set_gradients(params, step)
        optimizer.step()
    resumed, other = some_of_each(seed=5)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    with torch.no_grad():
        for p, saved in zip(resumed, state["model"], strict=True):
            p.copy_(saved)
    other.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        set_gradients(resumed, step)
        other.step()
    assert equal(every_bit(optimizer, params), every_bit(other, resumed))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("unscale", [True, False])
def test_under_a_scaler_a_step_that_is_not_finite_changes_no_bit(bad, which, unscale):
    params, optimizer = some_of_each()
    params[0].data[0, 0] = -0.0  # changed by adding zero
    set_gradients(params, 0)
    optimizer.step()
    before = every_bit(optimizer, params)
    scaler = torch.amp.GradScaler("cpu", 8.0)
    scaler.scale(torch.zeros(()))  # starts it
    set_gradients(params, 1)
    params[which].grad.view(-1)[0] = bad
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert equal(every_bit(optimizer, params), before) and scaler.get_scale() == 4.0


@pytest.mark.parametrize("unscale", [True, False])
def test_a_scaler_changes_no_finite_step(unscale):
    plain, scaled = some_of_each(), some_of_each()
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        set_gradients(plain[0], step)
        plain[1].step()
        set_gradients(scaled[0], step, scale=1024.0)
        if unscale:
            scaler.unscale_(scaled[1])
        scaler.step(scaled[1])
        scaler.update()
    assert equal(every_bit(plain[1], plain[0]), every_bit(scaled[1], scaled[0]))


def test_no_step_looks_at_a_value():
    """On the meta device, which has none, anything that would wait for a GPU raises."""
    with torch.device("meta"):
        params = [
            torch.nn.Parameter(torch.empty(shape))
            for shape in [(48, 16), (16, 64), (64, 16), (16, 16)]
        ]
    optimizer = Muon([{"params": params[:1], "splits": 3}, {"params": params[1:], "splits": 1}])
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.grad_scale = optimizer.found_inf = torch.empty((), device="meta")
    optimizer.step()


def test_a_closure_is_called_once_and_its_loss_returned():
    params, optimizer = some_of_each()
    set_gradients(params, 0)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return torch.tensor(1.5)

    assert optimizer.step(closure) == 1.5
    assert calls == [True]


def test_hooks_run_once_per_step_and_groups_can_be_added():
    params, optimizer = some_of_each()
    (new,) = parameters([(16, 32)], seed=7)
    optimizer.add_param_group({"params": [new], "splits": 1})
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    before = new.detach().clone()
    set_gradients([*params, new], 0)
    optimizer.step()
    assert calls == ["before", "after"]
    assert not torch.equal(new, before)


def test_a_parameter_that_is_no_matrices_is_refused():
    with pytest.raises(ValueError, match="can't be split into 3 matrices"):
        Muon([{"params": parameters([(10, 4)]), "splits": 3}])
