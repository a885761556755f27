"""Projection onto the laws' values, by rescalings that leave the function alone."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from .._laws._law import Law
from ._generating_laws import generating_laws
from ._gram import Gram, make_gram, max_magnitude
from ._group import (
    Arrays,
    Element,
    Generator,
    TermRef,
    apply,
    compose,
    differential,
    identity_element,
    limit_length,
    retract,
    squares_after,
    sum_of_squares,
    tangent,
)
from ._translations import Translations

#: Laws are brought to their targets up to so many units of rounding of ‖w‖²; a smaller
#: drift than the second number of such units is left alone.
_ROUNDING, _IGNORED = 4, 16
#: The ridge of the Gram matrix, in multiples of what rounding leaves of a law.
_RIDGE = 10
_MAX_STEPS = 20
#: How far a step of Newton's method may rescale units, or mix them.
_MAX_STEP_LENGTH = 0.5


class RescalingGroup(eqx.Module):
    """The rescalings that some quadratic laws generate, of weights of one structure.

    A law wᵀAw has the rescalings w → e^{sA}w: W_h[i,:] → e^s W_h[i,:] with
    W_{h+1}[:,i] → e^{−s} W_{h+1}[:,i] at a homogeneous unit, W_h → EW_h with
    W_{h+1} → W_{h+1}E⁻¹ at linear ones. They leave the function as it is and move the
    laws, so that a numerical solution's drift can be undone.

    Its methods take weights of any structure that has the leaves of `weights` in their
    order, or a vector that `unravel` makes into such weights. Of the laws given, it has
    those that generate rescalings, each of them once.

    - `terms`: those of all laws.
    - `places`: of the arrays that the laws are about, among the leaves of the weights.
    - `translations`: those behind the model's linear laws, which rescalings would break.
        They act on what is left of the weights without the part that these can move, and
        the values of laws are those of what is left; the two differ by a constant.

    **Raises:** `ValueError` if there is none, or if one involves an array that is not
    among the weights.
    """

    laws: tuple[Law, ...]
    terms: tuple[TermRef, ...] = eqx.field(static=True)
    places: tuple[int, ...] = eqx.field(static=True)
    unravel: Callable[[Array], PyTree] | None = eqx.field(static=True)
    translations: Translations | None
    structure: Any = eqx.field(static=True)

    def __init__(
        self,
        laws: Iterable[Law],
        weights: PyTree,
        unravel: Callable[[Array], PyTree] | None = None,
        translations: Translations | None = None,
    ):
        self.unravel = unravel
        self.translations = translations
        self.structure = jax.tree.structure(weights)
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
        self.terms = tuple(
            TermRef(k, number[term.path], term)
            for k, law in enumerate(self.laws)
            for term in law.quadratic_terms
        )

    def values(self, weights: PyTree) -> Generator:
        """wᵀAw of each law, a vector over units or a matrix."""
        arrays = self._get_arrays(weights)
        return _sum_by_law(self, _products(self, arrays, arrays))

    def size(self, weights: PyTree) -> Float[Array, ""]:
        """‖w‖² of the arrays that the laws are about."""
        return _size(self._get_arrays(weights))

    def project(
        self,
        weights: PyTree,
        targets: Generator,
        tolerance: Float[Array, ""] | float = 0.0,
    ) -> "Rescaling":
        """The rescaling after which the laws have the values `targets`.

        To first order in a rescaling's generator ξ the laws change by 2Gξ, with G the Gram
        matrix of their gradients. Newton's method needs one or two steps for the drift of
        a solver with usual tolerances. Nothing is rescaled while every law is within
        `tolerance`·‖w‖² of its target, or within rounding.
        """
        arrays = self._get_arrays(weights)
        tolerance = jnp.asarray(tolerance, arrays[0].dtype)
        projected, *others = _project(self, arrays, targets, tolerance)
        return Rescaling(self, self._set_arrays(weights, projected), *others)

    def identity(self, weights: PyTree, targets: Generator) -> "Rescaling":
        """The rescaling that changes nothing, whatever the laws' values are."""
        zeros = jax.tree.map(jnp.zeros_like, targets)
        identity = identity_element(self.laws, zeros)
        return Rescaling(self, weights, identity, zeros, jnp.asarray(True))

    def _get_arrays(self, weights: PyTree) -> Arrays:
        if self.unravel is not None:
            weights = self.unravel(weights)
        leaves = jax.tree.leaves(weights)
        arrays = tuple(leaves[place] for place in self.places)
        fixed = self._fixed_part(leaves)
        return tuple(
            a if f is None else a - f for a, f in zip(arrays, fixed, strict=True)
        )

    def _fixed_part(self, leaves: list[Array]) -> tuple[Array | None, ...]:
        """What translations can move of the arrays, which rescalings leave alone."""
        if self.translations is None:
            return (None,) * len(self.places)
        weights = jax.tree.unflatten(self.structure, leaves)
        component = jax.tree.leaves(self.translations.component(weights))
        return tuple(component[place] for place in self.places)

    def _set_arrays(self, weights: PyTree, arrays: Arrays) -> PyTree:
        if self.unravel is not None:
            weights = self.unravel(weights)
        leaves, structure = jax.tree.flatten(weights)
        fixed = self._fixed_part(leaves)
        for place, array, f in zip(self.places, arrays, fixed, strict=True):
            leaves[place] = array if f is None else array + f
        weights = jax.tree.unflatten(structure, leaves)
        return weights if self.unravel is None else ravel_pytree(weights)[0]


class Rescaling(eqx.Module):
    """An element g of the group, and what it does to the weights that it is for.

    - `projected`: gw, weights of the same function whose laws are at their targets.
    - `residual`: how far each law of w was from its target.
    - `is_identity`: whether g leaves everything as it is.
    """

    group: RescalingGroup
    projected: PyTree
    element: Element
    residual: Generator
    is_identity: Bool[Array, ""]

    def apply_to_weights(self, weights: PyTree) -> PyTree:
        """gv of other weights v, such as those of an earlier step."""
        return self._apply(weights, on_gradients=False)

    def apply_to_gradient(self, gradient: PyTree) -> PyTree:
        """g⁻ᵀ∇L(w), the gradient at gw, where rescalings do not change L."""
        return self._apply(gradient, on_gradients=True)

    def _apply(self, tree: PyTree, *, on_gradients: bool) -> PyTree:
        group = self.group

        def rescale(arrays: Arrays) -> Arrays:
            return apply(
                group.laws, group.terms, self.element, arrays, on_gradients=on_gradients
            )

        arrays = group._get_arrays(tree)
        arrays = lax.cond(self.is_identity, lambda a: a, rescale, arrays)
        return group._set_arrays(tree, arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _project(
    group: RescalingGroup, arrays: Arrays, targets: Generator, tolerance: Array
) -> tuple[Arrays, Element, Generator, Array]:
    """gw, g, how far the laws of w are from their targets, and whether g = 1."""
    start = _evaluate(group, targets, arrays)
    one = identity_element(group.laws, start.residual)
    ignored = _IGNORED / _ROUNDING * _floor(arrays)
    is_identity = start.drift <= jnp.maximum(tolerance, ignored)
    # XLA copies all that a loop carries, even if it makes no step: hence the branch.
    projected, element = lax.cond(
        is_identity,
        lambda: (arrays, one),
        lambda: _solve_by_newton(group, targets, start, one, ~is_identity),
    )
    return projected, element, start.residual, is_identity


def _solve_by_newton(
    group: RescalingGroup,
    targets: Generator,
    start: "_State",
    one: Element,
    is_needed: Array,
) -> tuple[Arrays, Element]:
    floor = _floor(start.arrays)

    def should_continue(now: _Iterate) -> Bool[Array, ""]:
        # Under vmap, both branches run: then a step may not be needed.
        is_drifting = now.state.drift > floor
        return is_drifting & (now.steps < _MAX_STEPS) & now.has_improved & is_needed

    def step(now: _Iterate) -> _Iterate:
        element = compose(_newton_step(group, now.state), now.element)
        state = _evaluate_after(group, targets, start, element)
        has_improved = state.drift < now.state.drift
        state, element = jax.tree.map(
            lambda new, old: jnp.where(has_improved, new, old),
            (state, element),
            (now.state, now.element),
        )
        return _Iterate(state, element, has_improved, now.steps + 1)

    first = _Iterate(start, one, is_needed, jnp.zeros((), jnp.int32))
    element = lax.while_loop(should_continue, step, first).element
    return apply(group.laws, group.terms, element, start.arrays), element


@_project.defjvp
def _project_derivative(group: RescalingGroup, primals, tangents):
    """dg = Σ η_k A_k g and d(gw) = g dw + dg w, with η such that laws follow their targets.

    This is exact where only units are rescaled. Mixings that bring a matrix law to its
    target are unique up to rotations. The choice that Newton's method makes among them is
    not differentiated: that part of the derivative is as small as the drift.
    """
    arrays, targets, tolerance = primals
    d_arrays, d_targets, _ = tangents
    result = projected, element, residual, is_identity = _project(
        group, arrays, targets, tolerance
    )
    state = _evaluate(group, targets, projected)

    def differentiate(tangents):
        d_arrays, d_targets = tangents
        rescaled = apply(group.laws, group.terms, element, d_arrays)
        forms = _sum_by_law(group, _products(group, projected, rescaled))
        wanted = tuple(c / 2 - x for c, x in zip(d_targets, forms, strict=True))
        eta = _solve(group, state, wanted)
        along = tangent(group.laws, group.terms, eta, projected)
        total = tuple(a + b for a, b in zip(rescaled, along, strict=True))
        return total, differential(eta, element)

    def differentiate_identity(tangents):
        return tangents[0], jax.tree.map(jnp.zeros_like, element)

    d_projected, d_element = lax.cond(
        is_identity, differentiate_identity, differentiate, (d_arrays, d_targets)
    )
    no_change = jax.tree.map(jnp.zeros_like, residual)
    no_choice = jnp.zeros((), jax.dtypes.float0)
    return result, (d_projected, d_element, no_change, no_choice)


class _State(NamedTuple):
    """Weights, and how far their laws are from the targets.

    - `arrays`: those that only one law rescales may be those of the start, because of them
        only the products are needed.
    - `products`: of each term, what `Law.product` makes of its array.
    - `size`: ‖w‖²; `drift`: the largest `residual`, relative to it.
    """

    arrays: Arrays
    products: Generator
    size: Float[Array, ""]
    residual: Generator
    drift: Float[Array, ""]


class _Iterate(NamedTuple):
    state: _State
    element: Element
    has_improved: Bool[Array, ""]
    steps: Array


def _evaluate(group: RescalingGroup, targets: Generator, arrays: Arrays) -> _State:
    products = _products(group, arrays, arrays)
    return _make_state(group, targets, arrays, products, _size(arrays))


def _evaluate_after(
    group: RescalingGroup, targets: Generator, start: _State, element: Element
) -> _State:
    """The state after an element has acted on the start.

    Of arrays that only one law rescales the products are enough, whose cost does not grow
    with the length of rows.
    """
    coupled = [t for t in group.terms if _is_coupled(group, t)]
    arrays = apply(group.laws, coupled, element, start.arrays)
    products = list(start.products)
    size = start.size
    for n, (ref, before) in enumerate(zip(group.terms, start.products, strict=True)):
        law = group.laws[ref.law]
        if ref in coupled:
            products[n] = _product(law, ref, arrays, arrays)
        else:
            products[n] = squares_after(ref.term, element[ref.law], before)
            size = size + (
                sum_of_squares(law, products[n]) - sum_of_squares(law, before)
            )
    for i in {ref.array for ref in coupled}:
        size = size + ((arrays[i] ** 2).sum() - (start.arrays[i] ** 2).sum())
    return _make_state(group, targets, arrays, tuple(products), size)


def _make_state(
    group: RescalingGroup,
    targets: Generator,
    arrays: Arrays,
    products: Generator,
    size: Array,
) -> _State:
    values = _sum_by_law(group, products)
    residual = tuple(v - c for v, c in zip(values, targets, strict=True))
    drift = max_magnitude(residual) / jnp.where(size > 0, size, 1)
    return _State(arrays, products, size, residual, drift)


def _is_coupled(group: RescalingGroup, ref: TermRef) -> bool:
    return sum(ref.array == other.array for other in group.terms) > 1


def _floor(arrays: Arrays) -> float:
    """The drift, relative to ‖w‖², that rounding explains."""
    return _ROUNDING * float(jnp.finfo(arrays[0].dtype).eps)


def _gram(group: RescalingGroup, state: _State) -> Gram:
    ridge = _RIDGE * _floor(state.arrays) * state.size
    return make_gram(group.laws, group.terms, state.arrays, state.products, ridge)


def _newton_step(group: RescalingGroup, state: _State) -> Element:
    gram = _gram(group, state)
    # Newton's method leaves an error of the order of drift² in any case.
    accuracy = jnp.maximum(state.drift**2, _floor(state.arrays) / 4)
    wanted = gram.to_frame(tuple(-x / 2 for x in state.residual))
    step = gram.from_frame(gram.solve(wanted, accuracy * state.size / 2))
    return retract(group.laws, limit_length(group.laws, step, _MAX_STEP_LENGTH))


def _solve(group: RescalingGroup, state: _State, b: Generator) -> Generator:
    """η with Gη = b, which JAX differentiates as a linear function of b."""
    gram = _gram(group, state)

    def solve(_, b: Generator) -> Generator:
        return gram.solve(b, _floor(state.arrays) * max_magnitude(b))

    eta = lax.custom_linear_solve(gram.apply, gram.to_frame(b), solve, symmetric=True)
    return gram.from_frame(eta)


def _products(group: RescalingGroup, left: Arrays, right: Arrays) -> Generator:
    """For each term of each law, products of what its units own."""
    return tuple(_product(group.laws[s.law], s, left, right) for s in group.terms)


def _product(law: Law, ref: TermRef, left: Arrays, right: Arrays) -> Array:
    return jnp.atleast_1d(law.product(ref.term, left[ref.array], right[ref.array]))


def _sum_by_law(group: RescalingGroup, products: Generator) -> Generator:
    """For each law the sum over its terms."""
    total: list = [0] * len(group.laws)
    for ref, product in zip(group.terms, products, strict=True):
        total[ref.law] = total[ref.law] + ref.term.coefficient * product
    return tuple(total)


def _size(arrays: Arrays) -> Float[Array, ""]:
    return sum((array**2).sum() for array in arrays)  # pyright: ignore
