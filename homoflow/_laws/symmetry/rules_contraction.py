"""What sums and products of whole arrays do to log-scales."""

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from ._interpreter import Rule, Walk
from ._log_scale import Part, Scale, moved, scaled, taken, tidy
from ._tracked_array import Tracked
from .rules_elementwise import out_shape

#: The most factors of a product over an axis.
_MOST_FACTORS = 64


def _reduce(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    """A sum, or a largest entry, over axes: every entry along them has to scale alike."""
    (value,) = incoming
    axes, shape = {int(a) for a in eqn.params["axes"]}, out_shape(eqn)
    if value.is_wild:
        return [Tracked(shape, is_wild=True)]
    scale = walk.equations.independent(walk.scale(value), axes, value.shape)
    return [Tracked(shape, _without(scale, axes, len(value.shape)))]


def _reduce_to_index(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    _reduce(walk, eqn, incoming)
    return [Tracked(out_shape(eqn))]


def _reduce_prod(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    (value,) = incoming
    axes, scale = sorted(int(a) for a in eqn.params["axes"]), walk.scale(value)
    for axis in axes:
        n = value.shape[axis]
        varying = [p for p in scale if axis in p.axes]
        if varying and n > _MOST_FACTORS:
            scale = walk.equations.independent(scale, [axis], value.shape)
            varying = []
        alike = scaled(tuple(p for p in scale if axis not in p.axes), n)
        each = [taken(tuple(varying), axis, k) for k in range(n)] if varying else []
        scale = tidy(p for s in (alike, *each) for p in s)
    return [Tracked(out_shape(eqn), _without(scale, set(axes), len(value.shape)))]


def _cumulative(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    (value,) = incoming
    scale = walk.equations.independent(
        walk.scale(value), [int(eqn.params["axis"])], value.shape
    )
    return [Tracked(value.shape, scale, is_wild=value.is_wild)]


def _sort(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    axis = int(eqn.params.get("dimension", -1))
    results = []
    for value, out in zip(incoming, eqn.outvars, strict=False):
        axes = [axis % len(value.shape)]
        scale = walk.equations.independent(walk.scale(value), axes, value.shape)
        results.append(Tracked(tuple(out.aval.shape), scale))
    rest = eqn.outvars[len(results) :]  # The indices of top_k.
    return results + [Tracked(tuple(v.aval.shape)) for v in rest]


def _window(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    """Pooling."""
    value = incoming[0]
    sizes = eqn.params["window_dimensions"]
    axes = [
        a for a, n in enumerate(sizes) if n > 1 or out_shape(eqn)[a] != value.shape[a]
    ]
    scale = walk.equations.independent(walk.scale(value), axes, value.shape)
    return [Tracked(out_shape(eqn), scale, is_wild=value.is_wild)]


def _dot_general(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    """Σ_c left·right: along the contracted axes the two scales have to cancel."""
    shape = out_shape(eqn)
    if any(v.is_wild for v in incoming):
        return [Tracked(shape, is_wild=True)]
    (cl, cr), (bl, br) = eqn.params["dimension_numbers"]
    left, right = incoming
    batch = len(bl)
    free_left = [a for a in range(len(left.shape)) if a not in (*cl, *bl)]
    free_right = [a for a in range(len(right.shape)) if a not in (*cr, *br)]
    # The product's axes, and after them the contracted ones.
    place_l = {a: i for i, a in enumerate((*bl, *free_left))}
    place_r = {a: i for i, a in enumerate(br)}
    place_r |= {a: batch + len(free_left) + i for i, a in enumerate(free_right)}
    place_l |= {a: len(shape) + i for i, a in enumerate(cl)}
    place_r |= {a: len(shape) + i for i, a in enumerate(cr)}
    joint = (*shape, *(left.shape[a] for a in cl))
    contracted = range(len(shape), len(joint))
    sides = [
        (left, [place_l[a] for a in range(len(left.shape))]),
        (right, [place_r[a] for a in range(len(right.shape))]),
    ]
    if right.undecided() and left.undecided() and left.fresh[0] is right.fresh[0]:  # pyright: ignore
        walk.scale(left)
    sides.sort(key=lambda side: side[0].undecided())
    first, second = sides
    if first[0].undecided():
        _decide(walk, *first, None, contracted)
    scale = moved(walk.scale(first[0]), first[1])
    if second[0].undecided():
        _decide(walk, *second, scale, contracted)
    scale = (*scale, *moved(walk.scale(second[0]), second[1]))
    return [
        Tracked(shape, tidy(walk.equations.independent(tidy(scale), contracted, joint)))
    ]


def _decide(
    walk: Walk, value: Tracked, places, other: Scale | None, contracted: Iterable[int]
) -> None:
    """Give an untouched parameter in a product the most general scale it can have.

    It has to be a sum of one part along its free axes, which is unknown, and one along
    the contracted axes, which cancels that of the `other` factor (if it has one yet).
    """
    assert value.fresh is not None
    leaf, own = value.fresh
    axis_of = {places[p]: a for a, p in enumerate(own) if p is not None}
    free = sorted(a for p, a in axis_of.items() if p not in contracted)
    parts = [
        Part(
            Fraction(1),
            tuple(free),
            walk.equations.unknowns([leaf.shape[a] for a in free]),
        )
    ]
    summed = [a for p, a in axis_of.items() if p in contracted]
    if other is not None:
        meeting = [part for part in other if set(part.axes) & set(contracted)]
        parts += [_opposite(part, axis_of) for part in meeting]
    elif summed:
        ids = walk.equations.unknowns([leaf.shape[a] for a in sorted(summed)])
        parts.append(Part(Fraction(1), tuple(sorted(summed)), ids))
    leaf.scale = tidy(parts)


def _opposite(part: Part, axis_of: dict[int, int]) -> Part:
    """Minus a part of the other factor, on the axes that the parameter shares with it."""
    ids = part.ids
    for i in reversed(range(len(part.axes))):
        if part.axes[i] not in axis_of:
            ids = np.asarray(np.take(ids, 0, axis=i))
    kept = tuple(a for a in part.axes if a in axis_of)
    width = max(kept, default=-1) + 1
    (result,) = moved(
        (Part(-part.factor, kept, ids),), [axis_of.get(a) for a in range(width)]
    )
    return result


def _conv(walk: Walk, eqn, incoming: list[Tracked]) -> list[Tracked]:
    """A convolution is a product over channels; space and kernel do not scale."""
    shape, p = out_shape(eqn), eqn.params
    image, kernel = incoming
    if image.is_wild or kernel.is_wild:
        return [Tracked(shape, is_wild=True)]
    if p["batch_group_count"] != 1:
        walk.fix(image)
        walk.fix(kernel)
        return [Tracked(shape)]
    lhs, rhs, out = p["dimension_numbers"]
    groups, width = p["feature_group_count"], kernel.shape[rhs[1]]
    n_out = kernel.shape[rhs[0]]
    elsewhere = [a for a in range(len(image.shape)) if a != lhs[1]]
    x = walk.equations.independent(walk.scale(image), elsewhere, image.shape)
    # Output channels × the input channels that each of them sees.
    met = (np.arange(n_out) * groups // n_out)[:, None] * width + np.arange(width)
    entering = tidy(
        Part(q.factor, (0, 1), q.ids[met]) if q.axes else q for q in x
    )  # fmt: skip
    if kernel.undecided():
        _decide_kernel(walk, kernel, (rhs[0], rhs[1]), entering)
    weights = walk.equations.independent(walk.scale(kernel), rhs[2:], kernel.shape)
    channels = {rhs[0]: 0, rhs[1]: 1}
    weights = moved(weights, [channels.get(a) for a in range(len(kernel.shape))])
    total = walk.equations.independent(tidy((*entering, *weights)), [1], (n_out, width))
    return [Tracked(shape, tidy(moved(total, [out[1]])))]


def _decide_kernel(walk: Walk, kernel: Tracked, channels, entering: Scale) -> None:
    assert kernel.fresh is not None
    leaf, own = kernel.fresh
    places = [own.index(a) if a in own else None for a in channels]
    free = [a for a in places[:1] if a is not None]
    unknown = walk.equations.unknowns([leaf.shape[a] for a in free])
    opposite = [q for q in scaled(entering, -1) if 1 in q.axes]
    leaf.scale = tidy(
        [Part(Fraction(1), tuple(free), unknown), *moved(tuple(opposite), places)]
    )


def _without(scale: Scale, axes: set[int], rank: int) -> Scale:
    kept = [a for a in range(rank) if a not in axes]
    places = [kept.index(a) if a in kept else None for a in range(rank)]
    return tidy(moved(scale, places))


LINEAR: dict[str, Rule] = {
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce_to_index),
    **dict.fromkeys(("cumsum", "cummax", "cummin"), _cumulative),
    **dict.fromkeys(("sort", "top_k"), _sort),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window
    ),
    "reduce_prod": _reduce_prod,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
