"""A function written again is the same one only if nothing that it refers to may change."""

import math

import jax.numpy as jnp
import optax
import pytest

from homoflow._jax._same_function import same_function

FACTOR = 2.0


def scaled(by):
    return lambda z: by * jnp.tanh(z)


def with_global():
    return lambda z: FACTOR * z


def with_attribute(thing):
    return lambda z: thing.factor * z


def with_inner(by):
    return lambda z: (lambda y: y + by)(math.exp(z))


def with_default(by):
    return lambda z, factor=by: factor * z


@pytest.mark.parametrize("make", [scaled, with_inner, with_default])
def test_the_same_code_with_the_same_numbers_is_one_function(make):
    first = same_function(make(3.0))
    assert same_function(make(3.0)) is first
    assert first(0.5) == make(3.0)(0.5)


@pytest.mark.parametrize("make", [scaled, with_inner, with_default])
@pytest.mark.parametrize("other", [3, True, -3.0, jnp.float32])
def test_other_numbers_make_another_function(make, other):
    assert same_function(make(other)) is not same_function(make(3.0))


def test_zeros_of_different_sign_differ():
    assert same_function(scaled(0.0)) is not same_function(scaled(-0.0))


def test_lines_that_move_down_change_nothing():
    code = "lambda z: jnp.sum(z**2)"
    here, below = (eval("\n" * n + code, {"jnp": jnp}) for n in (0, 7))
    assert same_function(here) is same_function(below)


def test_other_constants_of_the_same_value_make_another_function():
    whole, real = (eval(f"lambda z: {text} * z") for text in ("1", "1.0"))
    assert same_function(whole) is not same_function(real)


def test_a_global_number_that_has_changed_is_seen(monkeypatch):
    before = same_function(with_global())
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    after = same_function(with_global())
    assert after is not before
    assert after(1.0) == 5.0


def test_a_schedule_of_optax_is_only_itself():
    """Made anew it may lie where another one lay before."""
    kept = [same_function(scaled(optax.linear_schedule(0.0, k, 9))) for k in (1.0, 2.0)]
    for k in (3.0, 4.0, 5.0):
        kept.append(same_function(scaled(optax.linear_schedule(0.0, k, 9))))
    assert len(set(kept)) == len(kept)


def test_what_may_change_makes_a_function_only_itself():
    class Thing:
        factor = 1.0

    thing = Thing()
    first, second = with_attribute(thing), with_attribute(thing)
    assert same_function(first) is first
    assert same_function(second) is second
    array = jnp.ones(2)
    assert same_function(scaled(array)) is not same_function(scaled(array))


def test_what_is_no_plain_function_is_handed_back():
    assert same_function(math.exp) is math.exp
    assert same_function(jnp.tanh) is jnp.tanh
