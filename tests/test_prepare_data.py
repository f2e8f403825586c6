import csv
import gzip
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
import sample
from prepare_data import prepare
from support.checkpoint import lock
from support.dataset import open_dataset
from support.settings import UserError
from support.tokenizer import ByteTokenizer, load_tokenizer

UNICODE = (
    "naïve façade, 'tis \r\n\t “quoted” ☃ 漢字 🤖👩‍👩‍👧 \u200b e\u0301 \x00 <|endoftext|>  end \n\n"
)
BOM = b"\xef\xbb\xbf"


def corpus(n):
    """n different documents of a few words."""
    words = TEXT.split()
    return [" ".join(random.Random(i).choices(words, k=5 + i % 50)) + f" {i}\n" for i in range(n)]


def json_lines(documents):
    return "".join(
        json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)
    ).encode()


def write_rows(path, documents):
    Path(path).write_bytes(
        gzip.compress(json_lines(documents)) if path.endswith(".gz") else json_lines(documents)
    )


def files_of(name):
    return {p.name: p.read_bytes() for p in Path("data", name).glob("*.bin")}


def documents_of(name):
    """What is in the training and the validation split, as two lists of documents."""
    *splits, meta = open_dataset(name)
    return [
        load_tokenizer(meta).decode(tokens.tolist()).split("<|endoftext|>") for tokens in splits
    ]


# ---------------------------------------------------------------------------------------------- what is written


def test_files_hold_the_text_split_nine_to_one(workdir):
    train, val, meta = open_dataset("tiny")
    tokenizer = load_tokenizer(meta)
    cut = len(TEXT) * 9 // 10
    assert tokenizer.decode(train.tolist()) == TEXT[:cut]
    assert tokenizer.decode(val.tolist()) == TEXT[cut:]
    assert (
        Path("data/tiny/train.bin").read_bytes()
        == np.array(tokenizer.encode(TEXT[:cut]), "<u2").tobytes()
    )
    assert (
        meta["vocab_size"] == len(set(TEXT))
        and meta["dtype"] == "uint16"
        and meta["source"] == "tiny.txt"
    )
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))
    assert sorted(p.name for p in Path("data/tiny").iterdir()) == [
        "lock",
        "meta.json",
        "train.bin",
        "val.bin",
    ]


def test_tiny_shakespeare_has_the_figures_everyone_has(workdir, tiny_shakespeare, gpt2_vocabulary):
    meta = prepare("shakespeare", str(tiny_shakespeare))
    assert meta["sha256"] == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (
        1_003_854,
        111_540,
        65,
    )
    meta = prepare("shakespeare_gpt2", str(tiny_shakespeare), "gpt2")
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (
        301_966,
        36_059,
        50257,
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_tokens_do_not_depend_on_the_chunk_size(workdir, gpt2_vocabulary, monkeypatch, chunk):
    text = (TEXT[:500] + UNICODE + "3.14, 1,000!!\n\n\n  x = 1\n") * 3
    Path("mixed.txt").write_text(text, encoding="utf-8", newline="")
    cut = len(text) * 9 // 10
    monkeypatch.setattr("support.sources.CHUNK_CHARS", chunk)
    prepare("mixed", "mixed.txt", "byte")
    assert b"".join(part.tobytes() for part in open_dataset("mixed")[:2])[::2] == text.encode()
    if chunk >= 64:  # a chunk without a letter before white space has to be cut anywhere
        prepare("mixed", "mixed.txt", "gpt2")
        train, val, _ = open_dataset("mixed")
        assert train.tolist() == gpt2_vocabulary.encode_ordinary(text[:cut])
        assert val.tolist() == gpt2_vocabulary.encode_ordinary(text[cut:])


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:300"])
def test_the_number_of_workers_changes_nothing(workdir, monkeypatch, tokenizer):
    monkeypatch.setattr("support.sources.CHUNK_CHARS", 500)
    write_rows("rows.jsonl", corpus(200))
    for workers in (1, 3):
        prepare(f"with{workers}", "rows.jsonl", tokenizer, workers=workers)
    assert files_of("with1") == files_of("with3")


def test_a_large_vocabulary_takes_four_bytes(workdir, monkeypatch):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

    monkeypatch.setattr("support.tokenizer.ByteTokenizer", Wide)
    prepare("wide", "tiny.txt", "byte")
    assert Path("data/wide/val.bin").stat().st_size == 4 * len(open_dataset("wide")[1])


def test_a_learned_bpe_is_carried_by_the_dataset(workdir):
    meta = prepare("learned", "tiny.txt", "bpe:300")
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bpe:300", 300)
    train, val, meta = open_dataset("learned")
    tokenizer = load_tokenizer(json.loads(json.dumps(meta)))
    assert tokenizer.decode(train.tolist() + val.tolist()) == TEXT
    assert tokenizer.eos_token == 299 and len(train) < 0.9 * len(TEXT) / 2
    assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE  # every byte is a token


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_is_bounded_by_a_chunk_not_by_the_text(workdir):
    with open("large.txt", "w", encoding="utf-8") as file:
        for _ in range(1000):
            file.write(TEXT * 12)  # 41 MB
    code = """if True:
        import re, prepare_data
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
        before = peak()
        prepare_data.prepare("large", "large.txt", "char")
        print(peak() - before)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100_000  # KiB; the text, its characters and its tokens are 300,000


# --------------------------------------------------------------------------------------------- what can be read


def test_a_folder_is_its_files_in_order_with_end_of_text_between(workdir):
    for name, text in {
        "b.txt": "second one",
        "a.txt": "the first",
        "sub/c[1].md": "third " * 30,
    }.items():
        path = Path("cor[p]us", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    Path("cor[p]us/.git").mkdir()
    Path("cor[p]us/.git/hidden").write_bytes(b"\xff")
    meta = prepare("corpus", "cor[p]us", "bpe:260")
    train, val, _ = open_dataset("corpus")
    text = load_tokenizer(meta).decode(np.concatenate([train, val]).tolist())
    assert text == "the first<|endoftext|>second one<|endoftext|>" + "third " * 30
    assert meta["source"] == "3 files in cor[p]us"


def test_json_lines_arrays_gzip_and_patterns_are_the_same_text(workdir):
    texts = [*corpus(60), "a half \ud83d pair", 'quotes " and ☃\n', ""]
    write_rows("a.jsonl", texts[:30])
    write_rows("b.jsonl.gz", texts[30:])
    write_rows("all.jsonl", texts)
    rows = [{"text": text} for text in texts]
    Path("array.json").write_text(json.dumps(rows, indent=1))
    Path("array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    Path("blank.jsonl").write_bytes(b"\n" + json_lines(texts).replace(b"\n", b"\n \r\n") + b"\n  ")
    prepare("one", "all.jsonl", "bpe:300")
    for other in ("[ab].jsonl*", "array.json", "array.json.gz", "blank.jsonl"):
        prepare("other", other, "bpe:300")
        assert files_of("other") == files_of("one")
    train, val = documents_of("one")
    expected = [*texts[:60], "a half \ufffd pair", texts[61]]
    assert sorted(train + val) == sorted(expected)
    assert train == sorted(train, key=expected.index)  # in order

    Path("tiny.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    prepare("zipped", "tiny.txt.gz")
    assert files_of("zipped") == files_of("tiny")
    assert open_dataset("zipped")[2]["sha256"] == open_dataset("tiny")[2]["sha256"]


@pytest.mark.parametrize("chunk", [1, 2, 100, 1 << 20])
def test_a_byte_order_mark_at_the_start_is_no_text(workdir, monkeypatch, chunk):
    monkeypatch.setattr("support.sources.CHUNK_CHARS", chunk)
    Path("bom.txt").write_bytes(BOM + TEXT.encode())
    Path("bom.txt.gz").write_bytes(gzip.compress(BOM + TEXT.encode()))
    for name in ("bom.txt", "bom.txt.gz"):
        prepare("bom", name)
        assert files_of("bom") == files_of("tiny")
        assert open_dataset("bom")[2]["sha256"] == open_dataset("tiny")[2]["sha256"]
    write_rows("rows.jsonl", corpus(50))
    prepare("rows", "rows.jsonl", "byte")
    array = json.dumps([{"text": text} for text in corpus(50)]).encode()
    for name, rows in {"a.jsonl": json_lines(corpus(50)), "b.json": array}.items():
        Path(name).write_bytes(BOM + rows)
        prepare("bom", name, "byte")
        assert files_of("bom") == files_of("rows")
    Path("inside.txt").write_bytes(TEXT.encode() + BOM)
    prepare("inside", "inside.txt", "byte")
    assert open_dataset("inside")[1].tolist()[-3:] == [*BOM]  # elsewhere it is a character


def test_a_key_or_a_column_can_be_named(workdir):
    rows = [{"content": text, "id": i} for i, text in enumerate(corpus(50))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = prepare("rows", "rows.jsonl", field="content")["sha256"]
    for path, delimiter in (("semicolons.csv", ";"), ("rows.tsv", "\t"), ("rows.csv", ",")):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "content"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert prepare("rows", path, field="content")["sha256"] == expected
    with pytest.raises(UserError, match=r"rows.jsonl, line 1.*no text here; .* content, id"):
        prepare("rows", "rows.jsonl")
    with pytest.raises(UserError, match=r"rows.csv, row 1 \(no body here; .* id, content"):
        prepare("rows", "rows.csv", field="body")
    Path("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(UserError, match=r"messages is a list: join it to one text"):
        prepare("rows", "chat.jsonl", field="messages")


def test_in_a_folder_what_is_no_text_is_skipped_and_named_and_a_link_counts_once(workdir, capsys):
    Path("notes").mkdir()
    Path("notes/a.md").write_text(TEXT)
    Path("notes/b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("notes/c.dat").write_bytes(bytes(range(256)))
    for name in ("a-again.md", "z.md"):
        Path("notes", name).symlink_to("a.md")
    meta = prepare("notes", "notes")
    assert meta["train_bytes"] + meta["val_bytes"] == len(TEXT.encode())
    said = capsys.readouterr().err
    assert "2 skipped, not text" in said and "b.png (a picture)" in said
    for content, kind in ((b"%PDF-1.7\n", "a PDF"), (b"PK\x03\x04", "a zip archive")):
        Path("one").write_bytes(content)
        with pytest.raises(UserError, match=f"one is not text, it seems to be {kind}"):
            prepare("one", "one")


def test_special_tokens_in_the_text_are_text_and_noted_or_read_as_such(
    workdir, gpt2_vocabulary, capsys
):
    Path("marked.txt").write_text("one<|endoftext|>two\r\n" * 50, newline="")
    for special_tokens in (False, True):
        prepare("marked", "marked.txt", "gpt2", special_tokens=special_tokens)
        train, _, meta = open_dataset("marked")
        assert (50256 in train) == special_tokens
        ids = load_tokenizer(json.loads(json.dumps(meta))).encode("<|endoftext|>")
        assert (ids == [50256]) == special_tokens
        said = capsys.readouterr().err
        assert ("<|endoftext|> in the text is ordinary text" in said) != special_tokens
        assert said.count("lines end in") == 1
    prepare("marked", "marked.txt")
    assert "<|endoftext|> in the text is no token of this tokenizer" in capsys.readouterr().err


def test_documents_that_nothing_separates_are_noted(workdir, capsys):
    write_rows("rows.jsonl", corpus(9))
    for tokenizer, noted in (("char", True), ("bpe:260", False)):
        prepare("rows", "rows.jsonl", tokenizer, val_share=0.5)
        assert ("nothing separates documents" in capsys.readouterr().err) == noted
    prepare("one", "tiny.txt")
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------ ids of one's own


@pytest.mark.parametrize("form", ["raw", "npy", "nothing but sizes"])
def test_ids_of_ones_own_are_trained_on_evaluated_resumed_and_sampled(train, capsys, form):
    ids = np.arange(4000) % 7 * 20
    if form == "raw":
        ids.astype("<u2").tofile("codes.bin")
        prepare("codes", "codes.bin", "ids:128")
    elif form == "npy":
        np.save("codes.npy", ids.reshape(40, 100))
        prepare("codes", "codes.npy", "ids:128")
    else:
        Path("data/codes").mkdir(parents=True)
        ids[:3600].astype("<u2").tofile("data/codes/train.bin")
        ids[3600:].astype("<u2").tofile("data/codes/val.bin")
        Path("data/codes/meta.json").write_text('{"vocab_size": 128, "dtype": "uint16"}')
    train_tokens, val_tokens, _ = open_dataset("codes")
    assert np.array_equal(np.concatenate([train_tokens, val_tokens]), ids)
    train(dataset="codes", max_iters=20)
    train(dataset="codes", max_iters=60)
    train(dataset="codes", eval_only=True)
    capsys.readouterr()
    options = {"max_new_tokens": 4, "temperature": 0.0, "device": "cpu"}
    sample.main(sample.Settings(prompt=["0 20 40"], **options))
    assert capsys.readouterr().out.split() == ["0", "20", "40", "60", "80", "100", "120"]
    for prompt in ("128", "-1", "x"):
        with pytest.raises(UserError, match="expected token ids from 0 to 127"):
            sample.main(sample.Settings(prompt=[prompt], **options))


def test_ids_outside_the_vocabulary_are_refused(workdir):
    for values in (np.array([1, 2, 3, 128]), np.array([-1, 2, 3, 4])):
        np.save("codes.npy", values)
        with pytest.raises(UserError, match=r"codes.npy has ids from .* not within 128"):
            prepare("codes", "codes.npy", "ids:128")
    np.save("codes.npy", np.ones(9))
    with pytest.raises(UserError, match="values of type float64: expected whole numbers"):
        prepare("codes", "codes.npy", "ids:128")
    np.save("codes.npy", np.array([{}] * 9), allow_pickle=True)
    with pytest.raises(UserError, match=r"codes.npy can't be read"):
        prepare("codes", "codes.npy", "ids:128")


def test_a_folder_without_meta_is_gpt2s_only_if_it_looks_so(workdir):
    Path("data/codes").mkdir(parents=True)
    for split in ("train", "val"):
        np.arange(1024, dtype="<u2").tofile(f"data/codes/{split}.bin")
    with pytest.raises(UserError, match=r'no meta.json, .* up to 1023, .*"vocab_size": 1024'):
        open_dataset("codes")
    Path("data/codes").rename("data/openwebtext")
    assert open_dataset("openwebtext")[2]["tokenizer"] == "gpt2"


def test_added_documents_move_no_document_to_the_other_split(workdir):
    texts = corpus(600)
    write_rows("rows.jsonl", texts[:200])
    prepare("before", "rows.jsonl", "bpe:300")
    write_rows("rows.jsonl", texts[::-1])
    meta = prepare("after", "rows.jsonl", "bpe:300")
    before, after, encode = (
        documents_of("before"),
        documents_of("after"),
        load_tokenizer(meta).encode,
    )
    assert set(before[0]) < set(after[0]) and set(before[1]) < set(after[1])
    assert sorted(after[0] + after[1]) == sorted(texts)
    assert 0.05 < len(after[1]) / 600 < 0.15
    assert meta["val_bytes"] == sum(
        len(text) for text in after[1]
    )  # of bits per byte: without end of text
    assert meta["val_tokens"] == sum(len(encode(text)) + 1 for text in after[1]) - 1

    Path("many").mkdir()
    for i, text in enumerate(texts[:200]):
        Path("many", f"{i:03}.txt").write_bytes(text.encode())
    prepare("many", "many", "bpe:300")
    assert files_of("many") == files_of("before")


def test_a_document_of_several_pieces_stays_in_one_split(workdir, monkeypatch):
    monkeypatch.setattr("support.sources.CHUNK_CHARS", 50)
    monkeypatch.setattr(prepare_data, "MAX_FILES", 10)
    Path("many").mkdir()
    for i in range(20):
        Path("many", f"{i}.txt").write_text(f"{i:02} " * 100, encoding="utf-8")
    prepare("many", "many", "byte", val_share=0.5)
    splits = [set(bytes(tokens.tolist()).decode().split()) for tokens in open_dataset("many")[:2]]
    assert not splits[0] & splits[1] and len(splits[0] | splits[1]) == 20


def test_a_dataset_in_the_hubs_form_is_streamed(workdir, monkeypatch):
    datasets = pytest.importorskip("datasets")
    Path("local").mkdir()
    write_rows("local/train.jsonl", corpus(200))
    prepare("hub", "hf:local", "bpe:300")
    prepare("file", "local/train.jsonl", "bpe:300")
    assert files_of("hub") == files_of("file")

    def no_network(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match=r"hf:nowhere/here can't be read \(no\)") as raised:
        prepare("hub", "hf:nowhere/here", "byte")
    assert "\n" not in str(raised.value)


def test_the_hub_needs_a_package(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        prepare("hub", "hf:owner/name", "byte")


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
    assert (
        "prepare_data.py shakespeare --input FILE" in printed
        and "Training on python_docs instead" in printed
    )
    state = torch.load("out/last.pt")
    assert state["tokenizer"]["dataset"] == "python_docs"
    assert "pydoc_data" in state["tokenizer"]["source"]


# --------------------------------------------------------------------------------------- interruptions, damage


def interrupted(name, input, batches):
    """Run prepare in a process of its own that is killed before it sends so many batches to be encoded."""
    code = f"""if True:
        import os, signal, prepare_data
        prepare_data.BATCH_CHARS = 500
        write, written = prepare_data.TokenFile.write, []
        def killed(*args):
            if len(written) == {batches}:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(write(*args))
        prepare_data.TokenFile.write = killed
        prepare_data.prepare({name!r}, {input!r}, "bpe:300")"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_an_interrupted_preparation_leaves_the_old_dataset_and_the_next_one_starts_again(workdir):
    write_rows("rows.jsonl", corpus(200))
    meta = prepare("whole", "rows.jsonl", "bpe:300")
    prepare("killed", "tiny.txt", "byte")
    before = files_of("killed")
    interrupted("killed", "rows.jsonl", batches=9)
    assert Path("data/killed/partial").exists()
    assert files_of("killed") == before and open_dataset("killed")[2]["source"] == "tiny.txt"
    assert prepare("killed", "rows.jsonl", "bpe:300") == meta | {"dataset": "killed"}
    assert files_of("killed") == files_of("whole")
    assert not Path("data/killed/partial").exists()


def test_a_failed_preparation_leaves_the_old_dataset(workdir, monkeypatch):
    before = {p: p.read_bytes() for p in Path("data/tiny").glob("*.*")}
    Path("tiny.txt").write_text("other text " * 100, encoding="utf-8")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for target in ("support.checkpoint.write_atomically", "prepare_data.TokenFile.write"):
        with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
            m.setattr(target, full_disk)
            prepare("tiny", "tiny.txt", "byte")
        assert {p: p.read_bytes() for p in Path("data/tiny").glob("*.*")} == before
        assert open_dataset("tiny")[2]["tokenizer"] == "char"


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "meta.json"])
def test_an_interruption_while_files_are_replaced_is_refused_until_the_dataset_is_whole(
    workdir, monkeypatch, file
):
    replace = os.replace

    def dies_at_file(source, target):
        if Path(target) == Path("data/tiny", file):
            raise KeyboardInterrupt
        replace(source, target)

    def dies(*args):
        raise KeyboardInterrupt

    Path("other.txt").write_text(
        TEXT[::-1], encoding="utf-8"
    )  # of the same length, with the same characters
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", dies_at_file)
        prepare("tiny", "other.txt")
    with pytest.raises(UserError, match="prepare the dataset again"):
        open_dataset("tiny")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(prepare_data.TokenFile, "write", dies)
        prepare("tiny", "tiny.txt")
    with pytest.raises(UserError, match="prepare the dataset again"):  # still mixed
        open_dataset("tiny")
    prepare("tiny", "other.txt")
    prepare("other", "other.txt")
    assert files_of("tiny") == files_of("other")
    assert open_dataset("tiny")[2]["sha256"] == open_dataset("other")[2]["sha256"]


def test_nothing_else_in_the_folder_is_touched(workdir):
    folder = Path("data/tiny")
    (folder / "sub").mkdir()
    others = [
        folder / name
        for name in ("input.txt", "meta.pkl", "train_00001.bin", "notes.json", "sub/train.bin")
    ]
    for path in others:
        path.write_text(path.name)
    (folder / "partial").mkdir()
    (folder / "partial/train.bin").write_bytes(bytes(9999))  # of an interrupted preparation
    (folder / "partial/journal.json").touch()
    before = files_of("tiny")
    prepare("tiny", "tiny.txt")
    assert [path.read_text() for path in others] == [path.name for path in others]
    assert files_of("tiny") == before and not (folder / "partial").exists()


def test_two_preparations_of_one_dataset_at_a_time_are_refused(workdir):
    held = lock(Path("data/tiny/lock"))
    with pytest.raises(UserError, match=r"another process is writing to data.tiny"):
        prepare("tiny", "tiny.txt")
    held.close()
    prepare("tiny", "tiny.txt")


@pytest.mark.parametrize(
    "damage", ["{", "[]", "3", "short", "odd", "missing", "vocab_size", "dtype", "val_bytes"]
)
def test_damaged_datasets_are_refused(workdir, damage):
    path, meta = Path("data/tiny/val.bin"), Path("data/tiny/meta.json")
    if damage == "missing":
        path.unlink()
    elif damage in ("short", "odd"):
        path.write_bytes(path.read_bytes()[: -2 if damage == "short" else -1])
    elif damage in ("vocab_size", "dtype", "val_bytes"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {damage: None}))
    else:
        meta.write_text(damage)
    with pytest.raises(UserError, match="prepare the dataset again"):
        open_dataset("tiny")


def test_a_folder_of_nanogpts_is_opened_with_its_sizes_as_counts(workdir):
    folder = Path("data/openwebtext")
    folder.mkdir()
    for split, n in (("train", 1000), ("val", 100)):
        np.arange(n, dtype="<u2").tofile(folder / f"{split}.bin")
    train, val, meta = open_dataset("openwebtext")
    assert train.tolist() == list(range(1000)) and len(val) == 100
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (1000, 100, 50257)
    (folder / "val.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match=r"val.bin .* has a wrong size"):
        open_dataset("openwebtext")
    (folder / "meta.pkl").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"meta.pkl is a pickle, which is not opened"):
        open_dataset("openwebtext")


# --------------------------------------------------------------------------------------------------- messages


def test_invalid_utf8_names_file_and_offset_and_how_to_convert_it(workdir, monkeypatch):
    bad = "é".encode() * 50 + b"\xff" + b"more" * 9
    Path("bad.txt").write_bytes(bad)
    Path("marked.txt").write_bytes(BOM + bad)
    Path("bad.txt.gz").write_bytes(gzip.compress(bad))
    for chunk in (1 << 22, 7):
        monkeypatch.setattr("support.sources.CHUNK_CHARS", chunk)
        for name, offset in {"bad.txt": 100, "marked.txt": 103, "bad.txt.gz": 100}.items():
            message = rf"^{name} is not UTF-8 text: invalid byte at offset {offset}; .*iconv -f cp1252 -t utf-8 {name}"
            with pytest.raises(UserError, match=message):
                prepare("bad", name)
    Path("bad.txt").write_bytes(b"x" * 20_000 + b"enough characters and a " + "é".encode()[:1])
    with pytest.raises(UserError, match="offset 20024"):
        prepare("bad", "bad.txt")
    assert not Path("data/bad").exists()


def test_bad_rows_and_damaged_gzip_are_clear(workdir):
    for line in ("not json", '{"txt": "a"}', '{"text": 1}', "[]", "[" * 99999):
        Path("bad.jsonl").write_bytes(
            b'{"text": "good"}\n' + line.encode("utf-8", "surrogateescape")
        )
        with pytest.raises(
            UserError, match=r"bad.jsonl, line 2: expected JSON objects with text"
        ) as raised:
            prepare("bad", "bad.jsonl", "byte")
        assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)
    for content in (
        '{"a":\n {}}',
        '["a"]',
        "[1",
        "[" * 99999,
        "3",
        '"x"',
        '[{"text": "good"}, {"text": 1}]',
    ):
        Path("bad.json").write_text(content)
        with pytest.raises(
            UserError, match=r"bad.json, line 1: expected .* one per line or in an array"
        ):
            prepare("bad", "bad.json", "byte")
    for name, text in (("bad.txt.gz", TEXT), ("bad.jsonl.gz", '{"text": "good"}\n' * 999)):
        whole = gzip.compress(text.encode())
        for damaged in (whole[:-20], whole[:30] + bytes(9) + whole[39:]):
            Path(name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} is damaged"):
                prepare("bad", name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("../x", "tiny.txt"),
            "expected a plain name and a text: python prepare_data.py NAME --input PATH",
        ),
        (("x",), "--input PATH .only shakespeare and python_docs need no --input"),
        (("x", "nowhere"), "no file or folder nowhere"),
        (("x", "empty.txt"), "^0 training and 0 validation tokens are too few: give more text"),
        (("x", "short.txt"), "^9 training and 1 validation tokens are too few"),
        (
            ("x", "rows.jsonl", "byte", 0.0),
            r"^\d+ training and 0 validation tokens .* another --val_share",
        ),
        (
            ("x", "empty.txt", "bpe:4096"),
            "pairs for only 257 tokens: give more text, or a smaller bpe:N",
        ),
        (("x", "tiny.txt", "words"), "no tokenizer words"),
        (("x", "tiny.txt", "ids"), r"no tokenizer ids: expected .* ids:N"),
        (("x", "rows.txt", "ids:9"), "99 bytes: expected token ids of 2 bytes each, or a .npy"),
        (("x", "tiny.txt", "char", 0.1, "body"), "--field is for .jsonl, .json, .csv and .tsv"),
        (("x", "tiny.txt", "char", 0.1, "", True), "--tokenizer=char has no special tokens"),
        (("x", "tiny.txt", "bpe:"), r"bpe:N \(N > 256\)"),
        (("x", "tiny.txt", "bpe:256"), r"bpe:N \(N > 256\)"),
        (("x", "tiny.txt", "bpe:x"), r"bpe:N \(N > 256\)"),
    ],
)
def test_mistakes_are_clear(workdir, arguments, message):
    Path("empty.txt").touch()
    Path("short.txt").write_text("ten chars.")
    Path("rows.txt").write_bytes(bytes(99))
    write_rows("rows.jsonl", corpus(9))
    with pytest.raises(UserError, match=message):
        prepare(*arguments)


def test_the_command_says_what_to_type(run):
    for arguments, message in (
        (
            (),
            "python prepare_data.py NAME --input PATH (only shakespeare and python_docs need no --input)",
        ),
        (
            ("mine", "tiny.txt"),
            "unexpected argument tiny.txt: --help shows the usage; a pattern such as *.txt needs quotes",
        ),
    ):
        done = run("prepare_data.py", *arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = run("prepare_data.py", "mine", "--input", "tiny.txt")
    counts = "3,060 training and 340 validation tokens, vocabulary of 23 (char)"
    first = ["T", "o", " ", "b", "e", ",", " ", "o", "r", " ", "n", "o"]
    expected = f"data/mine: {counts}, from tiny.txt\nthe first tokens: {first}\n"
    assert done.stdout == expected
    assert done.returncode == 0 and done.stderr == ""


def test_progress_is_a_line_every_five_seconds(workdir, capsys, monkeypatch):
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr("support.sources.CHUNK_CHARS", 100)
    Path("long.txt").write_text(TEXT * 10, encoding="utf-8")
    sources = prepare_data.find_sources("long", "long.txt")
    assert "".join(text for _, text in prepare_data.read_all(sources, "reading")) == TEXT * 10
    lines = capsys.readouterr().err.splitlines()
    assert 50 < len(lines) < 200 and lines[0] == "reading: 0 million characters of 0 MB"
