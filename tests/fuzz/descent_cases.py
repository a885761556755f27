"""A call of `homoflow.descend`: a chain of Optax transformations, drawn part by part."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array

import homoflow as hf

INPUTS, HIDDEN, OUTPUTS, SAMPLES = 3, 4, 2, 8
#: Draws that share an optimizer, and with it the programs.
PER_PROGRAM = 40
#: Divisible by the steps that accumulation joins.
STEPS = 24
ACTIVATIONS = ("linear", "relu", "leaky_relu")


def is_big(params):
    return jax.tree.map(lambda leaf: leaf.size > 10, params)


def from_step_10(transformation):
    def is_late(step, **extra):
        return jnp.asarray(step) >= 10

    return optax.conditionally_transform(transformation, is_late)


def halving(step):
    return 0.5 ** jnp.floor(step / 8)


def smoothed(gradient, _):
    return (gradient + jnp.roll(gradient, 1)) / 2


def cubed(update, params):
    return jax.tree.map(lambda u, w: u + 0.1 * w**3, update, params)


class Part(NamedTuple):
    """A transformation, and what it makes of flow time if that is known.

    `factor`: of the time of the k-th step, given all k; `None` where it depends on the
    run, or where there is no flow time.
    """

    make: Callable[[], Any]
    factor: Callable[[np.ndarray], Any] | None = None


def constant(value: float):
    return lambda k: value


decay = optax.add_decayed_weights
AHEAD = {
    "average": Part(lambda: optax.trace(0.5), constant(2)),
    "Nesterov": Part(lambda: optax.trace(0.75, nesterov=True), constant(4)),
    "corrected average": Part(lambda: optax.ema(0.5), constant(1)),
    "average from 0": Part(lambda: optax.ema(0.75, debias=False), constant(1)),
    "decay": Part(lambda: decay(0.1), constant(1)),
    "masked decay": Part(lambda: optax.masked(decay(0.2), is_big), constant(1)),
    "decay by schedule": Part(lambda: decay(lambda k: 0.02 * k), constant(1)),
    "late decay": Part(lambda: from_step_10(decay(0.3)), constant(1)),
    "cubic decay": Part(lambda: optax.stateless(cubed), constant(1)),
    "loose clip": Part(lambda: optax.clip(1e4), constant(1)),
    "clip": Part(lambda: optax.clip(0.1)),
    "clipped norm": Part(lambda: optax.clip_by_global_norm(0.4)),
    "adaptive clip": Part(lambda: optax.adaptive_grad_clip(0.1)),
    "normalized": Part(optax.normalize_by_update_norm),
    "centred": Part(optax.centralize),
    "signs": Part(optax.scale_by_sign),
    "smoothed": Part(lambda: optax.stateless_with_tree_map(smoothed)),
    "noise": Part(lambda: optax.add_noise(0.1, 0.5, 0)),
    "Adam": Part(optax.scale_by_adam),
    "RMS": Part(optax.scale_by_rms),
    "trust": Part(optax.scale_by_trust_ratio),
    "every third": Part(lambda: optax.apply_every(3)),
    "no NaN": Part(optax.zero_nans, constant(1)),
    "half": Part(lambda: optax.scale(0.5), constant(0.5)),
    "upwards": Part(lambda: optax.scale(-1.0)),
    "late average": Part(
        lambda: from_step_10(optax.trace(0.5)), lambda k: np.where(k < 10, 1, 2)
    ),
    "late signs": Part(lambda: from_step_10(optax.scale_by_sign())),
    "momentum of the big array": Part(lambda: optax.masked(optax.trace(0.5), is_big)),
}
CORE: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], Any] | None]] = {
    "sgd": (optax.sgd, constant(1)),
    "heavy ball": (functools.partial(optax.sgd, momentum=0.9), constant(10)),
    "single precision": (
        functools.partial(optax.sgd, momentum=0.5, accumulator_dtype=jnp.float32),
        constant(2),
    ),
    "schedule inside": (lambda rate: optax.sgd(lambda k: rate / (1 + k)),
                        lambda k: 1 / (1 + k)),
    "injected": (lambda rate: optax.inject_hyperparams(optax.sgd)(rate), constant(1)),
    "injected momentum": (
        lambda rate: optax.inject_hyperparams(optax.sgd)(rate, momentum=0.5), constant(2),
    ),
    "AdamW": (functools.partial(optax.adamw, weight_decay=0.1), None),
    "Adagrad": (optax.adagrad, None),
    "Lion": (optax.lion, None),
    "LARS": (optax.lars, None),
    "Polyak": (lambda rate: optax.polyak_sgd(max_learning_rate=rate), None),
    "noisy": (functools.partial(optax.noisy_sgd, key=0), None),
    "rates by size": (
        lambda rate: optax.multi_transform(
            {True: optax.sgd(rate / 10), False: optax.sgd(rate)}, is_big
        ),
        None,
    ),
    "frozen array": (
        lambda rate: optax.multi_transform(
            {True: optax.set_to_zero(), False: optax.sgd(rate)}, is_big
        ),
        None,
    ),
}  # fmt: skip
BEHIND = {
    "schedule": Part(lambda: optax.scale_by_schedule(halving),
                     lambda k: 0.5 ** np.floor(k / 8)),
    "plateau": Part(lambda: optax.contrib.reduce_on_plateau(factor=0.5, patience=2)),
    "line search": Part(lambda: optax.scale_by_backtracking_linesearch(6)),
    "late half": Part(
        lambda: from_step_10(optax.scale(0.5)), lambda k: np.where(k < 10, 1, 0.5)
    ),
    "average behind": Part(lambda: optax.trace(0.5)),
}  # fmt: skip
#: What an optimizer is put into, and whether the clock only divides by 3, or stays.
AROUND: dict[str, tuple[Callable[[Any], Any], float | None]] = {
    "three in one": (lambda made: optax.MultiSteps(made, 3), 1 / 3),
    "finite only": (lambda made: optax.apply_if_finite(made, 3), 1.0),
    "flattened": (optax.flatten, 1.0),
    "lookahead": (lambda made: optax.lookahead(made, 5, 0.5), None),
    "schedule-free": (
        lambda made: optax.contrib.schedule_free(made, learning_rate=0.01), None,
    ),
    "SAM": (
        lambda made: optax.contrib.sam(made, optax.sgd(0.05), opaque_mode=True), None,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A descent, and all that it takes to make it again."""

    ahead: tuple[str, ...]
    core: str
    behind: tuple[str, ...]
    around: tuple[str, ...]
    activation: str
    seed: int
    rate: float = 2.0**-6
    record_every: int = 1
    is_single: bool = False
    is_vmapped: bool = False

    @property
    def optimizer(self) -> Callable[[Any], Any]:
        return _optimizer(self.ahead, self.core, self.behind, self.around)

    @property
    def time(self) -> float | None:
        """Flow time at the end, by formula; `None` where there is none that is known."""
        k = np.arange(STEPS)
        parts = [AHEAD[a].factor for a in self.ahead]
        parts += [CORE[self.core][1], *(BEHIND[b].factor for b in self.behind)]
        total: Any = np.ones(STEPS)
        for factor in parts:
            if factor is None:
                return None
            total = total * factor(k)
        for around in self.around:
            share = AROUND[around][1]
            # A schedule within accumulation has steps of its own.
            if share is None or (share != 1 and np.ptp(total) > 0):
                return None
            total = total * share
        return self.rate * float(np.sum(total))

    @property
    def has_own_multiple(self) -> bool:
        """Whether a step is multiplied by what depends on the gradient's own size.

        Then memory and weights have their part of this step, and another one alone. So
        have they where the memory starts from the weights.
        """
        parts = {*self.ahead, self.core, *self.behind, *self.around}
        return not parts.isdisjoint(
            {
                "clipped norm", "normalized", "trust", "LARS", "Polyak", "line search",
                "schedule-free",
            }
        )  # fmt: skip

    def draw(self) -> tuple[hf.MLP, tuple[Array, Array]]:
        rng = np.random.default_rng(self.seed)
        dtype = np.float32 if self.is_single else np.float64
        made = hf.MLP(
            (INPUTS, HIDDEN, OUTPUTS), activation=self.activation, key=jax.random.key(0)
        )
        model = jax.tree.map(
            lambda leaf: (
                jnp.asarray(0.7 * rng.standard_normal(leaf.shape), dtype)
                if eqx.is_inexact_array(leaf)
                else leaf
            ),
            made,
        )
        x = rng.standard_normal((SAMPLES, INPUTS)).astype(dtype)
        y = rng.standard_normal((SAMPLES, OUTPUTS)).astype(dtype)
        return model, (jnp.asarray(x), jnp.asarray(y))

    def simpler(self) -> Iterator["Case"]:
        """Cases with one thing less, the largest steps first."""
        for name in ("around", "behind", "ahead"):
            parts = getattr(self, name)
            for i in range(len(parts)):
                fewer = parts[:i] + parts[i + 1 :]
                yield dataclasses.replace(self, **{name: fewer})
        plain: dict[str, Any] = {
            "core": "sgd", "activation": "linear", "record_every": 1, "rate": 2.0**-6,
            "is_single": False, "is_vmapped": False,
        }  # fmt: skip
        for name, value in plain.items():
            yield dataclasses.replace(self, **{name: value})


@functools.cache
def _optimizer(ahead, core, behind, around):
    def optimizer(rate):
        made = optax.chain(
            *(AHEAD[a].make() for a in ahead),
            CORE[core][0](rate),
            *(BEHIND[b].make() for b in behind),
        )
        for name in around:
            made = AROUND[name][0](made)
        return made

    return optimizer


def draw_case(number: int) -> Case:
    """The case of a number: `PER_PROGRAM` in a row share their program."""
    program = np.random.default_rng([6, number // PER_PROGRAM])
    rng = np.random.default_rng([7, number])

    def some(names, probabilities) -> tuple[str, ...]:
        count = program.choice(len(probabilities), p=probabilities)
        return tuple(map(str, program.choice(list(names), count, replace=False)))

    ahead = some(AHEAD, [0.2, 0.4, 0.3, 0.1])
    is_plain = program.random() < 0.6
    core = "sgd" if is_plain else str(program.choice(list(CORE)))
    rate = float(rng.choice([2.0**-8, 2.0**-6, 2.0**-4]))
    return Case(
        ahead, core, some(BEHIND, [0.7, 0.3]), some(AROUND, [0.8, 0.2]),
        str(program.choice(ACTIVATIONS)), number, rate,
        int(program.choice([1, 5])), bool(program.random() < 0.15),
        bool(program.random() < 0.1),
    )  # fmt: skip
