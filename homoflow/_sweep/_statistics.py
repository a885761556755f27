"""Statistics of a sweep's data set, over its seeds or any other axis."""

import math
import warnings
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from ._dataset import import_xarray


def fraction(
    is_true: Any, over: str | tuple[str, ...], *, confidence: float = 0.95
) -> Any:
    """The fraction of settings for which something holds, with a binomial interval.

    The interval is Wilson's [Wilson 1927, J. Amer. Statist. Assoc. 22, 209–212]: for k of n
    and the normal quantile z, (p̂ + z²/2n ± z√(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n). It lies
    in [0, 1], and is not empty where all or none hold.

    **Arguments:**

    - `is_true`: a `DataArray` of booleans, such as `data.result == "successful"`.
    - `over`: the dimension (or dimensions) that are counted, such as `"seed"`.
    - `confidence`: how often such an interval has the true probability in it.

    **Returns:** an `xarray.Dataset` of `estimate`, `low`, `high` and `count`.

    ```python
    data = hf.sweep(
        lambda seed: jax.random.normal(jax.random.key(seed)),
        {"seed": range(100)},
        progress=False,
    )
    hf.fraction(data.value > 0, "seed").estimate
    ```
    """
    xr = import_xarray()
    _check_array("is_true", is_true)
    if is_true.dtype != bool:
        raise TypeError(
            "`is_true` must hold booleans, such as those of `data.losses < 0.1`; got "
            f"{is_true.dtype}."
        )
    z = _normal_quantile(confidence)
    count = math.prod(is_true.sizes[dim] for dim in _dims(is_true, over))
    share = is_true.mean(over)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    spread = spread * z / (1 + z**2 / count)
    # At the ends rounding must not step over what the formula gives exactly.
    low, high = (
        xr.where(share == 0, 0.0, middle - spread),
        xr.where(share == 1, 1.0, middle + spread),
    )
    return xr.Dataset({"estimate": share, "low": low, "high": high, "count": count})


def mean_band(
    values: Any, over: str | tuple[str, ...], *, confidence: float = 0.95
) -> Any:
    """The mean over an axis, and an interval for it by its standard error.

    The interval is the mean ± t·s/√n with Student's quantile t for n − 1 degrees of
    freedom. NaN are left out, and n counts what is left; of fewer than two values the
    interval is NaN.

    **Returns:** an `xarray.Dataset` of `estimate`, `low`, `high` and `count`.

    ```python
    data = hf.sweep(
        lambda seed: jax.random.normal(jax.random.key(seed)),
        {"seed": range(100)},
        progress=False,
    )
    hf.mean_band(data.value, "seed").high
    ```
    """
    xr = import_xarray()
    _check_array("values", values)
    _dims(values, over)
    _check_confidence(confidence)
    count = values.notnull().sum(over)
    mean = values.mean(over)
    error = values.std(over, ddof=1) / np.sqrt(count)
    counts = np.unique(count).tolist()
    quantiles = {n: _student_quantile(confidence, n - 1) for n in counts}
    factor = xr.apply_ufunc(np.vectorize(quantiles.__getitem__, [float]), count)
    return xr.Dataset(
        {
            "estimate": mean,
            "low": mean - factor * error,
            "high": mean + factor * error,
            "count": count,
        }
    )


def quantile_band(
    values: Any,
    over: str | tuple[str, ...],
    *,
    quantiles: tuple[float, float] = (0.1, 0.9),
) -> Any:
    """The median over an axis, and two quantiles around it; NaN are left out.

    **Returns:** an `xarray.Dataset` of `estimate` (the median), `low`, `high` and `count`.

    ```python
    data = hf.sweep(
        lambda seed: jax.random.normal(jax.random.key(seed)),
        {"seed": range(100)},
        progress=False,
    )
    hf.quantile_band(data.value, "seed").estimate
    ```
    """
    xr = import_xarray()
    _check_array("values", values)
    _dims(values, over)
    low, high = quantiles
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"`quantiles` must be two increasing numbers in [0, 1]; got {quantiles}."
        )
    with warnings.catch_warnings():
        # NumPy warns where no setting has a number: there is none to give.
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        found = values.quantile([low, 0.5, high], over, skipna=True)
    parts = {
        name: found.isel(quantile=i, drop=True)
        for i, name in enumerate(("low", "estimate", "high"))
    }
    return xr.Dataset({**parts, "count": values.notnull().sum(over)})


def slope_fit(
    values: Any, along: str, *, log: bool = True, confidence: float = 0.95
) -> Any:
    """The slope of a straight line through values along an axis, by least squares.

    With `log` the line is through the logarithms of both: the slope is the exponent of a
    power law, such as the rate in the width, the step size or the scale. The interval is
    the slope ± t·(its standard error), with Student's quantile for n − 2 degrees of
    freedom; of two values it is NaN.

    **Arguments:**

    - `values`: a `DataArray`; values (and with `log` also those that are not positive)
        that are no numbers are left out.
    - `along`: the dimension whose coordinate is the abscissa, such as `"learning_rate"`.

    **Returns:** an `xarray.Dataset` of `estimate`, `low`, `high`, `intercept` and `count`.

    ```python
    data = hf.sweep(lambda x: 3 * x**2, {"x": [1.0, 2.0, 4.0]}, progress=False)
    hf.slope_fit(data.value, "x").estimate  # 2
    ```
    """
    xr = import_xarray()
    _check_array("values", values)
    _dims(values, along)
    _check_confidence(confidence)
    if along not in values.coords or values[along].dtype.kind not in "iuf":
        raise ValueError(
            f"`{along}` has no numbers to fit a line over: its values are names or indices."
        )
    names = ("estimate", "low", "high", "intercept", "count")
    found = xr.apply_ufunc(
        lambda x, y: _fits(np.asarray(x, float), np.asarray(y, float), log, confidence),
        values[along],
        values,
        input_core_dims=[[along], [along]],
        output_core_dims=[[] for _ in names],
    )
    return xr.Dataset(dict(zip(names, found, strict=True)))


def _fits(x: np.ndarray, y: np.ndarray, log: bool, confidence: float) -> tuple:
    rows = [_fit(x, row, log, confidence) for row in y.reshape(-1, y.shape[-1])]
    columns = np.array(rows).T
    return tuple(column.reshape(y.shape[:-1]) for column in columns)


def _fit(
    x: np.ndarray, y: np.ndarray, log: bool, confidence: float
) -> tuple[float, float, float, float, float]:
    good = np.isfinite(x) & np.isfinite(y)
    if log:
        good &= (x > 0) & (y > 0)
        x, y = (np.log(np.where(good, part, 1.0)) for part in (x, y))
    x, y, count = x[good], y[good], int(good.sum())
    if count < 2 or np.ptp(x) == 0:
        return (np.nan, np.nan, np.nan, np.nan, float(count))
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    intercept = float(y.mean() - slope * x.mean())
    residuals = dy - slope * dx
    spread = np.nan
    if count > 2:
        variance = residuals @ residuals / (count - 2)
        error = float(np.sqrt(variance / (dx @ dx)))
        spread = _student_quantile(confidence, count - 2) * error
    return (slope, slope - spread, slope + spread, intercept, float(count))


def _check_array(name: str, values: Any) -> None:
    xr = import_xarray()
    if not isinstance(values, xr.DataArray):
        raise TypeError(
            f"`{name}` must be a variable of a data set, such as `data.losses`; got "
            f"{type(values).__name__}."
        )


def _dims(values: Any, over: str | tuple[str, ...]) -> tuple[str, ...]:
    dims = (over,) if isinstance(over, str) else tuple(over)
    for dim in dims:
        if dim not in values.dims:
            raise ValueError(
                f"There is no dimension {dim!r}: there are {', '.join(values.dims)}."
            )
    return dims


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1); got {confidence}.")


def _normal_quantile(confidence: float) -> float:
    """z with a probability of `confidence` between −z and z."""
    _check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _student_quantile(confidence: float, freedom: int) -> float:
    """t with a probability of `confidence` between −t and t; NaN without freedom."""
    if freedom < 1:
        return np.nan
    return _bisect(lambda t: _student_probability(t, int(freedom)), confidence)


def _student_probability(t: float, freedom: int) -> float:
    """P(|T| < t) [Abramowitz & Stegun 1964, 26.7.3 and 26.7.4]."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine, is_odd = math.cos(angle), math.sin(angle), freedom % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def _bisect(increasing: Callable[[float], float], value: float) -> float:
    """Where an increasing function has a value, to rounding."""
    low, high = 0.0, 1.0
    while increasing(high) < value:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < value else (low, middle)
    return (low + high) / 2
