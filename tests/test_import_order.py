"""Rooms import in one order: each only from those before it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "homoflow"
ROOMS = (
    "_jax", "_models", "_jaxpr", "_problem", "_results", "_laws", "_observe", "_rescaling",
    "_dynamics", "_solvers", "_descent", "_kinks", "_methods", "_flows", "_sweep",
    "observe", "__init__", "plot",
)  # fmt: skip
#: The continuous and the discrete half never know of each other.
STRANGERS = {"_descent": {"_kinks", "_methods", "_flows"}}


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported_rooms(source: str, parts: tuple[str, ...]) -> set[str]:
    """The rooms that a file of the package, at `parts`, imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            path = (*base, *(node.module or "").split("."))
            found |= {path[0]} if path[0] else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "") == "homoflow":
            found |= {"__init__"}
    return found


def climbs(source: str, parts: tuple[str, ...]) -> set[str]:
    here = room(parts)
    before = set(ROOMS[: ROOMS.index(here) + 1]) - {"__init__"} - {here} | {here}
    if here == "plot":
        before |= {"__init__"}
    return {
        there
        for there in imported_rooms(source, parts)
        if there not in before or here in STRANGERS.get(there, ())
    }


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_file_imports_only_from_rooms_before_its_own(path):
    parts = path.relative_to(PACKAGE).parts
    assert climbs(path.read_text(encoding="utf-8"), parts) == set()


def test_a_climb_is_found():
    assert climbs("from .._flows import flow", ("_problem", "_data.py")) == {"_flows"}
    assert climbs("from ..._flows import flow", ("_kinks", "filippov", "_step.py"))
    assert climbs("from .. import plot", ("_problem", "_data.py")) == {"plot"}
    assert climbs("from .._descent import descend", ("_flows", "_flow.py"))


def test_the_package_holds_no_private_file_but_rooms():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert entries - {"__pycache__", "py.typed"} <= set(ROOMS)
