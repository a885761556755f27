"""How a run ended."""

import equinox as eqx


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
        "step that is larger than 2/λ_max of the Hessian, such as a constant one, or the "
        "smallest one of `homoflow.Averaged`, 2·t1/`max_steps`: pass "
        "`solver=homoflow.Filippov()` or a larger `max_steps`; (b) a loss that "
        "overflows, such as the exponential one at large weights; (c) weights that run off "
        "to infinity in finite time; (d) an objective that is not differentiable where "
        "the flow went."
    )
    nonfinite_at_start = (
        "The loss or its gradient is NaN or inf at the start, before any step. Likely "
        "causes: (a) an operation without a derivative at these weights, such as a norm, "
        "√ or division at 0 (behind `jnp.where` too: the gradient of the branch that is "
        "not taken is NaN as well; change its argument inside of the branch); (b) a loss "
        "that overflows, such as the exponential one at large weights. "
        "`jax.grad(lambda m: ...)(model)` shows which weights; `jax_debug_nans` where."
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
    inaccurate = (
        "The weights are not to be relied on: a solve at a coarser tolerance failed, so "
        "that `error_estimate` is NaN, or laws had to be moved by more than 0.05·‖w‖². "
        "Likely causes: (a) a long time, for which the smallest step over kinks, "
        "2·t1/`max_steps`, is too long: pass `solver=homoflow.Filippov()`, which follows "
        "each kink, or allow more with `max_steps`; (b) too loose a tolerance: lower "
        "`rtol`."
    )
    law_broken = (
        "A law that was restored is none: where the flow went, the gradient changes it. "
        "Likely causes: (a) an objective with a term that acts only there; (b) a law of "
        "another model or loss. Pass `project=False`."
    )
    no_stationary_point = (
        "The flow has no end: it separates the data, so that its loss falls to 0 while "
        "the weights grow without bound, and no stationary point is on its way. A limit "
        "of their direction was not found: that is looked for where margins are "
        "homogeneous, up to 500 weights (with kinks to log t = 3e4). Follow the flow with "
        "`homoflow.late_flow`, to times beyond what a float can hold; give a finite `t1`; "
        "or a `weight_decay`."
    )
    end_not_reached = (
        "The maximum number of steps was reached before a stationary point. Likely causes: "
        "(a) the weights run off to infinity, as those of a network that fits ever better "
        "may; (b) the flow lingers at a saddle or approaches a degenerate minimum, slower "
        "than exponentially; (c) it is stiff, and an explicit solver takes steps of about "
        "1/λ_max of the Hessian. Allow more with `max_steps`. Or (d) the model has kinks, "
        "and does not separate the data: it comes to rest on kinks, where no minimum is "
        "told from a saddle. Give a finite `t1`."
    )
    vanishing_weights = (
        "All initial weights are below 1e-246 (the dtype's smallest number to the power of "
        "0.8), where the exact flow's products of them are 0 in floating point. Start from "
        "larger ones: as long as a network computes next to nothing, a start that is c "
        "times as large has a flow that is c times as large."
    )
    beyond_edge = (
        "The start is beyond the edge of stability: the sharpness λ_max(∇²L) exceeds "
        "2(1 + μ)/η, where gradient descent leaves in a catapult that no central flow "
        "describes. Lower `learning_rate`, or begin after a warm-up."
    )
    edge_crowded = (
        "More eigenvalues of the Hessian came to the edge of stability at one time than "
        "there was room for: pass a larger `max_critical`."
    )
    edge_lost = (
        "The flow could not be kept at the edge of stability: there is no direction, to "
        "first order, in which the sharpness falls (as in linear regression, where it is "
        "constant), or the tolerance is tighter than the eigenvalues are found to."
    )
    interrupted = "The flow was interrupted."
    bad_weights = "The initial weights contain NaN or inf."
    bad_data = "The data contain NaN or inf."
    bad_labels = (
        "The targets hold labels that the loss would misread. `LogisticLoss` and "
        "`ExponentialLoss` take −1 and +1 (for labels 0 and 1 use 2·y − 1), and class "
        "indices must lie in 0 … outputs − 1."
    )
    bad_time = "`t1` must be positive and finite."
    bad_times = "`ts` must increase and lie in [0, t1]."
    bad_step = "`dt0` must be positive and finite."
    bad_learning_rate = "The learning rate must be positive and finite."
    bad_coefficient = (
        "A coefficient of the equation (weight decay, momentum, mass) is out of range."
    )
    bad_tolerance = (
        "The tolerance is below what the dtype can reach, or is not positive. With "
        "float32 weights, `jax.config.update('jax_enable_x64', True)` and float64 "
        "weights allow tighter ones."
    )
