"""What is predicted of the drift of laws, for any learning rate, from one flow."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._dynamics._expansion import warn_unless_drift_expands
from .._jax._tracing import is_concrete
from .._problem._checks import check_batch_size, check_learning_rate, check_momentum
from .._results._trajectory import Trajectory
from ._split_discretization import DiscretizationSplit


class EdgeDrift(eqx.Module):
    """The drift of laws through the edge of stability, for one learning rate.

    - `learning_rate`, `momentum`: η and μ.
    - `parts`: law name → what the mean of the steps does to it, η̃∫q(dw/dτ)dτ with
        η̃ = η(1 + μ)/(1 − μ)², and what their oscillation does, ∫2·(threshold)·tr(AΣ)dτ +
        tr(AΣ): the parts that `homoflow.split_discretization` finds in a descent.
    """

    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    parts: dict[str, DiscretizationSplit]


class DriftPrediction(eqx.Module):
    """How laws will drift under gradient descent, to leading order in the learning rate.

    - `flow`: the gradient flow; `flow.observed["sharpness"].values` is λ_max(∇²L) at its
        times.
    - `integrals`: law name → ∫₀ᵗ q(∇L) ds along the flow, with time as the leading axis;
        q(v) = vᵀAv for a law wᵀAw + bᵀw (componentwise for vectors and matrices of laws).
    - `noise_integrals`: likewise ∫₀ᵗ tr(A S) ds, S the covariance over samples of one
        sample's gradient; `None` unless asked for.
    - `samples`: how many there are; `None` with a custom objective.
    - `edge`: with `edge=True`, the drift for one learning rate; then `flow` is the
        `homoflow.central_flow`, along which the `integrals` are taken.
    """

    flow: Trajectory
    integrals: dict[str, Float[Array, "times ..."]]
    noise_integrals: dict[str, Float[Array, "times ..."]] | None
    samples: int | None = eqx.field(static=True)
    edge: EdgeDrift | None = None

    def drift(
        self,
        learning_rate: float | int | Float[ArrayLike, ""] | None = None,
        momentum: float | int | Float[ArrayLike, ""] | None = None,
        batch_size: int | None = None,
    ) -> dict[str, Float[Array, "times ..."]]:
        """D(t) − D(0) of every law D, at `flow.ts`.

        Gradient descent has D⁺ − D = η² q(∇L) in each step, so that to leading order
        D(t) − D(0) = η ∫₀ᵗ q(∇L) ds. With momentum μ (heavy ball) it is

            h (1+μ)/(1−μ) ∫₀ᵗ q(∇L) ds,   h = η/(1−μ) the time of a step,

        since D_{k+1} − D_k = η²q(v_{k+1}) − 2ηP_{k+1}, P_{k+1} = μ(P_k − ηq(v_k)), and
        v settles at ∇L/(1−μ). Minibatches of B out of m samples, without replacement,
        add their noise in the mean over batches: h ∫₀ᵗ tr(AΣ) ds with
        Σ = S (m − B)/(B(m − 1)), the covariance of a batch's gradient. With momentum
        that is corrected for the batches of one epoch, which have no sample in common
        (as in `homoflow.descend`).

        Through the edge of stability (`edge=True`) it is the mean of D over the
        oscillation, η̃∫q(dw/dτ)dτ + D(w) − D₀ + tr(AΣ) along the central flow.

        **Arguments:**

        - `learning_rate`, `momentum`: η and μ, which is 0 by default. A prediction through
            the edge is of one learning rate and momentum: leave them out.
        - `batch_size`: B; `None` for full batches. Needs a prediction with `noise=True`.

        **Returns:** law name → predicted drift, shape `(times, …)`. The relative error
        falls in proportion to η; in the direction of the sharpness it is about
        r/(1 − r), with r = ηλ_max/(2(1 + μ)) the fraction of the stability limit.

        **Warns:** where r exceeds ½ along the flow: the expansion fails there. (Not
        under jit or vmap, where values are unknown.)

        **Raises:** `ValueError` for bad arguments, a `batch_size` without
        `noise_integrals`, and another learning rate or momentum than that of `edge`.
        """
        if self.edge is not None:
            self._refuse_others(self.edge, learning_rate, momentum, batch_size)
            return {name: parts.whole for name, parts in self.edge.parts.items()}
        if learning_rate is None:
            raise ValueError("Say for which `learning_rate` the drift is predicted.")
        momentum = 0.0 if momentum is None else momentum
        check_learning_rate(learning_rate)
        check_momentum(momentum)
        dtype = self.flow.ts.dtype
        rate, mu = jnp.asarray(learning_rate, dtype), jnp.asarray(momentum, dtype)
        step = rate / (1 - mu)
        factor = step * (1 + mu) / (1 - mu)
        drift = jax.tree.map(lambda i: factor * i, self.integrals)
        if batch_size is not None:
            if self.noise_integrals is None or self.samples is None:
                raise ValueError(
                    "The noise of batches was not integrated: pass `noise=True` to "
                    "`homoflow.predict_drift`."
                )
            check_batch_size(batch_size, self.samples)
            noise = step * _noise_of_batches(mu, self.samples, batch_size)
            drift = jax.tree.map(
                lambda d, n: d + noise * n, drift, self.noise_integrals
            )
        warn_unless_drift_expands(self.flow, learning_rate, momentum)
        return drift

    def _refuse_others(
        self, edge: EdgeDrift, learning_rate: Any, momentum: Any, batch_size: int | None
    ) -> None:
        """`ValueError` for what this prediction through the edge is not of."""
        if batch_size is not None:
            raise ValueError(
                "A prediction through the edge of stability is of full batches: leave "
                "`batch_size` out."
            )
        for name, given, own in (
            ("learning_rate", learning_rate, edge.learning_rate),
            ("momentum", momentum, edge.momentum),
        ):
            if given is None:
                continue
            if not is_concrete((given, own)) or not np.all(
                np.asarray(given, own.dtype) == own
            ):
                raise ValueError(
                    f"This prediction goes through the edge of stability with {name} "
                    f"{own}, and is of no other: leave `{name}` out, or call "
                    "`homoflow.predict_drift` again."
                )

    def __repr__(self) -> str:
        noise = "" if self.noise_integrals is None else ", with the noise of batches"
        edge = "" if self.edge is None else ", through the edge of stability"
        laws = list(self.integrals)
        return f"DriftPrediction(laws: {laws}{noise}{edge}; {self.flow!r})"


def _noise_of_batches(momentum: Array, samples: int, size: int) -> Float[Array, ""]:
    """What tr(A S) is multiplied by: (1 − μ²) Σ_jk μ^{j+k} cov(j, k), cov of batches.

    The gradients of batches j and k steps ago are independent unless both are of one
    epoch; then they have no sample in common, and their covariance is −S/(m − 1).
    Averaged over the places that a step can have in its epoch.
    """
    if samples == size:
        return jnp.zeros_like(momentum)
    mu, length = momentum, samples // size
    variance = (samples - size) / (size * (samples - 1))
    shared = -size / (samples - size)
    done = jnp.arange(1, length + 1, dtype=mu.dtype)
    # Σ μʲ over the steps of one epoch, squared: of this one, and of all before.
    this = ((1 - mu**done) / (1 - mu)) ** 2
    before = (mu**done * (1 - mu**length) / (1 - mu)) ** 2 / (1 - mu ** (2 * length))
    together = jnp.mean(this + before)
    return variance * ((1 - shared) + shared * (1 - mu**2) * together)
