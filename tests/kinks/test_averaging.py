"""The averaged flow of large networks: slopes of kinks averaged over each step."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from problems import flat, relative_error, relu_regression
from tasks import task_of

import homoflow as hf
from homoflow._kinks.averaging._time_fraction import fraction_above
from homoflow._problem._problem import make_problem

T1 = 10.0
SEEDS = range(16)
#: How kinks are averaged over, by the codes of the reasons.
MIDPOINT, HEUN = "nonsmooth_many_pairs", "nonsmooth_averaged"


def flow(seed=0, rtol=1e-4, **options):
    model, data = relu_regression(seed)
    return hf.flow(model, data, T1, laws=(), rtol=rtol, **options)


@pytest.fixture
def shares(monkeypatch):
    """Small problems are solved as large ones are."""
    monkeypatch.setattr("homoflow._methods._averaged.MAX_FOLLOWED_PAIRS", 0)


@pytest.fixture(scope="module")
def exact():
    finest = [flow(seed, rtol=1e-9, solver=hf.Filippov()) for seed in SEEDS]
    return [flat(f.model) for f in finest]


def mean_slope(z: float, below: float, pull: float, step: float, parts=4_000) -> float:
    """The mean place of the slope, by small steps that pin z where both sides push."""
    dt, total = step / parts, 0.0
    for _ in range(parts):
        if z > 0:
            above = 1.0
        elif z < 0:
            above = 0.0
        else:
            above = min(max(below / pull, 0.0), 1.0)
        moved = z + dt * (below - above * pull)
        z = 0.0 if z * moved < 0 and below > 0 > below - pull else moved
        total += above
    return total / parts


@pytest.mark.parametrize(
    ("z", "below", "pull"),
    [
        (0.3, 1.0, 4.0),  # falls and slides
        (-0.3, 1.0, 4.0),  # rises and slides
        (0.0, 1.0, 4.0),  # slides
        (0.3, -1.0, 0.5),  # crosses downwards
        (-0.3, 1.5, 0.5),  # crosses upwards
        (0.3, 1.0, 0.5),  # stays above
        (-0.3, -1.0, 0.5),  # stays below
        (0.3, -2.0, -1.0),  # repelled, and falls fast enough to cross
        (9.0, 1.0, 4.0),  # does not get there
    ],
)
@pytest.mark.parametrize("assumed", [0.0, 0.4, 1.0])
def test_a_time_fraction_is_the_mean_slope_of_a_pair(z, below, pull, assumed):
    velocity = below - assumed * pull
    got = fraction_above(*map(jnp.asarray, (z, velocity, assumed, pull, 0.7)))
    np.testing.assert_allclose(got.above, mean_slope(z, below, pull, 0.7), atol=1e-3)
    assert got.slides == (below > 0 > below - pull and abs(z) < 1)


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_its_error_falls_with_the_tolerance_and_is_never_understated(shares, exact):
    medians = []
    for rtol in (1e-3, 1e-4, 1e-5):
        flows = [flow(seed, rtol, solver=hf.Averaged()) for seed in SEEDS]
        assert {f.stats["solver"] for f in flows} == {"AveragedMidpoint"}
        errors = np.array(
            [relative_error(f.model, w) for f, w in zip(flows, exact, strict=True)]
        )
        estimates = np.array([float(f.stats["error_estimate"]) for f in flows])
        assert np.all(errors < estimates)
        assert np.median(estimates / errors) < 10
        medians.append(np.median(errors))
    # The errors of a second-order method at steps ~ √rtol: kinks do not lower its order.
    assert np.all(np.array(medians[1:]) < np.array(medians[:-1]) / 6)


def test_it_is_the_choice_for_many_pairs_only():
    x = jr.normal(jr.key(0), (700, 4))
    model = hf.MLP((4, 30, 2), key=jr.key(1))
    assert chosen(model, (x, x[:, :2])) == MIDPOINT
    assert chosen(model, (x[:600], x[:600, :2])) == HEUN


class Recurrent(eqx.Module):
    """Kinks inside a loop cannot be laid open."""

    weight: jax.Array

    def __call__(self, x):
        def step(h, _):
            return jax.nn.relu(self.weight @ h + x), None

        return jax.lax.scan(step, x, None, length=2)[0]


def chosen(model, data, solver=None, dynamics=None, **options) -> str:
    """The code of how kinks are averaged over."""
    solver = hf.Averaged() if solver is None else solver
    task = task_of(make_problem(model, data, **options), laws=(), dynamics=dynamics)
    return solver.why(task).code


def test_what_it_cannot_do_stays_with_heun(shares):
    x = jr.normal(jr.key(1), (5, 3))
    assert chosen(*relu_regression()) == MIDPOINT
    assert chosen(Recurrent(jr.normal(jr.key(0), (3, 3))), (x, x)) == HEUN
    assert chosen(*relu_regression(), loss=lambda p, y: jnp.sum((p - y) ** 2)) == HEUN


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, MIDPOINT),
        ({"dynamics": hf.GradientFlow(weight_decay=0.1)}, HEUN),
        ({"dynamics": hf.HeavyBall(mass=0.5)}, HEUN),
        ({"solver": hf.Averaged(adjoint=dfx.BacksolveAdjoint())}, HEUN),
    ],
)
def test_it_is_for_the_gradient_flow_itself(shares, options, code):
    assert chosen(*relu_regression(), **options) == code


def test_float32_inside_jit_and_vmap_agrees_with_the_exact_flow(shares, exact):
    cast = functools.partial(jnp.asarray, dtype=jnp.float32)
    models = [relu_regression(seed)[0] for seed in SEEDS[:2]]
    layers = [[cast(m.layers[h].weight) for m in models] for h in range(2)]
    data = jax.tree.map(cast, relu_regression()[1])

    @eqx.filter_jit
    @eqx.filter_vmap
    def sweep(weights):
        model = hf.MLP((3, 8, 2), key=jr.key(0), dtype=jnp.float32)
        model = eqx.tree_at(
            lambda m: [layer.weight for layer in m.layers], model, weights
        )
        run = hf.flow(
            model, data, T1, laws=(), throw=False, solver=hf.Averaged(),
            estimate_error=False,
        )  # fmt: skip
        assert run.stats["solver"] == "AveragedMidpoint"
        return [layer.weight for layer in run.model.layers]

    finals = sweep([jnp.stack(layer) for layer in layers])
    assert finals[0].dtype == jnp.float32
    for i in range(2):
        # As near as in float64: the median error there is 2e-5.
        assert relative_error([w[i] for w in finals], exact[i]) < 1e-4


@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd])
def test_derivatives_that_leave_out_the_jumps_are_refused(shares, differentiate):
    model, data = relu_regression()

    def final(scale):
        scaled = jax.tree.map(lambda w: w * scale, model)
        run = hf.flow(scaled, data, 0.3, laws=(), ts=[0.0], solver=hf.Averaged())
        return jnp.sum(run.model.layers[0].weight ** 2)

    with pytest.raises(ValueError, match="leave out what each jump contributes"):
        differentiate(final)(1.0)
