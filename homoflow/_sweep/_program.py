"""The compiled program that runs many settings at once, on one device or several."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._jax._compilation import batch_compile_options
from .._jax._dependencies import dependencies_of, jax_settings
from .._jax._device import Device
from .._jax._text import first_line
from .._laws._default_laws import num_searches
from .._results._failure import MustNotThrow, failures_are_data
from ._plan import padded
from ._variables import reduce_result

_AXIS = "setting"
#: What was compiled last, by fingerprint and devices: a sweep that is called again, or
#: goes on from its store, compiles nothing.
_COMPILED: dict[tuple[str, tuple[Device, ...]], Any] = {}
_MAX_COMPILED = 16
#: Programs by all that they were traced from.
_TRACED: "OrderedDict[Hashable, Program]" = OrderedDict()
_MAX_TRACED = 16


def traced_program(
    make: Callable[[], "Program"],
    function: tuple[Callable[..., PyTree], dict[str, Any]],
    columns: dict[str, Any],
    *options: Hashable,
) -> "Program":
    """What `make` returns, or an earlier one of which all that it depends on is the same.

    That is what `function` (`run`, and what it is given outside of programs) reads, which
    is compared anew in every call, the shapes and dtypes of `columns`, `options`, the
    settings of JAX, and which laws homoflow has found. What cannot be compared is traced
    again: an answer of a function that has changed would be a wrong one.
    """
    reads = dependencies_of(function)
    if reads is None:
        return make()
    signature = tuple((n, c.shape[1:], c.dtype) for n, c in columns.items())
    key = reads, signature, options, jax_settings(), num_searches()
    if key not in _TRACED:
        _TRACED[key] = make()
        if len(_TRACED) > _MAX_TRACED:
            _TRACED.popitem(last=False)
    _TRACED.move_to_end(key)
    return _TRACED[key]


class Program:
    """`run` for a whole batch of settings, traced now and compiled when first called.

    Settings are shared out among the devices, each of which runs its own: none waits for
    another, and the program has no communication between them. Arrays that `run` closes
    over are arguments of the program, not constants that XLA would work on.
    """

    def __init__(
        self,
        run: Callable[..., PyTree],
        fixed: dict[str, Any],
        columns: dict[str, Any],
        *,
        batch: int,
        devices: Sequence[Device],
        models: bool,
    ):
        def run_setting(own):
            return reduce_result(run(**fixed, **own), models=models)

        self._mesh = Mesh(np.array(devices), (_AXIS,))
        self._batch = batch
        share = padded(columns, batch // len(devices))
        closed, shapes = _trace(run_setting, share)
        self._structure = jax.tree.structure(shapes)
        self._constants = jax.device_put(closed.consts, self._sharding())
        self._lowered = self._lower(closed, self._placed(columns))
        self.fingerprint = self._fingerprint()

    def __call__(self, columns: dict[str, Any]) -> PyTree:
        """The results of these settings, with a leading axis as long as the columns."""
        leaves = self._placed(columns)
        results = jax.device_get(self.compiled()(self._constants, *leaves))
        count = len(next(iter(columns.values())))
        kept = [np.asarray(leaf)[:count] for leaf in results]
        return jax.tree.unflatten(self._structure, kept)

    def compiled(self) -> Any:
        """The compiled program; the same if another sweep has compiled it already."""
        key = (self.fingerprint, tuple(self._mesh.devices.flat))
        if key not in _COMPILED:
            while len(_COMPILED) >= _MAX_COMPILED:
                del _COMPILED[next(iter(_COMPILED))]
            options = batch_compile_options()
            _COMPILED[key] = self._lowered.compile(compiler_options=options)
        return _COMPILED[key]

    def _fingerprint(self) -> str:
        """A hash of all operations and of all arrays that `run` closes over."""
        text = hashlib.sha256(self._lowered.as_text().encode())
        for constant in self._constants:
            array = np.asarray(as_numbers(constant))
            text.update(f"{array.dtype}{array.shape}".encode())
            text.update(np.ascontiguousarray(array).tobytes())
        return text.hexdigest()[:32]

    def _lower(self, closed: ClosedJaxpr, leaves: list[Any]) -> Any:
        """The program that every device runs for its share of the settings."""

        def share(constants, *leaves):
            return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*leaves)

        spread = PartitionSpec(_AXIS)
        program = jax.shard_map(
            share,
            mesh=self._mesh,
            in_specs=(PartitionSpec(), *(spread for _ in leaves)),
            out_specs=spread,
            # The loops of solvers begin with numbers that are the same everywhere.
            check_vma=False,
        )
        chosen = share if self._mesh.size == 1 else program
        return jax.jit(chosen).lower(self._constants, *leaves)

    def _placed(self, columns: dict[str, Any]) -> list[Any]:
        leaves = jax.tree.leaves(padded(columns, self._batch))
        return jax.device_put(leaves, self._sharding(_AXIS))

    def _sharding(self, *axes: str) -> NamedSharding | Device:
        if self._mesh.size == 1:
            return self._mesh.devices.item()
        return NamedSharding(self._mesh, PartitionSpec(*axes))


def as_numbers(array: Any) -> Any:
    """An array itself; of random keys, their data."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def _trace(
    run_setting: Callable[..., PyTree], columns: dict[str, Any]
) -> tuple[ClosedJaxpr, PyTree]:
    """`run_setting` under vmap, as operations; an error in words where it cannot be."""
    try:
        with failures_are_data():
            return jax.make_jaxpr(jax.vmap(run_setting), return_shape=True)(columns)
    except MustNotThrow:
        raise
    except Exception as error:  # whatever a user's function raises
        raise ValueError(_why_not(run_setting, columns, error)) from error


def _why_not(
    run_setting: Callable[..., PyTree], columns: dict[str, Any], error: Exception
) -> str:
    """What to do about a function that cannot be traced with these names batched."""
    names = ", ".join(f"`{name}`" for name in columns)
    said = f"{type(error).__name__}: {first_line(error)}"
    text = f"`run` cannot be compiled with {names} batched ({said})."
    for name in columns:
        if _is_traceable_without(name, run_setting, columns):
            rest = "".join(f'"{other}", ' for other in columns if other != name)
            return (
                f"{text} It can if `{name}` is a known number: pass `vectorize=({rest})`, "
                "and there is a program for each of its values. Numbers that decide about "
                "shapes, counts or branches of Python belong outside of what is batched."
            ).replace(", )", ",)")
    return (
        f"{text} Values of batched settings are not known while `run` is compiled: no "
        "`if`, `float(…)`, `int(…)`, NumPy or file may depend on them. Use `jax.numpy`, "
        "or pass `vectorize=()`, which runs each setting by itself."
    )


def _is_traceable_without(
    name: str, run_setting: Callable[..., PyTree], columns: dict[str, Any]
) -> bool:
    value = columns[name][0]
    known = value.item() if isinstance(value, np.generic) else value
    rest = {other: column for other, column in columns.items() if other != name}
    if not rest:
        return False
    try:
        with failures_are_data():
            jax.eval_shape(
                jax.vmap(lambda own: run_setting({**own, name: known})), rest
            )
    except MustNotThrow:
        return True
    except Exception:  # It cannot: that is the answer.
        return False
    return True
