import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import PNG, assert_refused, tiny_model

import sample
from extras import look
from extras.look import attention_maps, draw_attention, paint, token_logits, visible
from support.tokenizer import ByteTokenizer, CharTokenizer


def random_model(**changes):
    return tiny_model(std=0.3, n_head=4, **changes)


@pytest.fixture
def terminal(monkeypatch):
    """terminal(True) makes stdout a terminal, terminal(False) a file."""
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **how: None, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return lambda is_one: monkeypatch.setattr("sys.stdout.isatty", lambda: is_one, raising=False)


def show(model, tokenizer, capsys, **settings):
    look.show_texts(model, tokenizer, look.Settings(**settings))
    return capsys.readouterr()


def uncolored(text):
    return re.sub(r"\x1b\[[^m]*m", "", text)


def test_the_text_is_that_of_sample_and_coloured_in_terminals_only(
    train, capsys, monkeypatch, terminal
):
    train()
    capsys.readouterr()
    options = {"prompt": ["To be"], "max_new_tokens": 30, "device": "cpu", "top_k": 5}
    options |= {"repetition_penalty": 1.2, "num_samples": 2}
    sample.main(sample.Settings(**options))
    plain = capsys.readouterr().out
    for is_terminal, no_color in ((True, ""), (True, "1"), (False, "")):
        terminal(is_terminal)
        monkeypatch.setenv("NO_COLOR", no_color)
        look.main(look.Settings(**options))
        shown = capsys.readouterr().out
        assert uncolored(shown) == plain
        assert ("\x1b" in shown) == (is_terminal and not no_color)


@pytest.mark.parametrize("length", [1, 16, 50])
def test_what_is_predicted_after_each_token_is_a_plain_forward_pass(length):
    """Of a long text: over a window that ends there, of at least half of block_size."""
    model = random_model()
    idx = torch.randint(65, (length,))
    rows = list(token_logits(model, idx))
    assert len(rows) == length
    for i, row in enumerate(rows):
        windows = [idx[begin : i + 1] for begin in range(max(0, i - 15), max(0, i - 7) + 1)]
        possible = [model(window[None])[0][0, -1] for window in windows]
        assert any(torch.allclose(row, logits, atol=1e-4) for logits in possible)


def test_the_probability_shown_is_the_models_whatever_is_drawn_from(capsys, terminal):
    terminal(False)
    model = random_model()
    tokenizer = CharTokenizer(map(chr, range(60, 125)))
    options = {"max_new_tokens": 13, "temperature": 0.5, "top_k": 3, "repetition_penalty": 1.5}
    out = show(model, tokenizer, capsys, prompt=["ABC"], alternatives=2, **options).out
    text, lines = out.split("\n\n")
    lines = lines.splitlines()[1:]
    probs = model(torch.tensor([tokenizer.encode(text)]))[0][0].softmax(-1)  # (16, vocab_size)
    assert len(lines) == 13
    for i, line in enumerate(lines, 3):
        found = re.findall(r"'(.+?)' +([\d.]+)%", line.replace("\\\\", "\\"))
        drawn, *others = [(tokenizer.encode(char)[0], float(percent)) for char, percent in found]
        best = probs[i - 1].topk(3).indices.tolist()
        assert drawn[0] == tokenizer.encode(text[i])[0]
        assert [token for token, _ in others] == [token for token in best if token != drawn[0]][:2]
        for token, percent in (drawn, *others):
            assert percent == pytest.approx(100 * probs[i - 1, token].item(), abs=0.051)


def test_a_character_of_several_tokens_is_shown_whole(capsys, terminal, monkeypatch):
    terminal(True)
    snow = list("☃é".encode())
    monkeypatch.setattr(sample, "generate", lambda *args, **options: torch.tensor([[120, *snow]]))
    model = random_model(vocab_size=256)
    options = {"prompt": ["x"], "max_new_tokens": 5, "alternatives": 1}
    shown = show(model, ByteTokenizer(), capsys, **options)
    assert uncolored(shown.out).startswith("x☃é\n")
    assert "'\\xe2'" in shown.out
    assert "the model's probability:" in uncolored(shown.err)


def test_the_end_of_text_ends_it(capsys, terminal):
    terminal(False)
    model = random_model()
    tokenizer = CharTokenizer(map(chr, range(60, 125)))
    options = {"max_new_tokens": 9, "temperature": 0.0, "repetition_penalty": 2.0, "prompt": ["A"]}
    free = show(model, tokenizer, capsys, **options).out.strip("\n")
    tokenizer.eos_token = tokenizer.encode(free[4])[0]
    ended = show(model, tokenizer, capsys, **options).out
    assert ended == free[: free.index(free[4], 1)] + "\n"
    assert show(model, tokenizer, capsys, stop_at_eos=False, **options).out == free + "\n"


def test_what_can_not_be_seen_is_escaped_and_a_new_line_has_no_colour():
    tokens = [b" a", b"\n\t", "中".encode(), b"\xe4\xb8", "\u200b".encode()]
    assert [visible(token) for token in tokens] == [" a", "\\n\\t", "中", "\\xe4\\xb8", "\\u200b"]
    a, b = paint("a", 0.95), paint("b", 0.95)
    assert paint("a\nb", 0.95) == f"{a}\n{b}" and a != paint("a", 0.5) != paint("a", 0.1)


def test_the_maps_are_the_formula_and_times_v_what_attention_gives():
    """Oracles: softmax(Q K^T / sqrt(D) + M), written out, and the model's own attention."""
    model = random_model()
    idx = torch.randint(65, (11,))
    maps = attention_maps(model, idx)
    assert maps.shape == (2, 4, 11, 11)
    assert not maps.triu(1).any()
    calls = []
    for block in model.h:
        block.attn.register_forward_hook(lambda module, args, y: calls.append((args[0], y[0])))
    with torch.inference_mode():
        model(idx[None])
        for block, heads, (x, expected) in zip(model.h, maps, calls, strict=True):
            q, k, v = block.attn.c_attn(x)[0].view(11, 3, 4, 8).permute(1, 2, 0, 3)  # (H, T, D)
            mask = torch.full((11, 11), -torch.inf).triu(1)
            scores = q @ k.transpose(1, 2) / math.sqrt(8) + mask
            y = block.attn.c_proj((heads @ v).transpose(0, 1).reshape(11, 32))
            torch.testing.assert_close(heads, scores.softmax(-1))
            torch.testing.assert_close(y, expected)


def test_attention_that_is_not_the_formula_is_refused(monkeypatch):
    """As rotary positions would make it, say: maps of something else would mislead."""
    attend = torch.nn.functional.scaled_dot_product_attention
    other = lambda q, k, v, **options: attend(q.flip(-1), k, v, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other)
    model = random_model()
    assert_refused("attention in another way", attention_maps, model, torch.randint(65, (11,)))


def test_a_map_shows_what_each_token_looks_at_under_readable_labels(tmp_path, monkeypatch):
    """Also of tokens that the font lacks or matplotlib would read as formulas, or parts of them."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep(figure, *where, **how):
        figures.append(figure)
        save(figure, *where, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    model = random_model(vocab_size=256)
    tokenizer = ByteTokenizer()
    text = "a$ é$\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_attention(model, tokenizer, text, tmp_path / "a.png")
        chars = CharTokenizer("$ab中☃\U0001f642")
        draw_attention(model, chars, "$a$中\U0001f642", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    maps = attention_maps(model, torch.tensor(tokenizer.encode(text)))
    axes = {axis.get_title(): axis for axis in figures[0].axes if axis.get_title()}
    assert len(axes) == 8
    for layer, head in ((0, 0), (1, 2), (1, 3)):
        image = axes[f"layer {layer}, head {head}"].images[0].get_array()
        torch.testing.assert_close(torch.tensor(image.filled(0.0)), maps[layer, head])
        assert image.mask[0, 1]  # the future has no colour
    labels = ["a", "$", "\N{MIDDLE DOT}", "\\xc3", "\\xa9", "$", "\\n"]
    corner = axes["layer 1, head 0"]
    assert [label.get_text() for label in corner.get_xticklabels()] == labels
    assert [label.get_text() for label in corner.get_yticklabels()] == labels
    every = [label.get_text() for axis in figures[1].axes for label in axis.get_xticklabels()]
    assert "\\u4e2d" in every


def test_attention_of_a_checkpoint_is_drawn_by_the_command(train, capsys):
    pytest.importorskip("matplotlib")
    train()
    look.main(look.Settings(attention="To be, that"))
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("out/attention.png"))
    assert Path("out/attention.png").read_bytes().startswith(PNG)
    assert_refused("40 tokens are more than the 16", look.main, look.Settings(attention=40 * "b"))
