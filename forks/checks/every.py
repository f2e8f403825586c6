"""What every fork must keep, whatever it changes: python -m pytest -p tests.conftest forks/checks/every.py

FORK in the environment names the applied patches ("rmsnorm wsd"); their lines `settings: ...` turn the changes on.
"""

import ast
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import sample
from model import GPTConfig, KVCache, MiniGPT
from support.checkpoint import read_checkpoint
from support.fast import pack
from tests.conftest import ROOT, TINY


def read_settings_of(name):
    """What stands behind `settings:` in a patch, as a dict."""
    lesson = (ROOT / "forks" / f"{name}.patch").read_text("utf-8").partition("\ndiff --git")[0]
    words = " ".join(line for line in lesson.splitlines() if line.startswith("settings:")).split()
    pairs = (word.removeprefix("--").split("=") for word in words if word.startswith("--"))
    return {key: ast.literal_eval(value) for key, value in pairs}


ON = {
    key: value
    for name in os.environ.get("FORK", "").split()
    for key, value in read_settings_of(name).items()
}
OPTIMIZERS = ("adamw", "muon")


def metrics(out_dir, key="loss"):
    records = map(json.loads, Path(out_dir, "metrics.jsonl").read_text("utf-8").splitlines())
    return [record[key] for record in records if key in record]


def same(a, b):
    """Whether two nested structures of tensors are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def small(**changes):
    """A model of random weights with the changes on, none of them zero."""
    torch.manual_seed(0)
    sizes = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32} | changes
    names = {field.name for field in fields(GPTConfig)}
    model = MiniGPT(
        GPTConfig(**sizes, **{key: value for key, value in ON.items() if key in names})
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def continue_without_cache(model, idx, n):
    """The likeliest n tokens after idx, all read anew each time, in the windows that sample.stream documents."""
    size, start = model.config.block_size, max(0, idx.size(1) - model.config.block_size)
    for _ in range(n):
        if idx.size(1) - start > size:
            start = idx.size(1) - size // 2
        idx = torch.cat([idx, model(idx[:, start:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize("chunks", [[1] * 16, [7, 1, 1, 7]])
def test_cached_logits_equal_uncached(chunks):
    model, end = small(), 0
    idx = torch.randint(65, (3, 16))
    cache = KVCache(model.config, 3)
    expected = model(idx)[0]
    for chunk in idx.split(chunks, dim=1):
        logits, end = model(chunk, cache=cache)[0], end + chunk.size(1)
        torch.testing.assert_close(logits, expected[:, end - 1 : end], atol=1e-4, rtol=0)


def test_the_future_does_not_change_the_past():
    model = small()
    idx = torch.randint(65, (1, 16))
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 65
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 9], after[:, 9])


@pytest.mark.parametrize("rows", [1, 3])
def test_text_of_a_packed_model_equals_a_loop_without_a_cache_also_past_block_size(rows):
    model = small()
    idx = torch.randint(65, (rows, 5))
    assert torch.equal(
        sample.generate(pack(model, rows), idx, 40, temperature=0),
        continue_without_cache(model, idx, 40),
    )


def test_a_trained_checkpoint_writes_what_the_trained_model_would(train):
    train(**(ON | {"max_iters": 40, "eval_interval": 40}))
    assert metrics("out")[-1] < metrics("out")[0]
    model, tokenizer, state = sample.load_model("out/last.pt")
    trained = MiniGPT(GPTConfig(**state["model_args"])).eval()
    trained.load_state_dict(state["model"])
    idx = torch.tensor([tokenizer.encode("To be")])
    torch.testing.assert_close(model(idx)[0], trained(idx)[0], atol=1e-4, rtol=0)
    assert torch.equal(
        sample.generate(model, idx, 40, temperature=0), continue_without_cache(trained, idx, 40)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(train, optimizer):
    settings = ON | {"lr_decay_iters": 12, "dropout": 0.2, "optimizer": optimizer}
    train(out_dir="whole", max_iters=12, **settings)
    for stop in (3, 6, 12):
        train(out_dir="parts", max_iters=stop, **settings)
    for name in ("last.pt", "best.pt"):
        whole, parts = (read_checkpoint(f"{out}/{name}") for out in ("whole", "parts"))
        assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])
    assert metrics("whole") == metrics("parts")


def test_two_ranks_equal_one_and_resume_to_the_bit(train, run):
    commands = []
    for optimizer in OPTIMIZERS:
        settings = ON | {"lr_decay_iters": 8, "eval_interval": 4, "optimizer": optimizer}
        train(out_dir=f"{optimizer}/one", max_iters=8, **settings)
        for out, steps in (("two", 8), ("parts", 4), ("parts", 8)):
            command = TINY | settings | {"out_dir": f"{optimizer}/{out}", "max_iters": steps}
            commands.append(" ".join(f"--{key}={value}" for key, value in command.items()))
    done = run("forks/checks/two_ranks.py", *commands)
    assert done.returncode == 0, done.stderr
    for optimizer, rel in zip(
        OPTIMIZERS, (1e-5, 1e-3), strict=True
    ):  # Muon makes more of the last digits
        one, two, parts = (f"{optimizer}/{out}" for out in ("one", "two", "parts"))
        assert metrics(two) == pytest.approx(metrics(one), rel=rel)
        assert metrics(two, "val_loss") == pytest.approx(metrics(one, "val_loss"), rel=rel)
        assert metrics(two) == metrics(parts)
        whole, parts = (read_checkpoint(f"{out}/last.pt") for out in (two, parts))
        assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])


def test_the_commands_train_and_sample(run):
    done = run("train.py", *[f"--{key}={value}" for key, value in (TINY | ON).items()])
    assert done.returncode == 0, done.stderr
    done = run(
        "sample.py",
        "--out_dir=out",
        "--prompt=To be",
        "--max_new_tokens=30",
        "--device=cpu",
        "--num_samples=2",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("To be") and len(done.stdout) > 60
