"""Export a run's model as a folder that transformers loads; run it in the repository.

python -m extras.export --out_dir=out/shakespeare --folder=FOLDER
"""

from dataclasses import dataclass
from pathlib import Path

from sample import load_model
from support.checkpoint import find_checkpoint
from support.pretrained import save_pretrained
from support.settings import run_script, setting


@dataclass
class Settings:
    out_dir: str = setting("out", "the out_dir of a training run")
    checkpoint: str = setting(
        "", "best or last, or another file in out_dir; by default best, else last"
    )
    folder: str = setting("", "folder to write; by default OUT_DIR/pretrained")


def main(s: Settings) -> None:
    path = find_checkpoint(s.out_dir, s.checkpoint)
    model, tokenizer, state = load_model(path)
    folder = s.folder
    if not folder:
        folder = Path(s.out_dir, "pretrained")
    save_pretrained(model, folder, tokenizer)
    print(f"{folder}: {path} of step {state['step']}; to load it:")
    print(f'transformers.GPT2LMHeadModel.from_pretrained("{folder}")')


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
