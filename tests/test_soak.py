"""What shows after many tries, or between machines: python -m pytest -m slow tests/test_soak.py

SOAK_MINUTES=30 in the environment makes the soak as long; by default it takes a minute.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_run, flags
from test_robust import LONG, kill_all, linux, ranks_of, start  # noqa: F401

from support.checkpoint import read_checkpoint

pytestmark = [linux, pytest.mark.slow]
MINUTES = float(os.environ.get("SOAK_MINUTES", 1))


def interrupt(process, rng):
    """Ctrl-C, which reaches every process of a terminal."""
    os.killpg(process.pid, signal.SIGINT)


def terminate(process, rng):
    process.send_signal(signal.SIGTERM)


def hang_up(process, rng):
    process.send_signal(signal.SIGHUP)


def kill(process, rng):
    kill_all(process)


def freeze(process, rng):
    """One rank, or the process that trains alone, stands still for a while."""
    pid = rng.choice(ranks_of(process) or [process.pid])
    os.kill(pid, signal.SIGSTOP)
    time.sleep(rng.uniform(0, 1))
    os.kill(pid, signal.SIGCONT)


def fill_disk(process, rng):
    """Files can't become larger than 10 kB for a while: a log line fits, a checkpoint does not."""
    pids = ranks_of(process) or [process.pid]
    for size in (10_000, resource.RLIM_INFINITY):
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        time.sleep(rng.uniform(0, 1))


ENDING = [interrupt, terminate, hang_up, kill]
PASSING = [freeze, fill_disk]
SOAK = LONG | {"max_iters": 1000, "lr_decay_iters": 1000, "save_interval": 20}
SOAK |= {"eval_interval": 100, "dropout": 0.1, "batch_size": 3}


@pytest.mark.parametrize("ranks", [1, 3])
def test_signals_kills_and_full_disks_at_any_moment_change_no_bit(start, run, ranks):  # noqa: F811
    assert run("train.py", *flags(**SOAK, out_dir="whole"), ranks=ranks).returncode == 0
    rng = random.Random(os.environ.get("SOAK_SEED", "1337") + str(ranks))
    done = []
    runs = 0
    end = time.monotonic() + 60 * MINUTES / 2
    while time.monotonic() < end:
        process = start(ranks, **SOAK)
        action = None
        while action not in ENDING:
            time.sleep(rng.uniform(0, 1))
            action = rng.choice(ENDING + PASSING)
            if process.poll() is not None:
                break
            try:
                action(process, rng)
            except ProcessLookupError:  # it has ended meanwhile
                break
            done.append(action.__name__)
        printed, _ = process.communicate(timeout=120)
        assert "Traceback" not in printed or action is kill or ranks > 1, printed
        if read_checkpoint("out/last.pt")["evaluated"] == SOAK["max_iters"]:  # it is never half
            assert_same_run("whole", "out")
            shutil.rmtree("out")
            runs += 1
    assert run("train.py", *flags(**SOAK), ranks=ranks).returncode == 0
    assert_same_run("whole", "out")
    print(f"{runs + 1} runs, {len(done)} events: { ({name: done.count(name) for name in done}) }")


@pytest.fixture
def two_machines():
    """Two network name spaces with a cable between them: cut(True) cuts it, cut(False) joins it."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and the command ip, to make network name spaces")

    def ip(words, check=True):
        subprocess.run(["ip", *words.split()], check=check, capture_output=True)

    names = ["minigpt-a", "minigpt-b"]
    for name in names:
        ip(f"netns del {name}", check=False)
        ip(f"netns add {name}")
    ip(f"link add cable-a netns {names[0]} type veth peer cable-b")
    ip(f"link set cable-b netns {names[1]}")
    for name, cable, address in zip(names, ("cable-a", "cable-b"), (1, 2), strict=True):
        ip(f"-n {name} addr add 10.99.0.{address}/24 dev {cable}")
        ip(f"-n {name} link set {cable} up")
        ip(f"-n {name} link set lo up")
    yield names, lambda is_cut: ip(f"-n {names[0]} link set cable-a {'down' if is_cut else 'up'}")
    for name in names:
        ip(f"netns del {name}")


CUT = LONG | {"max_iters": 2000, "lr_decay_iters": 2000, "save_interval": 20, "timeout": 20}


@pytest.fixture
def start_on_both(two_machines, workdir):
    """start_on_both(out_dir) starts a rank on each machine, and waits until they train."""
    started = []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}

    def start_on_both(out_dir="out"):
        path = Path(out_dir, "last.pt")
        before = path.stat().st_mtime_ns if path.exists() else 0
        processes = []
        for i, name in enumerate(two_machines[0]):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
            command += ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={i}"]
            command += ["--master_addr=10.99.0.1", "--master_port=29500", str(ROOT / "train.py")]
            command += flags(**CUT, out_dir=out_dir)
            env = os.environ | {"GLOO_SOCKET_IFNAME": f"cable-{'ab'[i]}"}
            processes.append(subprocess.Popen(command, env=env, text=True, **options))
        started.extend(processes)
        while processes[0].poll() is None:
            if path.exists() and path.stat().st_mtime_ns != before:
                break
            time.sleep(0.05)
        return processes

    yield start_on_both
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(processes):
    for process in processes:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed


def test_a_network_that_is_cut_for_5_seconds_does_not_end_the_run(start_on_both, two_machines):
    _, cut = two_machines
    finish(start_on_both("whole"))
    processes = start_on_both()
    cut(True)
    time.sleep(5)
    cut(False)
    finish(processes)
    assert_same_run("whole", "out")


def test_a_network_that_is_cut_for_a_minute_ends_the_run_which_resumes(start_on_both, two_machines):
    _, cut = two_machines
    finish(start_on_both("whole"))
    processes = start_on_both()
    begun = time.monotonic()
    cut(True)
    for process in processes:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "advice: another rank has stopped or is slower than --timeout" in printed
    assert time.monotonic() - begun < 60
    cut(False)
    finish(start_on_both())
    assert_same_run("whole", "out")
