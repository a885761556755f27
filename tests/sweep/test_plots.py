"""Pictures of sweeps: what is drawn, where, and what is refused."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from homoflow import plot


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def values():
    shape = {"seed": 11, "scale": 2, "rate": 3, "time": 4}
    numbers = 10 ** np.random.default_rng(0).uniform(-2, 1, tuple(shape.values()))
    coords = {"seed": range(11), "scale": [0.5, 2.0], "rate": [0.01, 0.1, 1.0]}
    coords["time"] = [0.0, 1.0, 2.0, 5.0]
    return xr.DataArray(numbers, coords, tuple(shape), name="losses")


def test_a_band_is_the_quantiles_over_seeds(values):
    shown = values.sel(rate=0.1)
    ax = plot.bands(shown, by="scale")
    for i, line in enumerate(ax.lines):
        own = shown.isel(scale=i).values
        np.testing.assert_allclose(line.get_ydata(), np.median(own, axis=0))
        np.testing.assert_array_equal(line.get_xdata(), values.time)
        low, high = np.quantile(own, [0.1, 0.9], axis=0)
        area = ax.collections[i].get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([area.min(), area.max()], [low.min(), high.max()])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["scale = 0.5, 11 seeds", "scale = 2, 11 seeds"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")


def test_a_step_size_as_abscissa_is_logarithmic(values):
    ax = plot.bands(values.isel(time=-1, scale=0))
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "rate")


def test_times_that_differ_between_settings_are_used(values):
    ts = values.time * values.rate
    other = values.drop_vars("time").assign_coords(t=ts.drop_vars("time"))
    ax = plot.bands(other.isel(scale=0), by="rate")
    for i, line in enumerate(ax.lines):
        np.testing.assert_allclose(line.get_xdata(), values.time * values.rate[i])
    with pytest.raises(ValueError, match="recorded at different times"):
        plot.bands(other.isel(seed=0), over="rate", by="scale")
    with pytest.raises(ValueError, match="no numbers to draw over"):
        plot.bands(values.drop_vars("time").isel(scale=0), by="rate")


def test_the_axis_ends_where_runs_diverge(values):
    diverged = values.copy(deep=True)
    diverged[{"rate": 2, "time": slice(2, None)}] = 1e264
    start = float(values.isel(scale=0, time=0).max())
    ax = plot.bands(diverged.isel(scale=0), by="rate")
    low, high = ax.get_ylim()
    assert 1e5 * start < high <= 1e10 * start
    assert 0 < low < float(values.min())
    for ax in plot.panels(diverged, "scale", "rate").flat:
        assert ax.get_ylim()[1] == 1e6 * float(values.isel(time=0).max())


def test_panels_are_where_their_settings_are(values):
    axes = plot.panels(values, "scale", "rate")
    assert axes.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        wanted = np.median(values.isel(scale=i, rate=j), axis=0)
        np.testing.assert_allclose(axes[i, j].lines[0].get_ydata(), wanted)
    assert [ax.get_title() for ax in axes[0]] == [
        "rate = 0.01",
        "rate = 0.1",
        "rate = 1",
    ]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["scale = 0.5", "scale = 2"]


def test_a_heat_map_has_a_cell_for_each_pair(values):
    shown = values.median("seed").isel(time=-1)
    shown[0, 1] = np.nan
    ax = plot.heat_map(shown, "rate", "scale")
    cells = ax.collections[0].get_array().reshape(2, 3)
    np.testing.assert_allclose(cells.filled(np.nan), shown.values)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.01", "0.1", "1"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.5", "2"]


REFUSED = {
    "two abscissas": (lambda v: plot.bands(v, by="scale"), "rate, time is left"),
    "no such dimension": (lambda v: plot.bands(v, over="sede"), "no dimension 'sede'"),
    "a data set": (lambda v: plot.bands(v.to_dataset()), "such as `data.losses`"),
    "an array": (lambda v: plot.heat_map(v.values, "a", "b"), "such as `data.losses`"),
    "too many": (lambda v: plot.heat_map(v, "rate", "scale"), "seed, time is left"),
    "panels of too many": (
        lambda v: plot.panels(v.expand_dims(extra=2), "rate", "scale"), "one abscissa"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("draw", "message"), REFUSED.values(), ids=REFUSED)
def test_pictures_of_the_wrong_kind(values, draw, message):
    with pytest.raises((TypeError, ValueError), match=message):
        draw(values)
