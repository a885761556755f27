"""What functions read: each change is seen, and nothing is trusted that cannot be."""

import functools
import math
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from homoflow._jax._dependencies import dependencies_of, jax_settings

#: A file of one's own, whose names are changed between two looks.
SOURCE = """
import functools, jax, jax.numpy as jnp, numpy as np, equinox as eqx
import helpers

RATE, TABLE, NESTED = 0.1, np.ones(3), {"rates": [0.1, 0.2]}
WEIGHTS = jnp.ones(3)

def inner(x):
    return RATE * x

class Model(eqx.Module):
    w: jax.Array
    scale: float = 1.0

    @property
    def size(self):
        return SIZE

    def __call__(self, x):
        return self.w * x

SIZE = 3
MODEL = Model(WEIGHTS)

def by_number(x): return RATE * x
def by_helper(x): return [inner(y) for y in x]
def by_array(x): return TABLE @ x
def by_container(x): return NESTED["rates"][0] * x
def by_jax_array(x): return WEIGHTS @ x
def by_module(x): return helpers.rate * x
def by_function_of_module(x): return helpers.double(x)
def by_class(x): return Model(x)(x)
def by_property(x): return Model(x).size
def by_object(x): return MODEL(x)
def by_partial(x): return PARTIAL(x)
def by_jit(x): return JITTED(x)
def by_default(x, rate=0.5): return rate * x
def by_lambda(x): return (lambda y: y * RATE)(x)
def by_missing(x): return len(LATER)
PARTIAL = functools.partial(inner)
JITTED = jax.jit(inner)
"""
#: What is run between the looks, for each function that has to be seen as another one.
CHANGES = {
    "by_number": "RATE = 0.2",
    "by_helper": "RATE = 0.2",
    "by_array": "TABLE[0] = 2",
    "by_container": "NESTED['rates'][0] = 0.3",
    "by_jax_array": "WEIGHTS = jnp.zeros(3)",
    "by_module": "helpers.rate = 3.0",
    "by_function_of_module": "helpers.double.__globals__['factor'] = 3.0",
    "by_class": "Model.__call__ = lambda self, x: self.w + x",
    "by_property": "SIZE = 4",
    "by_object": "MODEL = Model(WEIGHTS, 2.0)",
    "by_partial": "PARTIAL = functools.partial(inner, x=1)",
    "by_jit": "RATE = 0.2",
    "by_default": "by_default.__defaults__ = (0.6,)",
    "by_lambda": "RATE = -0.0",
    "by_missing": "LATER = [1]",
}


@pytest.fixture
def file(monkeypatch):
    helpers = types.ModuleType("helpers")
    exec("rate, factor = 2.0, 2.0\ndef double(x): return factor * x", helpers.__dict__)
    monkeypatch.setitem(sys.modules, "helpers", helpers)
    names: dict = {"__name__": "file"}
    exec(SOURCE, names)
    return names


@pytest.mark.parametrize(("name", "change"), CHANGES.items(), ids=CHANGES)
def test_a_change_of_what_is_read_is_seen(file, name, change):
    before = dependencies_of(file[name])
    assert before is not None
    assert dependencies_of(file[name]) == before
    assert hash(dependencies_of(file[name])) == hash(before)
    exec(change, file)
    assert dependencies_of(file[name]) != before


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_read_may_change(file, name):
    before = dependencies_of(file[name])
    exec("UNREAD = 3; helpers.unread = 4", file)
    assert dependencies_of(file[name]) == before


def test_a_function_that_is_defined_again_is_the_same():
    def make(rate, data):
        return lambda x: rate * jnp.sin(x) @ data

    data = jnp.ones(3)
    first = dependencies_of(make(0.1, data))
    assert dependencies_of(make(0.1, data)) == first
    assert dependencies_of(make(0.2, data)) != first
    assert dependencies_of(make(1, data)) != dependencies_of(make(1.0, data))
    assert dependencies_of(make(0.1, jnp.zeros(3))) != first
    assert dependencies_of(make(np.nan, data)) == dependencies_of(make(np.nan, data))
    assert dependencies_of(make(0.0, data)) != dependencies_of(make(-0.0, data))


#: In a process of its own: the checks of types wrap homoflow's functions in objects that
#: cannot be compared.
OF_A_USER = """
import math
import jax, jax.numpy as jnp, numpy as np, optax
import homoflow as hf
from homoflow._jax._dependencies import dependencies_of

model = hf.MLP((2, 3, 1), activation=jnp.tanh, key=jax.random.key(0))
laws = hf.laws(model)
x = jnp.ones((3, 2))
observe = {"ntk": hf.observe.NTK(x)}
optimizer = optax.chain(optax.clip(1.0), optax.adam(optax.cosine_decay_schedule(1, 9)))

def run(seed):
    own = jax.tree.map(lambda w: math.sqrt(2.0) * w, model)
    draw = jax.random.normal(jax.random.key(seed), (3, 1))
    options = {"laws": laws, "observe": observe, "optimizer": optimizer}
    return hf.descend(own, (x, draw + np.linspace(0, 1, 3)), 9, **options)

assert dependencies_of(run) is not None
assert dependencies_of((run, {"activation": jax.nn.gelu})) is not None
"""


def test_what_users_write_can_be_compared():
    """With networks, laws, observables, losses, optimizers and schedules."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", OF_A_USER], env=environment, check=True)


generator = np.random.default_rng(0)
tail = iter([1, 2])


def by_state_of_numpy(x):
    return x + np.random.normal()


def by_generator(x):
    return x + generator.normal()


def by_clock(x):
    return x + time.time()


def by_random(x):
    return x + random.random()


def by_file(x):
    return x + len(open("file").read())


def by_array_file(x):
    return x + np.load("file.npy")


def by_iterator(x):
    return x + next(tail)


def by_import(x):
    import helpers

    return helpers.rate * x


def by_changing_globals(x):
    global tail
    tail = x
    return x


def by_name_of_a_module(x):
    return getattr(math, "pi") * x  # noqa: B009


def by_globals(x):
    return globals()["generator"]


class Counter:
    count = 0


counter = Counter()


def by_object(x):
    return x + counter.count


@functools.lru_cache
def by_cache(x):
    return x


UNKNOWN = [
    by_state_of_numpy, by_generator, by_clock, by_random, by_file, by_array_file,
    by_iterator, by_import, by_changing_globals, by_name_of_a_module, by_globals,
    by_object, by_cache,
]  # fmt: skip


@pytest.mark.parametrize("function", UNKNOWN)
def test_what_cannot_be_compared_is_not_known(function):
    assert dependencies_of(function) is None
    assert dependencies_of({"calls": [lambda x: function(x)]}) is None


def test_traced_numbers_are_not_known():
    seen = []

    def look(x):
        seen.append(dependencies_of(lambda y: x + y))
        return x

    jax.jit(look)(1.0)
    assert seen == [None]


def test_objects_that_contain_themselves_end():
    loop: list = []
    loop.append(loop)
    assert dependencies_of(loop) is not None

    def recursive(n):
        return n if n < 1 else recursive(n - 1)

    assert dependencies_of(recursive) == dependencies_of(recursive)


def test_a_setting_of_jax_is_seen_in_its_block():
    outside = jax_settings()
    with jax.default_matmul_precision("float32"):
        assert jax_settings() != outside
    with jax.enable_x64(not jax.config.jax_enable_x64):  # pyright: ignore[reportAttributeAccessIssue]
        assert jax_settings() != outside
    assert jax_settings() == outside


def test_dataclasses_of_ones_own_go_by_their_fields():
    class Data(eqx.Module):
        rate: float
        names: list

    first = dependencies_of(Data(0.1, ["a"]))
    assert first is not None
    assert dependencies_of(Data(0.1, ["a"])) == first
    assert dependencies_of(Data(0.1, ["b"])) != first
