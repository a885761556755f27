"""A pair below another that a joint choice of slopes holds, and that moves on by itself.

L = p·a + q·relu(v + a) + ru + sv with a = relu(u), q = 2, s = −1 and p = −0.9. For u < 0
the second kink slides at v = 0 and u̇ = −r. For u > 0 it slides at v = −u, open for the
part β = (1 − r − p)/4 of the time, and u̇ = −(r + p + 2β) = −(1 + r + p)/2. Where both
kinks meet the hull of the four gradients also holds 0, and so the solution that stays, if
it holds 0: with the second kink open half of the time, s + qβ = 0, and u's for the part P,
−r = pP + q·(how much of the half is within P), of which 0.5(p + 2) = 0.55 is the most.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import homoflow as hf

P, MOST = -0.9, 0.55


class Nested(eqx.Module):
    u: Array
    v: Array

    def __call__(self, x):
        p, r = x
        a = jax.nn.relu(self.u)
        return p * a + 2 * jax.nn.relu(self.v + a) + r * self.u - self.v


def prediction(f: Array, _: Array) -> Array:
    """What is followed is the prediction itself."""
    return f


def flow(p: float, r: float) -> hf.Trajectory:
    """Over the time 2, at 1 of which u = 0."""
    model = Nested(jnp.asarray(r), jnp.asarray(0.0))
    data = jnp.array([[p, r]]), jnp.zeros(1)
    return hf.flow(
        model, data, 2.0, loss=prediction, laws=(), solver=hf.Filippov(events=20)
    )


@pytest.mark.parametrize("r", [-0.3, -0.99 * MOST, -1.01 * MOST, -0.7])
def test_a_pair_that_might_be_held_is_a_choice(r):
    result = flow(P, r)
    end = -0.5 * (1 + r + P)
    np.testing.assert_allclose([result.model.u, result.model.v], [end, -end], atol=1e-9)
    might_stay = -r < MOST
    assert int(result.stats["num_nonunique_pairs"]) == might_stay
    np.testing.assert_allclose(
        result.stats["first_nonunique_time"], 1 if might_stay else np.nan
    )
    assert result.events is not None
    kinds = [event.kind for event in result.events]
    assert ("choice_up" in kinds) == might_stay


@pytest.mark.parametrize(("r", "end"), [(-1.2, 0.05), (-1.0, 0.0)])
def test_a_pair_whose_jump_keeps_its_sign_is_held_or_moves_on(r, end):
    result = flow(0.1, r)
    np.testing.assert_allclose(result.model.u, end, atol=1e-9)
    assert result.stats["num_nonunique_pairs"] == 0
