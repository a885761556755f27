"""Weights and memory joined to one vector, as `optax.flatten` does, read piece by piece.

A vector with pieces is followed as if each of them were an array of its own.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._linear_form import NOISE, NOTHING, Form, Rest, Sources


class TrackedArray(NamedTuple):
    """An array on its way through an optimizer's update.

    - `sources`: what it was made of; coefficients do not count.
    - `form`: as a linear combination; `None` if it is not known to be one.
    - `entry`: of an array whose entries are all the same, and `number`, if that is known
        now.
    - `is_power`, `is_correction`: whether it is βᵏ or 1 − βᵏ with k counting steps.
    - `pieces`: what a vector was joined of.
    """

    array: Any
    sources: Sources = NOTHING
    form: Form | None = None
    entry: Any = None
    number: float | None = None
    is_power: bool = False
    is_correction: bool = False
    pieces: tuple["TrackedArray", ...] = ()

    @property
    def coefficient(self) -> Any:
        """The entry, as a number if it is known."""
        return self.entry if self.number is None else self.number

    def as_form(self, like: Any) -> Form:
        """As a linear combination, all rest if it is not known to be one."""
        if self.form is not None:
            return self.form
        if self.number == 0:
            return Form()
        array = jnp.broadcast_to(self.array, like.shape)
        return Form({}, (Rest(1.0, array, self.sources),))


def spread_memory(state: PyTree, weights: PyTree, owned: set[int]) -> PyTree:
    """The state with vectors as long as all weights cut into arrays like the weights.

    `owned`: the leaves that are kept for one array of weights, which stay as they are.
    """
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(
        structure,
        [
            _cut(leaf, weights)
            if i not in owned and _is_flat(leaf, weights)
            else leaf
            for i, leaf in enumerate(leaves)
        ],
    )  # fmt: skip


def join_memory(spread: PyTree, structure: Any) -> PyTree:
    """The state of that structure, from `spread_memory`'s."""
    parts = structure.flatten_up_to(spread)
    joined = [
        part
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(part))
        else jnp.concatenate([jnp.reshape(leaf, -1) for leaf in jax.tree.leaves(part)])
        for part in parts
    ]
    return jax.tree.unflatten(structure, joined)


def _is_flat(leaf: Any, weights: PyTree) -> bool:
    arrays = jax.tree.leaves(weights)
    size = sum(array.size for array in arrays)
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return is_float and len(arrays) > 1 and jnp.shape(leaf) == (size,)


def _cut(vector: Any, weights: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(weights)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = jnp.split(vector, ends[:-1])
    shaped = [jnp.reshape(p, w.shape) for p, w in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def rearranged(
    eqn: Any, operands: list[TrackedArray], arrays: list, sources: Sources
) -> list[TrackedArray] | None:
    """What joins, cuts or reshapes arrays without another order of their entries."""
    name = eqn.primitive.name
    if name == "concatenate" and eqn.outvars[0].aval.ndim == 1:
        whole = TrackedArray(arrays[0], sources)
        is_known = any(operand.form is not None for operand in operands)
        return [whole._replace(pieces=tuple(operands)) if is_known else whole]
    if name == "split" and operands[0].pieces:
        pieces = operands[0].pieces
        if [p.array.size for p in pieces] == [array.size for array in arrays]:
            return [p._replace(array=a) for p, a in zip(pieces, arrays, strict=True)]
    if name == "reshape" and operands[0].form is not None:
        form = operands[0].form
        rest = tuple(
            r._replace(array=jnp.reshape(r.array, arrays[0].shape)) for r in form.rest
        )
        return [
            operands[0]._replace(
                array=arrays[0], form=form._replace(rest=rest), pieces=()
            )
        ]
    return None


def by_piece(
    result: TrackedArray,
    operands: list[TrackedArray],
    make: Callable[[TrackedArray, list[TrackedArray]], TrackedArray],
) -> TrackedArray:
    """`make(result, operands)` for each piece of what an operation entry by entry gives."""
    sizes = next(([p.array.size for p in o.pieces] for o in operands if o.pieces), [])
    if not sizes or jnp.shape(result.array) != (sum(sizes),):
        return make(result, operands)
    ends = np.cumsum([0, *sizes])
    pieces = []
    for k, (start, stop) in enumerate(itertools.pairwise(ends)):
        parts = [
            _part(operand, k, int(start), int(stop), sizes) for operand in operands
        ]
        sources = NOTHING.union(*(part.sources for part in parts))
        piece = result._replace(array=result.array[start:stop], sources=sources)
        pieces.append(make(piece, parts))
    return result._replace(pieces=tuple(pieces))


def _part(
    operand: TrackedArray, k: int, start: int, stop: int, sizes: list[int]
) -> TrackedArray:
    if [piece.array.size for piece in operand.pieces] == sizes:
        return operand.pieces[k]
    if jnp.ndim(operand.array) == 0:
        return operand
    return operand._replace(array=operand.array[start:stop], form=None, pieces=())


def are_separable(a: TrackedArray, b: TrackedArray) -> bool:
    """Whether the two terms of a sum are known to have different sources.

    Noise that an optimizer adds is its own, unlike what is made of the gradient.
    """
    if a.form is not None or b.form is not None:
        return True
    is_number = a.entry is not None or b.entry is not None
    return not is_number and (a.sources <= NOISE) != (b.sources <= NOISE)
