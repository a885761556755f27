"""The Gram matrix of the gradients of laws: how rescalings change them."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._laws._law import Law, Term
from ._group import Arrays, Generator, TermRef, apply_generator, scatter_rows, unit_rows

#: Iterations of conjugate gradients: two linear layers from random weights take about 4
#: for each digit, layers that are balanced 1.
_MAX_ITERATIONS = 100

#: Generators of some of the laws, by the number of the law.
ByLaw = dict[int, Array]


class Coupling(NamedTuple):
    """Two laws, or two terms of one, that meet at an array.

    Between single units `squares` has what a pair of them owns together; where units are
    mixed it is `None`, and the array itself is needed.
    """

    first: TermRef
    second: TermRef
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

    def to_frame(self, b: Generator) -> Generator:
        """b in the frames' coordinates."""
        return tuple(
            x if q is None else q.swapaxes(-1, -2) @ x @ q
            for x, q in zip(b, self.frames, strict=True)
        )

    def from_frame(self, b: Generator) -> Generator:
        """Out of the frames' coordinates again."""
        return tuple(
            x if q is None else q @ x @ q.swapaxes(-1, -2)
            for x, q in zip(b, self.frames, strict=True)
        )

    def apply(self, x: Generator) -> Generator:
        """Gx, in the frames' coordinates."""
        by_law = dict(enumerate(x))
        coupled = self._apply_coupling(by_law, by_law.keys())
        return tuple(
            self._apply_uncoupled(k, part) + coupled[k] for k, part in by_law.items()
        )

    def solve(self, b: Generator, tolerance: Float[Array, ""]) -> Generator:
        """x with |Gx − b| ≤ tolerance, by conjugate gradients on what is not eliminated."""
        eliminated = {k: self._divide(k, b[k]) for k in sorted(self.eliminated)}
        left = set(range(len(b))) - self.eliminated
        image = self._apply_coupling(eliminated, left)
        right_side = {k: b[k] - image[k] for k in sorted(left)}
        solution = self._conjugate_gradients(right_side, tolerance)
        image = self._apply_coupling(solution, eliminated.keys())
        solution |= {k: self._divide(k, b[k] - image[k]) for k in eliminated}
        return tuple(solution[k] for k in range(len(b)))

    def _conjugate_gradients(self, b: ByLaw, tolerance: Array) -> ByLaw:
        if not b:
            return b

        def should_continue(now: _Iterate) -> Bool[Array, ""]:
            is_unsolved = max_magnitude(now.residual.values()) > tolerance
            return is_unsolved & (now.steps < _MAX_ITERATIONS)

        def step(now: _Iterate) -> _Iterate:
            image = self._apply_schur(now.direction)
            curvature = _dot(now.direction, image)
            length = now.square / jnp.where(curvature > 0, curvature, 1)
            x = _add_multiple(now.x, length, now.direction)
            residual = _add_multiple(now.residual, -length, image)
            z = {k: self._divide(k, part) for k, part in residual.items()}
            square = _dot(residual, z)
            ratio = square / jnp.where(now.square > 0, now.square, 1)
            direction = _add_multiple(z, ratio, now.direction)
            return _Iterate(x, residual, direction, square, now.steps + 1)

        zero = {k: jnp.zeros_like(part) for k, part in b.items()}
        z = {k: self._divide(k, part) for k, part in b.items()}
        start = _Iterate(zero, b, z, _dot(b, z), jnp.zeros((), jnp.int32))
        return lax.while_loop(should_continue, step, start).x

    def _apply_schur(self, x: ByLaw) -> ByLaw:
        """The Schur complement of the eliminated laws, applied to x."""
        image = self._apply_coupling(x, self.eliminated)
        gone = {k: -self._divide(k, part) for k, part in image.items()}
        coupled = self._apply_coupling(x | gone, x.keys())
        return {k: self._apply_uncoupled(k, part) + coupled[k] for k, part in x.items()}

    def _apply_uncoupled(self, k: int, x: Array) -> Array:
        """How a law's rescalings change that law, apart from couplings."""
        whole = self.whole[k]
        return self.diagonal[k] * x if whole is None else _symmetric(x @ whole)

    def _divide(self, k: int, b: Array) -> Array:
        return b / self.diagonal[k]

    def _apply_coupling(self, x: ByLaw, onto: Iterable[int]) -> ByLaw:
        """How rescalings change the laws `onto`, by the arrays where laws meet."""
        result: dict[int, Array] = {k: jnp.zeros_like(self.diagonal[k]) for k in onto}
        for first, second, squares in self.couplings:
            for target, source in ((first, second), (second, first)):
                if target.law in result and source.law in x:
                    along = squares if target is first or squares is None else squares.T
                    change = self._couple(target, source, along, x[source.law])
                    result[target.law] = result[target.law] + change
        return result

    def _couple(self, target: TermRef, source: TermRef, squares, x: Array) -> Array:
        if squares is not None:
            return target.term.coefficient * source.term.coefficient * (squares @ x)
        array = self.arrays[target.array]
        law, other = self.laws[target.law], self.laws[source.law]
        rows = unit_rows(other, source.term, array)
        change = apply_generator(other, source.term, x, rows)
        velocity = scatter_rows(other, source.term, change, array)
        along = unit_rows(law, target.term, velocity)
        own = unit_rows(law, target.term, array)
        if law.contraction == "matrix":
            return target.term.coefficient * _symmetric(along @ own.swapaxes(-1, -2))
        return target.term.coefficient * (along * own).sum(axis=-1)


class _Iterate(NamedTuple):
    x: ByLaw
    residual: ByLaw
    direction: ByLaw
    square: Float[Array, ""]
    steps: Array


def make_gram(
    laws: Sequence[Law],
    terms: Sequence[TermRef],
    arrays: Arrays,
    squares: Generator,
    ridge: Float[Array, ""],
) -> Gram:
    """G at some weights, from the squares of all terms (`Law.product` of w and w)."""
    total: list = [0] * len(laws)
    for ref, square in zip(terms, squares, strict=True):
        total[ref.law] = total[ref.law] + ref.term.coefficient**2 * square
    meeting = [
        pair
        for pair in itertools.combinations(terms, 2)
        if pair[0].array == pair[1].array
    ]
    diagonal, whole, frames = [], [], []
    for k, law in enumerate(laws):
        d, c, q = _diagonalize(
            law, total[k], _commutes_with_couplings(k, meeting, arrays), ridge
        )
        diagonal.append(d)
        whole.append(c)
        frames.append(q)
    turned = {s.array: arrays[s.array] for pair in meeting for s in pair}
    for ref in terms:
        q = frames[ref.law]
        if ref.array in turned and q is not None:
            law, array = laws[ref.law], turned[ref.array]
            rows = q.swapaxes(-1, -2) @ unit_rows(law, ref.term, array)
            turned[ref.array] = scatter_rows(law, ref.term, rows, array)
    couplings = [
        Coupling(s, t, _sum_common_squares(laws, s, t, turned[s.array]))
        for s, t in meeting
    ]
    return Gram(
        laws,
        tuple(diagonal),
        tuple(whole),
        tuple(frames),
        turned,
        couplings,
        _choose_eliminated([c is None for c in whole], meeting),
    )


def max_magnitude(parts: Iterable[Array]) -> Float[Array, ""]:
    """The largest absolute value."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(part)) for part in parts]))


def _diagonalize(law: Law, total: Array, has_frame: bool, ridge: Array):
    """The diagonal of a law's own block of G, C if that is not all, and the frame."""
    if law.contraction != "matrix":
        return total + ridge, None, None
    frame = whole = None
    if has_frame:
        # The result does not depend on the frame, so derivatives need not follow it.
        values, frame = jnp.linalg.eigh(
            lax.stop_gradient(total), symmetrize_input=False
        )
    else:
        values = jnp.diagonal(total, axis1=-2, axis2=-1)
        whole = total + ridge * jnp.eye(total.shape[-1], dtype=total.dtype)
    values = jnp.maximum(values, 0)
    return (values[..., :, None] + values[..., None, :]) / 2 + ridge, whole, frame


def _commutes_with_couplings(k: int, meeting, arrays: Arrays) -> bool:
    """Whether a rotation of a law's units commutes with all rescalings coupled to it."""
    return all(
        _view_with_two_axes(s.term, t.term, arrays[s.array].shape) is not None
        for s, t in meeting
        if k in (s.law, t.law)
    )


def _view_with_two_axes(
    first: Term, second: Term, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int, int] | None:
    """A view of an array in which units of the two are along different axes."""
    if first.index is not None or second.index is not None:
        return None
    views = [
        tuple(_resolve_view(t.view, shape))
        for t in (first, second)
        if t.view is not None
    ]
    view = views[0] if views else shape
    for term in (first, second):
        # Rows of the array are rows of every view that leaves its first axis alone.
        is_rows = term.view is None and term.axis == 0 and view[0] == shape[0]
        own = shape if term.view is None else _resolve_view(term.view, shape)
        if not is_rows and own != view:
            return None
    return None if first.axis == second.axis else (view, first.axis, second.axis)


def _resolve_view(view: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    known = math.prod(n for n in view if n != -1)
    return tuple(math.prod(shape) // known if n == -1 else n for n in view)


def _sum_common_squares(
    laws: Sequence[Law], first: TermRef, second: TermRef, array: Array
) -> Array | None:
    """Sums of the squares that a unit of the one and a unit of the other own together."""
    if any(laws[s.law].contraction != "units" for s in (first, second)):
        return None
    axes = _view_with_two_axes(first.term, second.term, array.shape)
    if axes is None:
        return None
    view, a, b = axes
    others = tuple(i for i in range(len(view)) if i not in (a, b))
    sums = (array**2).reshape(view).sum(axis=others)
    return sums if a < b else sums.T


def _choose_eliminated(is_diagonal: Sequence[bool], meeting) -> frozenset[int]:
    """Laws that are coupled neither to one another nor to themselves, chosen greedily."""
    coupled = {frozenset((s.law, t.law)) for s, t in meeting}
    chosen: list[int] = []
    for k, can_be_chosen in enumerate(is_diagonal):
        if can_be_chosen and all(
            frozenset((k, j)) not in coupled for j in (*chosen, k)
        ):
            chosen.append(k)
    return frozenset(chosen)


def _symmetric(x: Array) -> Array:
    return (x + x.swapaxes(-1, -2)) / 2


def _dot(x: ByLaw, y: ByLaw) -> Float[Array, ""]:
    return sum((x[k] * y[k]).sum() for k in x)  # pyright: ignore


def _add_multiple(x: ByLaw, scale: Array, y: ByLaw) -> ByLaw:
    return {k: x[k] + scale * y[k] for k in x}
