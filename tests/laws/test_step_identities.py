"""What a finite step does to every law of every family, against formulas in NumPy.

Laws are the formulas h(w) = q(w) + b(w) of other test files, of which nothing but values
is used: q, b and the bilinear form come from them by polarization. Gradients are JAX's.
"""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_law_search import CASES, redrawn as redrawn_case
from test_laws import FAMILIES, LOSSES, OUTPUTS, SAMPLES, array, draws, family_of

import homoflow as hf
from homoflow._problem._losses import Risk

STEPS = 4
MOMENTUM = 0.8
FOUND = (
    "eqx.nn.MultiheadAttention", "eqx.nn.LayerNorm", "eqx.nn.RMSNorm",
    "batch statistics", "gated, bilinear", "scan over time", "embedding",
    "weight normalization", "shifted gain",
)  # fmt: skip
SOFTMAX = "softmax: "


class Identity:
    """One family: flat weights, its laws by NumPy and the gradient by JAX."""

    def __init__(self, name: str):
        self.name = name
        model, self.formulas, objective = problem(name)
        arrays, rest = eqx.partition(model, eqx.is_inexact_array)
        leaves, structure = jax.tree.flatten(arrays)
        self.shapes = [leaf.shape for leaf in leaves]
        self.start = np.concatenate([np.ravel(leaf) for leaf in leaves])
        self.rebuild = functools.partial(jax.tree.unflatten, structure)
        self.rest = rest
        self.derivative = jax.jit(
            jax.grad(
                lambda arrays, *data: objective(
                    eqx.combine(self.rebuild(arrays), rest), *data
                )
            )
        )

    def arrays(self, w):
        ends = np.cumsum([int(np.prod(s)) for s in self.shapes])[:-1]
        return [
            part.reshape(s)
            for part, s in zip(np.split(w, ends), self.shapes, strict=True)
        ]

    def gradient(self, w, *data):
        return np.concatenate(
            [np.ravel(g) for g in self.derivative(self.arrays(w), *data)]
        )

    def h(self, w):
        model = eqx.combine(self.rebuild(self.arrays(w)), self.rest)
        return np.concatenate([np.ravel(v) for v in self.formulas(model).values()])

    def q(self, v):
        return (self.h(v) + self.h(-v)) / 2

    def b(self, v):
        return (self.h(v) - self.h(-v)) / 2

    def rate(self, w, u):
        """⟨2Aw + b, u⟩."""
        return (self.q(w + u) - self.q(w - u)) / 2 + self.b(u)

    @property
    def step(self):
        """A learning rate for steps of a twentieth of the weights' size."""
        return 0.05 * norm(self.start) / norm(self.gradient(self.start))


def problem(name):
    """A model, the formulas of its laws and an objective of the model and some data."""
    if name in FOUND:
        build, x, formulas, options = CASES[name]
        xs, batched = inputs(x, options), bool(options)

        def squares(model, xs=xs):
            outputs = model(xs) if batched else jax.vmap(model)(xs)
            targets = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
            return jnp.mean((outputs - targets) ** 2)

        return redrawn_case(build(), seed=8), formulas, squares
    family = family_of(name.removeprefix(SOFTMAX))
    loss, of = LOSSES["cross-entropy" if SOFTMAX in name else "squared"]
    x = jnp.asarray(draws((SAMPLES, *family.x_shape)))
    y = jnp.asarray(of(draws((SAMPLES, OUTPUTS), seed=1)))
    formulas = sums_over_outputs if SOFTMAX in name else family.laws
    return family.model, formulas, lambda m, x=x, y=y: Risk(loss)(m, (x, y))


def inputs(x, options):
    rng = np.random.default_rng(5)
    shape = x.shape if options else (7, *x.shape)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, int(x.max()) + 1, shape))
    return jnp.asarray(rng.standard_normal(shape))


def sums_over_outputs(model):
    last = model.layers[-1]
    sums = {"weight": array(last.weight).sum(axis=0)}
    return sums if last.bias is None else sums | {"bias": array(last.bias).sum()}


def norm(v) -> float:
    return float(np.linalg.norm(v))


def size(w) -> float:
    """Of quadratic and of linear laws of w."""
    return norm(w) ** 2 + norm(w)


NAMES = (*FAMILIES, *FOUND, f"{SOFTMAX}relu, bias", f"{SOFTMAX}conv 1-d")
every_family = pytest.mark.parametrize("name", NAMES)


@functools.cache
def identity_of(name) -> Identity:
    return Identity(name)


def assert_same(after, predicted, w):
    """To 1e-12 of the terms that the laws are differences of."""
    np.testing.assert_allclose(after, predicted, rtol=0, atol=1e-12 * size(w))


def assert_matters(change, w):
    """A check that the term in question is far larger than the tolerance."""
    assert np.abs(change).max() > 1e6 * 1e-12 * size(w)


@every_family
def test_a_step_of_gradient_descent_adds_eta_squared_q(name):
    f, w = identity_of(name), identity_of(name).start
    eta = f.step
    for _ in range(STEPS):
        g = f.gradient(w)
        added = eta**2 * f.q(g)
        if not name.startswith(SOFTMAX):
            assert_matters(added, w)
        assert_same(f.h(w - eta * g), f.h(w) + added, w)
        w = w - eta * g


@every_family
def test_any_update_adds_its_rate_and_q(name):
    f = identity_of(name)
    update = 0.1 * draws(f.start.shape, seed=3)
    added = f.rate(f.start, update) + f.q(update)
    assert_matters(added, f.start)
    assert_same(f.h(f.start + update), f.h(f.start) + added, f.start)


@every_family
def test_weight_decay_shrinks_laws(name):
    """Coupled and decoupled decay are the same step as long as there is no momentum."""
    f, w = identity_of(name), identity_of(name).start
    eta, kept = f.step, 0.95
    decay = (1 - kept) / eta
    for _ in range(STEPS):
        g = f.gradient(w)
        predicted = kept**2 * f.q(w) + kept * f.b(w) + eta**2 * f.q(g)
        predicted = predicted - eta**2 * decay * f.b(g)
        assert_matters(predicted - f.h(w), w)
        after = f.h(w - eta * (g + decay * w))
        assert_same(after, predicted, w)
        w = w - eta * (g + decay * w)


@every_family
def test_heavy_balls_momentum_obeys_its_recursion(name):
    """P₀ = 0, P⁺ = μ(P − ηq(v)), h⁺ = h − 2ηP⁺ + η²q(v⁺), P = ⟨Aw + b/2, v⁺⟩."""
    f, w = identity_of(name), identity_of(name).start
    eta, v, p = 0.3 * f.step, np.zeros_like(w), 0.0
    for _ in range(STEPS):
        p = MOMENTUM * (p - eta * f.q(v))
        v = MOMENTUM * v + f.gradient(w)
        assert_same(f.rate(w, v) / 2, p, v)
        after = f.h(w - eta * v)
        assert_same(after, f.h(w) - 2 * eta * p + eta**2 * f.q(v), w)
        w = w - eta * v
    if not name.startswith(SOFTMAX):
        assert_matters(eta * p, w)


@pytest.mark.parametrize("h", [1, 2])
def test_layers_as_the_theorem_has_them(h):
    """D⁺ = D + η²(‖∂L/∂W_h‖² − ‖∂L/∂W_{h+1}‖²), with D = ‖W_h‖² − ‖W_{h+1}‖²."""
    f = identity_of("relu")
    eta, w, g = f.step, f.arrays(f.start), f.arrays(f.gradient(f.start))
    before, added = (norm(a[h - 1]) ** 2 - norm(a[h]) ** 2 for a in (w, g))
    after = [a - eta * b for a, b in zip(w, g, strict=True)]
    assert_matters(eta**2 * added, f.start)
    assert_same(
        norm(after[h - 1]) ** 2 - norm(after[h]) ** 2,
        before + eta**2 * added,
        f.start,
    )


@pytest.mark.parametrize("name", ["relu, bias", "linear", "conv 1-d", "factorization"])
def test_batches_add_the_trace_of_the_noise_in_the_mean(name):
    """Mean over all batches of b of m: q(ḡ) + tr(AΣ), Σ = Σ₁ (m − b)/(b(m − 1))."""
    f, family, of = identity_of(name), family_of(name), 2
    x = draws((SAMPLES, *family.x_shape))
    y = draws((SAMPLES, OUTPUTS), seed=1)
    single = [f.gradient(f.start, x[[i]], y[[i]]) for i in range(SAMPLES)]
    mean = f.gradient(f.start)
    np.testing.assert_allclose(np.mean(single, axis=0), mean, rtol=0, atol=1e-13)
    batches = itertools.combinations(single, of)
    after = np.mean(
        [f.h(f.start - f.step * np.mean(b, axis=0)) for b in batches], axis=0
    )
    noise = np.mean([f.q(g - mean) for g in single], axis=0)
    noise = noise * (SAMPLES - of) / (of * (SAMPLES - 1))
    assert_matters(f.step**2 * noise, f.start)
    predicted = f.h(f.start) + f.step**2 * (f.q(mean) + noise)
    assert_same(after, predicted, f.start)


def test_what_is_no_law_breaks_the_identity():
    """A negative control: the formulas of a linear network, on the gradient of ReLU."""
    relu, linear = identity_of("relu"), identity_of("linear")
    w, g = relu.start, relu.gradient(relu.start)
    eta = relu.step
    error = linear.h(w - eta * g) - linear.h(w) - eta**2 * linear.q(g)
    assert np.abs(error).max() > 1e-6 * norm(w) ** 2


def test_the_formulas_are_those_of_the_library():
    f = identity_of("mixed, bias")
    laws = hf.laws(family_of("mixed, bias").model)
    assert {law.name for law in laws} == set(f.formulas(family_of("mixed, bias").model))
