"""Learn a byte-pair encoding from text."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import pairwise

import regex
import tiktoken

from support.settings import UserError
from support.tokenizer import END_OF_TEXT, GPT2_PATTERN, BPETokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn a byte-level BPE of vocab_size tokens from texts (Sennrich et al. 2016, algorithm 1).

    The most frequent pair of neighbours becomes a token, again and again; of equally frequent pairs the one with the
    lower ids. The last id is that of end of text. Raises UserError if the texts have too few pairs.
    """
    counts = Counter(piece for text in texts for piece in regex.findall(GPT2_PATTERN, text))
    words = [
        (list(piece.encode("utf-8")), n) for piece, n in counts.items()
    ]  # each distinct piece once, as ids
    tokens = [bytes([i]) for i in range(256)]
    ranks = {token: i for i, token in enumerate(tokens)}
    pair_counts, words_with = Counter(), defaultdict(set)
    for i, (word, n) in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += n
            words_with[pair].add(i)
    heap = sorted((-n, pair) for pair, n in pair_counts.items())
    while len(tokens) < vocab_size - 1:
        if not heap:
            raise UserError(
                f"the text has pairs for only {len(tokens) + 1} tokens: give more text, or a smaller bpe:N"
            )
        count, pair = heappop(heap)
        if -count != pair_counts[pair]:  # outdated: put it back with the current count
            if pair_counts[pair] > 0:
                heappush(heap, (-pair_counts[pair], pair))
            continue
        token = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(token, len(tokens))  # two pairs can make the same token
        if new == len(tokens):
            tokens.append(token)
        changes = Counter()
        for i in words_with.pop(pair):
            word, n = words[i]
            merged = []
            for part in word:  # from left to right
                if merged and (merged[-1], part) == pair:
                    merged[-1] = new  # not the first of a pair, whose token is shorter
                else:
                    merged.append(part)
            for old in pairwise(word):
                changes[old] -= n
            for made in pairwise(merged):
                changes[made] += n
                words_with[made].add(i)
            words[i] = merged, n
        for changed, change in changes.items():
            pair_counts[changed] += change
            if change > 0:
                heappush(heap, (-pair_counts[changed], changed))
    name, special = f"bpe:{vocab_size}", {END_OF_TEXT: len(tokens)}
    return BPETokenizer(
        tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    )
