"""Muon (Jordan et al. 2024) for the matrices of a model, AdamW (Loshchilov & Hutter 2019) for the rest."""

from collections.abc import Iterable, Iterator

import torch

from support.runtime import best_dtype

BATCH = 1 << 24  # numbers updated at once: more would take more memory and save no time


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, cols), rows <= cols, with the same singular vectors and all singular values near 1.

    They are between 0.68 and 1.21 where they were above 0.2 % of the matrix's norm; smaller ones grow 485 times. Five
    steps of Newton-Schulz, X <- (a I + b X X^T + c (X X^T)^2) X, in the number type that is fast on the device.
    """
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
            for matrices in self._batches(group["params"], group["splits"]):
                self._update(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def _batches(self, params: list[torch.Tensor], splits: int) -> Iterator[list[list[torch.Tensor]]]:
        """Lists of [weight, gradient, momentum], views of one shape (rows, cols), rows <= cols."""
        by_shape = {}
        for p in (p for p in params if p.grad is not None):
            if not self.state[p]:  # the loading of AdamW looks for a step everywhere
                self.state[p].update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p))
            for part in zip(*(t.chunk(splits) for t in (p, p.grad, self.state[p]["exp_avg"])), strict=True):
                wide = [t.mT if t.size(0) > t.size(1) else t for t in part]
                by_shape.setdefault(wide[0].shape, []).append(wide)
        for shape, matrices in by_shape.items():
            n = max(1, BATCH // shape.numel())
            yield from (matrices[i : i + n] for i in range(0, len(matrices), n))

    def _update(self, matrices: list[list[torch.Tensor]], lr: float, weight_decay: float, momentum: float) -> None:
        old, grad, old_mean = (torch.stack(tensors) for tensors in zip(*matrices, strict=True))  # (n, rows, cols)
        if getattr(self, "grad_scale", None) is not None:
            grad /= self.grad_scale
        mean = old_mean.lerp(grad, 1 - momentum)
        update = orthogonal(grad.lerp(mean, momentum))  # of Nesterov's form of the momentum
        new = (old * (1 - lr * weight_decay)).add_(update, alpha=-0.2 * lr * old.size(2) ** 0.5)
        if getattr(self, "found_inf", None) is not None:  # stays on the device, so that nothing waits
            new, mean = (torch.where(self.found_inf > 0, *pair) for pair in ((old, new), (old_mean, mean)))
        weights, _, means = zip(*matrices, strict=True)
        torch._foreach_copy_(weights + means, [*new, *mean])
