"""GPT-2 in one file: sizes, attention, MLP, block, model, KV cache. Read it from top to bottom.

In the comments on shapes, B is the batch size, T the number of tokens, C the width (n_embd), H the
number of heads and D = C / H the width of a head. S is the number of keys that attention looks at:
T, or with a KVCache the previous tokens as well. The modules have the names of OpenAI's released
weights (wte, wpe, h, ln_1, c_attn, ...).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the tokens before it.

    Vaswani et al. 2017, section 3.2. layer: the index of its block, under which a KVCache has its
    keys and values.
    """

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # Q, K and V
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)

        # Without a cache, is_causal hides later tokens. It assumes that the first query is the
        # first token. With a cache, others may precede it, so the cache makes the mask.
        mask = None
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)  # (B, H, S, D)

        # One fused kernel for
        #     scores = q @ k.transpose(2, 3) / math.sqrt(D)        # (B, H, T, S)
        #     scores = scores.masked_fill(~mask, -math.inf)        # mask: where a query sees a key
        #     weights = F.dropout(scores.softmax(dim=3), dropout)  # each row sums to 1
        #     y = weights @ v                                      # (B, H, T, D)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=cache is None,
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with GELU between them, applied to each token separately."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")  # Hendrycks & Gimpel 2016; GPT-2 uses this approximation
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream x.

    Pre-norm: LayerNorm comes before each part, not after the sum as in Vaswani et al., so the
    gradient reaches every layer through x unchanged (Xiong et al. 2020).
    """

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class MiniGPT(nn.Module):
    """A GPT-2 language model (Radford et al. 2019).

    The embedding and the output head are padded to a multiple of 64 rows, a size that suits matrix
    kernels. The padding is never predicted or sampled, and gets no gradient.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # recompute each block's activations in the backward pass; train.py may set it
        self.activation_checkpointing = False
        padded_vocab_size = math.ceil(config.vocab_size / 64) * 64
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)  # token embedding
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embedding
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.init_weights()  # before lm_head, or the weight that it shares would be drawn twice
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # weight tying (Press & Wolf 2017)

    def init_weights(self) -> None:
        """Linear and Embedding weights: normal, with standard deviation 0.02. Biases: zero.

        The 2 n_layer projections that add to the residual stream get a smaller deviation, so that
        its variance does not grow with depth (Radford et al. 2019, section 2.3).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.02
                if name.endswith("c_proj"):
                    std = 0.02 / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict the next token at every position, or with a cache at the last one.

        idx: (B, T) token ids. targets: (B, T), the id that follows each token, or -100 where the
        loss should ignore it. cache: the KVCache of the tokens before idx; idx is appended to it.

        Returns (logits, loss). logits: (B, T, vocab_size), or with a cache (B, 1, vocab_size).
        loss: the mean cross-entropy in nats, or None without targets. With targets the logits are
        detached: backpropagate through the loss.

        Raises ValueError for no token or more than block_size tokens, and on a CPU, if it is not
        compiled, for ids outside the vocabulary.
        """
        if targets is not None and cache is not None:
            raise ValueError("targets or a cache: not both")
        self.check_ids(idx)
        T = idx.size(1)
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens exceed block_size ({self.config.block_size})")
            positions = torch.arange(T, device=idx.device)
        else:
            positions = cache.advance(T)

        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            if self.activation_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        if cache is not None:
            x = x[:, -1:]  # to generate text, only the last position's logits are needed
        logits = self.lm_head(self.ln_f(x))  # (B, T or 1, padded_vocab_size)
        logits = logits[..., : self.config.vocab_size]
        if targets is None:
            return logits, None
        # in float32: in bfloat16 the loss would have two or three digits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        # detached: else a compiled backward pass allocates a gradient of zeros as large as logits
        return logits.detach(), loss

    def check_ids(self, idx: torch.Tensor) -> None:
        """Raise ValueError for no token ids, and on a CPU for ids outside the vocabulary.

        Without this check, ids in the padding of the embedding would pass unnoticed. On a GPU,
        looking at the ids would force a synchronisation, and when compiled break the graph.
        """
        if idx.size(1) == 0:
            raise ValueError("no tokens: a sequence needs at least one")
        if idx.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = idx.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token ids from {low} to {high} are outside the vocabulary "
                f"(0 to {self.config.vocab_size - 1})"
            )

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token (Chowdhery et al. 2022, appendix B).

        A weight takes one multiply-add, which is 2 operations, in the forward pass, and twice that
        in the backward pass: 6 in all. In each layer, q @ k and weights @ v take T C multiply-adds
        each per token: 12 T C. The position embedding, which is only looked up, does not count; the
        token embedding does, as it is also the output head's weight.
        """
        n_weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        config = self.config
        return 6 * n_weights + 12 * config.n_layer * config.n_embd * config.block_size


class KVCache:
    """The keys and values of all previous tokens, so that each token is computed only once.

    `keys` and `values` hold a tensor (B, H, size, D) per layer, allocated once and written in
    place; the first `length` positions are filled. size: how many tokens it can hold, by default
    block_size. For new tokens, the model calls `advance` once, which sets their `positions`, and
    then each layer calls `update`. Set `length = 0` to start over.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        size: int | None = None,
    ):
        if size is None:
            size = config.block_size
        self.size = size
        self.length = 0
        self.positions = torch.arange(0, device=device)  # none yet, but on the right device
        shape = (batch_size, config.n_head, size, config.n_embd // config.n_head)
        layers = range(config.n_layer)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def advance(self, T: int) -> torch.Tensor:
        """Make room for T more tokens. Returns their positions, (T,).

        Raises ValueError if they do not fit.
        """
        start = self.length
        end = start + T
        if end > self.size:
            raise ValueError(f"{end} tokens exceed the size of the cache ({self.size})")
        self.length = end
        self.positions = torch.arange(start, end, device=self.positions.device)
        return self.positions

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store a layer's keys and values, (B, H, T, D) each, where `advance` made room.

        Returns the keys and values of all tokens so far, (B, H, S, D) each, and the mask (T, S),
        True where a query sees a key. A single query sees every key: its mask is None.
        """
        T = k.size(2)
        S = self.length  # `advance` has counted the T new tokens already
        self.keys[layer][:, :, S - T : S] = k
        self.values[layer][:, :, S - T : S] = v
        mask = None
        if T > 1:
            mask = torch.arange(S, device=k.device) <= self.positions[:, None]  # (T, S)
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S], mask
