"""What a flow returned, beside an oracle that does not use homoflow."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flow_cases import OPTIONS, Call, Case
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from judgement import GaveUp, Judgement, refused
from kink_oracle import SLOPES, Piecewise
from scipy.integrate import solve_ivp

import homoflow as hf

NUM_TIMES = 26
#: Of midpoint steps between two times, of which one gets four times as many.
FEW_STEPS = 160
#: Evaluations after which an oracle gives up.
MAX_EVALUATIONS = 30_000
#: An error up to so many times what was promised counts as kept: tolerances are those of
#: a step. Of an error estimate, the stated factor.
SLACK, UNDERSTATED = 300.0, 3.0
#: What an oracle of tolerance 1e-11 may itself be off by.
FINE, DOUBT = 1e-11, 1e-9


def judge(case: Case) -> Judgement:
    """Makes the call and decides what its answer is."""
    call = case.draw()
    ts = np.linspace(0, call.t1, NUM_TIMES)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run = hf.flow(
                call.model, (call.x, call.y), call.t1, ts=ts, save_models=True,
                **case.keywords,
            )  # fmt: skip
        except Exception as error:
            return refused(error)
    if not bool(run.result == hf.RESULTS.successful):
        return _judge_failure(case, call, ts, str(hf.RESULTS[run.result])[:60])
    try:
        truth, doubt = truth_of(case, call, ts)
    except GaveUp:
        return Judgement("not judged", detail="the oracle gave up")
    return _compare(case, call, run, truth, doubt, [str(w.message) for w in told])


def _compare(case, call, run, truth, doubt, told) -> Judgement:
    found = _states(run.models, len(truth))
    size = np.max(np.linalg.norm(truth, axis=1))
    error = float(np.max(np.linalg.norm(found - truth, axis=1)) / size)
    estimate = run.stats["error_estimate"]
    estimate = None if estimate is None else float(estimate)
    rtol = OPTIONS[case.options].get("rtol") or (1e-4 if estimate is not None else 1e-8)
    promised = SLACK * rtol if estimate is None else UNDERSTATED * estimate
    if estimate is None and error > promised + 3 * doubt:
        promised *= growth_of(case, call)  # Two more solves, where they may excuse it.
    figures = f"estimate {estimate}, doubt {doubt:.1e}"
    if error <= promised + 3 * doubt:
        return Judgement("right", error, promised, figures)
    nonunique = run.stats["num_nonunique_pairs"]
    if told or (nonunique is not None and int(nonunique) > 0):
        return Judgement("told", error, promised, f"{figures}; {'; '.join(told)[:200]}")
    return Judgement("SILENTLY WRONG", error, promised, figures)


def _judge_failure(case: Case, call: Call, ts: np.ndarray, why: str) -> Judgement:
    """Honest where the oracle, too, meets trouble; else a false alarm."""
    try:
        truth, doubt = truth_of(case, call, ts)
    except GaveUp:
        return Judgement("failed honestly", detail=why)
    is_easy = np.all(np.isfinite(truth)) and doubt < 1e-3
    return Judgement("false alarm" if is_easy else "failed honestly", detail=why)


def truth_of(
    case: Case, call: Call, ts: np.ndarray, nudge: np.ndarray | float = 0.0,
    *, is_coarse_enough: bool = True,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """The weights at `ts`, and how far the oracle itself may be off, relative to ‖w‖.

    `nudge` is added to the weights at the start. `is_coarse_enough`: whether small steps
    over kinks will do, where they are not gone through one by one.
    """
    field, start = _field(case, call)
    start = start + nudge
    if case.model in SLOPES:
        decay = OPTIONS[case.options].get("weight_decay", 0.0)
        x, y = call.x, call.y
        flow = Piecewise(case.model, case.loss, x, y, case.hidden, decay)
        try:
            return flow.solve(start, ts, FINE), 10 * DOUBT
        except GaveUp:
            if not is_coarse_enough:
                raise
    if case.has_kinks:
        return _by_midpoint(field, start, call.t1)
    return _by_scipy(field, start, ts, FINE), DOUBT


def _by_scipy(field, start, ts, rtol) -> np.ndarray:
    count = 0

    def counted(t, w):
        nonlocal count
        count += 1
        if count > MAX_EVALUATIONS:
            raise GaveUp
        return np.asarray(field(w))

    atol = rtol * max(float(np.sqrt(np.mean(start**2))), 1e-300)
    solution = solve_ivp(
        counted, (0, ts[-1]), start, "DOP853", t_eval=ts, rtol=rtol, atol=atol
    )
    if not solution.success:
        raise GaveUp
    return solution.y.T


@functools.partial(jax.jit, static_argnums=(0, 3))
def _midpoint(static, arrays, t1, steps):
    """The states at `NUM_TIMES` times, by so many midpoint steps between two of them."""
    field = functools.partial(_velocity, static, arrays)
    h = t1 / (steps * (NUM_TIMES - 1))

    def advance(w, _):
        def step(_, w):
            return w + h * field(w + h / 2 * field(w))

        w = jax.lax.fori_loop(0, steps, step, w)
        return w, w

    _, states = jax.lax.scan(advance, arrays[0], None, length=NUM_TIMES - 1)
    return jnp.concatenate([arrays[0][None], states])


def _by_midpoint(field, start, t1) -> tuple[np.ndarray, float]:
    static, arrays = field.static, field.arrays
    arrays = (jnp.asarray(start), *arrays[1:])
    coarse, fine = (
        np.asarray(_midpoint(static, arrays, t1, steps))
        for steps in (FEW_STEPS, 4 * FEW_STEPS)
    )
    if not np.all(np.isfinite([coarse, fine])):
        raise GaveUp
    size = np.max(np.linalg.norm(fine, axis=1))
    # Over kinks the method is of order 1: of 4 times the steps a third of it is left.
    return fine, float(np.max(np.linalg.norm(fine - coarse, axis=1)) / size)


def growth_of(case: Case, call: Call) -> float:
    """By how much an error at the start grows: unstable flows multiply those of steps."""
    if case.has_kinks:
        return 1.0
    field, start = _field(case, call)
    ends = np.array([0, call.t1])
    size = float(np.linalg.norm(start))
    nudge = 1e-6 * size * np.random.default_rng(0).standard_normal(start.shape)
    nudge /= np.sqrt(start.size)
    try:
        here, there = (
            _by_scipy(field, w, ends, 1e-10)[-1] for w in (start, start + nudge)
        )
    except GaveUp:
        return 1.0
    relative = np.linalg.norm(there - here) / np.linalg.norm(here)
    return max(1.0, float(relative) / 1e-6)


class _Field:
    """−∇L − λw as a function of one vector."""

    def __init__(self, static, arrays):
        self.static, self.arrays = static, arrays

    def __call__(self, w):
        return _jitted_velocity(self.static, self.arrays, jnp.asarray(w))


def _field(case: Case, call: Call) -> tuple[_Field, np.ndarray]:
    weights, frozen = eqx.partition(call.model, eqx.is_inexact_array)
    flat, _ = ravel_pytree(weights)
    decay = OPTIONS[case.options].get("weight_decay", 0.0)
    leaves, structure = jax.tree.flatten(weights)
    static = (
        case.loss,
        structure,
        tuple(leaf.shape for leaf in leaves),
        tuple(jax.tree.leaves(frozen, is_leaf=callable)),
        jax.tree.structure(frozen, is_leaf=callable),
    )
    return _Field(static, (flat, call.x, call.y, jnp.asarray(decay))), np.asarray(flat)


def _velocity(static, arrays, w):
    loss, structure, shapes, frozen_leaves, frozen_structure = static
    _, x, y, decay = arrays

    def risk(w):
        parts, start = [], 0
        for shape in shapes:
            size = int(np.prod(shape))
            parts.append(w[start : start + size].reshape(shape))
            start += size
        frozen = jax.tree.unflatten(frozen_structure, frozen_leaves)
        model = eqx.combine(jax.tree.unflatten(structure, parts), frozen)
        return _risk(loss, jax.vmap(model)(x), y)

    return -jax.grad(risk)(w) - decay * w


_jitted_velocity = jax.jit(_velocity, static_argnums=0)


def _risk(loss: str, f: Array, y: Array) -> Array:
    """The mean loss, written out here once more."""
    match loss:
        case "squared" | "own":
            return jnp.mean(jnp.sum((f - y) ** 2, axis=1)) / 2
        case "logistic":
            return jnp.mean(jnp.sum(jnp.logaddexp(0.0, -y * f), axis=1))
        case "cross-entropy":
            picked = jnp.take_along_axis(f, y[:, None], axis=1)[:, 0]
            return jnp.mean(jax.scipy.special.logsumexp(f, axis=1) - picked)
        case "Huber":
            r = jnp.abs(f - y)
            pieces = jnp.where(r <= 0.5, r**2 / 2, 0.5 * (r - 0.25))
            return jnp.mean(jnp.sum(pieces, axis=1))
    raise ValueError(loss)


def _states(models, count: int) -> np.ndarray:
    arrays = jax.tree.leaves(eqx.filter(models, eqx.is_inexact_array))
    return np.concatenate([np.asarray(a).reshape(count, -1) for a in arrays], axis=1)
