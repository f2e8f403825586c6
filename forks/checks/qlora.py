"""forks/qlora.patch against the paper's code book, brute force, and the sizes of what is stored."""

from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F

import sample
from model import NF4, GPTConfig, MiniGPT, NF4Linear, add_lora, dequantize, merge_lora, quantize
from support.checkpoint import read_checkpoint
from support.pretrained import save_pretrained

SIZES = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32}


def spaced(begin, end, n):
    return [begin + (end - begin) * i / (n - 1) for i in range(n)]


def test_the_code_book_is_the_papers_quantiles_of_the_normal_distribution():
    """Eight positive and seven negative quantiles, evenly spaced in probability, and zero."""
    offset = 0.9677083
    positive = [NormalDist().inv_cdf(p) for p in spaced(offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in spaced(offset, 0.5, 8)[:-1]]
    values = torch.tensor(sorted([*positive, 0.0, *negative]), dtype=torch.float64)
    torch.testing.assert_close(NF4.double(), values / values.max(), atol=1e-6, rtol=0)


def test_the_code_book_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(NF4, theirs, atol=1e-7, rtol=0)


def test_bitsandbytes_quantises_to_the_same_bytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(96, 64) * 0.02
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, scales = quantize(weight)
    assert torch.equal(ours, codes.flatten())
    assert torch.equal(scales.flatten(), state.absmax)


def test_each_weight_becomes_the_nearest_value_of_its_block():
    torch.manual_seed(0)
    weight = torch.randn(32, 64) * 0.02
    near = dequantize(*quantize(weight)).view_as(weight)
    for row in range(32):  # a row is a block
        values = NF4 * weight[row].abs().max()
        for i in range(64):
            nearest = values[(values - weight[row, i]).abs().argmin()]
            assert near[row, i].item() == pytest.approx(nearest.item(), rel=1e-6)
    error = (near - weight).norm() / weight.norm()
    assert 0.05 < error < 0.12  # of 16 evenly spaced values: 0.12 to 0.13
    even = torch.linspace(-1, 1, 16)
    scales = weight.abs().amax(1, keepdim=True)
    evenly = even[(weight / scales).unsqueeze(-1).sub(even).abs().argmin(-1)] * scales
    assert error < (evenly - weight).norm() / weight.norm()


def test_a_block_of_zeros_and_values_of_the_book_stay_exact():
    weight = torch.cat([torch.zeros(64), NF4.repeat(4) * 3])
    assert torch.equal(dequantize(*quantize(weight)).flatten(), weight)


def test_the_frozen_weights_take_4_bits_and_half_a_bit_of_scales():
    model = MiniGPT(GPTConfig(**SIZES))
    linears = [m for m in model.h.modules() if isinstance(m, torch.nn.Linear)]
    n = sum(linear.weight.numel() for linear in linears)
    add_lora(model, 4, nf4=True)
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    stored = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    assert len(layers) == len(linears) == 8
    assert stored == n / 2 + 4 * n / 64  # in bfloat16 2 n: 28 % of it
    names = [name for name, _ in model.h.named_parameters() if name.endswith("linear.weight")]
    assert not names


def test_it_computes_with_the_dequantised_weight_and_merges_into_a_plain_model():
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(**SIZES, lora_rank=4, nf4=True)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    layer = model.h[0].mlp.c_fc
    x = torch.randn(5, 32, requires_grad=True)
    expected = F.linear(x, layer.linear.weight(), layer.linear.bias) + x @ layer.a.T @ layer.b.T
    torch.testing.assert_close(layer(x), expected)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, expected_gradient)
    idx = torch.randint(65, (2, 16))
    logits = model(idx)[0]
    merge_lora(model)
    assert model.config == GPTConfig(**SIZES)
    assert model.state_dict().keys() == MiniGPT(GPTConfig(**SIZES)).state_dict().keys()
    torch.testing.assert_close(model(idx)[0], logits, atol=1e-4, rtol=1e-4)


def test_no_dequantised_weight_is_kept_for_the_backward_pass():
    layer = NF4Linear(torch.nn.Linear(64, 256))
    kept = []

    def note(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(2, 64, requires_grad=True))
    assert torch.Size([256, 64]) not in kept


def test_a_run_trains_the_thin_matrices_alone_and_samples(train):
    train(max_iters=20, eval_interval=20, out_dir="base")
    save_pretrained(sample.load_model("base/last.pt")[0], "base/folder")
    train(init_from="base/folder", lora_rank=4, nf4=True, max_iters=6, out_dir="tuned")
    base = read_checkpoint("base/last.pt")["model"]
    tuned = read_checkpoint("tuned/last.pt")["model"]
    for name, weight in tuned.items():
        if name.endswith("linear.codes"):
            original = base[name.replace("linear.codes", "weight")]
            codes, scales = quantize(original)
            assert torch.equal(weight, codes)
            assert torch.equal(tuned[name.replace("codes", "scales")], scales)
        elif name in base:  # norms, and embeddings, whose padding is not exported
            n = 23 if len(weight) == 64 else len(weight)
            assert torch.equal(weight[:n], base[name][:n])
    assert any(name.endswith(".b") and weight.any() for name, weight in tuned.items())
    model, _, _ = sample.load_model("tuned/last.pt")
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
