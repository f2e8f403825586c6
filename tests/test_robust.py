"""What must not be lost, and what must not hurt: crashes, signals, full disks, broken numbers, hostile files."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, flags
from test_train import fails, losses, metrics, same

import sample
import train as train_module
from model import MiniGPT
from support.checkpoint import Run, read_checkpoint
from support.settings import one_line_errors, read_settings

linux = pytest.mark.skipif(sys.platform != "linux", reason="sends signals and looks processes up in /proc")
LONG = {"max_iters": 100_000, "eval_interval": 100_000, "save_interval": 1, "log_interval": 1000, "lr_decay_iters": 600}


@pytest.fixture
def start(workdir):
    """start(ranks, key=value, ...) starts train.py and returns the process, once it has saved if it is to wait."""
    started = []

    def start(ranks=1, launcher=(), wait=True, **changes):
        before = Path("out/last.pt").stat().st_mtime_ns if Path("out/last.pt").exists() else 0
        command = [sys.executable]
        if ranks > 1 or launcher:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *(launcher or ["--standalone"])]
        command += [str(ROOT / "train.py"), *flags(**changes)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        started.append(process)
        while (
            wait
            and process.poll() is None
            and (not Path("out/last.pt").exists() or Path("out/last.pt").stat().st_mtime_ns == before)
        ):
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill_all(process)
        process.stdout.close()


def ranks_of(process):
    """The processes of the ranks that torchrun started, in the order of their ranks."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    pids = [int(pid) for pid in children.stdout.split()]
    rank = lambda pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1].split(b"\0")[0]  # noqa: E731
    return sorted((pid for pid in pids if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()), key=rank)


def kill_all(process):
    """kill -9 for a job's ranks, in any order, and for torchrun."""
    pids = ranks_of(process)
    for pid in (*random.sample(pids, len(pids)), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_everything_saved(start, number):
    process = start(**LONG)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == -number  # what the shell shows as 128 + number
    step = torch.load("out/last.pt")["step"]
    assert f"interrupted: saved at step {step}; run the same command to resume" in printed
    assert "Traceback" not in printed


@linux
def test_a_second_interrupt_ends_at_once(start):
    process = start(**(LONG | {"gradient_accumulation_steps": 1_000_000}), wait=False)
    for line in process.stdout:
        if line.startswith("step: "):
            break
    time.sleep(1)  # it is within its first step, which takes minutes
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(timeout=10)
    assert process.returncode == -signal.SIGINT


@linux
def test_two_ranks_stop_at_the_same_step_and_go_on(start, run):
    process = start(2, **LONG)
    os.kill(ranks_of(process)[1], signal.SIGTERM)  # one of them is enough
    printed, _ = process.communicate(timeout=60)
    step = torch.load("out/last.pt")["step"]
    assert f"interrupted: saved at step {step}" in printed
    done = run("train.py", *flags(**(LONG | {"max_iters": step + 2})), ranks=2)
    assert done.returncode == 0 and f"resuming out/last.pt at step {step}" in done.stdout, done.stderr


@linux
@pytest.mark.slow  # two agents, below, do the same and more
def test_a_killed_rank_restarts_the_job_which_ends_with_the_same_bits(start, run):
    steps = LONG | {"max_iters": 600, "out_dir": "whole"}
    assert run("train.py", *flags(**steps), ranks=2).returncode == 0
    process = start(2, ["--standalone", "--max-restarts=3"], **(steps | {"out_dir": "out", "init_from": "scratch"}))
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming out/last.pt" in printed, printed
    whole, parts = torch.load("whole/last.pt"), torch.load("out/last.pt")
    assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])


@linux
@pytest.mark.slow
def test_two_agents_train_as_two_nodes_do(start, run):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
                "--local_addr=127.0.0.1", "--max-restarts=3"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", *launcher, str(ROOT / "train.py")]
    steps = LONG | {"max_iters": 600}
    assert run("train.py", *flags(**(steps | {"out_dir": "whole"})), ranks=2).returncode == 0
    second = subprocess.Popen([*command, *flags(**steps)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = start(1, launcher, **steps)
    os.kill(ranks_of(first)[0], signal.SIGKILL)
    first_printed, second_printed = first.communicate(timeout=150)[0], second.communicate(timeout=150)[0]
    assert first.returncode == second.returncode == 0, first_printed + second_printed
    assert "resuming out/last.pt" in first_printed + second_printed
    assert same(torch.load("whole/last.pt")["model"], torch.load("out/last.pt")["model"])


@linux
def test_ranks_that_do_not_see_the_same_run_are_told(train, workdir):
    """As on machines that do not share a file system: rank 1 works in a folder of its own."""
    train()
    Path("elsewhere").mkdir()
    Path("elsewhere/data").symlink_to(workdir / "data")
    Path("apart.py").write_text(
        "import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "if os.environ['RANK'] == '1': os.chdir('elsewhere')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "apart.py"]
    command += [str(ROOT / "train.py"), *flags(max_iters=9)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "not all ranks found the same out/last.pt" in done.stderr, done.stderr
    assert torch.load("out/last.pt")["step"] == 6


@linux
@pytest.mark.slow  # torchrun waits 30 s for a rank to end before it kills it
def test_a_rank_that_hangs_ends_the_job_within_the_timeout(start):
    process = start(2, timeout=3, **LONG)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    begun = time.monotonic()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - begun < 60
    assert "advice: " in printed and "--timeout" in printed, printed


@linux
def test_a_rank_that_hears_nothing_of_another_ends_within_the_timeout(start):
    process = start(2, timeout=3, **LONG)
    hanging = ranks_of(process)[1]
    os.kill(hanging, signal.SIGSTOP)
    begun, printed = time.monotonic(), ""
    while "--timeout" not in printed and process.poll() is None:
        printed += process.stdout.readline()
    assert "advice: " in printed and "--timeout" in printed, printed
    assert time.monotonic() - begun < 30
    os.kill(hanging, signal.SIGKILL)  # which torchrun would do half a minute later
    assert process.wait(timeout=60) != 0


@linux
def test_a_second_run_in_the_same_folder_is_refused(start, run):
    process = start(**LONG)
    refused = run("train.py", *flags(**LONG))
    assert refused.returncode == 2 and "another process is writing to out" in refused.stderr
    assert process.poll() is None
    process.kill()  # the lock does not outlive it
    process.wait()
    step = torch.load("out/last.pt")["step"]
    assert run("train.py", *flags(**(LONG | {"max_iters": step + 1}))).returncode == 0


@linux
def test_a_full_disk_fails_the_save_but_not_the_run(start, run):
    """The limit on a file's size stands for the disk: the checkpoint does not fit, the metrics do."""
    limited = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.argv = sys.argv[1:]; "
    limited += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    assert run("train.py", *flags()).returncode == 0
    before = Path("out/last.pt").read_bytes()
    done = subprocess.run([sys.executable, "-c", limited, str(ROOT / "train.py"), *flags(max_iters=12)],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in errors) and "Traceback" not in done.stderr
    assert sum("can't save out/last.pt" in line for line in errors) == 2  # at 9 and at 12
    assert "could not be saved" in errors[-1] and "step 12/12 | loss" in done.stdout
    assert Path("out/last.pt").read_bytes() == before
    assert not list(Path("out").glob("*.tmp"))
    assert run("train.py", *flags(max_iters=12)).returncode == 0


def test_metrics_that_cannot_be_written_leave_no_half_line(train, monkeypatch, capsys):
    opened = Path.open

    def full(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        if self.name == "metrics.jsonl" and mode == "a" and '"step": 3' in self.read_text():
            file.write('{"step": 4, "lo')
            file.close()
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full)
    train()
    assert "can't write out/metrics.jsonl" in capsys.readouterr().err
    assert [record["step"] for record in metrics()] == [1, 2, 3]


@pytest.fixture
def broken(monkeypatch):
    """broken(calls) makes the loss NaN at these forward passes in train mode."""

    def broken(calls):
        forward, count = MiniGPT.forward, iter(range(10**9))

        def nan(self, idx, targets=None, cache=None):
            logits, loss = forward(self, idx, targets, cache)
            return logits, loss * float("nan") if self.training and next(count) in calls else loss

        monkeypatch.setattr(MiniGPT, "forward", nan)

    return broken


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"dtype": "float16"}, {"dtype": "bfloat16"}])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(train, broken, capsys, options):
    train(max_iters=3, lr_decay_iters=4, gradient_accumulation_steps=1, **options)
    before = torch.load("out/last.pt")
    broken([0])
    train(max_iters=4, lr_decay_iters=4, gradient_accumulation_steps=1, **options)
    after = torch.load("out/last.pt")
    assert same(before["model"], after["model"]) and after["step"] == 4
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert "1 skipped: gradient not finite" in capsys.readouterr().out
    assert metrics()[-2]["loss"] is None
    scale = before["scaler"]["scale"]
    assert after["scaler"]["scale"] == (scale / 2 if options.get("dtype") == "float16" else scale == 1.0)


def test_a_run_survives_a_few_broken_steps_and_ends_after_three_broken_log_lines(train, broken, capsys):
    broken({3, 4, 7})
    train(max_iters=6, gradient_accumulation_steps=1)
    assert torch.load("out/last.pt")["step"] == 6
    broken(range(1000))
    before = Path("out/last.pt").read_bytes()
    message = fails(capsys, train, max_iters=20, eval_interval=20, gradient_accumulation_steps=1)
    assert "not finite in three log lines in a row, to step 9" in message and "--learning_rate" in message
    assert Path("out/last.pt").read_bytes() == before


def test_weights_that_are_not_finite_are_never_saved(train, capsys):
    message = fails(capsys, train, learning_rate=1e38, grad_clip=0.0, log_interval=1000, warmup_iters=0)
    assert "weights are not finite" in message
    assert not list(Path("out").glob("*.pt*"))


@linux
def test_two_ranks_skip_the_same_step(workdir):
    Path("broken.py").write_text(
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "import model, train\n"
        "from support.settings import read_settings\n"
        "forward, count = model.MiniGPT.forward, iter(range(10**9))\n"
        "def nan(self, *args, **kwargs):\n"
        "    logits, loss = forward(self, *args, **kwargs)\n"
        "    bad = self.training and next(count) == 2 and os.environ['RANK'] == '1'\n"
        "    return logits, loss * float('nan') if bad else loss\n"
        "model.MiniGPT.forward = nan\n"
        "train.main(read_settings(train.Settings, sys.argv[2:], ''))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "broken.py", ROOT]
    done = subprocess.run([*map(str, command), *flags()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 skipped: gradient not finite" in done.stdout


def test_a_run_is_deterministic(train):
    for out_dir in ("one", "two"):
        train(out_dir=out_dir, dropout=0.1, deterministic=out_dir == "two")
    torch.use_deterministic_algorithms(False)
    assert same(torch.load("one/last.pt")["model"], torch.load("two/last.pt")["model"])
    assert losses("one") == losses("two")


@linux
@pytest.mark.slow
def test_one_two_and_one_ranks_in_turn_make_the_same_run(run):
    steps = {"max_iters": 21, "lr_decay_iters": 21, "eval_interval": 7}
    assert run("train.py", *flags(**steps, out_dir="whole")).returncode == 0
    for stop, ranks in ((7, 1), (14, 2), (21, 1)):
        assert run("train.py", *flags(**(steps | {"max_iters": stop})), ranks=ranks).returncode == 0
    assert losses("out") == pytest.approx(losses("whole"), rel=1e-5)


def test_saves_come_by_steps_and_by_minutes(train, monkeypatch):
    saved = []
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda run, name, s: (saved.append((name, s["step"])), save(run, name, s)))
    train(save_interval=2, max_iters=5, eval_interval=100)
    assert saved == [("last.pt", 2), ("last.pt", 4), ("best.pt", 5), ("last.pt", 5)]
    saved.clear()
    train(save_minutes=0.0, max_iters=7, eval_interval=100)
    assert saved[0] == ("last.pt", 6)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


@pytest.mark.parametrize("form", ["pickle", "torch", "zip"])
def test_a_malicious_checkpoint_runs_no_code(train, capsys, form):
    train()
    if form == "pickle":
        Path("out/last.pt").write_bytes(pickle.dumps(Malicious()))
    elif form == "torch":
        torch.save(torch.load("out/last.pt") | {"step": Malicious()}, "out/last.pt")
    else:  # a small file that would take gigabytes
        with zipfile.ZipFile("out/last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 100_000_000)
    assert "not a whole checkpoint" in fails(capsys, train)
    assert not Path("code_was_run").exists()


def test_data_that_was_prepared_anew_since_the_run_began_is_refused(train, capsys):
    import prepare_data

    train()
    prepare_data.prepare("tiny", "tiny.txt", "byte")
    assert "is a different text" in fails(capsys, train, max_iters=9)
    Path("tiny.txt").write_text(Path("tiny.txt").read_text().replace("To be", "To do"))
    prepare_data.prepare("tiny", "tiny.txt")
    assert "is a different text" in fails(capsys, train, max_iters=9)


def test_token_ids_past_the_vocabulary_are_found(train, capsys):
    np.full(3060, 23, "<u2").tofile("data/tiny/train.bin")
    assert "token id 23, outside the vocabulary of 23" in fails(capsys, train)


# ------------------------------------------------------------------------------------------------- mutated inputs


def mutate_bytes(data, rng):
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:
        at = rng.randrange(len(data))
        return bytes(data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 50))) + data[at:])
    return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))


WRONG = [None, True, -1, 0, 3, 2**40, 10**30, 0.5, float("nan"), "", "gpt2", "../../etc", "é☃\0", {}, [], [1], {"a": 1}]


def mutate_value(value, rng):
    """A copy of a nested value in which one thing is replaced or removed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value, key = dict(value), rng.choice(list(value))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = mutate_value(value[key], rng)
        return value
    return rng.choice(WRONG)


def mutate_command_line(rng):
    arguments = flags(out_dir="mutated")
    for _ in range(rng.randrange(1, 3)):
        key, _, value = rng.choice(arguments)[2:].partition("=")
        strange = ["", "0", "-1", "1.5", "1e400", "nan", "None", "True", "x", "9" * 5000, "((((", "'", "../x"]
        value = rng.choice([*strange, value])
        arguments.append(rng.choice([f"--{key}={value}", f"--{key}x={value}", f"--{key}", f"{value}.py", f"-{key}"]))
    return arguments


def survives(capsys, action):
    """Run action; it either works or ends with status 2 and one line that begins with error:."""
    capsys.readouterr()
    try:
        with one_line_errors():
            action()
    except SystemExit as exit:
        lines = capsys.readouterr().err.splitlines()
        assert exit.code == 2
        assert lines and lines[-1].startswith("error: "), lines
        assert len([line for line in lines if line.startswith("error: ")]) == 1
        return False
    return True


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_inputs_end_with_one_line(train, capsys, count):
    train()
    good = {path: path.read_bytes() for path in (*Path("out").glob("*.pt"), *Path("data/tiny").iterdir())}
    meta = json.loads(good[Path("data/tiny/meta.json")])
    worked, problems = 0, []
    for number in range(count):
        rng = random.Random(number)
        for kind in ("checkpoint bytes", "meta bytes", "meta", "tokens", "command line"):
            for path, data in good.items():
                path.write_bytes(data)
            arguments = flags(max_iters=7, eval_interval=7)
            if kind == "checkpoint bytes":
                Path("out/last.pt").write_bytes(mutate_bytes(good[Path("out/last.pt")], rng))
            elif kind == "meta bytes":
                Path("data/tiny/meta.json").write_bytes(mutate_bytes(good[Path("data/tiny/meta.json")], rng))
            elif kind == "meta":
                Path("data/tiny/meta.json").write_text(json.dumps(mutate_value(meta, rng)))
            elif kind == "tokens":
                path = rng.choice([Path("data/tiny/train.bin"), Path("data/tiny/val.bin")])
                path.write_bytes(mutate_bytes(good[path], rng))
            else:
                arguments = mutate_command_line(rng)
            actions = []
            if "checkpoint" in kind:
                options = sample.Settings(checkpoint="last.pt", device="cpu", max_new_tokens=3)
                actions.append(lambda options=options: sample.main(options))
            elif kind != "command line":
                arguments[arguments.index("--out_dir=out")] = "--out_dir=mutated"

            def start(arguments=arguments):
                train_module.main(read_settings(train_module.Settings, arguments, ""))

            for action in (*actions, start):
                try:
                    worked += survives(capsys, action)
                except BaseException as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    problems.append(f"{kind}, seed {number}: {type(error).__name__}: {error} {where}")
            for path in Path("mutated").glob("*"):
                path.unlink()
    assert not problems, "\n".join(problems)
    assert 0 < worked < 6 * count


# ------------------------------------------------------------------------------------------------------- the soak


@linux
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills_at_random_moments_change_no_bit(start, run, ranks):
    steps = LONG | {"max_iters": 3000, "dropout": 0.1}
    assert run("train.py", *flags(**(steps | {"out_dir": "whole"})), ranks=ranks).returncode == 0
    rng = random.Random(ranks)
    in_a_save = 0
    for kill in range(20):
        process = start(ranks, **steps)
        assert process.poll() is None, f"ended before kill {kill}"
        time.sleep(rng.uniform(0, 0.5))
        kill_all(process)
        in_a_save += Path("out/last.pt.tmp").exists()
        read_checkpoint(Path("out/last.pt"))  # whole
    assert in_a_save >= 3
    assert run("train.py", *flags(**steps), ranks=ranks).returncode == 0
    for name in ("last.pt", "best.pt"):
        whole, parts = torch.load(f"whole/{name}"), torch.load(f"out/{name}")
        assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])
    for one, other in zip(metrics("whole"), metrics("out"), strict=True):
        assert all(one[k] == other[k] for k in one if k in ("step", "loss", "lr", "grad_norm", "val_loss"))
