"""Gradient descent against Euler's method, hand-written loops and exact rates."""

import functools
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import Array
from oracles import relu_gradient
from problems import (
    SAMPLES,
    arrays_of,
    flat,
    linear_regression,
    problems,
    relu_regression,
    saved,
)

import homoflow as hf

STEPS = 20
RATE = 0.05


# Hand-written loops. A rule is (weights, gradient, memory, step) -> (weights, memory).


def sgd(w, g, memory, step, rate=RATE):
    return w - rate * g, memory


def heavy_ball(w, g, memory, step, momentum=0.9):
    velocity = g + (0 if memory is None else momentum * memory)
    return w - RATE * velocity, velocity


def nesterov(w, g, memory, step, momentum=0.9):
    velocity = g + (0 if memory is None else momentum * memory)
    return w - RATE * (g + momentum * velocity), velocity


def adam(w, g, memory, step, b1=0.9, b2=0.999, eps=1e-8):
    first, second = (0, 0) if memory is None else memory
    first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
    corrected = first / (1 - b1 ** (step + 1)), second / (1 - b2 ** (step + 1))
    return w - RATE * corrected[0] / (np.sqrt(corrected[1]) + eps), (first, second)


def decayed(w, g, memory, step, decay=0.1):
    return w - RATE * (g + decay * w), memory


def scheduled(w, g, memory, step):
    return w - 0.1 * 0.9**step * g, memory


def stepped(w, g, memory, step):
    return w - (0.1 if step < 9 else 0.05) * g, memory


def clipped(w, g, memory, step, largest=0.05):
    return w - RATE * np.clip(g, -largest, largest), memory


def numpy_run(model, batches, rule: Callable = sgd) -> np.ndarray:
    """Weights (all layers in a row) before each step and at the end."""
    weights = arrays_of(model)
    memories = [None] * len(weights)
    history = [flat(model)]
    for step, (x, y) in enumerate(batches):
        gradients = relu_gradient(weights, np.asarray(x), np.asarray(y))
        moved = [
            rule(w, g, memory, step)
            for w, g, memory in zip(weights, gradients, memories, strict=True)
        ]
        weights, memories = [w for w, _ in moved], [m for _, m in moved]
        history.append(np.concatenate([w.ravel() for w in weights]))
    return np.stack(history)


def history_of(trajectory: hf.Trajectory) -> np.ndarray:
    """The saved models' weights, one row for each recorded step."""
    leaves = arrays_of(trajectory.models)
    return np.concatenate([w.reshape(len(w), -1) for w in leaves], axis=1)


def descend(problem=linear_regression, steps=STEPS, **options) -> hf.Trajectory:
    options = {"learning_rate": RATE, "save_models": True, **options}
    model, data = problem()
    return hf.descend(model, data, steps, **options)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        pytest.param({}, sgd, id="gradient descent"),
        pytest.param(
            {"optimizer": functools.partial(optax.sgd, momentum=0.9)},
            heavy_ball,
            id="heavy ball",
        ),
        pytest.param(
            {"optimizer": functools.partial(optax.sgd, momentum=0.9, nesterov=True)},
            nesterov,
            id="Nesterov",
        ),
        pytest.param({"optimizer": optax.adam}, adam, id="Adam"),
        pytest.param(
            {
                "optimizer": lambda rate: optax.chain(
                    optax.add_decayed_weights(0.1), optax.sgd(rate)
                )
            },
            decayed,
            id="weight decay",
        ),
        pytest.param(
            {"optimizer": lambda rate: optax.chain(optax.clip(0.05), optax.sgd(rate))},
            clipped,
            id="clipping",
        ),
        pytest.param(
            # Powers of two: Optax computes schedules in single precision.
            {"learning_rate": optax.piecewise_constant_schedule(0.1, {9: 0.5})},
            stepped,
            id="schedule",
        ),
        pytest.param(
            {"learning_rate": lambda count: 0.1 * 0.9**count},
            scheduled,
            id="schedule in Python",
        ),
        pytest.param(
            {"loss": hf.SquaredLoss(reduction="sum")},
            functools.partial(sgd, rate=SAMPLES * RATE),
            id="sum",
        ),
    ],
)
def test_equals_a_hand_written_loop(options, rule):
    model, data = linear_regression()
    expected = numpy_run(model, [data] * STEPS, rule)
    run = descend(**options)
    np.testing.assert_allclose(history_of(run), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(flat(run.model), expected[-1], rtol=0, atol=1e-12)


def test_losses_and_norms_are_those_of_the_weights_before_each_step():
    model, (x, y) = relu_regression()
    run = descend(relu_regression)
    history = numpy_run(model, [(x, y)] * STEPS)
    np.testing.assert_allclose(history_of(run), history, rtol=0, atol=1e-12)
    first = history[:, : 8 * 3].reshape(-1, 8, 3)
    second = history[:, 8 * 3 :].reshape(-1, 2, 8)
    x, y = np.asarray(x), np.asarray(y)
    hidden = np.maximum(x @ first.swapaxes(1, 2), 0)
    residual = hidden @ second.swapaxes(1, 2) - y
    losses = 0.5 * np.sum(residual**2, axis=(1, 2)) / SAMPLES
    np.testing.assert_allclose(run.losses, losses, rtol=1e-12)
    gradients = relu_gradient([first, second], x, y)
    norms = np.sqrt(sum(np.sum(g**2, axis=(1, 2)) for g in gradients))
    np.testing.assert_allclose(run.grad_norms, norms, rtol=1e-12)
    balance = np.sum(first**2, axis=2) - np.sum(second**2, axis=1)
    np.testing.assert_allclose(run.laws["neurons[1]"], balance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("problem", problems("two outputs"))
def test_equals_diffrax_euler(problem):
    run, (model, data) = descend(problem), problem()
    flow = hf.flow(
        model, data, STEPS * RATE, solver=dfx.Euler(), dt0=RATE, ts=run.ts,
        save_models=True,
    )  # fmt: skip
    np.testing.assert_allclose(history_of(run), history_of(flow), rtol=0, atol=1e-12)
    np.testing.assert_allclose(run.losses, flow.losses, rtol=1e-12)
    np.testing.assert_allclose(run.grad_norms, flow.grad_norms, rtol=1e-11)
    for name, values in run.laws.items():
        np.testing.assert_allclose(values, flow.laws[name], rtol=0, atol=1e-12)


# Minibatches. On orthonormal inputs with a linear loss every update shows its batch.


class Scores(eqx.Module):
    w: Array

    def __call__(self, x):
        return jnp.dot(self.w, x)


def minus_prediction(prediction, target):
    return -prediction


def batches_drawn(key, batch_size: int, steps: int) -> np.ndarray:
    """Indices of the samples that each step used, sorted, read off the weights."""
    data = jnp.eye(SAMPLES), jnp.zeros(SAMPLES)
    run = hf.descend(
        Scores(jnp.zeros(SAMPLES)), data, steps, learning_rate=1.0,
        loss=minus_prediction,
        batch_size=batch_size, key=key, save_models=True,
    )  # fmt: skip
    weights = np.asarray(saved(run).w)
    shares = (weights[1:] - weights[:-1]) * batch_size
    np.testing.assert_allclose(shares, np.round(shares), atol=1e-12)
    return np.stack([np.flatnonzero(row > 0.5) for row in shares])


@pytest.mark.parametrize("batch_size", [4, 5])
def test_each_epoch_visits_every_sample_at_most_once_in_a_new_order(batch_size):
    per_epoch = SAMPLES // batch_size
    batches = batches_drawn(jr.key(0), batch_size, 6 * per_epoch)
    epochs = batches.reshape(6, per_epoch * batch_size)
    assert all(len(set(epoch)) == per_epoch * batch_size for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    assert set(epochs.ravel().tolist()) == set(range(SAMPLES))
    again = batches_drawn(jr.key(0), batch_size, 6 * per_epoch)
    np.testing.assert_array_equal(batches, again)
    other = batches_drawn(jr.key(1), batch_size, 6 * per_epoch)
    assert np.any(batches != other)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1), ("sum", SAMPLES)])
def test_stochastic_descent_replays_its_batches(reduction, scale):
    model, (x, y) = linear_regression()
    key = jr.key(2)
    run = descend(
        batch_size=5, key=key, loss=hf.SquaredLoss(reduction=reduction),
        learning_rate=RATE / scale,
    )  # fmt: skip
    batches = [(x[i], y[i]) for i in batches_drawn(key, 5, STEPS)]
    expected = numpy_run(model, batches)
    np.testing.assert_allclose(history_of(run), expected, rtol=0, atol=1e-12)
    # What is recorded is of the full data set, not of a batch.
    residual = np.asarray(x) @ expected.reshape(-1, 2, 3).swapaxes(1, 2) - np.asarray(y)
    losses = 0.5 * scale * np.sum(residual**2, axis=(1, 2)) / SAMPLES
    np.testing.assert_allclose(run.losses, losses, rtol=1e-12)


# Recording and the clock.


@pytest.mark.parametrize("every", [5, 7, 100])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_recording_less_often_changes_nothing_else(every, batch_size):
    options = {} if batch_size is None else {"batch_size": batch_size, "key": jr.key(3)}
    all_steps = descend(**options)
    some = descend(record_every=every, **options)
    recorded = [*range(0, STEPS, every), STEPS]
    np.testing.assert_array_equal(some.ts, all_steps.ts[jnp.array(recorded)])
    for name in ("losses", "grad_norms"):
        expected = np.asarray(getattr(all_steps, name))[recorded]
        np.testing.assert_allclose(getattr(some, name), expected, rtol=1e-13)
    np.testing.assert_allclose(
        history_of(some), history_of(all_steps)[recorded], rtol=1e-13
    )
    np.testing.assert_allclose(flat(some.model), flat(all_steps.model), rtol=1e-13)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        pytest.param({}, RATE * np.arange(STEPS + 1), id="constant"),
        pytest.param(
            {"learning_rate": optax.exponential_decay(0.1, 1, 0.9)},
            np.cumsum([0, *(0.1 * 0.9 ** np.arange(STEPS))]),
            id="schedule",
        ),
        pytest.param(
            {"optimizer": functools.partial(optax.sgd, momentum=0.9)},
            10 * RATE * np.arange(STEPS + 1),
            id="heavy ball",
        ),
        pytest.param(
            {"optimizer": functools.partial(optax.sgd, momentum=0.9, nesterov=True)},
            10 * RATE * np.arange(STEPS + 1),
            id="Nesterov",
        ),
        pytest.param({"optimizer": optax.adam}, RATE * np.arange(STEPS + 1), id="Adam"),
    ],
)
def test_clock_is_the_flows_time(options, times):
    run = descend(**options)
    np.testing.assert_allclose(run.ts, times, rtol=1e-12)
    assert run.stats["time_unit"].startswith("flow time") == (
        options.get("optimizer") is not optax.adam
    )


# Rates: what discretization costs is first order in the learning rate.

END = 0.25
#: Each takes at most 400 steps to t = END: one compilation serves all of them.
RATES = END / np.array([50, 100, 200, 400])


def smooth_net_problem():
    x, y = relu_regression()[1]
    return hf.MLP((3, 4, 2), activation="linear", key=jr.key(8)), (x, y)


@pytest.fixture(scope="module")
def runs_past_the_end():
    """Each run and the index of its record at t = END."""
    runs = [descend(smooth_net_problem, 400, learning_rate=rate) for rate in RATES]
    ends = [round(END / rate) for rate in RATES]
    for run, end in zip(runs, ends, strict=True):
        np.testing.assert_allclose(run.ts[end], END, rtol=1e-12)
    return list(zip(runs, ends, strict=True))


def slope(values) -> float:
    return np.polyfit(np.log(RATES), np.log(values), 1)[0]


@pytest.mark.parametrize("law", ["neurons[1]", "layers[1]", "matrix[1]"])
def test_law_drift_at_a_fixed_time_is_first_order_in_the_step(runs_past_the_end, law):
    drifts = [
        np.linalg.norm(run.laws[law][end] - run.laws[law][0])
        for run, end in runs_past_the_end
    ]
    assert abs(slope(drifts) - 1) < 0.05


def test_descent_tends_to_the_flow_at_first_order(runs_past_the_end):
    flow = hf.flow(*smooth_net_problem(), END, rtol=1e-12)
    distances = [
        np.linalg.norm(history_of(run)[end] - flat(flow.model))
        for run, end in runs_past_the_end
    ]
    assert abs(slope(distances) - 1) < 0.05
    assert distances[-1] < 1e-2


# Divergence.

DIVERGING = 40.0
LONG = 400


def numpy_divergence() -> tuple[int, np.ndarray]:
    """The step that first leaves the finite numbers, and the last weights before it."""
    model, data = linear_regression()
    with np.errstate(all="ignore"):
        rule = functools.partial(sgd, rate=DIVERGING)
        history = numpy_run(model, [data] * LONG, rule)
        x, y = (np.asarray(part) for part in data)
        residual = x @ history.reshape(-1, 2, 3).swapaxes(1, 2) - y
        losses = np.sum(residual**2, axis=(1, 2))
    # A loss that overflows ends the run though the weights are finite still.
    step = int(np.argmax(~np.isfinite(losses)))
    return step, history[step - 1]


@pytest.mark.parametrize("every", [1, 7])
def test_divergence_is_reported_with_its_step(every):
    run = descend(steps=LONG, learning_rate=DIVERGING, record_every=every, throw=False)
    step, weights = numpy_divergence()
    assert run.result == hf.RESULTS.diverged
    assert run.stats["diverged_at_step"] == step
    np.testing.assert_allclose(flat(run.model), weights, rtol=1e-9)
    before = np.asarray(run.ts) < step * DIVERGING
    for values in (run.losses, run.grad_norms, *run.squared_norms.values()):
        assert np.all(np.isfinite(np.asarray(values)[before]))
        assert np.all(np.isnan(np.asarray(values)[~before]))
    assert run.stats["time_reached"] == run.ts[before].max()


def test_divergence_raises_and_keeps_what_was_computed():
    with pytest.raises(hf.TrajectoryError, match="step") as caught:
        descend(steps=LONG, learning_rate=DIVERGING)
    step, _ = numpy_divergence()
    assert f"step {step}" in str(caught.value)
    assert caught.value.trajectory.stats["diverged_at_step"] == step


def test_a_run_that_does_not_diverge_says_so():
    run = descend()
    assert run.result == hf.RESULTS.successful
    assert run.stats["diverged_at_step"] == -1
    assert run.stats["steps"] == STEPS


# Precision.


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float64, 1e-13), (jnp.float32, 1e-5), (jnp.bfloat16, 0.1)],
)
@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adam])
def test_dtype_is_the_models(dtype, tolerance, optimizer):
    model, data = linear_regression()
    low = jax.tree.map(lambda w: w.astype(dtype), model)
    run = hf.descend(low, data, STEPS, learning_rate=RATE, optimizer=optimizer)
    assert flat(run.model).dtype == run.losses.dtype == dtype
    assert run.ts.dtype == (dtype if dtype != jnp.bfloat16 else jnp.float32)
    rule = sgd if optimizer is optax.sgd else adam
    expected = numpy_run(model, [data] * STEPS, rule)[-1]
    error = np.linalg.norm(flat(run.model).astype(float) - expected)
    assert error < tolerance * np.linalg.norm(expected)
