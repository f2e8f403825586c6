"""What to look at, layer by layer, when training goes wrong: train.py --log_stats=True."""

import torch

from model import MiniGPT


@torch.no_grad()
def layer_stats(model: MiniGPT, idx: torch.Tensor, weights_before: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Look at a model after an optimiser's step on idx (B, T), while it still has the gradients: {statistic: {layer:
    value}}.

    activation: root mean square of what the layer hands on, in a forward pass of its own; gradient and weight: root
    mean squares over the layer's parameters; update: that of the step, from weights_before, divided by that of weights.
    The tied embedding is also the output head, so its gradient comes from both ends.
    """
    layers = {"embedding": model.drop, **{f"h.{i}": block for i, block in enumerate(model.h)}, "ln_f": model.ln_f}
    rows = {name: [] for name in layers}

    def note_activation(name):
        return lambda module, args, x: rows[name].append(root_mean_square([x]))

    hooks = [layer.register_forward_hook(note_activation(name)) for name, layer in layers.items()]
    model(idx)
    for hook in hooks:
        hook.remove()
    members = {name: [] for name in layers}
    for (name, p), before in zip(model.named_parameters(), weights_before, strict=True):
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), "embedding")
        members[layer].append((p, before))
    for layer, pairs in members.items():
        weight = root_mean_square([p for p, _ in pairs])
        update = root_mean_square([p - before for p, before in pairs]) / weight
        rows[layer] += [root_mean_square([p.grad for p, _ in pairs]), weight, update]
    columns = torch.stack([torch.stack(row) for row in rows.values()]).T.tolist()  # waits for the device once
    names = ("activation", "gradient", "weight", "update")
    return {name: dict(zip(layers, column, strict=True)) for name, column in zip(names, columns, strict=True)}


def root_mean_square(tensors: list[torch.Tensor]) -> torch.Tensor:
    return (sum(t.float().square().sum() for t in tensors) / sum(t.numel() for t in tensors)).sqrt()
