import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import GPTConfig, MiniGPT
from support.settings import UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # real data for offline work; tests skip where it is missing
if (SHARED / "tiktoken").exists():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))

torch.set_num_threads(1)  # the models of the tests are too small for more
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the commands that they run

TEXT = (
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 40
)
TINY = {  # settings of a model and a run that take a second
    "dataset": "tiny",
    "out_dir": "out",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_iters": 6,
    "eval_interval": 3,
    "eval_iters": 0,
    "log_interval": 1,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}
UNICODE = (
    "naïve façade, 'tis \r\n\t “quoted” ☃ 漢字 🤖👩‍👩‍👧 \u200b e\u0301 \x00 <|endoftext|>  end \n\n"
)
PNG = b"\x89PNG\r\n\x1a\n"
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@pytest.fixture
def tiny_shakespeare():
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


@pytest.fixture
def gpt2_vocabulary():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"needs the GPT-2 vocabulary: {type(error).__name__}")


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder as the current one, with a tiny character-level dataset data/tiny."""
    import prepare_data

    monkeypatch.chdir(tmp_path)
    Path("tiny.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    prepare_data.prepare("tiny", "tiny.txt")
    return tmp_path


@pytest.fixture
def restored():
    """Signal handlers and attention kernels are as before when the test has ended."""
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    gc.collect()
    gc.freeze()  # to look through all packages before each run would take a third of the time
    yield
    for number, handler in handlers:
        signal.signal(number, handler)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def train(workdir, restored):
    """train(key=value, ...) runs train.py's main in this process, on the tiny dataset."""
    import train

    def run(**changes):
        gc.collect()  # a run that failed has its lock as long as the traceback is alive
        train.main(train.Settings(**(TINY | changes)))

    return run


@pytest.fixture
def refused(train, capsys):
    """refused(key=value, ...) runs train.py, which has to refuse, and returns its one line."""

    def refused(**changes):
        with pytest.raises(UserError) as error:
            train(**changes)
        assert not capsys.readouterr().err and "\n" not in str(error.value)
        return str(error.value)

    return refused


@pytest.fixture
def call(workdir, restored, monkeypatch, capfd):
    """call("train.py", "--key=value", ...) runs a script, or a module, in this process."""

    def call(script, *arguments):
        gc.collect()
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        status = 0
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        printed = capfd.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return call


@pytest.fixture
def run(workdir):
    """run("train.py", "--key=value", ...) runs a script, or as "extras.plot" a module, in the
    working folder, as a process of its own or with ranks=2 by torchrun."""

    def run(script, *arguments, ranks=1, env=None, **options):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if not script.endswith(".py"):
            command += ["-m", script]
        else:
            command += [str(ROOT / script) if (ROOT / script).exists() else script]
        command += map(str, arguments)
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        return subprocess.run(command, env=environment, timeout=240, **(streams | options))

    return run


def flags(**changes):
    """TINY, with changes, as command-line arguments."""
    return [f"--{key}={value}" for key, value in (TINY | changes).items()]


def assert_refused(message, function, *arguments, **options):
    """function(*arguments, **options) ends with one line to the user, which fits message."""
    with pytest.raises(UserError, match=message) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)


def tiny_model(std=None, **changes):
    """A MiniGPT in eval mode; with std, all weights are drawn, also those that begin as 0 or 1."""
    torch.manual_seed(0)
    sizes = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = MiniGPT(GPTConfig(**(sizes | changes))).eval()
    if std is not None:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=std)
    return model


def metrics(out_dir="out"):
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def losses(out_dir="out"):
    return [record["loss"] for record in metrics(out_dir) if "loss" in record]


def stamps(folder):
    """When each file in a folder was written."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def same(a, b):
    """Whether two nested structures of tensors are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(one, other):
    """Two runs have the same weights, moments, best weights and metrics, to the bit."""
    for name in ("last.pt", "best.pt"):
        a = torch.load(f"{one}/{name}")
        b = torch.load(f"{other}/{name}")
        for key in ("model", "scaler", "step"):
            assert same(a[key], b[key]), f"{name}: {key}"
        # the groups have the learning rate of the process's last step, which may have made none
        assert same(a["optimizer"]["state"], b["optimizer"]["state"]), name
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for key in ("step", "loss", "lr", "grad_norm", "val_loss"):
            assert a.get(key) == b.get(key)
