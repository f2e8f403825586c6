"""Learn a byte-pair encoding from text."""

import sys
import time
from collections import Counter
from collections.abc import Iterable
from heapq import heappop, heappush

import numpy as np
import regex  # tiktoken needs it too
import tiktoken

from support.settings import UserError
from support.tokenizer import END_OF_TEXT, GPT2_PATTERN, BPETokenizer

END = -1  # between two pieces of text
GONE = -2  # where a token has become a part of the one before it
PROGRESS_SECONDS = 5


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn a byte-level BPE of vocab_size tokens from texts (Sennrich et al. 2016, algorithm 1).

    The most frequent pair of neighbours becomes a token, again and again; of equally frequent pairs
    the one with the lower ids. The last id is that of end of text. Each merge takes away the tokens
    that it costs time for, so the time is proportional to the length of the texts.

    Raises UserError if the texts have too few pairs.
    """
    pieces = Pieces(texts)
    tokens = [bytes([i]) for i in range(256)]
    ranks = {token: i for i, token in enumerate(tokens)}
    shown = time.monotonic()
    while len(tokens) < vocab_size - 1:
        pair = pieces.most_frequent_pair()
        if pair is None:
            raise UserError(
                f"the text has pairs for only {len(tokens) + 1} tokens: "
                "give more text, or a smaller bpe:N"
            )
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ranks:  # two pairs can make the same token
            ranks[token] = len(tokens)
            tokens.append(token)
        pieces.merge(pair, ranks[token])
        if time.monotonic() > shown + PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"learning: {len(tokens):,} of {vocab_size:,} tokens", file=sys.stderr)
    encoding = tiktoken.Encoding(
        f"bpe:{vocab_size}",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(tokens)},
    )
    return BPETokenizer(encoding)


class Pieces:
    """The distinct pieces of texts as one array of token ids, and an index of its pairs.

    A place is an index of the array. The tokens that are left are a linked list: before and after
    have the places of a token's neighbours.
    """

    def __init__(self, texts: Iterable[str]):
        counts = Counter()
        for text in texts:
            counts.update(regex.findall(GPT2_PATTERN, text))
        encoded = [piece.encode("utf-8") for piece in counts]
        lengths = np.array([len(piece) for piece in encoded], np.int64)
        ends = np.cumsum(lengths + 1)  # each piece is followed by END
        n = 1 + int(lengths.sum()) + len(encoded)
        self.ids = np.full(n, END, np.int32)
        inside = np.ones(n, bool)
        inside[0] = False
        inside[ends] = False
        self.ids[inside] = np.frombuffer(b"".join(encoded), np.uint8)
        self.counts = np.ones(n, np.int64)  # how often the text has the piece of this place
        self.counts[1:] = np.repeat(list(counts.values()), lengths + 1)
        self.before = np.arange(-1, n - 1)
        self.after = np.arange(1, n + 1)
        self.places = {}  # of the left token of a pair, some of which are outdated
        self.pair_counts = Counter()
        self.heap = []  # of (-count, pair), some of which are outdated
        left = np.flatnonzero(inside[:-1] & inside[1:])
        self.add(left, self.ids[left], self.ids[left + 1])

    def add(self, places: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        """Count the pairs of left and right tokens at places."""
        for pair, part in grouped(left, right):
            self.places.setdefault(pair, []).append(places[part])
            self.pair_counts[pair] += int(self.counts[places[part]].sum())
            heappush(self.heap, (-self.pair_counts[pair], pair))

    def subtract(self, places: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        for pair, part in grouped(left, right):
            self.pair_counts[pair] -= int(self.counts[places[part]].sum())

    def most_frequent_pair(self) -> tuple[int, int] | None:
        while self.heap:
            count, pair = heappop(self.heap)
            current = self.pair_counts[pair]
            if current == -count and current > 0:
                return pair
            if 0 < current < -count:
                heappush(self.heap, (-current, pair))
        return None

    def merge(self, pair: tuple[int, int], new: int) -> None:
        """Replace the pair by the token new, from left to right."""
        places = np.concatenate(self.places.pop(pair))
        rights = self.after[places]
        places = places[(self.ids[places] == pair[0]) & (self.ids[rights] == pair[1])]
        if pair[0] == pair[1]:
            places = every_other(np.sort(places), self.after)
        rights = self.after[places]
        befores = self.before[places]
        afters = self.after[rights]

        # The merged tokens' pairs with their neighbours are gone. A pair between two merged ones
        # counts once, as the second one's pair with its left neighbour.
        has_left = self.ids[befores] != END
        has_right = (self.ids[afters] != END) & ~np.isin(afters, places)
        at = places[has_left]
        self.subtract(at, self.ids[befores[has_left]], self.ids[at])
        at = rights[has_right]
        self.subtract(at, self.ids[at], self.ids[afters[has_right]])
        self.pair_counts[pair] = 0

        self.ids[places] = new
        self.ids[rights] = GONE
        self.after[places] = afters
        self.before[afters] = places

        # The new tokens' pairs with their neighbours are there instead, counted in the same way.
        at = self.before[places[has_left]]
        self.add(at, self.ids[at], np.full(len(at), new))
        at = places[has_right]
        self.add(at, self.ids[at], self.ids[afters[has_right]])


def grouped(left: np.ndarray, right: np.ndarray) -> Iterable[tuple[tuple[int, int], np.ndarray]]:
    """Yield ((left, right), indices) for each distinct pair."""
    if len(left) == 0:
        return
    keys = left.astype(np.int64) << 32 | right.astype(np.int64)
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    parts = np.split(order, starts[1:])
    for key, part in zip(distinct.tolist(), parts, strict=True):
        yield (key >> 32, key & 0xFFFFFFFF), part


def every_other(places: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of pairs that overlap, as in aaaa, the first, the third, ... of each run."""
    index = np.arange(len(places))
    starts = np.ones(len(places), bool)
    starts[1:] = after[places[:-1]] != places[1:]
    run_start = np.maximum.accumulate(np.where(starts, index, 0))
    return places[(index - run_start) % 2 == 0]
