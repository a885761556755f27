"""jit, vmap, grad, precision and progress: the compiled side of both halves."""

import functools
import subprocess
import sys
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array
from oracles import compilations
from problems import (
    Neuron,
    arrays_of,
    flat,
    linear_regression,
    neuron,
    problems,
    relu_regression,
    saved,
)

import homoflow as hf

# Compilation: new values never compile anew.


class CountingLoss(eqx.Module):
    """Squared loss that counts how often Python runs it, which is when it is traced."""

    calls: list = eqx.field(static=True, default_factory=list)

    def __call__(self, prediction, target):
        self.calls.append(None)
        return 0.5 * jnp.sum((prediction - target) ** 2)

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def assert_traced_once(run, calls: list, variants: list[dict]) -> None:
    """`run(**variants[0])` compiles, and no other variant traces or compiles the loop.

    The checks at the door look at the shape of the loss in every call; what the second
    call of the first variant adds to `calls` is their share.
    """
    run(**variants[0])
    first = len(calls)
    run(**variants[0])
    door = len(calls) - first
    assert door < first
    with compilations() as compiled:
        for variant in variants[1:]:
            before = len(calls)
            run(**variant)
            assert len(calls) - before == door
    assert compiled == []


def test_flow_is_traced_once_for_all_values():
    model, data = neuron()
    other = eqx.tree_at(lambda m: m.w, model, model.w + 1)
    base = {"model": model, "data": data, "t1": 1.0, "rtol": 1e-6, "atol": 1e-6}
    base |= {"ts": jnp.array([0.1, 0.5])}
    loss = CountingLoss()
    changes = [
        {"t1": 2.0},
        {"t1": 3},
        {"rtol": 1e-8, "atol": 1e-9},
        {"ts": jnp.array([0.2, 0.7])},
        {"data": (data[0] + 1, data[1] * 2)},
        {"model": other},
    ]
    # A loose tolerance has a solver of its own, and that one program too.
    loose = [base | {"rtol": 1e-4}, base | {"rtol": 1e-3, "atol": 1e-9}]
    for variants in ([base, *(base | change for change in changes)], loose):
        assert_traced_once(
            lambda **options: hf.flow(loss=loss, **options), loss.calls, variants
        )


def test_descend_is_traced_once_for_all_values():
    model, data = neuron()
    other = eqx.tree_at(lambda m: m.w, model, model.w + 1)
    base = {"model": model, "data": data, "learning_rate": 0.1, "key": jr.key(0)}
    loss = CountingLoss()
    changes = [
        {"learning_rate": 0.2},
        {"learning_rate": 1},
        {"data": (data[0] + 1, data[1] * 2)},
        {"model": other},
        {"key": jr.key(1)},
    ]
    assert_traced_once(
        # A new `partial` in each call: as the README writes it.
        lambda **options: hf.descend(
            steps=6, loss=loss, batch_size=5,
            optimizer=functools.partial(optax.sgd, momentum=0.9), **options,
        ),
        loss.calls,
        [base, *(base | change for change in changes)],
    )  # fmt: skip


def test_the_counter_sees_a_recompilation():
    model, data = neuron()
    loss = CountingLoss()

    def run(batch_size):
        options = {"batch_size": batch_size, "key": jr.key(0), "loss": loss}
        return hf.descend(model, data, 6, learning_rate=0.1, **options)

    with pytest.raises(AssertionError):
        assert_traced_once(run, loss.calls, [{"batch_size": 2}, {"batch_size": 3}])


# jit and vmap.


def test_jitted_flow_equals_the_plain_one_and_codes_bad_values():
    model, data = neuron()

    @eqx.filter_jit
    def solve(w, data, t1, rtol):
        start = eqx.tree_at(lambda m: m.w, model, w)
        return hf.flow(start, data, t1, rtol=rtol, throw=False)

    plain = hf.flow(model, data, 2.0, rtol=1e-6)
    jitted = solve(model.w, data, jnp.array(2.0), jnp.array(1e-6))
    np.testing.assert_allclose(jitted.losses, plain.losses, rtol=1e-12)
    np.testing.assert_allclose(jitted.model.w, plain.model.w, rtol=1e-12)
    infinite = (data[0] * jnp.inf, data[1])
    for result, w, given, t1, rtol in (
        (hf.RESULTS.bad_weights, model.w * jnp.nan, data, 2.0, 1e-6),
        (hf.RESULTS.bad_data, model.w, infinite, 2.0, 1e-6),
        (hf.RESULTS.bad_time, model.w, data, -1.0, 1e-6),
        (hf.RESULTS.bad_tolerance, model.w, data, 2.0, 1e-30),
    ):
        failed = solve(w, given, jnp.array(t1), jnp.array(rtol))
        assert failed.result == result
        assert failed.stats["time_reached"] == 0


def test_jitted_descent_equals_the_plain_one():
    model, data = neuron()

    @eqx.filter_jit
    def solve(data, rate):
        return hf.descend(model, data, 10, learning_rate=rate, throw=False)

    plain = hf.descend(model, data, 10, learning_rate=0.1)
    jitted = solve(data, jnp.array(0.1))
    np.testing.assert_allclose(jitted.losses, plain.losses, rtol=1e-13)
    bad = solve(data, jnp.array(-0.1))
    assert bad.result == hf.RESULTS.bad_learning_rate
    assert np.all(np.isnan(bad.losses))


def assert_batch_equals_loop(batch: hf.Trajectory, singles, rtol: float) -> None:
    for i, single in enumerate(singles):
        for name in ("ts", "losses", "grad_norms"):
            np.testing.assert_allclose(
                getattr(batch, name)[i], getattr(single, name), rtol=rtol
            )
        for name, values in single.laws.items():
            np.testing.assert_allclose(batch.laws[name][i], values, atol=rtol)
        for many, one in zip(
            arrays_of(batch.model), arrays_of(single.model), strict=True
        ):
            np.testing.assert_allclose(many[i], one, rtol=0, atol=rtol)
        assert batch.stats["steps"][i] == single.stats["steps"]


def seeded(model, key):
    return jax.tree.map(
        lambda w: jr.normal(key, w.shape, w.dtype) if eqx.is_array(w) else w, model
    )


# Batched products round differently, and step sizes follow from the last digits.
@pytest.mark.parametrize("problem", problems("nonlinear"))
def test_vmapped_flow_equals_a_loop(problem):
    model, data = problem()
    keys = jr.split(jr.key(9), 3)

    def solve(key):
        return hf.flow(seeded(model, key), data, 2.0, throw=False)

    batch = eqx.filter_vmap(solve)(keys)
    assert batch.losses.shape == (3, 101)
    singles = [solve(key) for key in keys]
    assert_batch_equals_loop(batch, singles, rtol=1e-8)
    if batch.stats["error_estimate"] is not None:
        estimates = [single.stats["error_estimate"] for single in singles]
        np.testing.assert_allclose(batch.stats["error_estimate"], estimates, rtol=1e-6)


def test_vmapped_stochastic_descent_equals_a_loop():
    model, data = relu_regression()
    keys = jr.split(jr.key(9), 3)

    def solve(key):
        return hf.descend(
            seeded(model, key), data, 20, learning_rate=0.05, batch_size=5,
            key=key, throw=False,
        )  # fmt: skip

    batch = eqx.filter_vmap(solve)(keys)
    assert_batch_equals_loop(batch, [solve(key) for key in keys], rtol=1e-12)


# Derivatives, against central differences.


def outcome(trajectory: hf.Trajectory) -> Array:
    """A number that depends on the weights at the end and the losses on the way."""
    return jnp.sum(trajectory.losses) + jnp.sum(jnp.sin(trajectory.model.w))


def flow_outcome(w, data, **options):
    model = eqx.tree_at(lambda m: m.w, neuron()[0], w)
    options = {"ts": jnp.array([0.3, 0.9]), "rtol": 1e-13, **options}
    return outcome(hf.flow(model, data, 1.0, throw=False, **options))


def direction():
    w, data = neuron()[0].w, neuron()[1]
    leaves, structure = jax.tree.flatten((w, data))
    keys = jr.split(jr.key(3), len(leaves))
    moved = [jr.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def central_difference(fn, step: float = 1e-3) -> float:
    """Along `direction`, with an error of order step⁴."""
    at = neuron()[0].w, neuron()[1]

    def along(s):
        return float(fn(*jax.tree.map(lambda a, d: a + s * d, at, direction())))

    near, far = along(step) - along(-step), along(2 * step) - along(-2 * step)
    return (8 * near - far) / (12 * step)


@pytest.fixture(scope="module")
def flow_slope() -> float:
    return central_difference(flow_outcome)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjoint": dfx.DirectAdjoint(), "max_steps": 64},
        {"adjoint": dfx.BacksolveAdjoint()},
    ],
    ids=["RecursiveCheckpoint", "Direct", "Backsolve"],
)
def test_gradient_through_the_flow(options, flow_slope):
    solve = functools.partial(flow_outcome, **options)
    gradient = jax.grad(solve, argnums=(0, 1))(neuron()[0].w, neuron()[1])
    products = jax.tree.map(jnp.vdot, gradient, direction())
    slope = sum(jax.tree.leaves(products))
    np.testing.assert_allclose(slope, flow_slope, rtol=1e-6)


def test_forward_derivative_through_the_flow(flow_slope):
    solve = functools.partial(flow_outcome, adjoint=dfx.ForwardMode())
    _, slope = jax.jvp(solve, (neuron()[0].w, neuron()[1]), direction())
    np.testing.assert_allclose(slope, flow_slope, rtol=1e-6)


def test_gradient_through_descent():
    def solve(w, data, rate=0.1):
        model = eqx.tree_at(lambda m: m.w, neuron()[0], w)
        return outcome(hf.descend(model, data, 10, learning_rate=rate, throw=False))

    at = neuron()[0].w, neuron()[1]
    gradient = jax.grad(solve, argnums=(0, 1))(*at)
    products = jax.tree.map(jnp.vdot, gradient, direction())
    slope = sum(jax.tree.leaves(products))
    np.testing.assert_allclose(slope, central_difference(solve), rtol=1e-6)
    by_rate = jax.grad(lambda rate: solve(*at, rate))(0.1)
    ends = [solve(*at, 0.1 + sign * 1e-4) for sign in (1, -1)]
    np.testing.assert_allclose(by_rate, (ends[0] - ends[1]) / 2e-4, rtol=1e-6)


# User-written modules.


class Stack(eqx.Module):
    """Function leaves, a frozen array, and one that is used behind `stop_gradient`."""

    inner: Neuron
    scale: Array
    gate: Array
    fn: Callable = jnp.sin

    def __call__(self, x):
        return self.scale * self.fn(self.inner(jax.lax.stop_gradient(self.gate) * x))


def half_frozen():
    model = Stack(neuron()[0], jnp.array(0.7), jnp.array([1.1, 0.9]))
    trainable = jax.tree.map(eqx.is_inexact_array, model)
    return model, eqx.tree_at(lambda m: m.scale, trainable, False)


@pytest.mark.parametrize("half", ["flow", "descend"])
def test_frozen_and_stopped_arrays_keep_every_bit(half):
    model, trainable = half_frozen()
    data = neuron()[1]
    if half == "flow":
        run = hf.flow(model, data, 1.0, trainable=trainable, save_models=True)
    else:
        run = hf.descend(
            model, data, 10, learning_rate=0.1, trainable=trainable, save_models=True
        )
    np.testing.assert_array_equal(run.model.scale, model.scale)
    np.testing.assert_array_equal(run.model.gate, model.gate)
    assert np.all(run.model.inner.w != model.inner.w)
    assert run.model.fn is model.fn
    assert set(run.squared_norms) == {"inner.w", "gate"}
    # It moves as the model does in which these arrays are constants.
    scale, gate = model.scale, model.gate
    alone = Neuron(model.inner.w, lambda z: scale * jnp.sin(jnp.tanh(z)))
    gated = (data[0] * gate, data[1])
    if half == "flow":
        expected = hf.flow(alone, gated, 1.0, atol=1e-9, rtol=1e-10)
        tolerance = 1e-7
    else:
        expected = hf.descend(alone, gated, 10, learning_rate=0.1)
        tolerance = 1e-14
    np.testing.assert_allclose(run.model.inner.w, expected.model.w, atol=tolerance)


@pytest.mark.parametrize("half", ["flow", "descend"])
def test_saved_models_are_the_models_at_the_recorded_times(half):
    model, (x, y) = linear_regression()
    if half == "flow":
        run = hf.flow(model, (x, y), 5.0, save_models=True)
    else:
        run = hf.descend(model, (x, y), 10, learning_rate=0.1, save_models=True)
    weights = np.asarray(saved(run).layers[0].weight)
    np.testing.assert_array_equal(weights[0], model.layers[0].weight)
    np.testing.assert_allclose(weights[-1], run.model.layers[0].weight, rtol=1e-13)
    residual = np.asarray(x) @ weights.swapaxes(1, 2) - np.asarray(y)
    losses = 0.5 * np.sum(residual**2, axis=(1, 2)) / len(x)
    np.testing.assert_allclose(run.losses, losses, rtol=1e-12)


# What is in the compiled program.


def equations(jaxpr: Jaxpr, inside_loop: bool = False):
    """Every equation, with whether a loop surrounds it."""
    for eqn in jaxpr.eqns:
        yield eqn, inside_loop
        loop = inside_loop or eqn.primitive.name in ("while", "scan")
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, ClosedJaxpr):
                    yield from equations(item.jaxpr, loop)
                elif isinstance(item, Jaxpr):
                    yield from equations(item, loop)


def program(half: str, problem=neuron, **options) -> list:
    model, data = problem()
    model = jax.tree.map(lambda a: _as_float32(a), model)
    data = jax.tree.map(_as_float32, data)
    weights, rest = eqx.partition(model, eqx.is_array)

    def run(weights, data):
        start = eqx.combine(weights, rest)
        if half == "flow":
            t = hf.flow(start, data, 1.0, throw=False, **options)
        else:
            t = hf.descend(
                start, data, 7, learning_rate=0.1, record_every=3, throw=False,
                **options,
            )  # fmt: skip
        return t.ts, t.losses, t.laws, t.grad_norms, t.stats.numbers

    return list(equations(jax.make_jaxpr(run)(weights, data).jaxpr))


def _as_float32(leaf):
    return leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf


def wide_values(program) -> set[str]:
    return {
        f"{eqn.primitive}: {var.aval}"
        for eqn, _ in program
        for var in (*eqn.invars, *eqn.outvars)
        if getattr(var.aval, "dtype", None) == jnp.float64
        # A Python number is a weakly typed scalar, of whatever width x64 says.
        and not var.aval.weak_type
    }


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("flow", neuron, {}), id="smooth flow"),
        pytest.param(
            ("flow", relu_regression, {"solver": hf.Averaged()}), id="flow over kinks"
        ),
        pytest.param(("descend", relu_regression, {}), id="descent"),
        pytest.param(
            ("descend", neuron, {"batch_size": 5, "key": jr.key(0)}),
            id="stochastic descent",
        ),
    ],
)
def float32_program(request):
    half, problem, options = request.param
    return program(half, problem, **options)


def test_float32_needs_no_float64(float32_program):
    assert wide_values(float32_program) == set()


def test_no_host_callback_inside_a_loop(float32_program):
    inside = {eqn.primitive.name for eqn, loop in float32_program if loop}
    assert inside
    assert not {name for name in inside if "callback" in name}


@pytest.mark.parametrize("half", ["flow", "descend"])
def test_progress_is_such_a_callback(half):
    found = program(half, progress=dfx.TextProgressMeter())
    assert any("callback" in eqn.primitive.name for eqn, loop in found if loop)


def test_runs_without_double_precision():
    code = """
import jax, jax.numpy as jnp, jax.random as jr
import homoflow as hf
jax.config.update("jax_numpy_dtype_promotion", "strict")
assert not jax.config.jax_enable_x64
model = hf.MLP((3, 2), key=jr.key(0))
x = jr.normal(jr.key(1), (12, 3))
flow = hf.flow(model, (x, x[:, :2]), 2.0)
run = hf.descend(
    model, (x, x[:, :2]), 200, learning_rate=0.01, batch_size=12, key=jr.key(2)
)
assert flow.losses.dtype == run.losses.dtype == run.ts.dtype == jnp.float32
assert hf.compare(flow, run).relative_weight_distance < 1e-2
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


# Progress.


@pytest.mark.parametrize("half", ["flow", "descend"])
def test_progress_is_shown_and_changes_no_number(half, capfd):
    model, data = neuron()

    def run(**options):
        if half == "flow":
            return hf.flow(model, data, 2.0, **options)
        return hf.descend(model, data, 50, learning_rate=0.1, **options)

    quiet = run()
    jax.effects_barrier()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    shown = run(progress=True)
    jax.effects_barrier()
    captured = capfd.readouterr()
    assert "%" in captured.out + captured.err
    np.testing.assert_allclose(shown.losses, quiet.losses, rtol=1e-14)
    np.testing.assert_allclose(flat(shown.model), flat(quiet.model), rtol=1e-14)


def test_the_exact_flow_shows_progress(capfd):
    model, data = relu_regression()
    flow = hf.flow(model, data, 1.0, solver=hf.Filippov(max_active=24), progress=True)
    jax.effects_barrier()
    captured = capfd.readouterr()
    assert "100" in captured.out + captured.err
    assert flow.stats["entries"] + flow.stats["crossings"] > 0
