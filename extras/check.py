"""Find out whether a model can learn at all: it must overfit one batch.

python -m extras.check config/shakespeare.py               any settings of train.py, with at most 200 steps

Trains through train.py on a dataset of one batch, in a folder that is deleted afterwards, so the loss must come near
zero; if it does not, look for a mistake before training on more data. At the first and the last step it shows each layer:
activation: root mean square of what the layer returns; gradient, weight: those of its parameters, the gradient after
clipping; update: that of the step, divided by that of the weights, in a healthy run about a hundredth at first and a
thousandth later. A layer that stands out by a factor of ten is where to look. The tied embedding is also the output
head, so its gradient comes from both ends.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import train
from model import MiniGPT
from support.checkpoint import write_json
from support.dataset import DATA, open_dataset
from support.settings import command_line

STATISTICS = ("activation", "gradient", "weight", "update")


def root_mean_square(tensors: Iterable[torch.Tensor]) -> float:
    tensors = [t.detach().float() for t in tensors]
    return (sum(t.square().sum() for t in tensors) / max(1, sum(t.numel() for t in tensors))).sqrt().item()


@contextmanager
def watching(model_class: type, show: Callable[[int, dict[str, dict[str, float]]], None]) -> Iterator[None]:
    """While this is open, call show(step, {layer: {statistic: value}}) after each step of any optimiser that trains a
    model of model_class."""
    layers, rows, before, steps = {}, {}, {}, [0]

    def before_forward(module, args):
        if isinstance(module, model_class):
            layers.update({"embedding": module.drop, **{f"h.{i}": b for i, b in enumerate(module.h)}})
            layers.update({"ln_f": module.ln_f, "model": module})

    def after_forward(module, args, output):
        for name, layer in layers.items():
            if module is layer and isinstance(output, torch.Tensor) and module.training:
                rows.setdefault(name, {})["activation"] = root_mean_square([output])

    def before_step(optimizer, args, kwargs):
        before.update({p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]})

    def after_step(optimizer, args, kwargs):
        steps[0] += 1
        members = {name: [] for name in layers if name != "model"}
        for name, p in layers["model"].named_parameters():
            members[next((layer for layer in members if name.startswith(f"{layer}.")), "embedding")].append(p)
        for layer, parameters in members.items():
            row, weight = rows.setdefault(layer, {}), root_mean_square(parameters)
            row["gradient"] = root_mean_square(p.grad for p in parameters if p.grad is not None)
            row["weight"] = weight
            row["update"] = root_mean_square(p - before[p] for p in parameters if p in before) / max(weight, 1e-30)
        show(steps[0], {layer: rows[layer] for layer in members})

    handles = [register_module_forward_pre_hook(before_forward), register_module_forward_hook(after_forward)]
    handles.append(register_optimizer_step_pre_hook(before_step))
    handles.append(register_optimizer_step_post_hook(after_step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check(s: train.Settings) -> None:
    """Overfit one batch of the dataset in s, and print the statistics of the layers at the first and the last step."""
    tokens, _, meta = open_dataset(train.find_dataset(s.dataset))
    n, steps, here = s.block_size + s.batch_size, min(s.max_iters, 200), Path.cwd()  # batch_size windows
    init_from = str(Path(s.init_from).resolve()) if Path(s.init_from).exists() else s.init_from

    def show(step, table):
        if step in (1, steps):
            print("".join(f"{title:>12}" for title in ("layer", *STATISTICS)))
            for layer, row in table.items():
                print(f"{layer:>12}" + "".join(f"{row.get(name, float('nan')):12.2e}" for name in STATISTICS))

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            (DATA / "batch").mkdir(parents=True)
            for split in ("train", "val"):
                tokens[:n].tofile(DATA / "batch" / f"{split}.bin")
            write_json(DATA / "batch" / "meta.json", meta | {"train_tokens": n, "val_tokens": n, "val_bytes": n})
            changes = {"max_iters": steps, "lr_decay_iters": steps, "warmup_iters": steps // 10, "eval_interval": steps}
            changes |= {"dataset": "batch", "out_dir": "out", "init_from": init_from, "eval_iters": 1, "patience": 0}
            with watching(MiniGPT, show):
                train.main(replace(s, gradient_accumulation_steps=1, dropout=0.0, compile=False, **changes))
        finally:
            os.chdir(here)
    print("if this loss is not near zero, look for a mistake before training on more data")


if __name__ == "__main__":
    check(command_line(train.Settings, __doc__))
