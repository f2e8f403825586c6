"""Muon (Jordan et al. 2024) for the matrices of a model, and AdamW for the rest."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.optim.adamw import adamw

from support.runtime import best_dtype

BATCH = 1 << 24  # numbers updated at once: more would take more memory and save no time
A, B, C = 3.4445, -4.7750, 2.0315  # the coefficients of Jordan et al. 2024


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Five times X <- A X + (B X X^T + C (X X^T)^2) X. x: (n, rows, cols), singular values <= 1."""
    for _ in range(5):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, factor, x, beta=A)
    return x


def newton_schulz_wide(x: torch.Tensor) -> torch.Tensor:
    """The same for rows < cols, where it is faster: most products are of small square matrices.

    Each of the five steps multiplies X by the factor A I + B G + C G^2 from the left, and thereby
    its gram matrix G = X X^T by that factor from both sides. In 16 bits this diverges.
    """

    def factor_of(gram):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        return factor

    gram = x @ x.mT
    factor = factor_of(gram)
    total = factor
    for _ in range(4):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        total = factor @ total
    return total @ x


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, cols) with the same singular vectors and all singular values near 1.

    They are between 0.68 and 1.21 where they were above 0.2 % of the matrix's norm; smaller ones
    grow 485 times. The result is in the data type that is fast on the device.
    """
    rows, cols = matrices.shape[1:]
    if rows > cols:
        return orthogonal(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(getattr(torch, best_dtype(x.device)))
    if x.dtype == torch.float32 and rows < cols:
        return newton_schulz_wide(x)
    return newton_schulz(x)


class Muon(torch.optim.Optimizer):
    """AdamW, and for the groups of parameters that ask for it Muon.

    params: parameters or groups of them, as for every torch optimiser. A group with splits = n > 0
    gets Muon: each of its parameters is n matrices stacked, as Q, K and V are, and the
    momentum of each matrix is made orthogonal separately. The updates are scaled to the size of
    AdamW's (Liu et al. 2025, equation 4), so that both rules can share a learning rate.

    betas and eps are AdamW's, momentum is Muon's. With fused, AdamW is one kernel, and a GradScaler
    skips steps on the device, without a synchronisation. Raises ValueError where a parameter of a
    Muon group can't be split into matrices.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        splits: int = 0,
        fused: bool = True,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "splits": splits,
            "fused": fused,
        }
        super().__init__(params, defaults)
        # Asks a GradScaler to set grad_scale and found_inf for the time of a step.
        self._step_supports_amp_scaling = fused

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of parameters, as torch.optim.Optimizer.add_param_group does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if group["splits"] > 0 and (p.dim() != 2 or len(p) % group["splits"] != 0):
                self.param_groups.pop()
                raise ValueError(f"{tuple(p.shape)} can't be split into {group['splits']} matrices")

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update the parameters that have a gradient. Returns the loss that closure computes.

        Under a GradScaler gradients are divided by grad_scale, and a step with found_inf > 0
        changes nothing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["splits"] > 0:
                self._muon(params, group, grad_scale, found_inf)
            else:
                self._adamw(params, group, grad_scale, found_inf)
        return loss

    def _adamw(self, params: list, group: dict, grad_scale, found_inf) -> None:
        """Update params by AdamW."""
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=group["fused"],
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, params: list, group: dict, grad_scale, found_inf) -> None:
        """Update params by Muon, those of one shape together."""
        by_shape = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        for shape, alike in by_shape.items():
            n = max(1, BATCH // shape.numel())
            for first in range(0, len(alike), n):
                weights = alike[first : first + n]
                means = [self.state[p]["exp_avg"] for p in weights]
                # where the tensors are sharded, this is the place to gather them
                old_weights = torch.stack(weights)
                old_means = torch.stack(means)
                grads = torch.stack([p.grad for p in weights])
                if grad_scale is not None:
                    grads = grads / grad_scale
                new_weights, new_means = muon(old_weights, grads, old_means, group)
                if found_inf is not None:  # chosen on the device, without a synchronisation
                    new_weights = torch.where(found_inf > 0, old_weights, new_weights)
                    new_means = torch.where(found_inf > 0, old_means, new_means)
                for i in range(len(weights)):
                    weights[i].copy_(new_weights[i])
                    means[i].copy_(new_means[i])


def muon(weights: torch.Tensor, grads: torch.Tensor, means: torch.Tensor, group: dict) -> tuple:
    """New weights and new means of the gradients. All are (n, rows, cols): n parameters."""
    rows, cols = weights.shape[1:]
    means = means.lerp(grads, 1 - group["momentum"])
    update = grads.lerp(means, group["momentum"])  # Nesterov's form of the momentum
    matrices = update.view(-1, rows // group["splits"], cols)
    update = orthogonal(matrices).to(weights.dtype).reshape(weights.shape)
    size = 0.2 * max(matrices.shape[1:]) ** 0.5
    weights = weights * (1 - group["lr"] * group["weight_decay"])
    return weights.add(update, alpha=-size * group["lr"]), means
