"""How operations with kinks are written as sums of slope·z + offset.

A rule returns the result of an equation, or `None` if it does not understand it.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ._elementwise_relations import (
    max_of_functions,
    select_of_functions,
    select_of_multiples,
)
from ._interpreter import function_name, is_of_jax_nn
from ._kink_tape import KinkTape, Operation, power_of_two
from ._max_reductions import find_max_groups, have_common_pairs
from ._piecewise_linear import ABSOLUTE_VALUE, RELU, absolute_value
from ._primitives import MAX_REDUCTIONS
from ._traced_value import TracedValue, make_pending

#: The tape, the equation, its operands, and the name of the operation for people.
Rule = Callable[[KinkTape, Any, list[TracedValue], str], TracedValue | None]


def apply_kink_rule(
    tape: KinkTape, eqn, operands: list[TracedValue], name: str
) -> TracedValue | None:
    """The result of an equation with kinks, or `None` if it is not understood."""
    if is_elu(eqn):
        rule = _elu
    elif (rule := KINK_RULES.get(eqn.primitive.name)) is None:
        return None
    result = rule(tape, eqn, operands, name)
    if result is not None:
        result.name = name
    return result


def is_elu(eqn) -> bool:
    return function_name(eqn) == "elu" and is_of_jax_nn(eqn)


def _abs(tape: KinkTape, eqn, operands: list[TracedValue], name: str) -> TracedValue:
    (z,) = operands
    if z.is_pending:
        base, p = z.origin
        absolute = absolute_value(p)
        if absolute is not None:
            return make_pending(base, absolute)
    return make_pending(tape.evaluate(z, name), ABSOLUTE_VALUE)


def _elu(tape: KinkTape, eqn, operands: list[TracedValue], name: str) -> TracedValue:
    z, alpha = (tape.evaluate(v, name) for v in operands)
    above = tape.evaluate(make_pending(z, RELU), name).array
    below = z.array - above
    array = above + jnp.asarray(alpha.array, below.dtype) * jnp.expm1(below)
    return TracedValue(array, True, z.depth + 1)


def _max_or_min(
    tape: KinkTape, eqn, operands: list[TracedValue], name: str
) -> TracedValue:
    a, b = operands
    return _larger(tape, a, b, name, is_max=eqn.primitive.name == "max")


def _clamp(tape: KinkTape, eqn, operands: list[TracedValue], name: str) -> TracedValue:
    low, z, high = operands
    bounded_below = _larger(tape, z, low, name, is_max=True)
    return _larger(tape, bounded_below, high, name, is_max=False)


def _select(
    tape: KinkTape, eqn, operands: list[TracedValue], name: str
) -> TracedValue | None:
    predicate, *cases = operands
    if len(cases) == 2 and predicate.comparison is not None:
        if_false, if_true = cases
        first, second = predicate.comparison
        if first is if_true and second is if_false:
            return _larger(tape, if_true, if_false, name, is_max=True)
        if first is if_false and second is if_true:
            return _larger(tape, if_true, if_false, name, is_max=False)
    result = select_of_functions(operands)
    if result is not None:
        return result
    multiples = select_of_multiples(operands)
    if multiples is None:
        return None
    z, low, high = multiples
    above = tape.evaluate(make_pending(z, RELU), name).array
    depth = max(z.depth + 1, *(v.depth for v in cases))
    return TracedValue(low * (z.array - above) + high * above, True, depth)


def _reduce_max_or_min(
    tape: KinkTape, eqn, operands: list[TracedValue], name: str
) -> TracedValue:
    is_max = eqn.primitive.name.endswith("max")
    return _reduce(tape, eqn, operands[0], name, is_max=is_max)


def _reduce(
    tape: KinkTape, eqn, value: TracedValue, name: str, *, is_max: bool
) -> TracedValue:
    """The largest (or smallest) of many, as a tournament of pairs."""
    if value.is_pending:
        base, p = value.origin
        # An increasing function may as well be applied to the largest entry, where it
        # has fewer kinks: relu after max-pooling instead of before.
        if p.is_known and p.is_increasing:
            return make_pending(_reduce(tape, eqn, base, name, is_max=is_max), p)
    value = tape.evaluate(value, name)
    flat, out = value.array.ravel(), eqn.outvars[0].aval
    groups = find_max_groups(eqn)
    if have_common_pairs(groups):
        overlapping = f"{eqn.primitive.name} with overlapping windows"
        tape.unsupported.add(overlapping)
    largest = [
        _max_by_pairs(tape, flat, value.depth, g.entries, name, is_max=is_max)
        for g in groups
    ]
    order = np.argsort(np.concatenate([g.results for g in groups]))
    array = jnp.concatenate([v.array for v in largest])[order].reshape(out.shape)
    return TracedValue(array, True, max(v.depth for v in largest))


def _max_by_pairs(
    tape: KinkTape,
    flat: Array,
    depth: int,
    entries: Int[np.ndarray, "entries results"],
    name: str,
    *,
    is_max: bool,
) -> TracedValue:
    """The largest (or smallest) of the entries in each column."""
    candidates = [TracedValue(flat[row], True, depth) for row in entries]
    if not candidates:
        worst = -jnp.inf if is_max else jnp.inf
        return TracedValue(jnp.full(entries.shape[1], worst, flat.dtype))
    while len(candidates) > 1:
        pairs = zip(candidates[::2], candidates[1::2], strict=False)
        unpaired = candidates[len(candidates) // 2 * 2 :]
        candidates = [_kink_between(tape, a, b, name, is_max=is_max) for a, b in pairs]
        candidates += unpaired
    return candidates[0]


def _larger(
    tape: KinkTape, a: TracedValue, b: TracedValue, name: str, *, is_max: bool
) -> TracedValue:
    """The larger (or smaller) of two values."""
    result = max_of_functions(a, b, is_max=is_max)
    if result is not None:
        return result
    if a.is_pending and b.is_pending:
        (first, p), (second, q) = a.origin, b.origin
        if p.is_known and q.is_known and p.is_increasing and p == q:
            larger = _larger(tape, first, second, name, is_max=is_max)
            return make_pending(tape.evaluate(larger, name), p)
    a, b = tape.evaluate(a, name), tape.evaluate(b, name)
    return _kink_between(tape, a, b, name, is_max=is_max)


def _kink_between(
    tape: KinkTape, a: TracedValue, b: TracedValue, name: str, *, is_max: bool
) -> TracedValue:
    """max(a, b) or min(a, b) as a kink at a = b."""
    first, second = a.array, b.array
    difference = first - second
    # An infinite bound is never met. A large one is brought to the scale of others.
    bounds = [v.array for v in (a, b) if not v.depends]
    far = ~jnp.isfinite(difference)
    size = power_of_two(bounds[0]).astype(difference.dtype) if bounds else 1.0
    z = jnp.where(far, jnp.where(first < second, -1.0, 1.0), difference / size)
    slopes = (0.0, 1.0) if is_max else (1.0, 0.0)
    depth = max(a.depth, b.depth) + 1
    low, high = (s * size for s in slopes)
    slope, offset = tape.add_kink(z, low, high, depth, Operation(name, z.shape))
    slope = slope / size
    near = slope * first + (1 - slope) * second + offset
    exact = (jnp.maximum if is_max else jnp.minimum)(first, second)
    return TracedValue(jnp.where(far, exact, near), True, depth)


KINK_RULES: dict[str, Rule] = {
    "abs": _abs,
    "max": _max_or_min,
    "min": _max_or_min,
    "clamp": _clamp,
    "select_n": _select,
    **dict.fromkeys(MAX_REDUCTIONS, _reduce_max_or_min),
}
