"""forks/llama.patch against transformers' LlamaForCausalLM with the same weights."""

import pytest
import torch

from model import GPTConfig, KVCache, MiniGPT
from train import Settings, make_optimizer

NAMES = {
    "wte": "model.embed_tokens", "ln_f": "model.norm", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
    "attn.c_q": "self_attn.q_proj", "attn.c_proj": "self_attn.o_proj", "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip


def llama_with_the_weights_of(model):
    transformers = pytest.importorskip("transformers")
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=model.h[0].mlp.c_fc.out_features,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            attention_bias=config.bias,
            mlp_bias=config.bias,
        )
    ).eval()
    weights = {}
    for name, p in model.named_parameters():
        p = p.detach()
        *path, kind = name.split(".")
        prefix = f"model.layers.{path[1]}." if path[0] == "h" else ""
        name = ".".join(path[2:] if prefix else path)
        if name == "attn.c_kv":
            for part, half in zip(("k_proj", "v_proj"), p.chunk(2), strict=True):
                weights[f"{prefix}self_attn.{part}.{kind}"] = half
        else:
            weights[f"{prefix}{NAMES[name]}.{kind}"] = (
                p[: config.vocab_size] if name == "wte" else p
            )
    theirs.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return theirs


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_llamas_with_the_same_weights(n_kv_head, bias):
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(48, 65, 3, 4, 64, bias=bias, n_kv_head=n_kv_head)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    theirs, idx = llama_with_the_weights_of(model), torch.randint(65, (2, 48))
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(model(idx)[0], expected, atol=1e-4, rtol=0)
        cache = KVCache(model.config, 2)
        for end, chunk in enumerate(idx.split([30] + [1] * 18, dim=1), start=30):
            torch.testing.assert_close(
                model(chunk, cache=cache)[0], expected[:, end - 1 : end], atol=1e-4, rtol=0
            )


def test_the_mlp_has_as_many_weights_as_gpt2s():
    mlp = MiniGPT(GPTConfig(16, 65, 1, 4, 768, bias=False, n_kv_head=1)).h[0].mlp
    assert sum(p.numel() for p in mlp.parameters()) == 8 * 768**2


def test_muon_takes_each_matrix_by_itself():
    model = MiniGPT(GPTConfig(16, 65, 2, 4, 32, n_kv_head=1))
    groups = make_optimizer(model, Settings(optimizer="muon")).param_groups
    splits = {id(p): group["splits"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        muon = name.startswith("h.") and p.dim() == 2
        assert splits[id(p)] == (2 if "c_kv.weight" in name else 1 if muon else 0), name
