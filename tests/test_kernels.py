"""support/kernels.py against torch's own functions in float64, alone and in a model that trains."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import GPTConfig, MiniGPT
from support.kernels import choose_kernels

CPU = torch.device("cpu")


def outputs_and_gradients(function, *tensors, **options):
    """function(*tensors), then the gradient of each tensor for a fixed random gradient of the output."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors, **options)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, tensors, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))


def assert_equal(function, *tensors, rtol=0.0, atol=2e-6, **options):
    """With the kernels, function gives what torch gives in float64, forward and backward."""
    expected = outputs_and_gradients(function, *(t.double() for t in tensors), **options)
    with choose_kernels(CPU):
        found = outputs_and_gradients(function, *tensors, **options)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == tensors[0].dtype
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def test_gelu_is_gpt2s_formula_also_far_from_zero():
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.0, -0.0, -1e4, 1e4, 1e-30])])
    other_form = F.gelu(x)
    assert_equal(lambda x: F.gelu(x, approximate="tanh"), x, atol=5e-6)
    formula = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    with choose_kernels(CPU):
        torch.testing.assert_close(F.gelu(x, approximate="tanh"), formula, rtol=0, atol=1e-6)
        assert torch.equal(F.gelu(x), other_form)


@pytest.mark.parametrize("T", [1, 7, 64])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.bfloat16, 0.04)])
def test_causal_attention_equals_torchs(T, dtype, atol):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 16).to(dtype)
    assert_equal(F.scaled_dot_product_attention, q, k, v, is_causal=True, atol=atol)


def test_what_is_not_plain_causal_attention_in_16_bits_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 5, 16, dtype=torch.bfloat16)
    mask = (torch.rand(5, 5) < 0.5).fill_diagonal_(True)
    grouped = k[:, :2], v[:, :2]
    for args, options in (
        ((q, k, v), {}),
        ((q, k, v), {"attn_mask": mask}),
        ((q, k, v), {"attn_mask": mask, "is_causal": True}),
        ((q, k, v), {"is_causal": True, "scale": 1.0}),
        ((q, *grouped), {"is_causal": True, "enable_gqa": True}),
        ((q[:, :, :1], k, v), {"is_causal": True}),
        ((q.double(), k.double(), v.double()), {"is_causal": True}),
    ):
        expected = F.scaled_dot_product_attention(*args, **options)
        with choose_kernels(CPU):
            assert torch.equal(F.scaled_dot_product_attention(*args, **options), expected)


def test_arguments_have_torchs_names():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with choose_kernels(CPU):
        assert F.gelu(input=q, approximate="tanh").shape == q.shape
        assert F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True).shape == q.shape


def test_dropout_of_attention_keeps_the_mean():
    torch.manual_seed(0)
    q, k = torch.zeros(2, 1, 1, 64, 8, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)
    with choose_kernels(CPU):
        y = torch.stack([F.scaled_dot_product_attention(q, k, v, None, 0.5, True) for _ in range(200)])
    assert y.float().mean() == pytest.approx(1, abs=0.02) and y.float().std() > 0.1


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_has_the_same_loss_and_gradients(dtype, rtol, bias):
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

    stock = loss_and_gradients(choose_kernels(CPU, compiled=True))  # torch's own: a compiled model has the compiler's
    faster = loss_and_gradients(choose_kernels(CPU))
    torch.testing.assert_close(faster[0], stock[0], rtol=rtol / 10, atol=0)
    assert (faster[1] - stock[1]).norm() < rtol * stock[1].norm()
    assert not torch.equal(faster[1], stock[1])  # the faster kernels did run


def test_a_second_derivative_is_refused_not_wrong():
    x = torch.ones(3, requires_grad=True)
    with choose_kernels(CPU):
        (grad,) = torch.autograd.grad((F.gelu(x, approximate="tanh") ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_a_cpu_and_only_inside_has_other_functions(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # it would stay for other tests
    torchs = [F.gelu, F.scaled_dot_product_attention]
    with choose_kernels(torch.device("cuda")):
        assert [F.gelu, F.scaled_dot_product_attention] == torchs
    kernels = choose_kernels(CPU)
    for _ in range(2):  # as each step enters it again
        with pytest.raises(ZeroDivisionError), kernels:
            assert F.gelu not in torchs and F.scaled_dot_product_attention not in torchs
            raise ZeroDivisionError
        assert [F.gelu, F.scaled_dot_product_attention] == torchs
