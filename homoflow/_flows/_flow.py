"""`flow`: the gradient flow of a model."""

from collections.abc import Iterable

import diffrax as dfx
from jaxtyping import ArrayLike, Float, PyTree

from .._dynamics._base import GradientFlow
from .._jax._progress import Progress
from .._jax._tracing import is_untraced
from .._kinks import Filippov
from .._kinks.averaging._options import Averaged
from .._laws import Law
from .._methods._choose_exact import after_giving_up, choose_between, gave_up
from .._methods._diffrax import diffrax_flow
from .._methods._diffrax_options import Method, choose_method
from .._methods._exact import exact_flow
from .._methods._projection_choice import kept_laws
from .._methods._sample_reduction import compressed
from .._methods._steady_state import endless_flow, is_endless
from .._methods._stiff_fallback import run_until_held_up
from .._observe._time_grid import checked_span
from .._problem._checks import as_scalar, check_max_steps, check_weight_decay
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, pose
from .._problem._trainable import Trainable
from .._results._trajectory import Trajectory, raise_unless_successful


def flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    rtol: float | Float[ArrayLike, ""] | None = None,
    atol: float | Float[ArrayLike, ""] | None = None,
    solver: dfx.AbstractSolver | Filippov | Averaged | None = None,
    stepsize_controller: dfx.AbstractStepSizeController | None = None,
    dt0: float | Float[ArrayLike, ""] | None = None,
    weight_decay: float | int | Float[ArrayLike, ""] | None = None,
    laws: Iterable[Law] | None = None,
    project: bool | None = None,
    save_models: bool = False,
    adjoint: dfx.AbstractAdjoint | None = None,
    estimate_error: bool | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: Progress = False,
) -> Trajectory:
    """Gradient flow dw/dt = −∇L(w) from `model`'s weights, to time `t1`.

    L(w) = (1/m) Σ_i ℓ(f_w(x_i), y_i) [Du, Hu & Lee 2018, eqs. 4–5], or `objective`.

    For a smooth model this is an ordinary differential equation, solved to the
    tolerance. For a model with kinks (ReLU, |·|, max) the flow is a differential
    inclusion, whose solutions slide along kinks. An `rtol` of 1e-5 or less gets the
    exact one (`homoflow.Filippov`) where kinks can be followed and there are at most
    20,000 pairs of a sample and a kink: its cost is set by events, not by the
    tolerance. Otherwise, and by default, the answer is *approximate*
    (`homoflow.Averaged`): the method averages over kinks at a tolerance that never
    stalls, and solves once more at a coarser one to report an `error_estimate` in
    `stats`. Either can be asked for by name; `stats["why"]` tells which it was and why.

    **Arguments:**

    - `model`: any Equinox module that maps one sample to one output.
    - `data`: `(x, y)` with shapes `(m, …)`, cast to the dtype of the model's weights;
        with `objective`, whatever that takes. Where the model is linear in x (affine: with
        biases), by its operations, and the loss is `SquaredLoss`, the flow is computed on
        at most n + k + 1 samples that have the same loss for all weights (n inputs, k
        outputs), by a QR factorization: `stats["data"]` says so. Losses, laws and
        derivatives are the same to rounding, at a cost that does not depend on m. (Not
        with biases and a loss that is summed over samples.)
    - `t1`: the final time, in the flow's units (a step of gradient descent with learning
        rate η takes time η); or `jnp.inf`, see below.
    - `loss`: `(prediction, target) -> scalar`, averaged over samples.
    - `objective`: `(model, data) -> scalar`, instead of a loss.
    - `trainable`: an Equinox filter for the arrays that move (all floating-point ones).
    - `ts`: increasing times in [0, t1] to record at (101 equally spaced ones).
    - `rtol`, `atol`: tolerances of the local error. Default `rtol`: 1e-10 for smooth
        models in float64, 1e-5 in float32 (1e-11 and 3e-6 with `ExponentialAdams`); 1e-4
        for models with kinks. Default `atol`:
        `rtol` times the root mean square of the initial weights, so that small
        initializations are resolved.
    - `solver`, `stepsize_controller`, `dt0`: any of Diffrax's, run unaltered. Default:
        `homoflow.ExponentialAdams` for smooth models with a loss over samples where
        samples (after what `data` says) times weights are 30,000 or more: it takes the
        fewest gradients, and its steps are not bound by the sharpness; for other smooth
        ones, whose gradients cost less than such a step, `Tsit5` (in float32, or at an
        `rtol` of 1e-5 and more) or `Dopri8`. Where that has taken 1,000 steps and is not
        there, the flow is taken for stiff and begun again by `ExponentialAdams` (not
        inside of jit or vmap, where no number decides: name it there); `Heun` with a
        smallest step of 2·t1/`max_steps` for models with kinks, and beyond 20,000 pairs of
        a sample and a kink (with a homoflow loss, and kinks that `Filippov` can follow) a
        midpoint step with each pair's mean slope, `AveragedMidpoint` in `stats`. `dt0` is
        the first step, or the constant one for a solver without error estimate.
        `homoflow.Rodas5P()` is an implicit method for up to about a thousand weights;
        `homoflow.GaussLegendre()` conserves quadratic laws by construction. Or
        `homoflow.Filippov()`, the exact flow through kinks, at an `rtol` of 1e-8 if none
        is given; then
        `grad_norms` are the speed ‖ẇ‖, the least norm in the sub-differential. Or
        `homoflow.Averaged()`, never the exact flow. Options that are Diffrax's (`atol`,
        `stepsize_controller`, `dt0`, `adjoint`) and `weight_decay` also rule it out.
    - `weight_decay`: λ of dw/dt = −∇L(w) − λw, for the limit of descent with weight
        decay. Then nothing is conserved: wᵀAw decays as e^{−2λt} and bᵀw as e^{−λt}, so
        that e^{2λt}·wᵀAw and e^{λt}·bᵀw are constant [Kunin et al. 2021]. `laws` are
        recorded as they are, and `losses` and `grad_norms` are those of L alone. It is
        for Diffrax's solvers, approximate at kinks. With momentum μ it is the limit of
        decay that is coupled (added to the gradient); decay that is decoupled (added to
        the velocity) has the limit (1 − μ)λ, because a step takes time η/(1−μ).
    - `laws`: law objects to record (those of `homoflow.laws`); `()` for none.
    - `project`: undo the laws' drift by rescalings of units (for linear units: mixings)
        that leave the function and the loss as they are, to rounding. All that is
        recorded has the laws at their initial values to 1e-13·‖w‖² (float64), and every
        fourth step is projected if a law has drifted by `rtol`·‖w‖² by then (not those of
        `ExponentialAdams` on networks of more than about 40,000 weights, where what it
        remembers would have to be gone through once more); what was removed, from steps
        and at the end, is `stats["law_drift_removed"]`, relative to ‖w‖², an error estimate
        for free. The laws then show nothing of the solver's accuracy, nor whether they are
        laws: `law_violation` does. Default: wherever homoflow chose the solver (not with
        `stepsize_controller`) and the laws in `laws` are certain for this loss, these
        data and what is trained: those of homoflow's own models, and with a custom
        `objective` or laws that you pass (outside of jit and vmap) those that a numerical
        certificate shows. `stats["projection"]` says whether and why. `True` projects
        with any solver that remembers of past steps no more than a slope, or raises.
        Not for `weight_decay`, `BacksolveAdjoint` and the exact flow.
    - `save_models`: also keep the model at every time of `ts`.
    - `adjoint`: how Diffrax differentiates through the solve (its default is
        `RecursiveCheckpointAdjoint`). With `BacksolveAdjoint` observables are computed
        after the solve, from all models at `ts`. The exact flow has derivatives in
        forward mode only.
    - `estimate_error`: solve again at 4 times the tolerance (or with twice the constant
        step) and report twice the difference. Default: where homoflow averages over
        kinks. `AveragedMidpoint` solves a third time, at 16 times the tolerance, and
        counts a quarter of that difference if it is larger. An estimate above about 0.1
        says that the weights have not converged.
    - `max_steps`: of the solver.
    - `throw`: raise if the run does not finish; otherwise see `result`.
    - `progress`: `True` for a progress bar, or a Diffrax progress meter.

    **To the end of training.** With `t1=jnp.inf` the flow of a smooth model goes on to a
    stationary point. The flow is integrated in segments until it is 1e-5·‖w‖ from one, by
    the Hessian's eigenvalues, and no negative one leads away from there: saddles and
    plateaus are passed. Newton's method, with the least steps (none along flat directions),
    then takes the weights to ‖∇L‖ of rounding, and laws that are projected back to their
    initial values. `model` is that point; `ts` ends where the flow did, with 101 times
    chosen such that much the same happens between them, or is what you gave (finite times
    that the flow passes). `stats` say what kind of point it is: `verdict`, a member of
    `homoflow.VERDICTS`, with the `smallest_eigenvalue` and `largest_eigenvalue` of ∇²L
    there, the number of `zero_eigenvalues` (of at most `eigenvalue_threshold`, 1e-12 of the
    largest) and of those that are `explained_zero_eigenvalues`, by the symmetries behind
    the laws; `gradient_norm`, `stationary_loss`, and `polish_distance`, what Newton's
    method has moved, relative to ‖w‖. Zero eigenvalues that no law explains are looked into
    along random directions: what is flat is a minimum, what falls a saddle. A start at a
    stationary point, such as w = 0, stays there, and a flow that comes to a strict saddle
    because of zeros in its start stays too; that only another symmetry keeps it there
    (equal columns) is lost in rounding. Where the loss (logistic, exponential, or
    cross-entropy with classes) has fallen below log(2)/m (1/m for the exponential one) and
    the outputs scale with the weights, all m samples are separated for good and there is no
    stationary point: `RESULTS.no_stationary_point`. Weights that run off to infinity
    otherwise end with `max_steps`, which counts all segments. Up to 500 weights the default
    solver is `Rodas5P` at an `rtol` of 1e-8; beyond 2,000, extreme eigenvalues are found by
    Lanczos iterations, zero ones are not counted, and only a loss of 0 makes a minimum
    decided. With `weight_decay` all this is about L + ½λ‖w‖². It takes float64, and no
    `adjoint` or `estimate_error`; and it decides in Python: outside of jit and vmap, where
    a loop over seeds compiles once. Ctrl-C raises `homoflow.TrajectoryInterrupt` with the
    `trajectory` so far.

    **Returns:** a `homoflow.Trajectory`. Its `stats` hold `steps`, `rejected_steps`,
    `gradient_evaluations` (explicit Runge–Kutta solvers, `ExponentialAdams`, which needs
    no Hessians, and `Rodas5P`, which has
    `jacobian_evaluations`, the number of Hessians, besides; those of a solver that was
    held up are included), `time_reached`,
    `law_violation`, `error_estimate` (relative error of the final weights),
    `loss_error_estimate` (largest absolute error of `losses`), `solver`, `why`, `kinks`.
    Those of `Filippov` also hold `crossings`, `entries` and `exits` (pairs of a sample
    and a unit that cross their kink, begin or cease to slide on it),
    `largest_sliding_set`, `forward_passes`; `non_unique`: of how many different pairs the
    side was chosen, once or more often, where another was found that solves the inclusion
    as well, or where dependent kinks met and that was not looked into; `leaps`: how often
    no way on was found at a point, and it was passed by a straight step of 3e-8·‖w‖ with
    the last velocity tried; and the time `first_choice` of the first choice or leap (NaN:
    none). Who did what, and what was chosen, is in `events` if `Filippov(events=…)` asks
    for it; a choice that lasts is there once.

    **Raises:** `ValueError` for bad input, before anything is compiled;
    `homoflow.TrajectoryError`, which holds what was computed, if the run does not finish.
    Under jit or vmap, where values are unknown, bad values become result codes instead.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0)
    drift = flow.laws["neurons[1]"][-1] - flow.laws["neurons[1]"][0]

    end = hf.flow(model, (x, x[:, :1]), t1=jnp.inf)
    print(hf.VERDICTS[end.stats["verdict"]])  # A minimum: …
    ```
    """
    problem = pose(
        model,
        data,
        loss=loss,
        objective=objective,
        trainable=trainable,
        laws=laws,
    )
    check_max_steps(max_steps)
    if weight_decay is not None:
        check_weight_decay(weight_decay)
    if is_endless(t1):
        trajectory = endless_flow(
            problem,
            ts=ts,
            rtol=rtol,
            atol=atol,
            solver=solver,
            stepsize_controller=stepsize_controller,
            dt0=dt0,
            weight_decay=weight_decay,
            project=project,
            laws_are_given=laws is not None,
            save_models=save_models,
            adjoint=adjoint,
            estimate_error=estimate_error,
            max_steps=max_steps,
            progress=progress,
        )
        return raise_unless_successful(trajectory) if throw else trajectory
    span = checked_span(t1, ts, problem.dtype)
    for_diffrax = {
        "atol": atol,
        "stepsize_controller": stepsize_controller,
        "dt0": dt0,
        "adjoint": adjoint,
        "weight_decay": weight_decay,
    }
    choice = choose_between(problem, solver, rtol, for_diffrax)
    if choice.is_exact:
        assert choice.why is not None
        trajectory = exact_flow(
            problem,
            solver if isinstance(solver, Filippov) else Filippov(),
            span,
            rtol=rtol,
            max_steps=max_steps,
            save_models=save_models,
            estimate_error=bool(estimate_error),
            why=choice.why,
            progress=progress,
        )
        if isinstance(solver, Filippov) or not gave_up(trajectory):
            return raise_unless_successful(trajectory) if throw else trajectory
        choice = after_giving_up(trajectory)
    problem, told = compressed(problem)
    kept = kept_laws(
        problem,
        project,
        is_ours=stepsize_controller is None
        and not isinstance(solver, dfx.AbstractSolver),
        are_given=laws is not None,
        adjoint=adjoint,
        weight_decay=weight_decay,
    )

    def choose(held_up_at: float | None) -> Method:
        method = choose_method(
            problem,
            rtol=rtol,
            atol=atol,
            solver=solver if isinstance(solver, dfx.AbstractSolver) else None,
            controller=stepsize_controller,
            dt0=dt0,
            max_steps=max_steps,
            may_share_kinks=weight_decay is None
            and not isinstance(adjoint, dfx.BacksolveAdjoint),
            may_take_adams=not isinstance(adjoint, dfx.BacksolveAdjoint),
            held_up_at=held_up_at,
            note=choice.why,
        )
        return method.told((*told, *kept.facts)).keeping(kept.laws)

    def run(method: Method, max_steps: int) -> Trajectory:
        return diffrax_flow(
            problem,
            span,
            method,
            dynamics=GradientFlow(as_scalar(weight_decay, problem.dtype)),
            max_steps=max_steps,
            save_models=save_models,
            adjoint=adjoint,
            estimate_error=estimate_error,
            progress=progress,
        ).trajectory

    may_change = (
        stepsize_controller is None
        and not isinstance(solver, dfx.AbstractSolver)
        and not isinstance(adjoint, dfx.BacksolveAdjoint)
        and is_untraced((problem, span, rtol, atol, dt0, weight_decay))
    )
    trajectory = run_until_held_up(choose, run, max_steps, may_change)
    return raise_unless_successful(trajectory) if throw else trajectory
