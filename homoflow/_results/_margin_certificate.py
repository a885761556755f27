"""How close a network is to a point of maximal margin."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, PyTree

#: A multiplier below this share of the largest one holds no margin in place.
NEGLIGIBLE = 1e-6


class MarginCertificate(eqx.Module):
    """Karush–Kuhn–Tucker conditions of min ½‖w‖² subject to all margins ≥ 1.

    - `model`: the model, rescaled so that its smallest margin is 1.
    - `degree`: L, the degree of homogeneity of its margins.
    - `margin`: the normalized margin, the smallest one divided by ‖w‖^L.
    - `margins`: of `model`, shape `(m, outputs)` (with class indices, `(m, classes − 1)`).
    - `multipliers`: λ ≥ 0 of each margin, the same shape.
    - `stationarity`: ‖w − Σ λ_i ∇m_i(w)‖ / ‖w‖, which is 0 at a KKT point.
    - `complementarity`: max λ_i (m_i − 1) / ‖w‖², which is 0 there too.
    - `curvature`: the smallest eigenvalue of I − Σ λ_i ∇²m_i on the directions in which
        no support margin changes; NaN where the weights are too many, inf where there is
        no such direction. Above 0 a KKT point is a strict local minimum (the margin can
        grow in no direction); below 0 it is none; a symmetry makes it 0.
    - `moved`: by how much the direction was moved to come here, ‖ŵ − ŵ₀‖ of unit vectors;
        0 where it was not polished.
    - `on_kinks`: which pairs of a sample and a kink of a unit the weights are on; `None`
        for a smooth model, and where the kinks are not known one by one. There ∇m_i may be
        any element of Clarke's subdifferential, and the curvature is that along the kinks
        that hold the weights, on the side where they are of all others.
    - `kink_distance`: the largest distance of a kink that they count as being on,
        |z|/(‖∇z‖·‖w‖).
    """

    model: PyTree
    degree: float
    margin: float
    margins: Float[Array, "m outputs"]
    multipliers: Float[Array, "m outputs"]
    stationarity: float
    complementarity: float
    curvature: float
    moved: float = 0.0
    on_kinks: Bool[Array, "m kinks"] | None = None
    kink_distance: float = 0.0

    @property
    def support(self) -> Bool[Array, "m outputs"]:
        """Which margins hold the weights: those with a multiplier that is not 0."""
        return self.multipliers > NEGLIGIBLE * self.multipliers.max()

    @property
    def residual(self) -> float:
        """The largest of `stationarity`, `complementarity` and `kink_distance`."""
        return max(self.stationarity, self.complementarity, self.kink_distance)

    def is_kkt(self, tolerance: float = 1e-4) -> bool:
        """Whether all residuals are below a tolerance."""
        return self.residual <= tolerance

    def __repr__(self) -> str:
        return (
            f"MarginCertificate(normalized margin {self.margin:.6g}, degree "
            f"{self.degree:.3g}, {int(self.support.sum())} support margins, "
            f"stationarity {self.stationarity:.2g}, complementarity "
            f"{self.complementarity:.2g}, curvature {self.curvature:.2g})"
        )
