"""Speed, as ratios measured in one run: the machine's own speed cancels.

Every pair is timed alternately, and the ratio is that of the fastest times, which a busy
machine disturbs least.
"""

import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, PyTree

import homoflow as hf

from .problems import PROBLEMS, SEEDS

SIZES = (1000, 100, 100, 10)
SAMPLES = 1000
#: Steps of descent (the paper takes 10,000) and gradients timed by themselves.
STEPS, GRADIENTS = 1500, 300
STEP_SIZE = 0.008
#: What is run for many seeds: an activation, and options of `flow` (of descent none).
SEED_CASES = {
    "exact flow": ("relu", {"solver": hf.Filippov(max_active=32)}),
    "averaged": ("relu", {"solver": hf.Averaged()}),
    "ExponentialAdams": (jnp.tanh, {"solver": hf.ExponentialAdams()}),
    "Rodas5P": (jnp.tanh, {"solver": hf.Rodas5P()}),
    "Dopri8": (jnp.tanh, {"solver": dfx.Dopri8()}),
    "descend": (jnp.tanh, None),
}


class Row(NamedTuple):
    label: str
    measured: float
    target: float

    def __str__(self) -> str:
        verdict = "ok" if self.measured <= self.target else "MISS"
        return (
            f"{self.label:58s}  {self.measured:6.3f}  target {self.target:g}  {verdict}"
        )


def bench_descend(repeats: int) -> list[Row]:
    """`descend` with every law every 10 steps, against a hand-written scan."""
    rows = []
    for dtype in (jnp.float32, jnp.float64):
        model, (x, y) = figure2_problem(dtype)
        weights = [layer.weight for layer in model.layers]

        def ours(model=model, x=x, y=y):
            return hf.descend(
                model, (x, y), STEPS, learning_rate=STEP_SIZE, record_every=10
            ).losses

        def bare(weights=weights, x=x, y=y):
            return bare_descent(weights, x, y, STEPS)

        mine, theirs = fastest_of(ours, bare, repeats=repeats)
        rows.append(Row(f"descend / bare scan, {dtype.__name__}", mine / theirs, 1.05))
    return rows


def bench_ledger(repeats: int) -> list[Row]:
    """CPU time of `descend` with a ledger against the same run without."""
    rows = []
    heavy_ball = functools.partial(optax.sgd, momentum=0.9)
    for activation, name, optimizer, batch_size in (
        ("relu", "sgd", optax.sgd, None),
        ("relu", "momentum", heavy_ball, None),
        ("relu", "adam", optax.adam, None),
        ("relu", "momentum, batches of 100", heavy_ball, 100),
        ("linear", "sgd", optax.sgd, None),
        ("linear", "momentum", heavy_ball, None),
    ):
        _, (x, y) = figure2_problem(jnp.float32)
        model = hf.MLP(SIZES, activation=activation, key=jr.key(0), dtype=jnp.float32)

        def run(ledger, model=model, x=x, y=y, o=optimizer, size=batch_size):
            done = hf.descend(
                model, (x, y), STEPS // 5, learning_rate=1e-4, optimizer=o,
                batch_size=size, key=jr.key(1), record_every=50, ledger=ledger,
            )  # fmt: skip
            return done.losses, done.ledger

        with_it, without = fastest_of(
            functools.partial(run, True), functools.partial(run, False),
            repeats=repeats, clock=time.process_time,
        )  # fmt: skip
        kind = "matrix" if activation == "linear" else "neuron"
        label = f"ledger of {kind} laws / none, {name}"
        rows.append(Row(label, with_it / without, 1.1))
    return rows


def bench_flow(repeats: int) -> list[Row]:
    """`flow` against its number of gradients times the time of one bare gradient."""
    rows = []
    for dtype, solver in (
        (jnp.float32, None),
        (jnp.float64, None),
        (jnp.float64, dfx.Tsit5()),
        (jnp.float64, dfx.Dopri8()),
    ):
        model, (x, y) = figure2_problem(dtype)
        weights = [layer.weight for layer in model.layers]

        def ours(model=model, x=x, y=y, solver=solver):
            run = hf.flow(model, (x, y), 2.0, rtol=1e-3, solver=solver)
            return run.losses, run.stats

        evaluations = int(ours()[1]["gradient_evaluations"])

        def bare(weights=weights, x=x, y=y):
            return repeated_gradients(weights, x, y, GRADIENTS)

        mine, theirs = fastest_of(ours, bare, repeats=repeats)
        ratio = mine / (theirs / GRADIENTS * evaluations)
        name = "default" if solver is None else type(solver).__name__
        label = f"flow / gradients, {dtype.__name__}, {name} ({evaluations} gradients)"
        rows.append(Row(label, ratio, 1.15))
    return rows


def bench_exact(repeats: int) -> list[Row]:
    """CPU time of an exact flow against its gradients times that of one bare gradient.

    A row of ∂z/∂w counts as the gradient at one sample; forward passes are not counted.
    """
    rows = []
    for sizes, samples, t1, room in (
        ((10, 20, 15, 2), 60, 5.0, None),
        ((20, 30, 30, 3), 100, 60.0, 128),
    ):
        model = hf.MLP(sizes, key=jr.key(0), dtype=jnp.float64)
        x = jr.normal(jr.key(1), (samples, sizes[0]), jnp.float64)
        y = jr.normal(jr.key(2), (samples, sizes[-1]), jnp.float64)
        weights = [layer.weight for layer in model.layers]

        def ours(model=model, x=x, y=y, t1=t1, room=room):
            solver = hf.Filippov(max_active=room)
            run = hf.flow(model, (x, y), t1, ts=[0.0, t1], laws=(), solver=solver)
            return run.losses, run.stats

        evaluations = int(ours()[1]["gradient_evaluations"])

        def bare(weights=weights, x=x, y=y):
            return repeated_gradients(weights, x, y, 10 * GRADIENTS)

        mine, theirs = fastest_of(ours, bare, repeats=repeats, clock=time.process_time)
        ratio = mine / (theirs / (10 * GRADIENTS) * evaluations)
        net = "-".join(map(str, sizes))
        label = f"exact flow / gradients, {net} ({evaluations} gradients)"
        rows.append(Row(label, ratio, 3.0))
    return rows


def bench_seeds(repeats: int) -> list[Row]:
    """CPU time of 64 seeds in one vmap against a loop over one compiled run, per seed."""
    return [time_seeds(name, repeats) for name in SEED_CASES]


def time_seeds(name: str, repeats: int) -> Row:
    key_x, key_y = jr.split(jr.key(1))
    data = jr.normal(key_x, (20, 5)), jr.normal(key_y, (20, 1))
    keys = jr.split(jr.key(0), SEEDS)
    activation, options = SEED_CASES[name]

    def run(key):
        model = hf.MLP((5, 8, 8, 1), activation=activation, key=key)
        if options is None:
            return hf.descend(model, data, 500, learning_rate=0.02).losses
        return hf.flow(model, data, 5.0, laws=(), throw=False, **options).losses

    single, batched = jax.jit(run), jax.jit(jax.vmap(run))
    together, alone = fastest_of(
        lambda: batched(keys), lambda: [single(key) for key in keys],
        repeats=repeats, clock=time.process_time,
    )  # fmt: skip
    label = f"{SEEDS} seeds in one vmap / one by one, {name}"
    return Row(label, together / alone, 1.1)


def bench_projection(repeats: int) -> list[Row]:
    """CPU time of `flow` with its laws restored against the same run without.

    Of its steps, and with the 101 times that it records by default, each of which is
    projected too.
    """
    rows = []
    for name, rtols, target in (
        ("c", (1e-4, 1e-6, 1e-10), 1.25),
        ("d", (1e-4, 1e-6, 1e-10), 1.25),
        ("e", (1e-6,), 1.05),
    ):
        problem = PROBLEMS[name]()
        ends = [0.0, problem.t1]
        # Of a loss that is not its own, homoflow does not compress the samples.
        how = {"loss": squared_error, "objective": problem.objective}
        for rtol, ts in itertools.product(rtols, (ends, None)):

            def run(project, problem=problem, how=how, rtol=rtol, ts=ts):
                return hf.flow(
                    problem.model, problem.data, problem.t1, rtol=rtol, ts=ts,
                    project=project, **how,
                ).losses  # fmt: skip

            with_it, without = fastest_of(
                functools.partial(run, True), functools.partial(run, False),
                repeats=min(repeats, 3) if name == "e" else repeats,
                clock=time.process_time,
            )  # fmt: skip
            times = "101 times recorded" if ts is None else "its ends recorded"
            label = f"flow projected / not, ({name}) at rtol {rtol:g}, {times}"
            rows.append(Row(label, with_it / without, target))
    return rows


def squared_error(prediction: Array, target: Array) -> Array:
    return 0.5 * jnp.sum((prediction - target) ** 2)


def bench_import(repeats: int) -> list[Row]:
    """Seconds that `import homoflow` adds to importing its dependencies."""
    dependencies = "import jax, diffrax, optax, equinox, jaxtyping"
    alone, with_us = (
        min(_import_seconds(code) for _ in range(repeats))
        for code in (dependencies, f"{dependencies}; import homoflow")
    )
    return [Row("import homoflow − import dependencies, s", with_us - alone, 0.2)]


def figure2_problem(dtype) -> tuple[hf.MLP, tuple[Array, Array]]:
    """The paper's network with the balanced start, on Gaussian data."""
    key_model, key_x, key_y = jr.split(jr.key(0), 3)
    init = hf.Gaussian(variance=(1e-4 / 100, 1e-4 / 10, 1e-4))
    model = hf.MLP(SIZES, init=init, key=key_model, dtype=dtype)
    x = jr.normal(key_x, (SAMPLES, SIZES[0]), dtype)
    return model, (x, jr.normal(key_y, (SAMPLES, SIZES[-1]), dtype))


def bare_loss(weights: list[Array], x: Array, y: Array) -> Array:
    first, second, third = weights
    hidden = jax.nn.relu(jax.nn.relu(x @ first.T) @ second.T)
    return 0.5 * jnp.mean(jnp.sum((hidden @ third.T - y) ** 2, axis=1))


@jax.jit
def _bare_step(weights, x, y):
    loss, gradient = jax.value_and_grad(bare_loss)(weights, x, y)
    return [w - STEP_SIZE * g for w, g in zip(weights, gradient, strict=True)], loss


def bare_descent(weights: list[Array], x: Array, y: Array, steps: int) -> Array:
    return _bare_descent(weights, x, y, jnp.zeros(steps))


@jax.jit
def _bare_descent(weights, x, y, steps):
    return jax.lax.scan(lambda w, _: _bare_step(w, x, y), weights, steps)[1]


def repeated_gradients(weights: list[Array], x: Array, y: Array, count: int) -> Array:
    return _repeated_gradients(weights, x, y, jnp.zeros(count))


@jax.jit
def _repeated_gradients(weights, x, y, count):
    def body(w, _):
        # A vanishing step keeps the compiler from computing the gradient only once.
        gradient = jax.grad(bare_loss)(w, x, y)
        return [a - 1e-12 * g for a, g in zip(w, gradient, strict=True)], None

    return jax.lax.scan(body, weights, count)[0][0]


def fastest_of(
    *functions: Callable[[], PyTree],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The fastest time of each function, called in turn after one warm-up."""
    for function in functions:
        jax.block_until_ready(function())
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, seconds in zip(functions, times, strict=True):
            start = clock()
            jax.block_until_ready(function())
            seconds.append(clock() - start)
    return [min(seconds) for seconds in times]


def _import_seconds(code: str) -> float:
    timed = (
        f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", timed], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def bench_edge(repeats: int) -> list[Row]:
    """What the central flow takes, of Euler's steps and of the descent."""
    from .edge_cost import bench_edge

    return bench_edge(repeats)


BENCHES = {
    "edge": bench_edge,
    "descend": bench_descend,
    "ledger": bench_ledger,
    "flow": bench_flow,
    "exact": bench_exact,
    "seeds": bench_seeds,
    "projection": bench_projection,
    "import": bench_import,
}
