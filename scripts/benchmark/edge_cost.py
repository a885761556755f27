"""What the central flow costs, beside its published discretization and beside descent.

The published one takes four Euler steps in each step of the descent, with the largest
eigenvalues and the complementarity problem in each [Cohen et al. 2025]. Here it is written
with dense eigenvalues. Both are compared at equal errors, by what they count.
"""

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import homoflow as hf

from .ratios import Row

#: Euler steps in a step of the descent.
_SUBSTEPS = 4
#: Eigenvalues above this part of the threshold are in the complementarity problem, and
#: there are at most so many.
_CRITICAL, _MOST = 0.975, 3
#: Tolerances that are tried: the cheapest run that is as accurate as Euler's steps counts.
_RTOLS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)
_REFERENCE_RTOL = 1e-8


class _Setting(NamedTuple):
    model: Any
    data: Any
    learning_rate: float
    t1: float


class TanhLinear(eqx.Module):
    """tanh, then two linear layers."""

    layers: list[Array]

    def __init__(self, sizes: tuple[int, ...], scale: float, key: Array):
        shapes = [(b, a) for a, b in itertools.pairwise(sizes)]
        factors = [1.0, *(scale * a**-0.5 for a in sizes[1:-1])]
        self.layers = [
            factor * jr.normal(k, shape)
            for factor, k, shape in zip(
                factors, jr.split(key, len(shapes)), shapes, strict=True
            )
        ]

    def __call__(self, x):
        first, second, third = self.layers
        return third @ (second @ jnp.tanh(first @ x))


def _settings() -> dict[str, _Setting]:
    x = jnp.linspace(-2, 2, 20)[:, None]
    one = _Setting(
        TanhLinear((1, 10, 10, 1), 1.0, jr.key(1)), (x, 1.5 * jnp.sin(3 * x)), 0.05, 200
    )
    x = jr.normal(jr.key(9), (20, 2))
    waves = jnp.sin(2 * x @ jnp.array([[1.0, 0, 1], [0, 1, -1]]) + jnp.arange(3.0))
    two = _Setting(TanhLinear((2, 8, 8, 3), 1.0, jr.key(1)), (x, 2 * waves), 0.1, 100)
    return {"1-10-10-1": one, "2-8-8-3": two}


def bench_edge(repeats: int) -> list[Row]:
    """Counts at the accuracy of Euler's steps, and time beside that of a descent."""
    del repeats  # Counts are the same in every run.
    rows = []
    for name, setting in _settings().items():
        rows += _beside_euler(name, setting)
    return [*rows, _beside_descent()]


def _flow(setting: _Setting, rtol: float) -> hf.Trajectory:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.central_flow(
            setting.model,
            setting.data,
            setting.t1,
            learning_rate=setting.learning_rate,
            ts=np.linspace(0, setting.t1, 3),
            laws=(),
            rtol=rtol,
            estimate_error=False,
        )


def _beside_euler(name: str, setting: _Setting) -> list[Row]:
    steps = _SUBSTEPS * round(setting.t1 / setting.learning_rate)
    reference = ravel_pytree(_flow(setting, _REFERENCE_RTOL).model)[0]
    euler = jnp.linalg.norm(_euler(setting, steps) - reference)
    accurate = {}
    for rtol in _RTOLS:
        run = _flow(setting, rtol)
        error = jnp.linalg.norm(ravel_pytree(run.model)[0] - reference)
        if error <= euler:
            accurate[rtol] = run
    # Too loose a tolerance may cost more, by steps that do not come back to the edge.
    rtol = min(accurate, key=lambda r: int(accurate[r].stats["gradient_evaluations"]))
    stats, critical = accurate[rtol].stats, accurate[rtol].observed["critical"]
    found = f"{name}, k ≤ {int(critical.max())}, rtol {rtol:g}: of {steps:,}"

    def part(key: str) -> float:
        return float(stats[key] / steps)

    equivalents = (
        stats["gradient_evaluations"]
        + 2 * stats["hessian_vector_products"]
        + 4 * stats["third_derivatives"]
    )
    return [
        Row(f"gradients, {found}", part("gradient_evaluations"), 1 / 8),
        Row(f"eigenvalue searches, {found}", part("eigenvalue_searches"), 1 / 10),
        Row(f"all products, {found}", float(equivalents / steps), 1.0),
    ]


def _euler(setting: _Setting, steps: int) -> Array:
    """Final weights of Euler's method for the projected flow, with dense eigenvalues."""
    problem = hf.make_problem(setting.model, setting.data)
    w0, unravel = ravel_pytree(problem.weights)
    threshold, length = 2 / setting.learning_rate, setting.t1 / steps

    def loss(w: Array) -> Array:
        return problem.loss(unravel(w))

    def block(w: Array, vectors: Array) -> Array:
        """UᵀHU for constant U."""

        def image(u: Array) -> Array:
            return jax.jvp(jax.grad(loss), (w,), (u,))[1]

        return vectors @ jax.vmap(image)(vectors).T

    def step(w: Array, _: None) -> tuple[Array, None]:
        values, vectors = jnp.linalg.eigh(jax.hessian(loss)(w))
        values, vectors = values[::-1][:_MOST], vectors[:, ::-1][:, :_MOST].T
        is_near = values >= _CRITICAL * threshold
        slopes = jax.jacrev(block)(w, vectors)
        gradient = jax.grad(loss)(w)
        room = jnp.diag((threshold - values) / length)
        linear = jnp.einsum("ijw,w->ij", slopes, gradient) + room
        both = is_near[:, None] & is_near
        x = _complementary(jnp.where(both[:, :, None], slopes, 0), linear, both)
        force = jnp.einsum("ij,ijw->w", x, slopes)
        return w - length * (gradient + force / 2), None

    return jax.jit(lambda w: jax.lax.scan(step, w, None, length=steps)[0])(w0)


def _complementary(slopes: Array, linear: Array, both: Array) -> Array:
    """X ⪰ 0 with J∇L + ½JJ*X ⪰ 0 on the near pairs, by projected gradients."""
    gram = jnp.einsum("ijw,klw->ijkl", slopes, slopes) / 2
    size = linear.shape[0]
    largest = jnp.max(jnp.linalg.eigvalsh(gram.reshape(size**2, size**2)))
    rate = 1 / jnp.where(largest > 0, largest, 1)

    def improve(_: int, x: Array) -> Array:
        x = x - rate * (jnp.einsum("ijkl,kl->ij", gram, x) + linear)
        values, vectors = jnp.linalg.eigh(jnp.where(both, x, 0))
        return (vectors * jnp.maximum(values, 0)) @ vectors.T

    return jax.lax.fori_loop(0, 60, improve, jnp.zeros_like(linear))


def _beside_descent() -> Row:
    """CPU time at 93,900 weights, both compiled before."""
    x = jr.normal(jr.key(100), (40, 10))
    y = 2 * jnp.sin(2 * x @ jr.normal(jr.key(200), (10, 3)) / np.sqrt(10))
    model = TanhLinear((10, 300, 300, 3), _SCALE, jr.key(0))
    setting = _Setting(model, (x, y), _RATE, _T1)
    steps = round(_T1 / _RATE)

    def descend() -> hf.Trajectory:
        return hf.descend(
            model, (x, y), steps, learning_rate=_RATE, laws=(), record_every=50
        )

    flow, descent = _second_time(lambda: _flow(setting, 1e-3)), _second_time(descend)
    return Row(
        f"time of 93,900 weights, of a descent's {steps:,} steps", flow / descent, 3
    )


def _second_time(run: Callable[[], hf.Trajectory]) -> float:
    jax.block_until_ready(run().losses)
    start = time.process_time()
    jax.block_until_ready(run().losses)
    return time.process_time() - start


#: Of 93,900 weights: how much smaller than usual they start, and the descent.
_SCALE, _RATE, _T1 = 0.3, 0.05, 300.0
