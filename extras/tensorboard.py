"""Show a run in TensorBoard. Needs tensorboard; run it in the repository, during the run or after it.

python -m extras.tensorboard --out_dir=out/shakespeare     until Ctrl-C; --follow=False ends with what is there
tensorboard --logdir out                                   in another terminal
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from extras.plot import parse_metrics
from support.settings import UserError, one_line_errors, read_settings, setting


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    follow: bool = setting(True, "write also what is still to come, until Ctrl-C")


@one_line_errors(OSError)
def main(s: Settings) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("this needs tensorboard: pip install tensorboard") from error
    path, folder = Path(s.out_dir, "metrics.jsonl"), Path(s.out_dir, "tensorboard")
    if not path.is_file():
        raise UserError(f"no {path}: train first, or give another --out_dir")
    print(f"writing to {folder}; to see it: tensorboard --logdir {s.out_dir}", flush=True)
    written = None
    while True:
        text = path.read_bytes()
        text = text[: text.rfind(b"\n") + 1]  # a last line without its end is being written
        if written is None or not text.startswith(written):  # a resumed run cuts off what it will log again
            writer, written = SummaryWriter(folder, purge_step=0), b""  # TensorBoard drops what it had from here
        for record in parse_metrics(text[len(written) :], path):
            for name in record.keys() - {"step", "seconds"}:
                writer.add_scalar(name, record[name], record["step"])
        writer.flush()
        if not s.follow:
            return
        written = text
        time.sleep(2)


if __name__ == "__main__":
    with one_line_errors():
        settings = read_settings(Settings, sys.argv[1:], __doc__)
    main(settings)
