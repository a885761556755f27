"""Whether a function is linear, or affine, in one of its inputs, read off its jaxpr.

The answer is a proof, or `UNKNOWN`: an operation that is not understood counts as neither,
and no function is evaluated. Derivatives have to be those of the same operations, so calls
with a derivative rule of their own, or that stop derivatives, are not understood.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from ._constants_and_signs import (
    UNKNOWN,
    AbstractValue,
    abstract_constant,
    abstract_result,
)
from ._interpreter import Site, inner_jaxprs, interpret
from ._primitives import MOVES_ENTRIES, TRANSPARENT_CALLS


class Degree(enum.Enum):
    """What is proved of a function of x."""

    CONSTANT = "it does not depend on x"
    LINEAR = "f(αx + βy) = αf(x) + βf(y)"
    AFFINE = "f(x) − f(0) is linear"
    UNKNOWN = "nothing"


class KnownDegree(NamedTuple):
    """What is proved of an array on its way through the function."""

    degree: Degree
    abstract: AbstractValue = UNKNOWN

    @property
    def is_zero(self) -> bool:
        return self.degree is Degree.CONSTANT and self.abstract.constant == 0


#: Linear in their first operand; the others, if there are any, say where.
_LINEAR_IN_FIRST = MOVES_ENTRIES | {
    "convert_element_type",
    "cumsum",
    "div",
    "dynamic_slice",
    "neg",
    "reduce_sum",
    "reduce_window_sum",
    "slice",
    "split",
}
#: Linear in each of two operands while the other is held.
_BILINEAR = frozenset({"conv_general_dilated", "dot_general", "mul"})
#: Linear in all operands together.
_SUMS = frozenset({"add", "add_any", "concatenate", "pad", "stack", "sub"})
#: The same, of some operands; the others say where.
_SELECTIONS = {
    "dynamic_update_slice": (slice(2), slice(2, None)),
    "select_n": (slice(1, None), slice(1)),
}


def degree_in(fn: Callable[..., PyTree], x: PyTree, *others: PyTree) -> Degree:
    """What `fn(x, *others)` is in x, whatever the values of `others`.

    It is traced on shapes alone; arrays or `jax.ShapeDtypeStruct`s will do.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, *others)
    )
    closed = jax.make_jaxpr(fn)(*shapes)
    count = len(jax.tree.leaves(x))
    inputs = [
        KnownDegree(Degree.LINEAR if i < count else Degree.CONSTANT)
        for i in range(len(closed.jaxpr.invars))
    ]
    outputs = _interpret(closed, inputs)
    return _degree_of_sum(outputs) if outputs else Degree.CONSTANT


def _interpret(closed: ClosedJaxpr, inputs: list[KnownDegree]) -> list[KnownDegree]:
    return interpret(closed, inputs, _visit, _lift_constant)


def _lift_constant(number) -> KnownDegree:
    return KnownDegree(Degree.CONSTANT, abstract_constant(number))


def _visit(eqn, operands: list[KnownDegree], site: Site) -> list[KnownDegree]:
    del site
    if all(v.degree is Degree.CONSTANT for v in operands):
        facts = abstract_result(eqn, [v.abstract for v in operands])
        return [
            KnownDegree(Degree.CONSTANT, facts),
            *_results(eqn, Degree.CONSTANT)[1:],
        ]
    if eqn.primitive.name in TRANSPARENT_CALLS:
        body = next(inner_jaxprs(eqn), None)
        if body is not None and len(body.jaxpr.invars) == len(operands):
            return _interpret(body, operands)
        return _results(eqn, Degree.UNKNOWN)
    degree = _degree(eqn, operands) if _keeps_precision(eqn) else Degree.UNKNOWN
    return _results(eqn, degree)


def _results(eqn, degree: Degree) -> list[KnownDegree]:
    return [KnownDegree(degree) for _ in eqn.outvars]


def _degree(eqn, operands: list[KnownDegree]) -> Degree:
    name = eqn.primitive.name
    degrees = [v.degree for v in operands]
    if name in _SUMS:
        return _degree_of_sum(operands)
    if name in _SELECTIONS:
        values, where = (operands[part] for part in _SELECTIONS[name])
        return _degree_of_sum(values) if _are_constant(where) else Degree.UNKNOWN
    if name in _LINEAR_IN_FIRST or (name == "gather" and _fills_with_zero_or_nan(eqn)):
        return degrees[0] if _are_constant(operands[1:]) else Degree.UNKNOWN
    if name in _BILINEAR:
        varying = [d for d in degrees if d is not Degree.CONSTANT]
        return varying[0] if len(varying) == 1 else Degree.UNKNOWN
    return Degree.UNKNOWN


def _degree_of_sum(values: list[KnownDegree]) -> Degree:
    degrees = {v.degree for v in values if not v.is_zero}
    if Degree.UNKNOWN in degrees:
        return Degree.UNKNOWN
    if len(degrees) <= 1:
        return next(iter(degrees), Degree.CONSTANT)
    return Degree.AFFINE


def _are_constant(values: list[KnownDegree]) -> bool:
    return all(v.degree is Degree.CONSTANT for v in values)


def _fills_with_zero_or_nan(eqn) -> bool:
    """Whether entries out of bounds are not some number of their own, but 0 or NaN."""
    return eqn.params["fill_value"] in (None, 0)


def _keeps_precision(eqn) -> bool:
    """Whether real numbers stay real numbers of no lower precision."""
    kinds = [v.aval.dtype for v in eqn.outvars]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in kinds):
        return False
    given = [
        jnp.finfo(v.aval.dtype).eps
        for v in eqn.invars
        if jnp.issubdtype(v.aval.dtype, jnp.floating)
    ]
    if not given:
        return False
    return all(jnp.finfo(dtype).eps <= min(given) for dtype in kinds)
