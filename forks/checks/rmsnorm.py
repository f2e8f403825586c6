"""forks/rmsnorm.patch against the formula of Zhang & Sennrich 2019, equation 4."""

import torch

from model import GPTConfig, MiniGPT


def test_each_norm_is_x_over_its_root_mean_square_times_a_gain():
    torch.manual_seed(0)
    model = MiniGPT(GPTConfig(16, 65, 2, 2, 32))
    x = torch.randn(2, 5, 32) * 3 + 1
    norms = [model.ln_f, *(norm for block in model.h for norm in (block.ln_1, block.ln_2))]
    for norm in norms:
        gain = torch.nn.init.normal_(norm.weight)
        torch.testing.assert_close(
            norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
        )
        assert [name for name, _ in norm.named_parameters()] == [
            "weight"
        ]  # no bias, and no mean taken off


def test_the_logits_do_not_see_the_size_of_the_stream_only_its_direction():
    model = MiniGPT(GPTConfig(16, 65, 2, 2, 32)).eval()
    idx, expected = torch.arange(10)[None], None
    for scale in (100.0, 700.0):
        hook = model.ln_f.register_forward_pre_hook(lambda module, x, scale=scale: (x[0] * scale,))
        logits = model(idx)[0]
        expected = logits if expected is None else expected
        hook.remove()
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
