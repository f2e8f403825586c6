"""Settings: one dataclass per script, filled from config files and the command line."""

import argparse
import difflib
import errno
import math
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import Field, field, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

# what nanoGPT, transformers, litgpt and people's habits call a setting: suggested, not accepted
OTHER_NAMES = {
    "start": "prompt",
    "input_ids": "prompt",
    "ckpt_path": "checkpoint",
    "model_name_or_path": "init_from",
    "resume": "init_from",
    "model": "init_from",
    "output_dir": "out_dir",
    "data_dir": "dataset",
    "context_length": "block_size",
    "seq_len": "block_size",
    "max_seq_length": "block_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "hidden_size": "n_embd",
    "d_model": "n_embd",
    "epochs": "max_iters",
    "num_train_epochs": "max_iters",
    "steps": "max_iters",
    "max_steps": "max_iters",
    "lr": "learning_rate",
    "wd": "weight_decay",
    "warmup_steps": "warmup_iters",
    "max_grad_norm": "grad_clip",
    "micro_batch_size": "batch_size",
    "eval_steps": "eval_interval",
    "save_steps": "save_interval",
    "logging_steps": "log_interval",
    "gradient_checkpointing": "activation_checkpointing",
    "fp16": "dtype",
    "bf16": "dtype",
    "precision": "dtype",
    "max_length": "max_new_tokens",
    "num_return_sequences": "num_samples",
}


class UserError(ValueError):
    """A mistake that the user can fix; the message says how."""


def setting(
    default: Any, help: str, low: float = -math.inf, high: float = math.inf, choices: tuple = ()
) -> Any:
    """A dataclass field with its meaning and its allowed values: low to high, or one of choices."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


def read_settings(
    cls: type,
    argv: list[str],
    doc: str,
    positional: str | None = None,
    previous: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
) -> Any:
    """An instance of cls, a dataclass of `setting` fields, with values from argv.

    `--key=value` or `--key value` sets a field. Any other argument sets the field `positional`, or
    without one is a config file: Python whose variables are the settings. Flags beat config files,
    and later files earlier ones. A file finds every setting defined, flags and earlier files
    included. Without a file, what previous(flags) returns, such as the settings of a run to resume,
    takes the place of the defaults.

    Raises UserError. `--help` prints doc and all settings.
    """
    known = {f.name: f for f in fields(cls)}
    flags, words = parse_arguments(known, argv, doc)
    configs = words
    if positional is not None:
        configs = []
        is_list = get_origin(kind_of(known[positional])) is list
        if words and positional in flags:
            raise UserError(f"both {words[0]} and --{positional} are given: which one counts?")
        if len(words) > 1 and not is_list:
            raise UserError(
                f"unexpected argument {words[-1]}: --help shows the usage; "
                "a pattern such as *.txt needs quotes"
            )
        if words:
            flags[positional] = words if is_list else words[0]

    values = {name: f.default for name, f in known.items()}
    if not configs and previous is not None:
        saved = previous(flags)
        if saved is not None:
            values |= {name: value for name, value in saved.items() if name in known}
    for path in configs:
        values = run_config(path, known, values | flags)
    return cls(**(values | flags))


def parse_arguments(
    known: dict[str, Field], argv: list[str], doc: str
) -> tuple[dict[str, Any], list[str]]:
    """The flags of argv as checked values, and its other words."""
    parser = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for name, f in known.items():
        is_bool = kind_of(f) is bool
        parser.add_argument(
            f"--{name}",
            action=StoreOnce,
            field=f,
            nargs="?" if is_bool else None,
            const="True" if is_bool else None,
            metavar="VALUE",
            help=describe(f),
        )
    namespace, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        raise UserError(f"unknown setting {name}{suggest(name, known)}")
    flags = vars(namespace)
    return flags, flags.pop("words", [])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


class StoreOnce(argparse.Action):
    """Store a checked value. Lists collect the values of several flags, others refuse a second."""

    def __init__(self, *, field: Field, **options: Any):
        super().__init__(**options)
        self.field = field

    def __call__(self, parser, namespace, text, option_string=None):
        if get_origin(kind_of(self.field)) is list:
            values = getattr(namespace, self.dest, [])
            setattr(namespace, self.dest, [*values, text])
            return
        if hasattr(namespace, self.dest):
            raise UserError(f"--{self.dest} is given twice: which one counts?")
        value = check(self.field, parse(self.field, text), f"--{self.dest}={text}")
        setattr(namespace, self.dest, value)


def describe(f: Field) -> str:
    """What --help says about a setting."""
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f" ({', '.join(filter(None, f.metadata['choices']))})"
    return f"{text} [{f.default}]".replace("%", "%%")


def run_config(path: str, known: dict[str, Field], values: dict[str, Any]) -> dict[str, Any]:
    """The settings after the config file at path, or at path beside train.py, has run on values."""
    for found in (Path(path), Path(__file__).parents[1] / path):
        if found.is_file():
            break
    else:
        raise UserError(
            f"no config file {path}: settings are written --key=value, config files are in config/"
        )
    scope = runpy.run_path(str(found), init_globals=values)
    for key, value in scope.items():
        ignored = key.startswith("_") or callable(value) or isinstance(value, ModuleType)
        if key not in known and not ignored:
            raise UserError(
                f"unknown setting {key} in {path}{suggest(key, known)} "
                "(a name of your own begins with _)"
            )
    return {
        key: check(f, scope[key], f"{key} = {scope[key]!r} in {path}") for key, f in known.items()
    }


def kind_of(f: Field) -> Any:
    """The type of a setting's value: int for int and for int | None."""
    if get_args(f.type) and get_origin(f.type) is not list:
        return get_args(f.type)[0]
    return f.type


def parse(f: Field, text: str) -> Any:
    """text as a number, truth value or None where the setting is not text; else text itself."""
    kind = kind_of(f)
    if text == "None" and type(None) in get_args(f.type):
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text  # if that is the wrong type, check says what was expected


def check(f: Field, value: Any, where: str) -> Any:
    """value, if the setting allows it. Raises UserError, which says what was expected."""
    kind = kind_of(f)
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    optional = type(None) in get_args(f.type)
    if value is None and optional:
        return None
    if get_origin(kind) is list:
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    elif kind is float and type(value) is int:
        value = float(value)
        good = low <= value <= high
    elif kind in (int, float):
        good = type(value) is kind and math.isfinite(value) and low <= value <= high
    else:
        good = type(value) is kind and (not choices or value in choices)
    if good:
        return value

    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    expected = names.get(kind, "a list of texts")
    if choices:
        expected = "one of " + ", ".join(choices)
    elif low > -math.inf and high < math.inf:
        expected += f" from {low} to {high}"
    elif low > -math.inf:
        expected += f" of at least {low}"
    if optional:
        expected += " or None"
    raise UserError(f"{where}: expected {expected} ({f.metadata['help']})")


def suggest(key: str, known: dict[str, Field]) -> str:
    """A setting that an unknown key may mean."""
    key = key.strip("-").replace("-", "_").lower()
    meant = OTHER_NAMES.get(key)
    if meant in known:
        return f"; did you mean --{meant}?"
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"; did you mean --{near[0]}?"
    return "; --help lists them all"


def run_script(
    main: Callable,
    cls: type,
    doc: str,
    positional: str | None = None,
    previous: Callable | None = None,
    user_errors: tuple[type[Exception], ...] = (),
) -> None:
    """Call main with the settings of this process's command line, under one_line_errors."""
    with one_line_errors(*user_errors):
        main(read_settings(cls, sys.argv[1:], doc, positional, previous))


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Report a UserError, or another of kinds, in one line on stderr and end with exit status 2.

    A closed pipe, as in `| head`, and Ctrl-C end quietly.
    """
    try:
        yield
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # or Python flushes it as it ends
        sys.exit(141)
    except (UserError, *kinds) as error:
        report(error)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        if hasattr(sys, "ps1"):  # a notebook or an interactive session, which goes on
            sys.exit(130)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # so that a shell's loop ends too


def report(error: Exception) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"rank {rank}: "
    print(f"error: {prefix}{error}", file=sys.stderr)


@contextmanager
def user_error(problem: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Turn exceptions of kinds into a UserError: problem (its first line): advice."""
    try:
        yield
    except kinds as error:
        reason = str(error).partition("\n")[0]
        if not reason:
            reason = type(error).__name__
        message = f"{problem} ({reason})"
        if advice:
            message += f": {advice}"
        raise UserError(message) from error


def optional(package: str) -> ModuleType:
    """The package, imported. Raises UserError where it is not installed."""
    advice = f"pip install {package.partition('.')[0]}"
    with user_error("this needs a package", ImportError, advice=advice):
        return import_module(package)
