"""The scripts as a person runs them: commands in a folder."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TEXT, flags, metrics

EXTRAS = sorted(f"extras.{path.stem}" for path in (ROOT / "extras").glob("[!_]*.py"))


def fails(done):
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def test_prepare_train_and_sample(call):
    Path("play.txt").write_text(TEXT * 5, encoding="utf-8")
    done = call("prepare_data.py", "play", "--input", "play.txt", "--tokenizer=byte")
    assert done.returncode == 0 and "data/play: " in done.stdout and "from play.txt" in done.stdout
    done = call("train.py", *flags(dataset="play", out_dir="play"))
    assert done.returncode == 0 and "step 6/6" in done.stdout, done.stderr
    done = call("train.py", *flags(max_iters=100, eval_interval=100))
    assert done.returncode == 0, done.stderr

    shutil.move("out", "elsewhere")  # a checkpoint is all that sampling needs
    shutil.rmtree("data")
    sample = "sample.py", "--out_dir=elsewhere", "--device=cpu", "--max_new_tokens=60"
    done = call(*sample, "--prompt=Whether 'tis", "--temperature=0")
    assert done.returncode == 0 and done.stdout.startswith("Whether 'tis no"), done.stderr
    assert len(done.stdout) == len("Whether 'tis") + 60 + 1  # the text and nothing else
    assert "tokens/s" in done.stderr and "step 100" in done.stderr
    Path("prompt.txt").write_text("Whether 'tis", encoding="utf-8")
    again = call(*sample, "--prompt_file=prompt.txt", "--temperature=0")
    assert again.stdout == done.stdout

    both = call(*sample, "Whether 'tis", "--temperature=0", "be")
    assert both.stdout.startswith(f"{done.stdout}---------------\nbe")
    told = call(*sample, r"--prompt=the\n")
    assert "a line break comes from --prompt_file" in told.stderr

    assert "'☃' (U+2603)" in fails(call(*sample, "--prompt=the ☃"))


def test_the_scripts_are_commands(run):
    """The one test that starts each as a process, with a pipe for its input and output."""
    done = run("prepare_data.py", "play", "--input", "tiny.txt")
    assert done.returncode == 0, done.stderr
    done = run("train.py", *flags(dataset="play"))
    assert done.returncode == 0 and "step 6/6" in done.stdout, done.stderr
    options = ["--device=cpu", "--prompt_file=-", "--max_new_tokens=20"]
    done = run("sample.py", *options, input="Whether 'tis")
    assert done.returncode == 0 and done.stdout.startswith("Whether 'tis"), done.stderr


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_data.py", *EXTRAS])
def test_help_lists_the_settings(call, script):
    done = call(script, "--help")
    assert done.returncode == 0 and "--" in done.stdout, done.stderr


def test_mistakes_are_answered_before_any_work(call):
    assert "did you mean --learning_rate?" in fails(call("train.py", "--learnin_rate=1"))
    assert "expected a whole number" in fails(call("train.py", *flags(batch_size=1.5)))
    assert "config/shakespeare.py" in fails(call("train.py"))  # the defaults' data is not here
    message = fails(call("prepare_data.py", "mine"))
    assert "only shakespeare and python_docs need no --input" in message
    done = call("train.py", "--out_dir=nowhere")
    assert "note: no run in nowhere to resume" in done.stderr and done.returncode == 2
    assert not Path("out").exists()


def test_the_configs_are_settings(call):
    for path in sorted((ROOT / "config").glob("[!_]*.py")):
        done = call("train.py", path, "--dataset=nowhere", "--device=cpu", "--init_from=scratch")
        assert done.returncode == 2 and done.stderr.startswith("error: no data/nowhere")


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one(run):
    for compile in (True, False):
        done = run("train.py", *flags(out_dir=f"out{compile}", compile=compile))
        assert done.returncode == 0 and "not compiling" not in done.stdout, done.stderr
    for compiled, eager in zip(metrics("outTrue"), metrics("outFalse"), strict=True):
        key = "loss" if "loss" in eager else "val_loss"
        assert compiled[key] == pytest.approx(eager[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="looks for a compiler otherwise")
def test_without_a_compiler_training_goes_on_eagerly(run):
    env = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": os.getcwd()}
    done = run("train.py", *flags(compile=True), env=env)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("not compiling")]
    assert "step 6/6" in done.stdout
