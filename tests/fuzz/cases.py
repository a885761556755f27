"""A call of `homoflow.flow`, drawn from a seed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from zoo import INPUTS, JUMPING, KINKED, MODELS, OUTPUTS

import homoflow as hf

SAMPLES = 8
#: Draws that share a program: what is compiled for one serves all.
PER_PROGRAM = 50


def _own_loss(prediction, target):
    return 0.5 * jnp.sum((prediction - target) ** 2)


LOSSES: dict[str, Any] = {
    "squared": hf.SquaredLoss(),
    "own": _own_loss,
    "logistic": hf.LogisticLoss(),
    "cross-entropy": hf.SoftmaxCrossEntropy(),
    "Huber": hf.HuberLoss(0.5),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "rtol=1e-8": {"rtol": 1e-8},
    "rtol=1e-4": {"rtol": 1e-4},
    "weight_decay=0.1": {"weight_decay": 0.1},
    "Tsit5": {"rtol": 1e-8, "solver": diffrax.Tsit5()},
    "ExponentialAdams": {"rtol": 1e-8, "solver": hf.ExponentialAdams()},
    "Filippov": {"rtol": 1e-8, "solver": hf.Filippov()},
    "Averaged": {"rtol": 1e-5, "solver": hf.Averaged()},
    "no projection": {"rtol": 1e-6, "project": False},
}
#: Options that only models with kinks, or only smooth ones, take.
FOR_KINKS = {"Filippov", "Averaged"}
FOR_SMOOTH = {"Tsit5", "ExponentialAdams"}
#: Models whose kinks the exact flow follows.
FOLLOWED = {
    "relu",
    "leaky relu",
    "absolute value",
    "ReLU MLP",
    "deep ReLU MLP",
    "residual",
}
SCALES = (1e-150, 1e-30, 1e-8, 1e-3, 0.1, 1.0, 1.0, 1.0, 3.0)
TIMES = (0.01, 0.5, 3.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and all that it takes to make it again.

    `seed` draws the numbers; the names choose the program.
    """

    model: str
    loss: str
    options: str
    seed: int

    def draw(self) -> "Call":
        rng = np.random.default_rng(self.seed)
        scale, t1 = rng.choice(SCALES), rng.choice(TIMES)
        made = MODELS[self.model](rng)
        model = jax.tree.map(
            lambda leaf: leaf * scale if eqx.is_inexact_array(leaf) else leaf, made
        )
        x = _inputs(rng)
        return Call(model, x, _targets(self.loss, rng), float(t1), float(scale))

    @property
    def has_kinks(self) -> bool:
        kinked = {*KINKED, *JUMPING, "stacked ReLU"}
        return self.model in kinked or self.model in FOLLOWED

    def snippet(self) -> str:
        """Code that makes the call again."""
        return (
            f"Case({self.model!r}, {self.loss!r}, {self.options!r}, {self.seed}).draw()"
        )


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `flow`."""

    model: eqx.Module
    x: Float[Array, "samples inputs"]
    y: Array
    t1: float
    scale: float


def draw_case(number: int) -> Case:
    """The case of a number: `PER_PROGRAM` in a row share their program."""
    rng = np.random.default_rng([1, number // PER_PROGRAM])
    model = str(rng.choice(list(MODELS)))
    case = Case(model, str(rng.choice(list(LOSSES))), "default", number)
    allowed = [o for o in OPTIONS if _fits(case, o)]
    return dataclasses.replace(case, options=str(rng.choice(allowed)))


def _fits(case: Case, options: str) -> bool:
    if options == "Filippov":
        return case.model in FOLLOWED
    if case.has_kinks:
        return options not in FOR_SMOOTH
    return options not in FOR_KINKS


def _inputs(rng: np.random.Generator) -> Array:
    x = rng.standard_normal((SAMPLES, INPUTS))
    style: Callable[[], np.ndarray] = rng.choice(
        np.array(
            [
                lambda: x,
                lambda: x,
                lambda: np.repeat(x[:2], SAMPLES // 2, axis=0),
                lambda: np.outer(x[:, 0], x[0]),
                lambda: np.eye(INPUTS)[rng.integers(0, INPUTS, SAMPLES)],
                lambda: np.where(rng.random(x.shape) < 0.5, 0, x),
                lambda: 1e-6 * x,
                lambda: 30 * x,
            ]
        )
    )
    return jnp.asarray(style())


def _targets(loss: str, rng: np.random.Generator) -> Array:
    match loss:
        case "logistic":
            return jnp.asarray(rng.choice([-1.0, 1.0], (SAMPLES, OUTPUTS)))
        case "cross-entropy":
            return jnp.asarray(rng.integers(0, OUTPUTS, SAMPLES))
        case _:
            return jnp.asarray(rng.standard_normal((SAMPLES, OUTPUTS)))
