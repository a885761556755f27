"""Softplus by other formulas in float64: the same numbers, wherever JAX's stands.

Oracles: mpmath with 40 digits for values and derivatives up to the third; JAX's own
softplus, which is what must not be found any more, or must be left alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest

import homoflow as hf
from homoflow._jaxpr import has_softplus, inner_jaxprs, use_fast_softplus
from homoflow._jaxpr._fast_softplus import softplus

X = np.concatenate([np.linspace(-40, 40, 801), [0.0, -1e-9, 1e-9, -700.0, 700.0]])
EPS = np.finfo(float).eps


def exact(order: int) -> np.ndarray:
    """Derivatives of log(1 + eˣ)."""
    with mpmath.workdps(40):
        s = [1 / (1 + mpmath.exp(-mpmath.mpf(float(x)))) for x in X]
        r = [1 / (1 + mpmath.exp(mpmath.mpf(float(x)))) for x in X]  # 1 − s
        values = {
            0: [mpmath.log1p(mpmath.exp(mpmath.mpf(float(x)))) for x in X],
            1: s,
            2: [a * b for a, b in zip(s, r, strict=True)],
            3: [a * b * (b - a) for a, b in zip(s, r, strict=True)],
        }[order]
        return np.array([float(v) for v in values])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_values_and_derivatives_to_rounding(order):
    function = softplus
    for _ in range(order):
        function = jax.grad(function)
    got = jax.jit(jax.vmap(function))(X)
    np.testing.assert_allclose(got, exact(order), rtol=4 * EPS, atol=0)


def test_third_derivative():
    got = jax.vmap(jax.grad(jax.grad(jax.grad(softplus))))(X)
    # It has a zero: the error is relative to the terms of s(1 − s)(1 − 2s).
    assert np.all(np.abs(got - exact(3)) <= 8 * EPS * exact(2))


def test_what_is_not_finite():
    got = softplus(jnp.array([-jnp.inf, jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(got, [0.0, np.inf, np.nan])
    slopes = jax.vmap(jax.grad(softplus))(jnp.array([-jnp.inf, jnp.inf]))
    np.testing.assert_array_equal(slopes, [0.0, 1.0])


SPELLED = {
    "softplus": jax.nn.softplus,
    "log_sigmoid": jax.nn.log_sigmoid,
    "logaddexp, zero first": lambda x: jnp.logaddexp(0.0, x),
    "in a jitted function": jax.jit(lambda x: 2 * jax.nn.softplus(x) * x),
    "vmapped": jax.vmap(jax.nn.softplus),
    "twice": lambda x: jax.nn.softplus(-jax.nn.softplus(x)),
}


def primitives(function, *args) -> set[str]:
    def of(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for body in inner_jaxprs(eqn):
                yield from of(body.jaxpr)

    return set(of(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_is_found_and_stays_what_it_is(name):
    x = jr.normal(jr.key(0), (50,))

    def plain(x):
        return jnp.sum(SPELLED[name](x) ** 2)

    rewritten = use_fast_softplus(plain)
    assert has_softplus(jax.make_jaxpr(plain)(x))
    assert "log1p" in primitives(plain, x)
    assert "log1p" not in primitives(rewritten, x)
    for of in (lambda f: f, jax.grad, jax.hessian):
        np.testing.assert_allclose(
            of(rewritten)(x), of(plain)(x), rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize(
    "plain",
    [
        lambda x: jnp.sum(jax.nn.softplus(x.astype(jnp.float32))),
        lambda x: jnp.sum(jnp.logaddexp(x, jnp.ones(()))),
        lambda x: jnp.sum(jnp.logaddexp(x, x)),
        lambda x: jnp.sum(jnp.log1p(x**2)),
    ],
    ids=["float32", "another number", "two arrays", "log1p"],
)
def test_anything_else_is_left_alone(plain):
    x = jr.normal(jr.key(0), (50,))
    rewritten = use_fast_softplus(plain)
    assert not has_softplus(jax.make_jaxpr(plain)(x))
    assert str(jax.make_jaxpr(rewritten)(x)) == str(jax.make_jaxpr(plain)(x))


@pytest.mark.parametrize(
    "plain",
    [
        lambda x: jax.lax.cond(jnp.sum(x) > 0, jax.nn.softplus, jnp.sin, x),
        lambda x: jax.lax.scan(lambda c, _: (jax.nn.softplus(c), None), x, length=3)[0],
        jax.checkpoint(jax.nn.softplus),
    ],
    ids=["cond", "scan", "checkpoint"],
)
def test_inside_of_calls_with_rules_of_their_own_it_is_left_alone(plain):
    x = jr.normal(jr.key(0), (50,))

    def both(x):
        return jnp.sum(plain(x) + jax.nn.softplus(2 * x))

    rewritten = use_fast_softplus(both)
    assert "log1p" in primitives(rewritten, x)
    for of in (lambda f: f, jax.grad):
        np.testing.assert_allclose(of(rewritten)(x), of(both)(x), rtol=1e-13)


def test_a_namesake_is_not_taken_for_it():
    @jax.custom_jvp
    def logaddexp(x, y):
        return jnp.cos(x) + y

    logaddexp.defjvp(lambda p, t: (logaddexp(*p), -jnp.sin(p[0]) * t[0]))
    rewritten = use_fast_softplus(lambda x: logaddexp(x, 0.0))
    assert rewritten(jnp.array(0.3)) == jnp.cos(0.3)


def test_flow_and_descent_of_a_softplus_network_do_without_logarithms():
    """Curvature, batches and all."""
    model = hf.MLP((2, 3, 1), activation=jax.nn.softplus, key=jr.key(0))
    data = jr.normal(jr.key(1), (5, 2)), jnp.sign(jr.normal(jr.key(2), (5, 1)))

    def flowed(model):
        return hf.flow(model, data, 1.0, loss=hf.LogisticLoss(), laws=()).losses

    def descended(model, **options):
        return hf.descend(
            model, data, learning_rate=0.1, steps=3, loss=hf.LogisticLoss(), laws=(),
            **options,
        ).losses  # fmt: skip

    def by_batches(model):
        return descended(model, batch_size=2, key=jr.key(3))

    def fitted(model):
        solver = hf.ExponentialAdams()
        return hf.flow(model, data, 1.0, solver=solver, laws=()).losses

    arrays, rest = eqx.partition(model, eqx.is_array)
    for losses in (flowed, fitted, descended, by_batches):
        found = primitives(lambda a, of=losses: of(eqx.combine(a, rest)), arrays)
        assert "exp" in found
        assert "log1p" not in found
