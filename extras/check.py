"""Find out whether a model can learn at all: it must overfit one batch.

python -m extras.check config/shakespeare.py       any settings of train.py, at most 200 steps

Trains on one batch and writes nothing. The loss must come near zero. After the first and the last
step it shows root mean squares for each layer: of its activations, of its parameters' gradients, of
its weights, and of the update, divided by that of the weights. In a healthy run the update is about
a hundredth at first and a thousandth later. Look where a layer differs by a factor of ten.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from model import MiniGPT
from support.dataset import check_length, open_dataset
from support.runtime import advice, pick_device, precision
from support.settings import UserError, run_script
from train import (
    Settings,
    ensure_dataset,
    initial_model,
    learning_rate,
    load_windows,
    make_optimizer,
    to_device,
)

STATISTICS = ("activation", "gradient", "weight", "update")
PASSED = 0.2  # nats; chance is ln(vocab_size), 4.2 for 65 characters


def root_mean_square(tensors: Iterable[torch.Tensor]) -> float:
    """The root of the mean square of all numbers in tensors."""
    total = 0.0
    count = 0
    for t in tensors:
        total += t.detach().double().square().sum().item()
        count += t.numel()
    return math.sqrt(total / max(1, count))


def layers_of(model: MiniGPT) -> dict[str, torch.nn.Module]:
    """The parts of the table, in the order in which data flows: drop is fed by the embeddings."""
    layers = {"embedding": model.drop}
    for i, block in enumerate(model.h):
        layers[f"h.{i}"] = block
    layers["ln_f"] = model.ln_f
    return layers


def layer_of(parameter: str) -> str:
    """The part of the table that a parameter belongs to, by its name."""
    if parameter.startswith("h."):
        return ".".join(parameter.split(".")[:2])
    if parameter.startswith("ln_f."):
        return "ln_f"
    return "embedding"


class Watch:
    """Root mean squares of each layer of model, at the steps where they are asked for."""

    def __init__(self, model: MiniGPT):
        self.model = model
        self.activations = {}
        self.before = {}
        for name, layer in layers_of(model).items():
            layer.register_forward_hook(self.note_activation(name))

    def note_activation(self, name: str):
        def hook(module, args, output):
            self.activations[name] = output.detach()

        return hook

    def before_update(self) -> None:
        """Remember the weights, which an optimiser is about to change."""
        for name, p in self.model.named_parameters():
            self.before[name] = p.detach().clone()

    def table(self) -> dict[str, dict[str, float]]:
        """{layer: {statistic: value}} after the update."""
        table = {}
        for layer, activation in self.activations.items():
            parameters = {
                name: p for name, p in self.model.named_parameters() if layer_of(name) == layer
            }
            weight = root_mean_square(parameters.values())
            update = root_mean_square(p - self.before[name] for name, p in parameters.items())
            gradients = [p.grad for p in parameters.values() if p.grad is not None]
            table[layer] = {
                "activation": root_mean_square([activation]),
                "gradient": root_mean_square(gradients),
                "weight": weight,
                "update": update / max(weight, 1e-30),
            }
        return table


def show(table: dict[str, dict[str, float]], step: int, loss: float) -> None:
    print(f"step {step}, loss {loss:.4f}")
    print("".join(f"{title:>12}" for title in ("layer", *STATISTICS)))
    for layer, row in table.items():
        values = "".join(f"{row[name]:12.2e}" for name in STATISTICS)
        print(f"{layer:>12}{values}")


def suspects(table: dict[str, dict[str, float]]) -> list[str]:
    """The layers that get no gradient, or one that is not finite."""
    return [
        layer
        for layer, row in table.items()
        if row["gradient"] == 0 or not math.isfinite(row["gradient"])
    ]


@advice()
def check(s: Settings) -> float:
    """Overfit one batch with the settings s, print what the layers do, and return the last loss.

    Raises UserError if the loss stays high.
    """
    steps = min(s.max_iters, 200)
    s = replace(s, dropout=0.0, max_iters=steps, lr_decay_iters=steps, warmup_iters=steps // 10)
    device = pick_device(s.device)
    _, autocast = precision(s.dtype, device)
    tokens, _, meta = open_dataset(ensure_dataset(s.dataset))
    torch.manual_seed(s.seed)
    model = initial_model(s.init_from, s, meta).to(device)
    optimizer = make_optimizer(model, s)
    check_length(meta, model.config.block_size)
    rows = min(s.batch_size, len(tokens) - model.config.block_size)
    x, y = to_device(load_windows(tokens, np.arange(rows), model.config), device)

    watch = Watch(model)
    max_norm = s.grad_clip if s.grad_clip > 0 else math.inf
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, s)
        with autocast:
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if step in (1, steps):
            watch.before_update()
        optimizer.step()
        if step in (1, steps):
            table = watch.table()
            show(table, step, loss.item())
        model.zero_grad()

    loss = loss.item()
    if loss < PASSED:
        print(f"passed: loss {loss:.4f} after {steps} steps on one batch")
        return loss
    where = "a higher --learning_rate may help; else look for the layer that stands out above"
    if suspects(table):
        where = f"no finite gradient reaches {', '.join(suspects(table))}: look there"
    raise UserError(f"failed: loss {loss:.4f} after {steps} steps on one batch; {where}")


if __name__ == "__main__":
    run_script(check, Settings, __doc__)
