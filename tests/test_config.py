from dataclasses import dataclass

import pytest

from config import UserError, read_settings, setting


@dataclass
class Example:
    size: int = setting(4, "how large", low=1)
    rate: float = setting(0.5, "how fast", low=0.0, high=1.0)
    name: str = setting("x", "what")
    fast: bool = setting(True, "whether")
    limit: int | None = setting(None, "how many", low=1)
    kind: str = setting("a", "which", choices=("a", "b"))


def read(*argv, **options):
    return read_settings(Example, list(argv), "An example.", **options)


def test_flags_set_values_and_the_last_one_wins():
    settings = read("--size=5", "--rate=1", "--name=1e3", "--fast=False", "--limit=3", "--kind", "b", "--size=6")
    assert settings == Example(6, 1.0, "1e3", False, 3, "b")
    assert type(settings.rate) is float
    assert read("--limit=3", "--limit=None").limit is None


def test_a_config_file_is_python_and_order_decides(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("import math\n_half = 3\nsize = 2 * _half\nname = 'é'\n", encoding="utf-8")
    assert read(str(path)) == Example(6, 0.5, "é")
    assert read(str(path), "--size=2").size == 2
    assert read("--size=2", str(path)).size == 6


def test_a_config_file_sees_the_command_line(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("rate = 0.1 if kind == 'b' else 0.2", encoding="utf-8")
    assert read(str(path)).rate == 0.2
    assert read(str(path), "--kind=b").rate == 0.1


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--siez=3", "unknown setting --siez; did you mean size"),
        ("--zzz=3", "unknown setting --zzz; --help lists"),
        ("--size=3.5", "--size=3.5: expected a whole number of at least 1 (how large)"),
        ("--size=0", "expected a whole number of at least 1"),
        ("--size=True", "expected a whole number"),
        ("--size=", "expected a whole number"),
        ("--rate=fast", "expected a number from 0.0 to 1.0"),
        ("--rate=nan", "expected a number"),
        ("--rate=1e999", "expected a number"),
        ("--fast=1", "expected True or False"),
        ("--limit=0", "expected a whole number of at least 1 or None"),
        ("--kind=c", "expected one of a, b"),
        ("--size", "--size needs a value"),
        ("-size=3", "unknown argument -size=3"),
        ("nowhere.py", "no config file nowhere.py"),
        ("--size=__import__('os').getcwd()", "expected a whole number"),
    ],
)
def test_mistakes_say_what_was_expected(argument, message):
    with pytest.raises(UserError) as error:
        read(argument)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "code, message",
    [
        ("sise = 3", "unknown setting sise in .*; did you mean size"),
        ("size = 'three'", "size = 'three' in .*expected a whole number"),
        ("size = 3\nrate = 1 / 0", "line 2: ZeroDivisionError"),
        ("size = 3\nrate =", "line 2: SyntaxError"),
    ],
)
def test_mistakes_in_a_config_file_name_it(tmp_path, code, message):
    path = tmp_path / "a.py"
    path.write_text(code, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(str(path))


def test_help_lists_every_setting_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as exit:
        read("--help")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "An example." in printed
    for part in ("--size=4", "how large", "--kind=a", "which", "--limit=None"):
        assert part in printed


def test_a_positional_argument_can_name_a_field():
    assert read("thing", "--size=2", positional="name") == Example(2, 0.5, "thing")
