import json
import sys
import time
from pathlib import Path

import pytest

from extras import follow
from support.settings import UserError


def record(step, loss, **more):
    return {"step": step, "loss": loss, "seconds": step * 2.0} | more


def write_metrics(*records, end=""):
    Path("out").mkdir(exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    Path("out/metrics.jsonl").write_text(text + end, encoding="utf-8", newline="\n")


def read_back(*names):
    """What TensorBoard itself reads, of each name: [(step, value), ...]."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator("out/tensorboard")
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(names)
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)


def test_tensorboard_reads_what_a_run_logged():
    write_metrics(
        record(1, 3.0), record(2, None, lr=0.5), record(2, 2.5, val_loss=2.25), end='{"step": 3'
    )
    follow.main(follow.Settings(follow=False))
    assert read_back("loss", "lr", "val_loss") == {
        "loss": [(1, 3.0), (2, 2.5)],
        "lr": [(2, 0.5)],
        "val_loss": [(2, 2.25)],
    }


def test_each_step_stands_once_when_it_is_written_again_or_the_run_was_resumed():
    write_metrics(*(record(i, float(i)) for i in range(1, 10)))
    follow.main(follow.Settings(follow=False))
    follow.main(follow.Settings(follow=False))
    assert read_back("loss")["loss"] == [(i, float(i)) for i in range(1, 10)]
    write_metrics(*(record(i, float(i)) for i in range(1, 7)), record(7, 0.5))
    follow.main(follow.Settings(follow=False))
    assert read_back("loss")["loss"] == [(i, float(i)) for i in range(1, 7)] + [(7, 0.5)]


def test_a_run_is_followed_until_ctrl_c_also_where_a_resumed_one_writes_its_steps_again(
    monkeypatch, capsys
):
    stages = [
        [record(1, 1.0), record(2, 2.0)],
        [record(1, 1.0), record(2, 2.0), record(3, 3.0), record(4, 4.0)],
        [record(1, 1.0), record(2, 2.0)],  # the checkpoint of step 2 is resumed
        [record(1, 1.0), record(2, 2.0), record(3, 3.5)],
        [
            record(1, 1.0),
            record(2, 2.25),
            record(3, 3.5),
            record(4, 4.5),
        ],  # cut and resumed between two looks
    ]
    seen = []

    def wait(seconds):
        seen.append(read_back("loss")["loss"])
        if len(seen) == len(stages):
            raise KeyboardInterrupt
        write_metrics(*stages[len(seen)], end='{"step": ')  # the next line has been begun

    write_metrics(*stages[0], end='{"step": ')
    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(KeyboardInterrupt):
        follow.main(follow.Settings())
    assert seen == [[(record["step"], record["loss"]) for record in stage] for stage in stages]


def test_what_is_missing_is_said_in_a_line(monkeypatch, capsys):
    with pytest.raises(UserError, match=r"metrics\.jsonl: train first"):
        follow.main(follow.Settings(follow=False))
    write_metrics(record(1, 3.0))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"this needs a package .*: pip install tensorboard"):
        follow.main(follow.Settings(follow=False))


def test_wandb_is_sent_what_a_run_logged(monkeypatch):
    """Offline: the file that it would send has the names and values."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_metrics(record(1, 3.125), record(2, 2.5, val_loss=2.375))
    follow.main(follow.Settings(to="wandb", follow=False))
    wandb.finish()
    (path,) = Path("wandb").glob("offline-run-*/*.wandb")
    sent = path.read_bytes()
    for value in (b"val_loss", b"3.125", b"2.375"):
        assert value in sent
