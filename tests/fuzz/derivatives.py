"""Derivatives through flows, beside finite differences of an oracle's flow."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import flow_cases
import jax
import jax.numpy as jnp
import numpy as np
from flow_cases import OPTIONS, SCALES
from flow_judge import SLACK, UNDERSTATED, growth_of, truth_of
from jax.flatten_util import ravel_pytree
from judgement import GaveUp, Judgement, refused
from kink_oracle import SLOPES
from zoo import MODELS

import homoflow as hf

#: Steps of the finite differences, relative to the weights, and what rounding leaves.
STEPS, NOISE = (1e-4, 2.5e-5), 1e-5
#: Options that rule the exact flow out.
AVERAGING = {"Averaged", "weight_decay=0.1"}


@dataclasses.dataclass(frozen=True)
class Case(flow_cases.Case):
    """A flow, and the mode in which its end is differentiated."""

    mode: str = "forward"


def draw_case(number: int) -> Case:
    """A flow of a size at which differences can be taken, in a mode that is to work.

    One in twenty programs is any, such as derivatives through averaging: refused.
    """
    drawn = flow_cases.draw_case(number)
    program = np.random.default_rng([4, number // flow_cases.PER_PROGRAM])
    is_any = program.random() < 0.05
    followed = [model for model in SLOPES if model in flow_cases.FOLLOWED or is_any]
    smooth = [m for m in MODELS if not dataclasses.replace(drawn, model=m).has_kinks]
    model = str(program.choice([*MODELS] if is_any else [*smooth, *followed]))
    fields: dict[str, Any] = dataclasses.asdict(drawn) | {"model": model}
    modes = ["forward"] if model in followed and not is_any else ["forward", "reverse"]
    case = Case(**fields, mode=str(program.choice(modes)))
    options = [
        o for o in OPTIONS
        if flow_cases.fits(case, o)
        and (is_any or not case.has_kinks or o not in AVERAGING)
    ]  # fmt: skip
    return dataclasses.replace(
        case,
        options=str(program.choice(options)),
        scale=case.scale if case.scale in SCALES[3:] else 1.0,
    )


def judge(case: Case) -> Judgement:
    """Compares ∂⟨c, w(t1)⟩ along a direction of weights, data and time."""
    call = case.draw()
    start, _ = ravel_pytree(eqx.filter(call.model, eqx.is_inexact_array))
    size = float(jnp.linalg.norm(start))
    rng = np.random.default_rng([5, case.seed])
    c, dw, dx = (
        rng.standard_normal(s) for s in (start.shape, start.shape, call.x.shape)
    )
    dw, dx, dt = size / np.sqrt(dw.size) * dw, 0.1 * dx * np.asarray(call.x), 0.3
    dt = dt * call.t1
    point = start, call.x, jnp.asarray(call.t1)
    along = tuple(map(jnp.asarray, (dw, dx, dt)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            plain = dataclasses.replace(case, seed=0, scale=1.0, t1=1.0, style="normal")
            found, (estimate, is_good) = _program(plain)(point, along, call.y, c / size)
        except Exception as error:
            return refused(error)
    found = float(found)
    if not bool(is_good):
        return Judgement("failed honestly", detail="the flow failed")
    try:
        true, doubt = _by_differences(case, call, c / size, (dw, dx, dt))
        estimate = None if estimate is None else float(estimate)
        promised = _promised(case, estimate)
        error = abs(found - true) / max(abs(true), 1.0)
        if estimate is None and not error <= promised + 3 * doubt:
            promised *= growth_of(case, call)
    except GaveUp:
        return Judgement("not judged", detail="the oracle gave up")
    if not np.isfinite(found):
        return Judgement("told", error, promised, "not finite")
    if error <= promised + 3 * doubt:
        return Judgement("right", error, promised)
    if told:
        return Judgement("told", error, promised, str(told[0].message)[:200])
    detail = f"{found:.8g} for {true:.8g}, doubt {doubt:.1e}"
    return Judgement("SILENTLY WRONG", error, promised, detail)


@functools.lru_cache(maxsize=8)
def _program(case: Case) -> Callable:
    """The derivative along a direction: one program for all numbers."""
    arrays, frozen = eqx.partition(case.draw().model, eqx.is_inexact_array)
    _, unravel = ravel_pytree(arrays)

    options = case.keywords
    if case.mode == "forward" and not case.has_kinks:
        options["adjoint"] = diffrax.ForwardMode()

    def end(*arguments):
        w, x, t1, y, c = arguments
        run = hf.flow(
            eqx.combine(unravel(w), frozen), (x, y), t1, **options
        )  # fmt: skip
        flat, _ = ravel_pytree(eqx.filter(run.model, eqx.is_inexact_array))
        is_good = run.result == hf.RESULTS.successful
        return c @ flat, (run.stats["error_estimate"], is_good)

    def forward(point, along, y, c):
        _, slope, aux = jax.jvp(lambda *p: end(*p, y, c), point, along, has_aux=True)
        return slope, aux

    def reverse(point, along, y, c):
        slopes, aux = jax.grad(end, argnums=(0, 1, 2), has_aux=True)(*point, y, c)
        return sum(jnp.sum(a * b) for a, b in zip(slopes, along, strict=True)), aux

    return jax.jit(forward if case.mode == "forward" else reverse)


def _promised(case: Case, estimate: float | None) -> float:
    """What errors of derivatives are allowed: ten times those of the flow.

    Where the gradient itself has a kink, a step over it keeps the flow's tolerance and not
    the derivative's, which follows the root of it.
    """
    rtol = OPTIONS[case.options].get("rtol") or 1e-8
    if case.loss == "Huber" or case.model == "squared relu":
        return 10 * float(np.sqrt(rtol))
    if estimate is not None:
        return 10 * max(UNDERSTATED * estimate, rtol)
    return 10 * SLACK * rtol


def _by_differences(case: Case, call, c, along) -> tuple[float, float]:
    """Central differences with two steps, and how far apart they are."""
    dw, dx, dt = along

    def end(h):
        moved = dataclasses.replace(call, x=call.x + h * dx, t1=call.t1 + h * dt)
        ts = np.array([0, moved.t1])
        states, doubt = truth_of(case, moved, ts, h * dw, is_coarse_enough=False)
        return c @ states[-1], doubt

    slopes, noise = [], NOISE
    for h in STEPS:
        (ahead, doubt), (behind, _) = end(h), end(-h)
        slopes.append((ahead - behind) / (2 * h))
        noise = max(noise, doubt / h)
    if noise > 1e-2:
        raise GaveUp
    coarse, fine = slopes
    spread = abs(fine - coarse)
    if spread > 1e-2 * max(abs(fine), 1.0):
        raise GaveUp  # A kink between them.
    return fine + (fine - coarse) / 15, spread + noise
