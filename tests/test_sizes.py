"""Files, functions and argument lists of a size that can be read at one go."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "homoflow"
MAX_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 400, 60, 12
#: What people call with many options, each of them named.
FACES = frozenset(
    [
        "flow",
        "modified_flow",
        "heavy_ball_flow",
        "central_flow",
        "late_flow",
        "early_flow",
        "predict_drift",
        "descend",
    ]
)
#: Diffrax's and homoflow's own: rules about one of them stand in `_methods/_choose.py`, or
#: are answers of the solver's own class.
SOLVERS = re.compile(
    r"(ExponentialAdams|Rodas5P|GaussLegendre|AveragedMidpoint|KinkShare|Heun|Euler|Tsit5"
    r"|Dopri5|Dopri8|Bosh3|Kvaerno[345]|KenCarp[345]|ImplicitEuler)"
)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def num_lines(function: ast.FunctionDef) -> int:
    """From `def` to the end, without the docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def num_arguments(function: ast.FunctionDef) -> int:
    names = function.args
    every = (*names.posonlyargs, *names.args, *names.kwonlyargs)
    return sum(argument.arg not in ("self", "cls") for argument in every)


def asks_for_a_solver(tree: ast.AST) -> bool:
    """Whether `isinstance` or `issubclass` is asked of one solver's class."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        and any(
            SOLVERS.fullmatch(name.attr if isinstance(name, ast.Attribute) else name.id)
            for name in ast.walk(node.args[1])
            if isinstance(name, ast.Name | ast.Attribute)
        )
        for node in ast.walk(tree)
    )


def faults(source: str, path: str) -> list[str]:
    tree, found = ast.parse(source), []
    if (lines := len(source.splitlines())) > MAX_LINES:
        found.append(f"{lines} lines")
    for function in functions(tree):
        if (lines := num_lines(function)) > MAX_FUNCTION_LINES:
            found.append(f"{function.name} has {lines} lines")
        count = num_arguments(function)
        if count > MAX_ARGUMENTS and function.name not in FACES:
            found.append(f"{function.name} has {count} arguments")
    if not path.startswith("_methods/_choose") and asks_for_a_solver(tree):
        found.append("asks for the class of a solver")
    return found


def test_contributing_names_files_that_there_are():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:homoflow|tests|scripts|docs)/[^\s`…]+)`", text)
    assert [path for path in paths if not (PACKAGE.parent / path).exists()] == []


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))
)
def test_files_and_functions_can_be_read(path):
    assert faults((PACKAGE / path).read_text(encoding="utf-8"), path) == []


def test_what_is_too_long_is_found():
    long = "def f():\n" + "    x = 1\n" * 60
    assert faults(long, "_a/b.py") == ["f has 61 lines"]
    assert faults('def f():\n    """\n' + "    x\n" * 60 + '    """\n', "_a/b.py") == []
    assert faults("x = 1\n" * 401, "_a/b.py") == ["401 lines"]
    many = ", ".join(f"x{i}" for i in range(13))
    assert faults(f"def f(self, {many}): ...", "_a/b.py") == ["f has 13 arguments"]
    assert faults(f"def flow(*, {many}): ...", "_a/b.py") == []
    asking = "isinstance(s, (dfx.Heun, str))"
    assert faults(asking, "_a/b.py") == ["asks for the class of a solver"]
    assert faults(asking, "_methods/_choose.py") == []
    assert faults("isinstance(s, dfx.AbstractSolver)", "_a/b.py") == []
