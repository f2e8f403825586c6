"""extras/check.py: overfit one batch, and look at each layer."""

import os

import pytest
import torch
from conftest import TINY, assert_refused, stamps, tiny_model

from extras.check import STATISTICS, Watch, check
from model import MiniGPT
from train import Settings


def test_overfitting_nears_zero_on_one_batch_and_writes_nothing(workdir, capsys):
    before = stamps(workdir)
    settings = TINY | {"max_iters": 150, "dropout": 0.2, "gradient_accumulation_steps": 3}
    assert check(Settings(**settings)) < 0.2
    printed = capsys.readouterr().out
    assert "passed" in printed
    assert printed.count("activation    gradient      weight      update") == 2
    assert printed.count("h.1 ") == 2
    assert stamps(workdir) == before
    assert os.getcwd() == str(workdir)


def test_a_model_that_cannot_learn_fails_and_says_where_to_look(workdir, monkeypatch):
    forward = MiniGPT.forward

    def without_gradient(self, *args, **kwargs):
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith("ln_f"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MiniGPT, "forward", without_gradient)
    assert_refused("reaches embedding, h.0, h.1: look", check, Settings(**TINY | {"max_iters": 5}))


def test_layer_statistics_are_root_mean_squares():
    model = tiny_model().train()
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
