"""What rearranging, cutting and joining arrays does to log-scales."""

import math
from fractions import Fraction

import jax
import numpy as np

from ._interpreter import Rule, Walk
from ._log_scale import (
    NOTHING,
    Part,
    Scale,
    TooLarge,
    moved,
    reshaped,
    spread,
    taken,
    tidy,
)
from ._tracked_array import Tracked
from .rules_elementwise import agreed, out_shape

#: The largest array whose entries are followed one by one.
_LARGEST = 1_000_000


def _rearranged(value: Tracked, shape, places) -> Tracked:
    """Axis a becomes axis places[a]; new axes are broadcast ones."""
    fresh = None
    if value.fresh is not None:
        leaf, own = value.fresh
        fresh = (leaf, tuple(None if p is None else places[p] for p in own))
    return Tracked(shape, moved(value.scale, places), fresh, value.is_wild)


def _transpose(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    permutation = [int(a) for a in eqn.params["permutation"]]
    places = [permutation.index(a) for a in range(len(permutation))]
    return [_rearranged(incoming[0], out_shape(eqn), places)]


def _broadcast_in_dim(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    places = [int(a) for a in eqn.params["broadcast_dimensions"]]
    return [_rearranged(incoming[0], out_shape(eqn), places)]


def _squeeze(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    gone = {int(a) % len(incoming[0].shape) for a in eqn.params["dimensions"]}
    axes = range(len(incoming[0].shape))
    kept = [a for a in axes if a not in gone]
    places = [kept.index(a) if a in kept else None for a in axes]
    return [_rearranged(incoming[0], out_shape(eqn), places)]


def _reshape(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    (value, *_), shape = incoming, out_shape(eqn)
    old = [a for a, n in enumerate(value.shape) if n > 1]
    new = [a for a, n in enumerate(shape) if n > 1]
    if [value.shape[a] for a in old] == [shape[a] for a in new]:
        ranks = dict(zip(old, new, strict=True))
        places = [ranks.get(a) for a in range(len(value.shape))]
        return [_rearranged(value, shape, places)]
    scale = reshaped(walk.scale(value), value.shape, shape)
    return [Tracked(shape, scale, is_wild=value.is_wild)]


def _rev(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    (value,) = incoming
    scale = walk.scale(value)
    for axis in eqn.params["dimensions"]:
        scale = taken(scale, int(axis), np.arange(value.shape[axis])[::-1])
    return [Tracked(value.shape, scale, is_wild=value.is_wild)]


def _slice(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    (value,) = incoming
    scale = walk.scale(value)
    p = eqn.params
    strides = p["strides"] or (1,) * len(value.shape)
    for axis, (lo, hi, step) in enumerate(
        zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    ):
        if (lo, hi, step) != (0, value.shape[axis], 1):
            scale = taken(scale, axis, np.arange(lo, hi, step))
    return [Tracked(out_shape(eqn), scale, is_wild=value.is_wild)]


def _split(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    (value,), axis = incoming, int(eqn.params["axis"])
    scale, start, results = walk.scale(value), 0, []
    for out in eqn.outvars:
        n = out.aval.shape[axis]
        part = taken(scale, axis, np.arange(start, start + n))
        results.append(Tracked(tuple(out.aval.shape), part, is_wild=value.is_wild))
        start += n
    return results


def _concatenate(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    axis, shape = int(eqn.params["dimension"]), out_shape(eqn)
    if all(v.is_wild for v in incoming):
        return [Tracked(shape, is_wild=True)]
    pieces = [
        (walk.scale(v) if not v.is_wild else _any(walk, v, axis)) for v in incoming
    ]
    slots: dict[tuple[Fraction, int], list[tuple[int, Part]]] = {}
    for i, scale in enumerate(pieces):
        counts: dict[Fraction, int] = {}
        for part in scale:
            k = counts[part.factor] = counts.get(part.factor, -1) + 1
            slots.setdefault((part.factor, k), []).append((i, part))
    parts = [
        _joined(dict(members), factor, axis, [v.shape for v in incoming], shape)
        for (factor, _), members in slots.items()
    ]
    return [Tracked(shape, tidy(parts))]


def _joined(members: dict[int, Part], factor, axis: int, shapes, shape) -> Part:
    axes = sorted({axis}.union(*(p.axes for p in members.values())))
    blocks = []
    for i, piece in enumerate(shapes):
        sizes = [piece[a] for a in axes]
        if math.prod(sizes) > _LARGEST:
            raise TooLarge
        nothing = np.full(sizes, NOTHING, np.int64)
        blocks.append(spread(members[i], axes, piece) if i in members else nothing)
    return Part(factor, tuple(axes), np.concatenate(blocks, axis=axes.index(axis)))


def _any(walk: Walk, value: Tracked, axis: int) -> Scale:
    """Zeros may have any scale."""
    ids = walk.equations.unknowns((value.shape[axis],))
    return (Part(Fraction(1), (axis,), ids),)


def _pad(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    value, filling = incoming
    if not filling.is_wild:
        walk.fix(value)
        walk.fix(filling)
        return [Tracked(out_shape(eqn))]
    scale = walk.scale(value)
    for axis, (low, _, inner) in enumerate(eqn.params["padding_config"]):
        n, m = value.shape[axis], out_shape(eqn)[axis]
        # Zeros may have any scale: that of the nearest entry.
        nearest = np.clip(np.round((np.arange(m) - low) / (inner + 1)), 0, n - 1)
        if n:
            scale = taken(scale, axis, nearest.astype(int))
    return [Tracked(out_shape(eqn), scale, is_wild=value.is_wild)]


def _gather(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    operand, indices = incoming
    shape, p = out_shape(eqn), eqn.params
    if operand.is_wild:
        return [Tracked(shape, is_wild=True)]
    at = indices.value() if math.prod(indices.shape) <= _LARGEST else None
    if at is not None:
        if math.prod(operand.shape) > _LARGEST or math.prod(shape) > _LARGEST:
            raise TooLarge
        return [Tracked(shape, _followed(walk, eqn, operand, at, shape))]
    d = p["dimension_numbers"]
    full = [n == s for n, s in zip(operand.shape, p["slice_sizes"], strict=True)]
    outer = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    window = [a for a in range(len(operand.shape)) if a not in outer]
    places = dict(zip(window, d.offset_dims, strict=True))
    narrow = _uniform(walk, operand, [a for a, f in enumerate(full) if not f])
    axes = [places.get(a) for a in range(len(operand.shape))]
    return [Tracked(shape, tidy(moved(narrow, axes)))]


def _uniform(walk: Walk, value: Tracked, axes: list[int]) -> Scale:
    """Demand that the scale does not vary along `axes`."""
    if value.undecided():
        assert value.fresh is not None
        leaf, places = value.fresh
        own = [a for a, place in enumerate(places) if place not in (None, *axes)]
        sizes = [leaf.shape[a] for a in own]
        leaf.scale = tidy(
            [Part(Fraction(1), tuple(own), walk.equations.unknowns(sizes))]
        )
    return walk.equations.independent(walk.scale(value), axes, value.shape)


def _followed(walk: Walk, eqn, operand: Tracked, at: np.ndarray, shape) -> Scale:
    """Every entry to its place, by doing to the unknowns what is done to the values."""
    parts, everywhere = [], range(len(shape))
    for part in walk.scale(operand):
        ids = spread(part, range(len(operand.shape)), operand.shape)
        with jax.ensure_compile_time_eval():
            params = eqn.params | {"fill_value": NOTHING}
            result = eqn.primitive.bind(
                jax.numpy.asarray(ids, np.int32), jax.numpy.asarray(at), **params
            )
        parts.append(Part(part.factor, tuple(everywhere), np.asarray(result, np.int64)))
    return tidy(parts)


def _dynamic_slice(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    value, *starts = incoming
    sizes, shape = eqn.params["slice_sizes"], out_shape(eqn)
    if value.is_wild:
        return [Tracked(shape, is_wild=True)]
    cut = [a for a, n in enumerate(sizes) if n != value.shape[a]]
    at = [s.value() for s in starts]
    if all(at[a] is not None for a in cut):
        scale = walk.scale(value)
        for a in cut:
            first = int(np.clip(at[a], 0, value.shape[a] - sizes[a]))  # pyright: ignore
            scale = taken(scale, a, np.arange(first, first + sizes[a]))
        return [Tracked(shape, scale)]
    return [Tracked(shape, _uniform(walk, value, cut))]


def _dynamic_update_slice(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    value, update, *_ = incoming
    cut = [a for a, n in enumerate(update.shape) if n != value.shape[a]]
    narrow = [
        Tracked(value.shape, _uniform(walk, v, cut)) for v in (value, update)
        if not v.is_wild
    ]  # fmt: skip
    return [
        agreed(walk, narrow, value.shape)
        if narrow
        else Tracked(value.shape, is_wild=True)
    ]


SHAPE: dict[str, Rule] = {
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
