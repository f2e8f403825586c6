"""support/muon.py against singular values, the formula in float64, torch's Muon and AdamW."""

import copy

import pytest
import torch
from conftest import same

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


def some_of_each():
    """A split matrix, whole ones and what AdamW takes, with an optimizer of them all."""
    fused, *matrices = parameters([(48, 16), *SHAPES])
    others = parameters([(10, 8), (5,)], seed=1)
    groups = [{"params": [fused], "splits": 3}, {"params": matrices, "splits": 1}]
    return [fused, *matrices, *others], Muon([*groups, {"params": others}], lr=0.02)


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


@pytest.mark.parametrize("cols", [48, 192])
def test_update_has_the_matrix_s_singular_vectors_and_singular_values_near_one(cols):
    torch.manual_seed(0)
    matrices = torch.randn(3, 48, cols) + 0.3
    u, values, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    # diagonal, if the singular vectors are the same
    kept = u.mT @ orthogonal(matrices).double() @ vt.mT
    new = kept.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(kept, torch.diag_embed(new), rtol=0, atol=1e-3)
    large = values > 0.002 * matrices.norm(dim=(1, 2))[:, None]
    assert large.sum() > 0.9 * large.numel()
    assert (new[large] > 0.68).all() and (new < 1.21).all()


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_float32_equals_the_formula_in_float64_also_for_matrices_of_low_rank(rank):
    torch.manual_seed(0)
    matrix = torch.randn(32, rank) @ torch.randn(rank, 128)
    found = orthogonal(matrix[None])[0].double()
    torch.testing.assert_close(found, newton_schulz(matrix), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_used_where_they_are_fast_and_are_close(monkeypatch, dtype):
    monkeypatch.setattr(support.muon, "best_dtype", lambda device: dtype)
    torch.manual_seed(0)
    matrix = torch.randn(32, 128)
    x = orthogonal(matrix[None])[0]
    assert x.dtype == getattr(torch, dtype)
    assert (x - newton_schulz(matrix)).norm() < 0.03 * x.norm()
    low_rank = orthogonal(torch.randn(1, 32, 1) @ torch.randn(1, 1, 128))
    assert low_rank.norm() < 3  # whose norm is the one singular value


def test_several_steps_equal_the_formula_in_float64():
    params = parameters(SHAPES)
    weights = [p.detach().double() for p in params]
    means = [torch.zeros_like(weight) for weight in weights]
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
    muon = Muon([{"params": ours, "splits": 1}], lr=0.02, weight_decay=0.1)
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    for params, optimizer in ((ours, muon), (theirs, torch.optim.Muon(theirs, **options))):
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
    for p, q, start in zip(ours, theirs, parameters(SHAPES), strict=True):
        assert (p - q).norm() < 0.03 * (p - start).norm()


def test_groups_without_splits_equal_adamw_to_the_bit():
    shapes = [(7, 5), (16, 16), (9,)]
    ours, theirs, matrices = parameters(shapes), parameters(shapes), parameters(SHAPES)

    def groups(params):
        decay = {"params": params[:2], "weight_decay": 0.1}
        return [decay, {"params": params[2:], "weight_decay": 0.0}]

    settings = {"lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-7}
    muon = Muon([*groups(ours), {"params": matrices, "splits": 1}], **settings)
    adamw = torch.optim.AdamW(groups(theirs), fused=True, **settings)
    for step in range(5):
        for params, optimizer in ((ours + matrices, muon), (theirs, adamw)):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            set_gradients(params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_split_parameter_equals_its_matrices_apart():
    (fused,) = parameters([(48, 16)])
    apart = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    whole = copy.deepcopy(fused)
    jobs = (([fused], 3), (apart, 1), ([whole], 1))
    optimizers = [Muon([{"params": params, "splits": n}], lr=0.1) for params, n in jobs]
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


def test_parameters_without_a_gradient_stay_and_zero_gradients_give_finite_updates():
    params = parameters(SHAPES)
    set_gradients(params[2:], 0)
    params[1].grad = torch.zeros_like(params[1])
    optimizer = Muon([{"params": params, "splits": 1}])
    assert optimizer.step(lambda: 1.5) == 1.5  # what a closure returns
    assert torch.equal(params[0], parameters(SHAPES)[0])
    assert not torch.equal(params[2], parameters(SHAPES)[2])
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("unscale", [True, False])
def test_under_a_scaler_a_step_that_is_not_finite_changes_no_bit(which, unscale):
    params, optimizer = some_of_each()
    params[0].data[0, 0] = -0.0  # changed by adding zero
    set_gradients(params, 0)
    optimizer.step()
    before = every_bit(optimizer, params)
    scaler = torch.amp.GradScaler("cpu", 8.0)
    scaler.scale(torch.zeros(()))  # starts it
    set_gradients(params, 1)
    params[which].grad.view(-1)[0] = float("nan")
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert same(every_bit(optimizer, params), before) and scaler.get_scale() == 4.0


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
    assert same(every_bit(plain[1], plain[0]), every_bit(scaled[1], scaled[0]))


def test_no_step_looks_at_a_value():
    """On the meta device, which has none, anything that would wait for a GPU raises."""
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in [(48, 16), *SHAPES]]
    optimizer = Muon([{"params": params[:1], "splits": 3}, {"params": params[1:], "splits": 1}])
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.grad_scale = optimizer.found_inf = torch.empty((), device="meta")
    optimizer.step()


def test_a_parameter_that_is_no_matrices_is_refused():
    with pytest.raises(ValueError, match="can't be split into 3 matrices"):
        Muon([{"params": parameters([(10, 4)]), "splits": 3}])
