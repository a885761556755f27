"""Laws that `flow` and `descend` find by themselves, of a user's own modules."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array

import homoflow as hf
from homoflow._laws import _default_laws
from homoflow._laws._default_laws import default_laws

X = jr.normal(jr.key(1), (12, 3))
DATA = X, X[:, :2]


class Net(eqx.Module):
    """A network of a user: two layers, the first scaled by something that is frozen."""

    first: Array
    second: Array
    scale: Array

    def __call__(self, x):
        return self.second @ (self.first @ x) * self.scale


def net(seed=0, width=4, scale=1.0):
    keys = jr.split(jr.key(seed))
    shapes = (width, 3), (2, width)
    first, second = (
        jr.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)
    )
    return Net(first, second, jnp.full(2, scale))


def is_trained(model):
    everything = jax.tree.map(lambda _: True, model)
    return eqx.tree_at(lambda m: m.scale, everything, False)


def flow(model, data=DATA, **options):
    return hf.flow(model, data, 0.5, trainable=is_trained(model), **options)


def test_they_are_those_that_a_search_finds_and_are_restored():
    model = net()
    run = flow(model)
    found = hf.laws(model, X[0], trainable=is_trained(model))
    assert [law.name for law in found] == list(run.laws)
    for law in found:
        np.testing.assert_allclose(run.laws[law.name][0], law.value(model), rtol=1e-12)
    # W₁W₁ᵀ − W₂ᵀW₂, whole, as of homoflow's own linear layers.
    (matrix,) = run.laws.values()
    expected = model.first @ model.first.T - model.second.T @ model.second
    np.testing.assert_allclose(np.abs(matrix[0]), np.abs(expected), rtol=1e-12)
    assert run.stats["projection"].startswith("on")
    np.testing.assert_allclose(matrix, matrix[:1] + 0 * matrix, atol=1e-13)


def test_descent_records_them_and_has_a_ledger():
    model = net()
    run = hf.descend(
        model, DATA, 20, learning_rate=0.01, trainable=is_trained(model), ledger=True
    )
    assert list(run.laws) == list(flow(model).laws) == list(run.ledger)


def test_they_are_searched_for_once_for_each_structure(monkeypatch):
    first = default_laws(hf.make_problem(net(width=5), DATA))
    assert len(first)
    monkeypatch.setattr(_default_laws, "search", lambda *_, **__: pytest.fail("again"))
    other_data = X[:7], X[:7, 1:]
    assert default_laws(hf.make_problem(net(3, width=5), other_data)) is first
    with pytest.raises(pytest.fail.Exception, match="again"):
        default_laws(hf.make_problem(net(width=6), DATA))


def test_what_is_frozen_may_decide_what_is_a_law():
    names = {}
    for scale in (0.0, 1.0):
        model = net(width=7, scale=scale)
        problem = hf.make_problem(model, DATA, trainable=is_trained(model))
        names[scale] = [law.name for law in default_laws(problem)]
    # Where the output is 0 whatever the weights, no gradient flows at all.
    assert names[1.0]
    assert names[0.0] != names[1.0]


def laws_of(model):
    return default_laws(hf.make_problem(model, DATA, trainable=is_trained(model)))


def laws_inside(transform, width):
    """The laws that are known inside of a trace."""
    scale, seen = net().scale, []

    def trace(key):
        first, second = jr.normal(key, (width, 3)), jr.normal(key, (2, width))
        seen.append(laws_of(Net(first, second, scale)))
        return key

    transform(trace)
    return seen[0]


@pytest.mark.parametrize(
    "transform",
    [
        lambda trace: jax.jit(trace)(jr.key(0)),
        lambda trace: jax.vmap(trace)(jr.split(jr.key(0), 3)),
    ],
    ids=["jit", "vmap"],
)
def test_inside_of_a_trace_they_are_those_that_were_found_before(transform):
    unseen = laws_inside(transform, width=8)
    assert not len(unseen)
    assert "run it once outside" in unseen.note
    found = laws_of(net(width=9))
    assert laws_inside(transform, width=9) is found


def test_frozen_arrays_that_are_traced_may_be_anything():
    assert len(laws_of(net(width=10)))
    seen = []
    eqx.filter_jit(lambda model: seen.append(laws_of(model)))(net(width=10))
    assert not len(seen[0])


def test_large_models_are_left_to_who_asks(monkeypatch):
    monkeypatch.setattr(_default_laws, "MAX_SEARCHED_WEIGHTS", 10)
    laws = default_laws(hf.make_problem(net(), DATA))
    assert not len(laws)
    assert "more than 10 weights" in laws.note
    assert "laws=homoflow.laws(model, x_example)" in laws.note


def test_a_search_that_fails_is_a_note(monkeypatch):
    def fail(*_, **__):
        raise ValueError("no target has a gradient")

    monkeypatch.setattr(_default_laws, "search", fail)
    laws = default_laws(hf.make_problem(net(width=11), DATA))
    assert laws.note == "The laws of Net were not found: no target has a gradient."


class Tokens(eqx.Module):
    table: Array
    out: Array

    def __call__(self, tokens):
        return self.out @ jnp.sum(self.table[tokens], axis=0)


def test_of_tokens_the_largest_of_all_samples_sets_the_range():
    """A search among the first sample's tokens alone would take others for constant."""
    model = Tokens(jr.normal(jr.key(0), (6, 3)), jr.normal(jr.key(1), (1, 3)))
    tokens = jnp.array([[0, 0], [5, 1], [2, 3], [4, 4]])
    problem = hf.make_problem(model, (tokens, jnp.ones((4, 1))))
    names = [law.name for law in default_laws(problem)]
    assert not any(name.startswith("entries") for name in names)
