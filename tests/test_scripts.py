"""The scripts as a person runs them: commands in a folder."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TEXT, flags

EXTRAS = sorted(f"extras.{path.stem}" for path in (ROOT / "extras").glob("[!_]*.py"))


def fails(done):
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


@pytest.fixture
def trained(run):
    done = run("train.py", *flags(max_iters=100, eval_interval=100))
    assert done.returncode == 0, done.stderr
    return done


def test_prepare_train_and_sample(run, trained):
    Path("play.txt").write_text(TEXT * 5, encoding="utf-8")
    done = run("prepare_data.py", "play", "--input", "play.txt", "--tokenizer=byte")
    assert done.returncode == 0 and "data/play: " in done.stdout and "from play.txt" in done.stdout
    done = run("train.py", *flags(dataset="play", out_dir="play"))
    assert done.returncode == 0 and "step 6/6" in done.stdout, done.stderr

    shutil.move("out", "elsewhere")  # a checkpoint is all that sampling needs
    shutil.rmtree("data")
    sample = "sample.py", "--out_dir=elsewhere", "--device=cpu", "--max_new_tokens=60"
    done = run(*sample, "--prompt=Whether 'tis", "--temperature=0")
    assert done.returncode == 0 and done.stdout.startswith("Whether 'tis no"), done.stderr
    assert len(done.stdout) == len("Whether 'tis") + 60 + 1  # the text and nothing else
    assert "tokens/s" in done.stderr and "step 100" in done.stderr
    Path("prompt.txt").write_text("Whether 'tis", encoding="utf-8")
    assert run(*sample, "--prompt_file=prompt.txt", "--temperature=0").stdout == done.stdout
    assert run(*sample, "--prompt_file=-", "--temperature=0", input="Whether 'tis").stdout == done.stdout

    assert "'☃' (U+2603)" in fails(run(*sample, "--prompt=the ☃"))


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_data.py"])
def test_help_lists_the_settings(run, script):
    done = run(script, "--help")
    assert done.returncode == 0 and "Settings:" in done.stdout, done.stderr


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", EXTRAS)
def test_help_lists_the_settings_of_other_jobs(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(name, run_name="__main__")
    assert exit.value.code == 0 and "Settings:" in capsys.readouterr().out


def test_mistakes_are_answered_before_any_work(run):
    assert "did you mean --learning_rate?" in fails(run("train.py", "--learnin_rate=1"))
    assert "expected a whole number" in fails(run("train.py", *flags(batch_size=1.5)))
    assert "config/shakespeare.py" in fails(run("train.py"))  # the defaults' data is not here
    assert "only shakespeare and python_docs need no --input" in fails(run("prepare_data.py", "mine"))
    assert not Path("out").exists()


def test_the_configs_are_settings(run):
    for path in sorted((ROOT / "config").glob("[!_]*.py")):
        done = run("train.py", path, "--dataset=nowhere", "--device=cpu")
        assert done.returncode == 2 and done.stderr.startswith("error: no data/nowhere")


def test_a_compiled_run_equals_an_eager_one(run):
    for compile in (True, False):
        done = run("train.py", *flags(out_dir=f"out{compile}", compile=compile))
        assert done.returncode == 0 and "not compiling" not in done.stdout, done.stderr
    lines = [Path(f"out{compile}/metrics.jsonl").read_text().splitlines() for compile in (True, False)]
    for compiled, eager in zip(*lines, strict=True):
        compiled, eager = json.loads(compiled), json.loads(eager)
        loss = "loss" if "loss" in eager else "val_loss"
        assert compiled[loss] == pytest.approx(eager[loss], rel=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="looks for a compiler otherwise")
def test_without_a_compiler_training_goes_on_eagerly(run):
    done = run("train.py", *flags(compile=True), env={"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": os.getcwd()})
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("not compiling")]
    assert "step 6/6" in done.stdout
