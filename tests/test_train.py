import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, assert_refused, assert_same_run, losses, metrics, stamps, tiny_model

import prepare_data
import sample
import train as train_module
from model import GPTConfig, MiniGPT
from support.runtime import share
from train import (
    Settings,
    evaluate,
    learning_rate,
    load_windows,
    make_optimizer,
    time_left,
    training_batch,
)


def test_learning_rate_warms_up_then_follows_a_cosine():
    s = Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109, max_iters=200)
    assert [learning_rate(step, s) for step in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9])
    assert learning_rate(9, s) == pytest.approx(1.0)
    assert learning_rate(59, s) == pytest.approx(0.55)  # half-way
    assert learning_rate(34, s) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(109, s) == learning_rate(199, s) == 0.1
    assert learning_rate(50, Settings(decay_lr=False, learning_rate=1.0)) == 1.0
    s = Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=0, max_iters=100)
    assert learning_rate(99, s) < 0.101


def test_weight_decay_is_for_matrices_and_embeddings_only():
    model = tiny_model()
    decay, no_decay = make_optimizer(model, Settings(weight_decay=0.3)).param_groups
    names = {p: name for name, p in model.named_parameters()}
    vectors = {name for name in names.values() if name.endswith("bias") or "ln_" in name}
    assert {names[p] for p in no_decay["params"]} == vectors
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)


def test_the_update_is_adamws():
    """One step against the formula: Loshchilov & Hutter 2019, algorithm 2."""
    model = tiny_model()
    s = Settings(learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99)
    optimizer = make_optimizer(model, s)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.arange(16)[None], torch.arange(16)[None])[1].backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        decay = 0.1 if p.dim() == 2 else 0.0
        torch.testing.assert_close(p, old - 0.01 * (p.grad / (p.grad.abs() + 1e-8) + decay * old))


def test_the_target_of_a_token_is_the_next_token():
    x, y = load_windows(np.arange(100, dtype=np.uint16), np.array([3, 50]), GPTConfig(5, 100))
    assert x.tolist() == [[3, 4, 5, 6, 7], [50, 51, 52, 53, 54]]
    assert y.tolist() == [[4, 5, 6, 7, 8], [51, 52, 53, 54, 55]]


def test_a_batch_depends_on_seed_step_and_place_only():
    tokens, config = np.arange(60_000, dtype=np.uint16), GPTConfig(8, 60_000)
    whole = training_batch(tokens, config, 0, 5, 0, 12)[0]
    parts = [training_batch(tokens, config, 0, 5, first, 3)[0] for first in (0, 3, 6, 9)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, training_batch(tokens, config, 0, 6, 0, 12)[0])
    assert not torch.equal(whole, training_batch(tokens, config, 1, 5, 0, 12)[0])


def test_batches_reach_every_token_and_ids_outside_the_vocabulary_are_found():
    tokens = np.arange(12, dtype=np.uint16)
    x, y = training_batch(tokens, GPTConfig(8, 12), 0, 0, 0, 200)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3} and y.max() == 11
    assert_refused("token id 11, outside", training_batch, tokens, GPTConfig(8, 11), 0, 0, 0, 200)


def test_ranks_share_a_step_in_equal_micro_batches():
    shares = {(12, 40, 8): (12, 5), (4, 2, 2): (4, 1), (16, 1, 2): (8, 1), (12, 1, 1): (12, 1)}
    for job, expected in shares.items():
        assert share(*job) == expected
    assert_refused("12 x 1 sequences can't be shared evenly by 8 ranks", share, 12, 1, 8)


def test_validation_loss_is_the_mean_over_non_overlapping_windows():
    model = tiny_model(dropout=0.5)
    tokens = np.random.default_rng(0).integers(65, size=16 * 7 + 1).astype(np.uint16)
    ids = torch.from_numpy(tokens.astype(np.int64))
    x, y = ids[:-1].view(7, 16), ids[1:].view(7, 16)
    all_windows = model(x, y)[1].item()
    three_windows = model(x[[0, 2, 4]], y[[0, 2, 4]])[1].item()  # evenly spaced
    model.train()
    assert evaluate(model, tokens, 3) == pytest.approx(all_windows, rel=1e-5)
    assert evaluate(model, tokens, 3, eval_iters=1) == pytest.approx(three_windows, rel=1e-5)
    assert model.training


def test_training_learns_and_writes_what_it_promises(train, capsys):
    train(max_iters=60, eval_interval=30)
    assert losses()[0] == pytest.approx(math.log(23), abs=0.2)  # knows nothing yet
    assert losses()[-1] < 1.5
    training, validation = metrics()[5], metrics()[-1]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_sec"} <= training.keys()
    loss = validation["val_loss"]
    assert validation["step"] == 60
    assert validation["perplexity"] == pytest.approx(math.exp(loss))
    assert validation["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=0.01)
    for name in ("last.pt", "best.pt"):
        state = torch.load(f"out/{name}", weights_only=True)
        assert {"model", "optimizer", "step", "config", "model_args", "tokenizer"} <= state.keys()
        assert state["config"]["n_embd"] == state["model_args"]["n_embd"] == 32
        assert state["tokenizer"]["chars"][0] == "\n"
    printed = capsys.readouterr().out
    for part in (
        "parameters",
        "data: tiny, from tiny.txt",
        "step: 128 tokens on 1 x cpu, float32",
        "run: 60 steps, 2.5 epochs: each token is read 2.5 times",  # 60 x 128 of 3,096 tokens
        "step  1/60 | loss",
        "------ step 60/60 | validation loss",
        "sample.py --out_dir=out",
    ):
        assert part in printed, part
    assert "MFU" not in printed  # nobody knows a CPU's peak


def test_accumulation_equals_a_large_batch(train):
    train(out_dir="small", batch_size=2, gradient_accumulation_steps=4)
    train(out_dir="large", batch_size=8, gradient_accumulation_steps=1)
    assert losses("small") == pytest.approx(losses("large"), rel=1e-5)
    small, large = (torch.load(f"{out_dir}/last.pt")["model"] for out_dir in ("small", "large"))
    torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2, "patience": 5},
        {"dtype": "bfloat16", "optimizer": "muon"},
        {"dtype": "float16", "dropout": 0.2, "activation_checkpointing": True},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(train, options):
    train(out_dir="whole", lr_decay_iters=12, max_iters=12, **options)
    for stop in (3, 6, 12):
        train(out_dir="parts", lr_decay_iters=12, max_iters=stop, **options)
    assert_same_run("whole", "parts")


def test_activation_checkpointing_changes_no_number(train):
    train(out_dir="plain", dropout=0.2)
    train(out_dir="recomputed", dropout=0.2, activation_checkpointing=True)
    assert losses("plain") == losses("recomputed")


def test_metrics_after_the_checkpoint_are_dropped_on_resume(train):
    train(max_iters=3)
    before = Path("out/metrics.jsonl").read_text()
    with open("out/metrics.jsonl", "a") as file:  # as if killed at step 5, while writing
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train(max_iters=6)
    assert Path("out/metrics.jsonl").read_text().startswith(before)
    assert [record["step"] for record in metrics()] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_a_finished_run_trains_nothing(train, capsys):
    train()
    before = stamps("out")
    capsys.readouterr()
    train()
    printed = capsys.readouterr().out
    assert "nothing to train: out is finished at step 6" in printed
    assert "raise --max_iters, to start over delete out" in printed
    assert stamps("out") == before


def test_a_run_that_gets_no_better_says_so_in_one_line(train, capsys):
    train(learning_rate=0.0, min_lr=0.0, max_iters=15)  # best at 3
    printed = capsys.readouterr().out
    assert printed.count("in two evaluations in a row: best.pt has the best weights") == 1
    assert "--patience=2" in printed and "--max_iters" in printed


def test_early_stopping_waits_for_patience(train, capsys):
    for message in ("stopped early", "to train longer raise --patience"):
        train(learning_rate=0.0, min_lr=0.0, max_iters=30, patience=2)
        assert message in capsys.readouterr().out
    assert torch.load("out/last.pt")["step"] == 9  # best at 3, worse at 6 and 9
    assert torch.load("out/best.pt")["step"] == 3


def test_the_time_left_counts_an_evaluation_that_is_due():
    s = Settings(max_iters=500, eval_interval=250)
    left = [time_left(step, s, 0.0, 60.0) for step in (249, 250, 251, 500)]
    assert left == ["0:02:00 left", "0:02:00 left", "0:01:00 left", "0:01:00 left"]


def test_eval_only_writes_nothing(train, capsys):
    train(eval_only=True)
    printed = capsys.readouterr().out
    assert "validation loss 3.1" in printed and "random weights" in printed
    assert not Path("out").exists()
    train()
    before = stamps("out")
    capsys.readouterr()
    train(eval_only=True)
    assert f"validation loss {metrics()[-1]['val_loss']:.4f}" in capsys.readouterr().out
    assert stamps("out") == before


def test_an_existing_run_is_never_overwritten(train, refused):
    train()
    before = Path("out/last.pt").read_bytes()
    assert "is a run already" in refused(init_from="scratch")
    message = "was trained with n_layer 2, not 3: give --n_layer=2, or another --out_dir"
    assert message in refused(n_layer=3)
    message = "was trained with optimizer adamw, not muon: give --optimizer=adamw"
    assert message in refused(optimizer="muon", max_iters=9)
    Path("other.txt").write_text(TEXT[::-1])  # with the same characters
    prepare_data.prepare("other", "other.txt")
    message = refused(dataset="other")
    assert "was trained on tiny.txt; data/other, from other.txt, is a different text" in message
    assert "delete out to start over" in message
    assert Path("out/last.pt").read_bytes() == before


def test_mistakes_are_one_clear_line(refused):
    assert "no checkpoint out/last.pt" in refused(init_from="resume")
    message = "python prepare_data.py openwebtext --input PATH makes it"
    assert message in refused(dataset="openwebtext")
    assert "divisible by n_head" in refused(n_head=3)
    assert "(7) is more than lr_decay_iters (6)" in refused(warmup_iters=7)
    assert "is above learning_rate" in refused(min_lr=1.0)
    assert "can't be used here" in refused(device="gpu")
    message = "block_size 2000 needs at least 2001: give more text or a smaller --block_size"
    assert message in refused(block_size=2000)
    assert not list(Path("out").glob("*.pt"))


def test_a_checkpoint_of_an_earlier_version_is_named(train, refused):
    train()
    state = torch.load("out/last.pt")
    del state["evaluated"]
    torch.save(state, "out/last.pt")
    assert "out/last.pt is of an earlier version" in refused(max_iters=9)


def test_a_new_run_can_begin_with_the_weights_of_another(train, refused, capsys):
    train(out_dir="out/a", max_iters=60, eval_interval=30)
    best = min(record["val_loss"] for record in metrics("out/a") if "val_loss" in record)
    for init_from in ("out/a", "out/a/best.pt"):
        capsys.readouterr()
        train(out_dir="new", init_from=init_from, eval_only=True)
        printed = capsys.readouterr().out
        assert f"starts with the weights of {init_from}" in printed
        assert f"validation loss {best:.4f}" in printed and "ignored" not in printed
    new = {"out_dir": "new", "init_from": "out/a", "n_layer": 7, "bias": True}
    train(max_iters=3, **new)
    ignored = "ignored: n_layer=7, bias=True; the model of out/a has its own"
    assert ignored in capsys.readouterr().out
    assert [record["step"] for record in metrics("new")] == [1, 2, 3, 3]
    assert losses("new")[0] < losses("out/a")[0] / 2
    train(max_iters=5, **new)  # it resumes
    assert torch.load("new/last.pt")["step"] == 5
    other = {"out_dir": "other", "init_from": "out/a"}
    capsys.readouterr()
    assert "give --block_size=16" in refused(block_size=8, **other)
    Path("other.txt").write_text(Path("tiny.txt").read_text().replace("T", "X"))
    prepare_data.prepare("as_many", "other.txt")
    message = refused(dataset="as_many", **other)
    assert "data/as_many has other tokens than out/a" in message
    assert "prepare it with --tokenizer=out/a" in message
    train(out_dir="long", block_size=310)  # as long as the validation split can be
    Path("short.txt").write_text(TEXT[: len(TEXT) // 2])
    prepare_data.prepare("short", "short.txt", "long")
    message = refused(dataset="short", out_dir="new2", init_from="long", block_size=1024)
    assert "val.bin has only 170 tokens; block_size 310 needs at least 311" in message


def test_checkpoints_can_be_kept_and_sampled_from(train, capsys):
    train(keep_interval=2, save_interval=1, max_iters=5, eval_interval=2)
    names = sorted(path.name for path in Path("out").glob("*.pt"))
    assert names == ["best.pt", "last.pt", "step_0000002.pt", "step_0000004.pt"]
    best = torch.load("out/best.pt")["step"]
    if best < 5:  # another name of the same file takes no room
        assert Path(f"out/step_{best:07}.pt").samefile("out/best.pt")
    options = {"device": "cpu", "max_new_tokens": 5}
    sample.main(sample.Settings(checkpoint="step_0000002", **options))
    assert "step_0000002.pt: step 2" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- forks


def test_another_optimizer_resumes_to_the_bit(train, monkeypatch):
    def make_optimizer(model, s):
        return torch.optim.NAdam(model.parameters(), lr=1e-3)

    monkeypatch.setattr(train_module, "make_optimizer", make_optimizer)
    train(out_dir="whole", lr_decay_iters=12, max_iters=12)
    for stop in (6, 12):
        train(out_dir="parts", lr_decay_iters=12, max_iters=stop)
    assert_same_run("whole", "parts")


def test_a_buffer_that_is_not_saved_can_be_sampled_from(train, monkeypatch):
    build = MiniGPT.__init__

    def with_buffer(self, config):
        build(self, config)
        self.register_buffer("scale", torch.full((config.n_embd,), 1.5), persistent=False)

    monkeypatch.setattr(MiniGPT, "__init__", with_buffer)
    train()
    model, _, state = sample.load_model("out/last.pt")
    assert "scale" not in state["model"] and model.scale.tolist() == [1.5] * 32


@pytest.mark.parametrize("kind", [RuntimeError, OSError])
@pytest.mark.parametrize("method", ["__init__", "forward"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exception_of_the_users_model_shows_its_traceback(
    train, monkeypatch, capsys, kind, method, compile
):
    train()

    def mistake(self, *args, **kwargs):
        raise kind("a mistake of the user's own")

    monkeypatch.setattr(MiniGPT, method, mistake)
    for start in (
        lambda: train(out_dir="new", compile=compile),
        lambda: train(max_iters=9, compile=compile),
        lambda: sample.main(sample.Settings(device="cpu")),
    ):
        with pytest.raises(kind, match="of the user's own"):
            start()
    assert "not compiling" not in capsys.readouterr().out
