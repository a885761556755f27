"""A trajectory that goes on in logarithmic time, to the limit of its direction."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._problem._problem import Problem
from ..._results._margin_certificate import MarginCertificate
from ..._results._stationary_kind import StationaryKind
from ..._results._stats import Stats
from ..._results._status import RESULTS
from ..._results._totals import totals
from ..._results._trajectory import Trajectory
from ._limit_direction import LimitDirection
from ._margins import flat_weights, with_flat_weights


def with_limit_direction(
    trajectory: Trajectory, late: LimitDirection, problem: Problem, *, records: bool
) -> Trajectory:
    """The run up to where logarithmic time began, and on to the limit of its direction.

    `records`: whether what was recorded on the way is added to what there is.
    """
    certificate = late.certificate
    assert certificate is not None
    log_ts = np.concatenate(late.log_ts)
    limit = _of_unit_norm(problem, certificate)
    longer = with_late_records(trajectory, late, problem) if records else trajectory
    with np.errstate(over="ignore"):
        end = float(np.exp(log_ts[-1]))
    numbers = totals([trajectory, *late.parts]) | {
        "stationary_kind": StationaryKind.diverges_in_direction,
        "time_reached": jnp.asarray(end),
        "log_time_reached": jnp.asarray(log_ts[-1]),
        "normalized_margin": jnp.asarray(certificate.margin),
        "kkt_residual": jnp.asarray(certificate.residual),
        "direction_distance": jnp.asarray(certificate.moved),
    }
    return dataclasses.replace(
        longer,
        model=limit,
        limit=certificate,
        result=RESULTS.successful,
        stats=Stats({**trajectory.stats.numbers, **numbers}, trajectory.stats.facts),
    )


def _of_unit_norm(problem: Problem, certificate: MarginCertificate) -> PyTree:
    at = eqx.filter(certificate.model, problem.mask)
    there = eqx.tree_at(lambda p: p.weights, problem, at)
    w = flat_weights(there)
    return with_flat_weights(problem, w / np.linalg.norm(w)).model


def with_late_records(
    trajectory: Trajectory, late: LimitDirection, problem: Problem
) -> Trajectory:
    """All records in order; `observed` has the logarithms of times and losses too."""
    with np.errstate(divide="ignore", over="ignore"):
        early = {
            "log_ts": np.log(np.asarray(trajectory.ts)),
            "log_losses": np.log(np.asarray(trajectory.losses)),
        }
        log_ts = np.concatenate(late.log_ts) if late.log_ts else np.zeros(0)
        ts = np.exp(log_ts)

    def joined(select: Callable[[Trajectory], PyTree]) -> PyTree:
        runs = [select(run) for run in (trajectory, *late.parts)]
        return jax.tree.map(
            lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]),
            *runs,
        )

    def over_time(run: Trajectory) -> PyTree:
        return run.losses, run.laws, run.grad_norms, run.squared_norms

    with_logs = dataclasses.replace(
        trajectory, observed={**trajectory.observed, "log_losses": early["log_losses"]}
    )
    observed = jax.tree.map(
        lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]),
        *[run.observed for run in (with_logs, *late.parts)],
    )
    observed["log_ts"] = jnp.concatenate([early["log_ts"], log_ts])
    losses, laws, grad_norms, squared_norms = joined(over_time)
    models = trajectory.models
    if models is not None:
        trained = joined(lambda run: eqx.filter(run.models, problem.mask))
        models = eqx.combine(trained, problem.frozen)
    return dataclasses.replace(
        trajectory,
        ts=jnp.concatenate([trajectory.ts, ts]),
        losses=losses,
        laws=laws,
        grad_norms=grad_norms,
        squared_norms=squared_norms,
        observed=observed,
        observed_every=tuple((name, 1) for name in observed),
        models=models,
    )
