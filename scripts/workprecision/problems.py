"""The gradient flows that are integrated: networks with kinks, data, a loss, an end."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float

import homoflow as hf

_CASE = Path(__file__).parents[2] / "tests" / "data" / "relu_20_30_30_3.npz"


@dataclass(frozen=True)
class Problem:
    """dw/dt = −∇L(w) from `model` to `t1`, for all methods by the same gradient.

    `reference` holds the final weights if they are known from elsewhere. `slots` is
    what `homoflow.Filippov` needs.
    """

    title: str
    model: eqx.Module
    data: tuple[Array, Array]
    loss: hf.AbstractLoss
    t1: float
    slots: int
    reference: np.ndarray | None = None

    @cached_property
    def w0(self) -> Float[np.ndarray, " weights"]:
        return flat(self.model)

    @property
    def samples(self) -> int:
        return int(self.data[0].shape[0])

    @property
    def scale(self) -> float:
        """Root mean square of the initial weights: absolute tolerances are in this."""
        return float(np.sqrt(np.mean(self.w0**2)))

    @cached_property
    def gradient(self) -> Callable[[ArrayLike], Float[Array, " weights"]]:
        arrays, rest = eqx.partition(self.model, eqx.is_inexact_array)
        unravel = jax.flatten_util.ravel_pytree(arrays)[1]
        x, y = self.data

        def risk(w):
            predictions = jax.vmap(eqx.combine(unravel(w), rest))(x)
            return jnp.mean(jax.vmap(self.loss)(predictions, y))

        return jax.jit(jax.grad(risk))

    def error(self, w: np.ndarray, reference: np.ndarray) -> float:
        """Relative, in the norm of all weights."""
        return float(np.linalg.norm(w - reference) / np.linalg.norm(reference))


def flat(model: eqx.Module) -> Float[np.ndarray, " weights"]:
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return np.concatenate([np.ravel(a) for a in arrays])


def dense() -> Problem:
    """The stored case: its final weights come from another program."""
    case = np.load(_CASE)
    start, end = (_case_model(case, tag) for tag in ("0", "t60"))
    return Problem(
        title="20-30-30-3, ReLU",
        model=start,
        data=(jnp.asarray(case["X"]), jnp.asarray(case["Y"])),
        loss=hf.SquaredLoss(),
        t1=60.0,
        slots=96,
        reference=flat(end),
    )


def biased() -> Problem:
    """Narrow and with biases: half of the kinks that are left at the end slide."""
    model = hf.MLP((5, 10, 1), use_bias=True, key=jr.key(0))
    return Problem(
        title="5-10-1 with biases, ReLU",
        model=_with_random_biases(model, seed=100),
        data=(_normal(1, (30, 5)), _normal(2, (30, 1))),
        loss=hf.SquaredLoss(),
        t1=50.0,
        slots=24,
    )


def convolutional() -> Problem:
    model = hf.ConvNet(
        (1, 10), (4,), 1, kernel_size=3, hidden=(8,),
        activation=hf.LeakyReLU(0.1), key=jr.key(0),
    )  # fmt: skip
    return Problem(
        title="convolution, 2 dense; leaky ReLU, logistic loss",
        model=model,
        data=(_normal(1, (60, 1, 10)), jnp.sign(_normal(2, (60, 1)))),
        loss=hf.LogisticLoss(),
        t1=50.0,
        slots=32,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "dense": dense,
    "biased": biased,
    "convolutional": convolutional,
}


def _case_model(case, tag: str) -> hf.MLP:
    model = hf.MLP((20, 30, 30, 3), key=jr.key(0))
    weights = [jnp.asarray(case[f"W{i}_{tag}"]) for i in (1, 2, 3)]
    return eqx.tree_at(lambda m: [a.weight for a in m.layers], model, weights)


def _with_random_biases(model: hf.MLP, seed: int) -> hf.MLP:
    where = lambda m: [layer.bias for layer in m.layers]  # noqa: E731
    drawn = [0.3 * _normal(seed + i, b.shape) for i, b in enumerate(where(model))]
    return eqx.tree_at(where, model, drawn)


def _normal(seed: int, shape: tuple[int, ...]) -> Array:
    return jr.normal(jr.key(seed), shape)
