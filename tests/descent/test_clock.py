"""The flow's clock is read off an optimizer's response, whatever its name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from homoflow._descent._clock import read_clock

WEIGHTS = {"matrix": jnp.zeros((3, 2)), "vector": jnp.zeros(4)}
STEPS = 4000  # 0.99^4000 = 3e-18: every transient has died out


def sgd(**keywords):
    return functools.partial(optax.sgd, **keywords)


def chained(before):
    return lambda learning_rate: optax.chain(before, optax.sgd(learning_rate))


def heavy_ball_by_parts(learning_rate):
    return optax.chain(
        optax.trace(decay=0.75), optax.scale_by_learning_rate(learning_rate)
    )


def averaged_gradients(learning_rate):
    return optax.chain(
        optax.ema(0.9, debias=False), optax.scale_by_learning_rate(learning_rate)
    )


# name: (factory, momentum μ or None, gain, word of the note)
WITH_LIMIT = {
    "sgd": (optax.sgd, 1, ""),
    "momentum 0.5": (sgd(momentum=0.5), 2, "momentum 0.5"),
    "momentum 0.9": (sgd(momentum=0.9), 10, "momentum 0.9"),
    "momentum 0.99": (sgd(momentum=0.99), 100, "momentum 0.99"),
    "nesterov 0.9": (sgd(momentum=0.9, nesterov=True), 10, "momentum 0.9"),
    "momentum by parts": (heavy_ball_by_parts, 4, "momentum 0.75"),
    "averaged gradients": (averaged_gradients, 1, "momentum 0.9"),
    "doubled": (chained(optax.scale(2.0)), 2, "takes time 2 η"),
    "identity": (chained(optax.identity()), 1, ""),
    "decay": (chained(optax.add_decayed_weights(0.01)), 1, "decay"),
    "clip": (chained(optax.clip(1.0)), 1, "clipping"),
    "clip norm": (chained(optax.clip_by_global_norm(1.0)), 1, "clipping"),
}
WITHOUT_LIMIT = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
    "sign_sgd": optax.sign_sgd,
    "adagrad": optax.adagrad,
    "normalized": chained(optax.normalize_by_update_norm()),
}
followers = pytest.mark.parametrize(
    ("factory", "gain", "word"), WITH_LIMIT.values(), ids=WITH_LIMIT
)


def settled_displacement(factory, gradient):
    """What one step of learning rate 1 does after thousands of equal gradients."""
    optimizer = factory(1.0)

    def step(state, _):
        update, state = optimizer.update(gradient, state, WEIGHTS)
        return state, update

    @jax.jit
    def last_update(state):
        return jax.tree.map(lambda u: u[-1], jax.lax.scan(step, state, length=STEPS)[1])

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        return last_update(optimizer.init(WEIGHTS))


def small_gradient(size=1e-3):
    return jax.tree.map(
        lambda w: size * jnp.cos(jnp.arange(w.size)).reshape(w.shape), WEIGHTS
    )


@followers
def test_gain_is_the_settled_displacement_over_the_gradient(factory, gain, word):
    clock = read_clock(factory, WEIGHTS)
    assert clock.has_limit
    np.testing.assert_allclose(clock.time_per_step, gain, rtol=1e-10)
    gradient = small_gradient()
    displacement = settled_displacement(factory, gradient)
    for name in WEIGHTS:
        np.testing.assert_allclose(
            displacement[name], -clock.time_per_step * gradient[name], rtol=1e-10
        )


@followers
def test_note_says_what_the_clock_rests_on(factory, gain, word):
    clock = read_clock(factory, WEIGHTS)
    assert word in clock.note
    assert (clock.note == "") == (word == "")
    assert clock.fact.startswith("flow time")


@pytest.mark.parametrize("factory", WITHOUT_LIMIT.values(), ids=WITHOUT_LIMIT)
def test_methods_without_a_flow_limit_say_so(factory):
    clock = read_clock(factory, WEIGHTS)
    assert not clock.has_limit
    assert "no gradient-flow limit" in clock.note
    assert clock.fact.startswith("sum of learning rates")


@pytest.mark.parametrize("factory", WITHOUT_LIMIT.values(), ids=WITHOUT_LIMIT)
def test_methods_without_a_flow_limit_do_not_scale_with_the_gradient(factory):
    """The ground for that verdict: an eightfold gradient gives about the same step."""
    small, large = (
        settled_displacement(factory, small_gradient(size))["vector"][0]
        for size in (0.1, 0.8)
    )
    assert abs(large / small) < 2


def test_different_rates_for_different_weights_are_a_preconditioned_flow():
    def factory(learning_rate):
        only_matrix = {"matrix": True, "vector": False}
        return optax.chain(
            optax.masked(optax.scale(3.0), only_matrix), optax.sgd(learning_rate)
        )

    clock = read_clock(factory, WEIGHTS)
    assert not clock.has_limit
    assert "preconditioned" in clock.note


def test_two_poles_are_not_taken_for_momentum():
    def factory(learning_rate):
        return optax.chain(optax.trace(0.5), optax.trace(0.9), optax.sgd(learning_rate))

    clock = read_clock(factory, WEIGHTS)
    assert not clock.has_limit
    assert "momentum" in clock.note


def test_ascent_has_no_clock():
    clock = read_clock(chained(optax.scale(-1.0)), WEIGHTS)
    assert not clock.has_limit


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.float64])
def test_gain_does_not_lose_digits_in_low_precision(dtype):
    weights = jax.tree.map(lambda w: w.astype(dtype), WEIGHTS)
    assert read_clock(sgd(momentum=0.99), weights).time_per_step == 100.0


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_clock_is_read_under_transformations(transform):
    gains = []

    def traced(weights):
        clock = read_clock(sgd(momentum=0.9), {"w": weights})
        gains.append((clock.time_per_step, clock.has_limit))
        return jnp.sum(weights)

    transform(traced)(jnp.ones((2, 3)) if transform is not jax.grad else jnp.ones(3))
    assert gains[0] == (10.0, True)
