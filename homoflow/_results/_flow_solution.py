"""Where the gradient flow goes from the iterates of a descent."""

from typing import final

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PyTree


@final
class FlowSolution(eqx.Module):
    """Ends of the gradient flows that start from iterates of a descent.

    - `ts`: the times of the iterates.
    - `losses`, `sharpness`: L and λ_max(∇²L) at the ends, NaN where a flow did not end.
    - `distances`: ‖end − iterate‖, NaN there too.
    - `models`: the models at the ends, their arrays with a leading axis over `ts`.
    - `results`: the name of the result of each flow, such as `successful`.
    - `kinds`: what kind of a stationary point each has ended at; empty where it did not.
    """

    ts: Float[Array, " starts"]
    losses: Float[Array, " starts"]
    sharpness: Float[Array, " starts"]
    distances: Float[Array, " starts"]
    models: PyTree
    results: tuple[str, ...] = eqx.field(static=True)
    kinds: tuple[str, ...] = eqx.field(static=True)

    def __repr__(self) -> str:
        ended = sum(result == "successful" for result in self.results)
        sharpness = np.asarray(self.sharpness)
        shown = sharpness[np.isfinite(sharpness)]
        extent = f"{shown.min():.4g} to {shown.max():.4g}" if shown.size else "unknown"
        count = f"{ended} of {len(self.results)} flows ended"
        return f"FlowSolution({count}, sharpness {extent})"
