"""Whether a function's gradient may jump, read off its jaxpr.

A solver for smooth equations stalls on the gradient flow of a network with kinks, so
the choice has to be made before the solve. When in doubt the answer is "kinked": that
costs speed, not correctness.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from ._constants_and_signs import (
    UNKNOWN,
    AbstractValue,
    abstract_constant,
    abstract_result,
    find_redundant_max,
    has_constant_sign,
    has_root_kink,
)
from ._custom_rules import is_step, jumps_of_custom_rule
from ._interpreter import (
    Site,
    function_name,
    inner_jaxprs,
    interpret,
    is_in,
    is_of_jax_nn,
)
from ._loops import LOOPS, loop_dependences
from ._primitives import CUSTOM_RULES, JUMPS, MAX_REDUCTIONS, TRANSPARENT_CALLS

#: Primitives with a kink or a jump somewhere.
_KINKED = (
    JUMPS
    | MAX_REDUCTIONS
    | {
        "abs",
        "clamp",
        "cummax",
        "cummin",
        "max",
        "min",
        "select_and_scatter_add",
        "sort",
        "top_k",
    }
)
#: Functions with a derivative rule of their own that are smooth, though the formula
#: that computes them is not.
_SMOOTH_CUSTOM_RULES = frozenset({"logaddexp", "logaddexp2", "log_softmax", "softmax"})
#: Choices: kinked only where the choice itself, their first input, depends on weights.
_CHOICES = frozenset({"cond", "select_n"})
#: Operations with indices among their inputs.
_LOOKUPS = frozenset(
    {
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "scatter",
        "scatter-add",
        "scatter-max",
        "scatter-min",
        "scatter-mul",
    }
)
#: Functions that are zero where their kink is.
_ZERO_AT_KINK = frozenset({"abs", "leaky_relu", "relu"})
#: Functions that are named as such, whatever operations they are made of.
ACTIVATIONS = frozenset({"elu", "hard_tanh", "leaky_relu", "relu", "relu6", "selu"})


class Dependence(NamedTuple):
    """Whether an array depends on weights, and what holds for all its entries."""

    depends: bool
    abstract: AbstractValue = UNKNOWN


def nonsmooth_primitives(
    fn: Callable[..., PyTree], weights: PyTree, *others: PyTree
) -> tuple[str, ...]:
    """Names of the kinked operations through which `fn`'s output depends on `weights`.

    `fn(weights, *others)` is traced on shapes alone; arrays or
    `jax.ShapeDtypeStruct`s will do. Kinks (not jumps) behind `stop_gradient`, and relu,
    leaky relu or |·| squared or raised to a higher power at once (the gradient is then
    continuous), do not count; nor do `jax.nn.elu` with α = 1 and `jax.nn.celu`, whose
    gradients are continuous too, and a maximum of 0 and what is never negative. Sorted,
    without repetition; empty for a function that is smooth.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, *others)
    )
    closed = jax.make_jaxpr(fn)(*shapes)
    weight_count = len(jax.tree.leaves(weights))
    inputs = [Dependence(i < weight_count) for i in range(len(closed.jaxpr.invars))]
    found, _ = _interpret(closed, inputs, [True] * len(closed.jaxpr.outvars))
    return tuple(sorted(found))


def _interpret(
    closed: ClosedJaxpr, inputs: list[Dependence], is_differentiated: list[bool]
) -> tuple[set[str], list[Dependence]]:
    """Kinks between the inputs that depend on weights and the outputs that count."""
    found: set[str] = set()

    def visit(eqn, operands: list[Dependence], site: Site) -> list[Dependence]:
        names, results = find_kinks(eqn, operands, site)
        found.update(names)
        return results

    outputs = interpret(closed, inputs, visit, _lift_constant, is_differentiated)
    return found, outputs


def _lift_constant(number) -> Dependence:
    return Dependence(False, abstract_constant(number))


def find_kinks(
    eqn, operands: list[Dependence], site: Site
) -> tuple[set[str], list[Dependence]]:
    """Names of an equation's kinks, and what is known about its results."""
    name = eqn.primitive.name
    depends = any(t.depends for t in operands)
    if not depends:
        return set(), _results(eqn, operands, depends)
    found, results = _look_inside(eqn, operands, site)
    if not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):
        # Integers and truth values have no derivatives: what is made of them counts.
        return set(), results
    abstracts = [t.abstract for t in operands]
    is_jump = name in JUMPS and not has_constant_sign(eqn, abstracts)
    if is_jump or is_step(eqn) or _is_lookup(eqn, operands):
        # The gradient jumps also where no derivative goes through: the value does.
        return {name}, results
    if is_smooth_call(eqn, operands):
        return set(), results
    if not any(site.is_differentiated):
        return found, results
    if find_redundant_max(eqn, abstracts) is not None:
        return set(), results
    if is_smoothed_by_uses(site.jaxpr, eqn):
        return set(), results
    is_choice = name in _CHOICES and operands[0].depends
    if name in _KINKED or is_choice or has_root_kink(eqn, abstracts):
        found.add(name)
    label = function_name(eqn)
    named = label if label in ACTIVATIONS else None
    return ({named} if named and found else found), results


def _results(eqn, operands: list[Dependence], depends: bool) -> list[Dependence]:
    others = [Dependence(depends)] * (len(eqn.outvars) - 1)
    first = Dependence(depends, abstract_result(eqn, [t.abstract for t in operands]))
    return [first, *others][: len(eqn.outvars)]


def _look_inside(
    eqn, operands: list[Dependence], site: Site
) -> tuple[set[str], list[Dependence]]:
    """Kinks of the jaxprs that an equation holds, and what is known of its results."""
    if _is_inlined_call(eqn, operands):
        body = next(inner_jaxprs(eqn))
        found, results = _interpret(body, operands, site.is_differentiated)
        return found | jumps_of_custom_rule(eqn, operands), results
    if eqn.primitive.name in LOOPS:
        inputs, outputs = loop_dependences(eqn, [t.depends for t in operands], _flow)
        found: set[str] = set()
        for body, depends in inputs:
            found |= _interpret(
                body,
                [Dependence(d) for d in depends],
                [True] * len(body.jaxpr.outvars),
            )[0]
        return found, [Dependence(d) for d in outputs]
    found = set()
    for inner in inner_jaxprs(eqn):
        found |= _kinks_of_body(inner, eqn, operands, site)
    return found | jumps_of_custom_rule(eqn, operands), _results(eqn, operands, True)


def _flow(body: ClosedJaxpr, depends: list[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on weights, if these of its inputs do."""
    inputs = [Dependence(d) for d in depends]
    outputs = _interpret(body, inputs, [True] * len(body.jaxpr.outvars))[1]
    return [t.depends for t in outputs]


def _is_inlined_call(eqn, operands: list[Dependence]) -> bool:
    """Whether an equation is a call, whose results are those of its body."""
    if eqn.primitive.name not in TRANSPARENT_CALLS | CUSTOM_RULES:
        return False
    body = next(inner_jaxprs(eqn), None)
    return (
        body is not None
        and len(body.jaxpr.invars) == len(operands)
        and len(body.jaxpr.outvars) == len(eqn.outvars)
    )


def _kinks_of_body(
    inner: ClosedJaxpr, eqn, operands: list[Dependence], site: Site
) -> set[str]:
    jaxpr = inner.jaxpr
    if eqn.primitive.name == "cond" and len(jaxpr.invars) == len(operands) - 1:
        operands = operands[1:]
    aligned = len(jaxpr.invars) == len(operands)
    inputs = operands if aligned else [Dependence(True)] * len(jaxpr.invars)
    matched = len(jaxpr.outvars) == len(site.is_differentiated)
    is_differentiated = (
        site.is_differentiated if matched else [True] * len(jaxpr.outvars)
    )
    return _interpret(inner, inputs, is_differentiated)[0]


def is_smooth_call(eqn, operands: list[Dependence]) -> bool:
    """Whether a call's gradient is continuous, though its formula has choices in it.

    elu with α = 1 and celu have second derivatives that jump, which a solver meets as a
    loss of order in a step, like relu(z)².
    """
    label = function_name(eqn)
    if eqn.primitive.name in CUSTOM_RULES:
        return label in _SMOOTH_CUSTOM_RULES
    if eqn.primitive.name not in TRANSPARENT_CALLS or not is_of_jax_nn(eqn):
        return False
    is_elu = label == "elu" and all(t.abstract.constant == 1 for t in operands[1:])
    return is_elu or label == "celu"


def _is_lookup(eqn, operands: list[Dependence]) -> bool:
    """Whether entries are taken from places that depend on weights."""
    if eqn.primitive.name not in _LOOKUPS:
        return False
    return any(
        t.depends and jnp.issubdtype(v.aval.dtype, jnp.integer)
        for t, v in zip(operands, eqn.invars, strict=True)
    )


def is_smoothed_by_uses(jaxpr: Jaxpr, eqn) -> bool:
    """Whether every use of the result takes its kink away.

    A power of at least two does, of a function that is zero at its kink: relu(z)² or
    |z|³, but not max(z, 1)². So does the logarithm of |z|, which a stable log Σ exp has.
    """
    name = eqn.primitive.name
    zero_at_kink = _ZERO_AT_KINK & {name, function_name(eqn)} or _is_max_with_zero(eqn)
    if not zero_at_kink:
        return False
    outputs = set(eqn.outvars)
    uses = [e for e in jaxpr.eqns if any(is_in(v, outputs) for v in e.invars)]
    if not uses or any(is_in(v, outputs) for v in jaxpr.outvars):
        return False
    if name == "abs" and all(e.primitive.name == "log" for e in uses):
        return True
    return all(
        e.primitive.name == "square"
        or (e.primitive.name == "integer_pow" and e.params["y"] >= 2)
        for e in uses
    )


def _is_max_with_zero(eqn) -> bool:
    return eqn.primitive.name == "max" and any(
        isinstance(v, Literal) and np.all(v.val == 0) for v in eqn.invars
    )
