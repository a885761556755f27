"""Compiling many small kernels in half the time, where XLA can."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ._tracing import is_concrete_call

#: XLA's newer generator of CPU code takes twice as long to compile a function of hundreds
#: of small kernels, which then run no faster; LLVM's higher levels of optimization take
#: half as long again, and what they compile runs no faster either: matrix products are
#: library calls.
_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class FastCompileJit:
    """A compiled function, and the same compiled with less optimization.

    `fast_compile` is called on CPUs where this version of XLA has the choice, and not
    inside of jit, vmap or grad: JAX takes compiler options for a function that is
    compiled by itself alone.
    """

    default: Callable
    fast_compile: Callable

    def __call__(self, *args: Any) -> Any:
        takes_options = is_concrete_call(args) and _has_options()
        return (self.fast_compile if takes_options else self.default)(*args)


def fast_compile_jit(function: Callable) -> FastCompileJit:
    """`eqx.filter_jit(function)`, compiled in half the time."""
    return FastCompileJit(
        eqx.filter_jit(function),
        eqx.filter_jit(function, compiler_options=_OPTIONS),  # pyright: ignore[reportCallIssue]
    )


def fast_compile_options() -> dict[str, Any] | None:
    """Options for `jax.stages.Lowered.compile` that do the same, where XLA has them."""
    return dict(_OPTIONS) if _has_options() else None


@functools.cache
def _has_options() -> bool:
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS)()
    except jax.errors.JaxRuntimeError:
        return False
    return True
