import json
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_refused

from extras import follow


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
    records = record(1, 3.0), record(2, None, lr=0.5), record(2, 2.5, val_loss=2.25)
    write_metrics(*records, end='{"step": 3')
    follow.main(follow.Settings(follow=False))
    found = read_back("loss", "lr", "val_loss")
    assert found["loss"] == [(1, 3.0), (2, 2.5)]
    assert found["lr"] == [(2, 0.5)] and found["val_loss"] == [(2, 2.25)]


def test_a_run_is_followed_until_ctrl_c_also_where_a_resumed_one_writes_its_steps_again(
    monkeypatch, capsys
):
    one, two, three = (record(step, float(step)) for step in (1, 2, 3))
    stages = [[one, two], [one, two, three, record(4, 4.0)]]
    stages += [[one, two]]  # the checkpoint of step 2 is resumed
    stages += [[one, two, record(3, 3.5)]]
    stages += [[one, record(2, 2.25), record(3, 3.5), record(4, 4.5)]]  # cut and resumed at once
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
    for _ in range(2):  # also when it is written again
        follow.main(follow.Settings(follow=False))
        assert read_back("loss")["loss"] == seen[-1]


def test_what_is_missing_is_said_in_a_line(monkeypatch, capsys):
    assert_refused(r"metrics\.jsonl: train first", follow.main, follow.Settings(follow=False))
    write_metrics(record(1, 3.0))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert_refused("pip install tensorboard", follow.main, follow.Settings(follow=False))


def test_wandb_is_sent_what_a_run_logged(monkeypatch):
    """Offline: the file that it would send has the names and values."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_metrics(record(1, 3.125), record(2, 2.5, val_loss=2.375))
    follow.main(follow.Settings(to="wandb", follow=False))
    wandb.finish()
    (path,) = Path("wandb").glob("offline-run-*/*.wandb")
    sent = b""
    begun = time.monotonic()
    while b"2.375" not in sent and time.monotonic() < begun + 20:  # another process writes it
        sent = path.read_bytes()
    for value in (b"val_loss", b"3.125", b"2.375"):
        assert value in sent


def test_a_run_that_has_not_logged_yet_is_waited_for(monkeypatch):
    Path("out").mkdir()
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) > 1:
            raise KeyboardInterrupt
        write_metrics(record(1, 3.0))

    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(KeyboardInterrupt):
        follow.main(follow.Settings())
    assert read_back("loss")["loss"] == [(1, 3.0)]
    assert_refused("no metrics", follow.main, follow.Settings(out_dir="nowhere"))
