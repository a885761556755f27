"""Projection along the orbit: laws restored, the function left alone.

Oracles: closed forms, the models themselves, automatic gradients at the new weights, finite
differences, and runs without projection, whose laws must drift.
"""

import dataclasses
import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from problems import asserted
from tasks import task_of

import homoflow as hf
from homoflow._methods._projection_choice import choose_projection
from homoflow._problem._problem import make_problem
from homoflow._rescaling import RescalingGroup
from homoflow._solvers import ProjectedSolver, ProjectedState

RTOLS = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
#: The most that a recorded law changes, relative to ‖w‖².
DRIFT = asserted("projection")["drift"]


def conv_net(activation):
    return hf.ConvNet(
        (2, 6), (3, 2), 2, hidden=(3,), activation=activation, use_bias=True,
        key=jr.key(3),
    )  # fmt: skip


MODELS = {
    "mlp": lambda: hf.MLP((4, 5, 4, 3), use_bias=True, key=jr.key(0)),
    "powers": lambda: hf.MLP(
        (4, 5, 4, 3, 2), activation=[hf.Power(2), "linear", "relu"], key=jr.key(1)
    ),
    "conv": lambda: conv_net("relu"),
    "linear conv": lambda: conv_net("linear"),
    "shared": lambda: hf.SharedMLP(
        [[[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1]], [[1, 2, 3], [3, 2, 1]], [[1, 1]]],
        key=jr.key(2),
    ),
    "deep linear": lambda: hf.MLP((4, 5, 3, 2), activation="linear", key=jr.key(4)),
    "factorization": lambda: hf.MatrixFactorization(5, 4, 3, std=1.0, key=jr.key(5)),
}


def arrays(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


def squared(tree) -> float:
    return float(sum(jnp.sum(a**2) for a in jax.tree.leaves(arrays(tree))))


def perturbed(model, size, seed=7):
    """Every weight changed by about so much of itself."""
    leaves, structure = jax.tree.flatten(arrays(model))
    moved = [
        a + size * jnp.abs(a) * jr.normal(jr.fold_in(jr.key(seed), i), a.shape, a.dtype)
        for i, a in enumerate(leaves)
    ]
    return eqx.combine(jax.tree.unflatten(structure, moved), model)


def largest(tree) -> float:
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def miss(orbit, model, targets) -> float:
    values = orbit.values(arrays(model))
    return largest(jax.tree.map(jnp.subtract, values, targets)) / squared(model)


def inputs_of(name):
    return jr.normal(jr.key(9), (20, 2, 6) if "conv" in name else (20, 4))


@pytest.mark.parametrize("name", MODELS)
def test_laws_come_back_and_function_and_gradient_stay(name):
    model = MODELS[name]()
    orbit = RescalingGroup(hf.laws(model), arrays(model))
    targets = orbit.values(arrays(model))
    drifted = perturbed(model, 1e-3)
    assert miss(orbit, drifted, targets) > 1e-5
    x = inputs_of(name)

    def loss(weights):
        return jnp.sum(jnp.sin(jax.vmap(eqx.combine(weights, model))(x)))

    @jax.jit
    def projected(weights):
        rescaling = orbit.project(weights, targets)
        slopes = rescaling.apply_to_gradient(jax.grad(loss)(weights))
        return rescaling.projected, slopes, rescaling.apply_to_weights(weights)

    restored, slopes, again = projected(arrays(drifted))
    assert miss(orbit, restored, targets) < 2e-15
    before, after = (
        jax.vmap(eqx.combine(arrays(w), model))(x) for w in (drifted, restored)
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-14 * largest(before))
    gradient = jax.grad(loss)(restored)
    np.testing.assert_allclose(
        flat(slopes), flat(gradient), rtol=0, atol=1e-13 * largest(gradient)
    )
    np.testing.assert_allclose(flat(again), flat(restored), rtol=1e-15)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(arrays(tree))])


def test_of_one_layer_of_units_the_scales_have_a_closed_form():
    """a e^{2s} − b e^{−2s} = c has one root e^{2s}, of a quadratic equation."""
    model = hf.MLP((3, 6, 2), key=jr.key(0))
    orbit = RescalingGroup([hf.laws(model)["neurons[1]"]], arrays(model))
    c = jnp.linspace(-2.0, 2.0, 6)
    w1, w2 = (np.asarray(layer.weight) for layer in model.layers)
    a, b = (w1**2).sum(1), (w2**2).sum(0)
    scale = np.sqrt((c + np.sqrt(c**2 + 4 * a * b)) / (2 * a))
    restored = orbit.project(arrays(model), (c,)).projected
    np.testing.assert_allclose(
        restored.layers[0].weight, scale[:, None] * w1, rtol=1e-13
    )
    np.testing.assert_allclose(restored.layers[1].weight, w2 / scale, rtol=1e-13)


def test_balanced_factors_have_the_products_nuclear_norm():
    """Where UᵀU = VᵀV, ‖U‖² + ‖V‖² = 2‖UVᵀ‖_*."""
    model = MODELS["factorization"]()
    orbit = RescalingGroup(hf.laws(model), arrays(model))
    restored = orbit.project(arrays(model), (jnp.zeros((3, 3)),)).projected
    nuclear = np.linalg.svd(model.U @ model.V.T, compute_uv=False).sum()
    np.testing.assert_allclose(squared(restored), 2 * nuclear, rtol=1e-14)


def test_a_unit_without_weights_and_a_drift_of_rounding_are_left_alone():
    model = MODELS["mlp"]()
    first, second = model.layers[:2]
    dead = eqx.tree_at(
        lambda m: (m.layers[0].weight, m.layers[0].bias, m.layers[1].weight),
        model,
        (
            first.weight.at[1].set(0),
            first.bias.at[1].set(0),
            second.weight.at[:, 1].set(0),
        ),
    )
    orbit = RescalingGroup(hf.laws(model), arrays(model))
    targets = orbit.values(arrays(dead))
    still = orbit.project(arrays(dead), targets)
    assert bool(still.is_identity)
    np.testing.assert_array_equal(flat(still.projected), flat(dead))
    drifted = perturbed(dead, 1e-3)
    restored = orbit.project(arrays(drifted), targets).projected
    assert miss(orbit, restored, targets) < 2e-15


@pytest.mark.parametrize(
    ("name", "drift", "h", "tolerance"),
    [("mlp", 1e-2, 1e-5, 1e-7), ("deep linear", 1e-6, 1e-7, 1e-5)],
)
def test_derivatives_are_those_of_the_point_with_the_given_laws(
    name, drift, h, tolerance
):
    model = MODELS[name]()
    orbit = RescalingGroup(hf.laws(model), arrays(model))
    start, targets = arrays(perturbed(model, drift)), orbit.values(arrays(model))
    direction = jax.tree.map(
        lambda a: jnp.cos(3.0 * jnp.arange(float(a.size)).reshape(a.shape)), start
    )
    weight = jr.normal(jr.key(1), flat(start).shape)

    @jax.jit
    def read(s, r):
        w = jax.tree.map(lambda a, d: a + s * d, start, direction)
        rescaling = orbit.project(w, tuple((1 + r) * c for c in targets))
        parts = (rescaling.projected, rescaling.apply_to_gradient(direction))
        return sum(
            jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(part)]) @ weight
            for part in parts
        )

    by_differences = [
        (read(h, 0.0) - read(-h, 0.0)) / (2 * h),
        (read(0.0, h) - read(0.0, -h)) / (2 * h),
    ]
    forward = jax.jit(jax.jacfwd(read, argnums=(0, 1)))(0.0, 0.0)
    reverse = jax.jit(jax.grad(read, argnums=(0, 1)))(0.0, 0.0)
    np.testing.assert_allclose(forward, by_differences, rtol=tolerance)
    np.testing.assert_allclose(reverse, forward, rtol=1e-11)


SETTINGS = {
    "mlp": {"t1": 3.0, "solver": hf.Averaged(), "estimate_error": False},
    "deep linear": {"t1": 3.0},
    "factorization": {"t1": 1.0, "objective": hf.factorization_objective},
}


def data_for(name):
    if name == "factorization":
        return jr.normal(jr.key(8), (5, 4))
    x = inputs_of(name)
    return x, jnp.sin(x[:, : {"mlp": 3, "deep linear": 2}[name]])


@functools.cache
def flow_of(name, rtol, project, **options):
    return hf.flow(
        MODELS[name](), data_for(name), ts=jnp.linspace(0.0, 1.0, 7), rtol=rtol,
        project=project, **SETTINGS[name], **options,
    )  # fmt: skip


def drift_of(run) -> float:
    """The largest change of a recorded law, relative to the largest ‖w‖²."""
    size = float(np.max(sum(np.asarray(v) for v in run.squared_norms.values())))
    return max(float(np.abs(v - v[0]).max()) for v in run.laws.values()) / size


@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_laws_do_not_drift_at_any_tolerance(name):
    for rtol in RTOLS if name != "mlp" else RTOLS[:3]:
        run = flow_of(name, rtol, None)
        assert run.stats["projection"].startswith("on: restores")
        assert drift_of(run) < DRIFT


@pytest.mark.parametrize("rtol", RTOLS[1:4])
def test_what_was_removed_is_the_drift_of_the_run_without_projection(rtol):
    # A one-step method takes the same steps either way.
    run, plain = (
        flow_of("deep linear", rtol, project, solver=dfx.Dopri8())
        for project in (True, False)
    )
    assert plain.stats["projection"] == "off: not wanted"
    # Of the final weights: Dopri8's interpolant, of lower order, has laws of its own.
    orbit = RescalingGroup(hf.laws(plain.model), arrays(plain.model))
    targets = orbit.values(arrays(MODELS["deep linear"]()))
    drift = miss(orbit, plain.model, targets)
    assert drift > 1e-4 * rtol
    # To a unit of rounding of ‖w‖², which drift is relative to.
    eps = np.finfo(float).eps
    np.testing.assert_allclose(run.stats["projected_drift"], drift, rtol=1e-5, atol=eps)
    np.testing.assert_allclose(run.losses, plain.losses, rtol=0, atol=10 * rtol)


def test_steps_that_are_long_to_go_through_are_left_alone_but_what_is_recorded():
    model = hf.MLP((20, 200, 200, 3), activation="linear", key=jr.key(0))
    data = jr.normal(jr.key(1), (60, 20)), jr.normal(jr.key(2), (60, 3))

    def run(project):
        return hf.flow(
            model, data, 2.0, ts=jnp.linspace(0, 2.0, 4), rtol=1e-4, project=project,
            solver=hf.ExponentialAdams(),
        )  # fmt: skip

    kept, free = run(True), run(False)
    assert drift_of(kept) < DRIFT < 1e-8 < drift_of(free)
    # The same steps, to the bit.
    assert int(kept.stats["steps"]) == int(free.stats["steps"]) > 8
    orbit = RescalingGroup(hf.laws(free.model), arrays(free.model))
    drift = miss(orbit, free.model, orbit.values(arrays(model)))
    drift *= orbit.size(arrays(free.model)) / orbit.size(arrays(kept.model))
    np.testing.assert_allclose(kept.stats["projected_drift"], drift, rtol=1e-8)
    np.testing.assert_allclose(kept.losses, free.losses, rtol=1e-12)


@pytest.mark.parametrize("solver", [dfx.Tsit5(), dfx.Heun()], ids=["Tsit5", "Heun"])
def test_what_each_step_removes_adds_up_to_the_drift(solver):
    model, term, target = gradient_flow()
    start = arrays(model)
    orbit = RescalingGroup(hf.laws(model), start)

    def end(solver):
        return dfx.diffeqsolve(
            term, solver, 0.0, 2.0, 0.04, start, args=target,
            saveat=dfx.SaveAt(t1=True, solver_state=True),
        )  # fmt: skip

    memory = end(ProjectedSolver(solver, orbit)).solver_state
    assert isinstance(memory, ProjectedState)
    removed = memory.removed_drift
    final = jax.tree.map(lambda a: a[0], end(solver).ys)
    drift = jax.tree.map(jnp.subtract, orbit.values(final), orbit.values(start))
    assert largest(drift) > 1e-9
    # To first order in the drift, of which single laws may have next to nothing.
    np.testing.assert_allclose(
        flat(removed), flat(drift), rtol=0, atol=2e-3 * largest(drift)
    )


def test_batched_float32_runs_keep_their_laws():
    x = jr.normal(jr.key(9), (20, 4), jnp.float32)
    keys = jr.split(jr.key(0), 3)

    def run(key):
        model = hf.MLP((4, 5, 2), activation="linear", key=key, dtype=jnp.float32)
        return hf.flow(model, (x, x[:, :2]), 2.0, rtol=1e-3)

    batch = eqx.filter_vmap(run)(keys)
    for name, values in batch.laws.items():
        sizes = sum(np.asarray(v).max(axis=1) for v in batch.squared_norms.values())
        change = np.abs(values - values[:, :1]).reshape(3, -1).max(axis=1)
        assert np.all(change < 2e-5 * sizes), name
    # More than ten times as much as is left.
    assert np.all(np.asarray(batch.stats["projected_drift"]) > 2e-4)


def task_for(model=None, laws=None, dynamics=None, **options):
    model = MODELS["mlp"]() if model is None else model
    x = jr.normal(jr.key(9), (20, 4))
    problem = make_problem(model, (x, jnp.sin(x[:, :3])), **options)
    return task_of(problem, laws=laws, dynamics=dynamics)


def plan_for(task, project, is_default_solver, **options):
    task = dataclasses.replace(task, project=project)
    return choose_projection(task, is_default_solver=is_default_solver, **options)


def decayed(size):
    def objective(model, data):
        x, y = data
        risk = jnp.mean((jax.vmap(model)(x) - y) ** 2)
        return risk + size * sum(jnp.sum(a**2) for a in jax.tree.leaves(arrays(model)))

    return objective


def candidates(model):
    linear = eqx.tree_at(
        lambda m: m.activations, model, tuple(hf.Linear() for _ in model.activations)
    )
    return hf.laws(linear)


REFUSED = {
    "weight decay": (
        {"dynamics": hf.GradientFlow(weight_decay=0.1)}, {}, "does not conserve the laws",
    ),
    "backsolve": ({}, {"adjoint": dfx.BacksolveAdjoint()}, "BacksolveAdjoint"),
    "tanh": (
        {"model": hf.MLP((4, 5, 3), activation=jnp.tanh, key=jr.key(0))},
        {}, "no law is known.*hidden layer 1",
    ),
    "regularizer": ({"objective": decayed(1e-9)}, {}, "no law.*objective breaks"),
    "frozen": (
        {"trainable": lambda a: eqx.is_inexact_array(a) and a.shape != (4, 5)},
        {}, "no law.*frozen",
    ),
    "laws of another loss": (
        {"laws": candidates(MODELS["mlp"]())}, {},
        r"breaks matrix\[1\], matrix\[2\]",
    ),
    "laws of frozen arrays": (
        {
            "laws": hf.laws(MODELS["mlp"]()),
            "trainable": lambda a: eqx.is_inexact_array(a) and a.shape != (4, 5),
        },
        {}, "not trained",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("posed", "given", "reason"), REFUSED.values(), ids=REFUSED)
def test_broken_laws_are_not_restored(posed, given, reason):
    task = task_for(**posed)
    plan = plan_for(task, None, True, **given)
    assert plan.laws == ()
    assert plan.note.startswith("off: ")
    with pytest.raises(ValueError, match=f"`project=True` is not possible.*{reason}"):
        plan_for(task, True, False, **given)


def test_certain_laws_are_restored_where_the_solver_is_ours():
    names = {"neurons[1]", "neurons[2]"}
    plain = task_for()
    given = task_for(laws=hf.laws(MODELS["mlp"]()))
    for plan in (
        plan_for(plain, None, True),
        plan_for(plain, True, False),
        plan_for(task_for(objective=decayed(0.0)), None, True),
        plan_for(given, None, True),
    ):
        assert {law.name for law in plan.laws} == names
    assert plan_for(plain, None, False).laws == ()
    assert plan_for(plain, False, True).laws == ()


def test_inside_of_a_trace_only_what_structure_shows_is_certain():
    reasons = []

    @jax.jit
    def traced(y):
        model = MODELS["mlp"]()
        x = jr.normal(jr.key(9), (20, 4))
        for objective in (None, decayed(0.0)):
            problem = make_problem(model, (x, y), objective=objective)
            reasons.append(plan_for(task_of(problem), None, True).why)
        return y

    traced(jnp.ones((20, 3)))
    assert reasons[0].startswith("restores")
    assert reasons[1].startswith("inside of jit")


def gradient_flow():
    model = MODELS["mlp"]()
    x = inputs_of("mlp")

    def field(t, w, target):
        del t
        model_of = lambda w: jax.vmap(eqx.combine(w, model))(x)  # noqa: E731
        loss = lambda w: jnp.mean((model_of(w) - target) ** 2)  # noqa: E731
        return jax.tree.map(jnp.negative, jax.grad(loss)(w))

    return model, dfx.ODETerm(field), jnp.sin(x[:, :3])


def test_a_runge_kutta_methods_last_slope_goes_along():
    model, term, target = gradient_flow()
    solver = ProjectedSolver(dfx.Tsit5(), RescalingGroup(hf.laws(model), arrays(model)))

    @jax.jit
    def step(w):
        state = solver.init(term, 0.0, 0.3, w, target)
        return solver.step(term, 0.0, 0.3, w, target, state, jnp.array(False))

    w1, _, dense, state, _ = step(arrays(model))
    plain = dense["y1"]
    assert miss(solver.orbit, plain, state.targets) > 1e-9
    assert miss(solver.orbit, w1, state.targets) < 2e-15
    np.testing.assert_allclose(
        flat(state.inner[1]), flat(term.vf(0.0, w1, target)), rtol=0, atol=1e-14
    )
    assert np.abs(flat(state.inner[1]) - flat(term.vf(0.0, plain, target))).max() > 1e-9


@pytest.mark.parametrize(
    "solver", [dfx.Tsit5(), hf.ExponentialAdams(1e-3, 1e-3, max_order=3)]
)
def test_where_drift_may_wait_every_fourth_step_is_looked_at(solver):
    model, term, target = gradient_flow()
    orbit = RescalingGroup(hf.laws(model), arrays(model))
    # Less than each step's drift.
    solver = ProjectedSolver(solver, orbit, max_drift=1e-12)

    @jax.jit
    def step(t, w, state):
        w, _, _, state, _ = solver.step(term, t, t + 0.1, w, target, state, False)
        return w, state, orbit.project(w, state.targets).residual

    w = arrays(model)
    state = solver.init(term, 0.0, 0.1, w, target)
    drifts = []
    for number in range(12):
        w, state, missed = step(0.1 * number, w, state)
        drifts.append(largest(missed) / float(orbit.size(w)))
    drifts = np.array(drifts)
    is_fourth = np.arange(12) % 4 == 3
    assert np.all(drifts[is_fourth] < 2e-15)
    assert np.all(drifts[~is_fourth] > 1e-11)


def test_derivatives_of_a_projected_solve():
    model, term, target = gradient_flow()
    solver = ProjectedSolver(dfx.Euler(), RescalingGroup(hf.laws(model), arrays(model)))

    @jax.jit
    def end(shift):
        ys = dfx.diffeqsolve(
            term, solver, 0.0, 1.0, 0.25, arrays(model), args=target + shift,
            saveat=dfx.SaveAt(ts=jnp.array([0.4, 1.0])), max_steps=4,
        ).ys  # fmt: skip
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(ys))

    h = 1e-5
    by_differences = (end(h) - end(-h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(end))(0.0), by_differences, rtol=1e-7)


def test_a_solver_with_a_longer_memory_is_refused():
    model, term, target = gradient_flow()
    orbit = RescalingGroup(hf.laws(model), arrays(model))
    for solver in (dfx.LeapfrogMidpoint(), dfx.ReversibleHeun()):
        with pytest.raises(ValueError, match=f"{type(solver).__name__} remembers more"):
            dfx.diffeqsolve(
                term,
                ProjectedSolver(solver, orbit),
                0.0,
                1.0,
                0.1,
                arrays(model),
                args=target,
            )


def test_an_orbit_needs_laws_of_its_weights():
    model = MODELS["mlp"]()
    with pytest.raises(ValueError, match="None of the laws"):
        RescalingGroup((), arrays(model))
    with pytest.raises(ValueError, match="not among the weights"):
        RescalingGroup(hf.laws(model), arrays(model.layers))
