"""Statistics of sweeps, beside SciPy's and closed forms."""

import warnings

import numpy as np
import pytest
import scipy.stats
import xarray as xr

import homoflow as hf
from homoflow._sweep._statistics import _student_quantile


def array(values, *dims, **coords):
    return xr.DataArray(np.asarray(values), dims=dims, coords=coords)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (499, 1000), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_fractions_have_wilsons_interval(k, n, confidence):
    found = hf.fraction(array(np.arange(n) < k, "seed"), "seed", confidence=confidence)
    wanted = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(found.estimate, k / n)
    np.testing.assert_allclose([found.low, found.high], wanted, rtol=1e-12, atol=1e-15)
    assert found["count"] == n


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 999])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_quantiles_of_student(freedom, confidence):
    wanted = scipy.stats.t.ppf((1 + confidence) / 2, freedom)
    np.testing.assert_allclose(
        _student_quantile(confidence, freedom), wanted, rtol=1e-11
    )


def test_means_leave_out_nan():
    values = np.random.default_rng(0).standard_normal((3, 20))
    values[1, 5:9] = np.nan
    values[2, 1:] = np.nan
    found = hf.mean_band(array(values, "scale", "seed"), "seed", confidence=0.9)
    for row, own in zip(
        values[:2], found.to_dataframe().to_dict("records"), strict=False
    ):
        known = row[np.isfinite(row)]
        low, high = scipy.stats.t.interval(
            0.9, len(known) - 1, known.mean(), scipy.stats.sem(known)
        )
        np.testing.assert_allclose(
            [own["estimate"], own["low"], own["high"], own["count"]],
            [known.mean(), low, high, len(known)],
            rtol=1e-11,
        )
    assert np.isnan(found.low[2])
    assert found["count"][2] == 1


def test_quantiles_are_those_of_numpy():
    values = np.random.default_rng(1).standard_normal((2, 30, 4))
    values[0, 3] = np.nan
    values[1, :, 2] = np.nan  # No seed has a number there.
    found = hf.quantile_band(
        array(values, "a", "seed", "time"), "seed", quantiles=(0.2, 0.7)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = np.nanquantile(values, [0.2, 0.5, 0.7], axis=1)
    for name, row in zip(("low", "estimate", "high"), wanted, strict=True):
        np.testing.assert_allclose(found[name], row, rtol=1e-14)
    assert found["count"].values.tolist() == [[29] * 4, [30, 30, 0, 30]]


def test_slopes_are_those_of_linear_regression():
    rng = np.random.default_rng(2)
    width = np.array([10, 20, 40, 80, 160])
    noise = rng.standard_normal((3, 5))
    values = 3 * width**-0.5 * np.exp(0.1 * noise)
    values[2, 1] = np.nan
    found = hf.slope_fit(array(values, "seed", "width", width=width), "width")
    for i, row in enumerate(values):
        good = np.isfinite(row)
        fit = scipy.stats.linregress(np.log(width[good]), np.log(row[good]))
        t = scipy.stats.t.ppf(0.975, good.sum() - 2)
        own = found.isel(seed=i)
        np.testing.assert_allclose(own.estimate, fit.slope, rtol=1e-12)
        np.testing.assert_allclose(own.high - own.estimate, t * fit.stderr, rtol=1e-9)
        np.testing.assert_allclose(own.intercept, fit.intercept, rtol=1e-12)
    straight = array([1.0, 3.0], "x", x=[0.0, 1.0])
    assert hf.slope_fit(straight, "x", log=False).estimate == 2
    assert np.isnan(hf.slope_fit(straight, "x", log=False).low)


REFUSED = {
    "numbers": (lambda: hf.mean_band(np.ones(3), "seed"), "must be a variable"),
    "dimension": (
        lambda: hf.mean_band(array([1.0], "seed"), "sede"), "no dimension 'sede'.* seed"
    ),
    "no booleans": (lambda: hf.fraction(array([1.0], "x"), "x"), "must hold booleans"),
    "confidence": (
        lambda: hf.fraction(array([True], "x"), "x", confidence=95), r"lie in \(0, 1\)"
    ),
    "quantiles": (
        lambda: hf.quantile_band(array([1.0], "x"), "x", quantiles=(0.9, 0.1)), "increasing"
    ),
    "names": (
        lambda: hf.slope_fit(array([1.0, 2.0], "fn", fn=["a", "b"]), "fn"), "no numbers to"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_statistics_of_the_wrong_kind(refused, call, message):
    refused(call, message, (TypeError, ValueError))
