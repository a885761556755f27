"""The times of a flow when none are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from homoflow._observe._time_grid import DEFAULT_TIMES, TimeGrid


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_default_times_end_at_t1(dtype):
    times = jax.jit(lambda t1: TimeGrid(0 * t1, t1, None).times())
    for t1 in np.arange(1, 301) / 10:
        found = np.asarray(times(jnp.asarray(t1, dtype)))
        assert found.size == DEFAULT_TIMES
        assert found[0] == 0
        assert np.all(np.diff(found) > 0)
        assert found[-1] == dtype(t1)
