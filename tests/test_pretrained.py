"""Weights and tokenizers to and from model folders, against transformers, tiktoken, tokenizers."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, flags
from test_train import fails, losses, same

import prepare_data
import sample
import train as train_module
from extras import export
from model import GPTConfig, MiniGPT
from sample import generate
from support import pretrained
from support.pretrained import (
    load_pretrained,
    load_pretrained_tokenizer,
    save_pretrained,
    to_hf,
)
from support.settings import UserError, read_settings
from support.tokenizer import (
    BYTE_LEVEL,
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    load_tokenizer,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")

ODD = "it's  I'LL 1234 ١٢ naïve ☃ \U0001f600 e\u0301 中文字\n\n \t x\r\n\x0b\x0c\x85\u00a0\u2003\u3000 \x1c \x00 end \n "


@pytest.fixture
def warnings(monkeypatch):
    """The list of what transformers has to say, from its log and as Python's warnings."""
    import logging
    import warnings

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *args, **kwargs: said.append(str(message))
    )
    yield said
    transformers.utils.logging.remove_handler(handler)


def save_reference(folder="reference", seed=0, save=None, **changes):
    """A GPT-2 of transformers with random weights, everywhere, saved to folder."""
    torch.manual_seed(seed)
    sizes = {"n_positions": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}
    eos = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | eos | changes))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder, **(save or {}))
    return model


def random_model(**changes):
    torch.manual_seed(0)
    model = MiniGPT(
        GPTConfig(
            **(
                {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}
                | changes
            )
        )
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def assert_same_logits(model, reference):
    idx = torch.randint(model.config.vocab_size, (2, model.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], reference(idx).logits, atol=1e-4, rtol=0)


def edit(path, **changes):
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------------- in


RELEASED = {
    "gpt2": (12, 768),
    "gpt2-medium": (16, 1024),
    "gpt2-large": (20, 1280),
    "gpt2-xl": (25, 1600),
}  # n_head, n_embd


@pytest.mark.parametrize(
    "sizes, save",
    [
        ({}, {}),
        ({"vocab_size": 1, "n_positions": 1, "n_layer": 1, "n_head": 1, "n_embd": 1}, {}),
        ({"vocab_size": 321, "n_positions": 7, "n_layer": 3, "n_head": 3, "n_embd": 33}, {}),
        ({"vocab_size": 128, "activation_function": "gelu_pytorch_tanh", "n_inner": 128}, {}),
        ({"n_layer": 4, "n_embd": 64}, {"max_shard_size": "100KB"}),
        *(({"n_layer": 1, "n_head": n_head, "n_embd": n_embd}, {}) for n_head, n_embd in RELEASED.values()),
    ],
)  # fmt: skip
def test_logits_equal_those_of_the_model_that_transformers_saved(tmp_path, sizes, save):
    reference = save_reference(tmp_path, save=save, **sizes)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not save
    (tmp_path / "pytorch_model.bin").touch()  # is beside them on the hub
    model = load_pretrained(tmp_path)
    assert model.wte.weight.dtype == torch.float32 and not model.training
    assert not model.wte.weight[model.config.vocab_size :].any()
    assert_same_logits(model, reference)


def test_older_files_have_masks_and_no_prefix(tmp_path):
    reference = save_reference(tmp_path)

    def as_in_older_files(weights):
        renamed = {name.removeprefix("transformer."): weights.pop(name) for name in list(weights)}
        masks = {
            "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(),
            "h.1.attn.masked_bias": torch.tensor(-1e4),
        }
        weights |= renamed | masks | {"lm_head.weight": renamed["wte.weight"].clone()}

    change_weights(tmp_path, as_in_older_files)
    assert_same_logits(load_pretrained(tmp_path), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_read_as_float32(tmp_path, dtype):
    reference = save_reference(tmp_path).to(dtype)
    reference.save_pretrained(tmp_path)
    assert_same_logits(load_pretrained(tmp_path), reference.float())


def test_a_shorter_block_size_crops_the_positions(tmp_path):
    reference = save_reference(tmp_path)
    model = load_pretrained(str(tmp_path), block_size=9)
    assert model.wpe.weight.shape == (9, 32)
    assert_same_logits(model, reference)
    with pytest.raises(UserError, match="positions for 16 tokens: give --block_size=16 or less"):
        load_pretrained(tmp_path, block_size=17)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt_neo"}, "another architecture: model_type 'gpt_neo', not 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function 'relu', not 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06, not 1e-05"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True, not False",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights False, not True"),
        ({"add_cross_attention": True}, "add_cross_attention True, not False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False, not True"),
        ({"n_inner": 100}, "n_inner 100, not 128"),
        ({"n_head": 3}, "sizes that no GPT-2 can have .*must be divisible by n_head"),
        ({"n_positions": "16"}, "sizes that no GPT-2 can have .*'str' object"),
        ({"n_layer": 3}, "only one of them has h.2.ln_1.weight"),
        ({"n_layer": 1}, "only one of them has h.1.attn.c_attn.bias"),
        ({"vocab_size": 66}, r"wte.weight has the shape \[65, 32\], by config.json \[66, 32\]"),
        ({"n_positions": 15}, r"wpe.weight has the shape \[16, 32\], by config.json \[15, 32\]"),
    ],
)
def test_another_architecture_is_refused_with_the_difference_named(tmp_path, change, message):
    save_reference(tmp_path)
    edit(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"n_layer": 10**9}, {"n_embd": 2**20}, {"vocab_size": 10**12}])
def test_a_config_of_absurd_sizes_is_refused_before_a_model_is_built(tmp_path, monkeypatch, change):
    save_reference(tmp_path)
    edit(tmp_path / "config.json", **change)
    monkeypatch.setattr(MiniGPT, "__init__", None)
    with pytest.raises(UserError, match=r"config.json"):
        load_pretrained(tmp_path)


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("transformer.ln_f.bias"), "only one of them has ln_f.bias"),
        (lambda weights: weights.update(extra=torch.ones(2)), "only one of them has extra"),
        (lambda weights: weights.pop("transformer.wte.weight"), "only one of them has wte.weight"),
        (
            lambda weights: weights.update({"transformer.ln_f.bias": torch.ones(31)}),
            r"ln_f.bias has the shape \[31\], by config.json \[32\]",
        ),
        (
            lambda weights: weights.update(
                {"transformer.h.1.mlp.c_fc.weight": torch.ones(128, 32)}
            ),
            r"h.1.mlp.c_fc.weight has the shape \[128, 32\], by config.json \[32, 128\]",
        ),
        (
            lambda weights: weights.update({"transformer.ln_f.bias": torch.ones(32).int()}),
            "not finite numbers",
        ),
        (
            lambda weights: weights.update(
                {"transformer.ln_f.bias": torch.ones(32).double() * 1e300}
            ),
            "not finite",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    save_reference(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_a_head_of_its_own_is_refused(tmp_path):
    save_reference(tmp_path, tie_word_embeddings=False)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head is not its token embedding"):
        load_pretrained(tmp_path)


def test_damaged_and_missing_files_are_one_line(tmp_path):
    save_reference(tmp_path, save={"max_shard_size": "50KB"})
    shard = max(tmp_path.glob("*.safetensors"), key=os.path.getsize)
    for path in (tmp_path / "config.json", tmp_path / "model.safetensors.index.json", shard):
        whole = path.read_bytes()
        for part in (b"", whole[: len(whole) // 2], b"[1]", None):
            path.unlink()
            if part is not None:
                path.write_bytes(part)
            with pytest.raises(UserError) as error:
                load_pretrained(tmp_path)
            assert path.name in str(error.value) or "No such file" in str(error.value)
        path.write_bytes(whole)
    for weight_map in (
        {"wte.weight": "../elsewhere.safetensors"},
        {"wte.weight": 1},
        ["model.safetensors"],
        None,
    ):
        edit(tmp_path / "model.safetensors.index.json", weight_map=weight_map)
        with pytest.raises(UserError, match="does not name files in its folder"):
            load_pretrained(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    save_reference(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UserError, match=r"a pickle .*transformers"):
        load_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    reference = save_reference(tmp_path)
    reference.transformer.wte.weight.data[3, 3] = float("nan")
    reference.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"wte.weight has values that are not finite"):
        load_pretrained(tmp_path)


def test_a_buffer_of_ones_own_is_filled_as_its_class_says(tmp_path, monkeypatch):
    save_reference(tmp_path)
    build = MiniGPT.__init__

    def with_buffers(self, config):
        build(self, config)
        self.register_buffer("angles", torch.arange(16) / 10, persistent=False)
        self.register_buffer(
            "scale", torch.nn.init.constant_(torch.empty(8), 3.0), persistent=False
        )

    monkeypatch.setattr(MiniGPT, "__init__", with_buffers)
    model = load_pretrained(tmp_path)
    assert torch.equal(model.angles, torch.arange(16) / 10) and torch.equal(
        model.scale, torch.full((8,), 3.0)
    )


def test_loading_leaves_a_model_that_trains(tmp_path):
    save_reference(tmp_path)
    model = load_pretrained(tmp_path)
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors"])
def test_a_missing_package_is_one_line(workdir, monkeypatch, package):
    save_reference()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        load_pretrained("gpt2" if package == "huggingface_hub" else "reference")


def test_the_released_names_are_looked_up_on_the_hub(workdir, monkeypatch, capsys, train):
    import huggingface_hub

    def unreachable(repository, **options):
        assert repository == "openai-community/gpt2-medium"
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "gpt2-medium can't be downloaded (" in fails(capsys, train, init_from="gpt2-medium")
    assert not list(Path("out").glob("*.pt"))
    wrong = {"init_from": "gpt3", "dataset": "nowhere"}  # which is named first
    assert (
        "--init_from=gpt3 is not a folder, a checkpoint or one of auto, resume, scratch, gpt2"
        in fails(capsys, train, **wrong)
    )
    with pytest.raises(UserError, match=r"no gpt3.config.json: expected gpt2, gpt2-medium"):
        load_pretrained("gpt3")
    reference = save_reference()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repository, **options: "reference"
    )
    assert_same_logits(load_pretrained("gpt2-xl"), reference)


# ------------------------------------------------------------------------------------------------------------ out


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False, "dropout": 0.2}, {"vocab_size": 321, "n_head": 3, "n_embd": 33}]
)
def test_transformers_loads_what_was_saved_without_a_warning(tmp_path, warnings, changes):
    model = random_model(**changes)
    save_pretrained(model, tmp_path)
    reference, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()) and not warnings
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert_same_logits(model, reference)
    again = load_pretrained(tmp_path)
    idx = torch.arange(16)[None]
    assert torch.equal(again(idx)[0], model(idx)[0])
    prompt = torch.randint(65, (3, 4))
    text = reference.generate(
        prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    assert torch.equal(generate(model, prompt, 12, temperature=0), text)
    assert not warnings, warnings


def test_an_export_that_fails_does_not_look_whole(tmp_path, monkeypatch):
    save_pretrained(random_model(), tmp_path)

    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("support.checkpoint.write_atomically", full)
    with pytest.raises(UserError, match=r"can't be written .*No space left"):
        save_pretrained(random_model(), tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(UserError, match=r"no .*config.json"):
        load_pretrained(tmp_path)


@pytest.fixture
def export_command(tmp_path, monkeypatch):
    """export_command() runs python -m extras.export in this process, on the checkpoint of a random model."""
    monkeypatch.chdir(tmp_path)
    model = random_model(vocab_size=256)
    state = {
        "model": model.state_dict(),
        "model_args": vars(model.config),
        "step": 7,
        "tokenizer": ByteTokenizer().meta,
    }
    Path("out").mkdir()
    torch.save(state, "out/best.pt")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        monkeypatch.delitem(sys.modules, "extras.export", raising=False)
        runpy.run_module("extras.export", run_name="__main__")

    return run


def test_the_command_writes_a_folder_that_transformers_loads(export_command, capsys):
    export_command("--checkpoint=best")
    assert "out/pretrained: out/best.pt of step 7" in capsys.readouterr().out
    reference = transformers.GPT2LMHeadModel.from_pretrained("out/pretrained")
    assert_same_logits(sample.load_model("out/best.pt")[0], reference)
    assert transformers.AutoTokenizer.from_pretrained("out/pretrained")("é")["input_ids"] == list(
        "é".encode()
    )


@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError])
def test_a_mistake_in_ones_own_model_shows_its_traceback(
    export_command, tmp_path, monkeypatch, kind
):
    save_reference(tmp_path / "reference")

    def mistaken(self, config):
        raise kind("my mistake")

    monkeypatch.setattr(MiniGPT, "__init__", mistaken)
    with pytest.raises(kind, match="my mistake") as error:
        export_command()
    assert error.type is kind
    with pytest.raises(kind, match="my mistake") as error:
        load_pretrained(tmp_path / "reference")
    assert error.type is kind


def test_mistakes_in_the_command_are_one_line(export_command, capsys):
    for arguments, message in (
        (["--checkpoint=none"], "no checkpoint out/none.pt"),
        (["--folder=out/best.pt"], "error: out/best.pt can't be written"),
        (["--file=x"], "unknown setting --file"),
    ):
        with pytest.raises(SystemExit) as error:
            export_command(*arguments)
        text = capsys.readouterr().err
        assert error.value.code == 2 and message in text and text.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- tokenizers


POSSESSIVE = r"(?i:'s|'ll)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s+(?!\S)|\s"


def trained_bpe(pattern=POSSESSIVE, size=400):
    """A BPE over bytes with an end-of-text token, from tokenizers' own trainer on TEXT."""
    import tiktoken
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert set(alphabet) == set(BYTE_LEVEL)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, ODD * 5], trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(BYTE_LEVEL[c] for c in token): i for token, i in vocab}
    special = {"<|endoftext|>": len(ranks), "<|fim|>": len(ranks) + 1}
    return BPETokenizer(
        tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    )


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "greedy bpe", "byte", "char"])
def test_transformers_encodes_with_the_saved_tokenizer_as_we_do(request, tmp_path, warnings, kind):
    text = ODD + TEXT[:300] + ODD[::-1]
    if kind == "gpt2":
        text += request.getfixturevalue("tiny_shakespeare").read_text(encoding="utf-8")[:200_000]
        tokenizer = BPETokenizer(request.getfixturevalue("gpt2_vocabulary"))
    elif kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "char":
        tokenizer = CharTokenizer("".join(sorted(set(text))))
    else:
        tokenizer = trained_bpe(POSSESSIVE if kind == "bpe" else GPT2_PATTERN)
    save_pretrained(random_model(vocab_size=tokenizer.vocab_size, n_layer=1), tmp_path, tokenizer)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = load_pretrained_tokenizer(tmp_path)
    assert len(fast) == tokenizer.vocab_size == again.vocab_size
    assert fast.eos_token_id == tokenizer.eos_token == again.eos_token
    ids = tokenizer.encode(text)
    assert fast(text, verbose=False)["input_ids"] == again.encode(text) == ids
    assert fast.decode(ids) == text == tokenizer.decode(ids) == again.decode(ids)
    for i in range(tokenizer.vocab_size):
        assert again.decode_bytes([i]) == tokenizer.decode_bytes([i])
    for part in (ODD[i:j] for i in range(0, len(ODD), 3) for j in range(i + 1, len(ODD), 7)):
        assert fast(part, verbose=False)["input_ids"] == tokenizer.encode(part), repr(part)
    if tokenizer.eos_token is not None:
        documents = "One.<|endoftext|> Two.\n\n<|endoftext|>"
        as_text = fast(documents, split_special_tokens=True, verbose=False)["input_ids"]
        assert as_text == tokenizer.encode(documents) == again.encode(documents)
        tokenizer.special_in_text = True
        again.special_in_text = True
        as_tokens = fast(documents, verbose=False)["input_ids"]
        assert as_tokens == tokenizer.encode(documents) == again.encode(documents)
        assert load_tokenizer(tokenizer.meta).encode(documents) == as_tokens
        assert load_tokenizer(again.meta).encode(documents) == as_tokens
    assert not warnings, warnings


def test_tokenizers_without_such_a_form_are_not_saved_as_another():
    class Codons(ByteTokenizer):
        pass

    with pytest.raises(UserError, match="a Codons has no form"):
        to_hf(Codons())
    with pytest.raises(UserError, match="abc is not a pair of earlier tokens"):
        pretrained.merges({"a": 0, "b": 1, "c": 2, "abc": 3})


def word_piece():
    """BERT's kind of tokenizer, learned from TEXT."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    options = {"special_tokens": ["[UNK]", "[SEP]"], "vocab_size": 99, "show_progress": False}
    tokenizer.train_from_iterator([TEXT], tokenizers.trainers.WordPieceTrainer(**options))
    return tokenizer


def sentence_piece():
    """Llama 2's kind of tokenizer, learned from TEXT; it falls back to bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    options = {"special_tokens": ["<user>", *names], "vocab_size": 400, "show_progress": False}
    tokenizer.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(**options))
    contents = json.loads(tokenizer.to_str())
    kept = [token for token in contents["added_tokens"] if token["content"] == "<user>"]
    contents["added_tokens"] = kept
    return tokenizers.Tokenizer.from_str(json.dumps(contents))


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
    again = load_tokenizer(json.loads(json.dumps(ours.meta)))
    assert again.encode(text) == ids
    special = again.special_tokens[0]
    assert len(again.encode(special)) > 1 or make is word_piece
    again.special_in_text = True
    assert again.encode(special) == [theirs.token_to_id(special)]


def test_a_missing_or_damaged_tokenizer_is_one_line(tmp_path):
    save_reference(tmp_path)
    assert load_pretrained_tokenizer(tmp_path) is None
    for content in ("", "[]", '{"model": {"type": "BPE", "vocab": {}}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer.json can't be read"):
            load_pretrained_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(to_hf(ByteTokenizer()).to_str())
    with pytest.raises(UserError, match="has 256 tokens, but the model only 65"):
        load_pretrained_tokenizer(tmp_path)


def test_an_embedding_may_have_more_rows_than_the_tokenizer_has_tokens(train, capsys):
    """Many are padded to a multiple of 64. The rest is never predicted, sampled or trained."""
    tokenizer = trained_bpe()
    reference = save_reference("padded", vocab_size=tokenizer.vocab_size + 78)
    reference.transformer.wte.weight.data[tokenizer.vocab_size :] *= 100
    reference.save_pretrained("padded")
    Path("padded/tokenizer.json").write_text(to_hf(tokenizer).to_str())
    model = load_pretrained("padded", vocab_size=tokenizer.vocab_size)
    idx = torch.randint(tokenizer.vocab_size, (2, 16))
    with torch.no_grad():
        expected = reference(idx).logits[..., : tokenizer.vocab_size]
        torch.testing.assert_close(model(idx)[0], expected, atol=1e-4, rtol=0)
    sample.main(sample.Settings(init_from="padded", prompt=["To"], num_samples=5, device="cpu"))
    prepare_data.prepare("text", "tiny.txt", "padded")
    train(dataset="text", init_from="padded", max_iters=2)
    assert torch.load("out/last.pt")["model_args"]["vocab_size"] == tokenizer.vocab_size
    export.main(export.Settings(folder="tuned"))
    assert load_pretrained("tuned").config.vocab_size == tokenizer.vocab_size


def test_a_changed_model_is_not_saved_as_gpt2(tmp_path):
    model = random_model()
    model.h[1].extra = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"not a GPT-2.*: h.1.extra.weight is \[3, 2\] here"):
        save_pretrained(model, tmp_path)
    model = random_model()
    model.h[0].mlp.c_fc = torch.nn.Linear(32, 64)
    with pytest.raises(UserError, match=r"h.0.mlp.c_fc.weight is \[32, 64\] here and \[32, 128\]"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_prepared_with_the_tokenizer_of_a_run(train):
    train()
    for place in ("out", "out/last.pt"):
        prepare_data.prepare("more", "tiny.txt", place)
        meta = json.loads(Path("data/more/meta.json").read_text())
        assert meta["chars"] == json.loads(Path("data/tiny/meta.json").read_text())["chars"]


# ---------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def run_to_finetune(train):
    """A character model that the test itself has pretrained and saved, in out/pretrained."""
    train(max_iters=60, eval_interval=30)
    export.main(export.Settings(out_dir="out"))
    return Path("out/pretrained")


def test_a_round_trip_writes_the_same_text(run_to_finetune, capsys, warnings):
    """Train, save, load in transformers: the same greedy text, token for token; and read again, the same bits."""
    capsys.readouterr()
    prompt = "To"
    options = {"prompt": [prompt], "max_new_tokens": 14, "temperature": 0.0, "device": "cpu"}
    sample.main(sample.Settings(**options))
    text = capsys.readouterr().out
    assert text.startswith(prompt) and len(text) == len(prompt) + 14 + 1
    sample.main(sample.Settings(init_from=str(run_to_finetune), **options))
    assert capsys.readouterr().out == text
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_to_finetune)
    reference = transformers.GPT2LMHeadModel.from_pretrained(run_to_finetune)
    ids = tokenizer(prompt, return_tensors="pt")
    assert (
        tokenizer.decode(reference.generate(**ids, max_new_tokens=14, do_sample=False)[0])
        == text[:-1]
    )
    assert not warnings, warnings


@pytest.mark.parametrize("options", [{}, {"block_size": 9, "dropout": 0.1, "optimizer": "muon"}])
def test_a_fine_tuned_run_begins_with_the_weights_and_resumes_to_the_bit(
    train, run_to_finetune, capsys, options
):
    start = {
        "init_from": "out/pretrained",
        "n_layer": 5,
        "lr_decay_iters": 12,
        "learning_rate": 1e-3,
    } | options
    capsys.readouterr()
    train(eval_only=True, **start, out_dir="whole")
    assert (
        f"validation loss {torch.load('out/last.pt')['best_val_loss']:.4f}"
        in capsys.readouterr().out
        or options
    )
    train(max_iters=12, **start, out_dir="whole")
    assert losses("whole")[0] < 2 < losses("out")[0]
    train(max_iters=6, **start, out_dir="parts")
    run_to_finetune.rename("elsewhere")  # no longer needed: last.pt has it all
    train(max_iters=9, **start, out_dir="parts")
    size = {"n_layer": 2, "bias": True}
    train(max_iters=12, **(start | size | {"init_from": "resume"}), out_dir="parts")
    whole, parts = torch.load("whole/last.pt"), torch.load("parts/last.pt")
    assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])
    assert (
        whole["model_args"]["n_layer"] == 2
        and whole["init_from"] == parts["init_from"] == "out/pretrained"
    )


def test_without_a_block_size_weights_keep_their_own(train, run_to_finetune):
    Path("long.txt").write_text(TEXT * 5, encoding="utf-8")
    prepare_data.prepare("long", "long.txt")
    start = {"dataset": "long", "block_size": train_module.Settings.block_size}
    for init_from in ("out/pretrained", "out/best.pt"):
        for max_iters in (2, 3):  # begins, and resumes
            train(init_from=init_from, out_dir=f"{init_from}-new", max_iters=max_iters, **start)
        state = torch.load(f"{init_from}-new/last.pt")
        assert (state["step"], state["model_args"]["block_size"]) == (3, 16)


def test_a_transformers_model_is_fine_tuned_and_goes_back(train):
    """In, fine-tuned, out: with a tokenizer file that the dataset was prepared with."""
    tokenizer = trained_bpe()
    reference = save_reference("mine", vocab_size=tokenizer.vocab_size)
    Path("mine/tokenizer.json").write_text(to_hf(tokenizer).to_str())
    prepare_data.prepare("text", "tiny.txt", "mine")
    train(dataset="text", init_from="mine", max_iters=2, learning_rate=1e-3)
    export.main(export.Settings(checkpoint="last.pt", folder="tuned"))
    tuned = transformers.GPT2LMHeadModel.from_pretrained("tuned")
    ids = transformers.AutoTokenizer.from_pretrained("tuned")(TEXT, return_tensors="pt")[
        "input_ids"
    ][:, :16]
    assert tuned(ids, labels=ids).loss < reference(ids, labels=ids).loss
    assert_same_logits(sample.load_model("out/last.pt")[0], tuned)


def test_weights_that_do_not_fit_the_data_or_the_run_are_refused(train, run_to_finetune, capsys):
    before = Path("out/last.pt").read_bytes()
    assert "init_from auto, not out/pretrained" in fails(capsys, train, init_from="out/pretrained")
    assert Path("out/last.pt").read_bytes() == before
    new = {"init_from": "out/pretrained", "out_dir": "new"}
    assert "16 tokens: give --block_size=16 or less" in fails(capsys, train, block_size=17, **new)
    for text in ("something else " * 50, TEXT.replace("T", "X")):  # fewer characters, and others
        Path("other.txt").write_text(text)
        prepare_data.prepare("other", "other.txt")
        message = fails(capsys, train, dataset="other", **new)
        assert (
            "data/other has other tokens than out/pretrained" in message
            and "--tokenizer=out/pretrained" in message
        )
    save_reference("reference", vocab_size=23)
    with pytest.raises(UserError, match=r"reference has no tokenizer\.json"):
        sample.main(sample.Settings(init_from="reference"))
    assert not list(Path("new").glob("*.pt"))


def test_the_commands_export_and_fine_tune_on_two_ranks(run, train):
    train()
    done = run("extras.export", "--out_dir=out", "--folder=mine")
    assert done.returncode == 0 and 'from_pretrained("mine")' in done.stdout, done.stderr
    for out_dir, ranks in (("one", 1), ("two", 2)):
        changes = {"init_from": "mine", "out_dir": out_dir, "max_iters": 3}
        if ranks == 1:
            train(**changes)
        else:
            done = run("train.py", *flags(**changes), ranks=ranks)
            assert done.returncode == 0, done.stderr
    assert losses("one") == pytest.approx(losses("two"), rel=1e-5)


def test_the_config_for_fine_tuning_fine_tunes(train, run_to_finetune):
    changes = [
        "--dataset=tiny",
        f"--init_from={run_to_finetune}",
        "--block_size=16",
        "--max_iters=10",
        "--device=cpu",
    ]
    config = str(ROOT / "config/finetune_shakespeare.py")
    train_module.main(
        read_settings(train_module.Settings, [config, *changes, "--compile=False"], "")
    )
    before, after = (torch.load(f"{out}/best.pt") for out in ("out", "out/finetune_shakespeare"))
    assert (
        after["best_val_loss"] < before["best_val_loss"] and after["config"]["learning_rate"] < 1e-4
    )
