"""Tokenizers: from text to token ids and back."""

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
import tiktoken

from support.settings import UserError, optional, user_error

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pieces of text, inside which bytes are merged (Radford et al. 2019): 's and so on, words
# and numbers with the space before them, other signs likewise, white space
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """What all tokenizers share. Each defines vocab_size, meta, encode_array and decode_bytes.

    meta describes the tokenizer in plain values, from which load_tokenizer builds it again.
    """

    eos_token: int | None = None  # the id of end of text
    special_tokens: tuple[str, ...] = ()  # texts that stand for one token, such as END_OF_TEXT
    special_in_text = False  # whether they do so too where a text has them written out

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_texts(self, texts: list[tuple[bool, str]]) -> np.ndarray:
        """The ids of all texts in a row. True asks for end of text before a text, if it exists."""
        if self.eos_token is None:
            return self.encode_array("".join(text for _, text in texts))
        parts = [np.zeros(0, np.uint32)]
        for separate, text in texts:
            if separate:
                parts.append(np.array([self.eos_token], np.uint32))
            parts.append(self.encode_array(text))
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """Every byte of the UTF-8 text is a token."""

    vocab_size = 256

    def __init__(self):
        self.meta = {"tokenizer": "byte"}

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(ids)


class CharTokenizer(Tokenizer):
    """Every character is a token: its id is its index in chars, which are sorted."""

    def __init__(self, chars: Iterable[str]):
        self.chars = "".join(chars)
        self.meta = {"tokenizer": "char", "chars": self.chars}
        self.vocab_size = len(self.chars)
        self.codes = np.frombuffer(self.chars.encode("utf-32-le"), np.uint32)

    def encode_array(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        unknown = self.codes[ids] != codes
        if unknown.any():
            char = text[unknown.argmax()]
            raise UserError(
                f"the character {char!r} (U+{ord(char):04X}) is not among the {self.vocab_size} "
                "characters of the training text: leave it out, or prepare the text with "
                "--tokenizer=byte, which allows any"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in ids).encode("utf-8")


class IdsTokenizer(Tokenizer):
    """Tokens that are not text, such as codes of images. They are written as numbers."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.meta = {"tokenizer": "ids", "vocab_size": vocab_size}

    def encode_array(self, text: str) -> np.ndarray:
        problem = f"expected token ids from 0 to {self.vocab_size - 1}, with spaces between them"
        with user_error(problem, ValueError, OverflowError):
            ids = np.array([int(word) for word in text.split()], np.uint32)
        if len(ids) > 0 and ids.max() >= self.vocab_size:
            raise UserError(f"{problem}, got {ids.max()}")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(f"\n{i}" for i in ids).encode("utf-8")


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) of bytes (Radford et al. 2019), by tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.ranks = encoding._mergeable_ranks  # {token's bytes: id}
        self.special_ids = encoding._special_tokens  # {token: id}
        self.special_tokens = tuple(sorted(self.special_ids, key=self.special_ids.get))
        self.eos_token = self.special_ids.get(END_OF_TEXT)
        self.bytes = {i: token for token, i in self.ranks.items()}
        self.bytes |= {i: token.encode("utf-8") for token, i in self.special_ids.items()}

    @property
    def meta(self) -> dict[str, Any]:
        """With the whole vocabulary, so that sampling from a checkpoint needs no download."""
        lines = [f"{base64.b64encode(token).decode()} {i}" for token, i in self.ranks.items()]
        meta = {
            "tokenizer": self.encoding.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": self.special_ids,
            "ranks": "\n".join(lines),
        }
        if self.special_in_text:
            meta["special_in_text"] = True
        return meta

    def encode_array(self, text: str) -> np.ndarray:
        return self.encode_special(text, set())

    def encode_special(self, text: str, special: set[str]) -> np.ndarray:
        """The ids of text, in which `special` or, with special_in_text, all special tokens are."""
        if self.special_in_text:
            special = "all"
        return self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())

    def encode_texts(self, texts: list[tuple[bool, str]]) -> np.ndarray:
        ambiguous = any(END_OF_TEXT in text for _, text in texts) and not self.special_in_text
        if self.eos_token is None or ambiguous:
            return super().encode_texts(texts)
        # one call for all is faster than thousands
        joined = []
        for separate, text in texts:
            if separate:
                joined.append(END_OF_TEXT)
            joined.append(text)
        return self.encode_special("".join(joined), {END_OF_TEXT})

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.bytes.get(i, b"") for i in ids)  # some encodings leave ids unused


class HFTokenizer(Tokenizer):
    """The tokenizer in a tokenizer.json, whatever its kind, by the package tokenizers.

    contents: the text of the file. eos: the text of the end-of-text token. Raises UserError for a
    damaged file.
    """

    def __init__(self, contents: str, eos: str = END_OF_TEXT):
        tokenizers = optional("tokenizers")
        self.contents = contents
        self.eos = eos
        with user_error("this tokenizer.json can't be read", Exception):  # the package's only kind
            self.tokenizer = tokenizers.Tokenizer.from_str(contents)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        ids = self.tokenizer.get_vocab().values()
        self.vocab_size = max(ids, default=-1) + 1
        self.eos_token = self.tokenizer.token_to_id(eos)
        added = self.tokenizer.get_added_tokens_decoder()
        self.added = {i: token.content for i, token in added.items()}
        self.special_tokens = tuple(token.content for token in added.values() if token.special)
        decoder = self.tokenizer.decoder
        self.is_byte_level = isinstance(decoder, tokenizers.decoders.ByteLevel)
        self.is_word_piece = isinstance(decoder, tokenizers.decoders.WordPiece)

    @property
    def meta(self) -> dict[str, Any]:
        meta = {"tokenizer": "tokenizer.json", "contents": self.contents, "eos": self.eos}
        if self.special_in_text:
            meta["special_in_text"] = True
        return meta

    def encode_array(self, text: str) -> np.ndarray:
        self.tokenizer.encode_special_tokens = not self.special_in_text  # as ordinary text
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes(i) for i in ids)

    def token_bytes(self, i: int) -> bytes:
        """What the token i adds to a text; of a byte-level BPE maybe a part of a character."""
        if i in self.added:
            return self.added[i].encode("utf-8")
        token = self.tokenizer.id_to_token(i)
        if token is None:  # ids may have gaps
            return b""
        if self.is_byte_level:
            return bytes(BYTE_LEVEL[char] for char in token)
        if self.is_word_piece:
            if token.startswith("##"):  # goes on with a word
                return token.removeprefix("##").encode("utf-8")
            return f" {token}".encode()
        if token.startswith("<0x") and token.endswith(">"):  # SentencePiece's name for a byte
            return bytes.fromhex(token[3:-1])
        if self.tokenizer.pre_tokenizer is None and self.tokenizer.normalizer is None:
            return token.encode("utf-8")  # the characters themselves
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8")


def byte_level() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (Radford et al. 2019).

    Bytes that are printable in Latin-1 are themselves, the others, in order, U+0100 and so on.
    """
    table = {}
    n_others = 0
    for byte in range(256):
        char = chr(byte)
        if not char.isprintable() or char == " ":
            char = chr(0x100 + n_others)
            n_others += 1
        table[char] = byte
    return table


BYTE_LEVEL = byte_level()


def load_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a dataset's meta.json or a checkpoint's "tokenizer" entry describes.

    Raises UserError where there is none.
    """
    tokenizer = build_tokenizer(meta)
    tokenizer.special_in_text = meta.get("special_in_text", False)
    return tokenizer


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    name = meta["tokenizer"]
    if name == "byte":
        return ByteTokenizer()
    if name == "ids" and "vocab_size" in meta:
        return IdsTokenizer(meta["vocab_size"])
    if name == "char":
        if list(meta["chars"]) != sorted(set(meta["chars"])):
            raise UserError(
                "the characters of this tokenizer are not sorted: prepare the dataset again"
            )
        return CharTokenizer(meta["chars"])
    if name == "tokenizer.json" and "contents" in meta:
        return HFTokenizer(meta["contents"], meta["eos"])
    if "ranks" in meta:
        ranks = {}
        for line in meta["ranks"].split("\n"):
            token, i = line.split()
            ranks[base64.b64decode(token)] = int(i)
        encoding = tiktoken.Encoding(
            name,
            pat_str=meta["pattern"],
            mergeable_ranks=ranks,
            special_tokens=meta["special_tokens"],
        )
        return BPETokenizer(encoding)
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(
            f"no tokenizer {name}: expected char, byte, bpe:N (N > 256), ids:N, "
            f"{', '.join(known)} or a folder"
        )
    advice = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=byte"
    with user_error(f"the vocabulary of {name} can't be downloaded", Exception, advice=advice):
        return BPETokenizer(tiktoken.get_encoding(name))
