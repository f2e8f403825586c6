"""Show a run in TensorBoard or Weights & Biases. Needs the package tensorboard or wandb.

python -m extras.follow out/shakespeare                   tensorboard --logdir out shows it
python -m extras.follow out/shakespeare --to=wandb        WANDB_MODE=offline keeps it here

Run it in the repository, during the run or after it. It goes on until Ctrl-C; --follow=False ends
with what is there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from extras.plot import Records, read_metrics
from support.settings import UserError, optional, run_script, setting


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    to: str = setting("tensorboard", "where to", choices=("tensorboard", "wandb"))
    follow: bool = setting(True, "write also what is still to come, until Ctrl-C")


def open_tensorboard(out_dir: str) -> Callable[[Records], None]:
    """A function that writes records to out_dir/tensorboard, in place of what was there."""
    optional("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(out_dir, "tensorboard")
    writer = SummaryWriter(folder, purge_step=0)
    print(f"writing to {folder}; to see it: tensorboard --logdir {out_dir}", flush=True)

    def write(records):
        for record in records:
            for name in record.keys() - {"step", "seconds"}:
                writer.add_scalar(name, record[name], record["step"])
        writer.flush()

    return write


def open_wandb(out_dir: str) -> Callable[[Records], None]:
    """A function that sends records to a new run of Weights & Biases."""
    run = optional("wandb").init(project="minigpt", name=out_dir, reinit="finish_previous")

    def write(records):
        for record in records:
            run.log({name: record[name] for name in record if name != "step"}, record["step"])

    return write


def main(s: Settings) -> None:
    opener = open_tensorboard if s.to == "tensorboard" else open_wandb
    write = None
    written = []
    while True:
        try:
            records = read_metrics(s.out_dir)
        except UserError:
            if not s.follow or not Path(s.out_dir).is_dir():
                raise
            records = []  # the run has not logged yet
        if write is None or records[: len(written)] != written:
            write = opener(s.out_dir)  # a resumed run has cut off what it will log again
            written = []
        write(records[len(written) :])
        written = records
        if not s.follow:
            return
        time.sleep(10)


if __name__ == "__main__":
    run_script(main, Settings, __doc__, positional="out_dir", user_errors=(OSError,))
