"""What loops and branches do to log-scales."""

import numpy as np
from jax.tree_util import SequenceKey

from ._interpreter import Rule, Walk
from ._log_scale import Part, Scale, taken, tidy
from ._tracked_array import Leaf, Tracked, along_each_axis, parameter
from .rules_elementwise import agreed

#: The most operations that a loop is written out to.
_MOST_OPERATIONS = 3000


def _scan(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    p = eqn.params
    closed, length = p["jaxpr"], p["length"]
    n_consts, n_carry = p["num_consts"], p["num_carry"]
    consts = incoming[:n_consts]
    carry = incoming[n_consts : n_consts + n_carry]
    xs = incoming[n_consts + n_carry :]
    if length * len(closed.jaxpr.eqns) <= _MOST_OPERATIONS:
        carry, ys = _written_out(walk, closed, length, p["reverse"], consts, carry, xs)
    else:
        carry, ys = _steady(walk, closed, consts, carry, xs)
    shapes = [tuple(v.aval.shape) for v in eqn.outvars[n_carry:]]
    return [*carry, *(Tracked(s, y) for s, y in zip(shapes, ys, strict=True))]


def _written_out(walk: Walk, closed, length: int, reverse: bool, consts, carry, xs):
    columns = [_slices(walk, x, length) for x in xs]
    steps = range(length)[::-1] if reverse else range(length)
    outputs: dict[int, list[Tracked]] = {}
    for t in steps:
        results = walk.run(closed, [*consts, *carry, *(c[t] for c in columns)])
        carry = results[: len(carry)]
        outputs[t] = results[len(carry) :]
    count = len(closed.jaxpr.outvars) - len(carry)
    ys = [_stacked(walk, [outputs[t][i] for t in range(length)]) for i in range(count)]
    return carry, ys


def _steady(walk: Walk, closed, consts, carry, xs):
    """A loop whose carried arrays scale at every step as they do at the first."""
    entering = [_steady_state(walk, v) for v in carry]
    each = []
    for x in xs:
        scale = walk.equations.independent(walk.scale(x), [0], x.shape)
        each.append(Tracked(x.shape[1:], _earlier(scale), is_wild=x.is_wild))
    results = walk.run(closed, [*consts, *entering, *each])
    leaving = results[: len(carry)]
    for before, after in zip(entering, leaving, strict=True):
        agreed(walk, [before, after], before.shape)
    return entering, [_later(walk.scale(y)) for y in results[len(carry) :]]


def _while(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    p = eqn.params
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    tested, consts = incoming[:n_test], incoming[n_test : n_test + n_body]
    entering = [_steady_state(walk, v) for v in incoming[n_test + n_body :]]
    (more,) = walk.run(p["cond_jaxpr"], [*tested, *entering])
    walk.fix(more)
    leaving = walk.run(p["body_jaxpr"], [*consts, *entering])
    for before, after in zip(entering, leaving, strict=True):
        agreed(walk, [before, after], before.shape)
    return entering


def _cond(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    which, *operands = incoming
    walk.fix(which)
    branches = [walk.run(b, operands) for b in eqn.params["branches"]]
    shapes = [tuple(v.aval.shape) for v in eqn.outvars]
    return [
        agreed(walk, list(values), shape)
        for values, shape in zip(zip(*branches, strict=True), shapes, strict=True)
    ]


def _steady_state(walk: Walk, value: Tracked) -> Tracked:
    """A carried array: what it starts as is one of the values it takes."""
    if not value.is_wild:
        return Tracked(value.shape, walk.scale(value))
    return Tracked(value.shape, along_each_axis(value.shape, walk.equations))


def _slices(walk: Walk, value: Tracked, length: int) -> list[Tracked]:
    shape = value.shape[1:]
    if value.undecided():
        assert value.fresh is not None
        leaf, places = value.fresh
        if places == tuple(a if n > 1 else None for a, n in enumerate(leaf.shape)):
            return _slices_of_leaf(leaf, length)
    scale = walk.scale(value)
    return [
        Tracked(shape, _earlier(taken(scale, 0, t)), is_wild=value.is_wild)
        for t in range(length)
    ]


def _slices_of_leaf(leaf: Leaf, length: int) -> list[Tracked]:
    """Layers stacked along the first axis of an array are parameters of their own."""
    if leaf.slices is None:
        leaf.slices = [
            Leaf((*leaf.path, SequenceKey(t)), leaf.shape[1:]) for t in range(length)
        ]
    return [parameter(s) for s in leaf.slices]


def _stacked(walk: Walk, values: list[Tracked]) -> Scale:
    """The scale of arrays along a new first axis."""
    scales = [walk.scale(v) for v in values]
    parts = []
    for t, scale in enumerate(scales):
        for part in scale:
            ids = np.zeros((len(values), *part.ids.shape), np.int64)
            ids[t] = part.ids
            axes = (0, *(a + 1 for a in part.axes))
            parts.append(Part(part.factor, axes, ids))
    return tidy(_merged(parts))


def _merged(parts: list[Part]) -> list[Part]:
    """Parts that vary along the same axes and never at the same index, as one."""
    result: list[Part] = []
    for part in parts:
        for i, other in enumerate(result):
            alike = (other.factor, other.axes) == (part.factor, part.axes)
            if alike and not (other.ids.astype(bool) & part.ids.astype(bool)).any():
                result[i] = Part(part.factor, part.axes, other.ids + part.ids)
                break
        else:
            result.append(part)
    return result


def _earlier(scale: Scale) -> Scale:
    return tuple(Part(p.factor, tuple(a - 1 for a in p.axes), p.ids) for p in scale)


def _later(scale: Scale) -> Scale:
    return tuple(Part(p.factor, tuple(a + 1 for a in p.axes), p.ids) for p in scale)


CONTROL: dict[str, Rule] = {"scan": _scan, "while": _while, "cond": _cond}
