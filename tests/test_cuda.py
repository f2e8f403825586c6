"""What only a GPU can show: numbers, decoding by CUDA graphs, train.py. Three minutes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, losses, same, tiny_model

from model import KVCache
from sample import generate
from support.fast import CompiledDecoder
from support.kernels import choose_kernels
from support.muon import orthogonal
from train import Settings, make_optimizer

DEVICE = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


def model(**changes):
    sizes = {"block_size": 256, "vocab_size": 1001, "n_head": 4, "n_embd": 256}
    return tiny_model(**(sizes | changes)).train()


def random_batch():
    return torch.randint(1001, (8, 256)), torch.randint(1001, (8, 256))


def loss_and_gradient(network, parameters, batch, dtype="float32", scale=1.0):
    """The loss, and the gradients of all parameters as one vector in float64 on the CPU."""
    device = batch[0].device.type
    with torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
        loss = network(*batch)[1]
    (loss * scale).backward()
    parts = [p.grad.flatten().double().cpu() / scale for p in parameters]
    for p in parameters:
        p.grad = None
    return loss.item(), torch.cat(parts)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, error", [("float32", 3e-3), ("bfloat16", 0.03), ("float16", 0.03)])
def test_losses_and_gradients_are_the_cpus(dtype, error, compiled):
    gpt = model()
    x, y = random_batch()
    expected_loss, expected = loss_and_gradient(gpt, list(gpt.parameters()), (x, y))
    gpt.to(DEVICE)
    choose_kernels(DEVICE, dtype, 0)
    network = torch.compile(gpt) if compiled else gpt
    scale = 2.0**14 if dtype == "float16" else 1.0
    batch = x.to(DEVICE), y.to(DEVICE)
    loss, gradient = loss_and_gradient(network, list(gpt.parameters()), batch, dtype, scale)
    assert loss == pytest.approx(expected_loss, rel=error)
    assert (gradient - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(optimizer):
    gpt = model().to(DEVICE)
    x, y = random_batch()
    optimizer = make_optimizer(gpt, Settings(optimizer=optimizer))
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0)
    for factor, unchanged in ((float("nan"), True), (1.0, False)):
        before = [p.detach().clone() for p in gpt.parameters()]
        gpt.zero_grad()
        scaler.scale(gpt(x.to(DEVICE), y.to(DEVICE))[1] * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(1.0)
        same = [torch.equal(a, b) for a, b in zip(before, gpt.parameters(), strict=True)]
        assert all(same) == unchanged


def test_muon_makes_matrices_orthogonal():
    matrices = orthogonal(torch.randn(4, 384, 1536, device=DEVICE))
    values = torch.linalg.svdvals(matrices.float())
    assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.parametrize("dtype, error", [(torch.float32, 0.02), (torch.bfloat16, 0.15)])
def test_cuda_graphs_have_the_logits_of_the_plain_model(dtype, error):
    """Text after text, from one decoder. error is in standard deviations of the logits."""
    sizes = {"block_size": 128, "vocab_size": 1001, "n_layer": 3, "n_head": 4, "n_embd": 256}
    gpt = tiny_model(std=0.1, **sizes).to(DEVICE, dtype)
    decoder = CompiledDecoder(gpt)
    for n in (3, 3, 40):
        idx = torch.randint(1001, (2, 100), device=DEVICE)
        cache = KVCache(gpt.config, 2, DEVICE, dtype)
        logits = []
        with torch.inference_mode():
            for part in idx.split([n] + [1] * (100 - n), dim=1):
                logits.append(decoder(part, cache=cache)[0].clone())  # the next step reuses it
            expected = gpt(idx)[0][:, n - 1 :]
        difference = (torch.cat(logits, dim=1) - expected).float().abs().max()
        assert difference < error * expected.float().std()
    assert generate(decoder, idx, 150).shape == (2, 250)  # past block_size
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


SIZES = {"dataset": "gpt2_day", "n_embd": 128, "block_size": 128, "batch_size": 8}
STEPS = {"eval_interval": 20, "eval_iters": 4, "warmup_iters": 4, "lr_decay_iters": 20}
STEPS |= {"device": "cuda:0", "learning_rate": 6e-4, "min_lr": 6e-5}


@pytest.fixture
def train_on_gpu(run):
    """train_on_gpu(out_dir, ranks=1, key=value, ...) runs train.py on one GPU, on ids as frequent
    as GPT-2's tokens in a text. Returns the weights and the training losses."""
    random = np.random.default_rng(0)
    Path("data/gpt2_day").mkdir()
    for split, n in (("train", 2_000_000), ("val", 100_000)):
        (random.zipf(1.3, n) % 50257).astype("<u2").tofile(f"data/gpt2_day/{split}.bin")

    def train_on_gpu(out_dir, ranks=1, **changes):
        settings = SIZES | STEPS | {"compile": True, "dtype": "auto"} | changes
        done = run("train.py", *flags(out_dir=out_dir, **settings), ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        return torch.load(f"{out_dir}/last.pt", map_location="cpu")["model"], losses(out_dir)

    return train_on_gpu


def test_a_resumed_run_ends_with_the_same_bits(train_on_gpu):
    options = {"deterministic": True, "dropout": 0.1}
    whole = train_on_gpu("whole", max_iters=20, **options)
    train_on_gpu("halves", max_iters=10, **options)
    assert same(whole, train_on_gpu("halves", max_iters=20, **options))


def test_two_ranks_on_one_card_train_as_one_does(train_on_gpu):
    options = {"max_iters": 10, "compile": False, "dtype": "float32"}
    _, one = train_on_gpu("one", **options)
    _, two = train_on_gpu("two", ranks=2, backend="gloo", **options)
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("options", [{"optimizer": "muon"}, {"dtype": "float16"}])
def test_the_loss_falls(train_on_gpu, options):
    _, losses = train_on_gpu("out", max_iters=20, compile=False, **options)
    assert losses[-1] < losses[0] - 0.1
