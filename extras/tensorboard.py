"""Show a run in TensorBoard. Needs tensorboard; run it in the repository, during the run or after it.

python -m extras.tensorboard --out_dir=out/shakespeare     until Ctrl-C; --follow=False ends with what is there
tensorboard --logdir out                                   in another terminal
"""

import time
from dataclasses import dataclass
from pathlib import Path

from extras.plot import read_metrics
from support.settings import optional, run_script, setting


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    follow: bool = setting(True, "write also what is still to come, until Ctrl-C")


def main(s: Settings) -> None:
    optional("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    folder, written = Path(s.out_dir, "tensorboard"), None
    while True:
        records = read_metrics(s.out_dir)
        if (
            written is None or records[: len(written)] != written
        ):  # a resumed run cuts off what it will log again
            writer, written = (
                SummaryWriter(folder, purge_step=0),
                [],
            )  # TensorBoard drops what it had from here
            print(f"writing to {folder}; to see it: tensorboard --logdir {s.out_dir}", flush=True)
        for record in records[len(written) :]:
            for name in record.keys() - {"step", "seconds"}:
                writer.add_scalar(name, record[name], record["step"])
        writer.flush()
        if not s.follow:
            return
        written = records
        time.sleep(10)


if __name__ == "__main__":
    run_script(main, Settings, __doc__, OSError)
