import csv
import gzip
import json
import os
import random
import signal
import sys
import tarfile
import time
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, UNICODE, assert_refused

import prepare_data
import sample
from prepare_data import prepare
from support.checkpoint import lock
from support.dataset import open_dataset
from support.settings import UserError
from support.sources import Source
from support.tokenizer import ByteTokenizer, load_tokenizer

BOM = b"\xef\xbb\xbf"


def corpus(n):
    """n different documents of a few words."""
    words = TEXT.split()
    return [" ".join(random.Random(i).choices(words, k=5 + i % 50)) + f" {i}\n" for i in range(n)]


def json_lines(documents):
    rows = [{"text": text, "id": i} for i, text in enumerate(documents)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, content):
    """Write content, text or bytes, zipped where the path ends in .gz, without a change."""
    data = content if isinstance(content, bytes) else content.encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(gzip.compress(data) if path.endswith(".gz") else data)


def files_of(name):
    return {p.name: p.read_bytes() for p in Path("data", name).glob("*.bin")}


def tokens_of(name):
    """All tokens of a dataset, of the training and then the validation split."""
    return np.concatenate(open_dataset(name)[:2]).tolist()


def documents_of(name):
    """What is in the training and the validation split, as two lists of documents."""
    *splits, meta = open_dataset(name)
    texts = [load_tokenizer(meta).decode(tokens.tolist()) for tokens in splits]
    return [text.split("<|endoftext|>") for text in texts]


def write_ids(name, ids):
    """A folder of token files, as another program would write it."""
    Path("data", name).mkdir(parents=True, exist_ok=True)
    ids[: len(ids) * 9 // 10].astype("<u2").tofile(f"data/{name}/train.bin")
    ids[len(ids) * 9 // 10 :].astype("<u2").tofile(f"data/{name}/val.bin")


# -------------------------------------------------------------------------------- what is written


def test_files_hold_the_text_split_nine_to_one(workdir):
    train, val, meta = open_dataset("tiny")
    tokenizer = load_tokenizer(meta)
    cut = len(TEXT) * 9 // 10
    assert tokenizer.decode(train.tolist()) == TEXT[:cut]
    assert tokenizer.decode(val.tolist()) == TEXT[cut:]
    expected = np.array(tokenizer.encode(TEXT[:cut]), "<u2").tobytes()
    assert Path("data/tiny/train.bin").read_bytes() == expected
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))
    assert (meta["vocab_size"], meta["dtype"]) == (len(set(TEXT)), "uint16")
    assert meta["source"] == "tiny.txt"
    names = sorted(path.name for path in Path("data/tiny").iterdir())
    assert names == ["lock", "meta.json", "train.bin", "val.bin"]


def test_tiny_shakespeare_has_the_figures_everyone_has(workdir, tiny_shakespeare, gpt2_vocabulary):
    figures = {"char": (1_003_854, 111_540, 65), "gpt2": (301_966, 36_059, 50257)}
    for tokenizer, expected in figures.items():
        meta = prepare("shakespeare", str(tiny_shakespeare), tokenizer)
        sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
        assert meta["sha256"] == sha256
        assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == expected


@pytest.mark.parametrize("chunk", [1, 64])
def test_tokens_do_not_depend_on_the_chunk_size(workdir, gpt2_vocabulary, monkeypatch, chunk):
    text = (TEXT[:500] + UNICODE + "3.14, 1,000!!\n\n\n  x = 1\n") * 3
    write("mixed.txt", text)
    cut = len(text) * 9 // 10
    monkeypatch.setattr("support.sources.CHUNK_CHARS", chunk)
    prepare("mixed", "mixed.txt", "byte")
    assert bytes(tokens_of("mixed")) == text.encode()
    if chunk == 64:  # a chunk without a letter before white space has to be cut anywhere
        prepare("mixed", "mixed.txt", "gpt2")
        train, val, _ = open_dataset("mixed")
        assert train.tolist() == gpt2_vocabulary.encode_ordinary(text[:cut])
        assert val.tolist() == gpt2_vocabulary.encode_ordinary(text[cut:])


def test_the_number_of_workers_changes_nothing(workdir, monkeypatch):
    monkeypatch.setattr("prepare_data.BATCH_CHARS", 500)
    write("rows.jsonl", json_lines(corpus(200)))
    for workers in (1, 3):
        prepare(f"with{workers}", "rows.jsonl", "bpe:300", workers=workers)
    assert files_of("with1") == files_of("with3")


def test_a_large_vocabulary_takes_four_bytes(workdir, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 70_000)
    prepare("wide", "tiny.txt", "byte")
    assert Path("data/wide/val.bin").stat().st_size == 4 * len(open_dataset("wide")[1])
    assert bytes(tokens_of("wide")).decode() == TEXT


MEASURE = """
import re, prepare_data
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
prepare_data.prepare("large", "large.txt", "char")
print(peak() - before)"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_is_bounded_by_a_chunk_not_by_the_text(run):
    write("large.txt", TEXT * 12_000)  # 41 MB
    Path("measure.py").write_text(MEASURE)
    peak = int(run("measure.py").stdout)
    assert peak < 100_000  # KiB; the text, its characters and its tokens are 300,000


# ------------------------------------------------------------------------------- what can be read


def test_a_folder_is_its_files_in_order_with_end_of_text_between(workdir):
    texts = {"b.txt": "second one", "a.txt": "the first", "sub/c[1].md": "third " * 30}
    for name, content in (texts | {".git/hidden": b"\xff"}).items():
        write(f"cor[p]us/{name}", content)
    meta = prepare("corpus", "cor[p]us", "bpe:260")
    text = load_tokenizer(meta).decode(tokens_of("corpus"))
    assert text == "the first<|endoftext|>second one<|endoftext|>" + "third " * 30
    assert meta["source"] == "3 files in cor[p]us"


def test_json_lines_arrays_gzip_and_patterns_are_the_same_text(workdir):
    texts = [*corpus(60), "a half \ud83d pair", 'quotes " and ☃\n', ""]
    array = json.dumps([{"text": text} for text in texts], indent=1)
    write("a.jsonl", json_lines(texts[:30]))
    write("b.jsonl.gz", json_lines(texts[30:]))
    write("all.jsonl", json_lines(texts))
    write("array.json", array)
    write("array.json.gz", array)
    write("blank.jsonl", b"\n" + json_lines(texts).replace(b"\n", b"\n \r\n") + b"\n  ")
    prepare("one", "all.jsonl", "bpe:300")
    for other in ("[ab].jsonl*", "array.json", "array.json.gz", "blank.jsonl"):
        prepare("other", other, "bpe:300")
        assert files_of("other") == files_of("one")
    train, val = documents_of("one")
    expected = [*texts[:60], "a half \ufffd pair", texts[61]]
    assert sorted(train + val) == sorted(expected)
    assert train == sorted(train, key=expected.index)  # in order


def test_a_byte_order_mark_at_the_start_is_no_text_and_names_the_encoding(workdir, monkeypatch):
    monkeypatch.setattr("support.sources.CHUNK_CHARS", 100)
    for name in ("bom.txt", "bom.txt.gz"):
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            write(name, TEXT.encode(encoding))
            assert prepare("bom", name)["sha256"] == open_dataset("tiny")[2]["sha256"]
            assert files_of("bom") == files_of("tiny")
    write("rows.jsonl", json_lines(corpus(50)))
    prepare("rows", "rows.jsonl", "byte")
    array = json.dumps([{"text": text} for text in corpus(50)]).encode()
    for name, rows in {"a.jsonl": json_lines(corpus(50)), "b.json": array}.items():
        write(name, BOM + rows)
        prepare("bom", name, "byte")
        assert files_of("bom") == files_of("rows")
    write("inside.txt", TEXT.encode() + BOM)
    prepare("inside", "inside.txt", "byte")
    assert tokens_of("inside")[-3:] == [*BOM]  # elsewhere it is a character


def test_a_key_or_a_column_can_be_named(workdir):
    rows = [{"content": text, "id": i} for i, text in enumerate(corpus(50))]
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    expected = prepare("rows", "rows.jsonl", field="content")["sha256"]
    for path, delimiter in (("semicolons.csv", ";"), ("rows.tsv", "\t"), ("rows.csv", ",")):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "content"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert prepare("rows", path, field="content")["sha256"] == expected
    assert_refused("line 1.*no text here; .* content, id", prepare, "rows", "rows.jsonl")
    assert_refused("row 1 .no body here; .* id, content", prepare, "rows", "rows.csv", field="body")
    write("chat.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}')
    assert_refused("messages is a list: join it", prepare, "rows", "chat.jsonl", field="messages")


def test_in_a_folder_what_is_no_text_is_skipped_and_named_and_a_link_counts_once(workdir, capsys):
    write("notes/a.md", TEXT)
    write("notes/b.png", b"\x89PNG\r\n\x1a\n")
    write("notes/c.dat", bytes(range(256)))
    for name in ("a-again.md", "z.md"):
        Path("notes", name).symlink_to("a.md")
    meta = prepare("notes", "notes")
    assert meta["train_bytes"] + meta["val_bytes"] == len(TEXT.encode())
    said = capsys.readouterr().err
    assert "2 skipped, not text" in said and "b.png (a picture)" in said
    write("one", b"PK\x03\x04")
    assert_refused("one is not text, it seems to be a zip archive", prepare, "one", "one")


def test_special_tokens_in_the_text_are_text_and_noted_or_read_as_such(
    workdir, gpt2_vocabulary, capsys
):
    write("marked.txt", "one<|endoftext|>two\r\n" * 50)
    for special_tokens in (False, True):
        prepare("marked", "marked.txt", "gpt2", special_tokens=special_tokens)
        train, _, meta = open_dataset("marked")
        assert (50256 in train) == special_tokens
        assert (load_tokenizer(meta).encode("<|endoftext|>") == [50256]) == special_tokens
        said = capsys.readouterr().err
        assert ("<|endoftext|> in the text is ordinary text" in said) != special_tokens
        assert said.count("lines end in") == 1
    prepare("marked", "marked.txt")
    assert "<|endoftext|> in the text is no token of this tokenizer" in capsys.readouterr().err


def test_documents_that_nothing_separates_are_noted(workdir, capsys):
    write("rows.jsonl", json_lines(corpus(9)))
    for tokenizer, noted in (("char", True), ("bpe:260", False)):
        prepare("rows", "rows.jsonl", tokenizer, val_share=0.5)
        assert ("nothing separates documents" in capsys.readouterr().err) == noted
    prepare("one", "tiny.txt")
    assert capsys.readouterr().err == ""


def test_ids_of_ones_own_are_trained_on_evaluated_resumed_and_sampled(train, capsys):
    ids = np.arange(4000) % 7 * 20
    ids.astype("<u2").tofile("codes.bin")
    np.save("codes.npy", ids.reshape(40, 100))
    for path in ("codes.bin", "codes.npy"):
        prepare("codes", path, "ids:128")
        assert tokens_of("codes") == ids.tolist()
    write_ids("bare", ids)  # nothing but sizes
    write("data/bare/meta.json", '{"vocab_size": 128, "dtype": "uint16"}')
    for dataset in ("codes", "bare"):
        for options in ({"max_iters": 20}, {"max_iters": 60}, {"eval_only": True}):
            train(dataset=dataset, out_dir=dataset, **options)
        capsys.readouterr()
        options = {"out_dir": dataset, "max_new_tokens": 4, "temperature": 0.0, "device": "cpu"}
        settings = sample.Settings(prompt=["0 20 40"], **options)
        sample.main(settings)
        assert capsys.readouterr().out.split() == ["0", "20", "40", "60", "80", "100", "120"]
    for prompt in ("128", "-1", "x"):
        assert_refused("ids from 0 to 127", sample.main, replace(settings, prompt=[prompt]))


@pytest.mark.parametrize(
    "values, message",
    [
        ([1, 2, 3, 128], r"codes.npy has ids from 1 to 128: not within 128"),
        ([-1, 2, 3, 4], r"codes.npy has ids from -1 to 4: not within 128"),
        ([1.0] * 9, "values of type float64: expected whole numbers"),
        ([{}] * 9, r"codes.npy can't be read"),  # a pickle
    ],
)
def test_ids_outside_the_vocabulary_are_refused(workdir, values, message):
    np.save("codes.npy", np.array(values), allow_pickle=True)
    assert_refused(message, prepare, "codes", "codes.npy", "ids:128")


def test_a_folder_without_meta_is_nanogpts_if_it_looks_so(workdir):
    ids = np.arange(1000)
    write_ids("codes", ids)
    assert_refused(r'no meta.json, .* up to 899, .*"vocab_size": 900', open_dataset, "codes")
    write_ids("other", ids + 49_000)
    write_ids("openwebtext", ids)
    for name in ("other", "openwebtext"):
        meta = open_dataset(name)[2]
        assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (900, 100, 50257)
    assert tokens_of("openwebtext") == ids.tolist()
    write("data/openwebtext/val.bin", b"odd")
    assert_refused(r"val.bin .* has a wrong size", open_dataset, "openwebtext")
    write("data/openwebtext/meta.pkl", b"\x80")
    assert_refused(r"meta.pkl is a pickle, which is not opened", open_dataset, "openwebtext")


def test_added_documents_move_no_document_to_the_other_split(workdir):
    texts = corpus(600)
    write("rows.jsonl", json_lines(texts[:200]))
    prepare("before", "rows.jsonl", "bpe:300")
    write("rows.jsonl", json_lines(texts[::-1]))
    meta = prepare("after", "rows.jsonl", "bpe:300")
    before, after = documents_of("before"), documents_of("after")
    assert set(before[0]) < set(after[0]) and set(before[1]) < set(after[1])
    assert sorted(after[0] + after[1]) == sorted(texts)
    assert 0.05 < len(after[1]) / 600 < 0.15
    n_tokens = [len(load_tokenizer(meta).encode(text)) for text in after[1]]
    assert meta["val_tokens"] == sum(n_tokens) + len(n_tokens) - 1  # with end of text between
    assert meta["val_bytes"] == sum(len(text) for text in after[1])  # for bits per byte: without

    for i, text in enumerate(texts[:200]):
        write(f"many/{i:03}.txt", text)
    prepare("many", "many", "bpe:300")
    assert files_of("many") == files_of("before")


def test_a_document_of_several_pieces_stays_in_one_split(workdir, monkeypatch):
    monkeypatch.setattr("support.sources.CHUNK_CHARS", 50)
    monkeypatch.setattr(prepare_data, "MAX_FILES", 10)
    for i in range(20):
        write(f"many/{i}.txt", f"{i:02} " * 100)
    prepare("many", "many", "byte", val_share=0.5)
    splits = [set(bytes(tokens.tolist()).decode().split()) for tokens in open_dataset("many")[:2]]
    assert not splits[0] & splits[1] and len(splits[0] | splits[1]) == 20


def test_a_dataset_in_the_hubs_form_is_streamed(workdir, monkeypatch):
    datasets = pytest.importorskip("datasets")
    write("local/train.jsonl", json_lines(corpus(200)))
    prepare("hub", "hf:local", "bpe:300")
    prepare("file", "local/train.jsonl", "bpe:300")
    assert files_of("hub") == files_of("file")

    def no_network(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    assert_refused(r"here can't be read \(no\)$", prepare, "hub", "hf:nowhere/here", "byte")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_refused("pip install datasets", prepare, "hub", "hf:owner/name", "byte")


def test_without_a_network_training_uses_pythons_manual_and_says_so(train, monkeypatch, capsys):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert_refused(r"prepare_data.py shakespeare --input FILE", prepare, "shakespeare")
    train(dataset="shakespeare", max_iters=1, eval_interval=1, eval_iters=2)
    printed = capsys.readouterr().out
    assert "prepare_data.py shakespeare --input FILE" in printed
    assert "Training on python_docs instead" in printed
    meta = torch.load("out/last.pt")["tokenizer"]
    assert meta["dataset"] == "python_docs" and meta["train_tokens"] > 300_000
    assert "Python 3" in meta["source"]


# -------------------------------------------------------------------------- interruptions, damage

KILLED = """
import os, signal, prepare_data
prepare_data.BATCH_CHARS = 500
write, written = prepare_data.TokenFile.write, []
def killed(*args):
    if len(written) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(*args))
prepare_data.TokenFile.write = killed
prepare_data.prepare("killed", "rows.jsonl", "bpe:300")"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_an_interrupted_preparation_leaves_the_old_dataset_and_the_next_one_starts_again(run):
    write("rows.jsonl", json_lines(corpus(200)))
    meta = prepare("whole", "rows.jsonl", "bpe:300")
    prepare("killed", "tiny.txt", "byte")
    before = files_of("killed")
    Path("killed.py").write_text(KILLED)
    assert run("killed.py").returncode == -signal.SIGKILL
    assert Path("data/killed/partial").exists()
    assert files_of("killed") == before and open_dataset("killed")[2]["source"] == "tiny.txt"
    assert prepare("killed", "rows.jsonl", "bpe:300") == meta | {"dataset": "killed"}
    assert files_of("killed") == files_of("whole")
    assert not Path("data/killed/partial").exists()


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "meta.json"])
def test_an_interruption_while_files_are_replaced_is_refused_until_the_dataset_is_whole(
    workdir, monkeypatch, file
):
    os_replace = os.replace

    def dies_at_file(source, target):
        if Path(target) == Path("data/tiny", file):
            raise KeyboardInterrupt
        os_replace(source, target)

    write("other.txt", TEXT[::-1])  # of the same length, with the same characters
    write("short.txt", "ten chars.")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", dies_at_file)
        prepare("tiny", "other.txt")
    assert_refused("prepare the dataset again", open_dataset, "tiny")
    assert_refused("too few", prepare, "tiny", "short.txt")
    assert_refused("prepare the dataset again", open_dataset, "tiny")  # still mixed
    prepare("tiny", "other.txt")
    prepare("other", "other.txt")
    assert files_of("tiny") == files_of("other")
    assert open_dataset("tiny")[2]["sha256"] == open_dataset("other")[2]["sha256"]


def test_nothing_else_in_the_folder_is_touched(workdir):
    names = ["input.txt", "meta.pkl", "train_00001.bin", "notes.json", "sub/train.bin"]
    for name in names:
        write(f"data/tiny/{name}", name)
    write("data/tiny/partial/train.bin", bytes(9999))  # of an interrupted preparation
    write("data/tiny/partial/journal.json", "")
    before = files_of("tiny")
    prepare("tiny", "tiny.txt")
    assert [Path("data/tiny", name).read_text() for name in names] == names
    assert files_of("tiny") == before and not Path("data/tiny/partial").exists()


def test_two_preparations_of_one_dataset_at_a_time_are_refused(workdir):
    message = "another process is writing to data.tiny"
    with lock(Path("data/tiny/lock")), pytest.raises(UserError, match=message):
        prepare("tiny", "tiny.txt")
    prepare("tiny", "tiny.txt")


@pytest.mark.parametrize("damage", ["{", "short", "odd", "missing", "vocab_size", "dtype"])
def test_damaged_datasets_are_refused(workdir, damage):
    path, meta = Path("data/tiny/val.bin"), Path("data/tiny/meta.json")
    if damage == "missing":
        path.unlink()
    elif damage in ("short", "odd"):
        path.write_bytes(path.read_bytes()[: -2 if damage == "short" else -1])
    elif damage == "{":
        meta.write_text(damage)
    else:
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {damage: None}))
    assert_refused("prepare the dataset again", open_dataset, "tiny")


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_invalid_utf8_names_file_and_offset_and_how_to_convert_it(workdir, monkeypatch, chunk):
    monkeypatch.setattr("support.sources.CHUNK_CHARS", chunk)
    bad = "é".encode() * 50 + b"\xff" + b"more" * 9
    write("bad.txt", bad)
    write("marked.txt", BOM + bad)
    write("bad.txt.gz", bad)
    write("end.txt", b"x" * 20_000 + b"enough characters and a " + "é".encode()[:1])
    offsets = {"bad.txt": 100, "marked.txt": 103, "bad.txt.gz": 100, "end.txt": 20_024}
    for name, offset in offsets.items():
        message = rf"^{name} is not UTF-8 text: invalid byte at offset {offset}; "
        assert_refused(rf"{message}.*iconv -f cp1252 -t utf-8 {name}", prepare, "bad", name)
    assert not Path("data/bad").exists()


def test_bad_rows_and_damaged_gzip_are_clear(workdir):
    for line in ("not json", '{"txt": "a"}', '{"text": 1}', "[]", "[" * 99999):
        write("bad.jsonl", '{"text": "good"}\n' + line)
        with pytest.raises(UserError, match=r"bad.jsonl, line 2: expected JSON obj") as raised:
            prepare("bad", "bad.jsonl", "byte")
        assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)
    for content in ('{"a":\n {}}', '["a"]', "[" * 99999, '[{"text": "good"}, {"text": 1}]'):
        write("bad.json", content)
        assert_refused("bad.json, line 1: .* or in an array", prepare, "bad", "bad.json", "byte")
    for name, text in (("bad.txt.gz", TEXT), ("bad.jsonl.gz", '{"text": "good"}\n' * 999)):
        whole = gzip.compress(text.encode())
        for damaged in (whole[:-20], whole[:30] + bytes(9) + whole[39:]):
            Path(name).write_bytes(damaged)
            assert_refused(f"{name} is damaged", prepare, "bad", name)


FEW = "and 0 validation tokens are too few: give more text or documents, or another --val_share"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("../x", "tiny.txt"), "expected a plain name and a text: .* NAME --input PATH"),
        (("x", "nowhere"), "no file or folder nowhere"),
        (("x", "empty.txt"), f"^0 training {FEW}"),
        (("x", "rows.jsonl", "byte", 0.0), rf"^\d+ training {FEW}"),
        (("x", "empty.txt", "bpe:4096"), "only 257 tokens: give more text, or a smaller bpe:N"),
        (("x", "tiny.txt", "words"), "no tokenizer words"),
        (("x", "tiny.txt", "bpe:256"), r"bpe:N \(N > 256\)"),
        (("x", "tiny.txt", "ids"), r"no tokenizer ids: expected .* ids:N"),
        (("x", "rows.txt", "ids:9"), "99 bytes: expected token ids of 2 bytes each, or a .npy"),
        (("x", "tiny.txt", "char", 0.1, "body"), "--field is for .jsonl, .json, .csv and .tsv"),
        (("x", "tiny.txt", "char", 0.1, "", True), "--tokenizer=char has no special tokens"),
    ],
)
def test_mistakes_are_clear(workdir, arguments, message):
    write("empty.txt", "")
    write("rows.txt", bytes(99))
    write("rows.jsonl", json_lines(corpus(9)))
    assert_refused(message, prepare, *arguments)


def test_the_command_says_what_it_wrote_and_what_to_type(call):
    mistakes = {
        (): "NAME --input PATH (only shakespeare and python_docs need no --input)",
        ("mine", "tiny.txt"): "unexpected argument tiny.txt: --help shows the usage; a pattern",
    }
    for arguments, message in mistakes.items():
        done = call("prepare_data.py", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = call("prepare_data.py", "mine", "--input", "tiny.txt")
    counts = "3,060 training and 340 validation tokens, vocabulary of 23 (char)"
    first = f"the first tokens: {list('To be, or no')}\n"
    assert done.stdout == f"data/mine: {counts}, from tiny.txt\n{first}"
    assert done.returncode == 0 and done.stderr == ""


def test_progress_is_a_line_every_five_seconds(workdir, capsys, monkeypatch):
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr("support.sources.CHUNK_CHARS", 100)
    write("long.txt", TEXT * 10)
    sources = prepare_data.find_sources("long", "long.txt")
    assert "".join(text for _, text in prepare_data.read_all(sources, "reading")) == TEXT * 10
    lines = capsys.readouterr().err.splitlines()
    assert 50 < len(lines) < 200 and lines[0] == "reading: 0 million characters of 0 MB"


def test_a_bpe_is_learned_from_a_stream_of_rows_without_reading_it_to_its_end(monkeypatch):
    monkeypatch.setattr(prepare_data, "SAMPLE_CHARS", 5000)
    read = []

    def rows():
        for text in corpus(1000):
            read.append(text)
            yield True, text

    sources = [Source("rows", rows, is_document=False)]
    _, tokenizer = prepare_data.first_pass(sources, "bpe:300", count=False)
    assert tokenizer.vocab_size == 300
    assert 5000 <= sum(map(len, read)) < 5500


def test_archives_and_zipped_files_that_are_no_text_are_refused(workdir):
    with tarfile.open("texts.tar.gz", "w:gz") as archive:
        archive.add("tiny.txt")
    assert_refused("texts.tar.gz is not text, .* a tar archive", prepare, "one", "texts.tar.gz")
    write("paper.gz", b"%PDF-1.7 and so on")
    assert_refused("paper.gz is not text, it seems to be a PDF", prepare, "one", "paper.gz")


def test_ids_too_few_to_split_leave_the_previous_dataset(workdir):
    np.save("codes.npy", np.arange(9))
    prepare("codes", "codes.npy", "ids:128")
    before = files_of("codes")
    np.save("few.npy", np.arange(4))
    assert_refused("has only 4 ids", prepare, "codes", "few.npy", "ids:128", val_share=0.9)
    assert files_of("codes") == before


@pytest.mark.parametrize("val_share, n_val", [(0.3, 27), (0.1, 9)])
def test_the_share_for_validation_is_exact(workdir, val_share, n_val):
    """Although 90 * (1 - 0.3) is 62.99999999999999."""
    write("ninety.txt", "0123456789" * 9)
    assert prepare("ninety", "ninety.txt", val_share=val_share)["val_tokens"] == n_val
