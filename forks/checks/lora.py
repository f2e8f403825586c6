"""forks/lora.patch: it begins as the base model, trains nothing else, and merges into plain layers."""

from dataclasses import asdict

import pytest
import torch

import sample
import train as train_module
from model import GPTConfig, LoRA, MiniGPT, add_lora, merge_lora
from support.checkpoint import read_checkpoint
from support.pretrained import load_pretrained, save_pretrained

SIZES = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32}


def test_it_equals_the_base_model_at_the_start_and_trains_the_thin_matrices_alone():
    torch.manual_seed(0)
    model, idx = MiniGPT(GPTConfig(**SIZES)), torch.randint(65, (2, 16))
    expected, frozen = model(idx)[0], {id(p) for p in model.parameters()}
    add_lora(model, 4)
    assert torch.equal(model(idx)[0], expected)
    assert all(p.requires_grad == (id(p) not in frozen) for p in model.parameters())
    shapes = {"c_attn": (96, 32), "c_proj": (32, 32), "c_fc": (128, 32)}
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n == 2 * 4 * (
        sum(map(sum, shapes.values())) + 32 + 128
    )  # layers, rank; the last is the MLP's c_proj
    model(idx, idx)[1].backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_merged_equals_unmerged_and_the_formula():
    torch.manual_seed(0)
    model, idx = MiniGPT(GPTConfig(**SIZES, lora_rank=4)).eval(), torch.randint(65, (2, 16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    layer, x = model.h[0].mlp.c_fc, torch.randn(5, 32)
    torch.testing.assert_close(
        layer(x), x @ layer.linear.weight.T + layer.linear.bias + x @ layer.a.T @ layer.b.T
    )
    expected = model(idx)[0]
    merge_lora(model)
    assert not any(
        isinstance(module, LoRA) for module in model.modules()
    ) and model.config == GPTConfig(**SIZES)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_changes_and_remembers_them_alone_and_resumes_to_the_bit(train, optimizer):
    train(max_iters=20, eval_interval=20, out_dir="base")
    save_pretrained(sample.load_model("base/last.pt")[0], "base/folder")
    settings = {
        "init_from": "base/folder",
        "lora_rank": 4,
        "optimizer": optimizer,
        "lr_decay_iters": 12,
    }
    train(**settings, max_iters=12, out_dir="whole")
    for stop in (6, 12):
        train(**settings, max_iters=stop, out_dir="parts")
    whole, parts = read_checkpoint("whole/last.pt"), read_checkpoint("parts/last.pt")
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    base = load_pretrained("base/folder").state_dict()
    for name, p in whole["model"].items():
        if name.endswith((".a", ".b")):
            assert p.abs().sum() > 0, name
        else:
            assert torch.equal(p, base[name.replace(".linear", "")]), name
    moments = [state["exp_avg"].shape for state in whole["optimizer"]["state"].values()]
    assert len(moments) == 2 * 2 * 4 and all(
        4 in shape for shape in moments
    )  # A and B of eight layers


def test_muon_takes_each_thin_matrix_as_one():
    """Not in three, as c_attn's own: the rows of A are no queries, keys and values."""
    model = MiniGPT(GPTConfig(**SIZES, lora_rank=4))
    groups = train_module.make_optimizer(
        model, train_module.Settings(optimizer="muon")
    ).param_groups
    splits = {id(p): group["splits"] for group in groups for p in group["params"]}
    assert {splits[id(p)] for p in model.parameters() if p.requires_grad} == {1}


def test_an_export_is_the_merged_model(train):
    pytest.importorskip("safetensors")
    train(lora_rank=4, max_iters=20, eval_interval=20)
    model, _, state = sample.load_model("out/last.pt")
    assert state["model_args"]["lora_rank"] == 4 and asdict(model.config)["lora_rank"] == 0
    save_pretrained(model, "folder")
    trained = MiniGPT(GPTConfig(**state["model_args"])).eval()
    trained.load_state_dict(state["model"])
    idx = torch.randint(23, (2, 16))
    torch.testing.assert_close(
        load_pretrained("folder")(idx)[0], trained(idx)[0], atol=1e-4, rtol=0
    )


def test_weights_are_what_is_trained_without_a_rank():
    model = MiniGPT(GPTConfig(**SIZES))
    assert train_module.Settings().lora_rank == model.config.lora_rank == 0
    assert all(p.requires_grad for p in model.parameters())
