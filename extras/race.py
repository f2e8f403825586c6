"""Train on tiny Shakespeare beside nanoGPT, on a CPU: python docs/race.py PATH-OF-A-CLONE-OF-NANOGPT [--key=value ...]

Runs `train.py config/shakespeare.py` with those settings, then the CPU command of nanoGPT's README, and reads nanoGPT's
last checkpoint into model.py, so that the same function evaluates both on the whole validation split. Needs
data/shakespeare here, and data/shakespeare_char there as its README says. For the picture at the top of the README:
python plot.py --out_dir=out/race/MiniGPT --compare=out/race/nanoGPT --file=docs/race.png
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PRINTED = {"val_loss": r"step (\d+): .*val loss ([\d.]+)", "loss": r"iter (\d+): loss ([\d.]+)"}
sys.path.insert(0, str(ROOT))

from dataset import open_dataset

from model import GPTConfig, MiniGPT
from train import evaluate


def run_nanogpt(folder, out_dir):
    """Run it, with a metrics.jsonl made of the lines it prints. Returns its seconds."""
    out_dir.mkdir(parents=True)
    command = (
        "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
        "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
        f"--dropout=0.0 --out_dir={out_dir.resolve()}"
    )
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-u", *command.split()], cwd=folder, stdout=subprocess.PIPE, text=True)
    with (out_dir / "metrics.jsonl").open("w", encoding="utf-8", newline="\n") as metrics:
        for line in process.stdout:
            for pattern, name in (
                (r"step (\d+): .*val loss ([\d.]+)", "val_loss"),
                (r"iter (\d+): loss ([\d.]+)", "loss"),
            ):
                if (found := re.match(pattern, line)) and (name == "val_loss" or int(found[1]) % 10 == 0):
                    record = {"step": int(found[1]), name: float(found[2]), "seconds": time.perf_counter() - begun}
                    metrics.write(json.dumps(record) + "\n")
    if process.wait():
        sys.exit(f"nanoGPT ended with status {process.returncode}")
    return time.perf_counter() - begun


def load_nanogpt(path):
    """nanoGPT's checkpoint as a MiniGPT: the same parameters under the same names, but for a prefix and the padding."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = MiniGPT(GPTConfig(**state["model_args"]))
    weights = {name.removeprefix("transformer."): p for name, p in state["model"].items() if name != "lm_head.weight"}
    padded = torch.zeros_like(model.wte.weight)
    padded[: len(weights["wte.weight"])] = weights["wte.weight"]
    model.load_state_dict(weights | {"wte.weight": padded})
    return model


if __name__ == "__main__":
    out = Path("out/race")
    begun = time.perf_counter()
    train = (
        str(ROOT / "train.py"),
        str(ROOT / "config" / "shakespeare.py"),
        "--device=cpu",
        "--init_from=scratch",
        f"--out_dir={out / 'MiniGPT'}",
    )
    subprocess.run([sys.executable, *train, *sys.argv[2:]], check=True)
    ours = time.perf_counter() - begun
    theirs = run_nanogpt(sys.argv[1], out / "nanoGPT")
    loss = evaluate(load_nanogpt(out / "nanoGPT" / "ckpt.pt"), open_dataset("shakespeare")[1], 64)
    best = min(
        record["val_loss"]
        for record in map(json.loads, (out / "MiniGPT" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "val_loss" in record
    )
    print(f"MiniGPT: {best:.4f} in {ours:.1f} s; nanoGPT: {loss:.4f} in {theirs:.1f} s")
