"""How long the first call takes, and the second: tracing, lowering, compiling, running.

    python scripts/benchmark/latency.py flow-tanh

prints the figures of one case as JSON. `python scripts/bench.py --only latency` runs each
case in a process of its own, with an empty compilation cache, and once more with the cache
that the first one has filled.

Seconds are of CPU time; the shares of lowering and XLA are JAX's own wall times.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Case = Callable[[], Callable[[], Any]]
#: JAX's own names of what it reports.
_LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_XLA = "/jax/core/compile/backend_compile_duration"
#: What each case is set beside, and how much more than that its first call may take.
TARGETS = {
    "flow-tanh": ("diffrax-tanh", 1.2),
    "flow-relu-averaged": ("diffrax-relu", 1.5),
    "flow-relu": ("diffrax-relu", 2.0),
    "flow-linear": ("diffrax-linear", 1.5),
    "flow-softplus": ("diffrax-softplus", 1.5),
    "descend": ("optax-scan", 2.0),
}


class Latency(NamedTuple):
    """Of a first and a second call, in seconds; programs and operations of the first."""

    first: float
    second: float
    lowering: float
    xla: float
    programs: int
    operations: int

    @property
    def tracing(self) -> float:
        """What is left of the first call: Python's part, above all."""
        return self.first - self.second - self.lowering - self.xla


def cases() -> dict[str, Case]:
    """Each makes its problem, and returns the call to be timed."""
    import diffrax as dfx
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import optax

    import homoflow as hf

    def problem(sizes, activation, samples):
        model = hf.MLP(sizes, activation=activation, key=jr.key(0))
        x = jr.normal(jr.key(1), (samples, sizes[0]))
        y = jnp.sin(x[:, :1] * jnp.arange(1.0, sizes[-1] + 1))
        return jax.block_until_ready((model, (x, y)))

    kinds = {
        "tanh": ((2, 8, 1), jnp.tanh, 20),
        "relu": ((20, 30, 30, 3), "relu", 100),
        "linear": ((20, 30, 30, 3), "linear", 100),
        "softplus": ((4, 100, 1), jax.nn.softplus, 100),
    }

    def flow(kind, t1=2.0, **options):
        model, data = problem(*kinds[kind])
        return lambda: hf.flow(model, data, t1, **options).losses

    def flow_of_factors():
        model = hf.MatrixFactorization(8, 6, 3, key=jr.key(0))
        target = jax.block_until_ready(jr.normal(jr.key(1), (8, 6)))
        objective = hf.factorization_objective
        return lambda: hf.flow(model, target, 2.0, objective=objective).losses

    def flow_of_images():
        model = hf.ConvNet((1, 8, 8), (3, 3), 2, key=jr.key(0))
        x = jr.normal(jr.key(1), (20, 1, 8, 8))
        data = jax.block_until_ready((x, x[:, 0, 0, :2]))
        return lambda: hf.flow(model, data, 2.0).losses

    def diffrax(kind, solver, rtol):
        model, (x, y) = problem(*kinds[kind])
        weights, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(weights):
            predictions = jax.vmap(eqx.combine(weights, static))(x)
            return jnp.mean(jnp.sum((predictions - y) ** 2, 1)) / 2

        def field(t, weights, args):
            return jax.tree.map(jnp.negative, jax.grad(loss)(weights))

        @jax.jit
        def solve(weights):
            control = dfx.PIDController(rtol=rtol, atol=0.1 * rtol)
            saveat = dfx.SaveAt(
                ts=jnp.linspace(0, 2, 101), fn=lambda t, w, args: loss(w)
            )
            return dfx.diffeqsolve(
                dfx.ODETerm(field), solver, 0.0, 2.0, None, weights,
                stepsize_controller=control, saveat=saveat, max_steps=100_000,
            ).ys  # fmt: skip

        return lambda: solve(weights)

    def descend(kind, **options):
        model, data = problem(*kinds[kind])
        return lambda: (
            hf.descend(model, data, 200, learning_rate=0.01, **options).losses
        )

    def optax_scan():
        model, (x, y) = problem(*kinds["relu"])
        weights, static = eqx.partition(model, eqx.is_inexact_array)
        optimizer = optax.sgd(0.01)

        def loss(weights):
            predictions = jax.vmap(eqx.combine(weights, static))(x)
            return jnp.mean(jnp.sum((predictions - y) ** 2, 1)) / 2

        @jax.jit
        def train(weights):
            def step(carry, _):
                weights, state = carry
                value, gradient = jax.value_and_grad(loss)(weights)
                change, state = optimizer.update(gradient, state)
                return (optax.apply_updates(weights, change), state), value

            return jax.lax.scan(
                step, (weights, optimizer.init(weights)), None, length=200
            )[1]

        return lambda: train(weights)

    def compare():
        model, data = problem(*kinds["tanh"])
        run = hf.flow(model, data, 2.0)
        descent = hf.descend(model, data, 200, learning_rate=0.01)
        return lambda: hf.compare(run, descent, data[0])

    def of_model(kind, function):
        model, data = problem(*kinds[kind])
        return lambda: function(model, data)

    def make_model():
        return lambda: hf.MLP((20, 30, 30, 3), key=jr.key(0)).layers[0].weight

    # Tighter, it takes thousands of steps at kinks: what counts here is its first call.
    along_kinks = functools.partial(diffrax, solver=dfx.Tsit5(), rtol=1e-4)
    return {
        "diffrax-tanh": lambda: diffrax("tanh", dfx.Dopri8(), 1e-10),
        "flow-tanh": lambda: flow("tanh"),
        "diffrax-relu": lambda: along_kinks("relu"),
        "flow-relu": lambda: flow("relu"),
        "flow-relu-averaged": lambda: flow("relu", solver=hf.Averaged()),
        "diffrax-linear": lambda: diffrax("linear", dfx.Dopri8(), 1e-10),
        "flow-linear": lambda: flow("linear"),
        "diffrax-softplus": lambda: diffrax("softplus", dfx.Dopri8(), 1e-10),
        "flow-softplus": lambda: flow("softplus"),
        "flow-factorization": flow_of_factors,
        "flow-conv": flow_of_images,
        "flow-inf": lambda: flow("tanh", jnp.inf),
        "optax-scan": optax_scan,
        "descend": lambda: descend("relu"),
        "descend-ledger": lambda: descend("relu", ledger=True),
        "descend-linear": lambda: descend("linear"),
        "compare": compare,
        "laws": lambda: of_model("tanh", lambda m, d: len(hf.laws(m, d[0][0]))),
        "certify": lambda: of_model(
            "tanh", lambda m, d: hf.certify(m, d[0][0]).verdict
        ),
        "sharpness": lambda: of_model("tanh", hf.sharpness),
        "make-model": make_model,
    }


def measure(make_case: Case) -> Latency:
    """A first and a second call, in a process that has not made either before."""
    import jax

    call = make_case()
    lowering, xla = [], []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _LOWERING:
            lowering.append(duration_secs)
        elif event == _XLA:
            xla.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_dump_ir_to", folder)
        first = _seconds(call)
        operations = sum(
            len(re.findall(r"= \"?(?:stablehlo|chlo)\.", path.read_text("utf-8")))
            for path in Path(folder).glob("*.mlir")
        )
        jax.config.update("jax_dump_ir_to", "")
    figures = sum(lowering), sum(xla), len(xla), operations
    return Latency(first, min(_seconds(call) for _ in range(3)), *figures)


def _seconds(call: Callable[[], Any]) -> float:
    import jax

    start = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - start


def measure_apart(name: str, cache: str | None = None) -> Latency:
    """The same in a process of its own; `cache` is a folder of compiled programs."""
    environment = dict(os.environ)
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    done = subprocess.run(
        [sys.executable, __file__, name],
        capture_output=True,
        check=True,
        env=environment,
    )
    return Latency(**json.loads(done.stdout))


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """A table of all cases; `rows` are the fields of `Latency` by name, and `cached`."""
    head = (
        "| call | first | tracing | lowering | XLA | programs | operations | second | "
        "first, cached | first / peer | target |"
    )
    lines = [head, "|" + "---|" * 11]
    for name, row in rows.items():
        peer, target = TARGETS.get(name, (None, None))
        ratio = f"{row['first'] / rows[peer]['first']:.2f}" if peer in rows else ""
        lines.append(
            f"| {name} | {row['first']:.2f} | {row['tracing']:.2f} | "
            f"{row['lowering']:.2f} | {row['xla']:.2f} | {row['programs']} | "
            f"{row['operations']:,} | {row['second']:.4f} | {row['cached']:.2f} | {ratio} "
            f"| {'' if target is None else target} |"
        )
    return "\n".join(lines)


def first_calls(rows: dict[str, dict[str, float]]) -> str:
    """A table of what a user waits for, beside the peers' times; `rows` as above."""
    head = (
        "| call | first | second | first, cached | programs | operations | first / peer "
        "| target |"
    )
    lines = [head, "|" + "---|" * 8]
    for name, row in rows.items():
        peer, target = TARGETS.get(name, ("", ""))
        ratio = f"{row['first'] / rows[peer]['first']:.2f}" if peer in rows else ""
        lines.append(
            f"| {name} | {row['first']:.2f} | {row['second']:.4f} | {row['cached']:.2f} | "
            f"{row['programs']} | {row['operations']:,} | {ratio} | {target} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_enable_x64", True)
    print(json.dumps(measure(cases()[sys.argv[1]])._asdict()))
