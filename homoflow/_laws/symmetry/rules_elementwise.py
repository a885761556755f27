"""What operations on single entries do to log-scales."""

import math
from fractions import Fraction

import numpy as np

from ._interpreter import Rule, Walk
from ._log_scale import FIXED, Scale, moved, scaled, tidy
from ._tracked_array import Tracked, is_inexact

#: A constant up to which x + ε is nearly x.
_SMALL = 1e-2

#: f(cx) = c f(x) for c > 0.
_DEGREE_ONE = (
    "neg", "abs", "copy", "copy_p", "real", "reduce_precision", "device_put",
    "optimization_barrier", "sharding_constraint", "mul_by_one",
)  # fmt: skip
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


def out_shape(eqn) -> tuple[int, ...]:
    """The shape of an operation's only result."""
    return tuple(eqn.outvars[0].aval.shape)


def agreed(walk: Walk, values: list[Tracked], shape: tuple[int, ...]) -> Tracked:
    """Demand that values scale alike; what they have in common."""
    if (large := _not_small(values)) is not None:
        walk.met_small_constants = True
        values = large if walk.ignores_small_constants else values
    tame = [v for v in values if not v.is_wild]
    if not tame:
        return Tracked(shape, is_wild=bool(values))
    first = next((v for v in tame if not v.undecided()), tame[0])
    scale = walk.scale(first)
    for value in tame:
        if value is first:
            continue
        if value.undecided():
            _adopt(walk, value, scale, shape)
        else:
            other = walk.scale(value)
            walk.equations.equal(scale, other, shape)
            scale = min(scale, other, key=_complexity)
    return Tracked(shape, scale)


def product(walk: Walk, values: list[Tracked], signs: list[int], shape) -> Tracked:
    """The product (or quotient) of values."""
    if values[0].is_wild or any(
        v.is_wild and s > 0 for v, s in zip(values, signs, strict=True)
    ):
        return Tracked(shape, is_wild=True)
    scales = [
        scaled(walk.scale(v), s)
        for v, s in zip(values, signs, strict=True)
        if not v.is_wild
    ]
    return Tracked(shape, tidy(p for s in scales for p in s))


def _keep(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [Tracked(v.shape, v.scale, v.fresh, v.is_wild) for v in incoming]


def _cast(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    (value,) = incoming
    if not is_inexact(eqn.outvars[0].aval.dtype):
        walk.fix(value)
        return [Tracked(value.shape)]
    return [Tracked(value.shape, value.scale, value.fresh, value.is_wild)]


def _degree_zero(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [Tracked(out_shape(eqn))]


def _detached(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    # Nothing is differentiated through it: to a gradient it is a constant.
    return [Tracked(incoming[0].shape, FIXED, is_wild=incoming[0].is_wild)]


def _sum(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [agreed(walk, incoming, out_shape(eqn))]


def _comparison(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    agreed(walk, incoming, out_shape(eqn))
    return [Tracked(out_shape(eqn))]


def _mul(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [product(walk, incoming, [1, 1], out_shape(eqn))]


def _div(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [product(walk, incoming, [1, -1], out_shape(eqn))]


def _power(walk: Walk, value: Tracked, exponent: Fraction) -> Tracked:
    wild = value.is_wild and exponent > 0
    return Tracked(value.shape, scaled(walk.scale(value), exponent), is_wild=wild)


def _fixed_power(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [_power(walk, incoming[0], _POWERS[eqn.primitive.name])]


def _integer_pow(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [_power(walk, incoming[0], Fraction(eqn.params["y"]))]


def _pow(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    base, exponent = incoming
    value = exponent.value()
    if value is None or value.size != 1:
        for v in incoming:
            walk.fix(v)
        return [Tracked(out_shape(eqn))]
    result = _power(walk, base, _rational(float(value.ravel()[0])))
    return [Tracked(out_shape(eqn), result.scale, is_wild=result.is_wild)]


def _select(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    walk.fix(incoming[0])
    return [agreed(walk, incoming[1:], out_shape(eqn))]


def _clamp(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    return [agreed(walk, incoming, out_shape(eqn))]


def _adopt(walk: Walk, value: Tracked, scale: Scale, shape) -> None:
    """Give an untouched parameter, such as a bias, the scale of what it is added to."""
    assert value.fresh is not None
    leaf, places = value.fresh
    absent = [a for a in range(len(shape)) if a not in places]
    narrow = walk.equations.independent(scale, absent, shape)
    back = {place: axis for axis, place in enumerate(places) if place is not None}
    leaf.scale = tidy(moved(narrow, [back.get(a) for a in range(len(shape))]))


def _not_small(values: list[Tracked]) -> list[Tracked] | None:
    """The values without small constants such as ε, if there are any and others too."""
    small = [_is_small(v) for v in values]
    if not any(small) or all(small):
        return None
    large = [v for v, s in zip(values, small, strict=True) if not s]
    return large if any(v.undecided() or v.scale for v in large) else None


def _is_small(value: Tracked) -> bool:
    if value.known is None or value.is_wild or math.prod(value.shape) > 1:
        return False
    array = value.value()
    return array is not None and bool(np.all((array > 0) & (array <= _SMALL)))


def _rational(x: float) -> Fraction:
    near = Fraction(x).limit_denominator(64)
    return near if abs(float(near) - x) < 1e-6 * max(1, abs(x)) else Fraction(x)


def _complexity(scale: Scale) -> int:
    return sum(p.ids.size for p in scale)


ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(_DEGREE_ONE, _keep),
    **dict.fromkeys(_DEGREE_ZERO, _degree_zero),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_COMPARISONS, _comparison),
    **dict.fromkeys(_POWERS, _fixed_power),
    "convert_element_type": _cast,
    "stop_gradient": _detached,
    "mul": _mul,
    "div": _div,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "select_n": _select,
    "clamp": _clamp,
}
