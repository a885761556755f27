"""Progress meters for long runs, Diffrax's own."""

import importlib.util
from typing import Any

import diffrax as dfx
import jax.numpy as jnp

from ._arguments import refuse_class
from ._text import short_repr

Progress = bool | dfx.AbstractProgressMeter


class _Meter(dfx.AbstractProgressMeter):
    """Diffrax's meters start from JAX's default dtype, and have to stay in it."""

    meter: dfx.AbstractProgressMeter

    def init(self) -> Any:
        return self.meter.init()

    def step(self, state: Any, progress: Any) -> Any:
        return self.meter.step(state, jnp.asarray(progress, jnp.zeros(()).dtype))

    def close(self, state: Any) -> None:
        self.meter.close(state)


def check_progress(progress: Any) -> None:
    """`TypeError` unless it is a flag or one of Diffrax's meters."""
    refuse_class("progress", progress)
    if not isinstance(progress, bool | dfx.AbstractProgressMeter):
        raise TypeError(
            "`progress` must be True, False or a progress meter of Diffrax, such as "
            f"`diffrax.TextProgressMeter()`; got {short_repr(progress)}."
        )


def as_meter(progress: Progress) -> dfx.AbstractProgressMeter:
    """The meter asked for: none, a bar (lines of text without tqdm), or the given one."""
    if isinstance(progress, dfx.NoProgressMeter):
        return progress
    if isinstance(progress, dfx.AbstractProgressMeter):
        return _Meter(progress)
    if not progress:
        return dfx.NoProgressMeter()
    if importlib.util.find_spec("tqdm") is None:
        return _Meter(dfx.TextProgressMeter())
    return _Meter(dfx.TqdmProgressMeter())
