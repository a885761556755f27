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
from homoflow._kinks._system import Rows
from homoflow._kinks.filippov._sliding_field import (
    MOST_ON_ONE_THREAD,
    Groups,
    Point,
    gram_solver,
)
from homoflow._kinks.filippov._sliding_mode import find_mode
from homoflow._problem._problem import pose

PAIRS, ROOM = 12, 14


def point_of(rows, gradient, width, used) -> Point:
    """Rows of length 1 (or unused), independent of each other in their samples."""
    zero, room = jnp.zeros(()), used.size
    return Point(
        loss=zero, largest=zero, gradient=gradient, rows=Rows(rows, [], []),
        scale=used.astype(float), gram=rows @ rows.T, rates=rows @ gradient,
        jump=width, above=jnp.zeros((room, room)), gap=jnp.ones(room),
        off=jnp.zeros(room),
    )  # fmt: skip


@pytest.fixture(scope="module")
def search():
    """From J, g, widths, sides before, base sides: settled, multipliers, states."""
    problem = pose(
        *relu_regression(),
        loss=hf.SquaredLoss(),
        objective=None,
        trainable=None,
        laws=(),
    )
    system = as_system(problem)
    numbers = jnp.arange(ROOM, dtype=jnp.int32)
    used = numbers < PAIRS

    @jax.jit
    def of(rows, gradient, width, start, on_plus):
        point = point_of(rows, gradient, width, used)
        alone = Groups(numbers, jnp.ones_like(numbers))
        mode = find_mode(system, point, alone, used, on_plus, start, jnp.asarray(True))
        return mode.is_settled, mode.multiplier, mode.state

    return of


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_the_velocity_is_the_shortest(search, rank):
    rng = np.random.default_rng(rank)
    for _ in range(100):
        rows = np.zeros((ROOM, 20))
        rows[:PAIRS] = rng.standard_normal((PAIRS, rank)) @ rng.standard_normal(
            (rank, 20)
        )
        rows[:PAIRS] /= np.linalg.norm(rows[:PAIRS], axis=1)[:, None]
        gradient, width = rng.standard_normal(20), rng.exponential(size=ROOM)
        start = rng.integers(-1, 2, ROOM).astype(np.int32)
        on_plus = rng.random(ROOM) < 0.5
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


@pytest.mark.parametrize("room", [MOST_ON_ONE_THREAD + 20, 40])
@pytest.mark.parametrize("reach", [MOST_ON_ONE_THREAD, MOST_ON_ONE_THREAD + 1, 30])
def test_sliders_in_any_slots_are_solved_for(room, reach):
    """Up to the slot `reach`: beyond a limit all slots are factorized, not the first."""
    reach, rng = min(reach, room), np.random.default_rng(reach)
    rows = rng.standard_normal((room, 300))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    slides = rng.random(room) < 0.8
    slides[reach - 1 :] = np.arange(reach - 1, room) == reach - 1
    point = point_of(
        jnp.asarray(rows), jnp.ones(300), jnp.ones(room), jnp.ones(room, bool)
    )
    right = rng.standard_normal((room, 2))
    solve, outside = gram_solver(point, jnp.asarray(slides))
    expected = np.zeros((room, 2))
    few = rows[slides]
    expected[slides] = np.linalg.solve(few @ few.T, right[slides])
    np.testing.assert_allclose(solve(jnp.asarray(right)), expected, atol=1e-11)
    factor = np.linalg.cholesky(few @ few.T)
    np.testing.assert_allclose(outside[slides], np.diagonal(factor), rtol=1e-11)
    assert np.all(outside[~slides] == 1)
