"""forks/sft.patch against a loss written out, transformers' labels, and the text of its examples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPTConfig, MiniGPT
from prepare_data import prepare
from support.dataset import check_length, open_dataset
from support.settings import UserError
from support.tokenizer import load_tokenizer
from tests.conftest import TINY
from train import evaluate, load_windows, training_batch

WORDS = ("ash", "birch", "cedar", "elm", "fir", "hazel", "juniper", "larch", "maple", "pine")
ROWS = [{"prompt": f"Backwards: {word}", "answer": f" = {word[::-1]}"} for word in WORDS]
FIELD = "prompt,answer"


def losses(out_dir, key="loss"):
    records = map(json.loads, Path(out_dir, "metrics.jsonl").read_text("utf-8").splitlines())
    return [record[key] for record in records if key in record]


@pytest.fixture
def examples(workdir):
    """data/qa of the rows, ten times each: (training tokens, validation tokens, tokenizer)."""
    lines = [json.dumps(row) for row in ROWS * 10]
    Path("qa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    meta = prepare("qa", "qa.jsonl", "bpe:300", field=FIELD)
    train_tokens, val_tokens, _ = open_dataset("qa")
    return train_tokens, val_tokens, load_tokenizer(meta)


def model_of(tokenizer, block_size=48):
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(block_size, tokenizer.vocab_size, 2, 2, 32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_targets_are_the_answers_and_their_ends_and_windows_begin_with_a_prompt(examples):
    tokens, _, tokenizer = examples
    config = GPTConfig(48, tokenizer.vocab_size)
    x, y = training_batch(tokens, config, 0, 0, 0, 20)
    shown = {row["prompt"]: row["answer"] for row in ROWS}
    for inputs, targets in zip(x, y, strict=True):
        text = tokenizer.decode([*inputs.tolist(), *targets[-1:].clamp(min=0).tolist()])
        *whole, _ = text.split("<|endoftext|>")
        assert whole
        for example in whole:
            prompt, mark, answer = example.partition(" =")
            assert shown[prompt] == mark + answer
        learned = tokenizer.decode(targets[targets != -100].tolist())
        answers = "".join(shown[e.partition(" =")[0]] + "<|endoftext|>" for e in whole)
        assert learned.startswith(answers)
        assert "Back" not in learned
        following = inputs[1:][targets[:-1] != -100]
        assert torch.equal(following, targets[:-1][targets[:-1] != -100])


def test_the_loss_is_the_mean_of_minus_log_softmax_over_the_tokens_of_answers(examples):
    tokens, _, tokenizer = examples
    model = model_of(tokenizer)
    x, y = load_windows(tokens, np.array([0, 70, 200]), model.config)
    logits, loss = model(x, y)
    terms = []
    for row in range(3):
        for place in range(48):
            if y[row, place] != -100:
                z = logits[row, place].double()
                terms.append(z.exp().sum().log() - z[y[row, place]])
    assert 0 < len(terms) < y.numel() / 2
    assert loss.item() == pytest.approx(float(sum(terms)) / len(terms), rel=1e-5)


def test_transformers_gives_the_same_loss_for_labels_of_minus_100(examples):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    from support.pretrained import load_pretrained

    tokens, _, tokenizer = examples
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=49,
        vocab_size=tokenizer.vocab_size,
        n_layer=2,
        n_head=2,
        n_embd=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.1)
    reference.save_pretrained("reference")
    model = load_pretrained("reference", block_size=48)
    x, y = training_batch(tokens, model.config, 0, 0, 0, 8)
    idx = torch.cat([x, y[:, -1:].clamp(min=0)], dim=1)
    labels = torch.cat([x[:, :1] * 0 - 100, y], dim=1)  # transformers shifts them itself
    with torch.no_grad():
        expected = reference(idx, labels=labels).loss.item()
    assert model(x, y)[1].item() == pytest.approx(expected, rel=1e-5)


def test_a_validation_loss_is_the_mean_over_answers_whatever_the_batch_size(examples):
    _, tokens, tokenizer = examples
    model = model_of(tokenizer)
    starts = np.arange((len(tokens) - 1) // 48) * 48
    x, y = load_windows(tokens, starts, model.config)
    log_probs = model(x)[0].log_softmax(-1)
    terms = log_probs[y != -100].gather(1, y[y != -100][:, None])
    for batch_size in (1, 2, 100):
        loss = evaluate(model, tokens, batch_size)
        assert loss == pytest.approx(-terms.mean().item(), rel=1e-5)


def test_two_ranks_and_other_micro_batches_equal_one_though_their_answers_differ_in_number(
    train, examples, run
):
    tokens, _, tokenizer = examples
    _, y = training_batch(tokens, GPTConfig(48, tokenizer.vocab_size), 1337, 0, 0, 8)
    assert len({int((row != -100).sum()) for row in y}) > 1
    settings = {"dataset": "qa", "block_size": 48, "max_iters": 6, "learning_rate": 1e-3}
    train(**settings, batch_size=8, gradient_accumulation_steps=1, out_dir="one")
    train(**settings, batch_size=1, gradient_accumulation_steps=8, out_dir="micro")
    command = TINY | settings | {"batch_size": 2, "gradient_accumulation_steps": 4}
    command["out_dir"] = "two"
    arguments = " ".join(f"--{key}={value}" for key, value in command.items())
    done = run("forks/checks/two_ranks.py", arguments)
    assert done.returncode == 0, done.stderr
    for other in ("micro", "two"):
        for key in ("loss", "grad_norm", "val_loss"):
            assert losses(other, key) == pytest.approx(losses("one", key), rel=1e-4), other


def test_a_resumed_run_on_examples_equals_an_uninterrupted_one_to_the_bit(train, examples):
    settings = {"dataset": "qa", "block_size": 48, "lr_decay_iters": 6}
    train(**settings, max_iters=6, out_dir="whole")
    for stop in (3, 6):
        train(**settings, max_iters=stop, out_dir="parts")
    assert losses("whole") == losses("parts")
    assert losses("whole", "val_loss") == losses("parts", "val_loss")


def test_a_fine_tuned_model_answers_and_stops(train, examples, call):
    prepare("text", "tiny.txt", "bpe:260")
    train(dataset="text", out_dir="base", block_size=48, max_iters=20)
    prepare("qa", "qa.jsonl", "base", field=FIELD)
    settings = {"dataset": "qa", "init_from": "base", "out_dir": "tuned", "block_size": 48}
    train(**settings, max_iters=250, eval_interval=250)
    assert "bits_per_byte" not in Path("tuned/metrics.jsonl").read_text("utf-8")
    tokens, _, meta = open_dataset("qa")
    seen = load_tokenizer(meta).decode(tokens["id"].tolist())
    for row in ROWS:
        if row["prompt"] in seen:
            arguments = (f"--prompt={row['prompt']}", "--checkpoint=last", "--temperature=0")
            done = call("sample.py", "--out_dir=tuned", "--device=cpu", *arguments)
            assert done.stdout == f"{row['prompt']}{row['answer']}\n"  # not 500 tokens


def test_csv_and_other_names_give_the_same_examples(examples):
    lines = [f"{row['answer']},{row['prompt']}" for row in ROWS * 10]
    Path("qa.csv").write_text("output,instruction\n" + "\n".join(lines), encoding="utf-8")
    prepare("csv", "qa.csv", "bpe:300", field="instruction,output")
    for ours, theirs in zip(open_dataset("qa")[:2], open_dataset("csv")[:2], strict=True):
        assert np.array_equal(ours, theirs)


def test_each_mistake_is_one_line_that_says_what_to_do(examples):
    with pytest.raises(UserError, match=r"needs an end-of-text token.*--tokenizer=bpe:4096"):
        prepare("qa", "qa.jsonl", "char", field=FIELD)
    with pytest.raises(UserError, match=r"line 1: .*no reply here; choose .*prompt, answer"):
        prepare("qa", "qa.jsonl", "bpe:300", field="prompt,reply")
    tokens, _, meta = open_dataset("qa")
    longest = tokens["place"].max() + 1
    check_length(meta, longest - 1)  # a window has one token more than block_size
    with pytest.raises(UserError, match=rf"of {longest} tokens: .*--block_size={longest - 1}"):
        check_length(meta, longest - 2)


def test_a_text_in_the_tokens_of_examples_keeps_its_plain_file(examples):
    prepare("plain", "tiny.txt", "bpe:300")
    tokens = open_dataset("plain")[0]
    assert tokens.dtype == np.uint16
    _, y = load_windows(tokens, np.array([3]), GPTConfig(16, 300))
    assert y[0].tolist() == tokens[4:20].tolist()
