"""support/kernels.py against torch's own functions in float64, alone and in a model that trains."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import GPTConfig, MiniGPT
from support.kernels import CPUKernels, choose_kernels

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def outputs_and_gradients(function, *tensors, **options):
    """function(*tensors), then the gradient of each tensor for a fixed random gradient of the output."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors, **options)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, tensors, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))


def assert_equal(function, *tensors, rtol=0.0, atol=2e-6, **options):
    """With the kernels, function gives what torch gives in float64, forward and backward."""
    expected = outputs_and_gradients(function, *(t.double() for t in tensors), **options)
    with CPUKernels():
        found = outputs_and_gradients(function, *tensors, **options)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == tensors[0].dtype
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def pretend_amd(monkeypatch, amd=True):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD" if amd else "another"}, raising=False)


@pytest.fixture(params=[True, False], ids=["amd", "other"])
def maker(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    pretend_amd(monkeypatch, request.param)


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (24,)])
@pytest.mark.parametrize("n_out", [8, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_equal_torchs(maker, shape, n_out, bias):
    torch.manual_seed(0)
    parameters = [torch.randn(n_out, 24) / 5, *([torch.randn(n_out)] if bias else [])]
    assert_equal(F.linear, torch.randn(shape), *parameters, atol=1e-5)


@needs_onednn
def test_frozen_weights_get_no_gradient(monkeypatch):
    pretend_amd(monkeypatch)
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    with CPUKernels():
        F.linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_gelu_is_gpt2s_formula_also_far_from_zero():
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.0, -0.0, -1e4, 1e4, 1e-30])])
    other_form = F.gelu(x)
    assert_equal(lambda x: F.gelu(x, approximate="tanh"), x, atol=5e-6)
    formula = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    with CPUKernels():
        torch.testing.assert_close(F.gelu(x, approximate="tanh"), formula, rtol=0, atol=1e-6)
        assert torch.equal(F.gelu(x), other_form)


@pytest.mark.parametrize("T", [1, 7, 64])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.bfloat16, 0.04)])
def test_causal_attention_equals_torchs(T, dtype, atol):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 16).to(dtype)
    assert_equal(F.scaled_dot_product_attention, q, k, v, is_causal=True, atol=atol)


def test_attention_with_a_mask_or_with_fewer_keys_than_queries_heads_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 5, 16, dtype=torch.bfloat16)
    mask = torch.rand(5, 5) < 0.5
    mask.fill_diagonal_(True)
    for options in ({"attn_mask": mask}, {}, {"is_causal": True, "enable_gqa": True}):
        kv = (k[:, :2], v[:, :2]) if "enable_gqa" in options else (k, v)
        expected = F.scaled_dot_product_attention(q, *kv, **options)
        with CPUKernels():
            assert torch.equal(F.scaled_dot_product_attention(q, *kv, **options), expected)


def test_dropout_of_attention_keeps_the_mean():
    torch.manual_seed(0)
    q, k = torch.zeros(2, 1, 1, 64, 8, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)
    with CPUKernels():
        y = torch.stack([F.scaled_dot_product_attention(q, k, v, None, 0.5, True) for _ in range(200)])
    assert y.float().mean() == pytest.approx(1, abs=0.02) and y.float().std() > 0.1


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_has_the_same_loss_and_gradients(maker, dtype, rtol, bias):
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(32, 65, 2, 2, 32, bias=bias))
    idx, targets = torch.randint(65, (2, 4, 32))

    def loss_and_gradients(kernels):
        model.zero_grad()
        with kernels:
            with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
                loss = model(idx, targets)[1]
            loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    stock = loss_and_gradients(choose_kernels(CPU, compiled=True))  # no mode: a compiler has its own kernels
    faster = loss_and_gradients(choose_kernels(CPU))
    torch.testing.assert_close(faster[0], stock[0], rtol=rtol / 10, atol=0)
    assert (faster[1] - stock[1]).norm() < rtol * stock[1].norm()
    if dtype == "bfloat16":
        assert not torch.equal(faster[1], stock[1])  # they did compute it


def test_only_a_cpu_and_only_inside_has_other_functions():
    torchs = [F.linear, F.gelu, F.scaled_dot_product_attention]
    with choose_kernels(torch.device("cuda")):
        assert [F.linear, F.gelu, F.scaled_dot_product_attention] == torchs
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), choose_kernels(CPU):
        assert F.gelu not in torchs
        F.linear(torch.ones(1, 3), torch.ones(2, 2))
    assert [F.linear, F.gelu, F.scaled_dot_product_attention] == torchs
