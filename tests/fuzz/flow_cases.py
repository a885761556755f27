"""A call of `homoflow.flow`, drawn from a seed."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from zoo import HIDDEN, INPUTS, JUMPING, KINKED, MODELS, OUTPUTS, PLAINER

import homoflow as hf

SAMPLES = 8
#: Draws that share a program: what is compiled for one serves all.
PER_PROGRAM = 100


def _own_loss(prediction, target):
    return 0.5 * jnp.sum((prediction - target) ** 2)


LOSSES: dict[str, Any] = {
    "squared": hf.SquaredLoss(),
    "own": _own_loss,
    "logistic": hf.LogisticLoss(),
    "cross-entropy": hf.SoftmaxCrossEntropy(),
    "Huber": hf.HuberLoss(delta=0.5),
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
#: More steps than an oracle that does not give up needs: stiff flows end the sooner.
MAX_STEPS = 20_000
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


def _repeated(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    return x[np.arange(len(x)) * min(2, len(x)) // len(x)]


def _one_hot(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    return np.eye(INPUTS)[rng.integers(0, INPUTS, len(x))]


#: What is made of inputs that are normal.
STYLES: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "normal": lambda rng, x: x,
    "repeated": _repeated,
    "collinear": lambda rng, x: np.outer(x[:, 0], x[0]),
    "one-hot": _one_hot,
    "sparse": lambda rng, x: np.where(rng.random(x.shape) < 0.5, 0, x),
    "tiny": lambda rng, x: 1e-6 * x,
    "large": lambda rng, x: 30 * x,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and all that it takes to make it again.

    `seed` draws numbers; the names and sizes choose the program.
    """

    model: str
    loss: str
    options: str
    seed: int
    scale: float
    t1: float
    style: str
    samples: int = SAMPLES
    hidden: int = HIDDEN

    def draw(self) -> "Call":
        rng = np.random.default_rng(self.seed)
        made = MODELS[self.model](rng, self.hidden)
        model = jax.tree.map(
            lambda leaf: leaf * self.scale if eqx.is_inexact_array(leaf) else leaf, made
        )
        x = rng.standard_normal((self.samples, INPUTS))
        x = jnp.asarray(STYLES[self.style](rng, x))
        return Call(model, x, _targets(self.loss, self.samples, rng), self.t1)

    @property
    def keywords(self) -> dict[str, Any]:
        """Options of the call. The smallest step of averaging depends on `max_steps`."""
        keywords = {"loss": LOSSES[self.loss], "throw": False} | OPTIONS[self.options]
        is_averaged = self.has_kinks and self.options in (
            "Averaged",
            "weight_decay=0.1",
        )
        return keywords if is_averaged else {"max_steps": MAX_STEPS} | keywords

    @property
    def has_kinks(self) -> bool:
        kinked = {*KINKED, *JUMPING, "stacked ReLU"}
        return self.model in kinked or self.model in FOLLOWED

    def simpler(self) -> Iterator["Case"]:
        """Cases with one thing less, the largest steps first."""
        plain: dict[str, Any] = {
            "options": "default", "loss": "squared", "style": "normal", "scale": 1.0,
            "model": PLAINER.get(self.model, self.model),
        }  # fmt: skip
        for name, value in plain.items():
            yield dataclasses.replace(self, **{name: value})
        for name in ("samples", "hidden"):
            for fewer in (1, 2, getattr(self, name) // 2):
                yield dataclasses.replace(self, **{name: max(fewer, 1)})
        yield dataclasses.replace(self, t1=self.t1 / 4)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `flow`."""

    model: eqx.Module
    x: Float[Array, "samples inputs"]
    y: Array
    t1: float


def draw_case(number: int) -> Case:
    """The case of a number: `PER_PROGRAM` in a row share their program."""
    program = np.random.default_rng([1, number // PER_PROGRAM])
    rng = np.random.default_rng([2, number])
    case = Case(
        str(program.choice(list(MODELS))),
        str(program.choice(list(LOSSES))),
        "default",
        number,
        float(rng.choice(SCALES)),
        # Of any length: recorded times are to fall where steps do not end by themselves.
        float(np.round(rng.choice(TIMES) * rng.uniform(0.5, 1.5), 4)),
        str(rng.choice(["normal", *STYLES])),
    )
    allowed = [options for options in OPTIONS if fits(case, options)]
    return dataclasses.replace(case, options=str(program.choice(allowed)))


def draw_averaged(number: int) -> Case:
    """A flow that is averaged over kinks, or over jumps of the gradient itself."""
    case = draw_case(number)
    program = np.random.default_rng([3, number // PER_PROGRAM])
    model = str(program.choice([*KINKED, *JUMPING, "stacked ReLU", *FOLLOWED]))
    return dataclasses.replace(case, model=model, options="Averaged")


def fits(case: Case, options: str) -> bool:
    if options == "Filippov":
        return case.model in FOLLOWED
    if case.has_kinks:
        return options not in FOR_SMOOTH
    return options not in FOR_KINKS


def _targets(loss: str, samples: int, rng: np.random.Generator) -> Array:
    match loss:
        case "logistic":
            return jnp.asarray(rng.choice([-1.0, 1.0], (samples, OUTPUTS)))
        case "cross-entropy":
            return jnp.asarray(rng.integers(0, OUTPUTS, samples))
        case _:
            return jnp.asarray(rng.standard_normal((samples, OUTPUTS)))
