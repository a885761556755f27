"""What is computed of one chunk: in one program, and alone where that was not enough."""

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jax._device import Device
from .._jax._enumerations import member_names
from .._results._failure import TrajectoryError
from .._results._status import RESULTS
from ._program import Program, traced_program
from ._variables import RAISED, Outcome, Variable, outcome_of, reduce_result

#: Alone, outside of compiled programs, there are other methods to try: more room for
#: kinks, averaging over them, a solver for stiff flows, or laws that are not restored.
_RETRIED = (
    "max_steps_reached", "kink_slots_exceeded", "kink_mode_unsettled", "stuck_on_kinks",
    "law_broken",
)  # fmt: skip
_RETRIED_CODES = tuple(member_names(RESULTS).index(name) for name in _RETRIED)
#: How often a setting was run: by itself after all the others of its chunk.
TOGETHER, ALONE = 1, 2


@dataclasses.dataclass(frozen=True)
class Job:
    """What the chunks of one group share.

    - `fixed`: what `run` is given of settings outside of compiled programs.
    - `models`: whether final models are kept; `retry`: whether settings are run again.
    """

    run: Callable[..., PyTree]
    fixed: dict[str, Any]
    models: bool
    retry: bool


@dataclasses.dataclass(frozen=True)
class Computed:
    """A chunk's results, one row of every array for each of its settings.

    - `attempt`: 1 for settings that were run together, 2 for those run alone after that.
    - `errors`: row → what was raised there.
    - `retried`: row → the facts of its second run.
    - `batch`: how many settings a program took; fewer than asked for if memory ran out.
    """

    outcome: Outcome
    attempt: np.ndarray
    errors: dict[int, str]
    retried: dict[int, dict[str, str]]
    batch: int


class Worker:
    """Computes the chunks of one job, with the programs that it has traced."""

    def __init__(self, job: Job, devices: Sequence[Device]):
        self._job = job
        self._devices = tuple(devices)
        self._programs: dict[int, Program] = {}

    def program(self, columns: dict[str, Any], batch: int) -> Program:
        """The program for `batch` settings of such columns."""
        if batch not in self._programs:
            run, fixed, models = self._job.run, self._job.fixed, self._job.models

            def make():
                options = {"devices": self._devices, "models": models}
                return Program(run, fixed, columns, batch=batch, **options)

            self._programs[batch] = traced_program(
                make, (run, fixed), columns, batch, self._devices, models
            )
        return self._programs[batch]

    def compute(self, columns: dict[str, Any], count: int, batch: int) -> Computed:
        """The results of `count` settings, `batch` at once (0: each by itself)."""
        if not batch:
            return self._alone(None, columns, count, range(count), batch)
        try:
            outcome, batch = self._together(columns, count, batch)
        except MemoryError:
            raise
        except Exception:  # Of one setting, or of all: alone each shows its own.
            return self._alone(None, columns, count, range(count), batch)
        again = np.flatnonzero(np.isin(outcome.codes, _RETRIED_CODES))
        rows = [int(row) for row in again] if self._job.retry else []
        return self._alone(outcome, columns, count, rows, batch)

    def _together(
        self, columns: dict[str, Any], count: int, batch: int
    ) -> tuple[Outcome, int]:
        """All settings in one program, or in halves if there is no memory for that."""
        try:
            return self._in_pieces(columns, count, batch), batch
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            half = self._half(batch)
            if half >= batch:
                raise MemoryError(_memory_text(batch)) from error
        try:
            return self._in_pieces(columns, count, half), half
        except Exception as error:
            if _is_out_of_memory(error):
                raise MemoryError(_memory_text(half)) from error
            raise

    def _half(self, batch: int) -> int:
        devices = len(self._devices)
        return max(-(-batch // (2 * devices)) * devices, devices)

    def _in_pieces(self, columns: dict[str, Any], count: int, batch: int) -> Outcome:
        program = self.program(columns, batch)
        pieces = []
        for start in range(0, count, batch):
            part = {n: c[start : start + batch] for n, c in columns.items()}
            pieces.append(program(part))
        if len(pieces) == 1:
            return outcome_of(pieces[0], 1)
        return outcome_of(jax.tree.map(lambda *p: np.concatenate(p), *pieces), 1)

    def _alone(
        self,
        outcome: Outcome | None,
        columns: dict[str, Any],
        count: int,
        rows: Sequence[int],
        batch: int,
    ) -> Computed:
        """These rows run one by one, in place of what a program had for them."""
        attempt = np.full(
            count, ALONE if outcome is None and batch else TOGETHER, np.int8
        )
        errors: dict[int, str] = {}
        retried: dict[int, dict[str, str]] = {}
        found: dict[int, Outcome] = {}
        for row in rows:
            own = {name: _known(column[row]) for name, column in columns.items()}
            attempt[row] = ALONE if batch else TOGETHER
            try:
                found[row] = self._run_alone(own)
            except Exception as error:  # whatever a user's function raises
                errors[row] = "".join(traceback.format_exception_only(error)).strip()
            else:
                retried |= {row: found[row].facts} if outcome is not None else {}
        like = outcome if outcome is not None else next(iter(found.values()), None)
        for row, alone in list(found.items()):
            if difference := _difference(like, alone, 0 if outcome is None else 1):
                errors[row] = difference
                del found[row]
        merged = _merge(outcome, found, count, list(errors))
        return Computed(merged, attempt, errors, retried, batch)

    def _run_alone(self, own: dict[str, Any]) -> Outcome:
        try:
            result = self._job.run(**self._job.fixed, **own)
        except TrajectoryError as error:
            result = error.trajectory
        reduced = jax.device_get(reduce_result(result, models=self._job.models))
        return outcome_of(reduced, 0)


def _known(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray | np.generic) else value


def _merge(
    outcome: Outcome | None, found: dict[int, Outcome], count: int, raised: list[int]
) -> Outcome:
    """The rows of a batch, with those that were run alone in their places."""
    if outcome is None and not found:
        codes = np.full(count, RAISED)
        return Outcome({}, codes, {}, {}, {}, {})
    like = outcome if outcome is not None else next(iter(found.values()))
    codes = np.full(count, RAISED) if outcome is None else outcome.codes.copy()
    variables = {}
    for name, (dims, values) in like.variables.items():
        if outcome is None:
            rows = np.full((count, *values.shape), missing(values.dtype), values.dtype)
        else:
            rows = values.copy() if found or raised else values
        for row, alone in found.items():
            own = alone.variables.get(name)
            rows[row] = missing(rows.dtype) if own is None else own.values
        if raised:
            rows[raised] = missing(rows.dtype)
        variables[name] = Variable(dims, rows)
    for row, alone in found.items():
        codes[row] = alone.codes
    codes[raised] = RAISED
    return dataclasses.replace(like, variables=variables, codes=codes)


def _difference(like: Outcome | None, alone: Outcome, num_axes: int) -> str | None:
    """What is wrong with a setting whose arrays are not of the shape of the others'."""
    for name, (_, values) in ({} if like is None else like.variables).items():
        own, others = alone.variables.get(name), values.shape[num_axes:]
        if own is not None and own.values.shape != others:
            return (
                f"ValueError: `{name}` has shape {own.values.shape} for this setting by "
                f"itself, and {others} for the others of its chunk."
            )
    return None


def missing(dtype: np.dtype) -> Any:
    """What stands for a number that there is not: NaN, or an integer that nothing has."""
    if dtype.kind == "i":
        return np.iinfo(dtype).min
    if dtype.kind == "u":
        return np.iinfo(dtype).max
    return False if dtype.kind == "b" else np.nan


def _is_out_of_memory(error: Exception) -> bool:
    is_told = isinstance(error, jax.errors.JaxRuntimeError)
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        is_told and ("resource_exhausted" in text or "out of memory" in text)
    )


def _memory_text(batch: int) -> str:
    return (
        f"There is no memory for {batch} settings in one program: pass a smaller `chunk`, "
        "record at fewer times (`ts`, `record_every`), or leave out the matrix laws of "
        "wide layers (`laws=()` or some of `homoflow.laws(model)`)."
    )
