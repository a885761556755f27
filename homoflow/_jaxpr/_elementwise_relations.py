"""What one array is of another, entry by entry, read off the equation that makes it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import _piecewise_linear as _piecewise
from ._piecewise_linear import Piecewise, linear
from ._traced_value import TracedValue, make_pending

#: Whether a comparison says that its first operand is the larger one.
_COMPARISONS = {"gt": True, "ge": True, "lt": False, "le": False}


def record_relations(eqn, operands: list[TracedValue], result: TracedValue) -> None:
    """Note on a result what it is of the operands."""
    name = eqn.primitive.name
    if name in _COMPARISONS:
        a, b = operands
        result.comparison = (a, b) if _COMPARISONS[name] else (b, a)
        return
    related = _as_function_of_operand(name, operands, result)
    if related is not None and related[0].depends and related[0].shape == result.shape:
        result.parent = related
    elif name == "mul":
        a, b = operands
        result.factors = a, b


def _as_function_of_operand(
    name: str, operands: list[TracedValue], result: TracedValue
) -> tuple[TracedValue, Piecewise] | None:
    match name, operands:
        case "neg", [a]:
            return a, linear(-1.0)
        case (("convert_element_type" | "copy"), [a]):
            return (a, linear(1.0)) if a.array.dtype == result.array.dtype else None
        case "mul", [a, b] if not b.depends:
            return a, linear(_number_or_array(b))
        case "mul", [a, b] if not a.depends:
            return b, linear(_number_or_array(a))
        case "div", [a, b] if not b.depends and b.abstract.constant != 0:
            return a, linear(1 / _number_or_array(b))
        case (("add" | "sub"), [a, b]) if not b.depends:
            shift = _number_or_array(b)
            return a, linear(1.0, shift if name == "add" else -shift)
        case (("add" | "sub"), [a, b]) if not a.depends:
            return b, linear(1.0 if name == "add" else -1.0, _number_or_array(a))
    return None


def max_of_functions(
    a: TracedValue, b: TracedValue, *, is_max: bool
) -> TracedValue | None:
    """The larger (or smaller) of two values that are functions of one, or `None`."""
    for bound, other in ((a, b), (b, a)):
        if bound.abstract.constant == (-np.inf if is_max else np.inf):
            return other
    for base in _common_bases(a, b):
        p, q = a.as_function_of(base), b.as_function_of(base)
        if p is not None and q is not None:
            both = _piecewise.extremum(p, q, is_max=is_max)
            if both is not None:
                return make_pending(base, both)
    return None


def select_of_functions(operands: list[TracedValue]) -> TracedValue | None:
    """A choice between two functions of a value by that value, or `None`."""
    for base, threshold, below, above in _candidate_choices(operands):
        if _piecewise.jumps_at(threshold, below, above) is False:
            return make_pending(base, _piecewise.join_at(threshold, below, above))
    return None


def has_jump(operands: list[TracedValue]) -> bool:
    """Whether a choice is known to have a jump."""
    return any(
        _piecewise.jumps_at(threshold, below, above)
        for _, threshold, below, above in _candidate_choices(operands)
    )


def select_of_multiples(
    operands: list[TracedValue],
) -> tuple[TracedValue, Any, Any] | None:
    """(z, c, d) of a choice by the sign of z: c·z where z < 0, d·z where z > 0.

    c and d may depend on weights.
    """
    if len(operands) != 3 or operands[0].comparison is None:
        return None
    predicate, if_false, if_true = operands
    for base in _common_bases(*operands[0].comparison):
        where = _threshold(predicate, base)
        factors = if_false.factor_over(base), if_true.factor_over(base)
        if where is not None and where[0] == 0 and all(f is not None for f in factors):
            low, high = factors if where[1] else factors[::-1]
            return base, low, high
    return None


def _candidate_choices(
    operands: list[TracedValue],
) -> Iterator[tuple[TracedValue, float, Piecewise, Piecewise]]:
    """Each base with the threshold of a choice and the functions below and above."""
    if len(operands) != 3 or operands[0].comparison is None:
        return
    predicate, if_false, if_true = operands
    for base in _common_bases(*operands[0].comparison):
        where = _threshold(predicate, base)
        p, q = if_false.as_function_of(base), if_true.as_function_of(base)
        if where is not None and p is not None and q is not None:
            threshold, true_is_above = where
            yield (base, threshold, *((p, q) if true_is_above else (q, p)))


def _common_bases(*values: TracedValue) -> list[TracedValue]:
    """Values that all of these could be functions of."""
    found = (a for v in values if v.depends for a in v.ancestors())
    return list(dict.fromkeys(found))


def _threshold(predicate: TracedValue, base: TracedValue) -> tuple[float, bool] | None:
    """Where along `base` a comparison changes, and whether it is true above."""
    assert predicate.comparison is not None
    sides = [v.as_function_of(base) for v in predicate.comparison]
    lines = [p.lines[0] for p in sides if p is not None and p.is_linear and p.is_known]
    if len(lines) != 2 or lines[0].slope == lines[1].slope:
        return None
    larger, smaller = lines
    slope = larger.slope - smaller.slope
    threshold = (smaller.intercept - larger.intercept) / slope
    return (threshold, slope > 0) if np.isfinite(threshold) else None


def _number_or_array(v: TracedValue) -> Any:
    return v.array if v.abstract.constant is None else v.abstract.constant
