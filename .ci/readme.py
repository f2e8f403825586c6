"""Run the commands of the README and of docs/ as they stand there, in turn, on small models: python .ci/readme.py TEXT

In a copy of the repository whose config/shakespeare.py ends with a few steps of a small model. PATH and FILE stand for
TEXT, codes.npy has ids. What can't run here is in SKIPPED, with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SMALL = """
n_layer, n_head, n_embd, block_size, batch_size = 1, 2, 32, 32, 4
max_iters = 10
"""
SKIPPED = {
    "pip install": ".ci/run does this",
    "python -m pytest": ".ci/run does this",
    "--nproc_per_node=8": "needs eight GPUs",
    "--nanogpt": "takes minutes, and a clone of nanoGPT",
    "dev.bench": "takes minutes; tests/test_bench.py runs it",
    "dev.race": "takes minutes, and a clone of nanoGPT",
    "--init_from=gpt2": "needs the hub",
    "finetune_shakespeare": "needs the hub; tests/test_pretrained.py does it with a model of its own",
    "out/gpt2": "needs a GPT-2 that was trained here",
}


def commands(markdown):
    """The commands in a text's sh blocks, without comments, continued lines joined."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)).replace(
        "\\\n", " "
    )
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines()]
    return [line for line in lines if line.startswith(("python", "torchrun"))]


def main():
    text = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "MiniGPT")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "data", "out"))
        with (copy / "config" / "shakespeare.py").open(
            "a", encoding="utf-8", newline="\n"
        ) as config:
            config.write(SMALL)
        (copy / "prompt.txt").write_text("ROMEO:", encoding="utf-8")
        np.save(copy / "codes.npy", np.arange(40 * 16 * 16).reshape(40, 16, 16) % 1024)
        prepare = f"python prepare_data.py shakespeare --input {text}"
        for command in [
            prepare,
            "python train.py config/shakespeare.py",
            *(
                command
                for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
                for command in commands(page.read_text("utf-8"))
            ),
        ]:
            if reason := next(
                (reason for part, reason in SKIPPED.items() if part in command), None
            ):
                print(f"skipped, {reason}: {command}")
                continue
            here = re.sub(r"\b(PATH|FILE)\b", str(text), command)
            if "extras.check" in command:
                here += " --max_iters=200"  # or it fails, as ten steps are too few to learn a batch
            if "extras.follow" in command:
                here += " --follow=False"  # or it goes on until Ctrl-C
            begun = time.perf_counter()
            environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
            bounded = ["timeout", "300", "sh", "-c", here]
            done = subprocess.run(
                bounded, cwd=copy, env=environment, capture_output=True, text=True
            )
            print(f"{time.perf_counter() - begun:5.1f} s: {command}", flush=True)
            if done.returncode:
                sys.exit(f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
