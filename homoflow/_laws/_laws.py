"""`laws`: the conserved quantities of a model."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from .._jax._tracing import is_concrete
from .._models import MatrixFactorization, factorization_objective
from .._problem._losses import LossLike, SoftmaxCrossEntropy, SquaredLoss
from .._problem._trainable import Trainable, trainable_mask
from ._example import check_example
from ._law import Laws
from ._layer_laws import (
    factorization_laws,
    follows_layers,
    network_laws,
    output_sum_laws,
)
from ._residuals import threshold, violations_at_random_weights
from .search._search import search


def laws(
    model: PyTree,
    x_example: PyTree | None = None,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    *,
    objective: Callable[[PyTree, PyTree], Scalar] | None = None,
    trainable: Trainable = None,
    batched: bool = False,
) -> Laws:
    """The quantities that gradient flow on `model` conserves exactly.

    Each law is an object with a `name` and `value(model)` = wᵀAw + bᵀw (no ½). Those of
    homoflow's own models are read off the layers [Du, Hu & Lee 2018]:

    - `neurons[h]` (Thm 2.1): ‖W_h[i,:]‖² − ‖W_{h+1}[:,i]‖², a vector over the neurons i
        of hidden layer h; with a bias + b_h[i]². `channels[h]` for convolutions.
    - `layers[h]` (Cor 2.1, Thm 2.3): ‖W_h‖_F² − ‖W_{h+1}‖_F², a scalar; of the free
        weights v where weights are shared.
    - `matrix[h]` (Thm 2.2): W_h W_hᵀ − W_{h+1}ᵀ W_{h+1}, a matrix, where φ_h is the
        identity.
    - for an activation of degree k, k times the outgoing weights;
    - `output_sums[N]`, `output_bias_sum[N]`: column sums of the output layer, for
        `SoftmaxCrossEntropy`.

    Any other Equinox module is traced with `x_example`. Every operation constrains how
    its operands may be rescaled without changing the output; the rescalings that are
    left, over the rationals, are laws such as `rows[layers[0].weight]`, which become
    matrix laws where units only ever meet linear maps. Sums of weights that no gradient
    changes (before softmax and normalization layers) come from gradients. Each law is
    then certified: ⟨2Aw + b, ∇L(w)⟩ = 0 to 1e-12 of the terms that cancel, in float64, at
    random weights, data and targets. Laws named `sums`, `entries` and `quadratic` rest on
    such data alone (of sizes up to 10⁴), the others on the structure too.

    **Arguments:**

    - `model`: an Equinox module.
    - `x_example`: one input sample; with `objective`, an example of its `data`; with
        `batched`, a batch. Of integers, the largest sets the range that is drawn from.
    - `loss`: the loss the model is trained with.
    - `objective`: `(model, data) -> scalar` instead of a loss. The laws of homoflow's own
        models are then kept only if they are certified, in the model's dtype.
    - `trainable`: an Equinox filter. A law that involves a frozen array does not hold,
        and is left out.
    - `batched`: the model maps a whole batch to its predictions (batch statistics).

    **Returns:** an iterable with a length. Its `note` says why, if there is no law: none
    is ever guessed. `approximate` holds what is conserved only nearly (normalization
    with ε > 0), with the measured violation.

    **Raises:** `ValueError` if nothing is trainable, if the model cannot be called with
    `x_example`, or if `objective` is given without an example of its data.

    ```python
    import equinox as eqx

    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    for law in hf.laws(model, jnp.ones(4)):
        print(law.name, law.value(model).shape)  # rows[layers[0].weight] (8,)
    ```
    """
    if follows_layers(model) and not batched:
        if objective is None and x_example is not None:
            check_example(model, x_example, batched=False)
        return known_laws(
            model, x_example, loss, objective=objective, trainable=trainable
        )
    mask = trainable_mask(model, trainable)
    name = type(model).__name__
    if x_example is None:
        return Laws(
            (),
            f"The laws of {name} are not known: pass `x_example`, one input sample, to "
            "search for them.",
        )
    if not is_concrete((model, x_example)):
        return Laws((), f"The laws of {name} cannot be searched for inside a trace.")
    if objective is None:
        check_example(model, x_example, batched=batched)
    return search(model, mask, x_example, loss, objective, batched=batched)


def known_laws(
    model: PyTree,
    x_example: PyTree | None,
    loss: LossLike,
    *,
    objective: Callable[[PyTree, PyTree], Scalar] | None,
    trainable: Trainable,
) -> Laws:
    """The laws that can be read off a model without a search, also inside a trace."""
    mask = trainable_mask(model, trainable)
    found = _laws_of_layers(model, None if objective is not None else loss)
    found = _drop_frozen(found, model, mask)
    if objective is None or not len(found) or objective is factorization_objective:
        return found
    if x_example is None:
        raise ValueError(
            "With `objective`, pass an example of its data as `x_example`: the laws are "
            "certified against that objective, and cannot be without data."
        )
    return _certify(found, objective, model, x_example, mask)


def _laws_of_layers(model: PyTree, loss: LossLike | None) -> Laws:
    if not follows_layers(model):
        return Laws(
            (),
            f"The laws of {type(model).__name__} are not known: find them with "
            "`homoflow.laws`, and pass them as `laws`.",
        )
    if isinstance(model, MatrixFactorization):
        return Laws(factorization_laws(model))
    items, note = network_laws(model)
    if isinstance(loss, SoftmaxCrossEntropy):
        items += output_sum_laws(model)
    return Laws(items, note)


def _drop_frozen(found: Laws, model: PyTree, mask: PyTree) -> Laws:
    trained = {
        path
        for (path, _), m in zip(
            jax.tree_util.tree_leaves_with_path(model),
            jax.tree.leaves(mask),
            strict=True,
        )
        if m
    }
    keep = [law.paths() <= trained for law in found]
    return found.where(keep, "Laws that involve a frozen array are left out.")


def _certify(
    found: Laws, objective: Callable, model: PyTree, data: PyTree, mask: PyTree
) -> Laws:
    # Inside a trace the values are unknown, but the shapes are not: any numbers will do.
    with jax.ensure_compile_time_eval():
        model, data = _make_concrete((model, data))
        violations = violations_at_random_weights(
            found.items, objective, model, data, mask
        )
    if not is_concrete(violations):
        return Laws((), "The objective depends on traced values: no law was certified.")
    limit = threshold(violations.dtype)
    return found.where(
        [v <= limit for v in violations.tolist()],
        "The objective breaks the other balance laws of this model's layers.",
    )


def _make_concrete(tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [_stand_in(leaf) for leaf in leaves])


def _stand_in(leaf):
    if not isinstance(leaf, jax.core.Tracer):
        return leaf
    if not eqx.is_inexact_array(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)
