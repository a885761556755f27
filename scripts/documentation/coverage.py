"""Whether every public name has a docstring and a place in the API pages."""

import inspect
import re
from types import ModuleType
from typing import Any

import homoflow
import homoflow.observe
import homoflow.plot

from .examples import DOCS


def public_names() -> dict[str, Any]:
    """Every public name of the package, and what it stands for."""
    names = _names_of(homoflow, "homoflow")
    names |= _names_of(homoflow.observe, "homoflow.observe")
    return names | _names_of(homoflow.plot, "homoflow.plot")


def undocumented() -> list[str]:
    """One sentence for each public name without a docstring or an entry."""
    listed = set()
    for page in DOCS.glob("api/*.md"):
        listed |= set(re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE))
    names = public_names()
    return [
        *(f"{name} is not in docs/api" for name in sorted(set(names) - listed)),
        *(
            f"{name} has no docstring"
            for name in names
            if not _has_docstring(names[name])
        ),
        *(
            f"{name}, in docs/api, is not public"
            for name in sorted(listed - set(names))
        ),
    ]


def _names_of(module: ModuleType, prefix: str) -> dict[str, Any]:
    chosen = getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"])
    return {
        f"{prefix}.{name}": value
        for name in chosen
        if _is_ours(value := getattr(module, name))
    }


def _is_ours(value: Any) -> bool:
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__module__.startswith("homoflow")
    return False


def _has_docstring(value: Any) -> bool:
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return bool(own and own.strip())
