"""Symmetries and invariants of the exact flow, on problems that hypothesis draws.

All problems have the same shapes, so that two compilations serve the whole file. The
examples are the same in every run.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from jaxtyping import Array
from oracles import midpoint
from problems import arrays_of, flat, relative_error, saved
from scipy.optimize import least_squares

import homoflow as hf

SIZES, SAMPLES, T1 = (3, 5, 5, 2), 10, 8.0
#: Two times at which the velocity is taken by differences, each with its neighbours.
MIDDLES, APART = (3.0, 7.5), 1e-4
TS = np.array([0, 1.5, *(t + i * APART for t in MIDDLES for i in (-1, 0, 1)), T1])
SLOTS = 32
seeds = st.integers(0, 10_000)
few = settings(derandomize=True, deadline=None, database=None, max_examples=5)


class Scaled(eqx.Module):
    """c·½‖r‖², with c an array so that no value of it recompiles."""

    c: Array

    def __call__(self, prediction, target):
        return 0.5 * self.c * jnp.sum((prediction - target) ** 2)


def network(weights: list[np.ndarray]):
    model = eqx.filter_eval_shape(lambda: hf.MLP(SIZES, key=jax.random.key(0)))
    given = [jnp.asarray(w) for w in weights]
    return eqx.tree_at(lambda m: [layer.weight for layer in m.layers], model, given)


def problem(seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Weights, inputs and targets."""
    rng = np.random.default_rng(seed)
    shapes = zip(SIZES[1:], SIZES[:-1], strict=True)
    weights = [np.sqrt(2 / n) * rng.standard_normal((m, n)) for m, n in shapes]
    return weights, rng.standard_normal((SAMPLES, 3)), rng.standard_normal((SAMPLES, 2))


def exactly(weights, x, y, scale: float = 1.0, c: float = 1.0) -> hf.Trajectory:
    """The flow, with all times multiplied by `scale`."""
    return hf.flow(
        network(weights), (jnp.asarray(x), jnp.asarray(y)), scale * T1,
        loss=Scaled(jnp.asarray(c)), solver=hf.Filippov(max_active=SLOTS), ts=scale * TS,
        save_models=True,
    )  # fmt: skip


_SOLVED: dict[int, hf.Trajectory] = {}


def solved(seed: int) -> hf.Trajectory:
    """The flow of `problem(seed)`, which several tests look at; unique as far as told."""
    if seed not in _SOLVED:
        _SOLVED[seed] = exactly(*problem(seed))
    assume(_SOLVED[seed].stats["num_nonunique_pairs"] == 0)
    return _SOLVED[seed]


def assert_weights(flow: hf.Trajectory, weights: list[np.ndarray], rel: float):
    assert (
        relative_error(flow.model, np.concatenate([w.ravel() for w in weights])) < rel
    )


@few
@given(seeds)
def test_order_of_samples_does_not_matter(seed):
    weights, x, y = problem(seed)
    order = np.random.default_rng(seed + 1).permutation(SAMPLES)
    permuted = exactly(weights, x[order], y[order])
    assert_weights(permuted, arrays_of(solved(seed).model), 1e-9)


@few
@given(seeds)
def test_order_of_neurons_does_not_matter(seed):
    weights, x, y = problem(seed)
    rng = np.random.default_rng(seed + 1)
    orders = [np.arange(3), rng.permutation(5), rng.permutation(5), np.arange(2)]

    def permuted(weights):
        pairs = zip(weights, orders[1:], orders[:-1], strict=True)
        return [w[np.ix_(out, into)] for w, out, into in pairs]

    flow = exactly(permuted(weights), x, y)
    assert_weights(flow, permuted(arrays_of(solved(seed).model)), 1e-9)


@few
@given(seeds)
def test_rotated_inputs_and_first_layer(seed):
    weights, x, y = problem(seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((3, 3)))
    flow = exactly([weights[0] @ rotation, *weights[1:]], x @ rotation, y)
    first, *rest = arrays_of(solved(seed).model)
    assert_weights(flow, [first @ rotation, *rest], 1e-9)


@few
@given(seeds)
def test_a_data_set_twice_over(seed):
    weights, x, y = problem(seed)
    flow = exactly(weights, np.concatenate([x, x]), np.concatenate([y, y]))
    assert_weights(flow, arrays_of(solved(seed).model), 1e-9)


@few
@given(seeds, st.floats(0.2, 5))
def test_a_loss_times_c_is_time_over_c(seed, c):
    flow = exactly(*problem(seed), scale=1 / c, c=c)
    assert_weights(flow, arrays_of(solved(seed).model), 1e-6)
    np.testing.assert_allclose(flow.losses, c * solved(seed).losses, rtol=1e-6)


@few
@given(seeds, st.floats(0.6, 1.6))
def test_weights_times_c_and_targets_times_c_cubed(seed, c):
    """The network is homogeneous of degree 3 in its weights: time × c^(2−2·3)."""
    weights, x, y = problem(seed)
    flow = exactly([c * w for w in weights], x, c**3 * y, scale=c**-4)
    assert_weights(flow, [c * w for w in arrays_of(solved(seed).model)], 1e-6)


@few
@given(seeds)
def test_the_loss_falls_and_laws_hold(seed):
    flow = solved(seed)
    assert np.all(np.diff(flow.losses) < 0)
    weights = [np.asarray(w) for w in arrays_of(saved(flow))]
    for below, above in itertools.pairwise(weights):
        law = np.sum(below**2, 2) - np.sum(above**2, 1)
        assert np.max(np.abs(law - law[0])) < 1e-6


def preactivations(weights, x) -> list[np.ndarray]:
    first = x @ weights[0].T
    return [first, np.maximum(first, 0) @ weights[1].T]


@jax.jit
def gradient(weights, slopes, x, y):
    """∇L at given slopes of all units, flat."""

    def loss(weights):
        a = x
        for w, slope in zip(weights, slopes, strict=False):
            a = slope * (a @ w.T)
        return 0.5 * jnp.sum((a @ weights[-1].T - y) ** 2) / len(x)

    return jnp.concatenate([g.ravel() for g in jax.grad(loss)(weights)])


@settings(few, max_examples=12)
@given(seeds)
def test_velocity_is_a_gradient_with_slopes_in_their_interval(seed):
    """Velocity by differences; slopes by bounded least squares, at pairs on their kink."""
    _, x, y = problem(seed)
    flow = solved(seed)
    path = [np.asarray(w) for w in arrays_of(saved(flow))]
    for middle in (3, 6):
        before, here, after = ([w[middle + i] for w in path] for i in (-1, 0, 1))
        sides = [
            np.concatenate([np.where(abs(z) < 1e-9, 0, np.sign(z)) for z in pre], 1)
            for pre in (preactivations(w, x) for w in (before, here, after))
        ]
        if not all(np.array_equal(side, sides[0]) for side in sides):
            continue  # An event in between.
        velocity = np.concatenate(
            [
                ((b - a) / (2 * APART)).ravel()
                for a, b in zip(before, after, strict=True)
            ]
        )
        at_kink = sides[1] == 0

        def residual(free, side=sides[1], at_kink=at_kink, here=here, v=velocity):
            slopes = (side > 0).astype(float)
            slopes[at_kink] = free
            return v + np.asarray(gradient(here, np.split(slopes, 2, 1), x, y))

        start = np.full(at_kink.sum(), 0.5)
        rest = residual(start)
        if start.size:
            tight = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15)
            rest = least_squares(residual, start, bounds=(0, 1), **tight).fun
        assert np.linalg.norm(rest) < 1e-5 * np.linalg.norm(velocity)


@pytest.mark.parametrize(
    ("seed", "close"),
    [
        # A unit of the only active kind in its sample closes below one that slides.
        (7815, 2e-5),
        # Two kinks above sliders are met at once: one of them holds the other.
        (445, 5e-5),
        # All units of a layer close at once for a sample, below one that slides.
        (500, 4e-4),
        # Whose slope depends on which of several sliders below opens.
        (96, 2e-5),
        (316, 2e-5),
    ],
)
def test_the_flow_gets_past_coincident_events(seed, close):
    weights, x, y = problem(seed)
    flow = exactly(weights, x, y)
    data = jnp.asarray(x), jnp.asarray(y)
    ends = [
        midpoint(network(weights), data, T1, jnp.asarray(n)) for n in (4_000, 64_000)
    ]
    far, near = (relative_error(flow.model, np.asarray(end)) for end in ends)
    assert near < close
    assert near < far / 3


def test_after_a_choice_the_flow_is_one_of_several():
    """Midpoint goes elsewhere, as does the exact flow from beside the point of choice."""
    weights, x, y = problem(283)
    flow = exactly(weights, x, y)
    data = jnp.asarray(x), jnp.asarray(y)
    fixed = np.asarray(midpoint(network(weights), data, T1, jnp.asarray(64_000)))
    assert relative_error(flow.model, fixed) > 0.1
    # Where one unit's pairs with four samples, which slide as one, leave their kink.
    choice = 2.487961772
    at = arrays_of(exactly(weights, x, y, scale=choice / T1).model)
    here, there = [], []
    for seed in range(12):
        moved = 1e-7 * np.random.default_rng(seed).standard_normal(at[1].shape)
        rest = exactly([at[0], at[1] + moved, at[2]], x, y, scale=1 - choice / T1)
        here.append(relative_error(rest.model, flat(flow.model)))
        there.append(relative_error(rest.model, fixed))
    assert min(here) < 1e-6
    assert min(there) < 2e-4
