"""Compiled solves call no Python, so that the next process need not compile them."""

import os
import subprocess
import sys

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import pytest

from homoflow._jax._runtime_checks import without_time_checks

SOLVE = """
import sys
import jax
import jax.numpy as jnp
import homoflow as hf

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))

model = hf.MLP((1, 1), key=jax.random.key(0))
x = jnp.ones((1, 1))
requests = len(hits)
hf.flow(model, (x, x), 0.1)
used = hits[requests:]
print(used.count("/jax/compilation_cache/compile_requests_use_cache"))
print(used.count("/jax/compilation_cache/cache_hits"))
"""


def decay_at(ts):
    """e^{−t}, by a solve of its own: JAX traces equal ones once."""
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -y), dfx.Tsit5(), 0.0, 1.0, None, jnp.ones(1),
        saveat=dfx.SaveAt(ts=ts), throw=False,
        stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
    ).ys  # fmt: skip


@eqx.filter_jit
def checked(ts):
    return decay_at(ts)


@eqx.filter_jit
@without_time_checks()
def unchecked(ts):
    return decay_at(ts)


def calls_python(fun, ts) -> bool:
    return "callback" in fun.lower(ts).as_text()


def test_checks_are_left_out_within_the_context_alone():
    ts = jnp.array([0.5, 1.0])
    assert calls_python(checked, ts)
    assert not calls_python(unchecked, ts)
    assert jnp.array_equal(unchecked(ts), checked(ts))
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"saveat\.ts must be increasing"):
        checked(ts[::-1])


def test_other_checks_are_made_within_it():
    @eqx.filter_jit
    def fails(x):
        with without_time_checks():
            return eqx.error_if(x, x > 0, "of the model's own")

    with pytest.raises(eqx.EquinoxRuntimeError, match="of the model's own"):
        fails(jnp.ones(()))


def test_a_second_process_compiles_no_flow(tmp_path):
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-c", SOLVE, str(tmp_path)]
    for is_second in (False, True):
        output = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout
        requests, hits = map(int, output.split())
        assert requests > 0
        assert hits == requests if is_second else hits < requests
