"""`compare` against NumPy, on trajectories written by hand and on real ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Neuron, flat, linear_regression, relu_regression

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
X = np.array([[1.0, 2.0], [-1.0, 0.5], [0.25, 3.0]])


def trajectory(
    ts, weights, *, result=hf.RESULTS.successful, laws=(), save_models=True, **facts
) -> hf.Trajectory:
    """A run of a `Neuron` that passed through `weights` at `ts`; losses are Σw."""
    weights = jnp.asarray(weights)
    losses = jnp.sum(weights, axis=1)
    numbers = {"time_reached": jnp.asarray(float(ts[-1]))}
    if "error_estimate" in facts:
        numbers["error_estimate"] = jnp.asarray(facts.pop("error_estimate"))
    facts = {"time_unit": "flow time", "solver": "Tsit5", **facts}
    return hf.Trajectory(
        ts=jnp.asarray(ts, float),
        losses=losses,
        laws={name: losses[:, None] * jnp.arange(1.0, 3.0) for name in laws},
        grad_norms=losses,
        squared_norms={"w": jnp.sum(weights**2, axis=1)},
        model=Neuron(weights[-1]),
        models=Neuron(weights) if save_models else None,
        result=result,
        stats=hf.Stats(numbers, tuple(facts.items())),
    )


def line(ts, offset=0.0) -> np.ndarray:
    """Weights that move linearly, so that linear interpolation is exact."""
    return np.stack([1 + np.asarray(ts), 2 - 3 * np.asarray(ts) + offset], axis=1)


def on_arrays(fn, tree):
    return jax.tree.map(lambda leaf: fn(leaf) if eqx.is_array(leaf) else leaf, tree)


FINE, COARSE = np.linspace(0, 1, 11), np.linspace(0, 1, 6)


def outputs(weights) -> np.ndarray:
    return np.tanh(np.asarray(weights) @ X.T)


def root_mean_square(difference) -> np.ndarray:
    return np.sqrt(np.mean(difference**2, axis=-1))


def known(values) -> np.ndarray:
    assert values is not None
    return np.asarray(values)


def test_shared_times_are_used_as_they_are():
    a = trajectory(FINE, line(FINE), laws=("p", "q"))
    b = trajectory(COARSE, line(COARSE, 0.5), laws=("q", "r"))
    both = hf.compare(a, b)
    np.testing.assert_array_equal(both.ts, FINE[::2])
    np.testing.assert_array_equal(both.losses_a, line(FINE)[::2].sum(1))
    np.testing.assert_array_equal(both.losses_b, line(COARSE, 0.5).sum(1))
    assert list(both.laws_a) == list(both.laws_b) == ["q"]
    np.testing.assert_array_equal(both.laws_a["q"], a.laws["q"][::2])
    np.testing.assert_array_equal(both.laws_b["q"], b.laws["q"])
    assert both.notes == ()


def test_times_that_differ_by_rounding_are_shared():
    in_float32 = np.float32(0.1) * np.arange(11, dtype=np.float32)
    a = trajectory(FINE, line(FINE))
    b = trajectory(in_float32, line(FINE))
    both = hf.compare(a, b)
    assert len(both.ts) == 11
    assert both.notes == ()


@pytest.mark.parametrize("swap", [False, True])
def test_other_times_are_interpolated_with_a_note(swap):
    shifted = np.linspace(0.05, 0.95, 4)
    a = trajectory(FINE, line(FINE), laws=("p",))
    b = trajectory(shifted, line(shifted, 0.5), laws=("p",))
    both = hf.compare(b, a) if swap else hf.compare(a, b)
    np.testing.assert_allclose(both.ts, shifted)
    fine, coarse = (both.losses_a, both.losses_b)[:: -1 if swap else 1]
    np.testing.assert_allclose(fine, line(shifted).sum(1), rtol=1e-14)
    np.testing.assert_allclose(coarse, line(shifted, 0.5).sum(1), rtol=1e-14)
    laws = both.laws_b if swap else both.laws_a
    np.testing.assert_allclose(
        laws["p"], line(shifted).sum(1)[:, None] * [1, 2], rtol=1e-14
    )
    assert both.weight_distances is None
    assert any("interpolated" in note for note in both.notes)


def test_distances_at_the_end_are_numpys():
    a = trajectory(FINE, line(FINE), save_models=False)
    b = trajectory(FINE, line(FINE, 0.5))
    both = hf.compare(a, b, X)
    end_a, end_b = line(FINE)[-1], line(FINE, 0.5)[-1]
    distance = np.linalg.norm(end_a - end_b)
    np.testing.assert_allclose(both.weight_distance, distance)
    np.testing.assert_allclose(
        both.relative_weight_distance, distance / np.linalg.norm(end_a)
    )
    np.testing.assert_allclose(
        known(both.function_distance), root_mean_square(outputs(end_a) - outputs(end_b))
    )
    assert both.weight_distances is None
    assert both.function_distances is None


def test_distances_along_the_way_are_numpys():
    a, b = trajectory(FINE, line(FINE)), trajectory(COARSE, line(COARSE, 0.5) ** 2)
    both = hf.compare(a, b, X)
    weights_a, weights_b = line(FINE)[::2], line(COARSE, 0.5) ** 2
    np.testing.assert_allclose(
        known(both.weight_distances), np.linalg.norm(weights_a - weights_b, axis=1)
    )
    np.testing.assert_allclose(
        known(both.function_distances),
        root_mean_square(outputs(weights_a) - outputs(weights_b)),
    )
    assert hf.compare(a, b).function_distances is None


def test_distances_of_weights_whose_squares_are_zero():
    a, b = (trajectory(FINE, 1e-170 * line(FINE, c)) for c in (0.0, 0.5))
    plain = hf.compare(trajectory(FINE, line(FINE)), trajectory(FINE, line(FINE, 0.5)))
    relative = hf.compare(a, b).relative_weight_distance
    np.testing.assert_allclose(relative, plain.relative_weight_distance, rtol=1e-14)


def test_functions_with_several_outputs_are_compared_by_all_of_them():
    """Of a dictionary with a complex array and an integer: 0.6 and 0.8 of one output."""

    class Several(Neuron):
        def __call__(self, x):
            z = super().__call__(x)
            parts = {"real": 0.6 * z, "complex": jax.lax.complex(0.48 * z, 0.64 * z)}
            return {**parts, "class": jnp.argmax(jnp.stack([z, -z]))}

    def several(weights):
        run = trajectory(FINE, weights, save_models=False)
        return eqx.tree_at(lambda t: t.model, run, Several(jnp.asarray(weights[-1])))

    weights = line(FINE), line(FINE, 0.5)
    (a, b), (c, d) = map(several, weights), (trajectory(FINE, w) for w in weights)
    both, plain = hf.compare(a, b, X), hf.compare(c, d, X)
    np.testing.assert_allclose(
        known(both.function_distance), known(plain.function_distance), rtol=1e-14
    )


def test_functions_without_numbers_are_refused():
    class Class(Neuron):
        def __call__(self, x):
            return jnp.argmax(x)

    run = trajectory(FINE, line(FINE), save_models=False)
    run = eqx.tree_at(lambda t: t.model, run, Class(run.model.w))
    with pytest.raises(ValueError, match="no floating-point numbers"):
        hf.compare(run, run, X)


def test_a_run_equals_itself():
    a = trajectory(FINE, line(FINE), laws=("p",))
    both = hf.compare(a, a, X)
    assert both.weight_distance == both.function_distance == 0
    assert not np.any(both.weight_distances)
    assert both.notes == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param(
            {"result": hf.RESULTS.nonfinite}, "did not finish", id="unfinished"
        ),
        pytest.param({"time_unit": "sum of learning rates"}, "clock of b", id="clock"),
        pytest.param({"error_estimate": 3e-3}, "estimated at 0.003", id="approximate"),
    ],
)
def test_what_to_know_before_believing_the_numbers_is_noted(changes, said):
    a, b = trajectory(FINE, line(FINE)), trajectory(FINE, line(FINE), **changes)
    (note,) = hf.compare(a, b).notes
    assert said in note
    assert note in repr(hf.compare(a, b))


@pytest.mark.parametrize(
    ("ends", "said"),
    [((11, 7), "1 and 0.6"), ((4, 11), "0.3 and 1"), ((5, 6), "0.4 and 0.5")],
)
def test_different_ends_are_noted(ends, said):
    a, b = (trajectory(FINE[:n], line(FINE[:n])) for n in ends)
    (note,) = hf.compare(a, b).notes
    assert f"different times, {said}" in note


def test_no_common_time_is_refused():
    later = trajectory(FINE + 2, line(FINE + 2))
    with pytest.raises(ValueError, match="no time in common"):
        hf.compare(trajectory(FINE, line(FINE)), later)


def test_models_of_different_structure_are_refused():
    a = trajectory(FINE, line(FINE))
    other = eqx.tree_at(lambda t: t.model, a, {"w": a.model.w})
    with pytest.raises(ValueError, match="different structure"):
        hf.compare(a, other)


def test_batched_trajectories_are_refused_with_a_way_out():
    a = trajectory(FINE, line(FINE))
    batch = on_arrays(lambda leaf: jnp.stack([leaf, leaf]), a)
    with pytest.raises(ValueError, match=r"a\[0\] if eqx"):
        hf.compare(batch, batch)
    first = on_arrays(lambda leaf: leaf[0], batch)
    assert hf.compare(first, a).weight_distance == 0


def test_traced_trajectories_are_refused():
    a = trajectory(FINE, line(FINE))
    with pytest.raises(ValueError, match="known values"):
        jax.jit(
            lambda losses: hf.compare(a, eqx.tree_at(lambda t: t.losses, a, losses))
        )(a.losses)


def test_both_halves_on_one_clock():
    model, data = linear_regression()
    flow = hf.flow(model, data, 5.0, save_models=True)
    run = hf.descend(
        model, data, 500, learning_rate=0.01, record_every=5, save_models=True
    )
    both = hf.compare(flow, run, data[0])
    assert len(both.ts) == 101
    assert both.notes == ()
    difference = flat(flow.model) - flat(run.model)
    np.testing.assert_allclose(both.weight_distance, np.linalg.norm(difference))
    np.testing.assert_allclose(
        known(both.weight_distances)[-1], both.weight_distance, rtol=1e-6
    )
    # Euler's error, not zero: the two are different maps.
    assert 1e-5 < known(both.weight_distances).max() < 0.05


def test_adam_and_approximate_flows_are_told_apart_from_exact_ones():
    model, data = relu_regression()
    flow = hf.flow(model, data, 1.0, solver=hf.Averaged())
    run = hf.descend(model, data, 20, learning_rate=0.05, optimizer=optax.adam)
    notes = hf.compare(flow, run).notes
    assert len(notes) == 2
    assert "a is an approximate flow" in notes[0]
    assert "The clock of b: sum of learning rates" in notes[1]
