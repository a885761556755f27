"""What operations on single entries do to log-scales."""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from ._interpreter import Arrays, Rule, ScalingInterpreter
from ._log_scale import FIXED, LogScale, multiply, permute_axes, simplify
from ._tracked_array import TrackedArray, is_inexact

#: A constant up to which x + ε is nearly x.
_MAX_EPSILON = 1e-2

#: f(cx) = c f(x) for c > 0.
_DEGREE_ONE = (
    "neg",
    "abs",
    "copy",
    "copy_p",
    "real",
    "reduce_precision",
    "device_put",
    "optimization_barrier",
    "sharding_constraint",
    "mul_by_one",
)
#: f(cx) = f(x) for c > 0.
_DEGREE_ZERO = ("sign", "is_finite")
_POWERS = {
    "square": Fraction(2),
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "cbrt": Fraction(1, 3),
}
_SUMS = ("add", "sub", "max", "min", "add_any", "nextafter")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "atan2")


def output_shape(eqn) -> tuple[int, ...]:
    """The shape of an operation's only result."""
    return tuple(eqn.outvars[0].aval.shape)


def require_same_scale(
    interpreter: ScalingInterpreter, values: Arrays, shape: tuple[int, ...]
) -> TrackedArray:
    """Demand that values scale alike; returns an array with their common scale."""
    if (large := _drop_small_constants(values)) is not None:
        interpreter.met_small_constants = True
        values = large if interpreter.ignores_small_constants else values
    scaled = [v for v in values if not v.has_any_scale]
    if not scaled:
        return TrackedArray(shape, has_any_scale=bool(values))
    reference = next((v for v in scaled if not v.is_undetermined), scaled[0])
    scale = interpreter.scale(reference)
    for value in scaled:
        if value is reference:
            continue
        if value.is_undetermined:
            _adopt(interpreter, value, scale, shape)
        else:
            other = interpreter.scale(value)
            interpreter.equations.require_equal(scale, other, shape)
            scale = min(scale, other, key=_num_unknowns)
    return TrackedArray(shape, scale)


def scale_of_product(
    interpreter: ScalingInterpreter, values: Arrays, signs: list[int], shape
) -> TrackedArray:
    """The product (or quotient) of values."""
    if values[0].has_any_scale or any(
        v.has_any_scale and s > 0 for v, s in zip(values, signs, strict=True)
    ):
        return TrackedArray(shape, has_any_scale=True)
    scales = [
        multiply(interpreter.scale(v), s)
        for v, s in zip(values, signs, strict=True)
        if not v.has_any_scale
    ]
    return TrackedArray(shape, simplify(p for s in scales for p in s))


def _keep(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [_copy(v) for v in operands]


def _copy(value: TrackedArray) -> TrackedArray:
    """The same array without its value, of which a result has its own."""
    return dataclasses.replace(value, constant=None)


def _cast(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    (value,) = operands
    if not is_inexact(eqn.outvars[0].aval.dtype):
        interpreter.fix(value)
        return [TrackedArray(value.shape)]
    return [_copy(value)]


def _degree_zero(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [TrackedArray(output_shape(eqn))]


def _stop_gradient(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    # Nothing is differentiated through it: to a gradient it is a constant.
    (value,) = operands
    return [TrackedArray(value.shape, FIXED, has_any_scale=value.has_any_scale)]


def _sum(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [require_same_scale(interpreter, operands, output_shape(eqn))]


def _comparison(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    require_same_scale(interpreter, operands, output_shape(eqn))
    return [TrackedArray(output_shape(eqn))]


def _mul(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [scale_of_product(interpreter, operands, [1, 1], output_shape(eqn))]


def _div(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [scale_of_product(interpreter, operands, [1, -1], output_shape(eqn))]


def _power(
    interpreter: ScalingInterpreter, value: TrackedArray, exponent: Fraction
) -> TrackedArray:
    scale = multiply(interpreter.scale(value), exponent)
    has_any_scale = value.has_any_scale and exponent > 0
    return TrackedArray(value.shape, scale, has_any_scale=has_any_scale)


def _fixed_power(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [_power(interpreter, operands[0], _POWERS[eqn.primitive.name])]


def _integer_pow(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [_power(interpreter, operands[0], Fraction(eqn.params["y"]))]


def _pow(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    base, exponent = operands
    value = exponent.value()
    if value is None or value.size != 1:
        for v in operands:
            interpreter.fix(v)
        return [TrackedArray(output_shape(eqn))]
    result = _power(interpreter, base, _to_rational(float(value.ravel()[0])))
    return [dataclasses.replace(result, shape=output_shape(eqn))]


def _select(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    interpreter.fix(operands[0])
    return [require_same_scale(interpreter, operands[1:], output_shape(eqn))]


def _clamp(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    return [require_same_scale(interpreter, operands, output_shape(eqn))]


def _adopt(
    interpreter: ScalingInterpreter, value: TrackedArray, scale: LogScale, shape
) -> None:
    """Give an untouched parameter, such as a bias, the scale of what it is added to."""
    assert value.untouched_leaf is not None
    leaf, places = value.untouched_leaf
    absent = [a for a in range(len(shape)) if a not in places]
    narrow = interpreter.equations.require_constant_along(scale, absent, shape)
    back = {place: axis for axis, place in enumerate(places) if place is not None}
    leaf.scale = simplify(
        permute_axes(narrow, [back.get(a) for a in range(len(shape))])
    )


def _drop_small_constants(values: Arrays) -> Arrays | None:
    """The values without small constants such as ε, if there are any and others too."""
    small = [_is_small(v) for v in values]
    if not any(small) or all(small):
        return None
    large = [v for v, s in zip(values, small, strict=True) if not s]
    return large if any(v.is_undetermined or v.scale for v in large) else None


def _is_small(value: TrackedArray) -> bool:
    if value.constant is None or value.has_any_scale or math.prod(value.shape) > 1:
        return False
    array = value.value()
    return array is not None and bool(np.all((array > 0) & (array <= _MAX_EPSILON)))


def _to_rational(x: float) -> Fraction:
    near = Fraction(x).limit_denominator(64)
    return near if abs(float(near) - x) < 1e-6 * max(1, abs(x)) else Fraction(x)


def _num_unknowns(scale: LogScale) -> int:
    return sum(c.ids.size for c in scale)


ELEMENTWISE_RULES: dict[str, Rule] = {
    **dict.fromkeys(_DEGREE_ONE, _keep),
    **dict.fromkeys(_DEGREE_ZERO, _degree_zero),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_COMPARISONS, _comparison),
    **dict.fromkeys(_POWERS, _fixed_power),
    "convert_element_type": _cast,
    "stop_gradient": _stop_gradient,
    "mul": _mul,
    "div": _div,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "select_n": _select,
    "clamp": _clamp,
}
