"""What loops and branches do to log-scales."""

import dataclasses

import numpy as np
from jax.tree_util import SequenceKey

from ..._jaxpr import scan_counts
from ._interpreter import Arrays, Rule, ScalingInterpreter
from ._log_scale import ZERO, Component, LogScale, index_axis, simplify
from ._tracked_array import Leaf, TrackedArray, make_scale_by_axis, track_parameter
from .rules_elementwise import require_same_scale

#: The most operations that a loop is written out to.
_MAX_OPERATIONS = 3000


def _scan(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    p = eqn.params
    closed, length = p["jaxpr"], p["length"]
    n_consts, n_carry = scan_counts(eqn)
    consts = operands[:n_consts]
    carry = operands[n_consts : n_consts + n_carry]
    xs = operands[n_consts + n_carry :]
    if length * len(closed.jaxpr.eqns) <= _MAX_OPERATIONS:
        steps = range(length)[::-1] if p["reverse"] else range(length)
        carry, ys = _unroll(interpreter, closed, steps, consts, carry, xs)
    else:
        carry, ys = _scan_at_fixed_point(interpreter, closed, consts, carry, xs)
    shapes = [tuple(v.aval.shape) for v in eqn.outvars[n_carry:]]
    return [*carry, *(TrackedArray(s, y) for s, y in zip(shapes, ys, strict=True))]


def _unroll(interpreter: ScalingInterpreter, closed, steps: range, consts, carry, xs):
    """A short loop, its body interpreted once for each step."""
    length = len(steps)
    columns = [_split_steps(interpreter, x, length) for x in xs]
    outputs: dict[int, Arrays] = {}
    for t in steps:
        results = interpreter.run(closed, [*consts, *carry, *(c[t] for c in columns)])
        carry = results[: len(carry)]
        outputs[t] = results[len(carry) :]
    count = len(closed.jaxpr.outvars) - len(carry)
    stacks = ([outputs[t][i] for t in range(length)] for i in range(count))
    return carry, [_stack(interpreter, values) for values in stacks]


def _scan_at_fixed_point(interpreter: ScalingInterpreter, closed, consts, carry, xs):
    """A loop whose carried arrays scale at every step as they do at the first."""
    entering = [_make_invariant(interpreter, v) for v in carry]
    slices = []
    for x in xs:
        scale = _drop_first_axis(interpreter.scale_constant_along(x, [0]))
        slices.append(TrackedArray(x.shape[1:], scale, has_any_scale=x.has_any_scale))
    results = interpreter.run(closed, [*consts, *entering, *slices])
    leaving = results[: len(carry)]
    for before, after in zip(entering, leaving, strict=True):
        require_same_scale(interpreter, [before, after], before.shape)
    outputs = [interpreter.scale(y) for y in results[len(carry) :]]
    return entering, [_add_first_axis(scale) for scale in outputs]


def _while(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    p = eqn.params
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    tested, consts = operands[:n_test], operands[n_test : n_test + n_body]
    entering = [_make_invariant(interpreter, v) for v in operands[n_test + n_body :]]
    (more,) = interpreter.run(p["cond_jaxpr"], [*tested, *entering])
    interpreter.fix(more)
    leaving = interpreter.run(p["body_jaxpr"], [*consts, *entering])
    for before, after in zip(entering, leaving, strict=True):
        require_same_scale(interpreter, [before, after], before.shape)
    return entering


def _cond(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    index, *arguments = operands
    interpreter.fix(index)
    branches = [interpreter.run(b, arguments) for b in eqn.params["branches"]]
    shapes = [tuple(v.aval.shape) for v in eqn.outvars]
    return [
        require_same_scale(interpreter, list(values), shape)
        for values, shape in zip(zip(*branches, strict=True), shapes, strict=True)
    ]


def _make_invariant(
    interpreter: ScalingInterpreter, value: TrackedArray
) -> TrackedArray:
    """A carried array, whose scale has to be the same at every step.

    An array of zeros at the start gets a scale of its own, as later values have one.
    """
    if not value.has_any_scale:
        return TrackedArray(value.shape, interpreter.scale(value))
    scale = make_scale_by_axis(value.shape, interpreter.equations)
    return TrackedArray(value.shape, scale)


def _split_steps(
    interpreter: ScalingInterpreter, value: TrackedArray, length: int
) -> Arrays:
    shape = value.shape[1:]
    if value.is_undetermined:
        assert value.untouched_leaf is not None
        leaf, places = value.untouched_leaf
        if places == tuple(a if n > 1 else None for a, n in enumerate(leaf.shape)):
            return _split_leaf(leaf, length)
    scale = interpreter.scale(value)
    slices = [_drop_first_axis(index_axis(scale, 0, t)) for t in range(length)]
    return [TrackedArray(shape, s, has_any_scale=value.has_any_scale) for s in slices]


def _split_leaf(leaf: Leaf, length: int) -> Arrays:
    """Layers stacked along the first axis of an array are parameters of their own."""
    if leaf.slices is None:
        leaf.slices = [
            Leaf((*leaf.path, SequenceKey(t)), leaf.shape[1:]) for t in range(length)
        ]
    return [track_parameter(s) for s in leaf.slices]


def _stack(interpreter: ScalingInterpreter, values: Arrays) -> LogScale:
    """The scale of arrays along a new first axis."""
    scales = [interpreter.scale(v) for v in values]
    components = []
    for t, scale in enumerate(scales):
        for component in scale:
            ids = np.zeros((len(values), *component.ids.shape), np.int64)
            ids[t] = component.ids
            axes = (0, *(a + 1 for a in component.axes))
            components.append(Component(component.factor, axes, ids))
    return simplify(_merge_disjoint(components))


def _merge_disjoint(components: list[Component]) -> list[Component]:
    """Components that vary along the same axes and never at the same index, as one."""
    result: list[Component] = []
    for component in components:
        for i, other in enumerate(result):
            alike = (other.factor, other.axes) == (component.factor, component.axes)
            if alike and not ((other.ids != ZERO) & (component.ids != ZERO)).any():
                ids = other.ids + component.ids
                result[i] = dataclasses.replace(component, ids=ids)
                break
        else:
            result.append(component)
    return result


def _drop_first_axis(scale: LogScale) -> LogScale:
    return tuple(
        dataclasses.replace(c, axes=tuple(a - 1 for a in c.axes)) for c in scale
    )


def _add_first_axis(scale: LogScale) -> LogScale:
    return tuple(
        dataclasses.replace(c, axes=tuple(a + 1 for a in c.axes)) for c in scale
    )


CONTROL_FLOW_RULES: dict[str, Rule] = {"scan": _scan, "while": _while, "cond": _cond}
