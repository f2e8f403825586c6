"""extras/plan.py, held against the memory that training really takes."""

import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import train
from extras import plan
from extras.plan import Settings

SIZES = {
    "activations": {"n_layer": 4, "n_embd": 256, "block_size": 256, "batch_size": 8},
    "logits": {"n_layer": 2, "n_embd": 128, "block_size": 128, "batch_size": 3},
}
VOCABULARIES = {"tiny": 23, "gpt2": 50257}


def build(s):
    with torch.device("meta"):
        return train.random_model(s, s.vocab_size)


MEASURE = """
import contextlib, re, sys, train
train.choose_kernels = lambda *_: contextlib.nullcontext()  # a GPU keeps no T x T scores
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
first, *sizes = eval(sys.argv[1])
train.main(train.Settings(**first))  # loads what torch loads late
for size in sizes:
    open("/proc/self/clear_refs", "w").write("5")  # the peak is the present use
    before = peak()
    train.main(train.Settings(**size))
    print("bytes", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_planned_memory_is_within_15_percent_of_what_training_takes(workdir, size):
    Path("data/gpt2").mkdir()
    ids = np.random.default_rng(0).integers(50257, size=600).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        ids.tofile(f"data/gpt2/{name}")
    dataset = "gpt2" if size == "logits" else "tiny"
    s = TINY | SIZES[size] | {"n_head": 4, "max_iters": 2, "eval_iters": 1, "dataset": dataset}
    runs = [s | {"out_dir": f"{on}", "activation_checkpointing": on} for on in (True, False)]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # frees at once
    command = [sys.executable, "-c", MEASURE, repr([TINY | {"max_iters": 1}, *runs])]
    done = subprocess.run(command, env=env, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for run, measured in zip(runs, re.findall(r"bytes (\d+)", done.stdout), strict=True):
        s = Settings(**run, vocab_size=VOCABULARIES[dataset])
        parts = plan.memory(s, build(s), s.batch_size)
        assert int(measured) > 100e6
        assert parts["in all"] * 2**30 == pytest.approx(int(measured), rel=0.15), (parts, measured)


def test_parameters_flops_and_days_are_those_of_gpt2(capsys):
    plan.main(Settings(n_layer=12, bias=True, ranks=8, gpu="A100", peak_share=0.5))
    printed = capsys.readouterr().out
    n = 124_439_808 + (50304 - 50257) * 768  # GPT-2's, and the padding
    assert f"{n:,} parameters" in printed
    flops = 6 * (n - 1024 * 768) + 12 * 12 * 768 * 1024
    rate = 8 * 0.5 * 312e12 / flops
    duration = timedelta(seconds=round(600_000 * 491_520 / rate))
    assert f"{rate:,.0f} tokens/s, 294,912,000,000 tokens in {duration}" in printed


def test_a_small_run_is_measured_on_this_cpu_with_its_datasets_vocabulary(workdir, capsys):
    plan.main(Settings(**(TINY | {"max_iters": 100})))
    printed = capsys.readouterr().out
    assert "vocabulary of data/tiny: 23" in printed and "H100" not in printed
    measured = r"this CPU, measured on a few steps: .* tokens in (\d):(\d\d):(\d\d)"
    found = re.search(measured, printed)
    hours, minutes, _ = map(int, found.groups())
    assert hours == 0 and minutes < 2


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_settings_it_proposes_fit_and_train_on_as_many_sequences(name):
    sizes = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 50257}
    steps = {"batch_size": 16, "gradient_accumulation_steps": 32, "optimizer": name}
    s = Settings(**sizes, **steps)
    model = build(s)
    fits = {}
    for card in (24, 40, 80):
        answer = plan.fitting(s, model, card)
        flags = dict(re.findall(r"--(\w+)=(\w+)", answer))
        fits[card] = "does not fit" not in answer
        if fits[card]:
            rows = int(flags.get("batch_size", 16))
            assert rows * int(flags.get("gradient_accumulation_steps", 32)) == 16 * 32
            proposed = replace(s, activation_checkpointing="activation_checkpointing" in flags)
            assert plan.memory(proposed, model, rows)["in all"] < card
    # 1.6 billion parameters x 18 bytes, with Muon 14
    assert fits == {24: name == "muon", 40: True, 80: True}


def test_a_gpu_of_this_machine_is_planned_for(workdir, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(plan, "pick_device", lambda name: torch.device("cuda"))
    plan.main(Settings(**(TINY | {"max_iters": 100})))
    assert "1 x L4 at 40% of 121 TFLOP/s" in capsys.readouterr().out
