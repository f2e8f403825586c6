"""Find out whether a model can learn at all: it must overfit one batch.

python -m extras.check config/shakespeare.py               any settings of train.py, with at most 200 steps

Trains through train.py on one batch, in a folder that is deleted afterwards, so the loss must come near zero. At the
first and the last step it shows root mean squares for each layer: of its activations, of its parameters' gradients
after clipping, of its weights, and of the update, divided by that of the weights: in a healthy run about a hundredth at
first and a thousandth later. A layer that stands out by a factor of ten is where to look.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from unittest.mock import patch

import torch

import train
from model import MiniGPT
from support.dataset import open_dataset
from support.settings import run_script

STATISTICS = ("activation", "gradient", "weight", "update")


def root_mean_square(tensors: Iterable[torch.Tensor]) -> float:
    tensors = [t.detach().float() for t in tensors]
    return (sum(t.square().sum() for t in tensors) / max(1, sum(t.numel() for t in tensors))).sqrt().item()


def watch(model: MiniGPT, optimizer: torch.optim.Optimizer, show: Callable) -> None:
    """From now on call show(step, {layer: {statistic: value}}) after each step of optimizer, which trains model."""
    layers = {"embedding": model.drop} | {f"h.{i}": block for i, block in enumerate(model.h)} | {"ln_f": model.ln_f}
    parameters = {name: list(layer.parameters()) for name, layer in layers.items()}
    parameters["embedding"] = [p for name, p in model.named_parameters() if not name.startswith(("h.", "ln_f."))]
    activations, before, steps = {}, {}, count(1)

    def after_step(*_):
        table = {}
        for name, params in parameters.items():
            table[name] = {
                "activation": activations[name],
                "gradient": root_mean_square(p.grad for p in params if p.grad is not None),
                "weight": (weight := root_mean_square(params)),
                "update": root_mean_square(p - before[p] for p in params) / max(weight, 1e-30),
            }
        show(next(steps), table)

    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, x, name=name: activations.update({name: root_mean_square([x])}))
    optimizer.register_step_pre_hook(lambda *_: before.update({p: p.detach().clone() for p in model.parameters()}))
    optimizer.register_step_post_hook(after_step)


def check(s: train.Settings) -> None:
    """Overfit one batch of the dataset in s, and print the statistics of the layers at the first and the last step."""
    tokens, _, meta = open_dataset(train.find_dataset(s.dataset), s.block_size)
    n, steps = s.block_size + s.batch_size, min(s.max_iters, 200)  # batch_size windows
    make_optimizer = train.make_optimizer

    def show(step, table):
        if step in (1, steps):
            print("".join(f"{title:>12}" for title in ("layer", *STATISTICS)))
            for layer, row in table.items():
                print(f"{layer:>12}" + "".join(f"{value:12.2e}" for value in row.values()))

    def watched_optimizer(model, s):
        watch(model, optimizer := make_optimizer(model, s), show)
        return optimizer

    batch = tokens[:n], tokens[:n], meta | {"train_tokens": n, "val_tokens": n, "val_bytes": n}
    changes = {"max_iters": steps, "lr_decay_iters": steps, "warmup_iters": steps // 10, "eval_interval": steps}
    changes |= {"gradient_accumulation_steps": 1, "dropout": 0.0, "compile": False, "eval_iters": 1, "patience": 0}
    watching = patch.multiple(train, open_dataset=lambda *_: batch, make_optimizer=watched_optimizer)
    with tempfile.TemporaryDirectory() as folder, watching:
        train.main(replace(s, out_dir=folder, **changes))
    print("that folder is deleted; if the last loss is not near zero, look for a mistake before training on more data")


if __name__ == "__main__":
    run_script(check, train.Settings, __doc__)
