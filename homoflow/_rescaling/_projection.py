"""Projection along an orbit: laws restored by rescalings that leave the function alone."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from .._laws._law import Law
from ._generating_laws import generating_laws
from ._gram import Gram, gram_of, largest
from ._group import (
    Arrays,
    Element,
    Generator,
    Share,
    acted,
    changed_by,
    composed,
    exponentiated,
    moving,
    squares_after,
    sum_of_squares,
    unit_element,
)

#: Units of rounding, of ‖w‖², up to which laws are restored, and less than which of drift
#: is left alone.
_ROUNDING, _ALONE = 4, 16
#: What a unit has less of than so many times that is not resolved.
_RIDGE = 10
_MOST_STEPS = 20
#: How far a step of Newton's method may rescale units, or mix them.
_LONGEST_STEP = 0.5


class Orbit(eqx.Module):
    """The rescalings that some quadratic laws generate, of weights of one structure.

    A law wᵀAw has the rescalings w → e^{sA}w: W_h[i,:] → e^s W_h[i,:] with
    W_{h+1}[:,i] → e^{−s} W_{h+1}[:,i] at a homogeneous unit, W_h → EW_h with
    W_{h+1} → W_{h+1}E⁻¹ at linear ones. They leave the function as it is and move the
    laws, so that a numerical solution's drift can be undone.

    Its methods take weights of any structure that has the leaves of `weights` in their
    order, or a vector of which `unravel` makes them. Of `laws` it has those that
    generate rescalings, each of them once.

    **Raises:** `ValueError` if there is none, or if one involves an array that is not
    among the weights.
    """

    laws: tuple[Law, ...]
    shares: tuple[Share, ...] = eqx.field(static=True)
    places: tuple[int, ...] = eqx.field(static=True)
    unravel: Callable[[Array], PyTree] | None = eqx.field(static=True)

    def __init__(
        self,
        laws: Iterable[Law],
        weights: PyTree,
        unravel: Callable[[Array], PyTree] | None = None,
    ):
        self.unravel = unravel
        self.laws = generating_laws(laws)
        if not self.laws:
            raise ValueError("None of the laws comes from rescalings of the weights.")
        leaves = jax.tree_util.tree_leaves_with_path(weights)
        place = {path: i for i, (path, _) in enumerate(leaves)}
        paths = dict.fromkeys(t.path for law in self.laws for t in law.quadratic_terms)
        if not paths.keys() <= place.keys():
            raise ValueError("A law involves an array that is not among the weights.")
        number = {path: i for i, path in enumerate(paths)}
        self.places = tuple(place[path] for path in paths)
        self.shares = tuple(
            Share(k, number[term.path], term)
            for k, law in enumerate(self.laws)
            for term in law.quadratic_terms
        )

    def values(self, weights: PyTree) -> Generator:
        """wᵀAw of each law, a vector over units or a matrix."""
        arrays = self._taken(weights)
        return _summed(self, _products(self, arrays, arrays))

    def size(self, weights: PyTree) -> Float[Array, ""]:
        """‖w‖² of the arrays that the laws are about."""
        return _size(self._taken(weights))

    def restoring(
        self,
        weights: PyTree,
        targets: Generator,
        beyond: Float[Array, ""] | float = 0.0,
    ) -> "Rescaling":
        """The rescaling after which the laws have the values `targets`.

        The laws' change is 2Gξ to first order in a rescaling's generator, G the Gram
        matrix of their gradients, so Newton's method finds it, in one or two steps from
        what a tolerable solver leaves. Nothing is rescaled while no law is further from
        its target than `beyond`·‖w‖², or than rounding.
        """
        arrays = self._taken(weights)
        beyond = jnp.asarray(beyond, arrays[0].dtype)
        restored, *found = _restoring(self, arrays, targets, beyond)
        return Rescaling(self, self._put(weights, restored), *found)

    def leaving(self, weights: PyTree, targets: Generator) -> "Rescaling":
        """The one that changes nothing, wherever the laws are."""
        nothing = jax.tree.map(jnp.zeros_like, targets)
        one = unit_element(self.laws, nothing)
        return Rescaling(self, weights, one, nothing, jnp.asarray(True))

    def _taken(self, weights: PyTree) -> Arrays:
        if self.unravel is not None:
            weights = self.unravel(weights)
        leaves = jax.tree.leaves(weights)
        return tuple(leaves[place] for place in self.places)

    def _put(self, weights: PyTree, arrays: Arrays) -> PyTree:
        if self.unravel is not None:
            weights = self.unravel(weights)
        leaves, structure = jax.tree.flatten(weights)
        for place, array in zip(self.places, arrays, strict=True):
            leaves[place] = array
        weights = jax.tree.unflatten(structure, leaves)
        return weights if self.unravel is None else ravel_pytree(weights)[0]


class Rescaling(eqx.Module):
    """An element g of the group, and what it does to the weights that it is for.

    - `restored`: gw, weights of the same function whose laws are at their targets.
    - `miss`: how far each law of w was from its target.
    - `is_one`: whether g leaves everything as it is.
    """

    orbit: Orbit
    restored: PyTree
    element: Element
    miss: Generator
    is_one: Bool[Array, ""]

    def weights(self, weights: PyTree) -> PyTree:
        """gv of other weights v, such as those of an earlier step."""
        return self._acted(weights, on_slopes=False)

    def slopes(self, gradient: PyTree) -> PyTree:
        """g⁻ᵀ∇L(w), the gradient at gw, where L is constant along the orbit."""
        return self._acted(gradient, on_slopes=True)

    def _acted(self, tree: PyTree, on_slopes: bool) -> PyTree:
        orbit = self.orbit

        def changed(arrays: Arrays) -> Arrays:
            return acted(
                orbit.laws, orbit.shares, self.element, arrays, on_slopes=on_slopes
            )

        arrays = orbit._taken(tree)
        return orbit._put(tree, lax.cond(self.is_one, lambda a: a, changed, arrays))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _restoring(
    orbit: Orbit, arrays: Arrays, targets: Generator, beyond: Array
) -> tuple[Arrays, Element, Generator, Array]:
    """gw, g, what the laws missed before it, and whether g = 1."""
    start = _at(orbit, targets, arrays)
    one = unit_element(orbit.laws, start.miss)
    alone = _ALONE / _ROUNDING * _floor(arrays)
    is_one = start.drift <= jnp.maximum(beyond, alone)
    # Loops that are not entered cost copies of all that they carry.
    restored, element = lax.cond(
        is_one,
        lambda: (arrays, one),
        lambda: _by_newton(orbit, targets, start, one, ~is_one),
    )
    return restored, element, start.miss, is_one


def _by_newton(
    orbit: Orbit, targets: Generator, start: "_Place", one: Element, is_needed: Array
) -> tuple[Arrays, Element]:
    floor = _floor(start.arrays)

    def goes_on(now: _Iterate) -> Bool[Array, ""]:
        # Under vmap this comes here with nothing to do too.
        left = (now.place.drift > floor) & (now.taken < _MOST_STEPS)
        return left & now.helped & is_needed

    def better(now: _Iterate) -> _Iterate:
        element = composed(_newton_step(orbit, now.place), now.element)
        place = _moved(orbit, targets, start, element)
        helped = place.drift < now.place.drift
        place, element = jax.tree.map(
            lambda a, b: jnp.where(helped, a, b),
            (place, element),
            (now.place, now.element),
        )
        return _Iterate(place, element, helped, now.taken + 1)

    now = _Iterate(start, one, is_needed, jnp.zeros((), jnp.int32))
    element = lax.while_loop(goes_on, better, now).element
    return acted(orbit.laws, orbit.shares, element, start.arrays), element


@_restoring.defjvp
def _restoring_derivative(orbit: Orbit, primals, tangents):
    """dg = Σ η_k A_k g and d(gw) = g dw + dg w, with laws that follow their targets.

    Exact where only units are rescaled. Mixings that bring a matrix law to its target
    differ by rotations; which one Newton's method comes to is not differentiated, a part
    of the derivative as small as the drift.
    """
    arrays, targets, beyond = primals
    d_arrays, d_targets, _ = tangents
    result = restored, element, miss, is_one = _restoring(
        orbit, arrays, targets, beyond
    )
    place = _at(orbit, targets, restored)

    def followed(given):
        d_arrays, d_targets = given
        carried = acted(orbit.laws, orbit.shares, element, d_arrays)
        forms = _summed(orbit, _products(orbit, restored, carried))
        wanted = tuple(c / 2 - x for c, x in zip(d_targets, forms, strict=True))
        eta = _solved(orbit, place, wanted)
        along = moving(orbit.laws, orbit.shares, eta, restored)
        moved = tuple(a + b for a, b in zip(carried, along, strict=True))
        return moved, changed_by(eta, element)

    def still(given):
        return given[0], jax.tree.map(jnp.zeros_like, element)

    d_restored, d_element = lax.cond(is_one, still, followed, (d_arrays, d_targets))
    nothing = jax.tree.map(jnp.zeros_like, miss)
    return result, (d_restored, d_element, nothing, jnp.zeros((), jax.dtypes.float0))


class _Place(NamedTuple):
    """Weights, and how far they are from the targets.

    Arrays that one law alone moves may be those of the start: the products, their squares,
    are all of them that counts.
    """

    arrays: Arrays
    products: Generator
    size: Float[Array, ""]
    miss: Generator
    drift: Float[Array, ""]


class _Iterate(NamedTuple):
    place: _Place
    element: Element
    helped: Bool[Array, ""]
    taken: Array


def _at(orbit: Orbit, targets: Generator, arrays: Arrays) -> _Place:
    products = _products(orbit, arrays, arrays)
    return _place(orbit, targets, arrays, products, _size(arrays))


def _moved(orbit: Orbit, targets: Generator, start: _Place, element: Element) -> _Place:
    """The place to which an element moves the start; long rows do not add to its cost."""
    often = [s for s in orbit.shares if _is_coupled(orbit, s)]
    arrays = acted(orbit.laws, often, element, start.arrays)
    products = list(start.products)
    size = start.size
    for n, (share, before) in enumerate(zip(orbit.shares, start.products, strict=True)):
        law = orbit.laws[share.law]
        if share in often:
            products[n] = _product(law, share, arrays, arrays)
        else:
            products[n] = squares_after(share.term, element[share.law], before)
            size = size + (
                sum_of_squares(law, products[n]) - sum_of_squares(law, before)
            )
    for i in {share.array for share in often}:
        size = size + ((arrays[i] ** 2).sum() - (start.arrays[i] ** 2).sum())
    return _place(orbit, targets, arrays, tuple(products), size)


def _place(
    orbit: Orbit, targets: Generator, arrays: Arrays, products: Generator, size: Array
) -> _Place:
    values = _summed(orbit, products)
    miss = tuple(v - c for v, c in zip(values, targets, strict=True))
    drift = largest(miss) / jnp.where(size > 0, size, 1)
    return _Place(arrays, products, size, miss, drift)


def _is_coupled(orbit: Orbit, share: Share) -> bool:
    return sum(share.array == other.array for other in orbit.shares) > 1


def _floor(arrays: Arrays) -> float:
    """The drift, relative to ‖w‖², that rounding explains."""
    return _ROUNDING * float(jnp.finfo(arrays[0].dtype).eps)


def _gram(orbit: Orbit, place: _Place) -> Gram:
    ridge = _RIDGE * _floor(place.arrays) * place.size
    return gram_of(orbit.laws, orbit.shares, place.arrays, place.products, ridge)


def _newton_step(orbit: Orbit, place: _Place) -> Element:
    gram = _gram(orbit, place)
    # What Newton's method leaves in any case need not be solved for.
    precise = jnp.maximum(place.drift**2, _floor(place.arrays) / 4)
    wanted = gram.framed(tuple(-x / 2 for x in place.miss))
    step = gram.unframed(gram.solved(wanted, precise * place.size / 2))
    return exponentiated(orbit.laws, _bounded(orbit, step))


def _solved(orbit: Orbit, place: _Place, b: Generator) -> Generator:
    """η with Gη = b, linear in b for all that differentiates."""
    gram = _gram(orbit, place)

    def solve(_, b: Generator) -> Generator:
        return gram.solved(b, _floor(place.arrays) * largest(b))

    eta = lax.custom_linear_solve(gram.times, gram.framed(b), solve, symmetric=True)
    return gram.unframed(eta)


def _bounded(orbit: Orbit, step: Generator) -> Generator:
    """The step, or a part of it, for which I + X is invertible and no scale is large."""
    sizes = [
        jnp.sqrt(jnp.max((x**2).sum(axis=(-1, -2))))
        if law.contraction == "matrix"
        else jnp.max(jnp.abs(x)) * max(abs(t.coefficient) for t in law.quadratic_terms)
        for law, x in zip(orbit.laws, step, strict=True)
    ]
    longest = jnp.max(jnp.stack(sizes))
    share = jnp.minimum(1, _LONGEST_STEP / jnp.where(longest > 0, longest, 1))
    return tuple(share * x for x in step)


def _products(orbit: Orbit, left: Arrays, right: Arrays) -> Generator:
    """Of each term of each law, products of what its units own."""
    return tuple(_product(orbit.laws[s.law], s, left, right) for s in orbit.shares)


def _product(law: Law, share: Share, left: Arrays, right: Arrays) -> Array:
    return jnp.atleast_1d(
        law.product(share.term, left[share.array], right[share.array])
    )


def _summed(orbit: Orbit, products: Generator) -> Generator:
    """Of each law the sum over its terms."""
    total: list = [0] * len(orbit.laws)
    for share, product in zip(orbit.shares, products, strict=True):
        total[share.law] = total[share.law] + share.term.coefficient * product
    return tuple(total)


def _size(arrays: Arrays) -> Float[Array, ""]:
    return sum((array**2).sum() for array in arrays)  # pyright: ignore
