"""Run train.py as two ranks that share one import of torch: two_ranks.py '--key=value ...' ['--key=value ...' ...]

Each argument is a run, one after the other.
"""

import os
import socket
import sys
from multiprocessing import get_context

import torch

import train
from support.settings import read_settings


def rank(number: int, port: int, arguments: list[str]) -> None:
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    train.main(read_settings(train.Settings, arguments, ""))


if __name__ == "__main__":
    for arguments in sys.argv[1:]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            get_context("fork").Process(target=rank, args=(n, port, arguments.split()))
            for n in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(1)
