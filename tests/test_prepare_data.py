import gzip
import io
import json
import os
import random
import signal
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
from dataset import open_dataset
from files import lock
from prepare_data import prepare
from tokenizer import ByteTokenizer, load_tokenizer, train_bpe

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
    assert sorted(p.name for p in Path("data/tiny").iterdir()) == ["lock", "meta.json", "train.bin", "val.bin"]


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


def test_two_preparations_of_one_dataset_at_a_time_are_refused(workdir):
    held = lock(Path("data/tiny/lock"))
    with pytest.raises(UserError, match=r"another process is writing to data.tiny"):
        prepare("tiny", "tiny.txt")
    held.close()
    prepare("tiny", "tiny.txt")


def test_a_failure_half_way_leaves_the_old_files(workdir, monkeypatch):
    before = {p: p.read_bytes() for p in Path("data/tiny").glob("*.*")}
    Path("tiny.txt").write_text("other text " * 100, encoding="utf-8")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.write_whole", full_disk)
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


def corpus(n):
    """n different documents of a few words."""
    words = TEXT.split()
    return [" ".join(random.Random(i).choices(words, k=5 + i % 50)) + f" {i}\n" for i in range(n)]


def write_rows(path, documents):
    rows = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)).encode()
    Path(path).write_bytes(gzip.compress(rows) if path.endswith(".gz") else rows)


def files_of(name):
    return {p.name: p.read_bytes() for p in Path("data", name).iterdir() if p.suffix == ".bin"}


def documents_of(name, vocabulary):
    """What is in the training and the validation split, as two lists of documents."""
    return [vocabulary.decode(tokens[:].tolist()).split("<|endoftext|>") for tokens in open_dataset(name)[:2]]


def test_json_lines_gzip_patterns_and_standard_input_are_the_same_text(workdir, gpt2_vocabulary, monkeypatch):
    texts = [*corpus(60), "a half \ud83d pair", 'quotes " and ☃\n', ""]
    write_rows("a.jsonl", texts[:30])
    write_rows("b.jsonl.gz", texts[30:])
    write_rows("all.jsonl", texts)
    prepare("pattern", "[ab].jsonl*", "gpt2")
    prepare("one", "all.jsonl", "gpt2")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(Path("all.jsonl").read_bytes()))))
    prepare("stdin", "-", "gpt2")
    assert files_of("pattern") == files_of("one") == files_of("stdin")
    train, val = documents_of("one", gpt2_vocabulary)
    assert sorted(train + val) == sorted([*texts[:60], "a half \ufffd pair", texts[61]])
    assert train == sorted(train, key=[*texts[:60], "a half \ufffd pair", texts[61]].index)  # in order

    Path("tiny.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    prepare("zipped", "tiny.txt.gz")
    prepare("piped", "-")
    assert files_of("zipped") == files_of("piped") == files_of("tiny")
    assert open_dataset("zipped")[2]["sha256"] == open_dataset("tiny")[2]["sha256"]


def test_what_is_added_moves_no_document_to_the_other_split(workdir, gpt2_vocabulary):
    texts = corpus(600)
    write_rows("rows.jsonl", texts[:200])
    prepare("before", "rows.jsonl", "gpt2")
    write_rows("rows.jsonl", texts[::-1])
    meta = prepare("after", "rows.jsonl", "gpt2")
    before, after = documents_of("before", gpt2_vocabulary), documents_of("after", gpt2_vocabulary)
    assert set(before[0]) < set(after[0]) and set(before[1]) < set(after[1])
    assert sorted(after[0] + after[1]) == sorted(texts)
    assert 0.05 < len(after[1]) / 600 < 0.15
    assert meta["val_bytes"] == sum(len(text) for text in after[1])  # of bits per byte: without end of text
    assert meta["val_tokens"] == sum(len(gpt2_vocabulary.encode(text)) + 1 for text in after[1]) - 1

    Path("many").mkdir()
    for i, text in enumerate(texts[:200]):
        Path("many", f"{i:03}.txt").write_bytes(text.encode())
    prepare("many", "many", "gpt2")
    assert files_of("many") == files_of("before")
    with pytest.raises(UserError, match=r"no document of rows.jsonl fell into the val split: give more"):
        prepare("none", "rows.jsonl", "byte", val_share=0.0)


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "bpe:300"])
def test_the_number_of_workers_changes_nothing(workdir, gpt2_vocabulary, monkeypatch, tokenizer):
    monkeypatch.setattr(prepare_data, "CHUNK_BYTES", 500)
    write_rows("rows.jsonl", corpus(200))
    for workers in (1, 3):
        prepare(f"with{workers}", "rows.jsonl", tokenizer, workers=workers)
    assert files_of("with1") == files_of("with3")


def test_batches_do_not_depend_on_the_shards(workdir, monkeypatch):
    import torch

    from model import GPTConfig, MiniGPT
    from train import evaluate, load_windows, training_batch

    config = GPTConfig(16, 23, 1, 1, 8)
    whole = open_dataset("tiny")
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 10)  # shorter than a window
    prepare("sharded", "tiny.txt")
    sharded = open_dataset("sharded")
    names = sorted(files_of("sharded"))
    assert names[:2] == ["train.bin", "train_00001.bin"] and len(names) == 306 + 34
    for a, b in zip(whole[:2], sharded[:2], strict=True):
        assert len(a) == len(b) and (a[:] == b[:]).all()
    for step in range(5):
        a, b = (training_batch(tokens[0], config, 7, step, 0, 8) for tokens in (whole, sharded))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    model = MiniGPT(config)
    assert evaluate(model, whole[1], 4) == evaluate(model, sharded[1], 4)
    assert whole[2]["fingerprint"] == sharded[2]["fingerprint"]
    last = np.array([len(sharded[0]) - 17])
    assert (load_windows(sharded[0], last, config)[1] == torch.from_numpy(sharded[0][-16:].astype(int))).all()

    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 1000)
    prepare("sharded", "tiny.txt")  # fewer shards: the others go
    assert len(files_of("sharded")) == 4 + 1 and open_dataset("sharded")[2]["fingerprint"] == whole[2]["fingerprint"]
    Path("data/sharded/train_00001.bin").unlink()
    with pytest.raises(UserError, match="prepare the dataset again"):
        open_dataset("sharded")


def interrupted(name, input, batches):
    """Run prepare in a process of its own that is killed when so many batches are in the journal."""
    code = f"""if True:
        import os, signal, prepare_data
        prepare_data.CHUNK_BYTES, prepare_data.SHARD_TOKENS, prepare_data.JOURNAL_SECONDS = 1000, 700, 0
        write_json, written = prepare_data.write_json, []
        def killed(*args):
            if len(written) == {batches}:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(write_json(*args))
        prepare_data.write_json = killed
        prepare_data.prepare({name!r}, {input!r}, "gpt2")"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("input", ["long.txt", "rows.jsonl"])
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(
    workdir, gpt2_vocabulary, monkeypatch, capsys, input
):
    Path("long.txt").write_text("".join(corpus(200)), encoding="utf-8", newline="\n")
    write_rows("rows.jsonl", corpus(200))
    for constant, value in {"CHUNK_BYTES": 1000, "SHARD_TOKENS": 700, "JOURNAL_SECONDS": 0}.items():
        monkeypatch.setattr(prepare_data, constant, value)
    meta = prepare("whole", input, "gpt2")
    prepare("killed", "tiny.txt", "gpt2")
    before = files_of("killed")
    interrupted("killed", input, batches=9)
    assert files_of("killed") == before and open_dataset("killed")[2]["source"] == "tiny.txt"  # of use until then
    capsys.readouterr()
    assert prepare("killed", input, "gpt2") == meta | {"dataset": "killed"}
    assert "going on after" in capsys.readouterr().err
    assert files_of("killed") == files_of("whole")
    assert not Path("data/killed/partial").exists()

    interrupted("killed", input, batches=9)
    interrupted("killed", "tiny.txt", batches=0)  # something else is begun over it
    prepare("killed", input, "gpt2")
    assert "going on after" not in capsys.readouterr().err
    assert files_of("killed") == files_of("whole")

    interrupted("killed", input, batches=9)  # and starts again when the text, though as long, is another one
    changed = Path(input).read_text(encoding="utf-8").replace("be", "so")
    Path(input).write_text(changed, encoding="utf-8", newline="\n")
    prepare("killed", input, "gpt2")
    assert "going on after" not in capsys.readouterr().err
    prepare("whole", input, "gpt2")
    assert files_of("killed") == files_of("whole")


def test_an_interruption_while_files_are_replaced_is_seen_and_mended(workdir, monkeypatch):
    replace = os.replace

    def dies_at_val(source, target):
        if Path(target).name == "val.bin":
            raise KeyboardInterrupt
        replace(source, target)

    Path("other.txt").write_text(TEXT[::-1], encoding="utf-8")  # of the same length, with the same characters
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", dies_at_val)
        prepare("tiny", "other.txt")
    with pytest.raises(UserError, match="prepare the dataset again"):
        open_dataset("tiny")
    prepare("tiny", "other.txt")
    prepare("other", "other.txt")
    assert files_of("tiny") == files_of("other")


def test_bad_rows_and_damaged_gzip_are_clear(workdir):
    for line in ("not json", '{"txt": "a"}', '{"text": 1}', "[]", '{"text": "\udc80'):
        Path("bad.jsonl").write_bytes(b'{"text": "good"}\n' + line.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r'bad.jsonl, line 2: expected a JSON object with a "text"'):
            prepare("bad", "bad.jsonl", "byte")
    for name, text in (("bad.txt.gz", TEXT), ("bad.jsonl.gz", '{"text": "good"}\n' * 999)):
        whole = gzip.compress(text.encode())
        for damaged in (whole[:-20], whole[:30] + bytes(9) + whole[39:]):
            Path(name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} is damaged"):
                prepare("bad", name)


def test_a_dataset_in_the_hubs_form_is_streamed(workdir, gpt2_vocabulary, monkeypatch):
    datasets = pytest.importorskip("datasets")
    Path("local").mkdir()
    write_rows("local/train.jsonl", corpus(200))
    prepare("hub", "hf:local", "gpt2")
    prepare("file", "local/train.jsonl", "gpt2")
    assert files_of("hub") == files_of("file")

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match=r"hf:nowhere/here can't be read \(ConnectionError: no network\)"):
        prepare("hub", "hf:nowhere/here", "gpt2")


def test_the_hub_needs_a_package(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        prepare("hub", "hf:owner/name", "byte")


def test_a_learned_bpe_has_the_merges_of_hugging_faces_trainer(tiny_shakespeare):
    tokenizers = pytest.importorskip("tokenizers")
    text = tiny_shakespeare.read_text(encoding="utf-8")
    start = time.process_time()
    tokenizer = train_bpe([text], 4096)
    assert time.process_time() - start < 10
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = tokenizers.Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    alphabet = sorted(set(text))  # ASCII, so characters are bytes
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096 - 1 - 256 + len(alphabet), initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([text], trainer)
    merges = [(a + b).encode() for a, b in json.loads(theirs.to_str())["model"]["merges"]]
    ours = [token for token, rank in sorted(tokenizer.encoding._mergeable_ranks.items(), key=lambda item: item[1])]
    assert ours[256:] == merges  # both take the pair with the lower ids of equally frequent ones
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_learned_bpe_is_carried_by_the_dataset(workdir):
    meta = prepare("learned", "tiny.txt", "bpe:300")
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bpe:300", 300)
    train, val, meta = open_dataset("learned")
    tokenizer = load_tokenizer(json.loads(json.dumps(meta)))
    assert tokenizer.decode(train[:].tolist() + val[:].tolist()) == TEXT
    assert tokenizer.eos_token == 299 and len(train) < 0.9 * len(TEXT) / 2
    assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE  # every byte is a token
    with pytest.raises(UserError, match=r"no more than \d+ tokens: --tokenizer=bpe:\d+"):
        prepare("learned", "tiny.txt", "bpe:4096")
    for size in ("bpe:", "bpe:256", "bpe:x"):
        with pytest.raises(UserError, match="as in bpe:4096"):
            prepare("learned", "tiny.txt", size)
