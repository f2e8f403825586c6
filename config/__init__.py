"""Settings: one dataclass a script, filled from config files and the command line. Imports nothing heavy."""

import ast
import difflib
import math
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

T = TypeVar("T")


class UserError(ValueError):
    """Something that the user can put right; the message says how."""


def setting(
    default: Any, help: str, low: float = -math.inf, high: float = math.inf, choices: tuple[str, ...] | None = None
) -> Any:
    """A dataclass field with its meaning and the values it may have: low to high, or one of choices."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def read_settings(cls: type[T], argv: list[str], doc: str, positional: str | None = None) -> T:
    """Return cls (a dataclass of `setting` fields) with values from argv; what stands later wins.

    `--key=value` and `--key value` set a field. Any other argument sets the field `positional`, or, without one,
    is a config file: Python whose variables are the settings. It finds all settings defined, those of the command
    line included, so that it can choose sizes by `device`. Raises UserError; `--help` prints doc and all settings.
    """
    known = {f.name: f for f in fields(cls)}
    assignments = []  # in the order of argv: (key, value), or (None, config file)
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(doc.strip() + "\n\nSettings:" + "".join(_describe(f) for f in known.values()))
            sys.exit(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            if key not in known:
                raise UserError(f"unknown setting --{key}{_suggest(key, known)}")
            if not equals:
                text = next(arguments, None)
                if text is None:
                    raise UserError(f"--{key} needs a value: --{key}=VALUE ({known[key].metadata['help']})")
            assignments.append((key, _check(known[key], _parse(known[key], text), f"--{key}={text}")))
        elif argument.startswith("-") and argument != "-":
            raise UserError(f"unknown argument {argument}: settings are written --key=value, see --help")
        elif positional:
            assignments.append((positional, argument))
        else:
            assignments.append((None, argument))

    values = {}
    flags = {key: value for key, value in assignments if key}
    for key, value in assignments:
        values |= {key: value} if key else _run_config(value, known, flags)
    return cls(**values)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End with one line on stderr and exit status 2 where something is wrong that the user can put right."""
    try:
        yield
    except (UserError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        print("error: " + (f"rank {rank}: " if rank != "0" else "") + str(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _run_config(path, known, flags):
    if not Path(path).is_file():
        raise UserError(f"no config file {path}: settings are written --key=value, config files are in config/")
    given = {name: f.default for name, f in known.items()} | flags
    try:
        scope = runpy.run_path(path, init_globals=given)
    except Exception as error:  # whatever the user's own code may raise
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        line = error.lineno if isinstance(error, SyntaxError) else line
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    values = {}
    for key, value in scope.items():
        if key in known and value != given[key]:
            values[key] = _check(known[key], value, f"{key} = {value!r} in {path}")
        elif key not in known and not key.startswith("_") and isinstance(value, int | float | str):
            raise UserError(f"unknown setting {key} in {path}{_suggest(key, known)}")
    return values


def _parse(f, text):
    if f.type is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # of the wrong type, so that _check says what was expected


def _check(f, value, where):
    low, high, choices, help = (f.metadata[key] for key in ("low", "high", "choices", "help"))
    kind, *optional = get_args(f.type) or [f.type]  # int | None is (int, NoneType)
    if kind is float and type(value) is int:
        value = float(value)
    good = type(value) is kind and (choices is None or value in choices)
    if kind in (int, float):
        good = good and low <= value <= high and math.isfinite(value)
    if good or (optional and value is None):
        return value
    expected = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[kind]
    if choices:
        expected = "one of " + ", ".join(choices)
    elif low > -math.inf:
        expected += f" from {low} to {high}" if high < math.inf else f" of at least {low}"
    raise UserError(f"{where}: expected {expected}{' or None' if optional else ''} ({help})")


def _suggest(key, known):
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"; did you mean {near[0]}?" if near else "; --help lists them all"


def _describe(f):
    return f"\n  --{f.name}={f.default}\n        {f.metadata['help']}"
