"""Where the gradient flow goes from the iterates of a descent."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Scalars(eqx.Module):
    x: jax.Array
    y: jax.Array


def objective(model, target):
    return 0.5 * (model.x * model.y - target) ** 2


TARGET, ETA = 3.0, 0.3


@pytest.fixture(scope="module")
def descent():
    model = Scalars(jnp.asarray(3.0), jnp.asarray(1.1))
    return hf.descend(
        model, TARGET, 30, learning_rate=ETA, objective=objective, save_models=True
    )


def test_ends_are_where_what_is_conserved_says(descent):
    """xy = c with x² − y² = D of the start: λ_max = x² + y² = √(D² + 4c²)."""
    ends = hf.flow_solution(descent, TARGET, every=3, objective=objective)
    x, y = (np.asarray(w)[::3] for w in (descent.models.x, descent.models.y))
    wanted = np.hypot(x**2 - y**2, 2 * TARGET)
    np.testing.assert_array_equal(ends.ts, descent.ts[::3])
    np.testing.assert_allclose(ends.sharpness, wanted, rtol=1e-6)
    np.testing.assert_allclose(ends.models.x * ends.models.y, TARGET, rtol=1e-8)
    np.testing.assert_allclose(ends.losses, 0, atol=1e-14)
    moved = np.hypot(ends.models.x - x, ends.models.y - y)
    np.testing.assert_allclose(ends.distances, moved, rtol=1e-12)
    assert set(ends.results) == {"successful"}
    assert set(ends.kinds) == {"minimum"}
    # It falls although the iterates jump [Kreisler et al. 2023].
    assert np.all(np.diff(ends.sharpness) < 1e-8)
    assert np.any(np.diff(x * y) > 0.1)
    assert np.any(np.diff(x * y) < -0.1)
    assert "11 of 11 flows ended" in repr(ends)


def test_a_flow_without_an_end_is_no_number(descent):
    ends = hf.flow_solution(descent, TARGET, every=30, objective=objective, max_steps=1)
    assert ends.results[0] == "end_not_reached"
    assert np.isnan(ends.losses[0])
    assert np.isnan(ends.sharpness[0])
    assert np.isnan(ends.distances[0])


def test_a_direction_in_which_weights_diverge_is_no_point():
    x = jax.random.normal(jax.random.key(0), (6, 2))
    data = (x, jnp.sign(x[:, :1]))
    model = hf.MLP((2, 1), activation="linear", key=jax.random.key(1))
    run = hf.flow(model, data, 1.0, loss=hf.LogisticLoss(), save_models=True)
    ends = hf.flow_solution(run, data, every=100, loss=hf.LogisticLoss())
    assert set(ends.results) == {"no_stationary_point"}
    assert np.all(np.isnan(ends.losses))
    assert np.all(np.isnan(ends.sharpness))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda run: dataclasses.replace(run, models=None), "save_models=True"),
        (lambda run: jax.tree.map(lambda a: jnp.stack([a, a]), run), "one run"),
        (
            lambda run: dataclasses.replace(run, losses=jnp.nan * run.losses),
            "no finite loss",
        ),
    ],
)
def test_runs_that_will_not_do_are_refused(descent, change, match):
    with pytest.raises(ValueError, match=match):
        hf.flow_solution(change(descent), TARGET, objective=objective)
