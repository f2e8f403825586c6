"""Weights and tokenizers to and from model folders, against transformers, tiktoken, tokenizers."""

import json
import logging
import os
import warnings
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import ROOT, TEXT, assert_refused, losses, same, tiny_model

import sample
import train as train_module
from extras import export
from model import MiniGPT
from prepare_data import prepare
from sample import generate, load_model
from support.pretrained import (
    load_pretrained,
    load_pretrained_tokenizer,
    merges,
    save_pretrained,
    to_hf,
)
from support.tokenizer import BYTE_LEVEL, GPT2_PATTERN, BPETokenizer, ByteTokenizer, CharTokenizer
from support.tokenizer import load_tokenizer as from_meta

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

ODD = "it's  I'LL 1234 ١٢ naïve ☃ \U0001f600 e\u0301 中文字\n\n \t x\r\n\x0b\x0c\x85\u00a0\u2003\u3000"
ODD += " \x1c \x00 end \n "


@pytest.fixture
def said(monkeypatch):
    """The list of what transformers has to say, from its log and as Python's warnings."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    note = lambda message, *args, **kwargs: said.append(str(message))  # noqa: E731
    monkeypatch.setattr(warnings, "showwarning", note)
    yield said
    transformers.utils.logging.remove_handler(handler)


def save_reference(folder="reference", dtype=torch.float32, save=None, **changes):
    """A GPT-2 of transformers with random weights, everywhere, saved to folder as dtype."""
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | changes))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.to(dtype).save_pretrained(folder, **(save or {}))
    return model.float()


transformers_model = transformers.GPT2LMHeadModel.from_pretrained
transformers_tokenizer = transformers.AutoTokenizer.from_pretrained


def assert_same_logits(model, reference):
    idx = torch.randint(model.config.vocab_size, (2, model.config.block_size))
    with torch.no_grad():
        expected = reference(idx).logits[..., : model.config.vocab_size]
        torch.testing.assert_close(model(idx)[0], expected, atol=1e-4, rtol=0)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    weights = safetensors.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.save_file(weights, folder / "model.safetensors")


# --------------------------------------------------------------------------------------------- in


MODELS = {
    torch.float32: {"vocab_size": 321, "n_positions": 7, "n_layer": 3, "n_head": 3, "n_embd": 33},
    torch.bfloat16: {"activation_function": "gelu_pytorch_tanh", "n_inner": 128},  # other names
    torch.float64: {"save": {"max_shard_size": "50KB"}},
}


@pytest.mark.parametrize("dtype", MODELS)
def test_logits_equal_those_of_the_model_that_transformers_saved(tmp_path, dtype):
    reference = save_reference(tmp_path, dtype, **MODELS[dtype])
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or dtype != torch.float64
    (tmp_path / "pytorch_model.bin").touch()  # is beside them on the hub
    model = load_pretrained(tmp_path)
    assert model.wte.weight.dtype == torch.float32 and not model.training
    assert not model.wte.weight[model.config.vocab_size :].any()
    assert_same_logits(model, reference)


def test_older_files_have_masks_and_no_prefix(tmp_path):
    reference = save_reference(tmp_path)

    def as_in_older_files(weights):
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        weights["lm_head.weight"] = weights["wte.weight"].clone()

    change_weights(tmp_path, as_in_older_files)
    assert_same_logits(load_pretrained(tmp_path), reference)


def test_a_shorter_block_size_crops_the_positions(tmp_path):
    reference = save_reference(tmp_path)
    model = load_pretrained(str(tmp_path), block_size=9)
    assert model.wpe.weight.shape == (9, 32)
    assert_same_logits(model, reference)
    assert_refused("give --block_size=16 or less", load_pretrained, tmp_path, block_size=17)


OTHERS = {
    "model_type": "gpt_neo",
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "n_inner": 100,
}


def test_another_architecture_is_refused_with_the_difference_named(tmp_path):
    save_reference(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for name, value in OTHERS.items():
        edit(tmp_path / "config.json", **{name: value})
        assert_refused(f"another architecture: {name} {value!r}, not ", load_pretrained, tmp_path)
        (tmp_path / "config.json").write_text(config)
    save_reference(tmp_path, tie_word_embeddings=False)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    assert_refused("lm_head is not its token embedding", load_pretrained, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_head": 3}, "sizes that no GPT-2 can have .*must be divisible by n_head"),
        ({"n_positions": "16"}, "sizes that no GPT-2 can have .*'str' object"),
        ({"n_layer": 3}, "only one of them has h.2.ln_1.weight"),
        ({"n_layer": 1}, "only one of them has h.1.attn.c_attn.bias"),
        ({"n_layer": 10**9}, "config.json has 1000000000 layers"),
        ({"vocab_size": 10**12}, r"wte.weight has the shape \[65, 32\], by config.json \[10{12},"),
    ],
)
def test_a_config_of_wrong_sizes_is_refused_before_a_model_is_built(
    tmp_path, monkeypatch, change, message
):
    save_reference(tmp_path)
    edit(tmp_path / "config.json", **change)
    monkeypatch.setattr(MiniGPT, "__init__", None)
    assert_refused(message, load_pretrained, tmp_path)


@pytest.mark.parametrize(
    "weight, message",
    [
        (None, "only one of them has ln_f.bias"),
        (torch.ones(31), r"ln_f.bias has the shape \[31\], by config.json \[32\]"),
        (torch.ones(32).int(), "ln_f.bias has values that are not finite numbers"),
        (torch.ones(32) * torch.nan, "ln_f.bias has values that are not finite numbers"),
        (torch.ones(32).double() * 1e300, "ln_f.bias has values that are not finite numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, weight, message):
    save_reference(tmp_path)

    def change(weights):
        del weights["transformer.ln_f.bias"]
        if weight is not None:
            weights["transformer.ln_f.bias"] = weight

    change_weights(tmp_path, change)
    assert_refused(message, load_pretrained, tmp_path)


def test_damaged_and_missing_files_are_one_line(tmp_path):
    save_reference(tmp_path, save={"max_shard_size": "50KB"})
    index = tmp_path / "model.safetensors.index.json"
    shard = max(tmp_path.glob("*.safetensors"), key=os.path.getsize)
    for path in (tmp_path / "config.json", index, shard):
        whole = path.read_bytes()
        for part in (b"", whole[: len(whole) // 2], b"[1]"):
            path.write_bytes(part)
            assert_refused(path.name, load_pretrained, tmp_path)
        path.unlink()
        assert_refused(rf"{path.name}|No such file", load_pretrained, tmp_path)
        path.write_bytes(whole)
    for weight_map in ({"wte.weight": "../elsewhere.safetensors"}, {"wte.weight": 1}, None):
        edit(index, weight_map=weight_map)
        assert_refused("does not name files in its folder", load_pretrained, tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    save_reference(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert_refused(r"a pickle .*transformers", load_pretrained, tmp_path)


def test_the_released_names_are_looked_up_on_the_hub(monkeypatch, refused):
    import huggingface_hub

    def unreachable(repository, **options):
        assert repository == "openai-community/gpt2-medium"
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "gpt2-medium can't be downloaded (" in refused(init_from="gpt2-medium")
    assert not list(Path("out").glob("*.pt"))
    message = "--init_from=gpt3 is not a folder, a checkpoint or one of auto, resume, scratch, gpt2"
    assert message in refused(init_from="gpt3", dataset="nowhere")  # which is named first
    assert_refused(r"no gpt3.config.json: expected gpt2, gpt2-medium", load_pretrained, "gpt3")
    reference = save_reference()
    found = lambda repository, **options: "reference"  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert_same_logits(load_pretrained("gpt2-xl"), reference)


# -------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("changes", [{"bias": False, "dropout": 0.2}, {"n_head": 3, "n_embd": 33}])
def test_transformers_loads_what_was_saved_without_a_warning(tmp_path, said, changes):
    model = tiny_model(std=0.1, **changes)
    save_pretrained(model, tmp_path)
    reference, info = transformers_model(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_logits(model, reference)
    idx = torch.arange(16)[None]
    assert torch.equal(load_pretrained(tmp_path)(idx)[0], model(idx)[0])
    prompt = torch.randint(65, (3, 4))
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    text = reference.generate(prompt, max_new_tokens=12, **options)
    assert torch.equal(generate(model, prompt, 12, temperature=0), text)
    assert not said


def test_an_export_that_fails_does_not_look_whole(tmp_path, monkeypatch):
    save_pretrained(tiny_model(), tmp_path)

    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("support.checkpoint.write_atomically", full)
    assert_refused(r"can't be written .*No space left", save_pretrained, tiny_model(), tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_writes_a_folder_that_transformers_loads(train, call):
    prepare("bytes", "tiny.txt", "byte")
    train(dataset="bytes")
    assert (
        "out/pretrained: out/last.pt of step 6" in call("extras.export", "--checkpoint=last").stdout
    )
    assert_same_logits(load_model("out/last.pt")[0], transformers_model("out/pretrained"))
    assert transformers_tokenizer("out/pretrained")("é")["input_ids"] == list("é".encode())
    mistakes = {
        "--checkpoint=none": "no checkpoint out/none.pt",
        "--folder=out/best.pt": "error: out/best.pt can't be written",
    }
    for flag, message in mistakes.items():
        done = call("extras.export", flag)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_changed_model_is_not_saved_as_gpt2(tmp_path):
    model = tiny_model()
    model.h[1].extra = torch.nn.Linear(2, 3)
    assert_refused("not a GPT-2.*: h.1.extra.weight is", save_pretrained, model, tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- tokenizers


POSSESSIVE = r"(?i:'s|'ll)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
POSSESSIVE += r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s+(?!\S)|\s"


def learn(tokenizer, kind, texts, **options):
    """Train a tokenizer of the package tokenizers on texts, quietly."""
    trainer = getattr(tokenizers.trainers, f"{kind}Trainer")(show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def trained_bpe(pattern=POSSESSIVE):
    """A BPE over bytes with an end-of-text token, from tokenizers' own trainer on TEXT."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert set(alphabet) == set(BYTE_LEVEL)
    learn(tokenizer, "Bpe", [TEXT, ODD * 5], vocab_size=400, initial_alphabet=alphabet)
    ranks = {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        ranks[bytes(BYTE_LEVEL[c] for c in token)] = i
    special = {"<|endoftext|>": len(ranks), "<|fim|>": len(ranks) + 1}
    options = {"mergeable_ranks": ranks, "special_tokens": special}
    return BPETokenizer(tiktoken.Encoding("mine", pat_str=pattern, **options))


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "greedy bpe", "byte", "char"])
def test_transformers_encodes_with_the_saved_tokenizer_as_we_do(request, tmp_path, said, kind):
    text = ODD + TEXT[:300] + ODD[::-1]
    if kind == "gpt2":
        text += request.getfixturevalue("tiny_shakespeare").read_text(encoding="utf-8")[:200_000]
        ours = BPETokenizer(request.getfixturevalue("gpt2_vocabulary"))
    elif kind == "byte":
        ours = ByteTokenizer()
    elif kind == "char":
        ours = CharTokenizer("".join(sorted(set(text))))
    else:
        ours = trained_bpe(POSSESSIVE if kind == "bpe" else GPT2_PATTERN)
    save_pretrained(tiny_model(vocab_size=ours.vocab_size, n_layer=1), tmp_path, ours)
    fast = transformers_tokenizer(tmp_path)
    again = load_pretrained_tokenizer(tmp_path)
    assert len(fast) == ours.vocab_size == again.vocab_size
    assert fast.eos_token_id == ours.eos_token == again.eos_token
    ids = ours.encode(text)
    assert fast(text, verbose=False)["input_ids"] == again.encode(text) == ids
    assert fast.decode(ids) == text == ours.decode(ids) == again.decode(ids)
    for i in range(ours.vocab_size):
        assert again.decode_bytes([i]) == ours.decode_bytes([i])
    for part in (ODD[i:j] for i in range(0, len(ODD), 3) for j in range(i + 1, len(ODD), 7)):
        assert fast(part, verbose=False)["input_ids"] == ours.encode(part), repr(part)
    if ours.eos_token is not None:
        documents = "One.<|endoftext|> Two.\n\n<|endoftext|>"
        as_text = fast(documents, split_special_tokens=True, verbose=False)["input_ids"]
        as_tokens = fast(documents, verbose=False)["input_ids"]
        for tokenizer in (ours, again):
            assert tokenizer.encode(documents) == as_text
            tokenizer.special_in_text = True
            assert tokenizer.encode(documents) == as_tokens
            assert from_meta(tokenizer.meta).encode(documents) == as_tokens
    assert not said


def test_tokenizers_without_such_a_form_are_not_saved_as_another():
    class Codons(ByteTokenizer):
        pass

    assert_refused("a Codons has no form", to_hf, Codons())
    assert_refused("abc is not a pair of earlier tokens", merges, {"a": 0, "b": 1, "abc": 2})


def word_piece():
    """BERT's kind of tokenizer, learned from TEXT."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    options = {"special_tokens": ["[UNK]", "[SEP]"], "vocab_size": 99}
    return learn(tokenizer, "WordPiece", [TEXT], **options)


def sentence_piece():
    """Llama 2's kind of tokenizer, learned from TEXT; it falls back to bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    replace, strip = (
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.Strip(" ", 1, 0),
    )
    parts = [replace, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), strip]
    tokenizer.decoder = tokenizers.decoders.Sequence(parts)
    learn(tokenizer, "Bpe", [TEXT], special_tokens=["<user>", *names], vocab_size=400)
    contents = json.loads(tokenizer.to_str())
    kept = [token for token in contents["added_tokens"] if token["content"] == "<user>"]
    return tokenizers.Tokenizer.from_str(json.dumps(contents | {"added_tokens": kept}))


@pytest.mark.parametrize("make", [word_piece, sentence_piece])
def test_other_kinds_of_tokenizer_json_are_read(tmp_path, make):
    theirs = make()
    text = "To be, or not" if make is word_piece else "To be, or ☃ not"
    save_reference(tmp_path, vocab_size=512)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_pretrained_tokenizer(tmp_path)
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids).strip() == theirs.decode(ids).strip()
    again = from_meta(json.loads(json.dumps(ours.meta)))
    assert again.encode(text) == ids
    special = again.special_tokens[0]
    assert len(again.encode(special)) > 1 or make is word_piece
    again.special_in_text = True
    assert again.encode(special) == [theirs.token_to_id(special)]


def test_a_missing_or_damaged_tokenizer_is_one_line(tmp_path):
    save_reference(tmp_path)
    assert load_pretrained_tokenizer(tmp_path) is None
    for content in ("", '{"model": {"type": "BPE", "vocab": {}}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert_refused(r"tokenizer.json can't be read", load_pretrained_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text(to_hf(ByteTokenizer()).to_str())
    assert_refused("has 256 tokens, but the model only 65", load_pretrained_tokenizer, tmp_path)


def test_a_dataset_is_prepared_with_the_tokenizer_of_a_run(train):
    train()
    for place in ("out", "out/last.pt"):
        meta = prepare("more", "tiny.txt", place)
        assert meta["chars"] == json.loads(Path("data/tiny/meta.json").read_text())["chars"]


# ------------------------------------------------------------------------------------ fine-tuning


@pytest.fixture
def run_to_finetune(train):
    """A character model that the test itself has pretrained and saved, in out/pretrained."""
    train(max_iters=60, eval_interval=30)
    export.main(export.Settings(out_dir="out"))
    return Path("out/pretrained")


def test_a_round_trip_writes_the_same_text(run_to_finetune, capsys, said):
    """Train, save, load in transformers or here again: the same greedy text, token for token."""
    texts = []
    for init_from in ("", str(run_to_finetune)):
        capsys.readouterr()
        options = {"prompt": ["To"], "max_new_tokens": 14, "temperature": 0.0, "device": "cpu"}
        sample.main(sample.Settings(init_from=init_from, **options))
        texts.append(capsys.readouterr().out.removesuffix("\n"))
    tokenizer = transformers_tokenizer(run_to_finetune)
    ids = tokenizer("To", return_tensors="pt")
    ids = transformers_model(run_to_finetune).generate(**ids, max_new_tokens=14, do_sample=False)
    assert texts == 2 * [tokenizer.decode(ids[0])]
    assert len(texts[0]) == 2 + 14 and not said


@pytest.mark.parametrize("options", [{}, {"block_size": 9, "dropout": 0.1, "optimizer": "muon"}])
def test_a_fine_tuned_run_begins_with_the_weights_and_resumes_to_the_bit(
    train, run_to_finetune, capsys, options
):
    start = {"init_from": "out/pretrained", "n_layer": 5, "lr_decay_iters": 12}
    start |= {"learning_rate": 1e-3} | options
    capsys.readouterr()
    train(eval_only=True, **start, out_dir="whole")
    best = torch.load("out/last.pt")["best_val_loss"]
    assert f"validation loss {best:.4f}" in capsys.readouterr().out or options
    train(max_iters=12, **start, out_dir="whole")
    assert losses("whole")[0] < 2 < losses("out")[0]
    train(max_iters=6, **start, out_dir="parts")
    run_to_finetune.rename("elsewhere")  # no longer needed: last.pt has it all
    train(max_iters=9, **start, out_dir="parts")
    start |= {"n_layer": 2, "bias": True, "init_from": "resume"}
    train(max_iters=12, **start, out_dir="parts")
    whole, parts = torch.load("whole/last.pt"), torch.load("parts/last.pt")
    assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])
    assert whole["model_args"]["n_layer"] == 2
    assert whole["init_from"] == parts["init_from"] == "out/pretrained"


def test_without_a_block_size_weights_keep_their_own(train, run_to_finetune):
    Path("long.txt").write_text(TEXT * 5, encoding="utf-8")
    prepare("long", "long.txt")
    start = {"dataset": "long", "block_size": train_module.Settings.block_size}
    for init_from in ("out/pretrained", "out/best.pt"):
        for max_iters in (2, 3):  # begins, and resumes
            train(init_from=init_from, out_dir=f"{init_from}-new", max_iters=max_iters, **start)
        state = torch.load(f"{init_from}-new/last.pt")
        assert (state["step"], state["model_args"]["block_size"]) == (3, 16)


def test_a_transformers_model_is_fine_tuned_and_goes_back(train):
    """Its embedding has more rows than its tokenizer has tokens, as many are padded to 64s. The
    rest is never predicted, sampled or trained."""
    ours = trained_bpe()
    reference = save_reference("mine", vocab_size=ours.vocab_size + 78)
    reference.transformer.wte.weight.data[ours.vocab_size :] *= 100
    reference.save_pretrained("mine")
    Path("mine/tokenizer.json").write_text(to_hf(ours).to_str())
    assert_same_logits(load_pretrained("mine", vocab_size=ours.vocab_size), reference)
    sample.main(sample.Settings(init_from="mine", prompt=["To"], num_samples=5, device="cpu"))
    prepare("text", "tiny.txt", "mine")
    train(dataset="text", init_from="mine", max_iters=2, learning_rate=1e-3)
    export.main(export.Settings(checkpoint="last.pt", folder="tuned"))
    tuned = transformers_model("tuned")
    assert tuned.config.vocab_size == ours.vocab_size
    ids = transformers_tokenizer("tuned")(TEXT, return_tensors="pt")["input_ids"][:, :16]
    assert tuned(ids, labels=ids).loss < reference(ids, labels=ids).loss
    assert_same_logits(load_model("out/last.pt")[0], tuned)


def test_weights_that_do_not_fit_the_data_or_the_run_are_refused(run_to_finetune, refused):
    before = Path("out/last.pt").read_bytes()
    assert "init_from auto, not out/pretrained" in refused(init_from="out/pretrained")
    assert Path("out/last.pt").read_bytes() == before
    new = {"init_from": "out/pretrained", "out_dir": "new"}
    assert "16 tokens: give --block_size=16 or less" in refused(block_size=17, **new)
    for text in ("something else " * 50, TEXT.replace("T", "X")):  # fewer characters, and others
        Path("other.txt").write_text(text)
        prepare("other", "other.txt")
        message = refused(dataset="other", **new)
        assert "data/other has other tokens than out/pretrained" in message
        assert "--tokenizer=out/pretrained" in message
    save_reference("reference", vocab_size=23)
    assert_refused("no tokenizer.json", sample.main, sample.Settings(init_from="reference"))
    assert not list(Path("new").glob("*.pt"))


def test_the_config_for_fine_tuning_fine_tunes(call, run_to_finetune):
    changes = ["--dataset=tiny", f"--init_from={run_to_finetune}", "--block_size=16"]
    changes += ["--max_iters=10", "--device=cpu", "--compile=False"]
    done = call("train.py", ROOT / "config/finetune_shakespeare.py", *changes)
    assert done.returncode == 0, done.stderr
    before, after = (torch.load(f"{out}/best.pt") for out in ("out", "out/finetune_shakespeare"))
    assert after["best_val_loss"] < before["best_val_loss"]
    assert after["config"]["learning_rate"] < 1e-4
