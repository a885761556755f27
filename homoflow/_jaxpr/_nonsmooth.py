"""Whether a function's gradient may jump, read off its jaxpr.

A solver for smooth equations stalls on the gradient flow of a network with kinks, so
the choice has to be made before the solve. When in doubt the answer is "kinked": that
costs speed, not correctness. (A jump behind `stop_gradient`, as in a straight-through
estimator, is not looked for.)
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jaxtyping import PyTree

#: Primitives with a kink or a jump somewhere.
_KINKED = frozenset(
    {
        "abs", "argmax", "argmin", "ceil", "clamp", "cummax", "cummin", "floor", "max",
        "min", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min",
        "rem", "round", "select_and_scatter_add", "sign", "sort", "top_k",
    }
)  # fmt: skip
#: Functions with a derivative rule of their own that are smooth, though the formula
#: that computes them is not.
_SMOOTH_CUSTOM_RULES = frozenset({"logaddexp", "logaddexp2", "log_softmax", "softmax"})
_CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
#: Choices: kinked only where the choice itself, their first input, depends on weights.
_CHOICES = frozenset({"cond", "select_n"})
#: Functions that are zero where their kink is.
_ZERO_AT_KINK = frozenset({"abs", "leaky_relu", "relu"})
#: Functions that are named as such, whatever operations they are made of.
ACTIVATIONS = frozenset({"leaky_relu", "relu", "relu6"})


def nonsmooth_primitives(
    fn: Callable[..., PyTree], weights: PyTree, *others: PyTree
) -> tuple[str, ...]:
    """Names of the kinked operations through which `fn`'s output depends on `weights`.

    `fn(weights, *others)` is traced on shapes alone; arrays or
    `jax.ShapeDtypeStruct`s will do. Operations behind `stop_gradient`, and relu, leaky
    relu or |·| squared or raised to a higher power at once (the gradient is then
    continuous), do not count. Sorted, without repetition; empty for a function that is
    smooth.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, *others)
    )
    jaxpr = jax.make_jaxpr(fn)(*shapes).jaxpr
    weight_count = len(jax.tree.leaves(weights))
    depends = [i < weight_count for i in range(len(jaxpr.invars))]
    reaches = [True] * len(jaxpr.outvars)
    found, _ = _walk(jaxpr, depends, reaches)
    return tuple(sorted(found))


def _walk(
    jaxpr: Jaxpr, depends: list[bool], reaches: list[bool]
) -> tuple[set[str], list[bool]]:
    """Kinks between the inputs that depend on weights and the outputs that count."""
    dependent = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
    wanted = reaching(jaxpr, reaches)
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        incoming = [is_in(v, dependent) for v in eqn.invars]
        if not any(incoming) or eqn.primitive.name == "stop_gradient":
            continue
        outgoing = [is_in(v, wanted) for v in eqn.outvars]
        names, out_depends = visit(eqn, incoming, outgoing)
        if not smoothed_at_once(jaxpr, eqn):
            found |= names
        dependent |= {v for v, d in zip(eqn.outvars, out_depends, strict=True) if d}
    return found, [is_in(v, dependent) for v in jaxpr.outvars]


def visit(
    eqn, incoming: list[bool], outgoing: list[bool]
) -> tuple[set[str], list[bool]]:
    everything = [True] * len(eqn.outvars)
    if not any(outgoing):
        return set(), everything
    name = eqn.primitive.name
    label = label_of(eqn)
    if name in _CUSTOM_RULES and label in _SMOOTH_CUSTOM_RULES:
        return set(), everything
    found: set[str] = set()
    for inner in inner_jaxprs(eqn):
        # A loop feeds outputs back into inputs: there, be generous.
        aligned = len(inner.invars) == len(incoming) and name != "scan"
        depends = incoming if aligned else [True] * len(inner.invars)
        matched = len(inner.outvars) == len(outgoing) and name not in ("scan", "while")
        reaches = outgoing if matched else [True] * len(inner.outvars)
        names, _ = _walk(inner, depends, reaches)
        found |= names
    if name in _KINKED or (name in _CHOICES and incoming[0]) or _is_step(eqn):
        found.add(name)
    named = label if label in ACTIVATIONS else None
    return ({named} if named and found else found), everything


def _is_step(eqn) -> bool:
    """Whether numbers are made from truth values or integers, or integers from them."""
    if eqn.primitive.name != "convert_element_type":
        return False
    before, after = (v.aval.dtype for v in (eqn.invars[0], eqn.outvars[0]))
    return jnp.issubdtype(before, jnp.inexact) != jnp.issubdtype(after, jnp.inexact)


def label_of(eqn) -> str:
    """The name of the Python function that a call primitive stands for, if any."""
    if eqn.primitive.name in _CUSTOM_RULES:
        body = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
        return "" if body is None else body.jaxpr.debug_info.func_name
    return eqn.params.get("name", "")


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


def smoothed_at_once(jaxpr: Jaxpr, eqn) -> bool:
    """Whether every use of the result takes its kink away.

    A power of at least two does, of a function that is zero at its kink: relu(z)² or
    |z|³, but not max(z, 1)². So does the logarithm of |z|, which a stable log Σ exp has.
    """
    outputs = set(eqn.outvars)
    uses = [e for e in jaxpr.eqns if any(is_in(v, outputs) for v in e.invars)]
    if not uses or any(is_in(v, outputs) for v in jaxpr.outvars):
        return False
    if eqn.primitive.name == "abs" and all(e.primitive.name == "log" for e in uses):
        return True
    zero_at_kink = _ZERO_AT_KINK & {eqn.primitive.name, label_of(eqn)}
    if not zero_at_kink and not _is_max_with_zero(eqn):
        return False
    return all(
        e.primitive.name == "square"
        or (e.primitive.name == "integer_pow" and e.params["y"] >= 2)
        for e in uses
    )


def _is_max_with_zero(eqn) -> bool:
    return eqn.primitive.name == "max" and any(
        isinstance(v, Literal) and np.all(v.val == 0) for v in eqn.invars
    )


def inner_jaxprs(eqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def is_in(atom, variables: set[Var]) -> bool:
    return not isinstance(atom, Literal) and atom in variables
