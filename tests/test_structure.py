"""The shape of the project: who may import whom, and what runs without jax."""

import ast
import builtins
import dis
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf"
ANYONE = {"config", "errors", "processes"}

# a part of the package, and what it may import besides itself
ALLOWED = {
    "ops": set(),
    "model": {"ops"},
    "sampling": {"model", "ops", "rewards", "data"},
    "data": {"model", "ops"},
    "rewards": {"model", "ops"},
    "algorithms": {"sampling", "data", "rewards", "model", "ops"},
    "train": {"ops", "model", "sampling", "data", "rewards"},
    "records": {"model"},
    "sections": {"algorithms", "train", "sampling", "data", "rewards", "model"},
    "build": {"sections", "algorithms", "train", "sampling", "data", "rewards", "model", "ops", "records"},
    "tasks": {
        "algorithms",
        "sections",
        "build",
        "pipeline",
        "report",
        "train",
        "sampling",
        "data",
        "rewards",
        "model",
        "records",
    },
    "messages": {"run"},
    "report": set(),
    "overrides": set(),
    "pipeline": {"tasks", "messages", "sections", "run", "report", "overrides"},
    "sweep": {"report"},
    "sweeper": {"overrides"},
    "refused": set(),
    "run": {"tasks", "messages", "sweep", "sweeper", "report", "overrides", "refused"},
    "__main__": {"run"},
    "__init__": set(),
    "config": set(),
    "errors": set(),
    "processes": set(),
}


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "rlhf":
            names = [f"rlhf.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        parts |= {name.split(".")[1] for name in names if name.startswith("rlhf.")}
    return parts


def test_imports_point_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported_parts(path) - {part} - ANYONE - ALLOWED[part]:
            wrong.append(f"{path.relative_to(ROOT)} imports rlhf.{other}")
    assert not wrong, "\n".join(wrong)


def test_the_trainer_names_no_algorithm():
    names = {p.stem for p in (PACKAGE / "algorithms").glob("*.py")} - {"__init__", "base", "reference", "rollouts"}
    classes = {
        node.name
        for p in (PACKAGE / "algorithms").glob("*.py")
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.ClassDef)
    } - {"Algorithm", "Runtime", "Reference"}
    for path in (PACKAGE / "train").glob("*.py"):
        used = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not used & (names | classes), path


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["-sc", "query=bash"]], ids=lambda a: a[0])
def test_help_config_and_completion_do_not_import_jax(arguments, tmp_path):
    code = (
        "import sys; sys.argv = ['rlhf', *sys.argv[1:]]\n"
        "from rlhf.run import cli\n"
        "try:\n    cli()\nexcept SystemExit:\n    pass\n"
        "assert 'jax' not in sys.modules, 'jax was imported'"
    )
    environment = {"PATH": "/usr/bin:/bin", "COMP_LINE": "rlhf algorithm=d", "COMP_POINT": "16", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_small():
    long = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno} lines")
    assert not long, "\n".join(long)


def undefined(code: types.CodeType, known: set[str]) -> set[str]:
    """Global names that functions of a code object read and nobody defines."""
    read = {one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return (read - known).union(*(undefined(one, known) for one in inner))


def test_every_name_is_defined():
    """Names of axes in annotations look undefined to linters, so they are told to overlook all; this test does not."""
    found = {}
    for path in sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__main__.py"}):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        known = set(vars(importlib.import_module(name))) | set(vars(builtins))
        found[name] = undefined(compile(path.read_text(encoding="utf-8"), str(path), "exec"), known)
    assert not {name: names for name, names in found.items() if names}
    assert undefined(compile("def f(x: 'batch'): return missing(len(x))", "example", "exec"), {"len"}) == {"missing"}
