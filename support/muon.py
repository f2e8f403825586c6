"""Two optimisers used as one (to be replaced)."""

import torch


class MuonAndAdamW:
    """Two optimisers that are used as one."""

    def __init__(self, matrices, groups, weight_decay, **options):
        muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.optimizers = (muon, torch.optim.AdamW(groups, **options))

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        return {
            "state": [o.state_dict()["state"] for o in self.optimizers],
            "param_groups": [o.state_dict()["param_groups"] for o in self.optimizers],
        }

    def load_state_dict(self, states):
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict({"state": states["state"][i], "param_groups": states["param_groups"][i]})
