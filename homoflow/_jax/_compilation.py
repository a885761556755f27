"""Compiling many small kernels in half the time, where XLA can."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ._tracing import is_concrete_call

#: XLA's newer generator of CPU code takes twice as long to compile a function of hundreds
#: of small kernels, which then run no faster unless their arrays are large; LLVM's higher
#: levels of optimization take half as long again, and what they compile runs no faster
#: either: matrix products are library calls.
_GENERATOR = "xla_cpu_use_fusion_emitters"
_OPTIONS = {_GENERATOR: False, "xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class FastCompileJit:
    """A compiled function, and the same compiled with less optimization.

    `fast_compile` is called on CPUs, with those of the options that this version of XLA
    has, and not inside of jit, vmap or grad: JAX takes compiler options for a function
    that is compiled by itself alone.
    """

    function: Callable

    def __call__(self, *args: Any) -> Any:
        takes_options = is_concrete_call(args) and _known_options()
        return (self.fast_compile if takes_options else self.default)(*args)

    @functools.cached_property
    def default(self) -> Callable:
        return eqx.filter_jit(self.function)

    @functools.cached_property
    def fast_compile(self) -> Callable:
        options = _known_options()
        return eqx.filter_jit(self.function, compiler_options=options)  # pyright: ignore[reportCallIssue]


def fast_compile_jit(function: Callable) -> FastCompileJit:
    """`eqx.filter_jit(function)`, compiled in half the time."""
    return FastCompileJit(function)


def batch_compile_options() -> dict[str, Any] | None:
    """Options for `jax.stages.Lowered.compile` of a whole batch, where XLA has them.

    With the older generator of code batches of 32 to 256 small networks run a third
    slower.
    """
    options = _known_options().items()
    return {name: value for name, value in options if name != _GENERATOR} or None


@functools.cache
def _known_options() -> dict[str, bool | int]:
    """The options that this version of XLA has: they come and go."""
    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in _OPTIONS.items() if _is_known(name, value)}


def _is_known(name: str, value: bool | int) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True
