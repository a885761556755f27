"""`t1=inf` against closed forms, least squares, and dense Hessians of JAX's own."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import compilations
from problems import arrays_of, saved
from stationary import faults_of, problem

import homoflow as hf
from homoflow._methods.stationary._separable import separation_loss
from homoflow._problem._problem import make_problem

INF = jnp.inf
#: Most of the time is compilation. The script `stationary.py` checks what users run.
pytestmark = pytest.mark.usefixtures("quick_compilation")
StationaryKind = hf.StationaryKind


def stationary_kind(flow):
    assert flow.result == hf.RESULTS.successful
    return flow.stats["stationary_kind"]


# Functions of two weights, all of them one polynomial: they compile once.

POWERS = [(i, j) for i in range(5) for j in range(5 - i)]


def polynomial(w, coefficients):
    terms = [w[0] ** i * w[1] ** j for i, j in POWERS]
    return jnp.stack(terms) @ coefficients


def coefficients(terms: dict) -> jax.Array:
    return jnp.asarray([float(terms.get(power, 0.0)) for power in POWERS])


#: ½u² − ½v² + ¼v⁴: a saddle at 0, minima at (0, ±1).
SADDLE = {(2, 0): 0.5, (0, 2): -0.5, (0, 4): 0.25}
#: ½(½(u² − v²) − 1)²: the flow conserves uv.
VALLEY = {(4, 0): 0.125, (2, 2): -0.25, (0, 4): 0.125, (2, 0): -0.5, (0, 2): 0.5,
          (0, 0): 0.5}  # fmt: skip
MONKEY = {(3, 0): 1.0, (1, 2): -3.0}
#: 1 + u² + v⁴, and 1 − u² − v⁴.
QUARTIC = {(0, 0): 1.0, (2, 0): 1.0, (0, 4): 1.0}


def end_of(terms, start, **options):
    return hf.flow(
        jnp.asarray(start), coefficients(terms), INF, objective=polynomial, **options
    )


@pytest.mark.parametrize(
    ("terms", "start", "kind", "point"),
    [
        (SADDLE, (1.0, 0.0), StationaryKind.strict_saddle, (0, 0)),
        (SADDLE, (0.0, 0.0), StationaryKind.strict_saddle, (0, 0)),
        (SADDLE, (1.0, 1e-7), StationaryKind.minimum, (0, 1)),
        (SADDLE, (0.3, -1e-3), StationaryKind.minimum, (0, -1)),
        (MONKEY, (0.0, 0.0), StationaryKind.degenerate_saddle, (0, 0)),
        (QUARTIC, (0.5, 0.5), StationaryKind.undecided, (0, 0)),
        # Inflections: downhill, but no minimum.
        ({(3, 0): 1.0}, (0.0, 0.5), StationaryKind.degenerate_saddle, (0, 0.5)),
        (
            {(3, 0): 1.0, (0, 2): 1.0},
            (0.0, 0.5),
            StationaryKind.degenerate_saddle,
            (0, 0),
        ),
        ({(2, 0): 1.0}, (0.5, 0.5), StationaryKind.minimum, (0, 0.5)),
        ({(0, 0): 2.0}, (0.5, 0.5), StationaryKind.minimum, (0.5, 0.5)),
    ],
)
def test_verdicts_on_functions_that_are_known(terms, start, kind, point):
    flow = end_of(terms, start)
    assert stationary_kind(flow) == kind
    assert np.linalg.norm(flow.model - np.asarray(point, float)) < 2e-5
    assert flow.stats["gradient_norm"] <= 1e-12
    hessian = jax.hessian(polynomial)(flow.model, coefficients(terms))
    values = np.linalg.eigvalsh(np.asarray(hessian))
    ours = flow.stats["smallest_eigenvalue"], flow.stats["largest_eigenvalue"]
    np.testing.assert_allclose(ours, values, rtol=1e-12, atol=1e-15)


def half_square(w, rows):
    """½Σp² of polynomials that a user has written as an objective."""
    terms = jnp.stack([w[0] ** i * w[1] ** j for i, j in POWERS])
    return 0.5 * jnp.sum((rows @ terms) ** 2)


CIRCLE = {(2, 0): 1.0, (0, 2): 1.0, (0, 0): -1.0}
HYPERBOLA = {(1, 1): 1.0, (0, 0): -1.0}
CUBIC = {(3, 0): 1.0, (0, 1): -1.0, (0, 0): 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("curve", [CIRCLE, HYPERBOLA, CUBIC])
@pytest.mark.parametrize("start", [(0.5, 0.9), (1.5, 0.3), (0.8, 2.5)])
def test_zero_is_the_least_of_squares_whoever_writes_them(curve, start):
    """Losses of 1e-33 and 1e-34 on a curve of minima are both 0, to rounding."""
    rows = jnp.stack([coefficients(curve), coefficients({})])
    flow = hf.flow(jnp.asarray(start), rows, INF, objective=half_square)
    assert stationary_kind(flow) == StationaryKind.minimum
    assert half_square(flow.model, rows) < 1e-29


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_a_small_fall_along_a_valley_is_seen(size):
    """½u² + ½·size²(1 + (v − 1)³)² falls beyond v = 1, where the flow comes to rest."""
    inflection = {(0, 0): 0.0, (0, 1): 3 * size, (0, 2): -3 * size, (0, 3): size}
    rows = jnp.stack([coefficients({(1, 0): 1.0}), coefficients(inflection)])
    flow = hf.flow(jnp.array([0.3, 1.0]), rows, INF, objective=half_square)
    assert stationary_kind(flow) == StationaryKind.degenerate_saddle
    np.testing.assert_allclose(flow.model, [0, 1], atol=1e-12)


def test_in_a_valley_it_ends_where_the_conserved_product_says():
    start = np.array([1.3, 0.4])
    flow = end_of(VALLEY, start)
    assert stationary_kind(flow) == StationaryKind.minimum
    assert flow.stats["zero_eigenvalues"] == 1
    # No law is known for an array: that the valley is flat is measured.
    assert flow.stats["symmetry_zero_eigenvalues"] == 0
    u, v = flow.model
    np.testing.assert_allclose(u * v, start.prod(), rtol=1e-7)
    np.testing.assert_allclose(u**2 - v**2, 2, rtol=1e-14)
    assert 0 < flow.stats["polish_distance"] < 1e-4


def test_a_flow_that_falls_for_ever_ends_in_no_point():
    falling = {power: -c for power, c in QUARTIC.items()}
    with pytest.raises(hf.TrajectoryError, match="run off to infinity") as caught:
        end_of(falling, (0.1, 0.1))
    kept = caught.value.trajectory
    assert kept.stats["stationary_kind"] == StationaryKind.not_reached
    assert np.isnan(kept.stats["gradient_norm"])
    assert np.all(np.isfinite(kept.losses))


def test_too_few_steps_and_ctrl_c_lose_nothing(monkeypatch, capsys):
    with pytest.raises(hf.TrajectoryError, match="before a stationary point") as caught:
        end_of(SADDLE, (1.0, 1e-7), max_steps=80)
    short = caught.value.trajectory
    assert 80 <= short.stats["steps"] + short.stats["rejected_steps"] < 80 + 64
    assert 0 < short.ts[-1] <= short.stats["time_reached"]
    whole = end_of(SADDLE, (1.0, 1e-7), progress=True)
    assert capsys.readouterr().out.count("‖∇L‖") > 4

    def interrupted(segment):
        if segment.start > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("homoflow._methods._steady_state._print", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        end_of(SADDLE, (1.0, 1e-7), progress=True)
    assert isinstance(stopped.value, hf.TrajectoryInterrupt)
    part = stopped.value.trajectory
    assert part.result == hf.RESULTS.interrupted
    assert 3 < part.ts[-1] < whole.ts[-1]
    assert np.all(np.isfinite(part.losses))


def test_times_that_are_asked_for_are_passed():
    ts = np.array([0.0, 1.0, 5.0])
    flow = end_of({(2, 0): 0.5}, (1.0, 0.5), ts=ts, save_models=True)
    np.testing.assert_array_equal(flow.ts, ts)
    np.testing.assert_allclose(saved(flow)[:, 0], np.exp(-ts), rtol=1e-6)
    assert flow.stats["time_reached"] > 5
    np.testing.assert_allclose(flow.model, [0, 0.5], atol=1e-15)


def test_weight_decay_is_part_of_what_comes_to_rest():
    # ½(½(u² − v²) − 1)² + ½λ(u² + v²) is least at v = 0, u² = 2 − 2λ.
    flow = end_of(VALLEY, (1.5, 0.4), weight_decay=0.25)
    assert stationary_kind(flow) == StationaryKind.minimum
    np.testing.assert_allclose(flow.model, [np.sqrt(1.5), 0], atol=1e-12)
    assert flow.stats["zero_eigenvalues"] == 0


# Deep linear networks.


@pytest.fixture(scope="module", params=[(4, 4, 4, 4), (4, 4, 4, 4, 4)], ids=len)
def deep(request, quick_compilation):
    """Sizes, flows of two seeds, and what the second of them compiled."""
    sizes, ends = request.param, []
    for seed in range(2):
        model, data = problem(sizes, seed)
        with compilations() as compiled:
            ends.append((hf.flow(model, data, INF, throw=False), model, data))
    return sizes, ends, compiled  # pyright: ignore[reportPossiblyUnboundVariable]


def test_small_deep_networks_end_at_the_global_minimum(deep):
    sizes, ends, _ = deep
    for flow, _, data in ends:
        *_, faults = faults_of(flow, sizes, data)
        assert faults == []
        # The orbit of GL(4) between each two layers, and nothing else.
        flat = 16 * (len(sizes) - 2)
        assert flow.stats["zero_eigenvalues"] == flat
        assert flow.stats["symmetry_zero_eigenvalues"] == flat


def test_a_rule_for_the_gradient_alone_would_stop_at_saddles(deep):
    """As small relative to loss and weights as it gets, far above the minimum."""
    _, ends, _ = deep
    for flow, _, _ in ends:
        losses = np.asarray(flow.losses)
        sizes = np.sqrt(np.sum([np.asarray(s) for s in flow.squared_norms.values()], 0))
        relative = np.asarray(flow.grad_norms) * sizes / losses
        above = losses > losses[-1] * 1.001
        assert np.any(above & (relative < 1e-6) & (flow.ts < 1))
        # Plateaus on the way: less than before and after them.
        later = relative[above & (flow.ts > 0.01 * flow.ts[-1])]
        least = later.argmin()
        assert later[least] < 1e-3 * relative.max()
        assert later[least:].max() > 10 * later[least]


def test_trajectories_to_the_end_are_trajectories(deep):
    _, ends, compiled = deep
    assert compiled == []
    for flow, model, _ in ends:
        assert flow.ts.shape == (101,)
        assert flow.ts[0] == 0
        assert np.all(np.diff(flow.ts) > 0)
        assert flow.ts[-1] == flow.stats["time_reached"]
        assert np.all(np.diff(flow.losses) <= 1e-12)
        assert np.isclose(flow.losses[-1], flow.stats["stationary_loss"], rtol=1e-9)
        # No two times have a plateau's end between them.
        assert np.max(-np.diff(flow.losses)) < 0.1 * (flow.losses[0] - flow.losses[-1])
        size = sum(float(norms[-1]) for norms in flow.squared_norms.values())
        for law in hf.laws(model):
            drift = law.value(flow.model) - law.value(model)
            # What a projection takes for rounding, in each entry of `matrix[h]`:
            # `layers[h]` is the sum of the four on its diagonal.
            num_terms = 4 if law.name.startswith("layers") else 1
            rounding = 16 * np.finfo(float).eps * size
            assert np.max(np.abs(drift)) <= num_terms * rounding
            values = np.asarray(flow.laws[law.name])
            assert np.max(np.abs(values - values[0])) < 1e-12
        assert "A minimum" in repr(flow)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[f for f, *_ in ends])
    assert np.all(stacked.stats["stationary_kind"] == StationaryKind.minimum)


def test_zero_weights_are_a_saddle_without_negative_curvature():
    model, data = problem((4, 4, 4, 4), 0)
    nothing = jax.tree.map(lambda a: 0 * a if eqx.is_array(a) else a, model)
    flow = hf.flow(nothing, data, INF)
    assert stationary_kind(flow) == StationaryKind.degenerate_saddle
    assert all(np.all(a == 0) for a in arrays_of(flow.model))
    assert flow.stats["smallest_eigenvalue"] == flow.stats["largest_eigenvalue"] == 0


# Matrix factorization, with a symmetry that keeps the flow at a saddle.


@pytest.mark.parametrize("lanczos", [False, True], ids=["dense", "Lanczos"])
def test_columns_of_zeros_keep_a_factorization_at_a_strict_saddle(monkeypatch, lanczos):
    if lanczos:
        monkeypatch.setattr("homoflow._methods.stationary._search.MAX_WEIGHTS", 1)
    values = np.array([3.0, 2.0, 1.0])
    turns = [np.linalg.qr(np.random.default_rng(s).standard_normal((n, 3)))[0]
             for s, n in ((0, 5), (1, 4))]  # fmt: skip
    target = jnp.asarray(turns[0] * values @ turns[1].T)
    model = hf.MatrixFactorization(5, 4, 3, std=1e-3, key=jr.key(0))

    def end(used):
        where = lambda m: (m.U, m.V)  # noqa: E731
        cut = (model.U.at[:, used:].set(0), model.V.at[:, used:].set(0))
        start = eqx.tree_at(where, model, cut)
        objective = hf.factorization_objective
        return hf.flow(start, target, INF, objective=objective, project=False)

    nothing, stuck, free = end(0), end(2), end(3)
    assert stationary_kind(nothing) == StationaryKind.strict_saddle
    # At 0 the Hessian pairs U with V by the target.
    np.testing.assert_allclose(nothing.stats["smallest_eigenvalue"], -3, rtol=1e-6)
    assert stationary_kind(stuck) == StationaryKind.strict_saddle
    # That of the component left out.
    np.testing.assert_allclose(stuck.stats["smallest_eigenvalue"], -1, rtol=1e-6)
    np.testing.assert_allclose(stuck.stats["stationary_loss"], 0.5, rtol=1e-12)
    assert stationary_kind(free) == StationaryKind.minimum
    assert free.stats["stationary_loss"] < 1e-25
    assert stuck.stats["gradient_norm"] <= 1e-12 >= free.stats["gradient_norm"]
    assert free.stats["zero_eigenvalues"] == (-1 if lanczos else 9)


# Losses that have their minimum at infinity.


def test_separable_data_have_no_stationary_point_and_others_have():
    x = jr.normal(jr.key(0), (20, 3))
    model = hf.MLP((3, 2, 1), activation="linear", key=jr.key(1))
    tanh = hf.MLP((3, 2, 1), activation=jnp.tanh, key=jr.key(1))

    def end(labels, model=model):
        loss = hf.LogisticLoss()
        return hf.flow(model, (x, labels), INF, loss=loss, project=False)

    # Its margins are not homogeneous: no theory says that the direction has a limit.
    with pytest.raises(hf.TrajectoryError, match="separates the data") as caught:
        end(jnp.sign(x[:, :1]), tanh)
    kept = caught.value.trajectory
    assert kept.stats["stationary_kind"] == StationaryKind.diverges
    assert np.isnan(kept.stats["gradient_norm"])
    predictions = jax.vmap(kept.model)(x)
    assert np.all(predictions * x[:, :1] > 0)
    assert kept.losses[-1] < np.log(2) / 20
    assert "No stationary point" in repr(kept)
    assert kept.limit is None

    labels = jnp.sign(jr.normal(jr.key(2), (20, 1)))
    mixed = end(labels)
    assert stationary_kind(mixed) == StationaryKind.minimum
    # Logistic regression by Newton's method.
    product = np.zeros(3)
    for _ in range(30):
        p = 1 / (1 + np.exp(np.asarray(labels)[:, 0] * (x @ product)))
        gradient = -(np.asarray(labels)[:, 0] * p) @ x
        product -= np.linalg.solve((x.T * (p * (1 - p))) @ x, gradient)
    first, second = arrays_of(mixed.model)
    np.testing.assert_allclose((second @ first)[0], product, rtol=1e-9)


class Shift(eqx.Module):
    """x ↦ x + b: no change of b scales the output."""

    b: jax.Array

    def __call__(self, x):
        return x + self.b


@pytest.mark.parametrize(
    ("loss", "limit"),
    [
        (hf.LogisticLoss(), np.log(2) / 4),
        (hf.LogisticLoss("sum"), np.log(2)),
        (hf.ExponentialLoss(), 1 / 4),
        (hf.SquaredLoss(), None),
    ],
)
def test_the_loss_below_which_there_is_no_way_back(loss, limit):
    data = jnp.ones((4, 2)), jnp.ones((4, 2))
    model = hf.MLP((2, 3, 2), activation=jnp.tanh, use_bias=True, key=jr.key(0))
    found = separation_loss(_posed(model, data, loss))
    assert found == limit
    assert separation_loss(_posed(Shift(jnp.zeros(2)), data, loss)) is None


def test_soft_labels_have_a_minimum_of_their_own():
    model = hf.MLP((2, 3), key=jr.key(0))
    x, loss = jnp.ones((4, 2)), hf.SoftmaxCrossEntropy()
    classes = jnp.array([0, 1, 2, 0])
    for hard in (classes, jnp.eye(3)[classes]):
        assert separation_loss(_posed(model, (x, hard), loss)) == np.log(2) / 4
    soft = jnp.full((4, 3), 1 / 3)
    assert separation_loss(_posed(model, (x, soft), loss)) is None


def _posed(model, data, loss):
    return make_problem(model, data, loss=loss)


# At the door.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjoint": dfx.DirectAdjoint()}, "`adjoint` is for flows"),
        ({"estimate_error": True}, "`estimate_error` is for flows"),
        ({"ts": [0.0]}, "end after 0"),
        ({"ts": [0.0, np.inf]}, "finite times"),
        ({"ts": [2.0, 1.0]}, "increasing"),
        ({"solver": hf.Filippov()}, "for models with kinks"),
    ],
)
def test_what_has_no_meaning_without_an_end_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        end_of(SADDLE, (1.0, 0.5), **options)


def test_kinks_single_precision_and_traces_are_refused():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="gradient jumps at relu"):
        hf.flow(hf.MLP((2, 3, 2), key=jr.key(0)), (x, x), INF)
    single = hf.MLP((2, 2), key=jr.key(0), dtype=jnp.float32)
    with pytest.raises(ValueError, match="float64 only"):
        hf.flow(single, (x, x), INF)

    @jax.jit
    def traced(w):
        return hf.flow(w, coefficients(SADDLE), INF, objective=polynomial).losses

    with pytest.raises(ValueError, match="inside of jit, vmap or grad"):
        traced(jnp.ones(2))
