"""What a descent returned, beside an Optax loop and NumPy sums that do not use homoflow."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clock_oracle import flow_time
from descent_cases import HIDDEN, INPUTS, STEPS, Case
from jax.flatten_util import ravel_pytree
from judgement import Judgement, refused

import homoflow as hf

#: Errors in units of the dtype's rounding, grown as a nudge of the start grows.
ROUNDINGS = 1e4


def judge(case: Case) -> Judgement:
    """Makes the call and decides what its answer is."""
    model, data = case.draw()
    options = {
        "learning_rate": case.rate, "optimizer": case.optimizer, "throw": False,
        "record_every": case.record_every, "ledger": True,
    }  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run = run_descent(case, model, data, options)
        except Exception as error:
            return _judge_refusal(case, model, data, error)
    try:
        replay = Replay(case, model, data)
    except Exception as error:  # what Optax raises
        return Judgement("SILENTLY WRONG", detail=f"Optax refuses: {error}")
    if not bool(run.result == hf.RESULTS.successful):
        return _judge_weights(case, run, replay)
    findings = [
        _judge_weights(case, run, replay), _judge_clock(case, run, replay),
        *_judge_ledger(case, run, replay),
    ]  # fmt: skip
    order = [
        "SILENTLY WRONG", "false alarm", "failed honestly", "told", "not judged", "right",
    ]  # fmt: skip
    worst = min(findings, key=lambda found: order.index(found.outcome))
    if worst.outcome == "SILENTLY WRONG" and told:
        return Judgement("told", worst.error, worst.promised, str(told[0].message))
    return worst


def run_descent(case: Case, model, data, options) -> hf.Trajectory:
    if not case.is_vmapped:
        return hf.descend(model, data, STEPS, **options)
    x, y = (jnp.stack([array, array[::-1]]) for array in data)

    @eqx.filter_vmap
    def both(x, y):
        return hf.descend(model, (x, y), STEPS, **options)

    # The samples in another order are the same problem.
    return jax.tree.map(lambda a: a[1] if eqx.is_array(a) else a, both(x, y))


def _judge_refusal(case: Case, model, data, error: Exception) -> Judgement:
    found = refused(error)
    if found.outcome == "CRASHED" or case.time is None:
        return found
    return Judgement("false alarm", detail=found.detail)


class Step(NamedTuple):
    """Vectors of a step: weights before it, gradient, update; and what memory and weights
    do alone, each with whether that is all they do."""

    w: np.ndarray
    g: np.ndarray
    u: np.ndarray
    base: np.ndarray
    momentum: np.ndarray
    decay: np.ndarray
    is_momentum_apart: bool
    is_decay_apart: bool


class Replay:
    """An Optax loop: its `steps`, weights and losses, and what rounding may do to them.

    `plateau`: of each step, what the plateaus so far have left of the rate.
    `doubt` is relative to the weights: as a loop from a nudged start moves away.
    """

    def __init__(self, case: Case, model, data):
        self.eps = float(np.finfo(np.float32 if case.is_single else np.float64).eps)
        self._data, self._rate = data, data[0].dtype.type(case.rate)
        plain = dataclasses.replace(case, seed=0, rate=1.0, is_vmapped=False)
        self._programs = _programs(plain)
        self._keeps_weights = "schedule-free" in case.around
        flat, _ = ravel_pytree(eqx.filter(model, eqx.is_inexact_array))
        flat = np.asarray(flat)
        with jax.numpy_dtype_promotion("standard"):
            self.plateau = np.ones(STEPS)
            self.steps, self.weights, self.losses = self._loop(flat)
            nudge = 1 + 64 * self.eps * (-1.0) ** np.arange(flat.size)
            _, other, _ = self._loop((flat * nudge).astype(flat.dtype), False)
        self.size = max(float(np.max(np.linalg.norm(self.weights, axis=1))), 1e-300)
        growth = np.max(np.linalg.norm(other - self.weights, axis=1)) / self.size
        self.doubt = ROUNDINGS * self.eps + 1e3 * float(growth)

    def _loop(self, w, should_take_apart=True):
        init, update, value_and_gradient = self._programs
        state = init(self._rate, w)
        steps, weights, losses = [], [w], []
        for k in range(STEPS):
            value, g = value_and_gradient(w, *self._data)
            u, after = update(self._rate, g, state, w, w, *self._data)
            losses.append(value)
            if should_take_apart:
                steps.append(self._apart(g, state, w, u))
                self.plateau[k] = _plateau_scale(after)
            w, state = np.asarray(w + u).astype(w.dtype), after
            weights.append(w)
        losses.append(value_and_gradient(w, *self._data)[0])
        return steps, np.array(weights, float), np.array(losses, float)

    def _apart(self, g, state, w, u) -> Step:
        """The update with gradient, memory or weights taken out of it."""
        zero, empty, at = np.zeros_like(w), _without_memory(state), w

        def alone(g, state, w):
            update = self._programs[1]
            return np.asarray(
                update(self._rate, g, state, w, at, *self._data)[0], float
            )

        base = alone(zero, empty, zero)
        # Where the memory starts from the weights, what it makes of them is its doing.
        is_kept = self._keeps_weights
        momentum = alone(zero, state, w if is_kept else zero) - base
        decay = np.zeros_like(base) if is_kept else alone(zero, empty, w) - base
        whole = np.asarray(u, float)
        tolerance = 1e4 * self.eps * max(float(np.max(np.abs(whole))), 1e-300)

        def are_same(a, b):
            return bool(np.max(np.abs(a - b)) <= tolerance)

        return Step(
            np.asarray(w, float), np.asarray(g, float), whole, base, momentum, decay,
            are_same(whole - alone(g, empty, zero if is_kept else w), momentum),
            is_kept or are_same(whole - alone(g, state, zero), decay),
        )  # fmt: skip


def _plateau_scale(state) -> float:
    def is_plateau(node):
        return isinstance(node, optax.contrib.ReduceLROnPlateauState)

    nodes = jax.tree.leaves(state, is_leaf=is_plateau)
    return float(np.prod([node.scale for node in nodes if is_plateau(node)]))


def _without_memory(state):
    def clear(leaf):
        is_memory = eqx.is_inexact_array(leaf) and leaf.ndim > 0
        return jnp.zeros_like(leaf) if is_memory else leaf

    return jax.tree.map(clear, state)


@functools.lru_cache(maxsize=8)
def _programs(case: Case):
    """Start, update and gradient as functions of vectors."""
    params, static = eqx.partition(case.draw()[0], eqx.is_inexact_array)
    _, unravel = ravel_pytree(params)

    def made(rate):
        optimizer = case.optimizer(rate)
        if isinstance(optimizer, optax.MultiSteps):
            optimizer = optimizer.gradient_transformation()
        return optax.with_extra_args_support(optimizer)

    def value(w, x, y):
        predictions = jax.vmap(eqx.combine(unravel(w), static))(x)
        return 0.5 * jnp.sum((predictions - y) ** 2) / len(x)

    def update(rate, g, state, w, at, x, y):
        """With the loss that is told being that at other weights, `at`."""

        def of_params(params):
            return value(ravel_pytree(params)[0], x, y)

        extra: dict[str, Any] = {
            "value": value(at, x, y), "grad": unravel(g), "value_fn": of_params,
        }  # fmt: skip
        if "SAM" in case.around:
            extra = {"grad_fn": lambda params, _: jax.grad(of_params)(params)}
        moved, after = made(rate).update(unravel(g), state, unravel(w), **extra)
        return ravel_pytree(moved)[0], after

    def init(rate, w):
        return made(rate).init(unravel(w))

    return jax.jit(init), jax.jit(update), jax.jit(jax.value_and_grad(value))


def _wrong(what: str, error: float, promised: float) -> Judgement:
    outcome = "right" if error <= promised else "SILENTLY WRONG"
    return Judgement(outcome, error, promised, "" if outcome == "right" else what)


def _judge_weights(case: Case, run: hf.Trajectory, replay: Replay) -> Judgement:
    """The end and all recorded losses; a run that diverges says so."""
    if not bool(run.result == hf.RESULTS.successful):
        is_easy = np.all(np.isfinite(replay.weights)) and replay.size < 1e6
        return Judgement("false alarm" if is_easy else "failed honestly")
    flat, _ = ravel_pytree(eqx.filter(run.model, eqx.is_inexact_array))
    error = np.linalg.norm(np.asarray(flat, float) - replay.weights[-1]) / replay.size
    losses = replay.losses[recorded(case)]
    if run.losses.shape != losses.shape:
        return Judgement("SILENTLY WRONG", detail="other steps are recorded")
    off = np.max(np.abs(run.losses - losses)) / np.max(losses)
    return _wrong("weights or losses", float(max(error, off)), 30 * replay.doubt)


def recorded(case: Case) -> np.ndarray:
    return np.unique([*range(0, STEPS, case.record_every), STEPS])


def _judge_clock(case: Case, run: hf.Trajectory, replay: Replay) -> Judgement:
    """Flow time by formula, else where each step is a multiple of its gradient."""
    end, unit = float(run.ts[-1]), run.stats["time_unit"]
    tolerance = 1e3 * max(replay.eps, 1e-9)
    if float(run.stats["clock_defect"]) > 0 or not unit.startswith("flow time"):
        if case.time is None:
            return _wrong("sum of rates", abs(end / (case.rate * STEPS) - 1), tolerance)
        return Judgement("false alarm", detail=f"clock: {unit}")
    norms = np.array([np.linalg.norm(step.g) for step in replay.steps])
    right = flow_time(case, norms, replay.plateau)
    if right is None:
        right = case.time
    if right is None:
        right = _sum_of_multiples(replay)
    if right is None:
        return Judgement("not judged", detail="flow time is not known")
    if not np.isfinite(right):
        return Judgement("SILENTLY WRONG", detail=f"there is no flow time: {unit}")
    detail = f"clock {end:.8g} for {right:.8g}: {unit}"
    return _wrong(detail, abs(end - right) / max(right, case.rate), tolerance)


def _sum_of_multiples(replay: Replay) -> float | None:
    """Σ τ of steps −τg; NaN where steps are none, `None` where memory has a part."""
    total = 0.0
    for step in replay.steps:
        if not step.is_decay_apart or np.any(step.momentum != 0):
            return None
        u, g = step.u - step.decay, step.g
        taken = -float(u @ g) / max(float(g @ g), 1e-300)
        if np.max(np.abs(u + taken * g)) > 1e5 * replay.eps * np.max(np.abs(u)):
            return np.nan
        total += taken
    return total


def _judge_ledger(case: Case, run: hf.Trajectory, replay: Replay) -> list[Judgement]:
    """Every part of every law whose formula is known here, and the sum of all."""
    ledger, found = run.ledger, []
    if ledger is None:
        return [Judgement("SILENTLY WRONG", detail="no ledger")]
    parts = {name for account in ledger.values() for name in account.parts}
    is_apart = {
        "momentum": all(s.is_momentum_apart for s in replay.steps),
        "decay": all(s.is_decay_apart for s in replay.steps),
    }
    for part in is_apart:
        is_there = any(np.any(getattr(s, part) != 0) for s in replay.steps)
        if is_there and not (part in parts and is_apart[part]) and not ledger.note:
            outcome = "not judged" if case.has_own_multiple else "SILENTLY WRONG"
            found.append(Judgement(outcome, detail=f"{part} without a note"))
    # Where memory does not simply add a note says where it is, and not how much.
    is_told = "cannot be told" in ledger.note
    have_one_meaning = not is_told and all(
        is_apart[part] for part in is_apart.keys() & parts
    )
    for name in ledger.keys() & set(LAWS):
        account, size = ledger[name], _size(LAWS[name], replay)
        books = _books(LAWS[name], parts, replay)
        if not have_one_meaning:
            books = {"discretization": books["discretization"]}
        books["observed"] = np.array([LAWS[name](w) for w in replay.weights])
        books["observed"] -= books["observed"][0]
        if not ledger.note:
            books["explained"] = books["observed"]
        for part, sums in books.items():
            mine = np.asarray(getattr(account, part), float)
            error = np.max(np.abs(mine - sums[recorded(case)])) / size
            found.append(_wrong(f"{part} of {name}", float(error), 300 * replay.doubt))
    return found


def _size(value: Callable[[np.ndarray], Any], replay: Replay) -> float:
    return float(np.max(np.abs(value(replay.weights[0])))) + replay.size**2


def _matrices(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cut = HIDDEN * INPUTS
    return w[:cut].reshape(HIDDEN, INPUTS), w[cut:].reshape(-1, HIDDEN)


def _difference(w: np.ndarray) -> np.ndarray:
    first, second = _matrices(w)
    return first @ first.T - second.T @ second


#: Laws as formulas of the vector of weights.
LAWS: dict[str, Callable[[np.ndarray], Any]] = {
    "neurons[1]": lambda w: np.diag(_difference(w)),
    "layers[1]": lambda w: np.trace(_difference(w)),
    "matrix[1]": _difference,
}


def _books(
    value: Callable[[np.ndarray], Any], parts: set[str], replay: Replay
) -> dict[str, np.ndarray]:
    """Part → sums after 0, 1, … steps, with each part as it is defined."""
    sums: dict[str, list] = {}
    for step in replay.steps:
        named = {part: getattr(step, part) for part in {"momentum", "decay"} & parts}
        named["unattributed"] = step.base
        rest = step.u - sum(named.values())
        size = float(np.max(np.abs(step.g)))
        unit = step.g / size if size > 0 else step.g
        multiple = float(rest @ unit) / max(float(unit @ unit), 1e-300)
        named["gradient"] = multiple * unit
        named["transformation"] = rest - named["gradient"]
        added = {
            part: (value(step.w + u) - value(step.w - u)) / 2
            for part, u in named.items()
        }
        added["discretization"] = (
            value(step.w + step.u) + value(step.w - step.u)
        ) / 2 - value(step.w)
        for part, change in added.items():
            sums.setdefault(part, [np.zeros_like(change)]).append(change)
    return {part: np.cumsum(changes, axis=0) for part, changes in sums.items()}
