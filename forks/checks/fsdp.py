"""forks/fsdp.patch: sharded over two ranks it trains as one, holds half, and saves what one would."""

import json
import re
from pathlib import Path

import pytest

from support.checkpoint import read_checkpoint
from tests.conftest import ROOT, TINY

MEASURE = """
import sys, torch, train
sys.argv = sys.argv[1:]
make = train.make_optimizer
def watched(model, s):
    sharded, optimizer = list(model.parameters()), make(model, s)
    def measure(*_):
        local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).nbytes
        state = [t for values in optimizer.state.values() for t in values.values()]
        sizes = [sum(map(local, part)) for part in (sharded, [p.grad for p in sharded], state)]
        sys.stdout.write("bytes {} {} {}\\n".format(*sizes))  # at once, since two ranks write
    optimizer.register_step_post_hook(measure)
    return optimizer
train.make_optimizer = watched
from runpy import run_path
run_path(sys.argv[0], run_name="__main__")
"""


def command(**changes):
    return " ".join(f"--{key}={value}" for key, value in (TINY | changes).items())


def losses(out_dir):
    records = map(json.loads, Path(out_dir, "metrics.jsonl").read_text("utf-8").splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_rank_and_two_take_over_from_each_other(train, run, optimizer):
    """A sharded run's checkpoint is that of one process: either resumes what the other has saved."""
    settings = {
        "lr_decay_iters": 9,
        "eval_interval": 3,
        "optimizer": optimizer,
        "activation_checkpointing": True,
    }
    train(**settings, max_iters=9, out_dir="one")
    two_ranks = "forks/checks/two_ranks.py"
    done = run(two_ranks, command(**settings, out_dir="turns", max_iters=3))
    assert done.returncode == 0, done.stderr
    train(**settings, max_iters=6, out_dir="turns")
    done = run(two_ranks, command(**settings, out_dir="turns", max_iters=9))
    assert done.returncode == 0, done.stderr
    assert losses("turns") == pytest.approx(
        losses("one"), abs=1e-4 if optimizer == "adamw" else 1e-3
    )
    one, turns = read_checkpoint("one/last.pt"), read_checkpoint("turns/last.pt")
    for name, p in one["model"].items():
        assert turns["model"][name].shape == p.shape and type(turns["model"][name]) is type(p), name
    assert one["optimizer"]["param_groups"] == turns["optimizer"]["param_groups"]
    for i, state in one["optimizer"]["state"].items():
        assert {k: v.shape for k, v in state.items()} == {
            k: v.shape for k, v in turns["optimizer"]["state"][i].items()
        }


def test_a_rank_holds_half_of_model_gradients_and_moments(run, workdir):
    Path("measure.py").write_text(MEASURE, encoding="utf-8")
    done = run(
        str(Path("measure.py").resolve()), ROOT / "forks/checks/two_ranks.py", command(max_iters=1)
    )
    assert done.returncode == 0, done.stderr
    state = read_checkpoint("out/last.pt")  # which is whole
    weights = state["model"]
    del weights["lm_head.weight"]  # which is wte.weight
    model = sum(p.nbytes for p in weights.values())
    moments = sum(
        t.nbytes for values in state["optimizer"]["state"].values() for t in values.values()
    )
    held = [list(map(int, line)) for line in re.findall(r"bytes (\d+) (\d+) (\d+)", done.stdout)]
    assert len(held) == 2
    for sizes in held:
        assert sizes == pytest.approx([model / 2, model / 2, moments / 2], rel=0.02)
