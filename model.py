"""GPT-2 in one file: sizes, attention, MLP, block, model, and the cache for decoding. Read it from top to bottom.

B is the batch size, T the number of tokens, C the width (n_embd), H the number of heads, D = C / H the width of a
head. The modules are named as in OpenAI's released weights (wte, wpe, h, ln_1, c_attn, ...).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The sizes of a model. The defaults are GPT-2's smallest: 124M parameters."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm layers, as in GPT-2

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the past (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # Q, K and V in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None, layer: int = 0) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(layer, k, v)  # (B, H, S, D): the past and these T tokens
        # One fused kernel for
        #     scores = q @ k.transpose(2, 3) / math.sqrt(D)        # (B, H, T, S), variance independent of D
        #     scores = scores.masked_fill(future, -math.inf)       # a query sees no key that comes after it
        #     weights = F.dropout(scores.softmax(dim=3), dropout)  # each row sums to 1
        #     y = weights @ v                                      # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        is_causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two layers with GELU between, applied to each token by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (Hendrycks & Gimpel 2016), the form GPT-2 was trained with
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream x.

    Pre-norm: LayerNorm stands before each part, not after the sum as in Vaswani et al., so the gradient reaches every
    layer through x undisturbed (Xiong et al. 2020).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None, layer: int = 0) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


class MiniGPT(nn.Module):
    """A GPT-2 language model (Radford et al. 2019).

    The output head has no weights of its own: it is the token embedding, transposed (weight tying, Press & Wolf 2017).
    The embedding is padded to a multiple of 64 rows, a size that suits matrix kernels; the logits of the padding are
    cut off at once, so they are never predicted, sampled or trained.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        padded_vocab_size = math.ceil(config.vocab_size / 64) * 64
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)  # token embedding and output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

        # N(0, 0.02) everywhere, but smaller in the 2 n_layer projections that add to the residual stream, so that
        # its variance does not grow with depth (Radford et al. 2019, section 2.3).
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: "KVCache | None" = None):
        """Predict the next token at every position, or with a cache at the last one.

        idx: (B, T) token ids. targets: (B, T), the id that follows each, or -100 where it does not count.
        cache: a KVCache of the tokens before idx; it takes idx in.
        Returns (logits, None), the logits (B, T, vocab_size) or with a cache (B, 1, vocab_size); with targets
        (None, loss), the mean cross-entropy in nats.
        Raises ValueError for more than block_size tokens, and on the CPU for ids outside the vocabulary.
        """
        T, device, vocab_size = idx.size(1), idx.device, self.config.vocab_size
        length, longest = (T, self.config.block_size) if cache is None else (cache.length + T, cache.size)
        if length > longest:
            name = "block_size" if longest == self.config.block_size else "the cache"
            raise ValueError(f"a sequence of {length} tokens is longer than {name} ({longest})")
        if device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            low, high = idx.aminmax()
            if low < 0 or high >= vocab_size:
                raise ValueError(f"token ids from {low} to {high} reach outside the vocabulary (0 to {vocab_size - 1})")

        positions = torch.arange(T, device=device) if cache is None else cache.advance(T)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            x = x[:, -1:]  # only the last token's successor is unknown
        logits = self.head(self.ln_f(x))
        if targets is None:
            return logits, None
        # in float32 also under autocast: bfloat16 would leave the loss two or three digits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return None, loss

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The logits: (..., C) -> (..., vocab_size)."""
        return F.linear(x, self.wte.weight)[..., : self.config.vocab_size]


class KVCache:
    """The keys and values of every token read so far, so that no token is read twice.

    `keys` and `values` have a tensor (B, H, size, D) for each layer, allocated once and written in place; the first
    `length` positions are filled. size is block_size, or less where less will do. Set `length = 0` to start over.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device=None, dtype=None, size: int | None = None):
        self.size, self.length = size or config.block_size, 0
        shape = (batch_size, config.n_head, self.size, config.n_embd // config.n_head)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]

    def advance(self, T: int) -> torch.Tensor:
        """Make room for T more tokens. Returns their `positions`, (T,), which stay until the next call."""
        start, self.length = self.length, self.length + T
        self.positions = torch.arange(start, self.length, device=self.keys[0].device)
        return self.positions

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Store a layer's k and v, each (B, H, T, D), where `advance` made room; a single row goes to all rows.

        Returns all keys and values of the layer, (B, H, S, D), and the mask for T queries, (T, S), True where a query
        may look; None where it is the plain triangle, or a single query that may see everything.
        """
        T, S = k.size(2), self.length
        self.keys[layer][:, :, S - T : S] = k
        self.values[layer][:, :, S - T : S] = v
        mask = torch.arange(S, device=k.device) <= self.positions[:, None] if 1 < T < S else None
        return self.keys[layer][: len(k), :, :S], self.values[layer][: len(k), :, :S], mask
