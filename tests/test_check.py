"""extras/check.py: overfit one batch, and look at each layer."""

import os
from pathlib import Path

import pytest
import torch
from conftest import TINY

from extras.check import STATISTICS, check, watch
from model import GPTConfig, MiniGPT
from train import Settings


def test_overfitting_nears_zero_on_one_batch_and_writes_nothing(workdir, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    changes = {"max_iters": 150, "dropout": 0.2, "log_interval": 150, "gradient_accumulation_steps": 3}
    check(Settings(**(TINY | changes)))
    printed = capsys.readouterr().out
    assert float(printed.partition("validation loss ")[2].split()[0]) < 0.5
    assert printed.count("activation    gradient      weight      update") == 2 == printed.count("h.1 ")
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before and os.getcwd() == str(workdir)


def test_layer_statistics_are_root_mean_squares():
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(16, 65, 2, 2, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    idx = torch.randint(65, (3, 16))
    before = [p.detach().clone() for p in model.h[0].parameters()]
    returned, tables = [], []
    model.h[0].register_forward_hook(lambda module, args, x: returned.append(x))
    watch(model, optimizer, lambda step, table: tables.append((step, table)))
    model(idx, idx)[1].backward()
    optimizer.step()
    assert [step for step, _ in tables] == [1]
    assert list(tables[0][1]) == ["embedding", "h.0", "h.1", "ln_f"]
    gradient = torch.cat([p.grad.flatten() for p in model.h[0].parameters()])
    weight = torch.cat([p.flatten() for p in before]) - 0.1 * gradient
    rms = [v.square().mean().sqrt().item() for v in (returned[0], gradient, weight)]
    expected = [*rms, 0.1 * rms[1] / rms[2]]
    assert [tables[0][1]["h.0"][name] for name in STATISTICS] == pytest.approx(expected, rel=1e-3)
