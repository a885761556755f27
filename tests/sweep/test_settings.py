"""The settings of a sweep, and how they are cut into chunks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf
from homoflow._sweep._plan import make_plan, padded
from homoflow._sweep._settings import as_settings


def plan_of(over, vectorize=None, chunk=None, devices=1):
    return make_plan(
        as_settings(over), vectorize, chunk, default_chunk=32, num_devices=devices
    )


def run_settings(plan):
    """Every setting that the chunks of a plan would run, as the axes' labels."""
    found = []
    for chunk in plan.chunks():
        columns, fixed = plan.columns(chunk), plan.fixed(chunk.outer)
        for row in range(chunk.size):
            own = {name: column[row].item() for name, column in columns.items()}
            found.append(tuple(sorted({**fixed, **own}.items())))
    return found


def test_a_grid_is_every_combination():
    settings = hf.grid(hf.zipped("pair", a=[1, 2], b=[0.5, 0.25]), seed=range(3))
    assert settings.shape == {"pair": 2, "seed": 3}
    assert settings.names == ("a", "b", "seed")
    assert len(settings) == 6


@pytest.mark.parametrize(
    "vectorize", [None, ("seed", "rate"), ("rate",), ("seed",), ()]
)
@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_chunks_run_every_setting_once(vectorize, chunk):
    over = {"rate": [0.1, 0.2, 0.3], "width": [4, 8], "seed": range(7)}
    given = None if vectorize == () else chunk
    plan = plan_of(over, vectorize, given)
    wanted = [
        tuple(sorted({"rate": r, "width": w, "seed": s}.items()))
        for r, w, s in itertools.product(*over.values())
    ]
    assert sorted(run_settings(plan)) == sorted(wanted)
    assert all(c.size <= chunk for c in plan.chunks())
    assert [c.number for c in plan.chunks()] == list(range(len(plan.chunks())))


def test_a_zipped_axis_with_a_part_outside_is_outside():
    over = hf.grid(hf.zipped("budget", rate=[0.1, 0.2], steps=[10, 5]), seed=range(3))
    plan = plan_of(over, vectorize=("rate", "seed"))
    assert [axis.dim for axis in plan.inner] == ["seed"]
    first, second = plan.chunks()
    assert plan.fixed(first.outer) == {"steps": 10}
    np.testing.assert_array_equal(plan.columns(second)["rate"], [0.2, 0.2, 0.2])


def test_devices_share_a_chunk_evenly():
    plan = plan_of({"seed": range(10)}, devices=4)
    assert (plan.box, plan.batch) == ((10,), 12)
    columns = padded(plan.columns(plan.chunks()[0]), plan.batch)
    np.testing.assert_array_equal(columns["seed"][-3:], [9, 9, 9])


def test_keys_vectors_and_functions_are_values():
    keys = jax.random.split(jax.random.key(0), 3)
    settings = hf.grid(key=keys, x=np.eye(2), fn=[jnp.tanh, jax.nn.gelu])
    key, x, fn = (axis.columns[axis.dim] for axis in settings.axes)
    assert key.labels().tolist() == [0, 1, 2] or len(set(key.labels())) == 3
    assert x.array.shape == (2, 2)
    assert fn.array is None
    assert fn.labels().tolist() == ["tanh", "gelu"]


REFUSED = {
    "no values": (lambda: hf.grid(seed=[]), "`seed` has no values"),
    "one number": (lambda: hf.grid(seed=3), r"`seed=\[…\]`"),
    "a word": (lambda: hf.grid(seed="abc"), "must be a list of its values"),
    "unequal zips": (
        lambda: hf.zipped("pair", a=[1, 2], b=[1]),
        "as many values of each name: `a` has 2, `b` has 1. For every combination",
    ),
    "zip of nothing": (lambda: hf.zipped("pair"), "needs names with their values"),
    "zip without a name": (lambda: hf.zipped([1], a=[2]), "is the name of its dimension"),
    "twice": (
        lambda: hf.grid(hf.zipped("pair", seed=[1]), seed=[2]), "`seed` is there twice"
    ),
    "no axes": (lambda: as_settings({}), "needs an axis"),
    "empty list": (lambda: as_settings([]), "empty list"),
    "uneven list": (
        lambda: as_settings([{"a": 1}, {"b": 2}]), r"the first has \['a'\], another \['b'\]"
    ),
    "list of numbers": (lambda: as_settings([1, 2]), "holds dictionaries"),
    "a function": (lambda: as_settings(print), "`over` must be axes by their names"),
    "not a name": (lambda: as_settings({"my axis": [1]}), "names are those of `run`'s"),
    "misspelt vectorize": (
        lambda: plan_of({"seed": [1]}, vectorize=("sed",)), "those are seed"
    ),
    "word as vectorize": (
        lambda: plan_of({"seed": [1]}, vectorize="seed"), r"such as `\('seed',\)`"
    ),
    "batched functions": (
        lambda: plan_of({"fn": [jnp.tanh]}, vectorize=("fn",)), "`fn` cannot be batched"
    ),
    "no chunk": (lambda: plan_of({"seed": [1]}, chunk=0), "`chunk` must be a positive"),
    "chunk of nothing": (
        lambda: plan_of({"fn": [jnp.tanh]}, chunk=3), "no axis of this sweep is batched"
    ),
    "more devices than settings": (
        lambda: plan_of({"seed": range(9)}, chunk=3, devices=8), "there are 8 devices"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_of_the_wrong_kind(refused, make, message):
    refused(make, message, (TypeError, ValueError))


def test_integers_that_do_not_fit_are_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="int32 cannot hold"):
        hf.grid(seed=[2**40])
