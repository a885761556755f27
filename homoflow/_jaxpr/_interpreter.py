"""Walking a jaxpr: its equations in order, with values of any kind flowing through."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

#: Calls that are no more than their body.
TRANSPARENT = frozenset(
    {"checkpoint", "closed_call", "core_call", "jit", "pjit", "remat", "remat2"}
)
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})

V = TypeVar("V")


class Site(NamedTuple):
    """What the rest of a jaxpr does with an equation.

    - `jaxpr`: where the equation stands.
    - `reaches`: for each result, whether a derivative can flow from it to an output.
    - `only_here`: for each operand, whether nothing else uses it.
    """

    jaxpr: Jaxpr
    reaches: list[bool]
    only_here: list[bool]


def walk(
    closed: ClosedJaxpr,
    values: list[V],
    visit: Callable[[Any, list[V], Site], list[V]],
    known: Callable[[Any], V],
    reaches: list[bool] | None = None,
) -> list[V]:
    """The values of the outputs, from those of the inputs.

    `visit(equation, operands, site)` returns the values of an equation's results;
    `known(number)` is the value of a literal or of a constant of the jaxpr. Of the
    outputs only those that `reaches` marks count.
    """
    jaxpr = closed.jaxpr
    everything = [True] * len(jaxpr.outvars)
    wanted = reaching(jaxpr, everything if reaches is None else reaches)
    uses = Counter(
        atom
        for atoms in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
        for atom in atoms
        if not isinstance(atom, Literal)
    )
    found: dict[Any, V] = dict(zip(jaxpr.invars, values, strict=True))
    found.update(zip(jaxpr.constvars, map(known, closed.consts), strict=True))

    def read(atom) -> V:
        return known(atom.val) if isinstance(atom, Literal) else found[atom]

    for eqn in jaxpr.eqns:
        site = Site(
            jaxpr,
            [is_in(v, wanted) for v in eqn.outvars],
            [isinstance(v, Literal) or uses[v] == 1 for v in eqn.invars],
        )
        results = visit(eqn, [read(v) for v in eqn.invars], site)
        found.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def inner_jaxprs(eqn) -> Iterator[ClosedJaxpr]:
    """The jaxprs that an equation holds: bodies, branches, conditions."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item
            elif isinstance(item, Jaxpr) and not item.constvars:
                yield ClosedJaxpr(item, ())


def evaluated(eqn, arrays: list[Any]) -> list[Any]:
    """The results of an equation as it stands."""
    body = next(inner_jaxprs(eqn), None)
    if body is None:
        result = eqn.primitive.bind(*arrays, **eqn.params)
        return result if eqn.primitive.multiple_results else [result]
    # How functions are bound with their derivative rules differs between versions of
    # JAX; a jaxpr of this one equation leaves that to it.
    distinct = {
        v: a
        for v, a in zip(eqn.invars, arrays, strict=True)
        if not isinstance(v, Literal)
    }
    names = body.jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    alone = Jaxpr((), list(distinct), eqn.outvars, [eqn], debug_info=names)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*distinct.values())


def label_of(eqn) -> str:
    """The name of the Python function that a call primitive stands for, if any."""
    if eqn.primitive.name in CUSTOM_RULES:
        body = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
        return "" if body is None else body.jaxpr.debug_info.func_name
    return eqn.params.get("name", "")


def is_of_jax_nn(eqn) -> bool:
    """Whether a call stands for a function of `jax.nn`, rather than for a namesake."""
    return is_from(eqn, "jax/_src/nn/functions.py")


def is_from(eqn, path: str) -> bool:
    """Whether the function that a call stands for is written in such a file."""
    body = next(inner_jaxprs(eqn), None)
    if body is None:
        return False
    return path in str(body.jaxpr.debug_info.func_src_info).replace("\\", "/")


def reaching(jaxpr: Jaxpr, reaches: list[bool]) -> set[Var]:
    """Variables from which a derivative can flow to an output that counts."""
    wanted = {
        v
        for v, r in zip(jaxpr.outvars, reaches, strict=True)
        if r and not isinstance(v, Literal)
    }
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name != "stop_gradient" and any(
            is_in(v, wanted) for v in eqn.outvars
        ):
            wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return wanted


def is_in(atom, variables: set[Var]) -> bool:
    return not isinstance(atom, Literal) and atom in variables
