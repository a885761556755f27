"""The drift of laws at the edge of stability: descent, and what the central flow predicts.

    python scripts/edge.py --out results/edge.json
    python scripts/edge.py --only tanh-linear softmax --seeds 2

Networks with conserved quantities, descents that reach the edge, and for each the central
flow, the gradient flow with its leading-order prediction, and the descent once more with
noise of 1e-5 in each weight and step, whose own part in the drift is removed. Runs add to
what is in `--out`, and those that are there are not run again.
"""

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import homoflow as hf

#: The second order is computed for networks up to here.
_MOST_WEIGHTS = 5_000
#: Standard deviation of the noise, in each weight and step.
_NOISE = 1e-5


class TanhLinear(eqx.Module):
    """tanh, then two linear layers."""

    layers: list[jax.Array]

    def __init__(self, inputs: int, width: int, outputs: int, key: jax.Array):
        keys = jr.split(key, 3)
        shapes = [(width, inputs), (width, width), (outputs, width)]
        self.layers = [
            jr.normal(k, shape) / np.sqrt(shape[1] if i else 1)
            for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))
        ]

    def __call__(self, x):
        first, second, third = self.layers
        return third @ (second @ jnp.tanh(first @ x))


class Case(NamedTuple):
    """A network with its data, the loss, how long it is trained, and how many seeds.

    - `part`: the edge lies at this part of the largest sharpness of the gradient flow.
    """

    make: Callable[[int], tuple[Any, Any]]
    loss: Any
    t1: float
    seeds: int
    part: float = 0.55


def _waves(count: int, inputs: int, outputs: int, seed: int) -> tuple[Any, Any]:
    x = jr.normal(jr.key(100 + seed), (count, inputs))
    mix = jr.normal(jr.key(200 + seed), (inputs, outputs))
    return x, 2 * jnp.sin(2 * x @ mix / np.sqrt(inputs))


def _one_input(seed: int):
    model = TanhLinear(1, 10, 1, jr.key(seed))
    x = jnp.linspace(-2, 2, 20)[:, None]
    return model, (x, 1.5 * jnp.sin(3 * x + seed))


def _tanh_linear(inputs: int, width: int, outputs: int, count: int):
    def make(seed: int):
        model = TanhLinear(inputs, width, outputs, jr.key(seed))
        return model, _waves(count, inputs, outputs, seed)

    return make


def _squares(seed: int):
    model = hf.MLP((3, 12, 2), activation=hf.Power(2), key=jr.key(seed))
    small = jax.tree.map(lambda a: 0.3 * a if eqx.is_array(a) else a, model)
    return small, _waves(30, 3, 2, seed)


def _softmax(seed: int):
    model = TanhLinear(3, 10, 3, jr.key(seed))
    x, y = _waves(40, 3, 3, seed)
    noisy = y + 1.5 * jr.normal(jr.key(300 + seed), y.shape)
    return model, (x, jnp.argmax(noisy, axis=1))


class Layers(eqx.Module):
    """Linear layers, after each of which is a function of one number."""

    matrices: list[jax.Array]
    functions: tuple[Callable[[Any], Any], ...] = eqx.field(static=True)

    def __init__(self, sizes: tuple[int, ...], functions: Any, key: jax.Array):
        keys = jr.split(key, len(sizes) - 1)
        self.matrices = [
            jr.normal(k, (b, a)) / np.sqrt(a if i else 1)
            for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
        ]
        self.functions = functions

    def __call__(self, x):
        for matrix, function in zip(self.matrices, self.functions, strict=True):
            x = function(matrix @ x)
        return x


def _same(x: Any) -> Any:
    return x


def _sums(count: int, inputs: int, outputs: int, seed: int) -> tuple[Any, Any]:
    """Two waves of random directions, and some noise."""
    x = jr.uniform(jr.key(500 + seed), (count, inputs), minval=-2.0, maxval=2.0)
    mix = jr.normal(jr.key(600 + seed), (2, inputs, outputs)) / np.sqrt(inputs)
    noise = 0.1 * jr.normal(jr.key(700 + seed), (count, outputs))
    return x, jnp.sin(2 * x @ mix[0]) + jnp.cos(1.5 * x @ mix[1]) + noise


def _layers(*functions: Callable[[Any], Any], sizes: tuple[int, ...], count: int):
    def make(seed: int):
        model = Layers(sizes, (*functions, _same), jr.key(1_000 + seed))
        return model, _sums(count, sizes[0], sizes[-1], seed)

    return make


_SQUARED = hf.SquaredLoss()
CASES = {
    "tanh-linear 1-10-10-1": Case(_one_input, _SQUARED, 500.0, 20),
    "tanh-linear 2-8-8-3": Case(_tanh_linear(2, 8, 3, 20), _SQUARED, 200.0, 16),
    "tanh-linear 4-12-12-8": Case(_tanh_linear(4, 12, 8, 40), _SQUARED, 400.0, 4, 0.35),
    "tanh-linear 4-20-20-8": Case(_tanh_linear(4, 20, 8, 40), _SQUARED, 300.0, 6),
    "tanh-linear 4-40-40-3": Case(_tanh_linear(4, 40, 3, 40), _SQUARED, 300.0, 4, 0.7),
    "squares 3-12-2": Case(_squares, _SQUARED, 60.0, 6),
    "softmax 3-10-10-3": Case(_softmax, hf.SoftmaxCrossEntropy(), 400.0, 8),
}
#: Cases on which nothing was set: the bounds of the warnings come from those above.
HELD_OUT = {
    "held out: tanh-linear 1-6-6-1": Case(
        _layers(jnp.tanh, _same, sizes=(1, 6, 6, 1), count=16), _SQUARED, 400.0, 6, 0.6
    ),
    "held out: tanh-linear 3-14-14-2": Case(
        _layers(jnp.tanh, _same, sizes=(3, 14, 14, 2), count=30), _SQUARED, 300.0, 5, 0.5
    ),
    "held out: tanh-linear-linear 2-8-8-8-2": Case(
        _layers(jnp.tanh, _same, _same, sizes=(2, 8, 8, 8, 2), count=24),
        _SQUARED,
        200.0,
        5,
        0.5,
    ),
    "held out: sin-linear 2-10-10-1": Case(
        _layers(jnp.sin, _same, sizes=(2, 10, 10, 1), count=20), _SQUARED, 300.0, 5, 0.65
    ),
    "held out: GELU-linear 2-12-12-2": Case(
        _layers(jax.nn.gelu, _same, sizes=(2, 12, 12, 2), count=24),
        _SQUARED,
        300.0,
        5,
        0.5,
    ),
    "held out: linear-tanh 2-9-9-2": Case(
        _layers(_same, jnp.tanh, sizes=(2, 9, 9, 2), count=24), _SQUARED, 200.0, 5, 0.45
    ),
}
CASES |= HELD_OUT


def _learning_rate(model: Any, data: Any, case: Case) -> float | None:
    """With which the edge is met; `None` if the start is too close to it."""
    run = hf.flow(
        model,
        data,
        case.t1,
        loss=case.loss,
        ts=jnp.linspace(0, case.t1, 21),
        laws=(),
        rtol=1e-6,
        observe={"sharpness": hf.observe.Sharpness()},
    )
    sharpness = np.asarray(run.observed["sharpness"].values[:, 0])
    threshold = case.part * sharpness.max()
    return None if threshold < 1.2 * sharpness[0] else float(2 / threshold)


def _window(central: hf.Trajectory, eta: float, t1: float) -> float:
    """Two cycles of the oscillation at the end, at least 100 steps, at most a third."""
    cycles, ts = (np.asarray(a) for a in (central.observed["cycles"], central.ts))
    pace = (cycles[-1] - cycles[-5]) / (ts[-1] - ts[-5])
    return float(np.clip(2 / pace if pace > 0 else 0, 100 * eta, t1 / 3))


def _drift(values: dict[str, Any], start: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(values[n] - start[n]) for n in sorted(start)])


def _last(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value[-1] for name, value in values.items()}


def _relative(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.linalg.norm(predicted - measured) / np.linalg.norm(measured))


def _flat(model: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0])


class Centre(NamedTuple):
    """A central flow, and whether it was warned of."""

    run: hf.Trajectory
    is_doubted: bool


def _central(model: Any, data: Any, t1: float, **options: Any) -> Centre:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = hf.central_flow(
            model, data, t1, ts=jnp.linspace(0, t1, 41), throw=False, **options
        )
    return Centre(run, any("may not follow" in str(w.message) for w in caught))


def _noisy(rate: float, seed: int) -> Callable[..., optax.GradientTransformation]:
    noise = optax.add_noise(eta=(_NOISE / rate) ** 2, gamma=0.0, key=jr.key(seed))
    return lambda rate: optax.chain(noise, optax.sgd(rate))


def _without_first_order(run: hf.Trajectory) -> hf.Trajectory:
    """Laws as the discretization alone moves them: without the noise's own part."""
    accounts = run.ledger or {}
    laws = {
        name: run.laws[name][:1] + account.discretization
        for name, account in accounts.items()
    }
    return dataclasses.replace(run, laws=laws)


def run_case(name: str, seed: int) -> dict[str, Any]:
    """The figures of one network and seed."""
    case = CASES[name]
    model, data = case.make(seed)
    eta = _learning_rate(model, data, case)
    if eta is None:
        return {"result": "the sharpness does not rise"}
    steps = round(case.t1 / eta)
    options = {"loss": case.loss, "learning_rate": eta}
    central, is_doubted = _central(model, data, case.t1, **options)
    stats = central.stats
    figures = {
        "result": str(hf.RESULTS[central.result]) or "successful",
        "weights": int(_flat(model).size),
        "learning rate": eta,
        "steps": steps,
        "most critical": int(np.max(central.observed["critical"])),
        "cycles": float(stats["edge_cycles"]),
        "overshoot": float(stats["edge_overshoot"]),
        "shift": float(stats["edge_shift"]),
        "lag": float(stats["edge_lag"]),
        "passes": bool(central.result == hf.RESULTS.successful) and not is_doubted,
        "solver error": float(stats["error_estimate"]),
    }
    if central.result != hf.RESULTS.successful:
        return figures
    window = _window(central, eta, case.t1)
    descent = hf.descend(model, data, steps, save_models=True, **options)
    mean = hf.smooth(descent, window)
    noisy = hf.descend(
        model, data, steps, optimizer=_noisy(eta, seed), ledger=True, **options
    )
    quiet = hf.smooth(_without_first_order(noisy), window)
    end = float(mean.ts[-1])
    central, _ = _central(model, data, end, estimate_error=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leading = hf.predict_drift(
            model, data, end, ts=jnp.linspace(0, end, 41), loss=case.loss
        )
        order = _drift(_last(leading.drift(eta)), dict.fromkeys(leading.integrals, 0))
    start = {n: v[0] for n, v in descent.laws.items()}
    measured = _drift(_last(mean.laws), start)
    with_noise = _drift(_last(quiet.laws), start)
    predicted = _drift(_last(central.observed["mean"].laws), start)
    size = float(np.linalg.norm(measured))

    def distance(model: Any) -> float:
        return float(np.linalg.norm(_flat(model) - _flat(mean.model)))

    second = {}
    if figures["weights"] <= _MOST_WEIGHTS:
        again, _ = _central(model, data, end, order=2, estimate_error=False, **options)
        curved = _drift(_last(again.observed["mean"].laws), start)
        second = {
            "result, second order": str(hf.RESULTS[again.result]) or "successful",
            "error, second order": _relative(curved, measured),
            "error with noise, second order": _relative(curved, with_noise),
            "distance, second order": distance(again.model),
        }

    return (
        figures
        | {
            "window": window,
            "drift": size,
            "error": _relative(predicted, measured),
            "error with noise": _relative(predicted, with_noise),
            "leading order": float(np.linalg.norm(order)) / size,
            "distance central": distance(central.model),
            "distance flow": distance(leading.flow.model),
            "moved": distance(model),
        }
        | second
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, help="at most so many of each")
    parser.add_argument("--out", type=Path, default=Path("results/edge.json"))
    args = parser.parse_args()
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        count = CASES[name].seeds if args.seeds is None else args.seeds
        for seed in range(count):
            key = f"{name}, seed {seed}"
            if key in done:
                continue
            done[key] = run_case(name, seed)
            print(key, json.dumps(done[key]), flush=True)
            args.out.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
