import json
import math
import sys
from pathlib import Path

import pytest
import torch

import plot
from config import UserError
from model import GPTConfig, MiniGPT
from plot import attention_maps, draw_run

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(out_dir, losses, seconds_per_step=2.0):
    """A run that logs losses, one a step, and evaluates at the last one."""
    lines = [
        {"step": i, "loss": loss, "lr": 0.1 / i, "grad_norm": 1.0 + i, "seconds": i * seconds_per_step}
        for i, loss in enumerate(losses, 1)
    ]
    lines.append({"step": len(losses), "val_loss": 1.5, "perplexity": 4.5, "seconds": len(losses) * seconds_per_step})
    Path(out_dir).mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(out_dir, "metrics.jsonl").write_text(text, encoding="utf-8", newline="\n")


def curves(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figures that were drawn, instead of files."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_a_run_is_drawn_against_steps_and_against_time(drawn):
    write_run("out", [3.0, None, 2.0], seconds_per_step=120.0)
    assert draw_run("out") == Path("out/loss.png")
    steps, time = drawn[0].axes[0::2], drawn[0].axes[1::2]
    logged = curves(steps[0])[0]
    assert logged[0] == [1, 2, 3] and logged[1][::2] == [3.0, 2.0] and math.isnan(logged[1][1])
    assert ([3], [1.5]) in curves(steps[0]) and ([6.0], [1.5]) in curves(time[0])  # minutes
    assert curves(steps[1]) == [([1, 2, 3], [0.1, 0.05, 0.1 / 3])]
    assert curves(time[2]) == [([2.0, 4.0, 6.0], [2.0, 3.0, 4.0])]
    assert time[2].get_xlabel() == "time (minutes)"
    assert [text.get_text() for text in time[0].texts] == ["validation 1.500", "training 2.000"]


def test_two_runs_share_a_picture(drawn):
    write_run("out", [3.0, 2.0])
    write_run("other", [3.0, 2.5, 2.25])
    draw_run("out", "other")
    losses = drawn[0].axes[0]
    assert ([1, 2], [3.0, 2.0]) in curves(losses) and ([1, 2, 3], [3.0, 2.5, 2.25]) in curves(losses)
    assert [text.get_text() for text in drawn[0].texts] == ["out", "other"]


def test_a_long_run_is_smoothed_and_says_so(drawn):
    write_run("out", [1.0 + i % 2 for i in range(300)])
    draw_run("out")
    logged, mean = curves(drawn[0].axes[0])[:2]
    assert logged[1][10:13] == [1.0, 2.0, 1.0]
    assert mean[1][10:13] == pytest.approx([1.4, 1.6, 1.4])  # of five
    assert "mean of 5 log lines" in drawn[0].axes[0].texts[0].get_text()


def test_what_is_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no nowhere"):
        draw_run("nowhere")
    write_run("out", [3.0])
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # being written: left out
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="pictures are written as"):
        draw_run("out", file="a.doc")
    with open("out/metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="line 3 is not a line of metrics"):
        draw_run("out")


def test_a_run_ends_with_its_picture(train, capsys):
    pytest.importorskip("matplotlib")
    train(plot=True)
    assert "picture: out/loss.png" in capsys.readouterr().out
    assert Path("out/loss.png").read_bytes().startswith(PNG)


def test_a_run_without_matplotlib_says_so_in_a_line(train, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(plot=True)
    printed = capsys.readouterr()
    assert "no loss.png: pictures need matplotlib: pip install matplotlib" in printed.out.splitlines()
    assert "done:" in printed.out and not printed.err and not Path("out/loss.png").exists()


def test_the_maps_times_v_are_what_attention_gives():
    """The oracle is the output of the model's own attention."""
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(65, (11,))
    maps = attention_maps(model, idx)
    assert maps.shape == (2, 4, 11, 11)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 11))
    assert not maps.triu(1).any()
    for block, heads in zip(model.h, maps, strict=True):
        calls = []
        block.attn.register_forward_hook(lambda module, args, y, calls=calls: calls.append((args[0], y)))
        model(idx[None])
        x, expected = calls[0]
        v = block.attn.c_attn(x)[0, :, 64:].view(11, 4, 8).transpose(0, 1)  # (H, T, D)
        y = block.attn.c_proj((heads @ v).transpose(0, 1).reshape(11, 32))
        torch.testing.assert_close(y, expected[0])


def test_attention_to_a_prompt_is_drawn(train, capsys):
    pytest.importorskip("matplotlib")
    train()
    plot.main(plot.Settings(attention="To be, that"))
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("out/attention.png"))
    assert Path("out/attention.png").read_bytes().startswith(PNG)
    with pytest.raises(SystemExit):
        plot.main(plot.Settings(attention="To be, or not to be"))
    assert "19 tokens are more than the model can see at once (16)" in capsys.readouterr().err
