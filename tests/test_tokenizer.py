import json
import time
from itertools import pairwise

import pytest
from conftest import UNICODE, assert_refused

from support.bpe import train_bpe
from support.tokenizer import load_tokenizer


def tokenizers():
    yield load_tokenizer({"tokenizer": "char", "chars": "".join(sorted(set(UNICODE)))})
    yield load_tokenizer({"tokenizer": "byte"})
    yield load_tokenizer({"tokenizer": "gpt2"})
    yield train_bpe([UNICODE * 2], 290)


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


def test_end_of_text_separates_texts_and_is_text_where_it_is_written_out(gpt2_vocabulary):
    tokenizer = load_tokenizer({"tokenizer": "gpt2"})
    for first in ("one", "<|endoftext|> one"):
        before, after = map(gpt2_vocabulary.encode_ordinary, (first, "two"))
        ids = tokenizer.encode_texts([(False, first), (True, "two")]).tolist()
        assert ids == [*before, 50256, *after]


def test_unknown_damaged_and_unreachable_vocabularies_are_clear(monkeypatch):
    assert_refused("not sorted", load_tokenizer, {"tokenizer": "char", "chars": "bca"})
    assert_refused("gpt5: expected char, .* gpt2", load_tokenizer, {"tokenizer": "gpt5"})

    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    assert_refused(r"TIKTOKEN_CACHE_DIR.*--tokenizer=byte", load_tokenizer, {"tokenizer": "gpt2"})


def test_a_learned_bpe_has_the_merges_of_hugging_faces_trainer(tiny_shakespeare):
    tokenizers = pytest.importorskip("tokenizers")
    text = tiny_shakespeare.read_text(encoding="utf-8")
    start = time.process_time()
    tokenizer = train_bpe([text], 4096)
    assert time.process_time() - start < 10
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(gpt2), "isolated")
    reference.pre_tokenizer = split
    alphabet = sorted(set(text))  # ASCII, so characters are bytes
    options = {"vocab_size": 4096 - 1 - 256 + len(alphabet), "initial_alphabet": alphabet}
    trainer = tokenizers.trainers.BpeTrainer(show_progress=False, **options)
    reference.train_from_iterator([text], trainer)
    merges = [(a + b).encode() for a, b in json.loads(reference.to_str())["model"]["merges"]]
    ours = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    assert ours[256:] == merges  # both take the pair with the lower ids of equally frequent ones
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_those_of_the_algorithm_written_out():
    """Sennrich et al. 2016, algorithm 1, on one word, whose repeated letters overlap."""
    word, merges = list(b"aaaabaaabaaaaa"), []
    for new in range(256, 260):
        pairs = list(pairwise(word))
        best = min(set(pairs), key=lambda pair: (-pairs.count(pair), pair))
        merges.append(best)
        i, merged = 0, []
        while i < len(word):
            found = tuple(word[i : i + 2]) == best
            merged.append(new if found else word[i])
            i += 1 + found
        word = merged
    tokenizer = train_bpe(["aaaabaaabaaaaa"], 261)
    tokens = {rank: token for token, rank in tokenizer.ranks.items()}
    assert [tokens[256 + i] for i in range(4)] == [tokens[a] + tokens[b] for a, b in merges]
