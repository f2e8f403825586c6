"""Imports run downwards only: model <- support <- scripts <- extras, dev. python .ci/layout.py

Also prints what a reader has to read: characters, lines, and how dense they are.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])
SCRIPTS = {"model", "train", "sample", "prepare_data"}
MAY_IMPORT = {
    "model": set(),
    "prepare_data": {"support"},
    "sample": {"model", "support"},
    "train": {"model", "prepare_data", "support"},
    "support": {"model", "support"},
    "extras": SCRIPTS | {"support", "extras"},
    "dev": SCRIPTS | {"support", "extras", "dev"},
}


def imports(tree):
    """The modules that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def reachable(name, used, seen):
    for module in used[name] - seen:
        seen.add(module)
        reachable(module, used, seen)
    return seen


def report(title, paths):
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    lines = text.splitlines()
    wide = sum(len(line) > 100 for line in lines)
    packed = 0
    conditional = 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            conditional += isinstance(node, ast.IfExp)
            if isinstance(node, ast.Assign):
                targets = isinstance(node.targets[0], ast.Tuple)
                packed += targets and isinstance(node.value, ast.Tuple)
    print(
        f"{title}: {len(text):,} characters, {len(lines):,} lines, {wide} of them wide, "
        f"{packed} packed assignments, {conditional} conditional expressions"
    )


def main():
    folders = [ROOT, ROOT / "support", ROOT / "extras", ROOT / "dev"]
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    used = {}
    problems = []
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used[name] = {module for module in imports(tree) if module in names}
        allowed = MAY_IMPORT[name.partition(".")[0]]
        for module in used[name]:
            if module.partition(".")[0] not in allowed:
                problems.append(f"{name} imports {module}")
    problems += [f"{name} imports itself" for name in used if name in reachable(name, used, set())]
    if {path.stem for path in ROOT.glob("*.py")} != SCRIPTS:
        problems.append(f"the scripts are not {SCRIPTS}")
    report("four scripts", [ROOT / f"{name}.py" for name in sorted(SCRIPTS)])
    product = [path for path in paths if path.parent.name != "dev"]
    report("product code", product + sorted((ROOT / "config").glob("*.py")))
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
