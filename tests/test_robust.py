"""What must not be lost, and what must not hurt: crashes, signals, full disks, hostile files."""

import json
import math
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SIGNALS, assert_same_run, flags, losses, metrics, same

import sample
import train as train_module
from model import MiniGPT
from support.checkpoint import Run, lock
from support.runtime import Ranks, StopSignals
from support.settings import run_script

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses signals, /proc and /dev/full")
LONG = {"max_iters": 100_000, "eval_interval": 100_000, "save_interval": 1}
LONG |= {"log_interval": 1000, "lr_decay_iters": 600}


@pytest.fixture
def start(workdir):
    """start(ranks, key=value, ...) starts train.py and returns the process once it has saved."""
    started = []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}

    def saved():
        path = Path("out/last.pt")
        return path.stat().st_mtime_ns if path.exists() else 0

    def start(ranks=1, launcher=(), wait=True, **changes):
        before = saved()
        command = [sys.executable]
        if ranks > 1 or launcher:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
            command += launcher or ["--standalone"]
        command += [str(ROOT / "train.py"), *flags(**changes)]
        process = subprocess.Popen(command, text=True, **options)
        started.append(process)
        while wait and process.poll() is None and saved() == before:
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill_all(process)
        process.stdout.close()


def ranks_of(process):
    """The processes of the ranks that torchrun started, in the order of their ranks."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    children = subprocess.run(command, capture_output=True, text=True)
    ranks = {}
    for pid in map(int, children.stdout.split()):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        if b"\0RANK=" in environment:
            ranks[environment.split(b"\0RANK=")[1].split(b"\0")[0]] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def kill_all(process):
    """kill -9 for a job's ranks, in any order, and for torchrun."""
    pids = ranks_of(process)
    random.shuffle(pids)
    for pid in (*pids, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def write_script(name, change):
    """A train.py with a change before it starts: `forward`, a new MiniGPT.forward, or anything."""
    head = "import os, signal, model, train\nfrom support.settings import run_script\n"
    head += "original = model.MiniGPT.forward\ncalls = []\n"
    end = "run_script(train.main, train.Settings, '')\n"
    if "def forward" in change:
        end = f"model.MiniGPT.forward = forward\n{end}"
    Path(name).write_text(f"{head}{change}\n{end}")


@pytest.fixture
def during(monkeypatch):
    """during(phase, calls, change): what change(loss) returns takes the place of the loss in these
    forward passes (0, 1, ...) of "training" or "evaluation", counted from now on."""
    forward = MiniGPT.forward

    def during(phase, calls, change):
        count = iter(range(10**9))

        def changed(self, *args, **kwargs):
            logits, loss = forward(self, *args, **kwargs)
            if self.training == (phase == "training") and next(count) in calls:
                loss = change(loss)
            return logits, loss

        monkeypatch.setattr(MiniGPT, "forward", changed)

    return during


def nan(loss):
    return loss * float("nan")


@pytest.fixture
def heard(restored):
    """The signals that train.py sends to itself at its end, which would end the tests."""
    heard = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: heard.append(number))
    return heard


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_step_with_everything_saved(train, during, heard, capsys, number):
    stop = lambda loss: signal.raise_signal(number) or loss  # noqa: E731
    during("training", [7], stop)  # two forward passes a step
    train(max_iters=100)
    assert heard == [number]  # so that a shell shows 128 + number
    assert torch.load("out/last.pt")["step"] == 4
    printed = capsys.readouterr().out
    assert "interrupted: saved at step 4; run the same command to resume" in printed


def test_a_signal_in_an_evaluation_stops_at_once_and_loses_nothing(train, during, heard):
    train(out_dir="whole", eval_interval=2)
    saved = []

    def interrupt(loss):
        saved.append(torch.load("out/last.pt")["step"])
        signal.raise_signal(signal.SIGTERM)
        return loss

    during("evaluation", [0], interrupt)
    train(eval_interval=2)
    assert saved == [2]  # a save comes before an evaluation
    assert [record["step"] for record in metrics()] == [1, 2]  # the evaluation is dropped
    during("evaluation", [7], interrupt)  # each evaluation has several batches
    train(eval_interval=2)
    assert heard == [signal.SIGTERM, signal.SIGTERM]
    train(eval_interval=2)
    assert_same_run("whole", "out")


STOP_RANK_1 = """
def forward(self, *args, **kwargs):
    if not self.training and os.environ["RANK"] == "1" and not calls:
        calls.append(signal.raise_signal(signal.SIGTERM))
    return original(self, *args, **kwargs)"""


@linux
def test_three_ranks_equal_one_also_when_one_of_them_is_stopped_while_they_evaluate(train, run):
    """The same global batches, so the same losses; gradients are averaged over ranks.

    Of three ranks, as not of two, the sum depends on its order: a resume has to keep that too.
    """
    steps = {"max_iters": 8, "eval_interval": 4, "batch_size": 3, "learning_rate": 1e-3}
    steps |= {"n_embd": 64}
    train(**steps, out_dir="one")
    done = run("train.py", *flags(**steps, out_dir="whole"), ranks=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/8") == 1  # only one rank speaks
    assert losses("one") == pytest.approx(losses("whole"), rel=1e-5)
    last = [metrics(out_dir)[-1]["val_loss"] for out_dir in ("one", "whole")]
    assert last[0] == pytest.approx(last[1], rel=1e-5)

    write_script("stopped.py", STOP_RANK_1)
    done = run("stopped.py", *flags(**steps), ranks=3)
    assert "interrupted: saved at step 4" in done.stdout, done.stderr
    assert [record["step"] for record in metrics()] == [1, 2, 3, 4]
    done = run("train.py", *flags(**steps), ranks=3)
    assert "resuming out/last.pt at step 4" in done.stdout, done.stderr
    assert_same_run("whole", "out")


@linux
def test_under_nohup_a_lost_terminal_stops_nothing(restored):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = StopSignals(Ranks("cpu"))
    signal.raise_signal(signal.SIGHUP)
    assert not signals.agreed()
    signal.raise_signal(signal.SIGTERM)
    assert signals.agreed()


@linux
def test_a_second_interrupt_ends_at_once(start):
    process = start(wait=False, **(LONG | {"gradient_accumulation_steps": 1_000_000}))
    for line in process.stdout:
        if line.startswith("run: "):
            break
    time.sleep(0.5)  # it is within its first step, which takes minutes
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "again to quit without saving" in line:
            break
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(timeout=10)
    assert process.returncode == -signal.SIGINT


# -------------------------------------------------------------------------------------- many ranks


@linux
@pytest.mark.slow
def test_two_nodes_restart_after_a_kill_and_end_with_the_same_bits(start, run):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    launcher += ["--rdzv_id=test", "--local_addr=127.0.0.1", "--max-restarts=3"]
    steps = LONG | {"max_iters": 600}
    whole = steps | {"out_dir": "whole"}
    assert run("train.py", *flags(**whole), ranks=2).returncode == 0
    second = start(1, launcher, wait=False, **steps)
    first = start(1, launcher, **steps)
    os.kill(ranks_of(first)[0], signal.SIGKILL)
    printed = first.communicate(timeout=150)[0] + second.communicate(timeout=150)[0]
    assert first.returncode == second.returncode == 0, printed
    assert "resuming out/last.pt" in printed
    assert_same_run("whole", "out")


@linux
def test_ranks_that_do_not_see_the_same_run_are_told(train, run, workdir):
    """As on machines that do not share a file system: rank 1 works in a folder of its own."""
    train()
    Path("elsewhere").mkdir()
    Path("elsewhere/data").symlink_to(workdir / "data")
    write_script("apart.py", "if os.environ['RANK'] == '1':\n    os.chdir('elsewhere')")
    done = run("apart.py", *flags(max_iters=9), ranks=2)
    assert done.returncode != 0
    assert "not all ranks found the same out/last.pt" in done.stderr, done.stderr
    assert torch.load("out/last.pt")["step"] == 6


@linux
@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_within_the_timeout(start):
    process = start(2, timeout=3, **LONG)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    begun = time.monotonic()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - begun < 60  # torchrun waits 30 s for a rank before it kills it
    assert "advice: " in printed and "--timeout" in printed, printed


NAN_ON_RANK_1 = """
def forward(self, *args, **kwargs):
    logits, loss = original(self, *args, **kwargs)
    calls.append(self.training)
    if sum(calls) == 3 and self.training and os.environ["RANK"] == "1":
        loss = loss * float("nan")
    return logits, loss"""


@linux
@pytest.mark.slow
def test_two_ranks_skip_the_same_step(run):
    write_script("broken.py", NAN_ON_RANK_1)
    done = run("broken.py", *flags(), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "1 skipped: gradient not finite" in done.stdout


# ------------------------------------------------------------------------------- files and folders


def test_a_second_job_in_a_folder_is_refused_before_it_looks_for_a_run(train, refused):
    """Two jobs in one new folder: the second must not begin a run of its own there."""
    Path("out").mkdir()
    with lock(Path("out/lock")):
        Path("out/last.pt").write_bytes(b"what the first job is writing")
        assert "another process is writing to out" in refused()
    Path("out/last.pt").unlink()
    train()  # when the first has ended


def test_a_folder_that_cannot_be_made_is_one_line(refused):
    Path("out").write_text("a file")
    assert "can't write to out" in refused()


LIMIT_FILES = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"""


@linux
def test_a_full_disk_fails_the_save_but_not_the_run(train, run):
    """A limit on the size of files is the disk: the checkpoint does not fit, the metrics do."""
    write_script("limited.py", LIMIT_FILES)
    train()
    before = Path("out/last.pt").read_bytes()
    done = run("limited.py", *flags(max_iters=12))
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in errors), done.stderr
    assert any("can't save out/last.pt" in line for line in errors)
    assert "could not be saved" in errors[-1] and "step 12/12 | loss" in done.stdout
    assert Path("out/last.pt").read_bytes() == before
    assert not list(Path("out").glob("*.tmp"))
    train(max_iters=12)


@linux
def test_a_log_on_a_full_disk_does_not_end_training(run):
    with open("/dev/full", "w") as full:
        done = run("train.py", *flags(), stdout=full)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't print") == 1 == len(done.stderr.splitlines())
    assert len(losses()) == torch.load("out/last.pt")["step"] == 6


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
    assert "can't write out" in capsys.readouterr().err
    assert [record["step"] for record in metrics()] == [1, 2, 3]


def test_saves_come_by_steps_and_by_minutes(train, monkeypatch):
    saved = []
    save = Run.save
    note = lambda run, state: saved.append(state["step"]) or save(run, state)  # noqa: E731
    monkeypatch.setattr(Run, "save", note)
    train(save_interval=2, max_iters=5, eval_interval=100)
    assert saved == [2, 4, 5, 5]  # before the last evaluation and after it
    train(save_minutes=0.0, max_iters=7, eval_interval=100)
    assert saved[4] == 6


# ---------------------------------------------------------------------------------- broken numbers


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"dtype": "float16"}])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(train, during, capsys, options):
    options = options | {"lr_decay_iters": 4, "gradient_accumulation_steps": 1}
    train(max_iters=3, **options)
    before = torch.load("out/last.pt")
    during("training", [0], nan)
    train(max_iters=4, **options)
    after = torch.load("out/last.pt")
    assert same(before["model"], after["model"]) and after["step"] == 4
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert "1 skipped: gradient not finite" in capsys.readouterr().out
    assert metrics()[-2]["loss"] is None
    factor = 2 if options.get("dtype") == "float16" else 1
    assert before["scaler"]["scale"] == factor * after["scaler"]["scale"]


def test_after_three_broken_log_lines_a_run_ends_and_names_the_way_back(train, during, refused):
    during("training", {3, 4, 7}, nan)
    train(max_iters=6, gradient_accumulation_steps=1)  # a few broken steps do no harm
    assert torch.load("out/last.pt")["step"] == 6
    during("training", range(1000), nan)
    before = Path("out/last.pt").read_bytes()
    message = refused(max_iters=20, eval_interval=20, gradient_accumulation_steps=1)
    assert "not finite in three log lines in a row, up to step 9" in message
    assert f"--init_from={Path('out/best.pt')} --out_dir=NEW" in message
    assert "--learning_rate" in message
    assert Path("out/last.pt").read_bytes() == before
    during("training", [], nan)
    train(init_from="out/best.pt", out_dir="NEW", learning_rate=1e-3)
    assert all(math.isfinite(loss) for loss in losses("NEW"))


def test_weights_that_are_not_finite_are_never_saved(refused):
    options = {"learning_rate": 1e38, "grad_clip": 0.0, "warmup_iters": 0, "log_interval": 1000}
    message = refused(**options)
    assert "weights are not finite" in message and "delete out and start over" in message
    assert not list(Path("out").glob("*.pt*"))


def test_a_run_is_deterministic(train):
    train(out_dir="one", dropout=0.1)
    train(out_dir="two", dropout=0.1, deterministic=True)
    assert same(torch.load("one/last.pt")["model"], torch.load("two/last.pt")["model"])


# ----------------------------------------------------------------------------------- hostile files


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


@pytest.mark.parametrize("form", ["cut off", "pickle", "torch", "zip"])
def test_a_damaged_or_malicious_checkpoint_is_refused_and_runs_no_code(train, refused, form):
    train()
    path = Path("out/last.pt")
    if form == "cut off":
        path.write_bytes(path.read_bytes()[:9999])
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    elif form == "torch":
        torch.save(torch.load(path) | {"step": Malicious()}, path)
    else:  # a small file that would take gigabytes
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 100_000_000)
    assert "damaged or not a checkpoint" in refused()
    assert not Path("code_was_run").exists()


# ---------------------------------------------------------------------------------- mutated inputs


def mutate_bytes(data, rng):
    """A part of data, or with other bytes in it, or more, or only random ones."""
    at = rng.randrange(len(data))
    noise = rng.randbytes(rng.randrange(1, 50))
    ends = {"cut": b"", "changed": noise + data[at + len(noise) :], "more": noise + data[at:]}
    kind = rng.choice([*ends, "random"])
    return noise if kind == "random" else data[:at] + ends[kind]


WRONG = [None, True, -1, 0, 3, 2**40, 10**30, 0.5, float("nan")]
WRONG += ["", "gpt2", "../../etc", "é☃\0", {}, [], [1], {"a": 1}]
STRANGE = [
    "",
    "0",
    "-1",
    "1.5",
    "1e400",
    "nan",
    "None",
    "True",
    "x",
    "9" * 5000,
    "((((",
    "'",
    "../x",
]


def mutate_value(value, rng):
    """A copy of a nested value in which one thing is replaced or removed."""
    if not isinstance(value, dict) or not value or rng.random() > 0.9:
        return rng.choice(WRONG)
    value = dict(value)
    key = rng.choice(list(value))
    if rng.random() < 0.15:
        del value[key]
    else:
        value[key] = mutate_value(value[key], rng)
    return value


def mutate_command_line(rng):
    arguments = flags(out_dir="mutated")
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(arguments))
        key, _, value = arguments[at].removeprefix("--").partition("=")
        value = rng.choice([*STRANGE, value])
        forms = [f"--{key}x={value}", f"--{key}", f"{value}.py", f"-{key}"]
        forms += 4 * [f"--{key}={value}"]
        arguments[at] = rng.choice(forms)
    return arguments


def survives(capsys, main, cls, arguments):
    """A script either works or ends with status 2 and one line that begins with error:."""
    capsys.readouterr()
    sys.argv = ["script", *arguments]
    try:
        run_script(main, cls, "")
    except SystemExit as exit:
        lines = capsys.readouterr().err.splitlines()
        assert exit.code == 2
        assert lines and lines[-1].startswith("error: "), lines
        assert len([line for line in lines if line.startswith("error: ")]) == 1
        return False
    return True


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["checkpoint", "meta bytes", "meta", "tokens", "command line"])
def test_mutated_inputs_end_with_one_line(train, capsys, monkeypatch, count, kind):
    monkeypatch.setattr(sys, "argv", [])  # so that the old one is back at the end
    train()
    last, meta = Path("out/last.pt"), Path("data/tiny/meta.json")
    tokens = [Path("data/tiny/train.bin"), Path("data/tiny/val.bin")]
    good = {path: path.read_bytes() for path in (last, meta, *tokens)}
    worked = 0
    problems = []
    for number in range(count):
        rng = random.Random(number)
        path = {"checkpoint": last, "tokens": rng.choice(tokens)}.get(kind, meta)
        out_dir = "out" if kind == "checkpoint" else "mutated"
        arguments = flags(max_iters=7, eval_interval=7, out_dir=out_dir)
        if kind == "command line":
            arguments = mutate_command_line(rng)
        elif kind == "meta":
            meta.write_text(json.dumps(mutate_value(json.loads(good[meta]), rng)))
        else:
            path.write_bytes(mutate_bytes(good[path], rng))
        scripts = [(train_module.main, train_module.Settings, arguments)]
        if kind == "checkpoint":
            options = ["--checkpoint=last", "--device=cpu", "--max_new_tokens=3"]
            scripts.insert(0, (sample.main, sample.Settings, options))
        for script in scripts:
            try:
                worked += survives(capsys, *script)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                problems.append(f"{kind}, seed {number}: {error!r} {where}")
        for other in Path("mutated").glob("*"):
            other.unlink()
        path.write_bytes(good[path])
    assert not problems, "\n".join(problems)
    assert worked < count  # else nothing was broken
    assert worked > 0 or kind in ("checkpoint", "meta bytes")  # else what works is refused, too
