"""What an optimizer's step is made of, so far as its parts can be told apart.

An update is a function u(g, m, w) of the gradient, the optimizer's memory and the
weights. What the memory contributes is u(0, m, 0) only if it adds to the rest, as in
momentum, and not if it scales the gradient, as in Adam. Which of these holds is measured.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from ._optimizer_probe import NUM_STEPS, OptimizerProbe, read_by_probe

#: Sizes of gradients, next to weights of size 1.
_SCALES = (2.0**-20, 1.0, 2.0**20)
_RTOL = 1e-9

Effect = Literal["none", "additive", "coupled"]


class UpdateParts(eqx.Module):
    """How memory and weights enter an update u(g, m, w).

    - `memory`: `"additive"` if u(g, m, w) = u(g, 0, w) + u(0, m, 0).
    - `weights`: `"additive"` if u(g, m, w) = u(g, m, 0) + u(0, 0, w).
    - `is_multiple`: whether what is left is a multiple of the gradient.
    - `keeps_scalars`: whether numbers in the optimizer's state are settings of it, such as
        an injected learning rate, and not memory.
    """

    memory: Effect = eqx.field(static=True)
    weights: Effect = eqx.field(static=True)
    is_multiple: bool = eqx.field(static=True)
    keeps_scalars: bool = eqx.field(static=True)

    @property
    def coupled(self) -> tuple[str, ...]:
        """What cannot be told from the rest of the update."""
        effects = {"memory": self.memory, "weights": self.weights}
        return tuple(name for name, effect in effects.items() if effect == "coupled")

    @property
    def note(self) -> str:
        """What `transformation` holds that cannot be told apart; empty if nothing."""
        if not self.coupled or self.is_multiple:
            return ""
        return (
            f"What the optimizer makes of its {' and '.join(self.coupled)} cannot be told "
            "from the rest of the step: it is in `transformation`."
        )

    def clear_memory(self, state: PyTree) -> PyTree:
        """An optimizer's state with zeros for its memory; step counts stay."""

        def clear(leaf):
            is_memory = eqx.is_inexact_array(leaf)
            if is_memory and not (self.keeps_scalars and leaf.ndim == 0):
                return jnp.zeros_like(leaf)
            return leaf

        return jax.tree.map(clear, state)


#: What is assumed of an optimizer that cannot be measured: exact, but less detailed.
UNKNOWN = UpdateParts("coupled", "coupled", False, False)


def probe_update_parts(make_optimizer: Callable, weights: PyTree) -> UpdateParts:
    """The parts of `make_optimizer(1.0)`'s updates of weights of this structure."""
    return _read(make_optimizer, weights)


@read_by_probe
def _read(probe: OptimizerProbe) -> UpdateParts:
    parts = _measure(probe, keeps_scalars=False)
    has_scalars = any(
        eqx.is_inexact_array(leaf) and leaf.ndim == 0
        for leaf in jax.tree.leaves(probe.init())
    )
    if parts.coupled and has_scalars:
        with_scalars = _measure(probe, keeps_scalars=True)
        if len(with_scalars.coupled) < 2:
            return with_scalars
    return parts


def _measure(probe: OptimizerProbe, *, keeps_scalars: bool) -> UpdateParts:
    u = _partial_updates(probe, keeps_scalars)
    memory = _effect(u["gmw"], u["gw"], u["m"])
    weights = _effect(u["gmw"], u["gm"], u["w"])
    remainder = u["gmw"] - (u["m"] if memory == "additive" else 0)
    remainder = remainder - (u["w"] if weights == "additive" else 0)
    is_multiple = _is_multiple(remainder, u["gradient"])
    return UpdateParts(memory, weights, is_multiple, keeps_scalars)


def _partial_updates(
    probe: OptimizerProbe, keeps_scalars: bool
) -> dict[str, Float[np.ndarray, "updates size"]]:
    """Updates with some of gradient g, memory m and weights w left out.

    Along a run of random gradients and weights; one row for each update.
    """
    separate = UpdateParts("additive", "additive", False, keeps_scalars)

    def step(state, row):
        gradient, weights, value = row
        empty, zeros = separate.clear_memory(state), jnp.zeros_like(weights)
        arguments = {
            "gmw": (gradient, state, weights),
            "gw": (gradient, empty, weights),
            "gm": (gradient, state, zeros),
            "m": (zeros, state, zeros),
            "w": (zeros, empty, weights),
        }
        results = {
            name: probe.update(*given, value=value, value_fn=_quadratic)
            for name, given in arguments.items()
        }
        updates = {name: update for name, (update, _) in results.items()}
        return results["gmw"][1], updates | {"gradient": gradient}

    @jax.jit
    @jax.vmap
    def run(gradients, weights, values):
        return jax.lax.scan(step, probe.init(), (gradients, weights, values))[1]

    random = np.random.default_rng(0)
    shape = (len(_SCALES), NUM_STEPS, probe.size)
    gradients, weights = random.standard_normal((2, *shape))
    scales = np.reshape(_SCALES, (-1, 1, 1))
    updates = run(scales * gradients, weights, 1 + random.random(shape[:2]))
    return {name: np.asarray(u).reshape(-1, probe.size) for name, u in updates.items()}


def _quadratic(weights: PyTree) -> Any:
    """A loss, for optimizers that search along a line."""
    return 1 + sum(jnp.sum(w**2) for w in jax.tree.leaves(weights))


def _effect(whole: np.ndarray, without: np.ndarray, alone: np.ndarray) -> Effect:
    if _is_close(whole, without):
        return "none"
    return "additive" if _is_close(whole, without + alone) else "coupled"


def _is_multiple(updates: np.ndarray, gradients: np.ndarray) -> bool:
    square = np.sum(gradients**2, axis=1, keepdims=True)
    along = np.sum(updates * gradients, axis=1, keepdims=True) / square
    return _is_close(updates, along * gradients)


def _is_close(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether every row is the same, to rounding."""
    size = np.abs(a).max(axis=1, keepdims=True)
    return bool(np.all(np.abs(a - b) <= _RTOL * size))
