"""The ideas behind the code, each shown by itself. docs/ideas.md says where each is in the code.

These three are lessons about PyTorch and arithmetic, which no change of our code can make fail:
test_scores_grow_with_the_width_of_a_head_and_its_square_root_undoes_that,
test_layer_norm_gives_each_token_mean_zero_and_variance_one and
test_float16_loses_small_gradients_which_a_scaler_or_bfloat16_keeps.
"""

import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, losses, metrics, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from extras.check import Watch
from model import MLP, Block, GPTConfig, MiniGPT
from train import Settings, make_optimizer


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_idea_is_where_docs_say():
    table = (ROOT / "docs/ideas.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", table)[2:]
    assert len(rows) > 30
    for idea, where, tests in rows:
        for column, form in ((where, r"\b{}\b"), (tests, r"(?m)^def {}\(")):
            places = re.findall(r"`([\w/.]+)`: ((?:`\w+`(?:, )?)+)", column)
            assert places, idea
            for file, names in places:
                text = (ROOT / file).read_text("utf-8")
                for name in re.findall(r"\w+", names):
                    assert re.search(form.format(name), text), f"{idea}: no {name} in {file}"


def test_scores_grow_with_the_width_of_a_head_and_its_square_root_undoes_that():
    gradients = {}
    for D in (16, 1024):
        q, k, v = (normal(1, 64, D, seed=seed) for seed in range(3))
        scores = q @ k.transpose(1, 2)
        assert scores.var().item() == pytest.approx(D, rel=0.2)
        assert (scores / math.sqrt(D)).var().item() == pytest.approx(1, rel=0.2)
        for scale in (1.0, 1 / math.sqrt(D)):
            weights = (scores * scale).requires_grad_()
            (weights.softmax(-1) @ v).square().sum().backward()
            gradients[D, scale == 1.0] = weights.grad.abs().median().item()
    assert gradients[1024, True] < 1e-10  # a softmax that has chosen learns nothing more
    assert gradients[1024, False] > gradients[16, False] / 2


def test_pre_norm_hands_the_gradient_down_the_stream_where_post_norm_shrinks_it():
    """What reaches the first of 24 blocks along x: hooks cut the gradient through the rest."""
    torch.manual_seed(0)
    blocks = [Block(GPTConfig(n_head=2, n_embd=32)) for _ in range(24)]
    for block in blocks:
        for p in block.parameters():
            if p.dim() == 2:
                torch.nn.init.xavier_normal_(p)
        for part in (block.attn, block.mlp):
            part.register_forward_hook(lambda module, args, y: y.detach())

    def post_norm(block, x):  # as in Vaswani et al. 2017
        x = block.ln_1(x + block.attn(x))
        return block.ln_2(x + block.mlp(x))

    gradient, reached = normal(2, 16, 32), {}
    for layer in (Block.__call__, post_norm):
        x = first = normal(2, 16, 32, seed=1).requires_grad_()
        for block in blocks:
            x = layer(block, x)
        x.backward(gradient)
        reached[layer] = first.grad
    assert torch.equal(reached[Block.__call__], gradient)
    assert reached[post_norm].norm() < gradient.norm() / 100


def test_scaled_residual_projections_keep_the_stream_from_growing_with_depth():
    growth, stream = {}, []
    for scaled in (True, False):
        for n_layer in (2, 32):
            model = tiny_model(n_layer=n_layer, n_embd=64)
            if not scaled:
                for name, p in model.named_parameters():
                    if name.endswith("c_proj.weight"):
                        p.data *= math.sqrt(2 * n_layer)
            stream.clear()
            model.h[0].register_forward_pre_hook(lambda block, args: stream.append(args[0]))
            model.ln_f.register_forward_pre_hook(lambda norm, args: stream.append(args[0]))
            model(torch.arange(16)[None])
            growth[scaled, n_layer] = (stream[1] - stream[0]).var().item()
    assert growth[True, 32] == pytest.approx(growth[True, 2], rel=0.5)
    assert growth[False, 32] > 8 * growth[False, 2]


def test_gelu_is_x_times_the_share_of_a_normal_below_it():
    mlp = MLP(GPTConfig(n_head=1, n_embd=1))
    with torch.no_grad():  # so that the layer gives the mean of four equal GELUs
        for p, value in zip(mlp.parameters(), (1.0, 0.0, 0.25, 0.0), strict=True):
            p.fill_(value)
    x = torch.linspace(-4, 4, 81)[:, None]
    expected = x * torch.distributions.Normal(0, 1).cdf(x)
    torch.testing.assert_close(mlp(x), expected, atol=1e-3, rtol=0)


def test_layer_norm_gives_each_token_mean_zero_and_variance_one():
    x = 5 + 3 * normal(2, 7, 32)
    ln = Block(GPTConfig(n_head=2, n_embd=32)).ln_1
    y = ln(x)
    variance = x.var(-1, keepdim=True, correction=0)
    expected = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ln(100 * x), y, atol=1e-4, rtol=0)


def test_teacher_forcing_learns_every_position_in_one_pass():
    """The loss of a sequence is the mean of the losses of each next token after the true ones."""
    model = tiny_model()
    text = torch.randint(65, (1, 17))
    one_by_one = []
    for end in range(1, 17):
        logits = model(text[:, :end])[0][:, -1]
        one_by_one.append(F.cross_entropy(logits, text[:, end]))
    torch.testing.assert_close(model(text[:, :-1], text[:, 1:])[1], torch.stack(one_by_one).mean())


def test_adamw_decays_all_weights_alike_and_adam_those_with_large_gradients_less():
    left = {}
    for kind in ("adamw", "adam"):
        model = tiny_model(n_layer=1)
        s = Settings(learning_rate=1e-3, weight_decay=0.5, beta2=0.99)
        optimizer = make_optimizer(model, s)
        if kind == "adam":  # the decay as a part of the gradient (L2 regularisation)
            options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.5}
            optimizer = torch.optim.Adam(model.parameters(), **options)
        for size, p in ((0.1, model.wte.weight), (100.0, model.h[0].mlp.c_fc.weight)):
            p.data.fill_(1.0)
            for step in range(200):
                p.grad = torch.full_like(p, size * (-1) ** step)  # pulls nowhere in the mean
                optimizer.step()
            left[kind, size] = p.mean().item()
            p.grad = None
    assert left["adamw", 0.1] == pytest.approx(left["adamw", 100.0], rel=1e-3)
    assert left["adamw", 0.1] == pytest.approx(0.9995**200, rel=0.01)
    assert left["adam", 0.1] < 0.9 and left["adam", 100.0] > 0.99


def test_float16_loses_small_gradients_which_a_scaler_or_bfloat16_keeps():
    def gradient(dtype, scale):
        w = torch.ones(1, requires_grad=True)
        optimizer = torch.optim.SGD([w])
        scaler = torch.amp.GradScaler("cpu", scale)
        scaler.scale((w.to(dtype) * 1e-4).float().sum() * 1e-4).backward()
        scaler.unscale_(optimizer)
        return w.grad.item()

    assert gradient(torch.float16, 1.0) == 0.0  # below 6e-8 it has nothing
    assert gradient(torch.float16, 2.0**16) == pytest.approx(1e-8, rel=0.01)
    assert gradient(torch.bfloat16, 1.0) == pytest.approx(1e-8, rel=0.01)  # float32's range,
    assert 1 + torch.tensor(2.0**-9, dtype=torch.bfloat16) == 1  # but two or three digits


def test_clipping_shortens_the_gradient_and_keeps_its_direction(train, monkeypatch):
    tables = {}

    def watched(model, s):
        optimizer = make_optimizer(model, s)
        watch = Watch(model)
        optimizer.register_step_pre_hook(lambda *_: watch.before_update())
        optimizer.register_step_post_hook(lambda *_: tables.update({s.grad_clip: watch.table()}))
        return optimizer

    monkeypatch.setattr("train.make_optimizer", watched)
    for grad_clip in (0.0, 0.5):
        train(out_dir=f"clip{grad_clip}", grad_clip=grad_clip, max_iters=1, lr_decay_iters=1)
    norm = metrics("clip0.0")[0]["grad_norm"]
    assert norm == metrics("clip0.5")[0]["grad_norm"] > 0.5  # what is logged is the norm before
    for layer in ("embedding", "h.0", "h.1", "ln_f"):
        ratio = tables[0.5][layer]["gradient"] / tables[0.0][layer]["gradient"]
        assert ratio == pytest.approx(0.5 / norm, rel=1e-4)


def test_only_log_lines_wait_for_the_device(train, monkeypatch):
    """A number taken out of a tensor makes the CPU wait for the GPU, unless it is on the CPU."""
    # as on a GPU, where the model does not look at its ids
    monkeypatch.setattr(MiniGPT, "check_ids", lambda self, idx: None)

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                self.count += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for steps in (5, 15):
        with Waits() as waits:
            train(out_dir=f"out{steps}", max_iters=steps, eval_interval=100, log_interval=100)
        counts.append(waits.count)
    assert len(losses("out15")) == 1
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_model_can_be_sharded_over_ranks():
    """torch's fully_shard accepts the model as it is, here on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model()
    idx = torch.randint(65, (2, 16))
    expected = model(idx, idx)[1].item()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = model(idx, idx)[1]
        loss.backward()
        assert loss.item() == pytest.approx(expected)
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_perplexity_is_the_number_of_tokens_it_wavers_between(train):
    """A model that knows nothing, a head of zeros, wavers between all 23 characters of the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", lambda p, **options: torch.nn.init.zeros_(p))
        train(learning_rate=0.0, min_lr=0.0, max_iters=3)
    assert metrics()[-1]["perplexity"] == pytest.approx(23, rel=1e-4)
