"""One schema for what every run says of itself."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import homoflow as hf

SCHEMA = hf.Stats.schema
REASON = hf.Reason("many_products", "30,000 products")


def made_stats() -> hf.Stats:
    return hf.Stats({"steps": jnp.array(3)}, (("solver_reason", REASON),))


def test_every_key_is_answered():
    stats = made_stats()
    assert list(stats) == list(SCHEMA)
    assert len(stats) == len(SCHEMA)
    assert stats["steps"] == 3
    assert stats["solver_reason"] == REASON
    assert stats["mass"] is None
    assert stats.get("mass", 1.0) is None
    assert "mass" in stats


def test_an_unknown_key_is_an_error():
    with pytest.raises(KeyError, match="'step'"):
        made_stats()["step"]
    assert "step" not in made_stats()
    with pytest.raises(ValueError, match="'step'"):
        hf.Stats({"step": jnp.array(3)})
    with pytest.raises(ValueError, match="'why'"):
        made_stats().with_facts((("why", "asked for"),))
    with pytest.raises(ValueError, match="'leaps'"):
        made_stats().with_numbers(leaps=jnp.array(0))


def test_what_is_printed_applies():
    lines = repr(made_stats()).split("\n")
    assert lines == ["Stats(", "  solver_reason: 30,000 products", "  steps: 3", ")"]


def test_a_reason_is_a_value():
    same = hf.Reason("many_products", "30,000 products")
    assert same == REASON
    assert hash(same) == hash(REASON)
    assert str(REASON) == "30,000 products"
    assert hf.Reason("many_products", "") != REASON
    assert hf.Reason("requested", "30,000 products") != REASON
    with pytest.raises(dataclasses.FrozenInstanceError):
        REASON.code = "requested"


def test_the_reason_is_the_same_for_a_whole_batch():
    batch = eqx.filter_vmap(lambda n: hf.Stats({"steps": n}, made_stats().facts))(
        jnp.arange(3)
    )
    assert batch["solver_reason"] == REASON
    assert batch["steps"].shape == (3,)


def linear_problem():
    x = jr.normal(jr.key(1), (4, 2))
    return hf.MLP((2, 3, 1), activation="linear", key=jr.key(0)), (x, x[:, :1])


def relu_problem():
    x = jr.normal(jr.key(1), (4, 2))
    return hf.MLP((2, 3, 1), activation="relu", key=jr.key(0)), (x, x[:, :1])


RUNS = {
    "smooth": lambda: hf.flow(*linear_problem(), 1.0),
    "averaged": lambda: hf.flow(*relu_problem(), 1.0, solver=hf.Averaged()),
    "exact": lambda: hf.flow(*relu_problem(), 1.0, rtol=1e-6),
    "stationary": lambda: hf.flow(*linear_problem(), jnp.inf),
    "modified": lambda: hf.modified_flow(*linear_problem(), 1.0, learning_rate=0.01),
    "heavy_ball": lambda: hf.heavy_ball_flow(*linear_problem(), 1.0, mass=0.1),
    "drift": lambda: hf.predict_drift(*linear_problem(), 1.0).flow,
    "central": lambda: hf.central_flow(*linear_problem(), 1.0, learning_rate=0.01),
    "descend": lambda: hf.descend(*linear_problem(), 10, learning_rate=0.01),
}  # fmt: skip


@pytest.mark.parametrize("route", RUNS)
def test_a_run_knows_what_the_schema_says(route):
    stats = RUNS[route]().stats
    known = {key for key in stats if stats[key] is not None}
    assert known <= {key for key, entry in SCHEMA.items() if route in entry.routes}
    # What every run of every route has.
    everywhere = {k for k, entry in SCHEMA.items() if set(RUNS) <= set(entry.routes)}
    assert everywhere <= known
    numbers = jax.tree.leaves(stats.numbers)
    assert all(jnp.ndim(number) == 0 for number in numbers)


def test_the_schema_is_in_words():
    for key, entry in SCHEMA.items():
        assert key.isidentifier()
        assert entry.type
        assert set(entry.routes) <= set(RUNS)
        assert entry.meaning.endswith(".")
