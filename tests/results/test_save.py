"""Trajectories in files: bit by bit, or an error that says what is wrong."""

import dataclasses
import functools
import json
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
    names: tuple


class Keyed(eqx.Module):
    """A network with what a file has to treat with care."""

    net: hf.MLP
    key: jax.Array
    half: jax.Array
    scale: float
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return self.net(x)


def keyed(seed=0, name="a"):
    net = hf.MLP((3, 4, 1), activation="linear", key=jr.key(seed))
    half = jnp.arange(3, dtype=jnp.bfloat16)
    return Keyed(net, jr.key(seed + 5), half, 2.0, name)


def trainable(model):
    frozen = jax.tree.map(lambda _: False, model)
    every = jax.tree.map(eqx.is_inexact_array, model.net)
    return eqx.tree_at(lambda m: m.net, frozen, every)


@functools.cache
def laws():
    model = keyed()
    return hf.laws(model, DATA[0][0], trainable=trainable(model))


def descend(seed=0, **options):
    model = keyed(seed)
    options = {"save_models": True, "ledger": True, "throw": False, **options}
    options = {"laws": laws(), **options}
    return hf.descend(
        model, DATA, 6, trainable=trainable(model),
        **{"learning_rate": 0.01, **options},
    )  # fmt: skip


def dressed(run):
    """The run with everything that some run may have."""
    layers = (hf.KinkLayer("relu", 1, "layer 1", (4,)),)
    events = hf.Events(
        jnp.array([0.1, jnp.nan]), jnp.array([3, -1]), jnp.array([2, -1]),
        jnp.array([0, -1]), jnp.array(1), jnp.array(0), jnp.array(0.5), layers, 6,
    )  # fmt: skip
    observed = {
        "plain": run.losses,
        "pair": Pair(jnp.array([[1.0, jnp.nan]]), ("a", 1, None, True)),
        "nested": {"list": [jnp.arange(3, dtype=jnp.int16), 2.5], "key": jr.key(3)},
    }
    reason = hf.Reason("stiff_restart", "≤ 1,000 steps")
    stats = run.stats.with_facts((("solver_reason", reason), ("solver", "Dopri8")))
    stats = stats.with_numbers(stationary_kind=hf.StationaryKind.strict_saddle)
    return dataclasses.replace(
        run, events=events, continuation=None, observed=observed, stats=stats,
        observed_every=(("pair", 7),),
    )  # fmt: skip


def assert_same(a, b):
    """The same structure, dtypes and bits, NaN equal to NaN."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not eqx.is_array(one):
            assert one == other
            continue
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert jr.key_impl(one) == jr.key_impl(other)
            one, other = jr.key_data(one), jr.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        assert one.shape == other.shape


@pytest.fixture(scope="module")
def run():
    return dressed(descend())


@pytest.fixture
def file(tmp_path, run):
    path = tmp_path / "run.npz"
    hf.save(path, run)
    return path


def test_a_trajectory_comes_back_as_it_was(file, run):
    loaded = hf.load(file, like=keyed(seed=9))
    expected = dict(run.observed, pair=run.observed["pair"]._asdict())
    assert_same(loaded, dataclasses.replace(run, observed=expected))
    assert isinstance(loaded, hf.Trajectory)
    assert loaded.result == hf.RESULTS.successful
    assert loaded.stats["solver_reason"] == hf.Reason("stiff_restart", "≤ 1,000 steps")
    assert loaded.stats["stationary_kind"] == hf.StationaryKind.strict_saddle
    assert loaded.events.label(2) == "layer 1, unit 2"
    assert repr(loaded.ledger) == repr(run.ledger)
    assert loaded.model.name == "a"
    assert repr(loaded) == repr(run)
    # What was loaded can be saved.
    hf.save(file, loaded)
    assert_same(hf.load(file, like=run.model), loaded)


def test_without_a_model_the_rest_is_there(file, run):
    loaded = hf.load(file)
    assert loaded.model is None
    assert loaded.models is None
    np.testing.assert_array_equal(loaded.losses, run.losses)


def test_a_batch_comes_back(tmp_path):
    rates = jnp.array([0.01, 0.02, 1e4])
    batch = eqx.filter_vmap(lambda r: descend(learning_rate=r))(rates)
    assert not jnp.all(batch.result == hf.RESULTS.successful)
    hf.save(tmp_path / "batch", batch)
    loaded = hf.load(tmp_path / "batch", like=keyed())
    assert batch.continuation is not None
    assert loaded.continuation is None
    batch = eqx.tree_at(
        lambda t: t.continuation, batch, None, is_leaf=lambda x: x is None
    )
    assert_same(loaded, batch)


def test_float64_comes_back_where_it_is_switched_off(file, run):
    with jax.enable_x64(False):
        loaded = hf.load(file, like=run.model)
    assert loaded.losses.dtype == jnp.float64
    np.testing.assert_array_equal(loaded.losses, run.losses)


def test_another_model_is_told_apart(file):
    wide = eqx.tree_at(lambda m: m.net, keyed(), hf.MLP((3, 5, 1), key=jr.key(0)))
    with pytest.raises(
        ValueError, match=r"net\.layers\[0\]\.weight has shape \(5, 3\)"
    ):
        hf.load(file, like=wide)
    single = eqx.tree_at(lambda m: m.half, keyed(), jnp.zeros(3, jnp.float32))
    with pytest.raises(ValueError, match=r"half has shape .* dtype float32.* bfloat16"):
        hf.load(file, like=single)
    with pytest.raises(ValueError, match="also has the array half"):
        hf.load(file, like=eqx.tree_at(lambda m: m.half, keyed(), None))
    deep = eqx.tree_at(lambda m: m.net, keyed(), hf.MLP((3, 4, 4, 1), key=jr.key(0)))
    with pytest.raises(ValueError, match=r"no array net\.layers\[2\]\.weight"):
        hf.load(file, like=deep)


def test_what_is_not_such_a_file_is_refused(file, run, tmp_path):
    with pytest.raises(FileNotFoundError):
        hf.load(tmp_path / "nothing")
    whole = file.read_bytes()
    wrong = tmp_path / "wrong"
    flipped = bytearray(whole)
    flipped[whole.index(np.asarray(run.losses).tobytes())] ^= 1
    other = json.dumps({"format": "x", "version": 1}).encode()
    newer = json.dumps({"format": "homoflow trajectory", "version": 99}).encode()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        wrong.write_bytes(content)
        with pytest.raises(ValueError, match=r"wrong is (not a trajectory|damaged)"):
            hf.load(wrong)
    for header in (other, newer):
        with wrong.open("wb") as out:
            np.savez(out, header=np.frombuffer(header, np.uint8))
        with pytest.raises(ValueError, match="another version of homoflow"):
            hf.load(wrong)
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    with pytest.raises(ValueError, match="not a trajectory"):
        hf.load(tmp_path / "arrays.npz")
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(ValueError, match="not a trajectory"):
        hf.load(tmp_path / "array.npy")
    np.save(tmp_path / "pickle.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="not a trajectory"):
        hf.load(tmp_path / "pickle.npy")


def test_what_cannot_be_saved_is_refused_and_leaves_the_file(file, run):
    before = file.read_bytes()
    for value, match in ((object(), "type object"), ({1: run.losses}, "keys")):
        odd = dataclasses.replace(run, observed={"odd": value})
        with pytest.raises(TypeError, match=match):
            hf.save(file, odd)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda x: hf.save(file, dataclasses.replace(run, losses=x)))(run.losses)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["run.npz"]
