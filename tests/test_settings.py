from dataclasses import dataclass

import pytest
from conftest import assert_refused

import sample
from support.settings import OTHER_NAMES, UserError, one_line_errors, read_settings, setting
from train import Settings


@dataclass
class Example:
    size: int = setting(4, "how large", low=1)
    rate: float = setting(0.5, "how quick, or slow", low=0.0, high=1.0)
    name: str = setting("x", "what")
    fast: bool = setting(True, "whether")
    limit: int | None = setting(None, "how many", low=1)
    kind: str = setting("a", "which", choices=("a", "b"))
    parts: list[str] | None = setting(None, "several texts")


def read(*argv, **options):
    return read_settings(Example, list(argv), "An example.", **options)


def test_flags_set_values():
    argv = ["--size=5", "--rate=1", "--name=1e3", "--fast=false", "--limit=3", "--kind", "b"]
    settings = read(*argv)
    assert settings == Example(5, 1.0, "1e3", False, 3, "b")
    assert type(settings.rate) is float
    assert read("--limit=None").limit is None
    assert read("--name=None").name == "None"


def test_a_truth_value_without_a_value_is_true():
    assert read_settings(Settings, ["--eval_only", "--out_dir=x"], "").eval_only is True


def test_a_flag_given_twice_is_refused_unless_its_values_are_collected():
    assert_refused("--size is given twice", read, "--size=5", "--size=6")
    assert read("--parts=a", "--size=5", "--parts=b").parts == ["a", "b"]


def test_without_a_config_file_the_settings_of_a_previous_run_take_the_place_of_the_defaults(
    tmp_path,
):
    def previous(flags):
        assert flags == {"name": "run", "size": 7}
        return {"size": 5, "rate": 0.25, "of_an_older_version": 1}

    assert read("--name=run", "--size=7", previous=previous) == Example(7, 0.25, "run")
    assert read("--size=7", previous=lambda flags: None) == Example(7)
    assert read(config(tmp_path / "a.py", "size = 3"), previous=previous) == Example(3)


def config(path, code):
    path.write_text(code, encoding="utf-8")
    return str(path)


def test_functions_and_modules_in_a_config_file_are_no_settings(tmp_path):
    code = "import math\nfrom math import sqrt\nfrom functools import partial\n"
    code += "half = partial(pow, 2)\nsize = int(sqrt(9))"
    assert read(config(tmp_path / "a.py", code)).size == 3


def test_a_closed_pipe_ends_quietly(capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise BrokenPipeError
    assert exit.value.code == 141
    assert capsys.readouterr().err == ""


def test_a_config_file_is_python_and_flags_beat_it_wherever_they_stand(tmp_path):
    path = config(tmp_path / "a.py", "import math\n_half = 3\nsize = 2 * _half\nname = 'é'\n")
    assert read(path) == Example(6, 0.5, "é")
    assert read(path, "--size=2").size == read("--size=2", path).size == 2


def test_a_config_file_sees_flags_and_earlier_files_and_the_last_file_wins(tmp_path):
    a = config(tmp_path / "a.py", "size, rate = 7, 0.1 if kind == 'b' else 0.2")
    b = config(tmp_path / "b.py", "limit = size\nsize = 4")  # 4 is the default value
    assert (read(a).rate, read(a, "--kind=b").rate) == (0.2, 0.1)
    assert (read(a, b).size, read(a, b).limit) == (4, 7)
    assert read(b, a).size == 7
    assert read(a, "--size=5", b) == Example(5, 0.2, limit=5)


def test_a_config_file_is_also_found_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_settings(Settings, ["config/gpt2.py"], "").out_dir == "out/gpt2"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--siez=3", "unknown setting --siez; did you mean --size"),
        ("--zzz=3", "unknown setting --zzz; --help lists"),
        ("--size=3.5", "--size=3.5: expected a whole number of at least 1 (how large)"),
        ("--size=", "expected a whole number"),
        ("--rate=fast", "expected a number from 0.0 to 1.0"),
        ("--rate=nan", "expected a number"),
        ("--fast=1", "expected True or False"),
        ("--limit=0", "expected a whole number of at least 1 or None"),
        ("--kind=c", "expected one of a, b"),
        ("--size", "argument --size: expected one argument"),
        ("-size=3", "unknown setting -size; did you mean --size"),
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
        ("sise = 3", "unknown setting sise in .*; did you mean --size"),
        ("betas = (0.9, 0.95)", "unknown setting betas in .*begins with _"),
        ("size = 'three'", "size = 'three' in .*expected a whole number"),
    ],
)
def test_mistakes_in_a_config_file_name_it(tmp_path, code, message):
    assert_refused(message, read, config(tmp_path / "a.py", code))


CODES = {"rate = 1 / 0": ZeroDivisionError, "rate =": SyntaxError, "open('no')": OSError}


@pytest.mark.parametrize("code, kind", CODES.items())
def test_an_exception_of_a_config_file_is_the_users_own(tmp_path, code, kind):
    with pytest.raises(kind), one_line_errors():
        read(config(tmp_path / "a.py", code))


def test_what_people_type_instead_is_understood():
    for flag, meant in OTHER_NAMES.items():
        assert any(hasattr(cls, meant) for cls in (Settings, sample.Settings)), flag
    for flag, meant in (("lr", "learning_rate"), ("batchsize", "batch_size")):
        assert_refused(f"did you mean --{meant}", read_settings, Settings, [f"--{flag}=1"], "")


def test_a_name_that_is_too_long_for_a_file_is_the_users_mistake(capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        read("9" * 300)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: [Errno")


def test_help_lists_every_setting_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as exit:
        read("--help")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "An example." in printed
    for part in ("--size", "how large [4]", "--kind", "which (a, b) [a]", "how many [None]"):
        assert part in printed


def test_a_positional_argument_can_name_a_field():
    assert read("thing", "--size=2", positional="name") == Example(2, 0.5, "thing")
    assert_refused("unexpected argument other", read, "thing", "other", positional="name")


def test_a_number_that_is_too_large_for_its_type_is_refused():
    assert_refused("expected a number from 0.0 to 1.0", read, "--rate=1" + "0" * 400)
