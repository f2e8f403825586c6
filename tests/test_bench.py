"""The benchmark, and the race against nanoGPT, whose place a script of a few lines takes."""

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_scripts import fails

from dev import race
from dev.bench import figure
from dev.race import load_nanogpt
from extras.plot import read_metrics
from model import GPTConfig, MiniGPT
from prepare_data import prepare
from support.checkpoint import read_checkpoint
from support.dataset import open_dataset
from support.settings import read_settings
from train import Settings, evaluate

NANOGPT = """
import shutil, sys
flags = dict(flag.removeprefix("--").split("=") for flag in sys.argv[2:])
open("flags.txt", "w").write(repr(flags))
print("tokens per iteration will be: 768")
print("step 0: train loss 4.1000, val loss 4.2000")
print("iter 0: loss 4.1500, time 31.20ms, mfu -100.00%")
print("step 20: train loss 3.1000, val loss 3.2000")
shutil.copytree("run", flags["out_dir"])
"""  # its train.py, seen from outside


def save_as_nanogpt(model, path):
    """A checkpoint of model as nanoGPT writes it."""
    weights = {f"transformer.{name}": p for name, p in model.state_dict().items()}
    wte = weights["transformer.wte.weight"][: model.config.vocab_size].clone()
    weights["transformer.wte.weight"] = wte
    weights["lm_head.weight"] = wte
    path.parent.mkdir(parents=True)
    torch.save({"model": weights, "model_args": vars(model.config)}, path)


@pytest.mark.slow
def test_the_benchmark_prints_its_table(run):
    flags = ["--rounds=1", "--steps=2", "--device=cpu", "--file=results.jsonl"]
    done = run("dev.bench", "--work=train:char", *flags)
    assert done.returncode == 0, done.stderr
    machine, limits, *_, row, _, legend = done.stdout.splitlines()
    (line,) = map(json.loads, Path("results.jsonl").read_text().splitlines())
    assert line["work"] == "train:char" and line["tokens_per_sec"] > 0
    assert f"torch {torch.__version__}" in machine
    assert torch.backends.cpu.get_cpu_capability() in machine
    assert "GFLOP/s in " in limits and "GB/s of reading" in limits
    work, rows, program, speed, share, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (work, rows, program) == ("train:char", "12", "MiniGPT")
    assert float(speed.split()[0].replace(",", "")) > 0 and share.endswith("%")
    assert "over the rounds" in legend
    assert "there is train:char" in fails(run("dev.bench", "--work=train:moon"))


def test_a_figure_says_how_far_it_can_be_trusted():
    assert figure([100.0, 95.0, 110.0]) == "100.0 (15%)"
    assert figure([1.0, 2.0, 2.1], ".2f") == "2.00 (55%) (!)"
    assert figure([1.0]) == "1.0"


def test_a_model_of_nanogpts_computes_the_same_here(tmp_path):
    model = tiny_model(std=1.0)
    save_as_nanogpt(model, tmp_path / "run" / "ckpt.pt")
    idx = torch.randint(65, (2, 16))
    torch.testing.assert_close(load_nanogpt(tmp_path / "run" / "ckpt.pt")(idx)[0], model(idx)[0])


@pytest.mark.slow
def test_a_matched_race_gives_both_the_same_settings_and_one_yardstick(run):
    prepare("shakespeare", "tiny.txt")
    _, val_tokens, meta = open_dataset("shakespeare")
    folder = Path("nanoGPT")
    model = MiniGPT(GPTConfig(64, meta["vocab_size"], 1, 1, 8, bias=False))
    save_as_nanogpt(model, folder / "run" / "ckpt.pt")
    (folder / "train.py").write_text(NANOGPT, encoding="utf-8")
    flags = "--flags=--max_iters=20 --weight_decay=0.2"
    race = "dev.race", "--recipe=matched", "--rounds=1", f"--nanogpt={folder}", flags
    assert "a clone of nanoGPT" in fails(run(*race))
    (folder / "model.py").touch()
    assert "prepare both from one file" in fails(run(*race))

    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    val_tokens.tofile(data / "val.bin")
    done = run(*race)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    mine, theirs = (row for row in rows if row[0].startswith(("| Mini", "| nano")))
    assert float(theirs[2].split()[0]) == pytest.approx(evaluate(model, val_tokens, 64), abs=1e-3)
    assert float(mine[2].split()[0]) < math.log(meta["vocab_size"])

    config = read_checkpoint("out/race/MiniGPT/last.pt")["config"]
    given = ast.literal_eval((folder / "flags.txt").read_text(encoding="utf-8"))
    theirs = vars(read_settings(Settings, [f"--{key}={value}" for key, value in given.items()], ""))
    different = {key for key in given if config[key] != theirs[key]}
    assert different == {"out_dir", "eval_iters", "max_iters"}
    message = "different: max_iters 20, not 2000, weight_decay 0.2, not 0.1"
    assert done.stdout.splitlines()[-2] == message
    read = [sorted(record.items()) for record in read_metrics("out/race/nanoGPT")]
    expected = [("val_loss", 4.2), ("loss", 4.15), ("val_loss", 3.2)]
    assert [(k, v) for record in read for k, v in record if "loss" in k] == expected


def test_a_race_against_nanogpt_as_published_names_what_differs_from_that():
    flags = ["--out_dir=out", "--dataset=shakespeare", "--eval_iters=40", "--device=cpu"]
    flags += [*race.NANOGPT_GPU.split(), "--dtype=auto", "--weight_decay=0.2"]
    named = race.differences(race.Settings(nanogpt_flags=""), flags).split(", ")
    changed = [difference.split()[0] for difference in named[::2]]
    assert sorted(changed) == ["device", "dtype", "weight_decay"]
