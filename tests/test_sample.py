from pathlib import Path

import pytest
import torch
from conftest import assert_refused, tiny_model

import sample
from prepare_data import prepare
from sample import generate, next_token_probs


def model(**changes):
    return tiny_model(std=0.3, **changes)  # so that the likeliest token differs from step to step


def naive(model, idx, max_new_tokens, choose):
    """What generate promises, without a cache: the context grows to block_size, then halves."""
    start = max(0, idx.size(1) - model.config.block_size)
    for _ in range(max_new_tokens):
        if idx.size(1) - start > model.config.block_size:
            start = idx.size(1) - model.config.block_size // 2
        idx = torch.cat([idx, choose(model(idx[:, start:])[0][:, -1])], dim=1)
    return idx


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.9, 1.0])
def test_probabilities_equal_transformers_warpers(temperature, top_k, top_p):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits = torch.randn(4, 100) * 3
    logits[0, :50] = logits[0, 50:]  # ties
    expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    probs = next_token_probs(logits, temperature, top_k, top_p)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, expected.softmax(-1), atol=1e-6, rtol=0)


def test_temperature_zero_gives_all_probability_to_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    assert next_token_probs(logits, temperature=0).tolist() == [[0, 1, 0]]
    assert next_token_probs(logits, temperature=1e-30).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("name, value", [("temperature", -1), ("top_k", 0), ("top_p", 1.1)])
def test_impossible_options_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        next_token_probs(torch.zeros(1, 5), **{name: value})


@pytest.mark.parametrize("prompt_length", [1, 16, 40])
def test_greedy_text_equals_a_loop_without_a_cache_also_past_block_size(prompt_length):
    gpt = model()
    idx = torch.randint(65, (3, prompt_length))
    expected = naive(gpt, idx, 50, lambda logits: logits.argmax(-1, keepdim=True))
    assert torch.equal(generate(gpt, idx, 50, temperature=0), expected)


def test_sampling_equals_a_loop_without_a_cache():
    gpt = model()
    idx = torch.randint(65, (3, 5))
    theirs = torch.Generator().manual_seed(1)
    ours = torch.Generator().manual_seed(1)

    def draw(logits):
        return torch.multinomial(next_token_probs(logits, 0.8, 20, 0.9), 1, generator=theirs)

    found = generate(gpt, idx, 30, temperature=0.8, top_k=20, top_p=0.9, generator=ours)
    assert torch.equal(found, naive(gpt, idx, 30, draw))


def test_drawn_tokens_have_the_stated_frequencies():
    gpt = model(vocab_size=5)
    idx = torch.zeros(1, 3, dtype=torch.long)
    probs = next_token_probs(gpt(idx)[0][:, -1], temperature=2.0)[0]
    generator = torch.Generator().manual_seed(0)
    text = generate(gpt, idx.expand(20_000, -1), 1, temperature=2.0, generator=generator)
    assert text.max() < 5  # never of the padding
    frequencies = text[:, -1].bincount(minlength=5) / 20_000
    torch.testing.assert_close(frequencies, probs, atol=0.02, rtol=0)


def test_repetition_penalty_equals_transformers():
    transformers = pytest.importorskip("transformers")
    gpt = model()
    idx = torch.randint(65, (2, 5))
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected = idx
    for _ in range(10):
        logits = processor(expected, gpt(expected)[0][:, -1])
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(gpt, idx, 10, temperature=0, repetition_penalty=1.7), expected)


def test_a_row_ends_at_the_end_of_text_token():
    gpt = model()
    idx = torch.randint(65, (2, 5))
    free = generate(gpt, idx, 10, temperature=0)[:, 5:]
    eos = free[0, 3].item()
    expected = free.clone()
    for row in expected:
        ends = (row == eos).nonzero()
        if len(ends):
            row[ends[0] :] = eos
    ended = generate(gpt, idx, 10, temperature=0, eos_token=eos)[:, 5:]
    assert torch.equal(ended, expected[:, : ended.size(1)])
    one_row = generate(gpt, idx[:1], 10, temperature=0, eos_token=eos)
    assert one_row.size(1) == 5 + free[0].tolist().index(eos) + 1


def test_zero_tokens_can_be_asked_for_but_a_prompt_is_needed():
    gpt = model()
    idx = torch.randint(65, (2, 5))
    assert torch.equal(generate(gpt, idx, 0), idx)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(gpt, idx[:, :0], 5)


def test_a_seed_fixes_the_text_and_samples_differ(train, capsys):
    train()
    texts = []
    for seed in (1, 1, 2):
        capsys.readouterr()
        sample.main(sample.Settings(seed=seed, num_samples=3, max_new_tokens=60, device="cpu"))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0].split("---------------\n"))) == 3


def test_mistakes_in_sampling_are_one_line(train):
    train()
    assert_refused("the prompt is empty", sample.main, sample.Settings(prompt=[""]))
    assert_refused(r"nowhere.best\.pt", sample.main, sample.Settings(out_dir="nowhere"))


def test_text_is_streamed_without_broken_characters(train, monkeypatch):
    """With a byte tokenizer a snowman is three tokens: none of them may be printed alone."""
    Path("snow.txt").write_text("☃" * 500, encoding="utf-8")
    prepare("snow", "snow.txt", "byte")
    train(dataset="snow", max_iters=150, eval_interval=150, log_interval=50)
    written = []

    def note(*text, **how):
        written.append("".join(map(str, text)))

    monkeypatch.setattr("builtins.print", note)
    sample.main(sample.Settings(prompt=["☃"], max_new_tokens=30, temperature=0.0, device="cpu"))
    assert "".join(written).startswith("☃" * 11)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(written)


def test_a_model_generates_from_its_weights_and_hooks_as_they_are_now():
    gpt = model()
    idx = torch.randint(65, (1, 5))
    texts = []
    for change in (
        lambda: None,
        lambda: gpt.ln_f.register_forward_hook(lambda module, args, x: -x),
        lambda: gpt.wte.weight.data.copy_(gpt.wte.weight.flip(1)),
    ):
        change()
        texts.append(generate(gpt, idx, 30, temperature=0))
        expected = naive(gpt, idx, 30, lambda logits: logits.argmax(-1, keepdim=True))
        assert torch.equal(texts[-1], expected)
    assert len({tuple(text[0].tolist()) for text in texts}) == 3
