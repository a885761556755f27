"""Who computes the chunks: this process, those of an executor, or those of JAX's group."""

import contextlib
import dataclasses
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import numpy as np

from .._jax._device import Device
from .._jax._text import first_line
from ._compute import Computed, Job, Worker
from ._plan import Chunk, Plan
from ._program import as_numbers

#: Chunks that an executor is given at a time.
_MAX_WAITING = 64
#: Seconds between two looks at an executor whose futures are not Python's own.
_PAUSE = 0.05
#: JAX's settings that a run depends on: workers take those of the calling process.
_CONFIG = (
    "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_default_matmul_precision",
    "jax_default_prng_impl", "jax_threefry_partitionable",
)  # fmt: skip

Result = tuple[Chunk, Computed]


@dataclasses.dataclass
class Stop:
    """Whether the user wants no further chunk to be begun."""

    asked: bool = False


class InTurn:
    """Chunks one after the other, in this process."""

    def __init__(self, plan: Plan, jobs: dict[int, Job], devices: Sequence[Device]):
        self._plan = plan
        self._jobs = jobs
        self._devices = devices
        self._group: int | None = None
        self._worker: Worker | None = None

    def worker(self, group: int) -> Worker:
        """That of a group; those before are given up, with what they have traced."""
        if group != self._group or self._worker is None:
            self._worker = Worker(self._jobs[group], self._devices)
            self._group = group
        return self._worker

    def run(self, chunks: list[Chunk], batch: int, stop: Stop) -> Iterator[Result]:
        for chunk in chunks:
            if stop.asked:
                return
            columns = self._plan.columns(chunk)
            worker = self.worker(chunk.group)
            computed = worker.compute(columns, chunk.size, batch)
            batch = min(batch, computed.batch)
            yield chunk, computed


class InGroup:
    """Chunks shared out among the processes of `jax.distributed`.

    Each computes every n-th chunk on its own devices, and tells all others what came out:
    every process has the whole.
    """

    def __init__(self, engine: InTurn):
        self._engine = engine

    def run(self, chunks: list[Chunk], batch: int, stop: Stop) -> Iterator[Result]:
        count, own = jax.process_count(), jax.process_index()
        for start in range(0, len(chunks), count):
            here = chunks[start : start + count]
            mine = here[own : own + 1]
            try:
                found: Any = [c for _, c in self._engine.run(mine, batch, Stop())]
            except Exception as error:  # Others must not wait for it in vain.
                found = RuntimeError(f"process {own}: {first_line(error)}")
            told = exchange((found, stop.asked))
            for part, _ in told:
                if isinstance(part, RuntimeError):
                    raise part
            computed = [c for part, _ in told for c in part]
            yield from zip(here, computed, strict=True)
            batch = min([batch, *(c.batch for c in computed)])
            if any(asked for _, asked in told):
                return


class OfExecutor:
    """Chunks by the workers of an executor: processes of this machine or of others."""

    def __init__(self, executor: Any, plan: Plan, jobs: dict[int, Job]):
        self._executor = executor
        self._plan = plan
        self._jobs = jobs
        self._last = (0, _pickled(jobs[0]))
        self._config = {name: getattr(jax.config, name) for name in _CONFIG}

    def run(self, chunks: list[Chunk], batch: int, stop: Stop) -> Iterator[Result]:
        waiting: dict[Any, Chunk] = {}
        rest = iter(chunks)
        while True:
            while len(waiting) < _MAX_WAITING and not stop.asked:
                chunk = next(rest, None)
                if chunk is None:
                    break
                waiting[self._submit(chunk, batch)] = chunk
            if stop.asked:
                for future in waiting:
                    future.cancel()
                waiting = {f: c for f, c in waiting.items() if not _is_cancelled(f)}
            if not waiting:
                return
            for future in _done(list(waiting)):
                chunk = waiting.pop(future)
                computed = pickle.loads(_result_of(future))
                batch = min(batch, computed.batch)
                yield chunk, computed

    def _submit(self, chunk: Chunk, batch: int) -> Any:
        columns = {
            name: (as_numbers(array) if isinstance(array, jax.Array) else array)
            for name, array in self._plan.columns(chunk).items()
        }
        numbers = {name: np.asarray(array) for name, array in columns.items()}
        kinds = {
            name: str(jax.random.key_impl(array))
            for name, array in self._plan.columns(chunk).items()
            if isinstance(array, jax.Array)
        }
        task = pickle.dumps((numbers, kinds, chunk.size, batch))
        if self._last[0] != chunk.group:
            self._last = (chunk.group, _pickled(self._jobs[chunk.group]))
        return self._executor.submit(
            compute_elsewhere, self._config, self._last[1], task
        )


#: The workers of this process, by the jobs that were sent to it.
_WORKERS: dict[bytes, Worker] = {}


def compute_elsewhere(config: dict[str, Any], job: bytes, task: bytes) -> bytes:
    """What a worker process does of a sweep; it has no state but what it has compiled."""
    for name, value in config.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)
    if job not in _WORKERS:
        _WORKERS.clear()
        # Only now: arrays that are unpickled before would have the default precision.
        _WORKERS[job] = Worker(pickle.loads(job), jax.local_devices()[:1])
    numbers, kinds, count, batch = pickle.loads(task)
    columns = {
        name: jax.random.wrap_key_data(array, impl=kinds[name])
        if name in kinds
        else array
        for name, array in numbers.items()
    }
    return pickle.dumps(_WORKERS[job].compute(columns, count, batch))


def check_executor(executor: Any) -> None:
    """An error in words for an executor whose workers could not run JAX."""
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            "`executor` must have a method `submit`, as those of `concurrent.futures` do "
            f"(of Dask: `client.get_executor()`); got {type(executor).__name__}."
        )
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError(
            "Processes that are made by fork hang in JAX: make the executor by "
            "`ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))`."
        )


def exchange(value: Any) -> list[Any]:
    """What every process of `jax.distributed` has, in their order."""
    from jax.experimental import multihost_utils

    text = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(text)])))
    sizes = sizes.ravel()
    room = np.zeros(int(sizes.max()), np.uint8)
    room[: len(text)] = text
    told = np.asarray(multihost_utils.process_allgather(room))
    told = told.reshape(len(sizes), -1)
    return [
        pickle.loads(row[:size].tobytes())
        for row, size in zip(told, sizes, strict=True)
    ]


def _pickled(job: Job) -> bytes:
    """A job as bytes: by cloudpickle, which takes lambdas and notebooks, if it is there."""
    try:
        import cloudpickle
    except ImportError:
        cloudpickle = None
    try:
        return (pickle if cloudpickle is None else cloudpickle).dumps(job)
    except Exception as error:  # whatever an object raises that is no data
        way = (
            "Define it by `def` at the top of a file, not as a lambda, inside of another "
            "function or in a notebook; or `pip install cloudpickle`, with which these "
            "can be sent."
            if cloudpickle is None
            else "It, and what it uses, must not hold open files, locks, generators and "
            "the like."
        )
        raise TypeError(
            f"`run` cannot be sent to the workers of `executor` ({first_line(error)}). "
            f"{way}"
        ) from error


def _done(futures: list[Any]) -> list[Any]:
    """Those that have ended, at least one."""
    if all(isinstance(future, Future) for future in futures):
        ended = wait(futures, return_when=FIRST_COMPLETED).done
        return [future for future in futures if future in ended]
    while not (ended := [future for future in futures if future.done()]):
        time.sleep(_PAUSE)
    return ended


def _is_cancelled(future: Any) -> bool:
    with contextlib.suppress(AttributeError):
        return bool(future.cancelled())
    return True


def _result_of(future: Any) -> bytes:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker process of `executor` ended before its chunk did: it was killed, or "
            "ran out of memory. Chunks that are whole are kept in the `store`, if there "
            "is one: call the sweep again with a new executor."
        ) from error
