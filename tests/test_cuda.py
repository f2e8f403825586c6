"""What only a GPU can show: numbers, decoding by CUDA graphs, train.py. Three minutes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model

from sample import generate
from support.fast import CompiledDecoder
from support.kernels import choose_kernels
from support.muon import orthogonal
from train import Settings, make_optimizer

DEVICE = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


def model(**changes):
    sizes = {"block_size": 256, "vocab_size": 1001, "n_head": 4, "n_embd": 256}
    return tiny_model(**(sizes | changes))


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
@pytest.mark.parametrize("dtype, error", [("float32", 1e-3), ("bfloat16", 3e-2), ("float16", 3e-2)])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_generate_what_eager_does(dtype):
    """Text after text, also one longer than block_size, from one decoder."""
    gpt = model(block_size=128, n_layer=3).to(DEVICE, dtype).eval()
    with torch.no_grad():
        gpt.wte.weight.mul_(20)  # far-apart logits: no near-ties between two kernels
    decoder = CompiledDecoder(gpt)
    for prompt_length in (3, 3, 40):
        idx = torch.randint(1001, (2, prompt_length), device=DEVICE)
        eager = generate(gpt, idx, 150, temperature=0)
        graph = generate(decoder, idx, 150, temperature=0)
        agreeing = (eager == graph).float().mean()
        assert agreeing == 1 or (dtype == torch.bfloat16 and agreeing > 0.5)


@pytest.fixture
def data(tmp_path):
    """A folder with data/day, GPT-2's vocabulary with frequencies like those of words."""
    random = np.random.default_rng(0)
    folder = tmp_path / "data" / "gpt2_day"
    folder.mkdir(parents=True)
    for split, n in (("train", 2_000_000), ("val", 100_000)):
        (random.zipf(1.3, n) % 50257).astype("<u2").tofile(folder / f"{split}.bin")
    return tmp_path


def train(folder, out_dir, *flags, ranks=1):
    """Run train.py in folder on one GPU. Returns the weights and the training losses."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / "train.py"), f"--out_dir={out_dir}", "--dataset=gpt2_day"]
    command += ["--n_layer=2", "--n_head=2", "--n_embd=128", "--block_size=128", "--batch_size=8"]
    command += ["--gradient_accumulation_steps=2", "--log_interval=1", "--eval_interval=20"]
    command += ["--eval_iters=4", "--warmup_iters=4", "--lr_decay_iters=20", "--device=cuda:0"]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run([*command, *flags], cwd=folder, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    from extras.plot import read_metrics

    state = torch.load(Path(folder, out_dir, "last.pt"), weights_only=True, map_location="cpu")
    records = read_metrics(Path(folder, out_dir))
    return state["model"], [record["loss"] for record in records if "loss" in record]


def test_a_resumed_run_ends_with_the_same_bits(data):
    flags = ["--deterministic=True", "--dropout=0.1"]
    whole, losses = train(data, "whole", "--max_iters=20", *flags)
    train(data, "halves", "--max_iters=10", *flags)
    halves, same_losses = train(data, "halves", "--max_iters=20", *flags)
    assert losses == same_losses
    for name, weight in whole.items():
        assert torch.equal(weight, halves[name])


def test_two_ranks_on_one_card_train_as_one_does(data):
    flags = ["--max_iters=10", "--compile=False", "--dtype=float32"]
    _, one = train(data, "one", *flags)
    _, two = train(data, "two", "--backend=gloo", *flags, ranks=2)
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("flag", ["--optimizer=muon", "--dtype=float16"])
def test_the_loss_falls(data, flag):
    _, losses = train(data, "out", "--max_iters=20", "--compile=False", flag)
    assert losses[-1] < losses[0] - 0.1
