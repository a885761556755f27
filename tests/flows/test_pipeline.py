"""What every route of `flow` has in common: options, observables, facts, continuation."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import homoflow as hf
from homoflow._methods._choose import as_method
from homoflow._methods._diffrax import check_options

X = jr.normal(jr.key(1), (20, 3))
DATA = (X, jnp.sin(X[:, :1]))
LINEAR = hf.MLP((3, 4, 1), activation="linear", key=jr.key(0))
RELU = hf.MLP((3, 4, 1), key=jr.key(0))
MOMENTUM = functools.partial(optax.sgd, momentum=0.9)

ROUTES = {
    "smooth": lambda **o: hf.flow(LINEAR, DATA, 1.0, **o),
    "averaged": lambda **o: hf.flow(RELU, DATA, 1.0, solver=hf.Averaged(), **o),
    "exact": lambda **o: hf.flow(RELU, DATA, 1.0, **o),
    "stationary": lambda **o: hf.flow(LINEAR, DATA, jnp.inf, **o),
    "modified": lambda **o: hf.modified_flow(
        LINEAR, DATA, 1.0, learning_rate=0.01, **o
    ),
    "heavy_ball": lambda **o: hf.heavy_ball_flow(LINEAR, DATA, 1.0, mass=0.3, **o),
    "drift": lambda **o: hf.predict_drift(LINEAR, DATA, 1.0, **o).flow,
    "central": lambda **o: hf.central_flow(LINEAR, DATA, 1.0, learning_rate=0.01, **o),
    "descend": lambda **o: hf.descend(LINEAR, DATA, 20, learning_rate=0.05, **o),
}
OBSERVE = {"t": lambda p: p.t, "first": lambda p: p.model.layers[0].weight[0]}


@pytest.fixture(scope="module", params=ROUTES)
def route(request):
    return request.param, ROUTES[request.param](observe=OBSERVE, save_models=True)


def test_every_route_answers_the_same_statistics(route):
    name, run = route
    assert list(run.stats) == list(hf.Stats.schema)
    for key, statistic in hf.Stats.schema.items():
        if run.stats[key] is not None:
            assert name in statistic.routes, key
    assert run.stats["law_violation"] is not None
    if name != "descend":
        assert isinstance(run.stats["solver_reason"], hf.Reason)
        assert run.stats["projection"] is not None


def test_every_route_records_what_is_asked_for(route):
    _, run = route
    np.testing.assert_array_equal(run.observed["t"], run.ts)
    np.testing.assert_array_equal(
        run.observed["first"], run.models.layers[0].weight[:, 0]
    )


class Sum(hf.observe.AbstractObservable):
    """The sum of all losses so far: it needs every time in order."""

    every: int = 1

    def init(self, point):
        return jnp.zeros_like(point.loss)

    def __call__(self, point, carry):
        return carry + point.loss, carry + point.loss


@pytest.mark.parametrize("name", ["smooth", "averaged", "exact", "descend"])
def test_what_is_handed_on_comes_in_the_order_of_times(name):
    run = ROUTES[name](observe={"sum": Sum(), "third": Sum(every=3)})
    np.testing.assert_allclose(run.observed["sum"], np.cumsum(run.losses), rtol=1e-13)
    np.testing.assert_allclose(
        run.observed["third"], np.cumsum(run.losses[::3]), rtol=1e-13
    )
    assert dict(run.observed_every)["third"] == 3


def test_where_states_are_not_kept_the_start_is_handed_on(monkeypatch):
    ntk = {"ntk": hf.observe.NTK(X[:2])}
    stored = hf.flow(LINEAR, DATA, 1.0, observe=ntk, ts=[0.5, 0.7, 1.0])
    monkeypatch.setattr("homoflow._methods._save_plan.MAX_STORED", 0)
    jax.clear_caches()
    along = hf.flow(LINEAR, DATA, 1.0, observe=ntk, ts=[0.5, 0.7, 1.0])
    for a, b in zip(stored.observed["ntk"], along.observed["ntk"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # From the start of the run, not from the first time that is recorded.
    assert np.all(np.asarray(along.observed["ntk"].distance) > 1e-3)
    with pytest.raises(ValueError, match="hands something on from time to time"):
        hf.flow(LINEAR, DATA, 1.0, observe={"sum": Sum()}, ts=[0.5, 0.7, 1.0])


def test_observables_see_all_samples_where_fewer_are_solved_with():
    x = jr.normal(jr.key(3), (100, 3))
    run = hf.flow(
        LINEAR, (x, x[:, :1]), 1.0,
        observe={"count": lambda p: jnp.asarray(p.problem.num_samples)},
    )  # fmt: skip
    assert "100 samples as" in run.stats["sample_reduction"]
    assert np.all(run.observed["count"] == 100)


def test_observables_under_jit_vmap_and_grad():
    def last(scale):
        model = jax.tree.map(lambda w: w * scale, LINEAR)
        run = hf.flow(
            model, DATA, 0.5, ts=[0.0, 0.5], rtol=1e-8,
            observe={"square": lambda p: p.loss**2},
        )  # fmt: skip
        return run.observed["square"][-1]

    scales = jnp.array([0.8, 1.0, 1.2])
    batch = jax.jit(jax.vmap(last))(scales)
    np.testing.assert_allclose(batch, [last(s) for s in scales], rtol=1e-7)
    step = 1e-4
    slope = (last(1 + step) - last(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(last)(1.0), slope, rtol=1e-4)


def test_nan_of_an_observable_is_no_failure_of_the_run():
    run = hf.flow(LINEAR, DATA, 1.0, observe={"log": lambda p: jnp.log(-p.loss)})
    assert run.result == hf.RESULTS.successful
    assert np.all(np.isnan(run.observed["log"]))


@pytest.mark.parametrize(
    ("observe", "error", "message"),
    [
        ({"losses": lambda p: p.t}, ValueError, "recorded in any case"),
        ({"s": hf.observe.Sharpness}, TypeError, "the class Sharpness"),
        ({"s": hf.observe.Sharpness(every=0)}, ValueError, "positive integer"),
        ({"s": lambda p: "text"}, TypeError, "array or a pytree"),
    ],
)
def test_what_cannot_be_observed_is_refused(observe, error, message):
    for run in (ROUTES["smooth"], ROUTES["descend"]):
        with pytest.raises(error, match=message):
            run(observe=observe)


# Options.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": hf.Filippov(), "project": True}, ValueError, "is not projected"),
        ({"solver": hf.Filippov(), "dt0": 1e-8}, ValueError, "for Diffrax's solvers"),
        ({"solver": hf.Filippov(atol=1e-8), "atol": 1e-8}, ValueError, "and to"),
        (
            {"solver": hf.Diffrax(dfx.Tsit5(), atol=1e-8), "atol": 1e-8},
            ValueError,
            "`atol`",
        ),
        (
            {
                "solver": hf.Diffrax(dfx.Tsit5(), error_estimate=True),
                "estimate_error": False,
            },
            ValueError,
            "contradict",
        ),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_honoured_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        hf.flow(RELU, DATA, 1.0, **options)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (hf.Filippov, "the class Filippov"),
        (dfx.Tsit5, "the class Tsit5"),
        ("rk45", "one of Diffrax's solvers"),
        (7, "one of Diffrax's solvers"),
    ],
)
def test_what_is_no_solver_is_refused(solver, message):
    # By itself: in `flow` the tests' type checker is there first.
    with pytest.raises(TypeError, match=message):
        as_method(solver, None, None, None, None)


def test_a_class_in_place_of_an_option_is_told():
    with pytest.raises(TypeError, match="the class PIDController"):
        check_options(dfx.PIDController, None)
    with pytest.raises(TypeError, match="the class DirectAdjoint"):
        check_options(None, dfx.DirectAdjoint)


@pytest.mark.filterwarnings("ignore:The relative error of the final weights")
def test_projection_rules_out_the_exact_flow_where_nobody_named_it():
    run = hf.flow(RELU, DATA, 1.0, project=True)
    assert run.stats["solver"] == "Heun"
    assert run.stats["projection"].startswith("on")
    assert "`project=True`" in str(run.stats["solver_reason"])


def test_a_method_object_is_the_same_as_its_options():
    short = hf.flow(LINEAR, DATA, 1.0, solver=dfx.Tsit5(), atol=1e-9, rtol=1e-6)
    method = hf.Diffrax(dfx.Tsit5(), atol=1e-9)
    named = hf.flow(LINEAR, DATA, 1.0, solver=method, rtol=1e-6)
    np.testing.assert_array_equal(short.losses, named.losses)
    auto = hf.flow(LINEAR, DATA, 1.0, solver=hf.Auto())
    np.testing.assert_array_equal(auto.losses, hf.flow(LINEAR, DATA, 1.0).losses)


@pytest.mark.parametrize(
    ("model", "t1", "options", "code"),
    [
        (RELU, 1.0, {}, "nonsmooth_exact"),
        (RELU, 1.0, {"project": True}, "nonsmooth_averaged"),
        (LINEAR, 1.0, {}, "smooth_float64"),
        (LINEAR, 1.0, {"rtol": 1e-4}, "loose_tolerance"),
        (LINEAR, jnp.inf, {}, "few_weights_steady_state"),
    ],
)
def test_select_tells_what_flow_would_take(model, t1, options, code):
    problem = hf.make_problem(model, DATA)
    method, reason = hf.Auto().select(problem, t1, **options)
    assert reason.code == code
    run = hf.flow(model, DATA, t1, **options)
    assert run.stats["solver_reason"] == reason
    if isinstance(method, hf.Diffrax):
        assert run.stats["solver"] == type(method.solver).__name__


# Traces.


class Counted(eqx.Module):
    inner: eqx.Module
    counter: list = eqx.field(static=True)

    def __call__(self, x):
        self.counter.append(1)
        return self.inner(x)


class Counter(list):
    """A list that can be hashed, as a static field must be."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other):
        return self is other


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("linear", {}),
        (jnp.tanh, {}),
        (jax.nn.softplus, {}),
        ("relu", {}),
        ("relu", {"rtol": 1e-6}),
        (jnp.tanh, {"dynamics": hf.Modified(0.01)}),
        (jnp.tanh, {"dynamics": hf.HeavyBall(mass=0.3)}),
    ],
)
def test_a_model_is_traced_five_times_at_most_and_then_no_more(activation, options):
    calls = Counter()
    models = [
        Counted(hf.MLP((3, 4, 1), activation=activation, key=jr.key(k)), calls)
        for k in range(2)
    ]
    hf.flow(models[0], DATA, 1.0, laws=(), **options)
    assert 0 < len(calls) <= 5
    calls.clear()
    hf.flow(models[1], (X, jnp.cos(X[:, :1])), 1.0, laws=(), **options)
    assert len(calls) == 0


# Continuation.


@pytest.mark.parametrize("name", ["smooth", "exact"])
def test_a_flow_goes_on_where_it_ended(name):
    model, options = (LINEAR, {}) if name == "smooth" else (RELU, {"rtol": 1e-9})
    whole = hf.flow(model, DATA, 2.0, ts=[0.5, 1.5, 2.0], **options)
    half = hf.flow(model, DATA, 1.0, **options)
    more = hf.flow(half, DATA, 2.0, ts=[1.5, 2.0], **options)
    np.testing.assert_array_equal(more.ts, [1.5, 2.0])
    np.testing.assert_allclose(more.losses, whole.losses[1:], rtol=1e-7)
    default = hf.flow(half, DATA, 2.0, **options)
    assert default.ts[0] == 1.0
    assert default.ts[-1] == 2.0
    assert default.stats["time_reached"] == 2.0
    assert default.losses[0] == half.losses[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": MOMENTUM},
        {"optimizer": optax.adam},
        {"batch_size": 5, "key": jr.key(3)},
        {"learning_rate": optax.exponential_decay(0.05, 10, 0.5)},
    ],
    ids=["sgd", "momentum", "adam", "minibatches", "schedule"],
)
def test_two_halves_of_a_descent_are_the_whole_to_the_bit(options):
    options = {"learning_rate": 0.02, **options}
    whole = hf.descend(LINEAR, DATA, 30, **options)
    half = hf.descend(LINEAR, DATA, 13, **options)
    more = hf.descend(half, DATA, 17, **options)
    np.testing.assert_array_equal(more.losses, whole.losses[13:])
    np.testing.assert_allclose(more.ts, whole.ts[13:], rtol=1e-14)
    for a, b in zip(*map(jax.tree.leaves, (more.model, whole.model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_flow_and_descent_go_on_from_each_other():
    gd = hf.descend(LINEAR, DATA, 20, learning_rate=0.05)
    flow = hf.flow(gd, DATA, 2.0)
    assert flow.ts[0] == gd.ts[-1] == 1.0
    again = hf.descend(flow, DATA, 20, learning_rate=0.05)
    np.testing.assert_allclose(again.ts[jnp.array([0, -1])], [2.0, 3.0])


@pytest.mark.parametrize(
    ("go_on", "message"),
    [
        (lambda run: hf.flow(run, DATA, 0.5), "must come after t = 1"),
        (lambda run: hf.flow(run, DATA, jnp.inf), "clock of its own"),
        (lambda run: hf.heavy_ball_flow(run, DATA, 2.0, mass=0.3), "weights alone"),
        (
            lambda run: hf.descend(
                run, DATA, 5, learning_rate=0.05, optimizer=optax.adam
            ),
            "another optimizer",
        ),
        (
            lambda run: hf.descend(
                eqx.tree_at(lambda t: t.continuation, run, None), DATA, 5,
                learning_rate=0.05,
            ),
            "optimizer's state",
        ),
    ],
)  # fmt: skip
def test_what_cannot_go_on_is_refused(go_on, message):
    run = hf.descend(LINEAR, DATA, 20, learning_rate=0.05, optimizer=MOMENTUM)
    with pytest.raises(ValueError, match=message):
        go_on(run)
