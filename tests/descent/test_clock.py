"""The flow's clock is read off an optimizer's updates along the run, whatever its name.

The right time is found by other means: schedules and rates by formula, and of what adapts
itself the multiples of the gradient that an Optax loop takes.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jaxtyping import Array

import homoflow as hf

#: A power of two: Optax computes some schedules in single precision.
RATE, STEPS = 2.0**-6, 40
X = np.random.default_rng(0).standard_normal((6, 3))
Y = np.random.default_rng(1).standard_normal((6, 2))


class Product(eqx.Module):
    """x ↦ (A·B)ᵀx with two arrays of different sizes."""

    big: Array
    small: Array

    def __call__(self, x):
        return x @ self.big @ self.small


MODEL = Product(
    jnp.asarray(np.random.default_rng(2).standard_normal((3, 4))),
    jnp.asarray(np.random.default_rng(3).standard_normal((4, 2))),
)


def loss(model) -> Array:
    return 0.5 * jnp.sum((X @ model.big @ model.small - Y) ** 2) / len(X)


def descend(optimizer, steps=STEPS, **options) -> hf.Trajectory:
    data = jnp.asarray(X), jnp.asarray(Y)
    options = {"learning_rate": RATE, "laws": (), **options}
    return hf.descend(MODEL, data, steps, optimizer=optimizer, **options)


@functools.cache
def gradients_and_updates(optimizer, steps=STEPS) -> tuple[np.ndarray, np.ndarray]:
    """What goes into an Optax loop and what comes out, one row a step."""
    made = optimizer(RATE)
    if isinstance(made, optax.MultiSteps):
        made = made.gradient_transformation()
    made = optax.with_extra_args_support(made)

    def step(carry, _):
        model, state = carry
        value, gradient = jax.value_and_grad(loss)(model)
        update, state = made.update(
            gradient, state, model, value=value, grad=gradient, value_fn=loss
        )
        rows = (
            jnp.concatenate([a.ravel() for a in jax.tree.leaves(t)])
            for t in (gradient, update)
        )
        return (optax.apply_updates(model, update), state), tuple(rows)

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        run = jax.jit(
            lambda model: jax.lax.scan(step, (model, made.init(model)), None, steps)[1]
        )
        gradient, update = run(MODEL)
    return np.asarray(gradient), np.asarray(update)


def row(tree) -> Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def sum_of_multiples(optimizer) -> float:
    """Σ τ of steps −τg."""
    g, u = gradients_and_updates(optimizer)
    taken = -(g * u).sum(axis=1) / (g * g).sum(axis=1)
    assert np.abs(u + taken[:, None] * g).max() < 1e-12
    return taken.sum()


def is_big(params):
    return jax.tree.map(lambda leaf: leaf.size > 10, params)


def by_size(big, small):
    return lambda rate: optax.multi_transform(
        {True: big(rate), False: small(rate)}, is_big
    )


def chained(*before, after=()):
    return lambda rate: optax.chain(*before, optax.sgd(rate), *after)


def sgd(**keywords):
    return functools.partial(optax.sgd, **keywords)


def smoothed(gradient, _):
    return (gradient + jnp.roll(gradient, 1)) / 2


k = np.arange(STEPS)
halves = functools.partial(optax.exponential_decay, transition_steps=1, decay_rate=0.5)
drops = optax.piecewise_constant_schedule(1.0, {9: 0.25, 25: 0.5})
dropped = np.where(k < 9, 1, np.where(k < 25, 0.25, 0.125))


def late(schedule_of):
    """From step 25 on."""
    return optax.conditionally_transform(schedule_of, lambda step: step >= 25)


# name: (optimizer, flow time at the end over the learning rate)
WITH_FLOW_TIME = {
    "sgd": (optax.sgd, STEPS),
    "a schedule inside": (
        lambda rate: optax.sgd(lambda k: rate / (1 + k)), (1 / (1 + k)).sum(),
    ),
    "exponential decay inside": (lambda rate: optax.sgd(halves(rate)), (0.5**k).sum()),
    "a schedule behind": (chained(after=[optax.scale_by_schedule(drops)]), dropped.sum()),
    "warm-up from 0": (
        lambda rate: optax.sgd(optax.linear_schedule(0.0, rate, 16)),
        np.minimum(k / 16, 1).sum(),
    ),
    "injected schedule": (
        lambda rate: optax.inject_hyperparams(optax.sgd)(lambda k: rate * drops(k)),
        dropped.sum(),
    ),
    "injected rate": (lambda rate: optax.inject_hyperparams(optax.sgd)(rate), STEPS),
    "its own rate": (lambda rate: optax.sgd(4 * RATE), 4 * STEPS),
    "a rate that falls late": (chained(late(optax.scale(0.25))), 25 + 15 / 4),
    "momentum": (sgd(momentum=0.9), 10 * STEPS),
    "Nesterov": (sgd(momentum=0.75, nesterov=True), 4 * STEPS),
    "momentum of the rate": (
        lambda rate: optax.sgd(rate, momentum=1 - 8 * rate), STEPS / (8 * RATE),
    ),
    "momentum and a schedule": (
        lambda rate: optax.sgd(lambda k: rate * drops(k), momentum=0.5), 2 * dropped.sum(),
    ),
    "momentum that comes late": (chained(late(optax.trace(0.5))), 25 + 2 * 15),
    "momentum in single precision": (
        sgd(momentum=0.75, accumulator_dtype=jnp.float32), 4 * STEPS,
    ),
    "two averages": (chained(optax.trace(0.5), optax.trace(0.75)), 8 * STEPS),
    "average from 0": (chained(optax.ema(0.9, debias=False)), STEPS),
    "corrected average": (chained(optax.ema(0.9)), STEPS),
    "corrected average of momentum": (
        chained(optax.trace(0.5), optax.ema(0.9)), 2 * STEPS,
    ),
    "corrected average of a corrected one": (
        chained(optax.ema(0.5), optax.ema(0.9)), STEPS,
    ),
    "corrected average of momentum, four in one": (
        lambda rate: optax.MultiSteps(
            optax.chain(optax.trace(0.5), optax.ema(0.5), optax.sgd(rate)), 4
        ),
        STEPS / 2,
    ),
    "four steps in one": (lambda rate: optax.MultiSteps(optax.sgd(rate), 4), STEPS / 4),
    "four with momentum in one": (
        lambda rate: optax.MultiSteps(optax.sgd(rate, momentum=0.5), 4), STEPS / 2,
    ),
    "a sum of four": (
        lambda rate: optax.MultiSteps(optax.sgd(rate), 4, use_grad_mean=False), STEPS,
    ),
    "every fourth": (chained(optax.apply_every(4)), STEPS),
    "decay": (chained(optax.add_decayed_weights(0.01)), STEPS),
    "decay of the big array": (
        chained(optax.masked(optax.add_decayed_weights(0.1), is_big)), STEPS,
    ),
    "loose clipping": (chained(optax.clip(1e3)), STEPS),
    "clipped norm": (chained(optax.clip_by_global_norm(0.5)), None),
    "normalized": (chained(optax.normalize_by_update_norm()), None),
    "line search": (
        chained(after=[optax.scale_by_backtracking_linesearch(8, max_learning_rate=99.0)]),
        None,
    ),
    "plateau": (
        chained(after=[optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.2)]),
        None,
    ),
    "Polyak": (lambda rate: optax.polyak_sgd(max_learning_rate=rate), None),
    "no NaN": (lambda rate: optax.chain(optax.zero_nans(), optax.sgd(rate)), STEPS),
    "decay, then no NaN": (
        chained(optax.add_decayed_weights(0.01), optax.zero_nans()), STEPS,
    ),
    "momentum, then loose clipping": (
        chained(optax.trace(0.5), optax.clip(1e3), optax.zero_nans()), 2 * STEPS,
    ),
    "flattened decay, then loose clipping": (
        lambda rate: optax.flatten(
            chained(optax.add_decayed_weights(0.01), optax.clip(1e3))(rate)
        ),
        STEPS,
    ),
    "finite only": (lambda rate: optax.apply_if_finite(optax.sgd(rate), 3), STEPS),
    "flattened": (lambda rate: optax.flatten(optax.sgd(rate)), STEPS),
    "flattened momentum": (
        lambda rate: optax.flatten(optax.sgd(rate, momentum=0.5)), 2 * STEPS,
    ),
    "distance over gradients": (optax.contrib.dog, None),
}  # fmt: skip
WITHOUT = {
    "Adam": (optax.adam, "not a linear function"),
    "AdamW": (optax.adamw, "not a linear function"),
    "RMSprop": (optax.rmsprop, "not a linear function"),
    "Lion": (optax.lion, "not a linear function"),
    "Adagrad": (optax.adagrad, "not a linear function"),
    "eight Adams in one": (
        lambda rate: optax.MultiSteps(optax.adam(rate), 8), "not a linear function",
    ),
    "Adam of the big array": (by_size(optax.adam, optax.sgd), "not a linear function"),
    "L-BFGS": (optax.lbfgs, "not a linear function"),
    "signs": (optax.sign_sgd, "leave the gradient's direction"),
    "clipping": (chained(optax.clip(0.05)), "leave the gradient's direction"),
    "clipped momentum": (
        chained(optax.trace(0.5), optax.clip(0.05)), "leave the gradient's direction",
    ),
    "clipped decay": (
        chained(optax.add_decayed_weights(0.01), optax.clip(0.05)),
        "leave the gradient's direction",
    ),
    "smoothing": (
        chained(optax.stateless_with_tree_map(smoothed)), "leave the gradient's direction",
    ),
    "flattened Adam": (lambda rate: optax.flatten(optax.adam(rate)), "not a linear"),
    "smoothing over arrays": (
        lambda rate: optax.flatten(
            chained(optax.stateless_with_tree_map(smoothed))(rate)
        ),
        "leave the gradient's direction",
    ),
    "centred": (chained(optax.centralize()), "leave the gradient's direction"),
    "noise": (functools.partial(optax.noisy_sgd, key=0), "noise"),
    "rates by size": (
        by_size(lambda rate: optax.sgd(rate / 10), optax.sgd), "different rates",
    ),
    "a frozen array": (
        by_size(lambda _: optax.set_to_zero(), optax.sgd), "different rates",
    ),
    "rates by trust": (optax.lars, "different rates"),
    "ascent": (chained(optax.scale(-1.0)), "up the gradient"),
    "no friction": (sgd(momentum=1.0), "forgets no gradient"),
    "schedule-free": (optax.contrib.schedule_free_sgd, "forgets no gradient"),
    "SAM": (
        lambda rate: optax.contrib.sam(optax.sgd(rate), optax.sgd(0.05), opaque_mode=True),
        "leave the gradient's direction",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_FLOW_TIME)
def test_flow_time_is_that_of_the_steps_taken(name, quick_compilation):
    optimizer, factor = WITH_FLOW_TIME[name]
    run = descend(optimizer, record_every=STEPS)
    right = sum_of_multiples(optimizer) if factor is None else RATE * factor
    assert run.stats["time_unit"].startswith("flow time"), run.stats["time_unit"]
    assert run.stats["clock_defect"] == 0
    np.testing.assert_allclose(run.ts[-1], right, rtol=2e-7)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_flow_time_says_so_and_why(name, quick_compilation):
    optimizer, word = WITHOUT[name]
    run = descend(optimizer, record_every=STEPS, throw=False)
    assert run.stats["time_unit"].startswith("sum of learning rates: ")
    assert word in run.stats["time_unit"]
    assert run.stats["clock_defect"] > 0
    np.testing.assert_allclose(run.ts[-1], RATE * STEPS, rtol=1e-12)


# What the sentence says, and where the clock goes.


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        (optax.sgd, "flow time"),
        (
            sgd(momentum=0.9),
            "flow time: a step of η takes time 10 η once momentum has settled.",
        ),
        (
            WITH_FLOW_TIME["a schedule behind"][0],
            "flow time: steps of η take between 0.125 η and 1 η.",
        ),
        (
            sgd(momentum=0.999),
            "flow time: a step of η takes time 1000 η once momentum has settled. Momentum "
            "has not settled by the end of this run: the weights are behind the flow.",
        ),
    ],
)
def test_the_sentence_says_what_a_step_takes(optimizer, sentence):
    assert descend(optimizer).stats["time_unit"] == sentence


@pytest.mark.parametrize(
    "name", ["momentum and a schedule", "corrected average", "clipped norm"]
)
def test_the_clock_goes_on_where_it_was(name):
    optimizer = WITH_FLOW_TIME[name][0]
    whole = descend(optimizer)
    half = descend(optimizer, 13)
    data = jnp.asarray(X), jnp.asarray(Y)
    more = hf.descend(
        half, data, STEPS - 13, optimizer=optimizer, learning_rate=RATE, laws=()
    )
    np.testing.assert_allclose(more.ts, whole.ts[13:], rtol=1e-13)


def test_batches_of_runs_have_each_their_clock():
    @eqx.filter_vmap
    def sweep(momentum, clip):
        run = descend(
            lambda rate: optax.chain(
                optax.clip(clip), optax.sgd(rate, momentum=momentum)
            ),
            throw=False,
        )
        return run

    runs = sweep(jnp.array([0.5, 0.75, 0.75]), jnp.array([1e3, 1e3, 0.05]))
    right = RATE * STEPS * np.array([2, 4, 1])
    np.testing.assert_allclose(runs.ts[:, -1], right, rtol=1e-12)
    assert list(runs.stats["clock_defect"] > 0) == [False, False, True]
    assert runs.stats["time_unit"].startswith(
        'flow time where `stats["clock_defect"]` is 0'
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_many_steps_lose_no_digits(dtype):
    """10,000 steps whose times are added one by one."""
    line = Product(jnp.zeros((1, 1), dtype), jnp.ones((1, 1), dtype))
    data = jnp.ones((1, 1), dtype), jnp.ones((1, 1), dtype)
    run = hf.descend(
        line, data, 10_000, learning_rate=1e-3, laws=(), record_every=10_000,
        optimizer=lambda rate: optax.sgd(lambda k: rate / (1 + 1e-3 * k)),
    )  # fmt: skip
    right = (1e-3 / (1 + 1e-3 * np.arange(10_000))).sum()
    np.testing.assert_allclose(run.ts[-1], right, rtol=3e-7)


def test_an_error_of_the_clock_would_be_seen():
    """The flow at the time that is told is where descent is, and nowhere else."""
    optimizer = WITH_FLOW_TIME["a schedule behind"][0]
    run = descend(optimizer, learning_rate=RATE / 16, record_every=STEPS)
    data = jnp.asarray(X), jnp.asarray(Y)

    def distance(t):
        flow = hf.flow(MODEL, data, t, laws=(), rtol=1e-10)
        return np.linalg.norm(row(flow.model) - row(run.model))

    assert distance(run.ts[-1]) < 0.05 * distance(STEPS * RATE / 16)
