"""`split_discretization`: what the mean of the steps does to laws, and what their swing."""

from collections.abc import Iterable
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax._arguments import check_instance
from .._jax._compilation import fast_compile_jit
from .._laws import Law, Laws
from .._laws._as_laws import as_laws
from .._problem._checks import check_laws
from .._problem._trainable import Trainable, trainable_mask
from .._results._single_run import check_single_run
from .._results._trajectory import Trajectory


@final
class DiscretizationSplit(eqx.Module):
    """What discretization does to one law, in two parts, at `ts` of the run.

    - `mean`: by the steps without their swing from side to side.
    - `oscillation`: by the swing.
    """

    mean: Float[Array, "times ..."]
    oscillation: Float[Array, "times ..."]

    @property
    def whole(self) -> Float[Array, "times ..."]:
        """Σ q(u) over the steps, the ledger's `discretization`."""
        return self.mean + self.oscillation


def split_discretization(
    run: Trajectory, laws: Iterable[Law], *, trainable: Trainable = None
) -> dict[str, DiscretizationSplit]:
    """What the steps of a descent do to each law, by their mean and by their oscillation.

    A step w⁺ = w + u changes a law wᵀAw by q(u) = uᵀAu beyond first order: the ledger's
    `discretization`. At the edge of stability u swings from side to side. Since

        ½(q(u) + q(u′)) = q((u + u′)/2) + q((u − u′)/2)

    for any two vectors, the sum over all steps divides exactly: `oscillation` is
    Σ q((u_s − u_{s−1})/2), and `mean` is the rest, Σ q((u_s + u_{s−1})/2) and half of the
    first and of the last q(u). For gradient descent that oscillates around its central
    flow they are η∫q(dw/dτ)dτ and ∫(4/η)·tr(AΣ)dτ (`homoflow.central_flow`, whose
    `observed["edge_drift"]` is the latter).

    **Arguments:**

    - `run`: of `homoflow.descend` with `record_every=1` and `save_models=True`; one run,
        outside of jit and vmap.
    - `laws`: quadratic laws, such as `homoflow.laws(model, x[0])`.
    - `trainable`: as it was for the run.

    **Returns:** law name → `homoflow.DiscretizationSplit`, in the dtype of the weights. It
    is 0 before the first step, and NaN from where the run failed.

    **Raises:** `ValueError` for a batch, and for a run that has not saved every step.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    gd = hf.descend(model, (x, x[:, :1]), 50, learning_rate=0.1, save_models=True)
    split = hf.split_discretization(gd, hf.laws(model, x[0]))["neurons[1]"]
    split.oscillation[-1]  # small beside split.mean[-1]: this descent does not oscillate
    ```
    """
    check_instance("run", run, Trajectory, "a trajectory of `homoflow.descend`")
    check_laws(laws)
    check_single_run("split_discretization", run)
    if run.models is None or run.stats["optimizer"] is None:
        raise ValueError(
            "The steps of the run are not known: take one of `homoflow.descend` with "
            "`save_models=True`."
        )
    if int(run.stats["steps"]) > run.ts.size - 1:
        raise ValueError(
            f"The run has recorded {run.ts.size} models of {int(run.stats['steps'])} "
            "steps: every step is needed, `record_every=1`."
        )
    weights = eqx.filter(run.models, trainable_mask(run.model, trainable))
    return _split(weights, as_laws(laws))


@fast_compile_jit
def _split(weights: PyTree, laws: Laws) -> dict[str, DiscretizationSplit]:
    updates = jax.tree.map(lambda w: jnp.diff(w, axis=0), weights)

    def quadratic(vectors: PyTree) -> dict[str, Array]:
        """q(v) of every law, for vectors one after the other."""
        return jax.lax.map(
            lambda v: {law.name: law.quadratic(v) for law in laws}, vectors
        )

    swings = jax.tree.map(lambda u: jnp.diff(u, axis=0) / 2, updates)
    whole = jax.tree.map(lambda q: _sums(q, 1), quadratic(updates))
    swung = jax.tree.map(lambda q: _sums(q, 2), quadratic(swings))
    return {
        name: DiscretizationSplit(whole[name] - swung[name], swung[name])
        for name in whole
    }


def _sums(terms: Float[Array, "steps ..."], zeros: int) -> Float[Array, "times ..."]:
    """Sums over the steps so far, after as many zeros as there were no terms."""
    sums = jnp.cumsum(terms, axis=0)
    return jnp.concatenate([jnp.zeros_like(sums, shape=(zeros, *sums.shape[1:])), sums])
