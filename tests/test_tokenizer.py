import json
import time
from itertools import pairwise

import pytest

from support.bpe import train_bpe
from support.settings import UserError
from support.tokenizer import load_tokenizer

UNICODE = (
    "naïve façade, 'tis \r\n\t “quoted” ☃ 漢字 🤖👩‍👩‍👧 \u200b e\u0301 \x00 <|endoftext|>  end \n\n"
)


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


def test_gpt2_tokens_are_tiktokens(gpt2_vocabulary):
    tokenizer = load_tokenizer({"tokenizer": "gpt2"})
    assert tokenizer.encode(UNICODE) == gpt2_vocabulary.encode_ordinary(UNICODE)
    assert (tokenizer.vocab_size, tokenizer.eos_token) == (50257, 50256)
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_end_of_text_separates_texts_and_is_text_where_it_is_written_out(gpt2_vocabulary):
    tokenizer = load_tokenizer({"tokenizer": "gpt2"})
    for first in ("one", "<|endoftext|> one"):
        expected = [
            *gpt2_vocabulary.encode_ordinary(first),
            50256,
            *gpt2_vocabulary.encode_ordinary("two"),
        ]
        assert tokenizer.encode_texts([(False, first), (True, "two")]).tolist() == expected


def test_an_unknown_character_is_named_and_a_way_out_is_given():
    message = (
        r"'☃' \(U\+2603\) is not among the 3 characters of the training text: leave it out, "
        "or prepare the text with --tokenizer=byte"
    )
    with pytest.raises(UserError, match=message):
        load_tokenizer({"tokenizer": "char", "chars": "abc"}).encode("abc☃")


def test_unsorted_characters_are_refused():
    with pytest.raises(UserError, match="not sorted"):
        load_tokenizer({"tokenizer": "char", "chars": "bca"})


def test_unknown_and_unreachable_vocabularies_are_clear(monkeypatch):
    with pytest.raises(
        UserError, match=r"no tokenizer gpt5: expected char, byte, bpe:N .* gpt2, .* or a folder"
    ):
        load_tokenizer({"tokenizer": "gpt5"})

    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*--tokenizer=byte"):
        load_tokenizer({"tokenizer": "gpt2"})


def test_a_learned_bpe_has_the_merges_of_hugging_faces_trainer(tiny_shakespeare):
    tokenizers = pytest.importorskip("tokenizers")
    text = tiny_shakespeare.read_text(encoding="utf-8")
    start = time.process_time()
    tokenizer = train_bpe([text], 4096)
    assert time.process_time() - start < 10
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = tokenizers.Regex(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    alphabet = sorted(set(text))  # ASCII, so characters are bytes
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096 - 1 - 256 + len(alphabet), initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator([text], trainer)
    merges = [(a + b).encode() for a, b in json.loads(reference.to_str())["model"]["merges"]]
    ours = [
        token
        for token, rank in sorted(
            tokenizer.encoding._mergeable_ranks.items(), key=lambda item: item[1]
        )
    ]
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
    ranks = tokenizer.encoding._mergeable_ranks
    tokens = {rank: token for token, rank in ranks.items()}
    assert [tokens[256 + i] for i in range(4)] == [tokens[a] + tokens[b] for a, b in merges]


def test_too_little_text_for_a_bpe_says_what_would_do():
    with pytest.raises(UserError, match=r"only 259 tokens: give more text, or a smaller bpe:N"):
        train_bpe(["ab ab"], 300)
