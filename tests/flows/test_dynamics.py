"""Dynamics of a user's own, against closed forms; nothing of the package is edited."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import homoflow as hf
from homoflow._flows._pipeline import choose_dynamics

TARGET = jnp.array([1.0, -0.5, 2.0])


def distance(w, target):
    """½‖w − w*‖²."""
    return jnp.sum((w - target) ** 2) / 2


class EntropicMirror(hf.AbstractDynamics):
    """dw/dt = −(∇²φ)⁻¹∇L for φ(w) = Σ w log w: dw/dt = −w ∇L(w)."""

    def velocity(self, problem, t, state):
        gradient = jax.grad(problem.loss)(state)
        return jax.tree.map(lambda w, g: -w * g, state, gradient)


@pytest.mark.parametrize("wrap", [lambda f: f, eqx.filter_jit])
def test_mirror_flow_follows_its_closed_form(wrap):
    # L = cᵀw: log w is linear in time.
    c, start = jnp.array([1.0, -0.5, 0.0]), jnp.array([1.0, 2.0, 3.0])
    run = wrap(
        lambda: hf.flow(
            start, c, 2.0, objective=lambda w, c: c @ w, dynamics=EntropicMirror(),
            rtol=1e-10, save_models=True,
        )
    )()  # fmt: skip
    expected = start * jnp.exp(-c * run.ts[:, None])
    np.testing.assert_allclose(run.model, expected[-1], rtol=1e-9)
    # Between its steps Dopri8 interpolates, less accurately than it steps.
    np.testing.assert_allclose(run.models, expected, rtol=1e-7)
    assert run.stats["dynamics"] == "EntropicMirror"
    # The control: the gradient flow of the same loss is another curve.
    plain = hf.flow(start, c, 2.0, objective=lambda w, c: c @ w)
    assert np.max(np.abs(plain.model - expected[-1])) > 0.1


class Langevin(hf.AbstractStochasticDynamics):
    """dw = −∇L dt + √(2T) dB."""

    temperature: jax.Array
    key: jax.Array

    def velocity(self, problem, t, state):
        return jax.tree.map(jnp.negative, jax.grad(problem.loss)(state))

    def noise(self, problem, t, state):
        factor = jnp.sqrt(2 * self.temperature)
        return jax.tree.map(lambda w: jnp.full_like(w, factor), state)


def langevin(key, temperature=0.25, **options):
    options = {"solver": dfx.EulerHeun(), "dt0": 0.05, "ts": [6.0], **options}
    return hf.flow(
        jnp.zeros(3), TARGET, 6.0, objective=distance,
        dynamics=Langevin(jnp.asarray(temperature), key), **options,
    )  # fmt: skip


def test_langevin_dynamics_has_its_stationary_variance():
    # An Ornstein–Uhlenbeck process, whose variance comes to T. With Euler's steps of h for
    # the drift, w⁺ = w + h(w* − w) + √(2Th) ξ, it is T/(1 − h/2), and what is left of the
    # start is (1 − h)ⁿ of it.
    ends = jax.vmap(lambda key: langevin(key).model)(jr.split(jr.key(0), 4000))
    sampling = np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(
        ends.mean(0), TARGET * (1 - np.exp(-6)), atol=4 * sampling
    )
    # The variance of 4,000 samples has a relative error of √(2/4000) = 0.022.
    np.testing.assert_allclose(ends.var(0), 0.25 / (1 - 0.025), rtol=4 * 0.0224)
    # Independent components: not one Brownian motion for all.
    assert np.max(np.abs(np.corrcoef(ends.T) - np.eye(3))) < 4 / np.sqrt(4000)


def test_without_temperature_langevin_is_the_gradient_flow():
    end = langevin(jr.key(1), temperature=0.0, dt0=1e-3).model
    # By Euler's steps, which are what the solver takes for the drift.
    np.testing.assert_allclose(end, TARGET * (1 - (1 - 1e-3) ** 6000), rtol=1e-9)


def test_a_stochastic_equation_needs_a_solver_for_it():
    with pytest.raises(ValueError, match="stochastic equation: pass one of Diffrax's"):
        langevin(jr.key(0), solver=None, dt0=None)
    with pytest.raises(ValueError, match="deterministic"):
        langevin(jr.key(0), estimate_error=True)


class Counting(hf.AbstractFlowSolver, dfx.AbstractAdaptiveSolver):
    """A solver that says itself what its steps cost."""

    inner: dfx.Bosh3 = dfx.Bosh3()
    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.Bosh3.interpolation_cls

    def order(self, terms):
        return 3

    def init(self, terms, t0, t1, y0, args):
        return self.inner.init(terms, t0, t1, y0, args)

    def step(self, *arguments):
        return self.inner.step(*arguments)

    def func(self, terms, t0, y0, args):
        return self.inner.func(terms, t0, y0, args)

    def cost(self, *, num_accepted, num_rejected, num_steps, solver_state, args):
        return {"gradient_evaluations": 100 * num_steps}


def test_a_solver_may_tell_its_own_cost():
    options = {"objective": distance, "rtol": 1e-6, "ts": [1.0]}
    run = hf.flow(jnp.zeros(3), TARGET, 1.0, solver=Counting(), **options)
    bosh = hf.flow(jnp.zeros(3), TARGET, 1.0, solver=dfx.Bosh3(), **options)
    np.testing.assert_array_equal(run.model, bosh.model)
    steps = int(run.stats["steps"] + run.stats["rejected_steps"])
    # One more for the recorded time.
    assert int(run.stats["gradient_evaluations"]) == 100 * steps + 1


def test_dynamics_given_by_name_are_those_of_the_short_functions():
    model = hf.MLP((3, 4, 1), activation="linear", key=jr.key(0))
    x = jr.normal(jr.key(1), (20, 3))
    data = (x, x[:, :1])
    pairs = (
        (
            hf.flow(model, data, 1.0, dynamics=hf.Modified(1e-3, 0.5)),
            hf.modified_flow(model, data, 1.0, learning_rate=1e-3, momentum=0.5),
        ),
        (
            hf.flow(model, data, 1.0, dynamics=hf.HeavyBall(mass=0.3)),
            hf.heavy_ball_flow(model, data, 1.0, mass=0.3),
        ),
        (
            hf.flow(model, data, 1.0, dynamics=hf.GradientFlow(weight_decay=0.1)),
            hf.flow(model, data, 1.0, weight_decay=0.1),
        ),
    )
    for named, short in pairs:
        np.testing.assert_array_equal(named.losses, short.losses)
        assert named.laws.keys() == short.laws.keys()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dynamics": hf.GradientFlow(), "weight_decay": 0.1},
            ValueError,
            "`weight_decay` belongs to the gradient flow",
        ),
        (
            {"dynamics": EntropicMirror(), "solver": hf.Filippov()},
            ValueError,
            "EntropicMirror is for Diffrax's solvers",
        ),
        (
            {"dynamics": EntropicMirror(), "project": True},
            ValueError,
            "EntropicMirror does not conserve the laws",
        ),
        ({"dynamics": EntropicMirror(), "t1": jnp.inf}, ValueError, "finite"),
    ],
)
def test_what_does_not_go_together_is_refused(options, error, message):
    model = hf.MLP((3, 4, 1), activation="linear", key=jr.key(0))
    x = jr.normal(jr.key(1), (20, 3))
    options = {"t1": 1.0, **options}
    with pytest.raises(error, match=message):
        hf.flow(model, (x, x[:, :1]), **options)


def test_a_class_in_place_of_dynamics_is_told():
    # By itself: in `flow` the tests' type checker is there first.
    with pytest.raises(
        TypeError, match=r"class GradientFlow: pass.*`GradientFlow\(…\)`"
    ):
        choose_dynamics(hf.GradientFlow, None)
