"""A saddle that a flow has visited."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, PyTree

from ._stationary_kind import StationaryKind


class Saddle(eqx.Module):
    """A stationary point near which a flow has lingered, and left.

    - `model`: the point itself, by Newton's method from where the flow was slowest.
    - `loss`, `gradient_norm`: L and ‖∇L‖ there.
    - `distance`: how far the flow was from it at its slowest recorded time, relative to
        the largest ‖w‖ of the run.
    - `arrival`, `departure`: when the loss passed half-way between this plateau and the one
        before, and after; `arrival` is 0 for the first, `departure` NaN where the run ended
        on the plateau. `time_error`: half the time between the records on either side of
        the departure.
    - `kind`: a strict saddle, or a degenerate one without negative curvature.
    - `smallest_eigenvalue` of the Hessian there, `negative_eigenvalues` how many are below
        0 by more than 1e-6 of ‖∇²L‖ at the run's end. Without any it is degenerate.
    - `escape`: the unit direction in which the flow left, the trained arrays of a model:
        where it was when a thousandth of the way down to the next plateau was done, seen
        from the saddle, and of that the part in the directions of negative curvature (at a
        degenerate saddle all of it). It need not be that of the smallest eigenvalue: what
        has grown for longer comes first.
    - `ranks`: of every trained matrix, by its path in the model.
    - `active`: which trained weights are not (nearly) 0, a model of booleans.
    """

    model: PyTree
    loss: float
    gradient_norm: float
    distance: float
    arrival: float
    departure: float
    time_error: float
    kind: StationaryKind
    smallest_eigenvalue: float
    negative_eigenvalues: int
    escape: PyTree[Float[Array, "..."]]
    ranks: dict[str, int]
    active: PyTree[Bool[Array, "..."]]

    def __repr__(self) -> str:
        ranks = ", ".join(f"{path} of rank {rank}" for path, rank in self.ranks.items())
        return (
            f"Saddle(t = {self.arrival:.6g} … {self.departure:.6g}, loss {self.loss:.6g}, "
            f"smallest eigenvalue {self.smallest_eigenvalue:.3g}"
            f"{'; ' + ranks if ranks else ''})"
        )
