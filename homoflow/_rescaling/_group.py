"""Elements of the group of rescalings, and how they act on arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._laws._law import Law, Term, rows_of

Arrays = tuple[Array, ...]


class TermRef(NamedTuple):
    """A term of a law, with the numbers of the law and of the term's array."""

    law: int
    array: int
    term: Term


class Mixing(NamedTuple):
    """An invertible matrix E that mixes units, as `by` = E − I and `back` = E⁻¹ − I."""

    by: Float[Array, "..."]
    back: Float[Array, "..."]


#: For each law, logarithms of the scales of its units, or a `Mixing` of them.
Element = tuple[Float[Array, "..."] | Mixing, ...]
#: For each law a vector or a symmetric matrix: a generator, or the value of the law.
Generator = tuple[Float[Array, "..."], ...]


def unit_rows(law: Law, term: Term, array: Array) -> Float[Array, "*blocks units rest"]:
    """What each unit of a law owns of an array."""
    rows = rows_of(term, array)
    if law.contraction == "total":
        return rows.reshape(1, -1)
    if law.blocks > 1:
        return rows.reshape(law.blocks, rows.shape[0] // law.blocks, -1)
    return rows


def scatter_rows(law: Law, term: Term, rows: Array, array: Array) -> Array:
    """The rows where they belong in an array like the one given, and 0 elsewhere."""
    transpose = jax.linear_transpose(lambda a: unit_rows(law, term, a), array)
    return transpose(rows)[0]


def apply_generator(law: Law, term: Term, generator: Array, rows: Array) -> Array:
    """What a generator of the rescalings of a law makes of its units' rows."""
    if law.contraction == "matrix":
        return term.coefficient * (generator @ rows)
    return term.coefficient * generator[:, None] * rows


def retract(laws: Sequence[Law], generator: Generator) -> Element:
    """A group element that agrees with exp(generator) to first order.

    For a matrix X with ‖X‖ < 1 it is I + X, whose inverse costs less than exp(−X).
    """
    return tuple(
        _make_mixing(x) if law.contraction == "matrix" else x
        for law, x in zip(laws, generator, strict=True)
    )


def compose(second: Element, first: Element) -> Element:
    """The element that acts as the first, and then the second."""

    def compose_of_law(a, b):
        if not isinstance(a, Mixing):
            return a + b
        return Mixing(a.by + b.by + a.by @ b.by, b.back + a.back + b.back @ a.back)

    return tuple(compose_of_law(a, b) for a, b in zip(second, first, strict=True))


def apply(
    laws: Sequence[Law],
    terms: Sequence[TermRef],
    element: Element,
    arrays: Arrays,
    *,
    on_gradients: bool = False,
) -> Arrays:
    """g applied to weights, or g⁻ᵀ applied to gradients.

    It follows from L(gw) = L(w) that ∇L(gw) = g⁻ᵀ∇L(w).
    """
    result = list(arrays)
    for k, i, term in terms:
        law, g = laws[k], element[k]
        rows = unit_rows(law, term, result[i])
        if isinstance(g, Mixing):
            is_forward = (term.coefficient > 0) != on_gradients
            change = (g.by if is_forward else g.back.swapaxes(-1, -2)) @ rows
        else:
            power = -term.coefficient if on_gradients else term.coefficient
            change = jnp.expm1(power * g)[:, None] * rows
        result[i] = result[i] + scatter_rows(law, term, change, result[i])
    return tuple(result)


def limit_length(laws: Sequence[Law], generator: Generator, most: float) -> Generator:
    """The generator, or a part of it that rescales no unit by more than e^`most`.

    For mixings the limit is that of ‖X‖; below 1, I + X is invertible.
    """
    sizes = [
        jnp.sqrt(jnp.max((x**2).sum(axis=(-1, -2))))
        if law.contraction == "matrix"
        else jnp.max(jnp.abs(x)) * max(abs(t.coefficient) for t in law.quadratic_terms)
        for law, x in zip(laws, generator, strict=True)
    ]
    longest = jnp.max(jnp.stack(sizes))
    fraction = jnp.minimum(1, most / jnp.where(longest > 0, longest, 1))
    return tuple(fraction * x for x in generator)


def tangent(
    laws: Sequence[Law], terms: Sequence[TermRef], generator: Generator, arrays: Arrays
) -> Arrays:
    """The velocity of the arrays along a generator: Σ_k ξ_k A_k w."""
    result = [jnp.zeros_like(array) for array in arrays]
    for k, i, term in terms:
        rows = unit_rows(laws[k], term, arrays[i])
        change = apply_generator(laws[k], term, generator[k], rows)
        result[i] = result[i] + scatter_rows(laws[k], term, change, arrays[i])
    return tuple(result)


def squares_after(term: Term, g: Any, squares: Array) -> Array:
    """Squares, or inner products, of units' rows after a group element has acted."""
    if not isinstance(g, Mixing):
        return squares * jnp.exp(2 * term.coefficient * g)
    change = g.by if term.coefficient > 0 else g.back.swapaxes(-1, -2)
    half = squares + change @ squares
    return half + half @ change.swapaxes(-1, -2)


def sum_of_squares(law: Law, squares: Array) -> Float[Array, ""]:
    """The sum of the squares of all units."""
    if law.contraction == "matrix":
        squares = jnp.diagonal(squares, axis1=-2, axis2=-1)
    return squares.sum()


def identity_element(laws: Sequence[Law], like: Generator) -> Element:
    """The element that changes nothing."""
    zeros = jax.tree.map(jnp.zeros_like, like)
    return tuple(
        Mixing(z, z) if law.contraction == "matrix" else z
        for law, z in zip(laws, zeros, strict=True)
    )


def differential(generator: Generator, element: Element) -> Element:
    """The velocity of an element g that moves as dg = Xg, X a generator."""

    def differential_of_law(x, g):
        if not isinstance(g, Mixing):
            return x
        return Mixing(x + x @ g.by, -x - g.back @ x)

    pairs = zip(generator, element, strict=True)
    return tuple(differential_of_law(x, g) for x, g in pairs)


def _make_mixing(x: Float[Array, "*blocks n n"]) -> Mixing:
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return Mixing(x, -x @ jnp.linalg.inv(identity + x))
