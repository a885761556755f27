"""New values of numbers compile nothing: only shapes and kinds of things do."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from oracles import compilations

import homoflow as hf

X = jr.normal(jr.key(1), (6, 2))
DATA = X, jnp.sin(X[:, :1])


@functools.cache
def model() -> hf.MLP:
    return hf.MLP((2, 3, 1), activation=jnp.tanh, key=jr.key(0))


def descend(steps: int = 20, **options) -> hf.Trajectory:
    options = {"learning_rate": 0.1, "laws": (), **options}
    return hf.descend(model(), DATA, steps, **options)


def flow(**options) -> hf.Trajectory:
    return hf.flow(model(), DATA, 1.0, laws=(), rtol=1e-6, **options)


def momentum(mu: float) -> Callable:
    return functools.partial(optax.sgd, momentum=mu)


def clipped(largest: float) -> Callable:
    return lambda rate: optax.chain(optax.clip(largest), optax.sgd(rate))


def quartic(factor: float) -> Callable:
    return lambda prediction, y: factor * jnp.sum((prediction - y) ** 4)


SECOND = {
    "steps": (descend, lambda: descend(33)),
    "record_every": (descend, lambda: descend(record_every=7)),
    "a single step": (descend, lambda: descend(1)),
    "momentum": (
        lambda: descend(optimizer=momentum(0.9)),
        lambda: descend(optimizer=momentum(0.7)),
    ),
    "rates of Adam": (
        lambda: descend(optimizer=functools.partial(optax.adam, b1=0.8, b2=0.99)),
        lambda: descend(optimizer=functools.partial(optax.adam, b1=0.7, b2=0.95)),
    ),
    "an optimizer written again": (
        lambda: descend(optimizer=clipped(0.1)),
        lambda: descend(optimizer=clipped(0.1)),
    ),
    "a loss's parameter": (
        lambda: descend(loss=hf.HuberLoss(delta=1.0)),
        lambda: descend(loss=hf.HuberLoss(delta=0.01)),
    ),
    "a loss written again": (
        lambda: descend(loss=quartic(1.0)),
        lambda: descend(loss=quartic(1.0)),
    ),
    "first explicit times": (flow, lambda: flow(ts=np.linspace(0.0, 0.5, 101))),
    "first explicit atol": (flow, lambda: flow(atol=1e-9)),
    "a loss's parameter in a flow": (
        lambda: flow(loss=hf.HuberLoss(delta=1.0)),
        lambda: flow(loss=hf.HuberLoss(delta=0.01)),
    ),
    "certify": (
        lambda: hf.certify(model(), X[0]),
        lambda: hf.certify(hf.MLP((2, 3, 1), activation=jnp.tanh, key=jr.key(5)), X[1]),
    ),
}


@pytest.mark.parametrize("what", SECOND)
def test_new_values_compile_nothing(what, quick_compilation):
    first, second = SECOND[what]
    first()
    hf.MLP((2, 3, 1), activation=jnp.tanh, key=jr.key(5))
    with compilations() as compiled:
        second()
    assert compiled == []


def test_what_does_change_the_program_is_seen_to(quick_compilation):
    """The control: other code is compiled, and what was closed over is not stale."""
    one = descend(loss=quartic(1.0))
    with compilations() as compiled:
        two = descend(loss=quartic(2.0))
    assert compiled
    np.testing.assert_allclose(two.losses[0], 2 * one.losses[0], rtol=1e-12)


def test_numbers_of_an_optimizer_that_came_later_count(quick_compilation):
    def last(mu):
        return descend(optimizer=momentum(mu)).losses[-1]

    descend(optimizer=momentum(0.9))
    written = descend(
        optimizer=lambda rate: optax.chain(optax.trace(0.7), optax.scale(-rate))
    )
    np.testing.assert_allclose(last(0.7), written.losses[-1], rtol=1e-12)
    assert last(0.9) != last(0.7)


def test_a_parameter_of_a_loss_that_came_later_counts(quick_compilation):
    flow(loss=hf.HuberLoss(delta=1.0))
    run = flow(loss=hf.HuberLoss(delta=0.01))
    far = np.abs(np.asarray(jax.vmap(run.model)(X) - DATA[1]))
    each = np.where(far <= 0.01, far**2 / 2, 0.01 * (far - 0.005))
    np.testing.assert_allclose(run.losses[-1], each.mean(), rtol=1e-12)


@pytest.mark.parametrize("every", [1, 4, 7])
def test_what_one_program_does_for_all_sizes_is_what_each_of_its_own_does(every):
    """Inside of jit, sizes are constants of the program."""
    run = descend(23, record_every=every, optimizer=momentum(0.9))
    inside = jax.jit(
        lambda: descend(23, record_every=every, optimizer=momentum(0.9)).losses
    )
    np.testing.assert_allclose(run.losses, inside(), rtol=1e-13)
    assert run.ts.shape == run.losses.shape == (len(range(0, 23, every)) + 1,)
    assert float(run.ts[-1]) == pytest.approx(23.0)
