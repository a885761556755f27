"""The search for the mode at a point against SciPy's bounded least squares.

Where kinks are independent of each other, ẇ = −(g + Jᵀλ) is shortest among all multipliers
in their intervals. Rows may be dependent: then λ is not unique, but ẇ is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear
from toys import relu_regression

import homoflow as hf
from homoflow._kinks import as_system
from homoflow._kinks._field import Groups, Point
from homoflow._kinks._mode import find_mode
from homoflow._kinks._system import Rows
from homoflow._problem import pose

PAIRS, ROOM = 12, 14


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
        zero, none = jnp.zeros(()), jnp.zeros(ROOM)
        point = Point(
            loss=zero, largest=zero, gradient=gradient, rows=Rows(rows, [], []),
            scale=used.astype(float), gram=rows @ rows.T, rates=rows @ gradient,
            jump=width, above=jnp.zeros((ROOM, ROOM)), gap=jnp.ones(ROOM), off=none,
        )  # fmt: skip
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
