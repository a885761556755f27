"""Pictures of runs and of batches: medians and bands over runs, legends beside lines."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import homoflow as hf
import homoflow.plot

matplotlib.use("Agg")
RATES = np.array([0.02, 0.05, 0.1, 0.15, 0.2])
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)))


@pytest.fixture(scope="module")
def sweep():
    """Descents from five starts, at the same times."""

    def run(scale):
        model = hf.MLP(
            (2, 2, 1),
            activation="linear",
            init=hf.Gaussian(scale),
            key=jax.random.key(0),
        )
        return hf.descend(model, (X, X[:, :1]), 10, learning_rate=0.1)

    return jax.jit(jax.vmap(run))(jnp.asarray(0.5 + RATES))


@pytest.fixture(scope="module")
def single(sweep):
    return jax.tree.map(lambda a: a[0], sweep)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def band_of(ax, place=0):
    """The lower and the upper edge of a band, at its distinct times."""
    vertices = ax.collections[place].get_paths()[0].vertices
    times = np.unique(vertices[:, 0])
    return np.array(
        [[f(vertices[vertices[:, 0] == t, 1]) for t in times] for f in (np.min, np.max)]
    )


def heights(line):
    return np.asarray(line.get_ydata())


def texts(ax):
    return [text.get_text() for text in ax.get_legend().texts]


def assert_legend_covers_nothing(ax):
    """No point of a line, or between two of its points, lies in the legend's box."""
    ax.figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    for line in ax.lines:
        path = line.get_transform().transform(np.column_stack(line.get_data()))
        path = path[np.all(np.isfinite(path), axis=1)]
        for share in np.linspace(0, 1, 50):
            points = (1 - share) * path[:-1] + share * path[1:]
            assert not any(box.contains(*point) for point in points)


def test_losses_of_a_batch_are_a_median_and_a_band(sweep):
    ax = homoflow.plot.losses({"starts": sweep})
    (line,) = ax.lines
    values = np.sort(np.asarray(sweep.losses), axis=0)
    np.testing.assert_allclose(
        np.asarray(line.get_xdata()), 0.1 * np.arange(11), rtol=1e-12
    )
    np.testing.assert_allclose(heights(line), values[2], rtol=1e-12)
    # Of five sorted values the quantile of 10 % lies 0.4 of the way to the second.
    low, high = (values[i] + 0.4 * (values[j] - values[i]) for i, j in ((0, 1), (4, 3)))
    np.testing.assert_allclose(band_of(ax), [low, high], rtol=1e-12)
    assert texts(ax) == ["starts\nmedian, 10–90 % of 5 runs"]


def test_drifts_and_norms_of_a_batch(sweep):
    ax = homoflow.plot.law_drift({"starts": sweep}, "neurons[1]")
    values = np.asarray(sweep.laws["neurons[1]"])
    drift = np.max(np.abs(values - values[:, :1]), axis=2)
    np.testing.assert_allclose(
        heights(ax.lines[0])[1:], np.median(drift, axis=0)[1:], rtol=1e-12
    )
    ax = homoflow.plot.squared_norms({"starts": sweep})
    for line, values in zip(ax.lines, sweep.squared_norms.values(), strict=False):
        np.testing.assert_allclose(heights(line), np.median(values, axis=0))
    assert texts(ax)[-1] == "starts:\nmedian, 10–90 % of 5 runs"


def test_a_run_that_failed_is_told_and_left_out_from_there(sweep):
    losses = sweep.losses.at[0, 6:].set(jnp.nan)
    codes = jnp.array([1, 0, 0, 0, 0])
    structure = jax.tree.structure(sweep.result)
    result = jax.tree.unflatten(structure, [codes])
    broken = eqx.tree_at(lambda t: (t.losses, t.result), sweep, (losses, result))
    ax = homoflow.plot.losses({"starts": broken})
    assert "of 5 runs (1 unfinished)" in texts(ax)[0]
    left = np.median(np.asarray(sweep.losses)[1:, 6:], axis=0)
    np.testing.assert_allclose(heights(ax.lines[0])[6:], left, rtol=1e-12)


def test_a_single_run_is_drawn_as_it_is(single):
    ax = homoflow.plot.losses({"one": single})
    np.testing.assert_array_equal(heights(ax.lines[0]), single.losses)
    assert not ax.collections
    assert texts(ax) == ["one"]


def test_a_batch_with_different_times_is_refused(sweep):
    scaled = eqx.tree_at(lambda t: t.ts, sweep, sweep.ts * RATES[:, None])
    with pytest.raises(ValueError, match="recorded at different times"):
        homoflow.plot.losses({"rates": scaled})


def test_runs_come_with_labels(single, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="trajectories by their labels"):
        homoflow.plot.losses(single)
    with pytest.raises(TypeError, match=r"runs\['a'\]` must be a trajectory"):
        homoflow.plot.squared_norms({"a": cast(Any, 1.0)})
    with pytest.raises(KeyError, match=r"has no law 'neuron\[1\]'"):
        homoflow.plot.law_drift({"one": single}, "neuron[1]")


@pytest.mark.parametrize("shape", ["corners", "everywhere", "up", "down"])
def test_a_legend_covers_no_line(single, shape):
    t = np.linspace(0, 1, 11)
    curves = {
        "corners": [1 + np.cos(2 * np.pi * k * t) / 2 for k in range(5)],
        "everywhere": [0.1 + 1.8 * abs(np.sin((k + 1) * 9 * t)) for k in range(9)],
        "up": [np.exp(k * t) for k in range(7)],
        "down": [np.exp(-k * t) for k in range(7)],
    }[shape]
    runs = {
        f"a run with a longer label, {k}": eqx.tree_at(
            lambda t: t.losses, single, jnp.asarray(curve)
        )
        for k, curve in enumerate(curves)
    }
    assert_legend_covers_nothing(homoflow.plot.losses(runs))
    _, ax = plt.subplots(figsize=(3, 2))
    assert_legend_covers_nothing(homoflow.plot.losses(runs, ax=ax))


@pytest.fixture(scope="module")
def late():
    """A run to the limit of its direction, with one of two arrays that is not trained."""

    class Scaled(eqx.Module):
        w: jax.Array
        unit: jax.Array

        def __call__(self, x):
            return self.unit * (self.w @ x)

    x = jnp.array([[1.0, 0.4], [0.5, -1.0], [-0.7, 0.9], [2.0, 1.0]])
    data = (x, jnp.array([1.0, 1.0, -1.0, 1.0]))
    model = Scaled(jnp.array([0.1, -0.2]), jnp.array(2.0))
    trainable = Scaled(True, False)  # pyright: ignore[reportArgumentType]
    options = {"loss": hf.LogisticLoss(), "trainable": trainable}
    run = hf.flow(model, data, jnp.inf, save_models=True, laws=(), **options)
    return run, data, trainable


def test_margins_come_to_that_of_the_limit(late):
    run, data, trainable = late
    ax = homoflow.plot.margins(run, data, trainable=trainable)
    *lines, limit = ax.lines
    assert len(lines) == len(data[1])
    assert ax.get_xscale() == "log"
    last = np.array([heights(line)[-1] for line in lines])
    level = float(run.limit.margin)
    np.testing.assert_allclose(heights(limit), level)
    np.testing.assert_allclose(last.min(), level, rtol=1e-2)
    assert np.sum(last < 1.01 * level) == int(run.limit.support.sum())
    assert texts(ax)[-1] == "of the limit"


def test_distances_of_directions_fall(late):
    run, _, _ = late
    ax = homoflow.plot.distances({"one layer": run})
    (line,) = ax.lines
    distance = heights(line)
    np.testing.assert_allclose(distance[-1], run.stats["direction_distance"], rtol=1e-6)
    assert distance[-1] < 1e-2 * distance[0]
    assert texts(ax) == ["one layer (degree 1)"]


def test_a_run_without_a_limit_has_no_picture_of_it(single):
    with pytest.raises(ValueError, match="no limit of directions"):
        homoflow.plot.distances({"descent": single})
    with pytest.raises(ValueError, match="no limit of directions"):
        homoflow.plot.margins(single, (X, jnp.sign(X[:, :1])))


def test_saddles_are_plateaus():
    model = hf.MLP((2, 2, 2), activation="linear", key=jax.random.key(0))
    model = jax.tree.map(lambda w: 1e-3 * w, model)
    x = jnp.diag(jnp.array([3.0, 1.0]))
    run = hf.flow(model, (x, x), 60.0, save_models=True, laws=())
    found = hf.saddles(run, (x, x))
    ax = homoflow.plot.saddles(run, found)
    plateaus = [line for line in ax.lines if line.get_linewidth() == 3]
    for line, saddle in zip(plateaus, found, strict=True):
        np.testing.assert_allclose(heights(line), saddle.loss)
        np.testing.assert_allclose(line.get_xdata(), [saddle.arrival, saddle.departure])
    assert [text.get_text().split(",")[0] for text in ax.texts] == ["rank 0", "rank 1"]
