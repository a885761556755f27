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
