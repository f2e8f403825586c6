import json
import sys
import warnings
from pathlib import Path

import pytest
from conftest import PNG, assert_refused

from extras import plot
from extras.plot import COLORS, draw_runs


def write_run(out_dir, losses, val_losses=(1.5,), seconds_per_step=2.0):
    """A run that logs losses, one per step, and val_losses at the last one."""
    records = []
    for i, loss in enumerate(losses, 1):
        step = {"step": i, "seconds": i * seconds_per_step}
        records.append(step | {"loss": loss, "lr": 0.1 / i, "grad_norm": 1.0 + i})
    records += [step | {"val_loss": loss, "perplexity": 4.5} for loss in val_losses]
    Path(out_dir).mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    Path(out_dir, "metrics.jsonl").write_text(text, encoding="utf-8", newline="\n")


def curves(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def titles(figure):
    return figure.legends[0].texts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(folder, monkeypatch):
    """The figures that were drawn; their files stay empty."""
    figures = []
    keep = lambda figure, file, **how: figures.append(figure)  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    return figures


def test_a_run_is_drawn_against_steps_and_against_time(drawn):
    write_run("out", [3.0, None, 2.0], [1.5, 1.25, 1.75], seconds_per_step=120.0)
    assert draw_runs(["out"]) == Path("out/loss.png")
    steps, time = drawn[0].axes[0::2], drawn[0].axes[1::2]
    assert ([1, 3], [3.0, 2.0]) in curves(steps[0])
    assert ([2.0, 6.0], [3.0, 2.0]) in curves(time[0])  # minutes
    assert ([3, 3, 3], [1.5, 1.25, 1.75]) in curves(steps[0])
    assert curves(steps[1]) == [([1, 2, 3], [0.1, 0.05, 0.1 / 3])]
    assert curves(time[2]) == [([2.0, 4.0, 6.0], [2.0, 3.0, 4.0])]
    assert time[2].get_xlabel() == "time (minutes)"


def test_two_runs_share_a_picture(drawn):
    write_run("out", [3.0, 2.0])
    write_run("other", [3.0, 2.5, 2.25], [])
    draw_runs(["out", "other"], "both.svg")
    losses = curves(drawn[0].axes[0])
    assert ([1, 2], [3.0, 2.0]) in losses and ([1, 2, 3], [3.0, 2.5, 2.25]) in losses
    texts = [text.get_text() for text in titles(drawn[0])]
    assert texts == ["out   best validation loss 1.500", "other"]
    assert [text.get_color() for text in titles(drawn[0])] == list(COLORS[:2])
    assert Path("both.svg").exists()


@pytest.mark.parametrize("length", [10, 120])
def test_titles_of_any_length_fit_and_do_not_overlap(drawn, length):
    """As matplotlib itself measures what it draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = ["a" * length, "b" * length]
    for name in names:
        write_run(name, [3.0, 2.0])
    draw_runs(names)
    FigureCanvasAgg(drawn[0]).draw()
    first, second = (text.get_window_extent() for text in titles(drawn[0]))
    assert not first.overlaps(second)
    assert first.x0 >= 0 and max(first.x1, second.x1) <= drawn[0].bbox.x1


def test_a_long_run_is_smoothed_and_says_so(drawn):
    write_run("out", [1.0 + i % 2 for i in range(300)])
    draw_runs(["out"])
    logged, mean = curves(drawn[0].axes[0])[:2]
    assert logged[1][10:13] == [1.0, 2.0, 1.0]
    assert mean[1][10:13] == pytest.approx([1.4, 1.6, 1.4])  # of five
    assert mean[1][0] == pytest.approx(4 / 3)  # of three: the first has none before it
    assert "mean of 5 log lines" in drawn[0].axes[0].texts[0].get_text()


def test_the_first_losses_do_not_squeeze_the_rest(drawn):
    write_run("out", [9.0, 5.0] + [2.0 - i / 100 for i in range(28)])
    draw_runs(["out"])
    low, high = drawn[0].axes[0].get_ylim()
    assert 1.4 < low < 1.5 and 2.0 < high < 2.1


def test_the_command_draws_also_characters_that_the_font_lacks(folder, capsys):
    name = "run-中-$^$-é"
    write_run(name, [3.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.main(plot.Settings(out_dir=[name], file="new/a.png"))
    assert capsys.readouterr().out.strip() == str(Path("new/a.png"))
    assert Path("new/a.png").read_bytes().startswith(PNG)
    assert plot.drawable("中é$\n") == "\\u4e2dé$\\n"


def test_mistakes_are_one_line(folder, monkeypatch):
    assert_refused("no metrics in nowhere", draw_runs, ["nowhere"])
    write_run("out", [3.0])
    assert_refused(r"can't write a\.doc .*png.*svg", draw_runs, ["out"], file="a.doc")
    assert_refused("can't write out", draw_runs, ["out"], file="out/metrics.jsonl/a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_refused("pip install matplotlib", draw_runs, ["out"])


def test_a_line_without_metrics_is_shown_unless_it_is_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ('{"step": 4, "lo', "[1]", '{"step": 1}', '{"step": 1, "seconds": "x"}'):
        path.write_text('{"step": 1, "seconds": 2}\n' + line)
        assert plot.read_metrics(tmp_path) == [{"step": 1, "seconds": 2}]
        path.write_text(f"{line}\n")
        assert_refused(r"metrics\.jsonl has a line that is not", plot.read_metrics, tmp_path)


def test_the_metrics_of_a_run_can_be_drawn(train, capsys):
    pytest.importorskip("matplotlib")
    train()
    plot.main(plot.Settings())
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("out/loss.png"))
    assert Path("out/loss.png").read_bytes().startswith(PNG)
