"""What is known about an array without computing it: constant, never negative."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._jax._tracing import is_concrete
from ._primitives import KEEPS_ORDER, MOVES_ENTRIES

#: Operations that hand a constant on.
_KEEPS_CONSTANT = KEEPS_ORDER | {"convert_element_type"}
#: Operations whose results are never negative.
_NEVER_NEGATIVE = frozenset({"abs", "exp", "exp2", "logistic", "square", "sqrt"})
#: Operations that make nothing negative of what is not.
_KEEPS_SIGN = MOVES_ENTRIES | {
    "add",
    "add_any",
    "concatenate",
    "convert_element_type",
    "div",
    "gather",
    "min",
    "mul",
    "reduce_max",
    "reduce_min",
    "reduce_sum",
    "reduce_window_sum",
    "slice",
}


class AbstractValue(NamedTuple):
    """What holds for all entries of an array.

    - `constant`: the only entry, if that is known.
    - `nonnegative`: no entry is below 0 (one may be NaN).
    - `touches_zero`: entries are z² or |z| of something that may change its sign, times a
        factor: a root of it has a kink.
    """

    constant: float | None = None
    nonnegative: bool = False
    touches_zero: bool = False


UNKNOWN = AbstractValue()


def abstract_constant(number: Any) -> AbstractValue:
    """That of a literal or of a constant of a jaxpr."""
    if not is_concrete(number) or not hasattr(number, "dtype"):
        number = number if np.isscalar(number) else None
    array = None if number is None else np.asarray(number)
    if array is None or array.size == 0 or array.dtype.kind not in "bfiu":
        return UNKNOWN
    first = float(array.flat[0])
    is_constant = bool(np.all(array == first)) or bool(np.all(np.isnan(array)))
    return AbstractValue(first if is_constant else None, not bool(np.any(array < 0)))


def abstract_result(eqn, operands: list[AbstractValue]) -> AbstractValue:
    """That of the first result of an equation."""
    name = eqn.primitive.name
    constant = _constant(name, [v.constant for v in operands])
    if constant is not None and _can_hold(eqn.outvars[0].aval.dtype, constant):
        return AbstractValue(constant, constant >= 0)
    return AbstractValue(
        None,
        _is_nonnegative(eqn, name, operands),
        _touches_zero(eqn, name, operands),
    )


def _constant(name: str, numbers: list[float | None]) -> float | None:
    match name, numbers:
        case _, [number, *_] if name in _KEEPS_CONSTANT:
            return number
        case "neg", [float(a)]:
            return -a
        case "add", [float(a), float(b)]:
            return a + b
        case "sub", [float(a), float(b)]:
            return a - b
    return None


def _is_nonnegative(eqn, name: str, operands: list[AbstractValue]) -> bool:
    signs = [v.nonnegative for v in operands]
    match name:
        case "max":
            return any(signs)
        case "select_n":
            cases = operands[1:]
            return all(v.nonnegative or _is_nan(v) for v in cases)
        case "integer_pow":
            return eqn.params["y"] % 2 == 0 or signs[0]
        case "mul":
            return eqn.invars[0] is eqn.invars[1] or all(signs)
        case _ if name in _NEVER_NEGATIVE:
            return True
        case _:
            return name in _KEEPS_SIGN and bool(signs) and all(signs)


def _touches_zero(eqn, name: str, operands: list[AbstractValue]) -> bool:
    match name:
        case "square" | "abs":
            return True
        case "integer_pow":
            return eqn.params["y"] > 0 and eqn.params["y"] % 2 == 0
        case "mul" if eqn.invars[0] is eqn.invars[1]:
            return True
        case "mul" | "div":
            return any(v.touches_zero for v in operands[: 1 if name == "div" else 2])
        case "reduce_sum":
            # A sum of several squares vanishes where all of them do, which is rare.
            (before,) = eqn.invars
            is_single = before.aval.size == eqn.outvars[0].aval.size
            return is_single and operands[0].touches_zero
        case "dot_general":
            return _is_square_of_number(eqn)
        case _ if name in MOVES_ENTRIES or name == "convert_element_type":
            return operands[0].touches_zero
        case _:
            return False


def _is_square_of_number(eqn) -> bool:
    """Whether it is z·z of vectors of one entry."""
    left, right = eqn.invars
    return left is right and left.aval.size == 1


def has_constant_sign(eqn, operands: list[AbstractValue]) -> bool:
    """Whether an equation takes the sign of what has the same everywhere."""
    return eqn.primitive.name == "sign" and operands[0].nonnegative


def has_root_kink(eqn, operands: list[AbstractValue]) -> bool:
    """Whether an equation takes a root of what is a square: √(z²) is |z|."""
    if not operands or not operands[0].touches_zero:
        return False
    match eqn.primitive.name:
        case "sqrt" | "cbrt" | "rsqrt":
            return True
        case "pow":
            exponent = operands[1].constant
            return exponent is None or exponent <= 1 / 2
        case _:
            return False


def _can_hold(dtype, constant: float) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact) or constant.is_integer()


def _is_nan(value: AbstractValue) -> bool:
    return value.constant is not None and math.isnan(value.constant)


def find_redundant_max(eqn, operands: list[AbstractValue]) -> int | None:
    """Which operand max(a, b) always equals, if one is never negative and the other ≤ 0.

    Code for variances guards against rounding below 0 in this way.
    """
    if eqn.primitive.name == "max":
        for i, other in ((0, 1), (1, 0)):
            bound = operands[other].constant
            if operands[i].nonnegative and bound is not None and bound <= 0:
                return i
    return None
