"""Sweeps in memory: labels, values, failures as data, and errors in words."""

import signal
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import homoflow as hf
from homoflow._sweep import _compute, _program
from homoflow._sweep._progress import SweepMeter

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2)))
DATA = (X, X[:, :1])


def linear(seed, scale, width=3):
    model = hf.MLP((2, width, 1), activation="linear", key=jax.random.key(seed))
    return jax.tree.map(lambda w: jnp.asarray(scale, w.dtype) * w, model)


def descend(seed, scale, steps=20):
    model = linear(seed, scale)
    return hf.descend(model, DATA, steps, learning_rate=0.1, throw=False)


def sweep(run, over, **options):
    return hf.sweep(run, over, progress=False, **options)


@pytest.fixture(scope="module")
def data():
    return sweep(descend, {"seed": range(5), "scale": [0.5, 1.0, 40.0]}, chunk=4)


def test_every_setting_is_the_run_of_that_setting(data):
    assert data.losses.dims == ("seed", "scale", "time")
    for seed, scale in ((0, 0.5), (4, 1.0), (3, 0.5)):
        alone = descend(seed, scale)
        own = data.sel(seed=seed, scale=scale)
        np.testing.assert_allclose(own.losses, alone.losses, rtol=1e-13)
        np.testing.assert_allclose(
            own["neurons[1]"], alone.laws["neurons[1]"], rtol=1e-12
        )
        np.testing.assert_allclose(own.time, alone.ts, rtol=1e-15)
        assert own.steps == alone.stats["steps"]


def test_it_has_what_the_data_set_of_a_trajectory_has(data):
    alone = descend(2, 0.5).to_xarray()
    own = data.sel(seed=2, scale=0.5)
    assert set(alone.data_vars) <= set(own.data_vars)
    assert {n: v.dims for n, v in alone.data_vars.items()} == {
        n: own[n].dims for n in alone.data_vars
    }
    assert set(alone.coords) <= set(own.coords)
    assert set(alone.attrs) <= set(own.attrs)
    assert own["array"].values.tolist() == alone["array"].values.tolist()


def test_runs_that_diverge_are_nan_after_their_time(data):
    far = data.sel(scale=40.0)
    assert (far.result == "diverged").all()
    assert (data.sel(scale=1.0).result == "successful").all()
    assert (data.attempt == 1).all()
    after = far.time > far.time_reached
    assert np.isnan(far.losses.values[after.T.values]).all()
    assert np.isfinite(far.losses.values[~after.T.values]).all()


def test_a_list_and_a_zip_are_one_dimension():
    run = lambda a, b: {"sum": a + b, "product": a * b}  # noqa: E731
    zipped = sweep(run, hf.zipped("pair", a=[1.0, 2.0, 3.0], b=[0.5, 0.25, 2.0]))
    listed = sweep(
        run, [{"a": 1.0, "b": 0.5}, {"a": 2.0, "b": 0.25}, {"a": 3.0, "b": 2.0}]
    )
    assert zipped["sum"].dims == ("pair",)
    np.testing.assert_allclose(zipped["product"], [0.5, 0.5, 6.0])
    np.testing.assert_array_equal(zipped.a, [1, 2, 3])
    np.testing.assert_array_equal(listed["sum"], zipped["sum"])
    assert listed["sum"].dims == ("setting",)


def test_values_outside_of_programs_are_what_was_given():
    def run(seed, fn, size):
        draw = jax.random.normal(jax.random.key(seed), (size,))
        return {"sum": jnp.sum(fn(draw))}

    over = {"fn": [jnp.tanh, jnp.square], "seed": range(3), "size": [2, 4]}
    found = sweep(run, over, vectorize=("seed",))["sum"]
    assert found.dims == ("fn", "seed", "size")
    assert found.fn.values.tolist() == ["tanh", "square"]
    for fn in over["fn"]:
        for seed in range(3):
            wanted = fn(jax.random.normal(jax.random.key(seed), (4,))).sum()
            own = found.sel(fn=fn.__name__, seed=seed, size=4)
            np.testing.assert_allclose(own, wanted, rtol=1e-14)


def test_random_keys_are_an_axis():
    keys = jax.random.split(jax.random.key(3), 4)
    found = sweep(lambda key: jax.random.normal(key, (2,)), {"key": keys}, chunk=3)
    wanted = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    np.testing.assert_array_equal(found.value, wanted)


def test_shorter_results_are_filled_with_nan():
    over = {"seed": range(2), "scale": [0.5], "steps": [4, 6]}
    found = sweep(descend, over, vectorize=("seed", "scale"))
    assert found.losses.sizes == {"seed": 2, "scale": 1, "steps": 2, "time": 7}
    assert np.isnan(found.losses.sel(steps=4)[..., 5:]).all()
    assert np.isfinite(found.losses.sel(steps=4)[..., :5]).all()
    np.testing.assert_allclose(
        found.t.sel(steps=6)[0, 0], np.arange(7) / 10, rtol=1e-14
    )
    assert found.losses.sel(steps=6).notnull().all()


def test_several_trajectories_are_told_apart():
    def run(seed):
        model = linear(seed, 1.0)
        return {
            rate: hf.descend(model, DATA, 3, learning_rate=float(rate), throw=False)
            for rate in ("0.1", "1e9")
        }

    found = sweep(run, {"seed": range(2)})
    assert found["0.1.losses"].dims == ("seed", "0.1.time")
    assert (found["0.1.result"] == "successful").all()
    assert (found["1e9.result"] == "diverged").all()
    assert (found.result == "diverged").all()  # of the worst


def test_models_come_back():
    found = sweep(descend, {"seed": range(3), "scale": [0.5, 1.0]}, models=True)
    like = linear(0, 1.0)
    wanted = descend(2, 1.0).model
    own = hf.models_of(found.sel(seed=2, scale=1.0), like)
    for ours, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    every = hf.models_of(found, like)
    assert every.layers[0].weight.shape == (3, 2, *like.layers[0].weight.shape)
    with pytest.raises(ValueError, match="is not the model of this data set"):
        hf.models_of(found, linear(0, 1.0, width=4))
    with pytest.raises(ValueError, match="models=True"):
        hf.models_of(sweep(descend, {"seed": [0], "scale": [1.0]}), like)


def test_an_exception_is_named_and_the_others_go_on():
    def run(x, name):
        if name == "bad" and x > 1:
            raise RuntimeError("no such thing")
        return {"double": 2 * x}

    over = {"x": [1.0, 2.0], "name": ["good", "bad"]}
    found = sweep(run, over, vectorize=())
    np.testing.assert_array_equal(found.double, [[2, 2], [4, np.nan]])
    assert found.result.values.tolist() == [
        ["successful", "successful"],
        ["successful", "raised"],
    ]
    assert found.error.sel(x=2.0, name="bad") == "RuntimeError: no such thing"
    with pytest.raises(
        hf.SweepError, match=r"at x=2.0, name=bad: RuntimeError: no such"
    ):
        sweep(run, over, vectorize=(), errors="raise")
    with pytest.raises(hf.SweepError, match="raised for every setting: RuntimeError"):
        sweep(run, {"x": [2.0], "name": ["bad"]}, vectorize=())


def test_an_exception_in_a_program_is_that_of_one_setting():
    def run(x):
        return {"root": eqx.error_if(jnp.sqrt(x), x < 0, "negative")}

    found = sweep(run, {"x": [4.0, -1.0, 9.0]})
    np.testing.assert_array_equal(found.root, [2.0, np.nan, 3.0])
    assert found.result.values.tolist() == ["successful", "raised", "successful"]
    assert "negative" in str(found.error.values[1])
    assert found.attempt.values.tolist() == [2, 2, 2]


def test_a_setting_of_another_shape_is_told():
    """Here `run` looks at whether its numbers are known."""

    def run(x):
        is_long = not isinstance(x, jax.core.Tracer) and x > 3
        values = jnp.full(3 if is_long else 2, x)
        return {"values": eqx.error_if(values, x < 0, "negative")}

    found = sweep(run, {"x": [1.0, -1.0, 4.0]})
    assert found.result.values.tolist() == ["successful", "raised", "raised"]
    assert "`values` has shape (3,) for this setting" in str(found.error.values[2])
    np.testing.assert_array_equal(found["values"][:, 0], [1, np.nan, np.nan])


def test_what_runs_out_of_steps_is_run_again_alone():
    """Stiff: alone, homoflow goes on to a solver for stiff flows."""
    rates = jnp.asarray([1.0, 3e4])

    def objective(w, data):
        return 0.5 * jnp.sum(data[0] * w.w**2)

    class Weights(eqx.Module):
        w: jax.Array

        def __call__(self):
            return self.w

    def run(stiffness):
        curvature = jnp.where(jnp.arange(2) == 0, 1.0, stiffness)
        model = Weights(jnp.ones(2))
        return hf.flow(
            model, (curvature,), 1.0, objective=objective, laws=(), max_steps=1500,
            throw=False,
        )  # fmt: skip

    once = sweep(run, {"stiffness": rates}, retry=False)
    assert once.result.values.tolist() == ["successful", "max_steps_reached"]
    found = sweep(run, {"stiffness": rates})
    assert found.attempt.values.tolist() == [1, 2]
    assert found.result.values.tolist() == ["successful", "successful"]
    # w(t) = (e^(−t), e^(−κt)) for the curvatures 1 and κ.
    wanted = 0.5 * (np.exp(-2.0) + rates * np.exp(-2 * rates))
    np.testing.assert_allclose(found.losses[:, -1], wanted, rtol=1e-6)
    assert "stiffness=30000.0" in found.attrs["run_again"]


def test_without_memory_half_a_chunk_is_taken(monkeypatch):
    sizes = []

    class Small(_compute.Program):
        def __call__(self, columns):
            sizes.append(self._batch)
            if self._batch > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return super().__call__(columns)

    monkeypatch.setattr(_compute, "Program", Small)
    with pytest.warns(UserWarning, match=r"no memory for 4 settings.*with 2 at once"):
        found = sweep(lambda x: {"double": 2 * x}, {"x": range(10)}, chunk=4)
    np.testing.assert_array_equal(found.double, 2 * np.arange(10))
    assert sizes == [4, 2, 2, 2, 2, 2]  # chunks of 4, 4 and 2
    # Two chunks of 5: half of one is too large as well.
    with pytest.raises(MemoryError, match=r"no memory for 3 settings.*smaller `chunk`"):
        sweep(lambda x: {"double": 2 * x}, {"x": range(10)}, chunk=8)


@pytest.fixture
def default_interrupt():
    """In the background Python starts with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_ctrl_c_returns_what_there_is(capsys):
    def run(x):
        if x == 2:
            signal.raise_signal(signal.SIGINT)
        return {"double": 2 * x}

    found = sweep(run, {"x": [1, 2, 3, 4]}, vectorize=())
    assert found.result.values.tolist() == ["successful"] * 2 + ["not_run"] * 2
    np.testing.assert_array_equal(found.double, [2, 4, np.nan, np.nan])
    assert found.attempt.values.tolist() == [1, 1, 0, 0]
    assert "Stopping after the current chunk" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_says_done_failed_and_left(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    meter = SweepMeter(100, 20, 1, None)
    now = 60.0  # most of them for the compilation, which is over
    meter.add(20, 2)
    assert meter.text(now) == "sweep: 40 of 100 settings, 3 failed, at most 3:00 left"
    now = 70.0
    meter.add(20, 0)
    assert meter.text(now) == "sweep: 60 of 100 settings, 3 failed, 0:20 left"
    meter.add(40, 0)
    assert meter.text(3700.0) == "sweep: 100 of 100 settings, 3 failed, 1:01:40"
    monkeypatch.undo()
    hf.sweep(lambda x: {"double": 2 * x}, {"x": range(4)})
    assert "sweep: 4 of 4 settings, 0 failed" in capsys.readouterr().err


FACTOR = 2.0


def test_a_sweep_that_is_called_again_traces_nothing(monkeypatch):
    traces = _counted_traces(monkeypatch)

    def make(factor):
        return lambda x: {"product": factor * x}

    for factor in (2.0, 2.0, 3.0):
        found = sweep(make(factor), {"x": [0.0, 1.0, 2.0]})
        np.testing.assert_array_equal(found["product"], factor * np.arange(3))
    assert len(traces) == 2
    sweep(make(3.0), {"x": [0.0, 1.0]})  # of another shape
    assert len(traces) == 3


def test_a_global_name_that_changes_is_seen(monkeypatch):
    """As in a notebook, where a cell above is changed and run again."""
    traces = _counted_traces(monkeypatch)
    table = np.ones(2)

    def run(x):
        return {"product": FACTOR * x * jnp.asarray(table)}

    for factor, number in ((2.0, 1.0), (3.0, 1.0), (3.0, 5.0), (3.0, 5.0)):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        table[:] = number
        found = sweep(run, {"x": [1.0, 2.0]})
        np.testing.assert_array_equal(
            found["product"][:, 0], factor * number * np.array([1, 2])
        )
    assert len(traces) == 3


def test_what_cannot_be_compared_is_traced_again():
    draws = np.random.default_rng(0)

    def run(x):
        return {"sum": x + draws.standard_normal()}

    wanted = np.random.default_rng(0).standard_normal(2)
    for draw in wanted:
        np.testing.assert_allclose(sweep(run, {"x": [0.0]})["sum"], [draw], rtol=1e-15)


def test_laws_that_were_found_since_are_used():
    """A trace cannot search for laws, and says to run the model once outside."""

    class Product(eqx.Module):
        u: jax.Array
        v: jax.Array

        def __call__(self, x):
            return self.v @ (self.u @ x)

    def run(seed):
        keys = jax.random.split(jax.random.key(seed))
        model = Product(
            jax.random.normal(keys[0], (3, 2)), jax.random.normal(keys[1], (1, 3))
        )
        return hf.descend(model, DATA, 2, learning_rate=0.1, throw=False)

    over = {"seed": range(2)}
    before = sweep(run, over)
    alone = run(0)
    after = sweep(run, over)
    assert alone.laws
    assert not set(alone.laws) & set(before.data_vars)
    assert set(alone.laws) <= set(after.data_vars)


def _counted_traces(monkeypatch) -> list[int]:
    traces = []
    original = _program._trace

    def counted(*arguments):
        traces.append(1)
        return original(*arguments)

    monkeypatch.setattr(_program, "_trace", counted)
    return traces


def branching(x, y=1.0):
    return {"value": x if x > y else y}


REFUSED = {
    "misspelt axis": (
        lambda: sweep(descend, {"sede": [0], "scale": [1.0]}),
        "`run` has no argument `sede`: its arguments are seed, scale, steps",
    ),
    "missing axis": (
        lambda: sweep(descend, {"seed": [0]}), r"`run` needs `scale`.*`scale=\[…\]`"
    ),
    "no function": (lambda: sweep(3, {"seed": [0]}), "`run` must be a function"),
    "throw": (
        lambda: sweep(
            lambda seed: hf.descend(linear(seed, 1.0), DATA, 2, learning_rate=0.1),
            {"seed": [0]},
        ),
        "pass `throw=False`",
    ),
    "count as an array": (
        lambda: sweep(descend, {"seed": [0], "scale": [1.0], "steps": [2, 3]}),
        r"It can if `steps` is a known number: pass `vectorize=\(\"seed\", \"scale\",\)`",
    ),
    "branch of Python": (
        lambda: sweep(branching, {"x": [0.0, 1.0]}),
        r"cannot be compiled with `x` batched.*or pass `vectorize=\(\)`",
    ),
    "nothing returned": (
        lambda: sweep(lambda x: None, {"x": [1]}, vectorize=()), "returned nothing"
    ),
    "text returned": (
        lambda: sweep(lambda x: {"a": "text"}, {"x": [1]}), "it returned 'text'"
    ),
    "other axes": (
        lambda: sweep(
            lambda x, n: jnp.zeros((2,) * n) + x, {"x": [1.0], "n": [1, 2]},
            vectorize=("x",),
        ),
        "`value` has 2 axes for some settings and another number",
    ),
    "axis called as a result": (
        lambda: sweep(lambda losses: {"losses": losses}, {"losses": [1.0]}),
        "`losses` is an axis of the sweep and a name in its results",
    ),
    "slash": (lambda: sweep(lambda x: {"a/b": x}, {"x": [1.0]}), "no '/'"),
    "resume": (
        lambda: sweep(branching, {"x": [1]}, resume="yes"), '`resume` must be True, False'
    ),
    "errors": (
        lambda: sweep(branching, {"x": [1]}, errors="ignore"), '"record" or "raise"'
    ),
    "retry": (lambda: sweep(branching, {"x": [1]}, retry=1), "`retry` must be True or"),
    "devices": (lambda: sweep(branching, {"x": [1]}, devices=[0]), "list of devices"),
    "executor": (lambda: sweep(branching, {"x": [1]}, executor=4), "a method `submit`"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_a_sweep_of_the_wrong_kind(call, message, monkeypatch):
    # Type checking is off, as it is for users.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises((TypeError, ValueError, hf.SweepError), match=message):
        call()


def test_a_sweep_leaves_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(lambda x: {"double": 2 * x}, {"x": range(3)}, chunk=2)
