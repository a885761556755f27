"""Every compiled program lowers for GPUs and TPUs on a machine that has neither."""

import functools
import re

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import homoflow as hf

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PLATFORMS = ("cuda", "rocm", "tpu")


def problem(activation, dtype):
    x = jnp.asarray(RNG.standard_normal((6, 2)), dtype)
    model = hf.MLP((2, 3, 1), activation=activation, dtype=dtype, key=jax.random.key(0))
    return model, (x, x[:, :1])


def flow(activation, **options):
    def run(dtype):
        model, data = problem(activation, dtype)
        return model, lambda m: hf.flow(m, data, 0.5, throw=False, **options)

    return run


def descend(**options):
    def run(dtype):
        model, data = problem("linear", dtype)
        options_here = {"learning_rate": 0.1, "throw": False, **options}
        return model, lambda m: hf.descend(m, data, 5, **options_here)

    return run


def other(function, activation="linear", **options):
    def run(dtype):
        model, data = problem(activation, dtype)
        return model, lambda m: function(m, data, **options)

    return run


def late_flow(dtype):
    model, (x, _) = problem("linear", dtype)
    labels = jnp.sign(x[:, :1])
    return model, lambda m: hf.late_flow(m, (x, labels), 2.0, throw=False)


def key():
    return jax.random.key(1)


#: As docs/sweeps.md lists them.
PROGRAMS = {
    "flow, Dopri8": flow(jnp.tanh, solver=dfx.Dopri8()),
    "flow, Tsit5": flow(jnp.tanh, solver=dfx.Tsit5(), rtol=1e-4),
    "flow, Kvaerno5": flow(jnp.tanh, solver=dfx.Kvaerno5(), rtol=1e-4),
    "flow, ExponentialAdams": flow(jnp.tanh, solver=hf.ExponentialAdams()),
    "flow, GaussLegendre": flow(jnp.tanh, solver=hf.GaussLegendre()),
    "flow, Rodas5P": flow(jnp.tanh, solver=hf.Rodas5P(), rtol=1e-4),
    "flow, dt0": flow(jnp.tanh, solver=dfx.Dopri8(), dt0=0.1),
    "flow, constant steps": flow(jnp.tanh, solver=dfx.Heun(), dt0=0.1),
    "flow, projected": flow("linear", project=True),
    "flow, Averaged": flow("relu", solver=hf.Averaged(), rtol=1e-3),
    "flow, Filippov": flow("relu", solver=hf.Filippov()),
    "descend, sgd": descend(),
    "descend, adam, minibatches and ledger": descend(
        optimizer=optax.adam, batch_size=2, key=key(), ledger=True
    ),
    "descend, momentum": descend(optimizer=functools.partial(optax.sgd, momentum=0.9)),
    "modified_flow": other(hf.modified_flow, learning_rate=0.1, t1=0.5, throw=False),
    "heavy_ball_flow": other(hf.heavy_ball_flow, t1=0.5, mass=0.1, throw=False),
    "predict_drift": other(hf.predict_drift, t1=0.5, throw=False),
    "sharpness": other(hf.sharpness),
    "spectrum": other(hf.spectrum, k=2),
    "central_flow": other(
        hf.central_flow, jnp.tanh, t1=0.5, learning_rate=0.1, throw=False
    ),
    "late_flow": late_flow,
}


def exported(make, dtype):
    model, run = make(dtype)
    weights, rest = eqx.partition(model, eqx.is_array)

    def arrays(weights):
        result = run(eqx.combine(weights, rest))
        return jax.tree.leaves(eqx.filter(result, eqx.is_array))

    return jax.export.export(jax.jit(arrays), platforms=PLATFORMS)(weights)


#: Refused in float32, on every machine.
ONLY_FLOAT64 = {"late_flow"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in PROGRAMS
        for dtype in ("float64", "float32")
        if dtype == "float64" or name not in ONLY_FLOAT64
    ],
)
def test_a_program_lowers_for_every_platform(name, dtype):
    program = exported(PROGRAMS[name], jnp.dtype(dtype))
    assert set(program.platforms) == set(PLATFORMS)
    # Nothing that only this machine's Python could answer.
    assert not re.findall(r"xla\w*_callback", program.mlir_module())
