"""Tokenizers: from text to token ids and back.

Each has encode(str) -> list of ids, decode(ids) -> str, decode_bytes(ids) -> UTF-8 bytes, encode_array(str) -> array of
ids, vocab_size, eos_token (the id of end of text, or None) and meta, from which load_tokenizer builds it again.
"""

import base64
from collections.abc import Iterable

import numpy as np
import tiktoken

from support.settings import UserError, user_error

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pieces (Radford et al. 2019), inside which bytes are merged: 's, words and numbers with the space before
# them, other signs likewise, white space
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """What all tokenizers share: each defines vocab_size, meta, encode_array and decode_bytes."""

    eos_token: int | None = None

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_texts(self, texts: list[tuple[bool, str]]) -> np.ndarray:
        """The ids of all texts in a row. True asks for end of text before a text, if there is one."""
        return self.encode_array("".join(text for _, text in texts))

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
            char, known = (
                text[unknown.argmax()],
                f"the {self.vocab_size} characters of the training text",
            )
            advice = "to allow any, prepare the text with --tokenizer=byte"
            raise UserError(
                f"the character {char!r} (U+{ord(char):04X}) is not among {known}; {advice}"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in ids).encode("utf-8")


class BPETokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016; of bytes: Radford et al. 2019), computed by tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eos_token = encoding._special_tokens.get(END_OF_TEXT)
        self.bytes = {i: token for token, i in encoding._mergeable_ranks.items()}
        self.bytes |= {i: token.encode("utf-8") for token, i in encoding._special_tokens.items()}

    @property
    def meta(
        self,
    ) -> dict:  # the whole vocabulary, so that sampling from a checkpoint needs no download
        e = self.encoding
        ranks = "\n".join(
            f"{base64.b64encode(token).decode()} {i}" for token, i in e._mergeable_ranks.items()
        )
        return {
            "tokenizer": e.name,
            "pattern": e._pat_str,
            "special_tokens": e._special_tokens,
            "ranks": ranks,
        }

    def encode_array(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(
            text, disallowed_special=()
        )  # special tokens written out are text

    def encode_texts(self, texts):
        if self.eos_token is None:
            return super().encode_texts(texts)
        if any(END_OF_TEXT in text for _, text in texts):
            parts = [
                ([self.eos_token] * separate, self.encode_array(text)) for separate, text in texts
            ]
            return np.concatenate([ids for part in parts for ids in part]).astype(np.uint32)
        text = "".join(
            END_OF_TEXT * separate + text for separate, text in texts
        )  # one call is faster than thousands
        return self.encoding.encode_to_numpy(
            text, allowed_special={END_OF_TEXT}, disallowed_special=()
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.bytes.get(i, b"") for i in ids)  # some encodings leave ids unused


def load_tokenizer(meta: dict) -> Tokenizer:
    """The tokenizer that meta describes: a dataset's meta.json, or a checkpoint's "tokenizer" entry."""
    name = meta["tokenizer"]
    if name == "char":
        if list(meta["chars"]) != sorted(set(meta["chars"])):
            raise UserError(
                "the characters of this tokenizer are not sorted: prepare the dataset again"
            )
        return CharTokenizer(meta["chars"])
    if name == "byte":
        return ByteTokenizer()
    if "ranks" in meta:
        ranks = {
            base64.b64decode(token): int(i)
            for token, i in map(str.split, meta["ranks"].split("\n"))
        }
        pattern, special = meta["pattern"], meta["special_tokens"]
        return BPETokenizer(
            tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        )
    if name not in (known := tiktoken.list_encoding_names()):
        raise UserError(
            f"no tokenizer {name}: expected char, byte, bpe:N (N > 256), {', '.join(known)} or a folder"
        )
    advice = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=byte"
    with user_error(f"the vocabulary of {name} can't be downloaded", Exception, advice=advice):
        return BPETokenizer(tiktoken.get_encoding(name))
