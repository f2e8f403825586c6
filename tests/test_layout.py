"""The rules of the house: what may import what, and how large it may grow."""

import ast

import pytest
from conftest import ROOT

FILES = [path for folder in (".", "support", "extras", "config") for path in sorted((ROOT / folder).glob("*.py"))]
SCRIPTS = {"model", "train", "sample", "prepare_data"}
OPTIONAL = {"tiktoken", "regex", "safetensors", "huggingface_hub", "transformers", "datasets", "matplotlib"}
PLATFORM = {"msvcrt", "fcntl", "pydoc_data"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(tree):
    """The names of the modules that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def trees():
    return {module_name(path): ast.parse(path.read_text("utf-8")) for path in FILES if path.parent.name != "config"}


def test_the_four_scripts_stand_alone_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


def test_imports_run_downwards_only():
    ours = trees()
    used = {name: {module for module in imports(tree) if module in ours} for name, tree in ours.items()}
    allowed = {"model": set(), "prepare_data": {"model"}, "sample": {"model"}, "train": {"model", "prepare_data"}}
    for name, modules in used.items():
        if name.startswith("support"):
            allowed[name] = {"model"}
        elif name.startswith("extras"):
            allowed[name] = SCRIPTS | {module for module in ours if module.startswith("extras.")}
        support = {module for module in ours if module.startswith("support")} if name != "model" else set()
        assert modules <= allowed[name] | support, name

    def reach(name, seen):
        for module in used[name] - seen:
            seen.add(module)
            reach(module, seen)
        return seen

    assert not [name for name in used if name in reach(name, set())], "imports run in a circle"


def test_only_optional_packages_are_imported_inside_a_function():
    for name, tree in trees().items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                inside = {module.split(".")[0] for module in imports(function)}
                inside -= {"torch"} if "torch.utils.tensorboard" in set(imports(function)) else set()
                assert inside <= OPTIONAL | PLATFORM, f"{name}.{function.name}"


@pytest.mark.parametrize(
    "files, limit",
    [([f"{name}.py" for name in SCRIPTS], 1100), (["support/*.py"], 1260), (["*.py", "*/*.py"], 3080)],
)
def test_the_house_stays_small(files, limit):
    paths = {path for pattern in files for path in ROOT.glob(pattern) if path in FILES}
    assert sum(len(path.read_text("utf-8").splitlines()) for path in paths) <= limit


def test_the_training_script_is_flat():
    main = next(node for node in trees()["train"].body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno + 1 <= 150
    assert not [node for node in ast.walk(main) if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not main]
