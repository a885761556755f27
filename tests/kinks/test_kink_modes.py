"""The search for the mode at a point against SciPy's bounded least squares.

Where kinks are independent of each other, ẇ = −(g + Jᵀλ) is shortest among all multipliers
in their intervals. Rows may be dependent: then λ is not unique, but ẇ is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relu_regression
from scipy.optimize import lsq_linear

import homoflow as hf
from homoflow._kinks import as_system
from homoflow._kinks._rows import Rows
from homoflow._kinks.filippov._sliding_field import (
    MAX_ON_ONE_THREAD,
    Groups,
    Linearization,
    factorize_gram,
    in_first_slots,
)
from homoflow._kinks.filippov._sliding_mode import find_mode

PAIRS, CAPACITY = 12, 14


def linearization(rows, gradient, width, is_used) -> Linearization:
    """Rows of length 1 (or unused), independent of each other in their samples."""
    capacity = is_used.size
    return Linearization(
        loss=jnp.zeros(()),
        num_used=jnp.asarray(capacity),
        gradient=gradient,
        rows=Rows(rows, [], []),
        scale=is_used.astype(float),
        gram=rows @ rows.T,
        row_dot_gradient=rows @ gradient,
        residual=jnp.zeros(capacity),
        slope_gap=jnp.ones(capacity),
        dloss_da=width,
        dz_da=jnp.zeros((capacity, capacity)),
    )


@pytest.fixture(scope="module")
def search():
    """From J, g, widths, sides before, base sides: settled, multipliers, states."""
    problem = hf.make_problem(*relu_regression())
    system = as_system(problem)
    slots = jnp.arange(CAPACITY, dtype=jnp.int32)
    is_used = slots < PAIRS

    @jax.jit
    def find(rows, gradient, width, start, on_plus):
        at = linearization(rows, gradient, width, is_used)
        alone = Groups(slots, jnp.ones_like(slots), jnp.zeros_like(is_used))
        mode = find_mode(system, at, alone, is_used, on_plus, start, jnp.asarray(True))
        return mode.is_settled, mode.multiplier, mode.state

    return find


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_the_velocity_is_the_shortest(search, rank):
    rng = np.random.default_rng(rank)
    for _ in range(100):
        rows = np.zeros((CAPACITY, 20))
        rows[:PAIRS] = rng.standard_normal((PAIRS, rank)) @ rng.standard_normal(
            (rank, 20)
        )
        rows[:PAIRS] /= np.linalg.norm(rows[:PAIRS], axis=1)[:, None]
        gradient, width = rng.standard_normal(20), rng.exponential(size=CAPACITY)
        start = rng.integers(-1, 2, CAPACITY).astype(np.int32)
        on_plus = rng.random(CAPACITY) < 0.5
        settled, multiplier, state = search(rows, gradient, width, start, on_plus)
        assert settled
        # A multiplier counts from the base slope; `gradient` is the one there.
        low, high = -width * on_plus, width * ~on_plus
        tolerance = 1e-9 * width.max()
        assert np.all(multiplier >= low - tolerance)
        assert np.all(multiplier <= high + tolerance)
        velocity = -(gradient + rows.T @ np.asarray(multiplier))
        best = lsq_linear(
            rows[:PAIRS].T,
            -gradient,
            (low[:PAIRS], high[:PAIRS]),
            method="bvls",
            tol=1e-14,
        )
        expected = -(gradient + rows[:PAIRS].T @ best.x)
        np.testing.assert_allclose(velocity, expected, atol=1e-9)
        rate, side = rows @ velocity, np.asarray(state)
        assert np.all(side[:PAIRS] * rate[:PAIRS] >= -1e-9)


@pytest.mark.parametrize("capacity", [MAX_ON_ONE_THREAD + 20, 40])
@pytest.mark.parametrize("reach", [MAX_ON_ONE_THREAD, MAX_ON_ONE_THREAD + 1, 30])
def test_sliders_in_any_slots_are_solved_for(capacity, reach):
    """Up to the slot `reach`: beyond a limit all slots are factorized, not the first."""
    reach, rng = min(reach, capacity), np.random.default_rng(reach)
    rows = rng.standard_normal((capacity, 300))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    slides = rng.random(capacity) < 0.8
    slides[reach - 1 :] = np.arange(reach - 1, capacity) == reach - 1
    rows = jnp.asarray(rows)
    right = rng.standard_normal((capacity, 2))
    solve, outside = factorize_gram(rows @ rows.T, jnp.asarray(slides))
    expected = np.zeros((capacity, 2))
    few = np.asarray(rows)[slides]
    expected[slides] = np.linalg.solve(few @ few.T, right[slides])
    np.testing.assert_allclose(solve(jnp.asarray(right)), expected, atol=1e-11)
    factor = np.linalg.cholesky(few @ few.T)
    np.testing.assert_allclose(outside[slides], np.diagonal(factor), rtol=1e-11)
    assert np.all(outside[~slides] == 1)


@pytest.mark.parametrize("used", [0, 10, 11, 21])
def test_a_table_is_made_in_as_few_slots_as_are_used(used):
    """Of 40 slots 10, 20 or all are looked at: the rest of a table is 0."""
    values = np.random.default_rng(used).standard_normal((40, 40))
    num_used, seen = jnp.asarray(used), []

    def compute(n):
        seen.append(n)
        return jnp.asarray(values)[:n, :n] * n

    found = np.asarray(in_first_slots(num_used, 40, compute))
    assert sorted(set(seen)) == [10, 20, 40]
    n = next(n for n in (10, 20, 40) if used <= n)
    np.testing.assert_array_equal(found[:n, :n], values[:n, :n] * n)
    assert not np.any(found[n:])
    assert not np.any(found[:, n:])
    column = in_first_slots(num_used, 40, lambda n: jnp.ones((n, 3)))
    np.testing.assert_array_equal(column, (np.arange(40) < n)[:, None] * np.ones(3))
