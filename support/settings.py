"""Settings: one dataclass per script, filled from config files and the command line."""

import ast
import difflib
import errno
import math
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_args


class UserError(ValueError):
    """A mistake that the user can put right; the message says how."""


def setting(default: Any, help: str, low: float = -math.inf, high: float = math.inf, choices: tuple = ()) -> Any:
    """A dataclass field with its meaning and its allowed values: low to high, or one of choices."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def read_settings(cls: type, argv: list[str], doc: str, positional: str | None = None) -> Any:
    """Return cls, a dataclass of `setting` fields, with values from argv.

    `--key=value` and `--key value` set a field. Any other argument sets the field `positional` or, without one, is a
    config file: Python whose variables are the settings. Flags beat config files; among files, and among flags, the
    last one wins. A file finds every setting defined, flags and earlier files included, so it can choose by `device`.
    Raises UserError; `--help` prints doc and all settings.
    """
    known = {f.name: f for f in fields(cls)}
    flags, configs = {}, []
    arguments = list(reversed(argv))
    while arguments:
        argument = arguments.pop()
        if argument in ("-h", "--help"):
            print(f"{doc.strip()}\n\nSettings:")
            for f in known.values():
                choices = f" ({', '.join(filter(None, f.metadata['choices']))})" if f.metadata["choices"] else ""
                print(f"  --{f.name}={f.default}\n        {f.metadata['help']}{choices}")
            sys.exit(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("-"):
            if positional in flags:
                raise UserError(f"unexpected argument {argument}: write --{list(known)[1]}=PATH, a pattern in quotes")
            configs += [] if positional else [argument]
            flags |= {positional: argument} if positional else {}
            continue
        if not argument.startswith("--") or key not in known:
            raise UserError(f"unknown setting {argument.partition('=')[0]}{_suggest(key, known)}")
        if not equals:
            if not arguments or arguments[-1].startswith("--"):
                value = "True" if known[key].type is bool else "VALUE"
                raise UserError(f"--{key} needs a value: --{key}={value} ({known[key].metadata['help']})")
            text = arguments.pop()
        flags[key] = _check(known[key], _parse(known[key], text), f"--{key}={text}")
    values = {name: f.default for name, f in known.items()}
    for path in configs:
        values = _run_config(path, known, values | flags)
    return cls(**(values | flags))


def run_script(main: Callable, cls: type, doc: str, *kinds: type[Exception], positional: str | None = None, previous=None) -> None:
    """Call main with the settings of this process's command line, under one_line_errors of kinds."""
    with one_line_errors(*kinds):
        main(read_settings(cls, sys.argv[1:], doc, positional))


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Report a UserError, or another of kinds, in one line on stderr and end with exit status 2."""
    try:
        yield
    except (UserError, OSError, *kinds) as error:
        if not isinstance(error, (UserError, *kinds)) and error.errno != errno.ENAMETOOLONG:
            raise
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
        print(f"error: {rank}{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def user_error(problem: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Turn an exception of kinds into a UserError: problem (first line of the exception): advice."""
    try:
        yield
    except kinds as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{problem} ({reason})" + (f": {advice}" if advice else "")) from error


def optional(package: str) -> ModuleType:
    """The package, imported. Raises UserError where it is not installed."""
    with user_error("this needs a package", ImportError, advice=f"pip install {package.split('.')[0]}"):
        return import_module(package)


def _run_config(path, known, values):
    found = next((p for p in (Path(path), Path(__file__).parents[1] / path) if p.is_file()), None)
    if found is None:
        raise UserError(f"no config file {path}: settings are written --key=value, config files are in config/")
    scope = runpy.run_path(str(found), init_globals=values)
    for key, value in scope.items():
        if not (key in known or key.startswith("_") or isinstance(value, ModuleType | FunctionType | type)):
            raise UserError(f"unknown setting {key} in {path}{_suggest(key, known)} (a name of your own begins with _)")
    return {key: _check(f, scope[key], f"{key} = {scope[key]!r} in {path}") for key, f in known.items()}


def _parse(f, text):
    if str in (f.type, *get_args(f.type)):
        return text
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text  # of the wrong type, so that _check says what was expected


def _check(f, value, where):
    low, high, choices, help = (f.metadata[key] for key in ("low", "high", "choices", "help"))
    kind, *optional = get_args(f.type) or [f.type]  # int | None is (int, NoneType)
    if kind is float and type(value) is int:
        value = float(value)
    good = type(value) is kind and (not choices or value in choices)
    if kind in (int, float):
        good = good and low <= value <= high and math.isfinite(value)
    if good or (optional and value is None):
        return value
    expected = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[kind]
    if kind is bool and str(value).capitalize() in ("True", "False"):
        expected += f", as in --{f.name}={str(value).capitalize()}"
    if choices:
        expected = "one of " + ", ".join(choices)
    elif low > -math.inf:
        expected += f" from {low} to {high}" if high < math.inf else f" of at least {low}"
    raise UserError(f"{where}: expected {expected}{' or None' if optional else ''} ({help})")


def _suggest(key, known):
    """A setting whose name is close, or else abbreviated by key, or else one whose help mentions it."""
    key = key.strip("-").replace("-", "_").lower()
    near = difflib.get_close_matches(key, known, n=1)
    near += [n for n in known if n.startswith(key) or key == "".join(word[0] for word in n.split("_"))]
    near += [n for n, f in known.items() if key in re.findall(r"\w+", f.metadata["help"])]
    return f"; did you mean --{near[0]}?" if near else "; --help lists them all"
