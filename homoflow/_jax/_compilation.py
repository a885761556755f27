"""Compiling many small kernels in half the time, where XLA can."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._tracing import is_concrete_call

#: XLA's newer generator of CPU code takes twice as long to compile a function of hundreds
#: of small kernels, which then run no faster unless their arrays are large; LLVM's higher
#: levels of optimization take half as long again, and what they compile runs no faster
#: either: matrix products are library calls.
_GENERATOR = "xla_cpu_use_fusion_emitters"
_OPTIONS = {_GENERATOR: False, "xla_backend_optimization_level": 1}
#: XLA adds up arrays as a tree, each of whose levels is a kernel of its own: a third of
#: what a program of many short sums compiles and runs. In float64 a plain sum of a million
#: numbers is good to 1e-13 or better; in float32 trees stay, for their accuracy.
_PLAIN_SUMS = {"xla_disable_hlo_passes": "tree_reduction_rewriter"}


@dataclasses.dataclass(frozen=True)
class FastCompileJit:
    """A compiled function, and the same compiled with less optimization.

    `fast_compile`, or in float64 `plain_sums`, is called on CPUs, with those of the options
    that this version of XLA has, and not inside of jit, vmap or grad: JAX takes compiler
    options for a function that is compiled by itself alone.
    """

    function: Callable

    def __call__(self, *args: Any) -> Any:
        if not (is_concrete_call(args) and _known_options()):
            return self.default(*args)
        return (self.plain_sums if _is_float64(args) else self.fast_compile)(*args)

    @functools.cached_property
    def default(self) -> Callable:
        return eqx.filter_jit(self.function)

    @functools.cached_property
    def fast_compile(self) -> Callable:
        return _jit(self.function, _known_options())

    @functools.cached_property
    def plain_sums(self) -> Callable:
        return _jit(self.function, _known_options(plain_sums=True))


def _jit(function: Callable, options: dict[str, Any]) -> Callable:
    return eqx.filter_jit(function, compiler_options=options)  # pyright: ignore[reportCallIssue]


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


def _is_float64(tree: PyTree) -> bool:
    """Whether all that is not whole numbers is of at least 64 bits."""
    arrays = filter(eqx.is_inexact_array, jax.tree.leaves(tree))
    return all(jnp.finfo(array.dtype).bits >= 64 for array in arrays)


@functools.cache
def _known_options(*, plain_sums: bool = False) -> dict[str, Any]:
    """Those of the options that this version of XLA has: they come and go."""
    if jax.default_backend() != "cpu":
        return {}
    options = _OPTIONS | _PLAIN_SUMS if plain_sums else _OPTIONS
    if _are_known(options):
        return options
    return {name: value for name, value in options.items() if _are_known({name: value})}


def _are_known(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:
        return False
    return True
