"""What an optimizer's step is made of, so far as its parts can be told apart.

An update is a function u(g, m, w) of the gradient, the optimizer's memory and the
weights. What the memory contributes is u(0, m, 0) only if it adds to the rest, as in
momentum, and not if it scales the gradient, as in Adam. Which of these holds is measured,
not guessed from a name.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

_STEPS = 6
#: Sizes of gradients, next to weights of size 1.
_SCALES = (2.0**-20, 1.0, 2.0**20)
_RTOL = 1e-9

How = Literal["absent", "adds", "mixes"]


class Sources(eqx.Module):
    """How memory and weights enter an update u(g, m, w).

    - `memory`: `"adds"` if u(g, m, w) = u(g, 0, w) + u(0, m, 0).
    - `weights`: `"adds"` if u(g, m, w) = u(g, m, 0) + u(0, 0, w).
    - `is_multiple`: whether what is left is a multiple of the gradient.
    - `keeps_scalars`: whether numbers in the optimizer's state are settings of it, such as
        an injected learning rate, and not memory.
    """

    memory: How = eqx.field(static=True)
    weights: How = eqx.field(static=True)
    is_multiple: bool = eqx.field(static=True)
    keeps_scalars: bool = eqx.field(static=True)

    @property
    def note(self) -> str:
        """What `transformation` holds that cannot be told apart; empty if nothing."""
        mixed = [
            name
            for name, how in (("memory", self.memory), ("weights", self.weights))
            if how == "mixes"
        ]
        if not mixed or self.is_multiple:
            return ""
        return (
            f"What the optimizer makes of its {' and '.join(mixed)} cannot be told from "
            "the rest of the step: it is in `transformation`."
        )

    def without_memory(self, state: PyTree) -> PyTree:
        """An optimizer's state with zeros for its memory; step counts stay."""

        def without(leaf):
            is_memory = eqx.is_inexact_array(leaf)
            if is_memory and not (self.keeps_scalars and leaf.ndim == 0):
                return jnp.zeros_like(leaf)
            return leaf

        return jax.tree.map(without, state)


#: What is assumed of an optimizer that cannot be measured: exact, but less is told.
UNKNOWN = Sources("mixes", "mixes", False, False)


def read_sources(make_optimizer: Callable, weights: PyTree) -> Sources:
    """The sources of `make_optimizer(1.0)` on weights of this structure."""
    leaves, structure = jax.tree.flatten(weights)
    # An optimizer may tell weights apart by their place and rank, not by their size.
    shapes = tuple(tuple(min(n, 2) for n in leaf.shape) for leaf in leaves)
    return _read(make_optimizer, structure, shapes)


@functools.lru_cache(maxsize=256)
def _read(make_optimizer: Callable, structure: Any, shapes: tuple) -> Sources:
    # Double precision, whatever the run's own: rounding is not to pass for a source.
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.enable_x64(True),
    ):
        weights = jax.tree.unflatten(structure, [jnp.zeros(s) for s in shapes])
        optimizer = optax.with_extra_args_support(make_optimizer(1.0))
        state = jax.tree.leaves(optimizer.init(weights))
        read = _measured(optimizer, weights, keeps_scalars=False)
        scalars = any(eqx.is_inexact_array(a) and a.ndim == 0 for a in state)
        if "mixes" in (read.memory, read.weights) and scalars:
            again = _measured(optimizer, weights, keeps_scalars=True)
            if (again.memory, again.weights).count("mixes") < 2:
                return again
        return read


def _measured(optimizer: Any, weights: PyTree, *, keeps_scalars: bool) -> Sources:
    u = _Responses(optimizer, weights, keeps_scalars).measured()
    memory = _how(u["gmw"], u["gw"], u["m"])
    decay = _how(u["gmw"], u["gm"], u["w"])
    rest = u["gmw"] - (u["m"] if memory == "adds" else 0)
    rest = rest - (u["w"] if decay == "adds" else 0)
    return Sources(memory, decay, _is_multiple(rest, u["gradient"]), keeps_scalars)


class _Responses(eqx.Module):
    """An optimizer's updates with some of gradient, memory and weights left out."""

    optimizer: Any
    weights: PyTree
    keeps_scalars: bool

    def measured(self) -> dict[str, np.ndarray]:
        """Along a run of random gradients and weights; one row for each update."""
        start, unravel = jax.flatten_util.ravel_pytree(self.weights)
        apart = Sources("adds", "adds", False, self.keeps_scalars)

        def update(gradient, state, weights, *, value):
            return self.optimizer.update(
                unravel(gradient), state, unravel(weights), value=value,
                grad=unravel(gradient), value_fn=_some_function,
            )  # fmt: skip

        def step(state, row):
            g, w, value = row
            empty = apart.without_memory(state)
            no = jnp.zeros_like(w)
            given = {
                "gmw": (g, state, w), "gw": (g, empty, w), "gm": (g, state, no),
                "m": (no, state, no), "w": (no, empty, w),
            }  # fmt: skip
            made = {name: update(*of, value=value) for name, of in given.items()}
            flat = {
                name: jax.flatten_util.ravel_pytree(u)[0]
                for name, (u, _) in made.items()
            }
            return made["gmw"][1], flat | {"gradient": g}

        @jax.jit
        @jax.vmap
        def run(gradients, weights, values):
            state = self.optimizer.init(self.weights)
            return jax.lax.scan(step, state, (gradients, weights, values))[1]

        rng = np.random.default_rng(0)
        shape = (len(_SCALES), _STEPS, start.size)
        gradients, weights = rng.standard_normal((2, *shape))
        scales = np.reshape(_SCALES, (-1, 1, 1))
        seen = run(scales * gradients, weights, 1 + rng.random(shape[:2]))
        return {name: np.asarray(u).reshape(-1, start.size) for name, u in seen.items()}


def _some_function(weights: PyTree) -> Any:
    """A loss, for optimizers that search along a line."""
    return 1 + sum(jnp.sum(w**2) for w in jax.tree.leaves(weights))


def _how(whole: np.ndarray, without: np.ndarray, alone: np.ndarray) -> How:
    if _same(whole, without):
        return "absent"
    return "adds" if _same(whole, without + alone) else "mixes"


def _is_multiple(updates: np.ndarray, gradients: np.ndarray) -> bool:
    square = np.sum(gradients**2, axis=1, keepdims=True)
    along = np.sum(updates * gradients, axis=1, keepdims=True) / square
    return _same(updates, along * gradients)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    size = np.abs(a).max(axis=1, keepdims=True)
    return bool(np.all(np.abs(a - b) <= _RTOL * size))
