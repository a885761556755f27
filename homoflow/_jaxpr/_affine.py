"""Whether a function is linear, or affine, in one of its inputs, read off its jaxpr.

Proved or not: what is not understood counts as neither, and no function is evaluated.
Derivatives are those of the same operations: what has a rule of its own, or stops
derivatives, is not understood.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from ._constants_and_signs import NOTHING, Facts, facts_of_number, facts_of_result
from ._interpreter import TRANSPARENT, Site, inner_jaxprs, walk


class Degree(enum.Enum):
    """What is proved of a function of x."""

    CONSTANT = "it does not depend on x"
    LINEAR = "f(αx + βy) = αf(x) + βf(y)"
    AFFINE = "f(x) − f(0) is linear"
    UNKNOWN = "nothing"


class Known(NamedTuple):
    degree: Degree
    facts: Facts = NOTHING

    @property
    def is_zero(self) -> bool:
        return self.degree is Degree.CONSTANT and self.facts.constant == 0


#: Linear in their first operand; the others, if there are any, say where.
_LINEAR_IN_FIRST = frozenset(
    {
        "broadcast_in_dim", "convert_element_type", "copy", "cumsum", "div",
        "dynamic_slice", "expand_dims", "neg", "reduce_sum", "reduce_window_sum",
        "reshape", "rev", "slice", "split", "squeeze", "transpose",
    }
)  # fmt: skip
#: Linear in each of two operands while the other is held.
_BILINEAR = frozenset({"conv_general_dilated", "dot_general", "mul"})
#: Linear in all operands together.
_SUMS = frozenset({"add", "add_any", "concatenate", "pad", "stack", "sub"})
#: The same, of some operands; the others say where.
_CHOICES = {
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
        Known(Degree.LINEAR if i < count else Degree.CONSTANT)
        for i in range(len(closed.jaxpr.invars))
    ]
    outputs = _look(closed, inputs)
    return _sum(outputs) if outputs else Degree.CONSTANT


def _look(closed: ClosedJaxpr, inputs: list[Known]) -> list[Known]:
    return walk(closed, inputs, _visit, _constant)


def _constant(number) -> Known:
    return Known(Degree.CONSTANT, facts_of_number(number))


def _visit(eqn, operands: list[Known], site: Site) -> list[Known]:
    del site
    if all(v.degree is Degree.CONSTANT for v in operands):
        facts = facts_of_result(eqn, [v.facts for v in operands])
        return [Known(Degree.CONSTANT, facts), *_unknown(eqn, Degree.CONSTANT)[1:]]
    if eqn.primitive.name in TRANSPARENT:
        body = next(inner_jaxprs(eqn), None)
        if body is not None and len(body.jaxpr.invars) == len(operands):
            return _look(body, operands)
        return _unknown(eqn)
    degree = _degree(eqn, operands) if _keeps_precision(eqn) else Degree.UNKNOWN
    return _unknown(eqn, degree)


def _unknown(eqn, degree: Degree = Degree.UNKNOWN) -> list[Known]:
    return [Known(degree) for _ in eqn.outvars]


def _degree(eqn, operands: list[Known]) -> Degree:
    name = eqn.primitive.name
    degrees = [v.degree for v in operands]
    if name in _SUMS:
        return _sum(operands)
    if name in _CHOICES:
        values, where = (operands[part] for part in _CHOICES[name])
        return _sum(values) if _are_constant(where) else Degree.UNKNOWN
    if name in _LINEAR_IN_FIRST or (name == "gather" and _fills_with_nothing(eqn)):
        return degrees[0] if _are_constant(operands[1:]) else Degree.UNKNOWN
    if name in _BILINEAR:
        moving = [d for d in degrees if d is not Degree.CONSTANT]
        return moving[0] if len(moving) == 1 else Degree.UNKNOWN
    return Degree.UNKNOWN


def _sum(values: list[Known]) -> Degree:
    degrees = {v.degree for v in values if not v.is_zero}
    if Degree.UNKNOWN in degrees:
        return Degree.UNKNOWN
    if len(degrees) <= 1:
        return next(iter(degrees), Degree.CONSTANT)
    return Degree.AFFINE


def _are_constant(values: list[Known]) -> bool:
    return all(v.degree is Degree.CONSTANT for v in values)


def _fills_with_nothing(eqn) -> bool:
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
    return all(jnp.finfo(dtype).eps <= min(given) for dtype in kinds)
