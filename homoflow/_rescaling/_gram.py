"""The Gram matrix of the gradients of laws: how rescalings change them."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._laws._law import Law, Term
from ._group import Arrays, Generator, Share, generated, placed, unit_rows

#: Iterations of conjugate gradients: two linear layers from random weights take about 4
#: for each digit, layers that are balanced 1.
_MOST_ITERATIONS = 100

#: Generators of some of the laws, by their number.
Some = dict[int, Array]


class Coupling(NamedTuple):
    """Two laws, or two terms of one, that meet at an array.

    Between single units `squares` has what a pair of them owns together; where units are
    mixed it is `None`, and the array itself is needed.
    """

    first: Share
    second: Share
    squares: Float[Array, "units others"] | None


class Gram(NamedTuple):
    """G ξ = (⟨A_k w, Σ_l ξ_l A_l w⟩)_k, as an operator on one generator for each law.

    A rescaling w → e^{ξA}w changes the laws wᵀA_k w by 2Gξ to first order. For one matrix
    law it is the Lyapunov operator X ↦ (XC + CX)/2, C = W_hW_hᵀ + W_{h+1}ᵀW_{h+1}; an
    array that belongs to two laws couples them, by X ↦ −W_{h+1}XW_{h+1}ᵀ. Everything is in
    frames in which the C are diagonal.

    - `diagonal`: of G, with a ridge for units that have next to no weights.
    - `whole`: C where it has no such frame; otherwise `None`.
    - `frames`: eigenvectors of C; `None` for what is diagonal anyway.
    - `arrays`: those that belong to several laws, in the frames.
    - `eliminated`: laws of which no two are coupled: those are solved for exactly.
    """

    laws: Sequence[Law]
    diagonal: Generator
    whole: tuple[Array | None, ...]
    frames: tuple[Array | None, ...]
    arrays: dict[int, Array]
    couplings: Sequence[Coupling]
    eliminated: frozenset[int]

    def framed(self, b: Generator) -> Generator:
        """In the frames' coordinates."""
        return tuple(
            x if q is None else q.swapaxes(-1, -2) @ x @ q
            for x, q in zip(b, self.frames, strict=True)
        )

    def unframed(self, b: Generator) -> Generator:
        return tuple(
            x if q is None else q @ x @ q.swapaxes(-1, -2)
            for x, q in zip(b, self.frames, strict=True)
        )

    def times(self, x: Generator) -> Generator:
        """Gx, in the frames' coordinates."""
        some = dict(enumerate(x))
        coupled = self._coupled(some, some.keys())
        return tuple(self._own(k, part) + coupled[k] for k, part in some.items())

    def solved(self, b: Generator, tolerance: Float[Array, ""]) -> Generator:
        """x with |Gx − b| ≤ tolerance, by conjugate gradients on what is not eliminated."""
        given = dict(enumerate(b))
        gone = {k: self._divided(k, b[k]) for k in sorted(self.eliminated)}
        left = given.keys() - self.eliminated
        image = self._coupled(gone, left)
        rest = {k: given[k] - image[k] for k in sorted(left)}
        found = self._conjugate_gradients(rest, tolerance)
        image = self._coupled(found, gone.keys())
        gone = {k: self._divided(k, b[k] - image[k]) for k in gone}
        found = found | gone
        return tuple(found[k] for k in range(len(b)))

    def _conjugate_gradients(self, b: Some, tolerance: Array) -> Some:
        if not b:
            return b

        def goes_on(now: _Iterate) -> Bool[Array, ""]:
            unsolved = largest(now.rest.values()) > tolerance
            return unsolved & (now.taken < _MOST_ITERATIONS)

        def better(now: _Iterate) -> _Iterate:
            image = self._reduced(now.direction)
            curvature = _dot(now.direction, image)
            step = now.square / jnp.where(curvature > 0, curvature, 1)
            x = _plus(now.x, step, now.direction)
            rest = _plus(now.rest, -step, image)
            z = {k: self._divided(k, part) for k, part in rest.items()}
            square = _dot(rest, z)
            share = square / jnp.where(now.square > 0, now.square, 1)
            return _Iterate(
                x, rest, _plus(z, share, now.direction), square, now.taken + 1
            )

        zero = {k: jnp.zeros_like(part) for k, part in b.items()}
        z = {k: self._divided(k, part) for k, part in b.items()}
        start = _Iterate(zero, b, z, _dot(b, z), jnp.zeros((), jnp.int32))
        return lax.while_loop(goes_on, better, start).x

    def _reduced(self, x: Some) -> Some:
        """The Schur complement of what is eliminated."""
        image = self._coupled(x, self.eliminated)
        gone = {k: -self._divided(k, part) for k, part in image.items()}
        coupled = self._coupled(x | gone, x.keys())
        return {k: self._own(k, part) + coupled[k] for k, part in x.items()}

    def _own(self, k: int, x: Array) -> Array:
        """What a law's rescalings change of itself, where they meet no other term."""
        whole = self.whole[k]
        return self.diagonal[k] * x if whole is None else _symmetric(x @ whole)

    def _divided(self, k: int, b: Array) -> Array:
        return b / self.diagonal[k]

    def _coupled(self, x: Some, onto: Iterable[int]) -> Some:
        """What rescalings change of other laws, those that are asked for."""
        result: dict[int, Array] = {k: jnp.zeros_like(self.diagonal[k]) for k in onto}
        for first, second, squares in self.couplings:
            for target, source in ((first, second), (second, first)):
                if target.law in result and source.law in x:
                    along = squares if target is first or squares is None else squares.T
                    share = self._share(target, source, along, x[source.law])
                    result[target.law] = result[target.law] + share
        return result

    def _share(self, target: Share, source: Share, squares, x: Array) -> Array:
        if squares is not None:
            return target.term.coefficient * source.term.coefficient * (squares @ x)
        array = self.arrays[target.array]
        law, other = self.laws[target.law], self.laws[source.law]
        moving = unit_rows(other, source.term, array)
        moving = generated(other, source.term, x, moving)
        moving = placed(other, source.term, moving, array)
        along = unit_rows(law, target.term, moving)
        own = unit_rows(law, target.term, array)
        if law.contraction == "matrix":
            return target.term.coefficient * _symmetric(along @ own.swapaxes(-1, -2))
        return target.term.coefficient * (along * own).sum(axis=-1)


class _Iterate(NamedTuple):
    x: Some
    rest: Some
    direction: Some
    square: Float[Array, ""]
    taken: Array


def gram_of(
    laws: Sequence[Law],
    shares: Sequence[Share],
    arrays: Arrays,
    squares: Generator,
    ridge: Float[Array, ""],
) -> Gram:
    """G at some weights, from the squares of all shares."""
    total: list = [0] * len(laws)
    for share, square in zip(shares, squares, strict=True):
        total[share.law] = total[share.law] + share.term.coefficient**2 * square
    meeting = [
        pair
        for pair in itertools.combinations(shares, 2)
        if pair[0].array == pair[1].array
    ]
    diagonal, whole, frames = [], [], []
    for k, law in enumerate(laws):
        d, c, q = _diagonalized(law, total[k], _turns_alone(k, meeting, arrays), ridge)
        diagonal.append(d)
        whole.append(c)
        frames.append(q)
    turned = {s.array: arrays[s.array] for pair in meeting for s in pair}
    for share in shares:
        q = frames[share.law]
        if share.array in turned and q is not None:
            law, array = laws[share.law], turned[share.array]
            rows = q.swapaxes(-1, -2) @ unit_rows(law, share.term, array)
            turned[share.array] = placed(law, share.term, rows, array)
    couplings = [
        Coupling(s, t, _common_squares(laws, s, t, turned[s.array])) for s, t in meeting
    ]
    return Gram(
        laws,
        tuple(diagonal),
        tuple(whole),
        tuple(frames),
        turned,
        couplings,
        _eliminated([c is None for c in whole], meeting),
    )


def largest(parts: Iterable[Array]) -> Float[Array, ""]:
    """The largest absolute value."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(part)) for part in parts]))


def _diagonalized(law: Law, total: Array, turns: bool, ridge: Array):
    """The diagonal of a law's own share of G, C if that is not all, and the frame."""
    if law.contraction != "matrix":
        return total + ridge, None, None
    frame = whole = None
    if turns:
        # Any frame will do: derivatives need not follow it.
        values, frame = jnp.linalg.eigh(
            lax.stop_gradient(total), symmetrize_input=False
        )
    else:
        values = jnp.diagonal(total, axis1=-2, axis2=-1)
        whole = total + ridge * jnp.eye(total.shape[-1], dtype=total.dtype)
    values = jnp.maximum(values, 0)
    return (values[..., :, None] + values[..., None, :]) / 2 + ridge, whole, frame


def _turns_alone(k: int, meeting, arrays: Arrays) -> bool:
    """Whether a turn of a law's units commutes with all rescalings that it meets."""
    return all(
        _along_two_axes(s.term, t.term, arrays[s.array].shape) is not None
        for s, t in meeting
        if k in (s.law, t.law)
    )


def _along_two_axes(
    first: Term, second: Term, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int, int] | None:
    """A view of an array in which units of the two are along different axes."""
    if first.index is not None or second.index is not None:
        return None
    views = [
        tuple(_sized(t.view, shape)) for t in (first, second) if t.view is not None
    ]
    view = views[0] if views else shape
    for term in (first, second):
        # Rows of the array are rows of every view that leaves its first axis alone.
        is_rows = term.view is None and term.axis == 0 and view[0] == shape[0]
        own = shape if term.view is None else _sized(term.view, shape)
        if not is_rows and own != view:
            return None
    return None if first.axis == second.axis else (view, first.axis, second.axis)


def _sized(view: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    known = math.prod(n for n in view if n != -1)
    return tuple(math.prod(shape) // known if n == -1 else n for n in view)


def _common_squares(
    laws: Sequence[Law], first: Share, second: Share, array: Array
) -> Array | None:
    """Sums of the squares that a unit of the one and a unit of the other own together."""
    if any(laws[s.law].contraction != "units" for s in (first, second)):
        return None
    axes = _along_two_axes(first.term, second.term, array.shape)
    if axes is None:
        return None
    view, a, b = axes
    others = tuple(i for i in range(len(view)) if i not in (a, b))
    sums = (array**2).reshape(view).sum(axis=others)
    return sums if a < b else sums.T


def _eliminated(is_diagonal: Sequence[bool], meeting) -> frozenset[int]:
    """Laws that are coupled neither to one another nor in themselves, first come first."""
    coupled = {frozenset((s.law, t.law)) for s, t in meeting}
    chosen: list[int] = []
    for k, possible in enumerate(is_diagonal):
        if possible and all(frozenset((k, j)) not in coupled for j in (*chosen, k)):
            chosen.append(k)
    return frozenset(chosen)


def _symmetric(x: Array) -> Array:
    return (x + x.swapaxes(-1, -2)) / 2


def _dot(x: Some, y: Some) -> Float[Array, ""]:
    return sum((x[k] * y[k]).sum() for k in x)  # pyright: ignore


def _plus(x: Some, scale: Array, y: Some) -> Some:
    return {k: x[k] + scale * y[k] for k in x}
