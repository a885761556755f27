"""Compiled solves without Diffrax's checks of what homoflow has checked itself.

A failed check calls Python from the compiled program. JAX's persistent compilation cache
stores no program that can call Python, and none can be compiled for another machine.
Without the checks, what one process has compiled serves the next.
"""

import contextlib
import contextvars
import types
from collections.abc import Iterator
from typing import Any

import diffrax._integrate as integrate

#: How the messages of these checks begin, in `diffrax.diffeqsolve`.
_MESSAGES = ("saveat.ts must", "Must have (t1 - t0) * dt0 >= 0")

_are_times_checked = contextvars.ContextVar("homoflow_are_times_checked", default=True)


class _EquinoxInternal(types.ModuleType):
    """`equinox.internal` as `diffrax.diffeqsolve` uses it, where checks can be left out.

    All other checks are made as always: those of a step size controller, or a model's own
    `equinox.error_if`.
    """

    def __init__(self, original: types.ModuleType):
        super().__init__(original.__name__, original.__doc__)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def error_if(self, x: Any, pred: Any, msg: str) -> Any:
        if msg.startswith(_MESSAGES) and not _are_times_checked.get():
            return x
        return self._original.error_if(x, pred, msg)


@contextlib.contextmanager
def without_time_checks() -> Iterator[None]:
    """Within it, `diffrax.diffeqsolve` does not check `saveat.ts` and the sign of `dt0`.

    Only this thread's calls are changed. homoflow has checked them already, those that
    are traced too: a run whose times are out of order, or whose step is not positive,
    fails with a `result`.
    """
    token = _are_times_checked.set(False)
    try:
        yield
    finally:
        _are_times_checked.reset(token)


# A version of Diffrax without this name keeps its checks, which costs time only.
if hasattr(integrate, "eqxi"):
    integrate.__dict__["eqxi"] = _EquinoxInternal(integrate.__dict__["eqxi"])
