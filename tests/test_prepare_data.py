import json
import os
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT

import prepare_data
from config import UserError
from prepare_data import ByteTokenizer, load_tokenizer, open_dataset, prepare

UNICODE = "naïve façade, 'tis \r\n\t “quoted” ☃ 漢字 🤖👩‍👩‍👧 \u200b e\u0301 \x00 <|endoftext|>  end \n\n"


def tokenizers():
    yield load_tokenizer({"tokenizer": "char", "chars": "".join(sorted(set(UNICODE)))})
    yield load_tokenizer({"tokenizer": "byte"})
    yield load_tokenizer({"tokenizer": "gpt2"})


def test_every_tokenizer_round_trips_any_text(gpt2_vocabulary):
    for tokenizer in tokenizers():
        ids = tokenizer.encode(UNICODE)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == UNICODE
        assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_every_tokenizer_is_rebuilt_from_its_meta_as_json(gpt2_vocabulary, monkeypatch):
    for tokenizer in tokenizers():
        meta = json.loads(json.dumps(tokenizer.meta))
        with monkeypatch.context() as m:
            m.setattr("tiktoken.get_encoding", None)  # as on a machine that can't download
            again = load_tokenizer(meta)
        assert again.encode(UNICODE) == tokenizer.encode(UNICODE)
        assert (again.vocab_size, again.eos_token) == (tokenizer.vocab_size, tokenizer.eos_token)


def test_gpt2_tokens_are_tiktokens(gpt2_vocabulary):
    tokenizer = load_tokenizer({"tokenizer": "gpt2"})
    assert tokenizer.encode(UNICODE) == gpt2_vocabulary.encode_ordinary(UNICODE)
    assert (tokenizer.vocab_size, tokenizer.eos_token) == (50257, 50256)
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'☃' \(U\+2603\)"):
        load_tokenizer({"tokenizer": "char", "chars": "abc"}).encode("abc☃")


def test_unknown_and_unreachable_vocabularies_are_clear(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="unknown tokenizer gpt5: expected one of char, byte, gpt2"):
        load_tokenizer({"tokenizer": "gpt5"})

    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*--tokenizer=byte"):
        load_tokenizer({"tokenizer": "gpt2"})


def test_files_hold_the_text_split_nine_to_one(workdir):
    train, val, meta = open_dataset("tiny")
    tokenizer = load_tokenizer(meta)
    cut = len(TEXT) * 9 // 10
    assert tokenizer.decode(train[:].tolist()) == TEXT[:cut]
    assert tokenizer.decode(val[:].tolist()) == TEXT[cut:]
    assert Path("data/tiny/train.bin").read_bytes() == np.array(tokenizer.encode(TEXT[:cut]), "<u2").tobytes()
    assert meta["vocab_size"] == len(set(TEXT)) and meta["dtype"] == "uint16" and meta["source"] == "tiny.txt"
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))
    assert sorted(p.name for p in Path("data/tiny").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_tiny_shakespeare_has_the_figures_everyone_has(workdir, tiny_shakespeare, gpt2_vocabulary):
    meta = prepare("shakespeare", str(tiny_shakespeare))
    assert meta["sha256"] == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (1_003_854, 111_540, 65)
    meta = prepare("shakespeare_gpt2", str(tiny_shakespeare), "gpt2")
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (301_966, 36_059, 50257)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_tokens_do_not_depend_on_the_chunk_size(workdir, gpt2_vocabulary, monkeypatch, chunk):
    text = (TEXT[:500] + UNICODE + "3.14, 1,000!!\n\n\n  x = 1\n") * 3
    Path("mixed.txt").write_text(text, encoding="utf-8", newline="")
    cut = len(text) * 9 // 10
    monkeypatch.setattr(prepare_data, "CHUNK_BYTES", chunk)
    prepare("mixed", "mixed.txt", "byte")
    assert b"".join(part[:].tobytes() for part in open_dataset("mixed")[:2])[::2] == text.encode()
    if chunk >= 64:  # a chunk without a letter before white space has to be cut anywhere
        prepare("mixed", "mixed.txt", "gpt2")
        train, val, _ = open_dataset("mixed")
        assert train[:].tolist() == gpt2_vocabulary.encode_ordinary(text[:cut])
        assert val[:].tolist() == gpt2_vocabulary.encode_ordinary(text[cut:])


def test_a_folder_is_its_files_in_order_with_end_of_text_between(workdir, gpt2_vocabulary):
    for name, text in {"b.txt": "second one", "a.txt": "the first", "sub/c.md": "third " * 30}.items():
        path = Path("corpus", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    Path("corpus/.git").mkdir()
    Path("corpus/.git/hidden").write_bytes(b"\xff")
    meta = prepare("corpus", "corpus", "gpt2")
    train, val, _ = open_dataset("corpus")
    text = gpt2_vocabulary.decode(np.concatenate([train[:], val[:]]).tolist())
    assert text == "the first<|endoftext|>second one<|endoftext|>" + "third " * 30
    assert meta["source"] == "3 files in corpus"


def test_a_large_vocabulary_takes_four_bytes(workdir, monkeypatch):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

    monkeypatch.setattr(prepare_data, "ByteTokenizer", Wide)
    monkeypatch.setattr("tokenizer.ByteTokenizer", Wide)
    prepare("wide", "tiny.txt", "byte")
    assert Path("data/wide/val.bin").stat().st_size == 4 * len(open_dataset("wide")[1])


def test_invalid_utf8_names_file_and_offset_and_writes_nothing(workdir, monkeypatch):
    Path("bad.txt").write_bytes("é".encode() * 50 + b"\xff" + b"more")
    for chunk in (1 << 22, 7):
        monkeypatch.setattr(prepare_data, "CHUNK_BYTES", chunk)
        with pytest.raises(UserError, match=r"bad.txt is not UTF-8 text: invalid byte at offset 100"):
            prepare("bad", "bad.txt")
    Path("bad.txt").write_bytes(b"enough characters and a " + "é".encode()[:1])
    with pytest.raises(UserError, match="offset 24"):
        prepare("bad", "bad.txt")
    assert not Path("data/bad").exists()


def test_a_failure_half_way_leaves_the_old_files(workdir, monkeypatch):
    before = {p: p.read_bytes() for p in Path("data/tiny").glob("*.*")}
    Path("tiny.txt").write_text("other text " * 100, encoding="utf-8")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full_disk)
    with pytest.raises(OSError, match="No space"):
        prepare("tiny", "tiny.txt", "byte")
    assert {p: p.read_bytes() for p in Path("data/tiny").glob("*.*")} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("",), "needs a plain name"),
        (("../x", "tiny.txt"), "needs a plain name"),
        (("x",), r"x is not built in \(shakespeare, python_docs are\)"),
        (("x", "nowhere"), "no file or folder nowhere"),
        (("x", "empty.txt"), "0 characters"),
        (("x", "tiny.txt", "words"), "unknown tokenizer words"),
    ],
)
def test_mistakes_are_clear(workdir, arguments, message):
    Path("empty.txt").touch()
    with pytest.raises(UserError, match=message):
        prepare(*arguments)


def test_python_docs_need_no_network(workdir):
    meta = prepare("python_docs")
    assert meta["train_tokens"] > 300_000
    assert "Python 3" in meta["source"]


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


def test_a_failed_download_says_what_to_do(workdir, no_network):
    with pytest.raises(UserError, match=r"prepare_data.py shakespeare --input FILE"):
        prepare("shakespeare")


def test_training_falls_back_to_python_docs_and_says_so(train, no_network, capsys):
    import torch

    train(dataset="shakespeare", max_iters=1, eval_interval=1, eval_iters=2)
    printed = capsys.readouterr().out
    assert "prepare_data.py shakespeare --input FILE" in printed and "Training on python_docs instead" in printed
    state = torch.load("out/last.pt")
    assert state["config"]["dataset"] == state["tokenizer"]["dataset"] == "python_docs"
    assert "pydoc_data" in state["tokenizer"]["source"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_is_bounded_by_a_chunk_not_by_the_text(workdir):
    with open("large.txt", "w", encoding="utf-8") as file:
        for _ in range(1000):
            file.write(TEXT * 12)  # 41 MB
    code = """if True:
        import re, prepare_data
        prepare_data.prepare("large", "large.txt", "char")
        print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150_000  # KiB; the text, its characters and its tokens are 330,000


@pytest.mark.parametrize("damage", ["meta", "short", "odd", "missing"])
def test_damaged_datasets_are_refused(workdir, damage):
    path = Path("data/tiny/val.bin")
    if damage == "meta":
        Path("data/tiny/meta.json").write_text("{")
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -2 if damage == "short" else -1])
    with pytest.raises(UserError, match="prepare the dataset again"):
        open_dataset("tiny")


def test_progress_shows_rate_and_time_left(capsys, monkeypatch):
    now = iter([0.0, 1.0, 4.0, 8.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    progress = prepare_data.Progress("encoding", 8_000_000)
    progress.add(1_000_000)
    assert capsys.readouterr().err == ""
    progress.add(3_000_000)
    assert "encoding:  50% of 8 MB, 1.0 MB/s, 4 s left" in capsys.readouterr().err
    progress.add(4_000_000)
    assert capsys.readouterr().err.endswith("0 s left \n")
