"""What was recorded at the times that there are, when numbers are known.

By NumPy: JAX would compile a program for every number of times.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from ._ledger import Account, Ledger


def at_known_times(tree: PyTree, times: int) -> PyTree[np.ndarray]:
    """Arrays over time, at the first so many times."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:times], tree)


def nan_unless_known(
    valid: Bool[np.ndarray, " times"], over_time: PyTree[np.ndarray]
) -> PyTree[np.ndarray]:
    """Arrays over time, with NaN in the floating-point ones where not `valid`."""

    def mask(values: np.ndarray) -> np.ndarray:
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            return values
        values = values.copy()
        values[~valid] = np.nan
        return values

    return over_time if valid.all() else jax.tree.map(mask, over_time)


def ledger_at_known_times(ledger: Ledger, valid: Bool[np.ndarray, " times"]) -> Ledger:
    """A ledger at the times of `valid`, with NaN where it is false."""
    times = len(valid)

    def known(account: Account) -> Account:
        over_time = at_known_times((account.observed, account.parts), times)
        observed, parts = nan_unless_known(valid, over_time)
        # Of the steps that start at these times: none starts at the last.
        batch = nan_unless_known(valid[:-1], at_known_times(account.batch, times - 1))
        rounding = at_known_times(account.largest_rounding, times)
        return Account(*jax.device_put((observed, parts, batch, rounding)))

    accounts = {name: known(account) for name, account in ledger.items()}
    return dataclasses.replace(ledger, accounts=accounts)
