"""Where descent does not follow the central flow, with momentum, and for many seeds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edge_net import NET, Net, X, Y
from jax.flatten_util import ravel_pytree

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_cross_entropy_holds_the_sharpness_elsewhere():
    """Off the threshold at the mean weights of descent, on the side that is warned of.

    By how much is an estimate, within a factor of two: the curvature between the ends of
    one amplitude stands for that over a cycle, in which the amplitude changes.
    """
    x = jax.random.normal(jax.random.key(107), (40, 3))
    mix = jax.random.normal(jax.random.key(207), (3, 3))
    scores = 2 * jnp.sin(2 * x @ mix / np.sqrt(3))
    scores = scores + 1.5 * jax.random.normal(jax.random.key(307), (40, 3))
    data, loss = (x, jnp.argmax(scores, axis=1)), hf.SoftmaxCrossEntropy()
    keys = jax.random.split(jax.random.key(7), 3)
    shapes = [(10, 3), (10, 10), (3, 10)]
    scales = [1.0, 10**-0.5, 10**-0.5]
    weights = [
        s * jax.random.normal(k, shape)
        for s, k, shape in zip(scales, keys, shapes, strict=True)
    ]
    net = eqx.tree_at(lambda n: (n.first, n.second, n.third), NET, tuple(weights))
    eta, t1 = 0.0677, 280.0
    with pytest.warns(UserWarning, match="so wide that the curvature"):
        central = hf.central_flow(
            net, data, t1, learning_rate=eta, loss=loss, laws=(), estimate_error=False
        )
    assert central.stats["edge_cycles"] > 20
    assert central.stats["edge_overshoot"] < 0.2
    descent = hf.descend(
        net,
        data,
        round(t1 / eta),
        learning_rate=eta,
        loss=loss,
        laws=(),
        save_models=True,
    )
    mean = hf.smooth(descent, 10.0)
    problem = hf.make_problem(net, data, loss=loss)
    flat, unravel = ravel_pytree(mean.model)
    hessian = jax.jit(jax.hessian(lambda w: problem.loss(unravel(w))))(flat)
    seen = np.linalg.eigvalsh(hessian)[-1] * eta / 2 - 1
    assert -0.06 < seen < -0.03
    assert 0.5 < -seen / central.observed["shift"][-1] < 2
    assert central.stats["edge_shift"] >= central.observed["shift"][-1]


def test_sixty_four_seeds_are_followed_in_one_batch():
    ts = jnp.linspace(0, 20, 3)

    def follow(key):
        run = hf.central_flow(
            Net(key),
            (X, Y),
            20.0,
            learning_rate=0.1,
            laws=(),
            ts=ts,
            rtol=1e-4,
            estimate_error=False,
            throw=False,
        )
        return run.losses, run.observed["critical"], run.result._value

    keys = jax.random.split(jax.random.key(0), 64)
    losses, critical, results = eqx.filter_jit(jax.vmap(follow))(keys)
    succeeded = results == hf.RESULTS.successful._value
    assert np.sum(succeeded) >= 50  # Others start beyond the edge.
    assert np.sum(critical[:, -1] > 0) >= 20
    for seed in np.flatnonzero(succeeded)[:2]:
        alone = eqx.filter_jit(follow)(keys[seed])
        np.testing.assert_allclose(losses[seed], alone[0], rtol=1e-5)
        np.testing.assert_array_equal(critical[seed], alone[1])


def test_a_sweep_of_central_flows_is_that_of_single_ones():
    """With seeds in one program; whether one ends at the edge is data."""
    pytest.importorskip("xarray")

    def run(seed, rate):
        return hf.central_flow(
            Net(jax.random.key(seed)),
            (X, Y),
            25.0,
            learning_rate=rate,
            ts=jnp.linspace(0, 25, 6),
            laws=(),
            rtol=1e-4,
            estimate_error=False,
            throw=False,
        )

    over = {"seed": [1, 2], "rate": [0.05, 0.1]}
    data = hf.sweep(run, over, progress=False)
    assert np.all(data.result == "successful")
    with pytest.warns(UserWarning, match="may not follow"):
        single = run(1, 0.1)
    assert single.observed["critical"][-1] == 1
    at = data.sel(seed=1, rate=0.1)
    np.testing.assert_allclose(at.losses, single.losses, rtol=1e-6)
    np.testing.assert_array_equal(at["critical"], single.observed["critical"])
    assert not np.any(data["critical"].sel(seed=1, rate=0.05))
    np.testing.assert_allclose(at["spectrum"][-1, 0], 20, rtol=1e-6)
