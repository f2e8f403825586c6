"""extras/check.py: overfit one batch, and look at each layer."""

import os
from pathlib import Path

import pytest
import torch
from conftest import TINY

from extras.check import STATISTICS, Watch, check
from model import GPTConfig, MiniGPT
from support.settings import UserError
from train import Settings


def test_overfitting_nears_zero_on_one_batch_and_writes_nothing(workdir, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    settings = TINY | {"max_iters": 150, "dropout": 0.2, "gradient_accumulation_steps": 3}
    assert check(Settings(**settings)) < 0.2
    printed = capsys.readouterr().out
    assert "passed" in printed
    assert printed.count("activation    gradient      weight      update") == 2
    assert printed.count("h.1 ") == 2
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert os.getcwd() == str(workdir)


def test_a_model_that_cannot_learn_fails_and_says_where_to_look(workdir, monkeypatch):
    block = MiniGPT.forward

    def without_gradient(self, idx, targets=None, cache=None):
        self.wte.requires_grad_(False)
        self.h.requires_grad_(False)
        self.wpe.requires_grad_(False)
        return block(self, idx, targets, cache)

    monkeypatch.setattr(MiniGPT, "forward", without_gradient)
    with pytest.raises(UserError, match=r"failed: loss .* reaches embedding, h.0, h.1: look there"):
        check(Settings(**TINY | {"max_iters": 5}))


def test_layer_statistics_are_root_mean_squares():
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(16, 65, 2, 2, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    idx = torch.randint(65, (3, 16))
    before = torch.cat([p.detach().clone().flatten() for p in model.h[0].parameters()])
    outputs = []
    model.h[0].register_forward_hook(lambda module, args, x: outputs.append(x))
    watch = Watch(model)
    model(idx, idx)[1].backward()
    watch.before_update()
    optimizer.step()
    table = watch.table()
    assert list(table) == ["embedding", "h.0", "h.1", "ln_f"]
    gradient = torch.cat([p.grad.flatten() for p in model.h[0].parameters()])
    weight = before - 0.1 * gradient
    rms = [v.square().mean().sqrt().item() for v in (outputs[0], gradient, weight)]
    expected = [*rms, 0.1 * rms[1] / rms[2]]
    assert [table["h.0"][name] for name in STATISTICS] == pytest.approx(expected, rel=1e-3)
