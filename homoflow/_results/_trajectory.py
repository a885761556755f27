"""What both halves of the library return: observables over time, and how it ended."""

from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax._tracing import is_concrete
from ._events import Events
from ._ledger import Account, Ledger
from ._stationary_kind import VERDICTS


class RESULTS(eqx.Enumeration):
    """How a run ended. Anything but `successful` is not an answer."""

    successful = ""
    max_steps_reached = (
        "The maximum number of steps was reached before the end. Likely causes: (a) the "
        "problem is stiff, and an explicit solver takes steps of about 1/λ_max of the "
        "Hessian: allow more with `max_steps`, or pass an implicit `solver` such as "
        "`diffrax.Kvaerno5()`; (b) the model has kinks, on which an adaptive solver "
        "chatters: loosen `rtol`; (c) the tolerance is tighter than the dtype allows."
    )
    step_size_too_small = (
        "The step size fell below what the clock's dtype can resolve or below "
        "`dtmin`. Likely causes: (a) the weights run off to infinity; (b) the tolerance "
        "is too tight for kinks or for the dtype."
    )
    solver_failed = (
        "The solver's inner iteration failed. Likely causes: (a) an implicit solver's "
        "Newton iteration met kinks or too large a step: use an explicit solver or a "
        "tighter tolerance; (b) the linear system is singular."
    )
    nonfinite = (
        "The loss, its gradient or the weights became inf or NaN. Likely causes: (a) a "
        "fixed step that is larger than 2/λ_max of the Hessian; (b) a loss that "
        "overflows, such as the exponential one at large weights; (c) weights that run off "
        "to infinity in finite time; (d) an objective that is not differentiable where "
        "the flow went."
    )
    diverged = (
        "Gradient descent diverged: the loss or the weights became inf or NaN. Likely "
        "causes: (a) a learning rate above 2/λ_max of the Hessian: lower it, or shrink "
        "the initial weights; (b) momentum that needs a smaller learning rate still."
    )
    kink_slots_exceeded = (
        "More pairs of a sample and a unit were at their kinks at one time than the "
        "exact flow had room for: pass `solver=homoflow.Filippov(max_active=...)` with "
        "more, or `solver=homoflow.Averaged()`."
    )
    kink_mode_unsettled = (
        "At an event no mode was found in which the flow goes on: which pairs cross and "
        "which slide. Likely causes: (a) many kinks coincide (repeated or collinear "
        "inputs, narrow layers); (b) the weights are at rounding's mercy there. "
        "`solver=homoflow.Averaged()` averages over kinks instead."
    )
    stuck_on_kinks = (
        "The exact flow met events without end and made no progress in time. Likely "
        "causes: (a) kinks coincide to rounding; (b) events accumulate at one point. "
        "`solver=homoflow.Averaged()` averages over kinks instead."
    )
    no_stationary_point = (
        "The flow has no end: it separates the data, so that its loss falls to 0 while "
        "the weights grow without bound, and no stationary point is on its way. Give a "
        "finite `t1`, or a `weight_decay`."
    )
    end_not_reached = (
        "The maximum number of steps was reached before a stationary point. Likely causes: "
        "(a) the weights run off to infinity, as those of a network that fits ever better "
        "may; (b) the flow lingers at a saddle or approaches a degenerate minimum, slower "
        "than exponentially; (c) it is stiff, and an explicit solver takes steps of about "
        "1/λ_max of the Hessian. Allow more with `max_steps`."
    )
    interrupted = "The flow was interrupted."
    bad_weights = "The initial weights contain NaN or inf."
    bad_data = "The data contain NaN or inf."
    bad_time = "`t1` must be positive and finite."
    bad_times = "`ts` must increase and lie in [0, t1]."
    bad_learning_rate = "The learning rate must be positive and finite."
    bad_coefficient = (
        "A coefficient of the equation (weight decay, momentum, mass) is out of range."
    )
    bad_tolerance = (
        "The tolerance is below what the dtype can reach, or is not positive. With "
        "float32 weights, `jax.config.update('jax_enable_x64', True)` and float64 "
        "weights allow tighter ones."
    )


class TrajectoryError(RuntimeError):
    """A run that did not finish. What it did compute is in `trajectory`."""

    def __init__(self, message: str, trajectory: "Trajectory"):
        super().__init__(message)
        self.trajectory = trajectory


class TrajectoryInterrupt(KeyboardInterrupt):
    """A run that the user ended. What it had computed is in `trajectory`."""

    def __init__(self, trajectory: "Trajectory"):
        super().__init__("What was computed is in this error's `trajectory`.")
        self.trajectory = trajectory


class Stats(eqx.Module, Mapping):
    """Numbers and facts about a run, read like a dictionary.

    The numbers are arrays, or members of an enumeration, and gain an axis under vmap; the
    facts (strings such as the solver's name and why it was chosen) are the same for a
    whole batch.
    """

    numbers: dict[str, Any]
    facts: tuple[tuple[str, str], ...] = eqx.field(static=True, default=())

    def __getitem__(self, key: str) -> Any:
        for name, fact in self.facts:
            if name == key:
                return fact
        return self.numbers[key]

    def __iter__(self) -> Iterator[str]:
        yield from self.numbers
        yield from (name for name, _ in self.facts)

    def __len__(self) -> int:
        return len(self.numbers) + len(self.facts)

    def with_facts(self, facts: tuple[tuple[str, str], ...]) -> "Stats":
        """These and more facts, which come first."""
        return Stats(self.numbers, (*facts, *self.facts))

    def with_numbers(self, **numbers: Array) -> "Stats":
        """These and more numbers, in place of those of the same names."""
        return Stats({**self.numbers, **numbers}, self.facts)

    def __repr__(self) -> str:
        items = "\n".join(f"  {name}: {self[name]}" for name in self)
        return f"Stats(\n{items}\n)"


class Trajectory(eqx.Module):
    """A run of gradient flow or of gradient descent, on the flow's clock.

    Under vmap every array gains a leading axis.

    - `ts`: the times of everything below, in units of the flow's time.
    - `losses`: the objective at those times.
    - `laws`: law name → its value, with time as the leading axis.
    - `grad_norms`: ‖∇L‖₂ over all trained weights.
    - `squared_norms`: the squared Frobenius norm of each trained array, by its path in
        the model, such as `layers[0].weight`.
    - `model`: the final model; where the run ended if it did not finish.
    - `models`: the models at `ts`, stacked, if `save_models`; otherwise `None`.
    - `result`: how it ended, a member of `homoflow.RESULTS`.
    - `stats`: numbers and facts about the run.
    - `events`: of the exact flow, what its kinks did: `homoflow.Events`, if asked for with
        `homoflow.Filippov(events=…)`; otherwise `None`.
    - `sharpness`: of `homoflow.modified_flow` and `homoflow.predict_drift`, the largest
        eigenvalue of ∇²L at `ts`; otherwise `None`.
    - `ledger`: of gradient descent with `ledger=True`, what every part of the optimizer
        did to every law: `homoflow.Ledger`; otherwise `None`.

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
    sharpness: Float[Array, " times"] | None = None
    ledger: Ledger | None = None

    def __repr__(self) -> str:
        if not is_concrete((self.ts, self.result)) or self.ts.ndim != 1:
            return f"Trajectory(shape of ts: {self.ts.shape}, laws: {list(self.laws)})"
        ended = RESULTS[self.result] or "successful"
        if "verdict" in self.stats:
            ended = str(VERDICTS[self.stats["verdict"]]).split(":")[0]
        pairs, leaps = (
            int(self.stats.numbers.get(name, 0)) for name in ("non_unique", "leaps")
        )
        if pairs or leaps:
            ended += (
                f"; one of several solutions, maybe, from t = "
                f"{float(self.stats['first_choice']):.4g} on: {pairs} pairs with a "
                f"choice, {leaps} leaps"
            )
        return (
            f"Trajectory({self.ts.shape[0]} times to t = {float(self.ts[-1]):g}, loss "
            f"{float(self.losses[0]):.4g} → {float(self.losses[-1]):.4g}, laws: "
            f"{list(self.laws)}, {ended})"
        )


def with_facts(
    trajectory: Trajectory, facts: tuple[tuple[str, str], ...]
) -> Trajectory:
    """The trajectory with more facts in its `stats`, which come first.

    For facts that are known before a run, but do not belong into what is compiled:
    reasons differ between runs that do not.
    """
    return eqx.tree_at(
        lambda t: t.stats, trajectory, trajectory.stats.with_facts(facts)
    )


def masked_after(trajectory: Trajectory, valid: Array) -> Trajectory:
    """The trajectory with NaN in place of every observable that is not `valid`."""

    def over_time(t: Trajectory):
        return (t.losses, t.laws, t.grad_norms, t.squared_norms)

    known = nan_unless(valid, over_time(trajectory))
    trajectory = eqx.tree_at(over_time, trajectory, known)
    if trajectory.ledger is not None:
        accounts = _known_accounts(trajectory.ledger, valid)
        trajectory = eqx.tree_at(
            lambda t: t.ledger.accounts,  # pyright: ignore[reportOptionalMemberAccess]
            trajectory,
            accounts,
        )
    if trajectory.models is None:
        return trajectory
    models = nan_unless(valid, trajectory.models)
    return eqx.tree_at(lambda t: t.models, trajectory, models)


def _known_accounts(ledger: Ledger, valid: Array) -> dict[str, Account]:
    return {
        name: Account(
            nan_unless(valid, account.observed),
            nan_unless(valid, account.parts),
            # Of the steps that start at these times: none starts at the last.
            nan_unless(valid[:-1], account.batch),
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


def raise_unless_successful(trajectory: Trajectory) -> Trajectory:
    """The trajectory, or `TrajectoryError` if it did not finish.

    Inside jit or vmap the error is raised when the compiled function runs.
    """
    result, reached = trajectory.result, trajectory.stats["time_reached"]
    if not is_concrete((result, reached)):
        failed = result != RESULTS.successful
        losses = eqx.error_if(
            trajectory.losses,
            failed,
            "A homoflow run did not finish; pass throw=False to see its `result`.",
        )
        return eqx.tree_at(lambda t: t.losses, trajectory, losses)
    message = RESULTS[result]
    if message == "":
        return trajectory
    where = f" It got to t = {float(reached):.6g}"
    if int(trajectory.stats.numbers.get("diverged_at_step", -1)) >= 0:
        where += f", step {int(trajectory.stats['diverged_at_step'])}"
    raise TrajectoryError(
        f"{message}{where}. What was computed is in this error's `trajectory`; with "
        "`throw=False` it is returned.",
        trajectory,
    )
