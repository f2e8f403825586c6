"""Find out whether a model can learn at all: it must overfit one batch.

python -m extras.check config/shakespeare.py               any settings of train.py, with at most 200 steps

Trains through train.py on one batch, in a folder that is deleted afterwards, so the loss must come near zero. At the
first and the last step it shows root mean squares for each layer: of its activations, of its parameters' gradients
after clipping, of its weights, and of the update, divided by that of the weights: in a healthy run about a hundredth at
first and a thousandth later. A layer that stands out by a factor of ten is where to look.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from model import MiniGPT
from support.dataset import open_dataset
from support.settings import command_line

STATISTICS = ("activation", "gradient", "weight", "update")


def root_mean_square(tensors: Iterable[torch.Tensor]) -> float:
    tensors = [t.detach().float() for t in tensors]
    return (sum(t.square().sum() for t in tensors) / max(1, sum(t.numel() for t in tensors))).sqrt().item()


@contextmanager
def watching(model_class: type, show: Callable[[int, dict[str, dict[str, float]]], None]) -> Iterator[None]:
    """While this is open, call show(step, {layer: {statistic: value}}) after each step of any optimiser that trains a
    model of model_class."""
    activations, before, model, step = {}, {}, None, 0

    def after_forward(module, args, output):
        nonlocal model, before
        if isinstance(module, model_class):
            model, before = module, {p: p.detach().clone() for p in module.parameters()}
        elif isinstance(output, torch.Tensor) and module.training:
            activations[module] = root_mean_square([output])

    def after_step(optimizer, args, kwargs):
        nonlocal step
        step += 1
        layers = {"embedding": model.drop} | {f"h.{i}": block for i, block in enumerate(model.h)} | {"ln_f": model.ln_f}
        table, embedding = {}, [p for name, p in model.named_parameters() if not name.startswith(("h.", "ln_f."))]
        for name, layer in layers.items():
            parameters = embedding if layer is model.drop else list(layer.parameters())
            table[name] = {
                "activation": activations.get(layer, float("nan")),
                "gradient": root_mean_square(p.grad for p in parameters if p.grad is not None),
                "weight": (weight := root_mean_square(parameters)),
                "update": root_mean_square(p - before[p] for p in parameters) / max(weight, 1e-30),
            }
        show(step, table)

    with register_module_forward_hook(after_forward), register_optimizer_step_post_hook(after_step):
        yield


def check(s: train.Settings) -> None:
    """Overfit one batch of the dataset in s, and print the statistics of the layers at the first and the last step."""
    tokens, _, meta = open_dataset(train.find_dataset(s.dataset), s.block_size)
    n, steps = s.block_size + s.batch_size, min(s.max_iters, 200)  # batch_size windows

    def show(step, table):
        if step in (1, steps):
            print("".join(f"{title:>12}" for title in ("layer", *STATISTICS)))
            for layer, row in table.items():
                print(f"{layer:>12}" + "".join(f"{value:12.2e}" for value in row.values()))

    batch = tokens[:n], tokens[:n], meta | {"train_tokens": n, "val_tokens": n, "val_bytes": n}
    one_batch = patch.object(train, "open_dataset", lambda *_: batch)
    changes = {"max_iters": steps, "lr_decay_iters": steps, "warmup_iters": steps // 10, "eval_interval": steps}
    changes |= {"gradient_accumulation_steps": 1, "dropout": 0.0, "compile": False, "eval_iters": 1, "patience": 0}
    with tempfile.TemporaryDirectory() as folder, one_batch, watching(MiniGPT, show):
        train.main(replace(s, out_dir=folder, **changes))
    print("if this loss is not near zero, look for a mistake before training on more data")


if __name__ == "__main__":
    check(command_line(train.Settings, __doc__))
