"""What the parts of one run have cost together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ._trajectory import Trajectory

#: What is the largest, or the first, of any part; all other numbers add up.
_LARGEST = ("law_violation", "largest_sliding_set")
_FIRST = ("first_nonunique_time",)


def totals(parts: Sequence[Trajectory]) -> dict[str, jax.Array]:
    """The numbers of `stats` of a run in parts, `time_reached` that of the last.

    Those that the last part has; one that another part does not know adds nothing.
    """
    found = {}
    # In NumPy: for every number of parts JAX would compile.
    for name in parts[-1].stats.numbers:
        known = [part.stats[name] for part in parts if part.stats[name] is not None]
        values = np.asarray(known)
        if name in _LARGEST:
            total = np.max(values, axis=0)
        elif name in _FIRST:
            total = np.fmin.reduce(values, axis=0)
        else:
            total = np.sum(values, axis=0)
        found[name] = jnp.asarray(total)
    found["time_reached"] = parts[-1].stats["time_reached"]
    return found
