"""Trajectories as labelled data sets."""

import dataclasses
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import homoflow as hf

X = jr.normal(jr.key(1), (6, 3))
DATA = (X, X[:, :1])


class Pair(NamedTuple):
    values: jax.Array
    count: jax.Array


def model(seed=0):
    return hf.MLP((3, 4, 1), activation="linear", key=jr.key(seed))


def observe(run):
    """The run with something observed at all times, and at every fourth."""
    n = run.ts.shape[0]
    observed = {
        "pair": Pair(jnp.ones((n, 2)), jnp.arange(n)),
        "rare": {"norm": run.losses[::4]},
    }
    return dataclasses.replace(run, observed=observed, observed_every=(("rare", 4),))


def descend(rate=0.01, seed=0, **options):
    return observe(hf.descend(model(seed), DATA, 20, learning_rate=rate, **options))


@pytest.fixture(scope="module")
def run():
    return descend()


def test_everything_is_labelled(run):
    data = run.to_xarray()
    assert data.sizes["time"] == 21
    np.testing.assert_array_equal(data["time"], run.ts)
    for name in ("losses", "grad_norms"):
        assert data[name].dims == ("time",)
        np.testing.assert_array_equal(data[name], getattr(run, name))
    for name, values in run.laws.items():
        axes = {1: (), 2: ("unit",), 3: ("row", "column")}[values.ndim]
        assert data[name].dims == ("time", *(f"{name} {axis}" for axis in axes))
        np.testing.assert_array_equal(data[name], values)
    for name, squares in run.squared_norms.items():
        np.testing.assert_array_equal(data["squared_norms"].sel(array=name), squares)
    assert data["pair.values"].dims == ("time", "pair.values axis 0")
    np.testing.assert_array_equal(data["pair.count"], np.arange(21))
    assert data["rare.norm"].dims == ("time of rare",)
    np.testing.assert_array_equal(data["time of rare"], run.ts[::4])
    assert data["result"].item() == "successful"
    assert data["steps"].item() == 20
    assert data.attrs["optimizer"] == "sgd"
    assert data.attrs["time_unit"] == "flow time"
    assert "solver" not in data.attrs


def test_a_batch_has_its_own_dimensions():
    rates = jnp.array([0.01, 0.01, 100.0])
    batch = jax.vmap(lambda r: descend(r, throw=False))(rates)
    data = batch.to_xarray()
    assert data["losses"].dims == ("seed", "time")
    assert list(data["result"].values) == ["successful", "successful", "diverged"]
    assert data["result"].dims == data["steps"].dims == ("seed",)
    # Times differ between the runs: they are no index.
    assert "time" not in data.coords
    np.testing.assert_array_equal(data["t"], batch.ts)
    assert data["rare.norm"].dims == ("seed", "time of rare")
    same = jax.tree.map(lambda leaf: leaf[:2] if eqx.is_array(leaf) else leaf, batch)
    np.testing.assert_array_equal(same.to_xarray()["time"], batch.ts[0])
    named = batch.to_xarray(batch_dims=["rate"])
    assert named["losses"].dims == ("rate", "time")
    square = jax.tree.map(
        lambda leaf: leaf[None] if eqx.is_array(leaf) else leaf, batch
    )
    assert square.to_xarray(("a", "b"))["losses"].dims == ("a", "b", "time")
    with pytest.raises(ValueError, match="2 axes: name them"):
        square.to_xarray()
    with pytest.raises(ValueError, match="must name the 1 axes"):
        batch.to_xarray(("a", "b"))


def test_reasons_and_kinds_are_text(run):
    kinds = hf.StationaryKind
    reason = hf.Reason("stiff_restart", "too many steps")
    stats = run.stats.with_facts((("solver_reason", reason),))
    stats = stats.with_numbers(stationary_kind=kinds.minimum)
    data = dataclasses.replace(run, stats=stats).to_xarray()
    assert data.attrs["solver_reason"] == "too many steps"
    assert data.attrs["solver_reason_code"] == "stiff_restart"
    assert data["stationary_kind"].item() == "minimum"


def test_two_things_of_one_name_are_refused(run):
    double = dataclasses.replace(run, observed={"losses": run.losses})
    with pytest.raises(ValueError, match="called 'losses'"):
        double.to_xarray()


def test_without_xarray_the_error_says_what_to_do(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"homoflow\[xarray\]"):
        run.to_xarray()


def test_homoflow_imports_neither_xarray_nor_matplotlib():
    code = (
        "import sys, homoflow; "
        "print([m for m in ('xarray', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
