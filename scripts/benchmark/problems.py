"""Smooth gradient flows on which homoflow and its peers are timed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

import homoflow as hf
from homoflow._jaxpr import use_fast_softplus

#: Seeds of the batches, and those of them on which every method is judged: peers that
#: solve one after the other are run on these alone, and their cost is scaled up.
SEEDS, JUDGED = 64, 8


@dataclass(frozen=True)
class Problem:
    """dw/dt = −∇L(w) from `model` to `t1`, for all methods by the same gradient.

    With `seeds` > 1 the arrays of `model` have a leading axis. `is_stiff`: explicit
    methods are held up by stability. `is_softplus`: of such a network, whose gradient
    homoflow computes faster than JAX does. `is_quick`: peers are given that one.
    """

    title: str
    model: PyTree
    data: Any
    t1: float
    is_stiff: bool
    objective: Callable[[PyTree, Any], Array] | None = None
    seeds: int = 1
    is_softplus: bool = False
    is_quick: bool = False

    @cached_property
    def starts(self) -> Float[np.ndarray, "seeds weights"]:
        return flat(self.model, self.seeds)

    @property
    def w0(self) -> Float[np.ndarray, " weights"]:
        return self.starts[0]

    @property
    def size(self) -> int:
        return int(self.starts.shape[1])

    @property
    def judged(self) -> int:
        return min(self.seeds, JUDGED)

    @property
    def scale(self) -> float:
        """Root mean square of the initial weights: absolute tolerances are in this."""
        return float(np.sqrt(np.mean(self.starts**2)))

    @cached_property
    def risk(self) -> Callable[[Array], Array]:
        """L as a function of all weights of one seed, in a row."""
        arrays, rest = eqx.partition(self.model, eqx.is_inexact_array)
        if self.seeds > 1:
            arrays = jax.tree.map(lambda a: a[0], arrays)
        unravel = jax.flatten_util.ravel_pytree(arrays)[1]
        objective = hf_risk if self.objective is None else self.objective

        def risk(w):
            return objective(eqx.combine(unravel(w), rest), self.data)

        return use_fast_softplus(risk) if self.is_quick else risk

    @cached_property
    def gradient(self) -> Callable[[Any], Array]:
        return jax.jit(jax.grad(self.risk))

    @cached_property
    def gradients(self) -> Callable[[Any], Array]:
        """Of all seeds at once."""
        return jax.jit(jax.vmap(jax.grad(self.risk)))

    @cached_property
    def hessian(self) -> Callable[[Any], Array]:
        return jax.jit(jax.hessian(self.risk))

    def error(self, ends: np.ndarray, reference: np.ndarray) -> float:
        """Relative, in the norm of all weights: that of the worst of the judged seeds."""
        difference = np.linalg.norm(ends[: self.judged] - reference, axis=1)
        return float(np.max(difference / np.linalg.norm(reference, axis=1)))


def hf_risk(model: PyTree, data: tuple[Array, Array]) -> Array:
    """½‖f(x) − y‖², averaged over samples."""
    x, y = data
    return 0.5 * jnp.mean(jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1))


def flat(model: PyTree, seeds: int = 1) -> Float[np.ndarray, "seeds weights"]:
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return np.concatenate([np.reshape(a, (seeds, -1)) for a in arrays], axis=1)


def small(samples: int, t1: float, seeds: int = 1) -> Problem:
    """The small benchmark of MLPGradientFlow [Brea et al. 2023]."""
    return _student((2, 8, 1), samples, t1, seeds)


def large() -> Problem:
    """The large one, of 601 parameters."""
    return _student((4, 100, 1), 1000, 100.0, 1)


def linear() -> Problem:
    model = hf.MLP((20, 30, 30, 3), activation="linear", key=jr.key(0))
    data = _normal(1, (100, 20)), _normal(2, (100, 3))
    title = "deep linear 20-30-30-3, 100 points"
    return Problem(title, model, data, 60.0, is_stiff=True)


def factorization(seeds: int = 1) -> Problem:
    """A target of rank 5 with singular values 5, 4, …, 1, from entries of 1e-3."""
    left, right = (
        jnp.linalg.qr(_normal(seed, (n, 5)))[0] for seed, n in ((1, 50), (2, 40))
    )
    target = (left * jnp.arange(5.0, 0, -1)) @ right.T
    model = _seeded(
        lambda key: hf.MatrixFactorization(50, 40, 5, std=1e-3, key=key), seeds
    )
    return Problem(
        f"factorization 50×40, r = 5, from 1e-3{_of(seeds)}",
        model,
        target,
        20.0,
        is_stiff=False,
        objective=hf.factorization_objective,
        seeds=seeds,
    )


def figure2() -> Problem:
    """The network of the paper's Figure 2 and its balanced start, but linear."""
    init = hf.Gaussian(variance=(1e-4 / 100, 1e-4 / 10, 1e-4))
    sizes = (1000, 100, 100, 10)
    model = hf.MLP(sizes, activation="linear", init=init, key=jr.key(0))
    data = _normal(1, (1000, 1000)), _normal(2, (1000, 10))
    title = "deep linear 1000-100-100-10, 1,000 points"
    return Problem(title, model, data, 20.0, is_stiff=False)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "a-1000-100": lambda: small(1000, 100.0),
    "a-1000-1000": lambda: small(1000, 1000.0),
    "a-10000-100": lambda: small(10_000, 100.0),
    "a-10000-1000": lambda: small(10_000, 1000.0),
    "b": large,
    "c": linear,
    "d": factorization,
    "e": figure2,
    "f-a": lambda: small(1000, 100.0, SEEDS),
    "f-d": lambda: factorization(SEEDS),
}


def _student(sizes: tuple[int, ...], samples: int, t1: float, seeds: int) -> Problem:
    """softplus with biases; a teacher of width 4 with weights and biases from N(0, 1)."""
    widths = (sizes[0], 4, 1)
    teacher = hf.MLP(widths, activation=jax.nn.softplus, use_bias=True, key=jr.key(0))
    leaves, structure = jax.tree.flatten(eqx.filter(teacher, eqx.is_inexact_array))
    drawn = [_normal(100 + i, leaf.shape) for i, leaf in enumerate(leaves)]
    rest = eqx.filter(teacher, eqx.is_inexact_array, inverse=True)
    teacher = eqx.combine(jax.tree.unflatten(structure, drawn), rest)
    model = _seeded(
        lambda key: hf.MLP(
            sizes, activation=jax.nn.softplus, use_bias=True, init=hf.Xavier(), key=key
        ),
        seeds,
    )
    x = _normal(1, (samples, sizes[0]))
    name = "-".join(map(str, sizes))
    title = f"softplus {name} with biases, {samples:,} points{_of(seeds)}"
    data = x, jax.vmap(teacher)(x)
    return Problem(title, model, data, t1, True, seeds=seeds, is_softplus=True)


def _seeded(build: Callable[[Array], PyTree], seeds: int) -> PyTree:
    if seeds == 1:
        return build(jr.key(3))
    return eqx.filter_vmap(build)(jr.split(jr.key(3), seeds))


def _of(seeds: int) -> str:
    return "" if seeds == 1 else f", {seeds} seeds"


def _normal(seed: int, shape: tuple[int, ...]) -> Array:
    return jr.normal(jr.key(seed), shape)
