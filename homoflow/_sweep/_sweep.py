"""`sweep`: a function of named settings for all of them, as one labelled data set."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from .._jax._arguments import check_flag
from .._jax._device import Device
from .._jax._text import short_repr
from .._results._stats import Stats
from ._compute import Computed, Job
from ._dataset import import_xarray, make_dataset
from ._engines import InGroup, InTurn, OfExecutor, Stop, check_executor, exchange
from ._fingerprint import make_fingerprint
from ._interrupt import stop_on_interrupt
from ._layout import Layout, layout_of
from ._plan import Chunk, Plan, make_plan
from ._progress import make_meter
from ._settings import Settings, as_settings, check_names
from ._storage import AbstractStorage, Memory
from ._variables import OWN_NAMES
from ._zarr import ZarrStore

Over = Settings | Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]]

#: Settings in one program: on a CPU the arrays of more do not stay in its caches.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 32, 256


class SweepError(RuntimeError):
    """A setting of a sweep raised an exception, or all of them did."""


def sweep(
    run: Callable[..., PyTree],
    over: Over,
    *,
    vectorize: Collection[str] | None = None,
    chunk: int | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool | Literal["force"] = True,
    executor: Any = None,
    devices: Sequence[Device] | None = None,
    models: bool = False,
    retry: bool = True,
    errors: Literal["record", "raise"] = "record",
    progress: bool = True,
) -> Any:
    """`run(**setting)` for many settings, as one labelled `xarray.Dataset`.

    Settings whose values are numbers or random keys are batched: `chunk` of them at a time
    run in one compiled program, under vmap, on all local devices. All others (activations,
    optimizers, and the numbers that decide about shapes, which `vectorize` leaves out)
    run outside of it, with a program for each of their combinations. What `run` gets of
    batched settings are traced arrays, in JAX's default dtypes; of all others the values
    as they were given.

    **Arguments:**

    - `run`: a function of the settings by their names. It returns a `homoflow.Trajectory`,
        or a pytree of arrays and trajectories. Batched flows and descents need
        `throw=False`: how a run ended is data.
    - `over`: axes by name, of which every combination is run, `{"seed": range(64),
        "scale": [0.1, 1.0]}`; `homoflow.grid(…)`, `homoflow.zipped(…)`; or a list of
        settings, `[{"seed": 0, "scale": 0.1}, …]`, whose dimension is `setting`.
    - `vectorize`: the names that are batched; by default all whose values are numbers
        or keys. `()`: every setting runs by itself, outside of any compiled program, with
        all that homoflow chooses by the numbers.
    - `chunk`: how many settings one program takes at most; by default 32 for each device
        of a CPU, 256 for each other one. Memory goes by it, not by the sweep.
    - `store`: a path for a Zarr store, or an address that fsspec knows. Every chunk is
        written when it is done; a sweep that was killed at any moment goes on after the
        last whole chunk, and ends with the same bytes. Needs `homoflow[sweep]`.
    - `resume`: `True` goes on with a store that is there, and refuses one of other
        settings, of another function or of other versions of homoflow and JAX. `"force"`
        goes on in spite of another function or versions. `False` refuses a store that is
        there.
    - `executor`: who computes the chunks instead of this process: anything with the
        `submit` of `concurrent.futures.Executor`.
    - `devices`: those of this process that share every chunk; by default all local ones.
    - `models`: also keep the final models (and those at all times, of `save_models`):
        see `homoflow.models_of`.
    - `retry`: run a setting again alone, outside of any compiled program, where it ran out
        of steps or of room for kinks, or a law broke: there homoflow has more choices.
    - `errors`: `"record"` keeps the text of an exception with its setting, and goes on;
        `"raise"` raises at the first one.
    - `progress`: whether to show settings done, failed, and the time left.

    **Returns:** an `xarray.Dataset`. In front are the dimensions of `over` with their
    values; then everything as in `homoflow.Trajectory.to_xarray` (a number of `stats` that
    is called like an axis is `stats.steps`, say); arrays of a pytree by their paths.
    `result` says how each setting ended: a name of `homoflow.RESULTS`, `raised` or
    `not_run`. `attempt` is 1 where a setting ran with its chunk, 2 where it was run again
    alone, 0 where it was not run. Numbers of settings without an answer are NaN, and so
    are those after the time where a run failed. With a `store` arrays are read from it
    when they are used. Ctrl-C ends the current chunk and returns what there is.

    **Raises:** `TypeError` or `ValueError` for settings that `run` does not take, a `run`
    that cannot be compiled, results of different shapes, and a store of another sweep;
    `homoflow.SweepError` for exceptions of `run` if asked for, or if no setting has an
    answer; `MemoryError` if half a chunk is still too large.

    ```python
    x = jax.random.normal(jax.random.key(1), (20, 3))

    def run(seed, scale):
        model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(seed))
        model = jax.tree.map(lambda w: scale * w, model)
        return hf.descend(model, (x, x[:, :1]), 50, learning_rate=0.1, throw=False)

    data = hf.sweep(run, {"seed": range(8), "scale": [0.5, 1.0]}, progress=False)
    data.losses.mean("seed").sel(scale=0.5)
    ```
    """
    import_xarray()
    _check_options(resume, models, retry, errors, progress)
    settings = as_settings(over)
    check_names(run, settings)
    used = _devices(devices, executor)
    plan = make_plan(
        settings,
        vectorize,
        chunk,
        default_chunk=_default_chunk(used),
        num_devices=len(used),
    )
    chunks, layout = plan.chunks(), layout_of(plan)
    jobs = {c.group: Job(run, plan.fixed(c.outer), models, retry) for c in chunks}
    here = InTurn(plan, jobs, used)
    program, stop = None, Stop()
    with stop_on_interrupt(stop):
        if plan.inner:  # Also shows whether `run` can be compiled at all.
            first = here.worker(0).program(plan.columns(chunks[0]), plan.batch)
            program = first.fingerprint
    fingerprint = make_fingerprint(plan, run, program, models=models, retry=retry)
    storage = _open(store, fingerprint, layout, resume)
    try:
        engine = _engine(here, executor, plan, jobs)
        with stop_on_interrupt(stop):
            _compute_rest(engine, plan, layout, storage, errors, progress, stop)
        if stop.asked and not storage.notes():  # There is nothing to return.
            raise KeyboardInterrupt
        if store is not None and _is_group():
            exchange(None)  # Only then all is written.
            return load_sweep(store)
        return make_dataset(layout, storage, chunks, fingerprint)
    finally:
        storage.close()


def load_sweep(store: str | os.PathLike[str]) -> Any:
    """The data set of a sweep's `store`, also of one that is not at its end yet.

    Settings that have not run are NaN, and their `result` is `not_run`.

    **Arguments:** `store`, as it was given to `homoflow.sweep`.

    **Returns:** the `xarray.Dataset` that `sweep` returns; its arrays are read when they
    are used.

    **Raises:** `FileNotFoundError` if there is none, `ValueError` if it is the store of
    something else.

    ```python
    def run(seed):
        return jax.random.normal(jax.random.key(seed), (3,))

    hf.sweep(run, {"seed": range(4)}, store="draws.zarr", progress=False)
    hf.load_sweep("draws.zarr").value.mean("seed")
    ```
    """
    import_xarray()
    storage, fingerprint = ZarrStore.open_to_read(store)
    layout = storage.layout
    return make_dataset(layout, storage, layout.chunks(), fingerprint)


def _check_options(
    resume: Any, models: Any, retry: Any, errors: Any, progress: Any
) -> None:
    for name, flag in (("models", models), ("retry", retry), ("progress", progress)):
        check_flag(name, flag)
    if resume not in (True, False, "force"):
        raise ValueError(
            f'`resume` must be True, False or "force"; got {short_repr(resume)}.'
        )
    if errors not in ("record", "raise"):
        raise ValueError(
            f'`errors` must be "record" or "raise"; got {short_repr(errors)}.'
        )


def _devices(devices: Sequence[Device] | None, executor: Any) -> tuple[Device, ...]:
    if executor is not None:
        check_executor(executor)
        if devices is not None:
            raise ValueError(
                "`devices` are those of this process, and `executor` computes elsewhere: "
                "each of its workers uses its first device. Give one of the two."
            )
        return tuple(jax.local_devices()[:1])
    if devices is None:
        return tuple(jax.local_devices())
    chosen = tuple(devices)
    if not chosen or not all(isinstance(device, jax.Device) for device in chosen):
        raise TypeError(
            "`devices` must be a list of devices, such as `jax.local_devices()[:2]`; got "
            f"{short_repr(devices)}."
        )
    return chosen


def _default_chunk(devices: tuple[Device, ...]) -> int:
    is_cpu = devices[0].platform == "cpu"
    return len(devices) * (_CHUNK_ON_CPU if is_cpu else _CHUNK_ELSEWHERE)


def _is_group() -> bool:
    return jax.process_count() > 1


def _engine(here: InTurn, executor: Any, plan: Plan, jobs: dict[int, Job]) -> Any:
    if executor is not None:
        return OfExecutor(executor, plan, jobs)
    return InGroup(here) if _is_group() else here


def _open(
    store: str | os.PathLike[str] | None,
    fingerprint: dict[str, Any],
    layout: Layout,
    resume: bool | Literal["force"],
) -> AbstractStorage:
    """The storage that this process writes to; of a group only the first has a store."""
    if store is None or jax.process_index() > 0:
        return Memory(layout)
    return ZarrStore.open_to_write(store, fingerprint, layout, resume)


def _compute_rest(
    engine: Any,
    plan: Plan,
    layout: Layout,
    storage: AbstractStorage,
    errors: str,
    progress: bool,
    stop: Stop,
) -> None:
    """Computes and keeps every chunk that is not there."""
    chunks, notes = plan.chunks(), storage.notes()
    if _is_group():  # The first process knows.
        notes = exchange(notes)[0]
    rest = [chunk for chunk in chunks if chunk.number not in notes]
    batch = min([plan.batch, *(note.batch for note in notes.values())])
    done = len(plan.settings) - sum(chunk.size for chunk in rest)
    failed = sum(note.failed for note in notes.values())
    meter = make_meter(progress, len(plan.settings), done, failed)
    texts = [text for note in notes.values() for text in note.errors.values()]
    try:
        # A chunk is written while the next one is computed.
        with ThreadPoolExecutor(1) as writer:
            written: Future | None = None
            for chunk, computed in engine.run(rest, batch, stop):
                _warn_of_memory(computed.batch, batch)
                batch = min(batch, computed.batch)
                if errors == "raise":
                    _raise_first(layout, chunk, computed.errors)
                computed = _with_free_names(layout, computed)
                if written is not None:
                    written.result()
                written = writer.submit(storage.write, chunk, computed)
                texts += computed.errors.values()
                failed_here = int(np.count_nonzero(computed.outcome.codes))
                meter.add(chunk.size, failed_here)
            if written is not None:
                written.result()
    finally:
        meter.close()
    if len(texts) == len(plan.settings):
        raise SweepError(f"`run` raised for every setting: {texts[0]}")
    if len(storage.notes()) == len(chunks):
        storage.finish()


def _warn_of_memory(batch: int, asked: int) -> None:
    if batch < asked:
        warnings.warn(
            f"There is no memory for {asked} settings in one program: the sweep goes on "
            f"with {batch} at once. Pass `chunk={batch}` to begin so.",
            stacklevel=4,
        )


def _raise_first(layout: Layout, chunk: Chunk, errors: dict[int, str]) -> None:
    for row, text in errors.items():
        where = layout.describe(chunk.place(row))
        raise SweepError(f"`run` raised at {where}: {text}")


def _with_free_names(layout: Layout, computed: Computed) -> Computed:
    """Numbers of `stats` under another name where an axis has theirs (`steps`, say).

    `ValueError` for any other result that is called like an axis.
    """
    outcome = computed.outcome
    own = {*layout.axes, *(n for columns in layout.axes.values() for n in columns)}
    dims = {dim for variable in outcome.variables.values() for dim in variable.dims}
    taken = own & {*outcome.variables, *dims, *OWN_NAMES, "error"}
    for name in taken:
        if name not in Stats.schema or name in dims:
            raise ValueError(
                f"`{name}` is an axis of the sweep and a name in its results: rename the "
                "argument of `run`."
            )
    if not taken:
        return computed
    renamed = {
        f"stats.{name}" if name in taken else name: variable
        for name, variable in outcome.variables.items()
    }
    outcome = dataclasses.replace(outcome, variables=renamed)
    return dataclasses.replace(computed, outcome=outcome)
