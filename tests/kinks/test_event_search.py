"""Where along a step pairs leave their sides, against the roots of polynomials."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import homoflow as hf
from homoflow._kinks import as_system
from homoflow._kinks.filippov._event_location import (
    _NODES,
    Path,
    SideMonitor,
    bracket_first_crossing,
    locate_crossing,
)
from homoflow._kinks.filippov._step import _first_root


class Curves(eqx.Module):
    """A model of one weight θ whose pre-activations are polynomials in θ, x(θ)."""

    theta: Array

    def __call__(self, x):
        powers = self.theta ** jnp.arange(x.size, dtype=x.dtype)
        return jnp.maximum(x @ powers, 0)


#: One step of the flow, along which the weight is θ.
STEP = Path(jnp.zeros(1), jnp.ones((1, 1)))


@jax.jit
def brackets(curves):
    """For sets of curves: the first bracket, and the root in it, its pair and whether.

    A curve is a row of rising coefficients; all are positive at 0.
    """
    pairs = curves.shape[1]
    data = curves[0], jnp.zeros(pairs)
    problem = hf.make_problem(Curves(jnp.zeros(1)), data)
    system = as_system(problem)
    ones, none = jnp.ones((pairs, 1)), jnp.zeros((pairs, 1), bool)

    def search(x):
        shifted = eqx.tree_at(lambda s: s.x, system, x)
        side = ones.astype(jnp.int32)
        monitor = SideMonitor.create(shifted, ones, side, none, jnp.asarray(1.0))
        bracket, monitor = bracket_first_crossing(monitor, STEP, jnp.asarray(1.0))
        return bracket.is_found, *locate_crossing(monitor, STEP, bracket)[:3]

    return jax.lax.map(search, curves)


def first_root(coefficients) -> float:
    """Where a polynomial that is positive at 0 first has a real root in (0, 1]."""
    roots = np.roots(coefficients[::-1])
    real = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
    return float(np.min(real, initial=np.inf))


def quartic(*factors) -> np.ndarray:
    product = np.ones(1)
    for factor in factors:
        product = np.polynomial.polynomial.polymul(product, factor)
    return np.pad(product, (0, 5 - product.size))


def pair_of_roots(middle, apart):
    return [middle**2 - apart**2, -2 * middle, 1.0]


def test_a_return_within_a_small_part_of_a_step_is_found():
    """A pair that crosses and is back 1/30, 1/100, 1/300 of the step later."""
    rng = np.random.default_rng(0)
    middles = rng.uniform(0.05, 0.95, 300)
    aparts = np.repeat([1 / 60, 1 / 200, 1 / 600], 100)
    away = [[1.2, -1.0, 1.0]]  # No real roots.
    curves = np.array(
        [
            [quartic(pair_of_roots(m, a), *away), quartic([1.0])]
            for m, a in zip(middles, aparts, strict=True)
        ]
    )
    bracketed, theta, pair, found = brackets(curves)
    assert np.all(bracketed & found)
    assert np.all(pair == 0)
    np.testing.assert_allclose(theta, middles - aparts, atol=1e-9)
    # Those that stay as far from 0 as the others go beyond it are left alone.
    grazing = [m**2 + a**2 for m, a in zip(middles, aparts, strict=True)]
    curves = np.array(
        [
            [quartic([g, -2 * m, 1.0], *away), quartic([1.0])]
            for m, g in zip(middles, grazing, strict=True)
        ]
    )
    bracketed, _, _, found = brackets(curves)
    assert not np.any(bracketed | found)


def test_the_first_of_many_crossings_is_found():
    """Random quartics, 6 pairs at a time, against NumPy's roots."""
    rng = np.random.default_rng(1)
    curves = rng.normal(size=(300, 6, 5))
    curves[..., 0] = rng.uniform(0.05, 2, (300, 6))
    roots = np.array([[first_root(c) for c in pairs] for pairs in curves])
    first = np.min(roots, 1)
    crosses = first <= 1
    assert 50 < np.sum(crosses) < 290  # Both happen.
    _, theta, pair, found = brackets(curves)
    np.testing.assert_array_equal(found, crosses)
    np.testing.assert_array_equal(
        np.asarray(pair)[crosses], np.argmin(roots, 1)[crosses]
    )
    np.testing.assert_allclose(np.asarray(theta)[crosses], first[crosses], atol=1e-9)


def test_a_crossing_that_only_the_interpolant_has_is_none():
    """θ⁹ is not a quartic: where the interpolant dips below 0 the pair does not."""
    ninth = np.zeros(10)
    ninth[[0, 9]] = 1e-3, 1.0
    interpolant = np.polynomial.polynomial.polyfit(
        _NODES, np.polynomial.polynomial.polyval(_NODES, ninth), 4
    )
    assert first_root(interpolant) < 1
    bracketed, _, _, found = brackets(ninth[None, None])
    assert bracketed[0]
    assert not found[0]


def test_the_first_root_of_two_parabolas_is_predicted():
    """With one root, two or none, in and beyond the step, against NumPy's roots."""
    rng = np.random.default_rng(2)
    curves = rng.normal(size=(300, 2, 3))
    curves[..., 0] = rng.uniform(0.05, 2, (300, 2))
    values = curves @ np.vander([0, 0.5, 1], 3, increasing=True).T
    found = jax.vmap(_first_root)(*np.moveaxis(jnp.asarray(values), 2, 0))
    positive = [
        [r.real for c in pairs for r in np.roots(c[::-1]) if r.imag == 0 and r.real > 0]
        for pairs in curves
    ]
    expected = [min(roots, default=np.inf) for roots in positive]
    assert 10 < np.sum(np.isinf(expected)) < 290  # Both happen.
    np.testing.assert_allclose(found, expected, rtol=1e-9)
