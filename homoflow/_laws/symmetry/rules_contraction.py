"""What sums and products of whole arrays do to log-scales."""

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from ._interpreter import Arrays, Rule, ScalingInterpreter
from ._log_scale import (
    Component,
    LogScale,
    index_axis,
    multiply,
    permute_axes,
    simplify,
)
from ._tracked_array import Leaf, TrackedArray
from .rules_elementwise import output_shape

#: The most factors of a product over an axis.
_MAX_FACTORS = 64


def _reduce(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    """A sum, or a largest entry, over axes: every entry along them has to scale alike."""
    (value,) = operands
    axes, shape = {int(a) for a in eqn.params["axes"]}, output_shape(eqn)
    if value.has_any_scale:
        return [TrackedArray(shape, has_any_scale=True)]
    scale = interpreter.scale_constant_along(value, axes)
    return [TrackedArray(shape, _remove_axes(scale, axes, len(value.shape)))]


def _reduce_to_index(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    _reduce(interpreter, eqn, operands)
    return [TrackedArray(output_shape(eqn))]


def _reduce_prod(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    (value,) = operands
    axes, scale = sorted(int(a) for a in eqn.params["axes"]), interpreter.scale(value)
    for axis in axes:
        n = value.shape[axis]
        varying = [p for p in scale if axis in p.axes]
        if varying and n > _MAX_FACTORS:
            scale = interpreter.equations.require_constant_along(
                scale, [axis], value.shape
            )
            varying = []
        alike = multiply(tuple(p for p in scale if axis not in p.axes), n)
        factors = [index_axis(tuple(varying), axis, k) for k in range(n)]
        scale = simplify(c for s in (alike, *factors) for c in s)
    scale = _remove_axes(scale, set(axes), len(value.shape))
    return [TrackedArray(output_shape(eqn), scale)]


def _cumulative(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    (value,) = operands
    scale = interpreter.scale_constant_along(value, [int(eqn.params["axis"])])
    return [TrackedArray(value.shape, scale, has_any_scale=value.has_any_scale)]


def _sort(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    axis = int(eqn.params.get("dimension", -1))
    results = []
    for value, out in zip(operands, eqn.outvars, strict=False):
        axes = [axis % len(value.shape)]
        scale = interpreter.scale_constant_along(value, axes)
        results.append(TrackedArray(tuple(out.aval.shape), scale))
    indices = eqn.outvars[len(results) :]  # Those of top_k.
    return results + [TrackedArray(tuple(v.aval.shape)) for v in indices]


def _window(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    """Pooling."""
    value = operands[0]
    sizes = eqn.params["window_dimensions"]
    shape = output_shape(eqn)
    axes = [a for a, n in enumerate(sizes) if n > 1 or shape[a] != value.shape[a]]
    scale = interpreter.scale_constant_along(value, axes)
    return [TrackedArray(shape, scale, has_any_scale=value.has_any_scale)]


def _dot_general(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    """Σ_c left·right: along the contracted axes the two scales have to cancel."""
    shape = output_shape(eqn)
    if any(v.has_any_scale for v in operands):
        return [TrackedArray(shape, has_any_scale=True)]
    (contracted_axes, _), _ = eqn.params["dimension_numbers"]
    joint_shape = (*shape, *(operands[0].shape[a] for a in contracted_axes))
    contracted = range(len(shape), len(joint_shape))
    leaves = [v.untouched_leaf[0] if v.untouched_leaf else None for v in operands]
    if leaves[0] is not None and leaves[0] is leaves[1]:
        # A parameter times itself cannot get a scale that suits one side only.
        interpreter.scale(operands[0])
    sides = list(zip(operands, _places_in_product(eqn, operands), strict=True))
    sides.sort(key=lambda side: side[0].is_undetermined)
    scale: LogScale | None = None
    for value, places in sides:
        if value.is_undetermined:
            _choose_scale(interpreter, value, places, scale, contracted)
        own = permute_axes(interpreter.scale(value), places)
        scale = own if scale is None else (*scale, *own)
    assert scale is not None
    scale = interpreter.equations.require_constant_along(
        simplify(scale), contracted, joint_shape
    )
    return [TrackedArray(shape, simplify(scale))]


def _places_in_product(eqn, operands: Arrays) -> tuple[list[int], list[int]]:
    """For each axis of the factors, its place in the product.

    Contracted axes get places behind the last axis of the product.
    """
    (cl, cr), (bl, br) = eqn.params["dimension_numbers"]
    ranks = [len(v.shape) for v in operands]
    free_left = [a for a in range(ranks[0]) if a not in (*cl, *bl)]
    free_right = [a for a in range(ranks[1]) if a not in (*cr, *br)]
    num_left = len(bl) + len(free_left)
    end = num_left + len(free_right)
    left = {a: i for i, a in enumerate((*bl, *free_left))}
    right = {a: i for i, a in enumerate(br)}
    right |= {a: num_left + i for i, a in enumerate(free_right)}
    left |= {a: end + i for i, a in enumerate(cl)}
    right |= {a: end + i for i, a in enumerate(cr)}
    return [left[a] for a in range(ranks[0])], [right[a] for a in range(ranks[1])]


def _choose_scale(
    interpreter: ScalingInterpreter,
    value: TrackedArray,
    places,
    other: LogScale | None,
    contracted: Iterable[int],
) -> None:
    """Give an untouched parameter in a product the most general scale it can have.

    It is a sum of two components: an unknown one along the free axes, and one along the
    contracted axes, which has to cancel that of the `other` factor. If that has no scale
    yet, the second is unknown too.
    """
    assert value.untouched_leaf is not None
    leaf, own = value.untouched_leaf
    axis_of = {places[p]: a for a, p in enumerate(own) if p is not None}
    free = sorted(a for p, a in axis_of.items() if p not in contracted)
    summed = sorted(a for p, a in axis_of.items() if p in contracted)
    components = [_new_component(interpreter, leaf, free)]
    if other is not None:
        meeting = [c for c in other if set(c.axes) & set(contracted)]
        components += [_cancel_on(c, axis_of) for c in meeting]
    elif summed:
        components.append(_new_component(interpreter, leaf, summed))
    leaf.scale = simplify(components)


def _new_component(
    interpreter: ScalingInterpreter, leaf: Leaf, axes: list[int]
) -> Component:
    """Unknowns along these axes of a parameter."""
    sizes = [leaf.shape[a] for a in axes]
    ids = interpreter.equations.new_unknowns(sizes)
    return Component(Fraction(1), tuple(axes), ids)


def _cancel_on(component: Component, axis_of: dict[int, int]) -> Component:
    """Minus a component of the other factor, on the axes that the parameter shares."""
    ids = component.ids
    for i in reversed(range(len(component.axes))):
        if component.axes[i] not in axis_of:
            ids = np.asarray(np.take(ids, 0, axis=i))
    kept = tuple(a for a in component.axes if a in axis_of)
    width = max(kept, default=-1) + 1
    (result,) = permute_axes(
        (Component(-component.factor, kept, ids),),
        [axis_of.get(a) for a in range(width)],
    )
    return result


def _conv(interpreter: ScalingInterpreter, eqn, operands: Arrays) -> Arrays:
    """A convolution is a product over channels; space and kernel do not scale."""
    shape, p = output_shape(eqn), eqn.params
    image, kernel = operands
    if image.has_any_scale or kernel.has_any_scale:
        return [TrackedArray(shape, has_any_scale=True)]
    if p["batch_group_count"] != 1:
        interpreter.fix(image)
        interpreter.fix(kernel)
        return [TrackedArray(shape)]
    lhs, rhs, out = p["dimension_numbers"]
    groups, width = p["feature_group_count"], kernel.shape[rhs[1]]
    n_out = kernel.shape[rhs[0]]
    elsewhere = [a for a in range(len(image.shape)) if a != lhs[1]]
    x = interpreter.scale_constant_along(image, elsewhere)
    # Output channels × the input channels that each of them sees.
    seen = (np.arange(n_out) * groups // n_out)[:, None] * width + np.arange(width)
    entering = simplify(
        Component(c.factor, (0, 1), c.ids[seen]) if c.axes else c for c in x
    )
    if kernel.is_undetermined:
        _choose_kernel_scale(interpreter, kernel, (rhs[0], rhs[1]), entering)
    weights = interpreter.scale_constant_along(kernel, rhs[2:])
    channels = {rhs[0]: 0, rhs[1]: 1}
    weights = permute_axes(weights, [channels.get(a) for a in range(len(kernel.shape))])
    total = interpreter.equations.require_constant_along(
        simplify((*entering, *weights)), [1], (n_out, width)
    )
    return [TrackedArray(shape, simplify(permute_axes(total, [out[1]])))]


def _choose_kernel_scale(
    interpreter: ScalingInterpreter, kernel: TrackedArray, channels, entering: LogScale
) -> None:
    assert kernel.untouched_leaf is not None
    leaf, own = kernel.untouched_leaf
    places = [own.index(a) if a in own else None for a in channels]
    free = [a for a in places[:1] if a is not None]
    opposite = tuple(c for c in multiply(entering, -1) if 1 in c.axes)
    leaf.scale = simplify(
        [_new_component(interpreter, leaf, free), *permute_axes(opposite, places)]
    )


def _remove_axes(scale: LogScale, axes: set[int], rank: int) -> LogScale:
    kept = [a for a in range(rank) if a not in axes]
    places = [kept.index(a) if a in kept else None for a in range(rank)]
    return simplify(permute_axes(scale, places))


CONTRACTION_RULES: dict[str, Rule] = {
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
