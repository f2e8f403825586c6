"""Muon (Jordan et al. 2024) for the matrices of a model, AdamW (Loshchilov & Hutter 2019) for the rest."""

from collections import defaultdict
from collections.abc import Iterable

import torch

from support.runtime import best_dtype

BATCH = 1 << 24  # numbers updated at once: more would take more memory and save no time


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, cols) with the same singular vectors and all singular values near 1.

    They are between 0.68 and 1.21 where they were above 0.2 % of the matrix's norm; smaller ones grow 485 times. Five
    steps of Newton-Schulz, X <- (a I + b X X^T + c (X X^T)^2) X, in the number type that is fast on the device.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonal(matrices.mT).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(getattr(torch, best_dtype(x.device)))
    if x.dtype == torch.float32 and x.size(1) < x.size(2):  # faster with X only at the end; in 16 bits it diverges
        gram, total = x @ x.mT, None
        for step in range(5):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            total = factor if total is None else factor @ total
            if step < 4:
                gram = factor @ gram @ factor
        return total @ x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """AdamW with a second update rule, Muon, for the groups that ask for it.

    groups: dicts of "params" and the settings that differ from the defaults, as for AdamW. A group with "splits": n > 0
    gets Muon: each parameter is n matrices on top of each other, as Q, K and V are, and the "momentum" (0.95) of each
    matrix is made orthogonal by itself. These updates are scaled to the size of AdamW's (Liu et al. 2025, equation 4),
    so that both rules can share a learning rate.
    """

    def __init__(self, groups: Iterable[dict], **settings):
        groups = [{"splits": 0, "momentum": 0.95} | group for group in groups]
        super().__init__(groups, **({"fused": True} | settings))  # so that a GradScaler leaves skipping to it

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient, or none if a GradScaler has found one that is not finite."""
        groups, self.param_groups = self.param_groups, [group for group in self.param_groups if not group["splits"]]
        super().step()
        self.param_groups = groups
        for group in (group for group in groups if group["splits"]):
            by_shape = defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:  # the loading of AdamW looks for a step everywhere
                    self.state[p].update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p))
                by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                n = max(1, BATCH // shape.numel())
                for some in (params[i : i + n] for i in range(0, len(params), n)):
                    self._update(some, [p.grad for p in some], [self.state[p]["exp_avg"] for p in some], group)

    def _update(self, params: list, grads: list, means: list, group: dict) -> None:
        """Update params and the means of their gradients, all of one shape (rows, cols), with group's settings."""
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))  # of a GradScaler
        may_skip = found_inf is not None and (not found_inf.is_cpu or found_inf > 0)
        before = [t.clone() for t in (*params, *means)] if may_skip else []
        if grad_scale is not None:
            grads = torch._foreach_div(grads, grad_scale)
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        update = torch.stack(torch._foreach_lerp(grads, means, group["momentum"]))  # Nesterov's form of the momentum
        rows, cols = params[0].shape
        matrices = update.view(-1, rows // group["splits"], cols)
        update = orthogonal(matrices).to(update.dtype).reshape(update.shape)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, update.unbind(), alpha=-0.2 * group["lr"] * max(matrices.shape[1:]) ** 0.5)
        for new, old in zip((*params, *means), before, strict=False):  # on the device, so that nothing waits
            torch.where(found_inf > 0, old, new, out=new)
