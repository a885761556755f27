"""A function that a CPU applies to a batch in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from homoflow._jax._vmap_as_loop import vmap_as_loop_on_cpu


def halvings(x, y):
    """How often x is halved until it is below 1, and the rest; y is only passed on."""

    def halve(carry):
        value, count = carry
        return value / 2, count + 1

    rest, count = lax.while_loop(lambda c: c[0] >= 1, halve, (x, jnp.zeros((), int)))
    return {"rest": rest + 0 * y["shift"], "count": count}


in_turn = vmap_as_loop_on_cpu(halvings)
X = jnp.array([0.5, 3.0, 100.0])
Y = {"shift": jnp.asarray(1.0)}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_it_is_the_function_alone_and_in_a_batch(jit):
    alone = jit(in_turn)(X[2], Y)
    equal(alone, halvings(X[2], Y))
    batch = jit(jax.vmap(in_turn, (0, None)))(X, Y)
    assert batch["count"].tolist() == [0, 2, 7]
    equal(batch, jax.vmap(halvings, (0, None))(X, Y))


def test_a_batch_of_batches_is_flat():
    both = X[:, None] * jnp.array([1.0, 8.0])
    nested = jax.vmap(jax.vmap(in_turn, (0, None)), (0, None))(both, Y)
    equal(nested, jax.vmap(jax.vmap(halvings, (0, None)), (0, None))(both, Y))


def test_only_the_second_argument_may_be_batched():
    shifts = {"shift": jnp.arange(2.0)}
    equal(
        jax.vmap(in_turn, (None, 0))(X[1], shifts),
        jax.vmap(halvings, (None, 0))(X[1], shifts),
    )


def loops(function) -> str:
    return jax.jit(function).lower(X, Y).as_text()


def test_each_element_has_a_loop_of_its_own():
    """In a batch the loop's condition is one number, not one for each element."""
    together = loops(jax.vmap(halvings, (0, None)))
    alone = loops(jax.vmap(in_turn, (0, None)))
    assert together.count("stablehlo.while") == 1
    assert alone.count("stablehlo.while") == 2  # over elements, and of each
    assert "stablehlo.reduce" in together  # whether any is not done
    assert "stablehlo.reduce" not in alone


def test_derivatives_are_given_from_outside():
    @jax.custom_jvp
    def known(x):
        return in_turn(x, Y)["rest"]

    @known.defjvp
    def _(primals, tangents):
        return known(*primals), 3.0 * tangents[0]

    np.testing.assert_array_equal(jax.vmap(jax.grad(known))(X), [3.0, 3.0, 3.0])
    _, change = jax.jvp(jax.vmap(known), (X,), (jnp.ones(3),))
    np.testing.assert_array_equal(change, [3.0, 3.0, 3.0])
