"""What rearranging, cutting and joining arrays does to log-scales."""

import math
from fractions import Fraction

import jax
import numpy as np

from ._interpreter import Arrays, Rule, ScalingInterpreter
from ._log_scale import (
    ZERO,
    Component,
    LogScale,
    TooLarge,
    broadcast,
    index_axis,
    permute_axes,
    reshape_scale,
    simplify,
)
from ._tracked_array import TrackedArray
from .rules_elementwise import output_shape, require_same_scale

#: The largest array whose entries are followed one by one.
_MAX_SIZE = 1_000_000


def _place_axes(value: TrackedArray, shape, places) -> TrackedArray:
    """Axis a becomes axis places[a]; along new axes nothing varies."""
    untouched_leaf = None
    if value.untouched_leaf is not None:
        leaf, own = value.untouched_leaf
        untouched_leaf = (leaf, tuple(None if p is None else places[p] for p in own))
    return TrackedArray(
        shape, permute_axes(value.scale, places), untouched_leaf, value.has_any_scale
    )


def _transpose(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    permutation = [int(a) for a in eqn.params["permutation"]]
    places = [permutation.index(a) for a in range(len(permutation))]
    return [_place_axes(operands[0], output_shape(eqn), places)]


def _broadcast_in_dim(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    places = [int(a) for a in eqn.params["broadcast_dimensions"]]
    return [_place_axes(operands[0], output_shape(eqn), places)]


def _squeeze(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    gone = {int(a) % len(operands[0].shape) for a in eqn.params["dimensions"]}
    axes = range(len(operands[0].shape))
    kept = [a for a in axes if a not in gone]
    places = [kept.index(a) if a in kept else None for a in axes]
    return [_place_axes(operands[0], output_shape(eqn), places)]


def _reshape(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    (value, *_), shape = operands, output_shape(eqn)
    old = [a for a, n in enumerate(value.shape) if n > 1]
    new = [a for a, n in enumerate(shape) if n > 1]
    if [value.shape[a] for a in old] == [shape[a] for a in new]:
        ranks = dict(zip(old, new, strict=True))
        places = [ranks.get(a) for a in range(len(value.shape))]
        return [_place_axes(value, shape, places)]
    scale = reshape_scale(interpreter.scale(value), value.shape, shape)
    return [TrackedArray(shape, scale, has_any_scale=value.has_any_scale)]


def _rev(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    (value,) = operands
    scale = interpreter.scale(value)
    for axis in eqn.params["dimensions"]:
        scale = index_axis(scale, int(axis), np.arange(value.shape[axis])[::-1])
    return [TrackedArray(value.shape, scale, has_any_scale=value.has_any_scale)]


def _slice(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    (value,) = operands
    scale = interpreter.scale(value)
    p = eqn.params
    strides = p["strides"] or (1,) * len(value.shape)
    for axis, (lo, hi, step) in enumerate(
        zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    ):
        if (lo, hi, step) != (0, value.shape[axis], 1):
            scale = index_axis(scale, axis, np.arange(lo, hi, step))
    return [TrackedArray(output_shape(eqn), scale, has_any_scale=value.has_any_scale)]


def _split(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    (value,), axis = operands, int(eqn.params["axis"])
    scale, start, results = interpreter.scale(value), 0, []
    for out in eqn.outvars:
        n = out.aval.shape[axis]
        shape = tuple(out.aval.shape)
        own = index_axis(scale, axis, np.arange(start, start + n))
        results.append(TrackedArray(shape, own, has_any_scale=value.has_any_scale))
        start += n
    return results


def _concatenate(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    axis, shape = int(eqn.params["dimension"]), output_shape(eqn)
    if all(v.has_any_scale for v in operands):
        return [TrackedArray(shape, has_any_scale=True)]
    scales = [
        _new_scale_along(interpreter, v, axis)
        if v.has_any_scale
        else interpreter.scale(v)
        for v in operands
    ]
    # Components of the same factor are joined: the first of each piece, the second …
    slots: dict[tuple[Fraction, int], list[tuple[int, Component]]] = {}
    for i, scale in enumerate(scales):
        counts: dict[Fraction, int] = {}
        for component in scale:
            k = counts[component.factor] = counts.get(component.factor, -1) + 1
            slots.setdefault((component.factor, k), []).append((i, component))
    shapes = [v.shape for v in operands]
    components = [
        _concatenate_components(dict(members), factor, axis, shapes)
        for (factor, _), members in slots.items()
    ]
    return [TrackedArray(shape, simplify(components))]


def _concatenate_components(
    members: dict[int, Component], factor: Fraction, axis: int, shapes
) -> Component:
    """Components of some of the pieces as one component of what they are joined to."""
    axes = sorted({axis}.union(*(c.axes for c in members.values())))
    blocks = []
    for i, shape in enumerate(shapes):
        sizes = [shape[a] for a in axes]
        if math.prod(sizes) > _MAX_SIZE:
            raise TooLarge
        nothing = np.full(sizes, ZERO, np.int64)
        blocks.append(broadcast(members[i], axes, shape) if i in members else nothing)
    return Component(factor, tuple(axes), np.concatenate(blocks, axis=axes.index(axis)))


def _new_scale_along(
    interpreter: ScalingInterpreter, value: TrackedArray, axis: int
) -> LogScale:
    """Unknowns along an axis, for zeros: they may have any scale."""
    ids = interpreter.equations.new_unknowns((value.shape[axis],))
    return (Component(Fraction(1), (axis,), ids),)


def _pad(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    value, filling = operands
    if not filling.has_any_scale:
        interpreter.fix(value)
        interpreter.fix(filling)
        return [TrackedArray(output_shape(eqn))]
    scale = interpreter.scale(value)
    for axis, (low, _, inner) in enumerate(eqn.params["padding_config"]):
        n, m = value.shape[axis], output_shape(eqn)[axis]
        # Zeros may have any scale: that of the nearest entry.
        nearest = np.clip(np.round((np.arange(m) - low) / (inner + 1)), 0, n - 1)
        if n:
            scale = index_axis(scale, axis, nearest.astype(int))
    return [TrackedArray(output_shape(eqn), scale, has_any_scale=value.has_any_scale)]


def _gather(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    operand, indices = operands
    shape, p = output_shape(eqn), eqn.params
    if operand.has_any_scale:
        return [TrackedArray(shape, has_any_scale=True)]
    at = indices.value() if math.prod(indices.shape) <= _MAX_SIZE else None
    if at is not None:
        if math.prod(operand.shape) > _MAX_SIZE or math.prod(shape) > _MAX_SIZE:
            raise TooLarge
        scale = _gather_entries(interpreter, eqn, operand, at)
        return [TrackedArray(shape, scale)]
    d = p["dimension_numbers"]
    full = [n == s for n, s in zip(operand.shape, p["slice_sizes"], strict=True)]
    outer = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    window = [a for a in range(len(operand.shape)) if a not in outer]
    places = dict(zip(window, d.offset_dims, strict=True))
    narrow = _scale_constant_along(
        interpreter, operand, [a for a, f in enumerate(full) if not f]
    )
    axes = [places.get(a) for a in range(len(operand.shape))]
    return [TrackedArray(shape, simplify(permute_axes(narrow, axes)))]


def _scale_constant_along(
    interpreter: ScalingInterpreter, value: TrackedArray, axes: list[int]
) -> LogScale:
    """The log-scale of a value, which is required not to vary along `axes`.

    An untouched parameter gets no unknowns along them to begin with.
    """
    if value.is_undetermined:
        assert value.untouched_leaf is not None
        leaf, places = value.untouched_leaf
        own = [a for a, place in enumerate(places) if place not in (None, *axes)]
        sizes = [leaf.shape[a] for a in own]
        ids = interpreter.equations.new_unknowns(sizes)
        leaf.scale = simplify([Component(Fraction(1), tuple(own), ids)])
    return interpreter.scale_constant_along(value, axes)


def _gather_entries(
    interpreter: ScalingInterpreter, eqn, operand: TrackedArray, at: np.ndarray
) -> LogScale:
    """The scale of every entry, found by gathering the unknowns instead of the values."""
    components = []
    for component in interpreter.scale(operand):
        ids = broadcast(component, range(len(operand.shape)), operand.shape)
        with jax.ensure_compile_time_eval():
            params = eqn.params | {"fill_value": ZERO}
            result = eqn.primitive.bind(
                jax.numpy.asarray(ids, np.int32), jax.numpy.asarray(at), **params
            )
        gathered = np.asarray(result, np.int64)
        axes = tuple(range(gathered.ndim))
        components.append(Component(component.factor, axes, gathered))
    return simplify(components)


def _dynamic_slice(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    value, *starts = operands
    sizes, shape = eqn.params["slice_sizes"], output_shape(eqn)
    if value.has_any_scale:
        return [TrackedArray(shape, has_any_scale=True)]
    cut = [a for a, n in enumerate(sizes) if n != value.shape[a]]
    at = [s.value() for s in starts]
    if all(at[a] is not None for a in cut):
        scale = interpreter.scale(value)
        for a in cut:
            first = int(np.clip(at[a], 0, value.shape[a] - sizes[a]))  # pyright: ignore
            scale = index_axis(scale, a, np.arange(first, first + sizes[a]))
        return [TrackedArray(shape, scale)]
    return [TrackedArray(shape, _scale_constant_along(interpreter, value, cut))]


def _dynamic_update_slice(
    interpreter: ScalingInterpreter, eqn, operands: Arrays
) -> Arrays:
    value, update, *_ = operands
    cut = [a for a, n in enumerate(update.shape) if n != value.shape[a]]
    parts = [
        TrackedArray(value.shape, _scale_constant_along(interpreter, v, cut))
        for v in (value, update)
        if not v.has_any_scale
    ]
    if not parts:
        return [TrackedArray(value.shape, has_any_scale=True)]
    return [require_same_scale(interpreter, parts, value.shape)]


SHAPE_RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "expand_dims": _reshape,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "pad": _pad,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
