"""What both halves of the library return: observables over time, and how it ended."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax._tracing import is_concrete
from ._events import Events
from ._ledger import Account, Ledger
from ._margin_certificate import MarginCertificate
from ._stats import Facts, Stats
from ._status import RESULTS
from ._summary import as_html, as_text, summary_rows
from ._xarray import make_dataset


class Trajectory(eqx.Module):
    """A run of gradient flow or of gradient descent, on the flow's clock.

    Under vmap every array gains a leading axis.

    - `ts`: the times of everything below, in units of the flow's time.
    - `losses`: the objective at those times.
    - `laws`: law name → its value, with time as the leading axis.
    - `grad_norms`: ‖∇L‖₂ over all trained weights.
    - `squared_norms`: the squared Frobenius norm of each trained array, by its path in
        the model, such as `layers[0].weight`.
    - `observed`: name → what that observable had, a pytree with time as the leading axis.
    - `model`: the final model; where the run ended if it did not finish.
    - `models`: the models at `ts` if `save_models`, their trained arrays stacked; otherwise
        `None`.
    - `result`: how it ended, a member of `homoflow.RESULTS`.
    - `stats`: numbers and facts about the run.
    - `events`: of the exact flow, what its kinks did: `homoflow.Events`, if asked for with
        `homoflow.Filippov(events=…)`; otherwise `None`.
    - `ledger`: of gradient descent with `ledger=True`, what every part of the optimizer
        did to every law: `homoflow.Ledger`; otherwise `None`.
    - `continuation`: of gradient descent, what a run that goes on from here needs beside
        the model; otherwise `None`. Files do not hold it.
    - `limit`: with `t1=inf` on separable data, where the direction of the weights went:
        `homoflow.MarginCertificate`; otherwise `None`. Files do not hold its `model`, which
        the final model is, of another size.
    - `observed_every`: `(name, n)` for the observables whose times are `ts[::n]`; those of
        all others are `ts`.

    After the point where a run failed, arrays over time hold NaN, never a number.
    """

    ts: Float[Array, " times"]
    losses: Float[Array, " times"]
    laws: dict[str, Float[Array, "times ..."]]
    grad_norms: Float[Array, " times"]
    squared_norms: dict[str, Float[Array, " times"]]
    model: PyTree
    models: PyTree | None
    result: RESULTS
    stats: Stats
    events: Events | None = None
    ledger: Ledger | None = None
    observed: dict[str, PyTree] = eqx.field(default_factory=dict)
    continuation: PyTree | None = None
    limit: MarginCertificate | None = None
    observed_every: tuple[tuple[str, int], ...] = eqx.field(static=True, default=())

    def __repr__(self) -> str:
        if not is_concrete(self):
            return f"Trajectory(shape of ts: {self.ts.shape}, laws: {list(self.laws)})"
        return as_text(summary_rows(self))

    def _repr_html_(self) -> str:
        if not is_concrete(self):
            return html.escape(repr(self))
        return as_html(summary_rows(self))

    def to_xarray(self, batch_dims: Sequence[str] | None = None) -> Any:
        """Everything that was recorded, as an `xarray.Dataset`.

        The first dimension is `time`; in front of it come those of a batch. `losses`,
        `grad_norms`, `squared_norms` (over `array`, labelled by their paths) and every law
        and observable are variables. A law's axes are called `unit`, or `row` and `column`,
        after its name; the parts of an observable have names such as `sharpness.values`,
        and one that was not recorded at every time has a time of its own, such as `time of
        sharpness`. `result` and the numbers of `stats` are variables without time; the
        facts are attributes. Models, events and ledger are left out. xarray is imported
        when this is called.

        **Arguments:**

        - `batch_dims`: what to call the axes of a batch, in order; by default a single
            one is `seed`.

        **Raises:** `ImportError` without xarray; `ValueError` if `batch_dims` are not as
        many as the batch has axes.

        ```python
        model = hf.MLP((3, 8, 1), key=jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (20, 3))
        flow = hf.flow(model, (x, x[:, :1]), t1=5.0)
        data = flow.to_xarray()
        data["losses"].sel(time=2.5)
        ```
        """
        return make_dataset(self, batch_dims)


def with_facts(trajectory: Trajectory, facts: Facts) -> Trajectory:
    """The trajectory with more facts in its `stats`, which come first.

    For facts that are known before a run, but do not belong into what is compiled:
    reasons differ between runs that do not.
    """
    return eqx.tree_at(
        lambda t: t.stats, trajectory, trajectory.stats.with_facts(facts)
    )


def with_gradients_of(runs: list[Trajectory]) -> Trajectory:
    """The last run, which counts the gradients of those before it as well."""
    name, last = "gradient_evaluations", runs[-1]
    if len(runs) == 1:
        return last
    gradients = sum(run.stats[name] for run in runs)
    stats = last.stats.with_numbers(**{name: gradients})
    return dataclasses.replace(last, stats=stats)


def masked_after(trajectory: Trajectory, valid: Array) -> Trajectory:
    """The trajectory with NaN in place of all that was recorded where not `valid`."""

    def over_time(t: Trajectory):
        return (t.losses, t.laws, t.grad_norms, t.squared_norms)

    known = nan_unless(valid, over_time(trajectory))
    trajectory = eqx.tree_at(over_time, trajectory, known)
    every = dict(trajectory.observed_every)
    observed = {
        name: nan_unless(valid[:: every.get(name, 1)], values)
        for name, values in trajectory.observed.items()
    }
    trajectory = dataclasses.replace(trajectory, observed=observed)
    if trajectory.ledger is None:
        return trajectory
    return eqx.tree_at(
        lambda t: t.ledger.accounts,  # pyright: ignore[reportOptionalMemberAccess]
        trajectory,
        _known_accounts(trajectory.ledger, valid),
    )


def _known_accounts(ledger: Ledger, valid: Array) -> dict[str, Account]:
    return {
        name: Account(
            nan_unless(valid, account.observed),
            nan_unless(valid, account.parts),
            # Of the steps that start at these times: none starts at the last.
            nan_unless(valid[:-1], account.batch),
            account.largest_rounding,
        )
        for name, account in ledger.items()
    }


def nan_unless(valid: Array, over_time: PyTree) -> PyTree:
    """Arrays over time, with NaN in the floating-point ones where not `valid`."""

    def mask(values):
        if not eqx.is_inexact_array(values):
            return values
        keep = valid.reshape(valid.shape + (1,) * (values.ndim - 1))
        return _nan_unless(keep, values)

    return jax.tree.map(mask, over_time)


@jax.custom_jvp
def _nan_unless(keep: Array, values: Array) -> Array:
    """`values` where `keep`, else NaN; so are their forward-mode derivatives."""
    return jnp.where(keep, values, jnp.nan)


@_nan_unless.defjvp
def _nan_unless_jvp(primals, tangents):
    keep, values = primals
    return _nan_unless(keep, values), _nan_unless(keep, tangents[1])
