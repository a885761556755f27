"""`track`: the budget of conservation laws, in anyone's own training loop."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._jax._text import path_text
from .._laws import Law, Laws
from .._laws._as_laws import as_laws
from .._laws._bilinear_forms import LawValues
from .._laws._law import leaf_at
from .._results._ledger import Ledger
from ._factory import as_transformation, one_set_of_weights
from ._law_budget import BudgetTerms, LawBudget, Step, unit_of_rounding
from ._read_update import read_update
from ._update_parts import ALL_PARTS, UpdateParts, starts_from_weights, update_parts


class Tracked(eqx.Module):
    """The state of `track`; `tracked` makes a `Ledger` of it.

    - `start`: the laws at the first weights.
    - `terms`: the budget so far; `steps`: how many; `size`: of the largest weights so
        far, for what rounding can do.
    - `inner`: the state of the optimizer inside, if there is one.
    """

    budget: LawBudget
    start: LawValues
    terms: BudgetTerms
    steps: Int[Array, ""]
    size: Float[Array, ""]
    inner: Any


def track(
    laws: Iterable[Law],
    optimizer: optax.GradientTransformation | optax.MultiSteps | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation that accounts for what training does to conservation laws.

    It changes no update. Around a whole optimizer, `track(laws, optimizer)`, it sees the
    gradients and keeps the full account of `homoflow.Ledger`. At the end of a chain,
    `optax.chain(..., track(laws))`, it sees what the chain makes of them only, and tells
    `discretization` from `first_order`. In both cases the updates must be the last word:
    what is done to them afterwards shows up in `rounding`.

    **Arguments:**

    - `laws`: such as `homoflow.laws` returns.
    - `optimizer`: the whole optimizer, if it is to be split by source. What each update is
        made of is read off its program at that step.

    Parameters are the model that the laws are of, or what `eqx.filter(model,
    eqx.is_inexact_array)` leaves of it: laws find their arrays by their place in it.
    `homoflow.tracked(opt_state, params)` reads the account.

    **Raises:** `TypeError` or `ValueError` for what is not a list of laws; the
    transformation raises `ValueError` for parameters that lack an array of a law, and in
    `update` without `params`.

    ```python
    import equinox as eqx
    import optax

    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    optimizer = hf.track(hf.laws(model), optax.sgd(0.1, momentum=0.9))
    state = optimizer.init(model)

    def loss(model):
        return jnp.mean((jax.vmap(model)(x)[:, 0] - x[:, 0]) ** 2)

    for _ in range(10):
        updates, state = optimizer.update(eqx.filter_grad(loss)(model), state, model)
        model = eqx.apply_updates(model, updates)

    print(hf.tracked(state, model)["neurons[1]"].momentum)
    ```
    """
    checked_laws = as_laws(laws)
    inner = optax.with_extra_args_support(
        optax.identity() if optimizer is None else as_transformation(optimizer)
    )

    def init(params: PyTree) -> Any:
        with one_set_of_weights(params):
            weights = eqx.filter(params, eqx.is_inexact_array)
        _refuse_unless_there(checked_laws, weights)
        memory = inner.init(params)
        parts, keeps_weights = None, False
        if optimizer is not None:
            keeps_weights = starts_from_weights(inner.init, weights)
            parts = _parts_of(inner, weights, keeps_weights)
        unit = unit_of_rounding(weights, eqx.filter(memory, eqx.is_array))
        budget = LawBudget(checked_laws, parts, unit, keeps_weights)
        return Tracked(
            budget,
            budget.values(weights),
            budget.start(weights),
            jnp.array(0),
            budget.size(weights),
            memory,
        )

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra) -> Any:
        if params is None:
            raise ValueError(
                "`homoflow.track` follows functions of the weights: call "
                "`optimizer.update(gradients, state, params)` with `params`."
            )
        return _update(inner, updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _update(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: Tracked,
    params: PyTree,
    extra: dict[str, Any],
) -> tuple[PyTree, Tracked]:
    """The update of the optimizer inside, and the account after it."""
    gradient, given = eqx.partition(updates, eqx.is_inexact_array)
    weights, others = eqx.partition(params, eqx.is_inexact_array)
    memory, settings = eqx.partition(state.inner, eqx.is_array)
    kept: list[Any] = []

    def update_inner(gradient, memory, weights, _):
        options = extra | ({"grad": gradient} if "grad" in extra else {})
        new_updates, new_memory = inner.update(
            eqx.combine(gradient, given),
            eqx.combine(memory, settings),
            eqx.combine(weights, others),
            **options,
        )
        moved, rest = eqx.partition(new_updates, eqx.is_inexact_array)
        new_memory, new_settings = eqx.partition(new_memory, eqx.is_array)
        # What is no array does not go through a trace.
        kept[:] = rest, new_settings
        return moved, new_memory

    reading = read_update(update_inner, gradient, memory, weights, ())
    step, budget = (
        Step(weights, gradient, reading.update, reading),
        state.budget,
    )
    after = Tracked(
        budget,
        state.start,
        budget.add(state.terms, step),
        state.steps + 1,
        jnp.maximum(state.size, budget.size(weights)),
        eqx.combine(reading.state, kept[1]),
    )
    return eqx.combine(reading.update, kept[0]), after


def tracked(opt_state: PyTree, params: PyTree) -> Ledger:
    """The account that `homoflow.track` kept, found wherever it is in `opt_state`.

    **Arguments:**

    - `opt_state`: an optimizer's state after an update; under jit and vmap too.
    - `params`: the weights after that update. `observed` is of these, so that whatever
        else has moved them since the state was made shows up in `rounding`.

    **Returns:** a `homoflow.Ledger`, whose arrays have the laws' own shapes: there is no
    axis of time. `jax.tree.map(lambda *a: jnp.stack(a), *ledgers)` makes one.

    **Raises:** `ValueError` if there is no such state in `opt_state`, or several.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, Tracked))
    states = [leaf for leaf in leaves if isinstance(leaf, Tracked)]
    if len(states) != 1:
        raise ValueError(
            f"This optimizer state holds {len(states) or 'no'} accounts of "
            "`homoflow.track`; it takes one to read."
        )
    (state,) = states
    weights = eqx.filter(params, eqx.is_inexact_array)
    size = jnp.maximum(state.size, state.budget.size(weights))
    return state.budget.ledger(
        state.start,
        state.budget.values(weights),
        state.terms,
        rounding=state.budget.possible_rounding(size, state.steps),
    )


def _parts_of(
    optimizer: optax.GradientTransformationExtraArgs,
    weights: PyTree,
    keeps_weights: bool,
) -> UpdateParts:
    """The parts of the optimizer, or all that there are if it wants to know more."""

    def update_fn(gradient, memory, weights, value):
        return optimizer.update(
            gradient, memory, weights, value=value, grad=gradient, value_fn=_norm
        )

    def read(weights):
        state = optimizer.init(weights)
        reading = read_update(update_fn, weights, state, weights, jnp.zeros(()))
        return update_parts(reading, keeps_weights)

    with one_set_of_weights():
        try:
            return eqx.filter_eval_shape(read, weights)
        except (TypeError, ValueError):
            return ALL_PARTS


def _norm(weights: PyTree) -> Any:
    return sum(jnp.sum(w**2) for w in jax.tree.leaves(weights))


def _refuse_unless_there(laws: Laws, weights: PyTree) -> None:
    for law in laws:
        for path in law.paths():
            try:
                leaf = leaf_at(weights, path)
            except (AttributeError, IndexError, KeyError, TypeError):
                leaf = None
            if not hasattr(leaf, "dtype"):
                raise ValueError(
                    f"The law {law.name} is about the array `{path_text(path)}`, which "
                    "these parameters do not have. Pass the model that the laws are of, "
                    "or `eqx.filter(model, eqx.is_inexact_array)`, with that array in it."
                )
