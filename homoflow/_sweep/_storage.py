"""Where a sweep's results are kept: what every storage does, and the one in memory."""

import abc
import dataclasses
from typing import Any, final

import numpy as np

from ._compute import Computed, missing
from ._layout import Layout
from ._plan import Chunk
from ._variables import NOT_RUN, OWN_NAMES, Variable


@dataclasses.dataclass(frozen=True)
class Note:
    """What is known of a chunk beside its arrays, as JSON can hold it.

    `errors` and `retried` are by the row of a setting in its chunk, as text; `variables`
    are the names of its arrays, in order.
    """

    variables: list[str]
    facts: dict[str, str]
    labels: dict[str, list[str]]
    times: dict[str, str]
    names: dict[str, list[str]]
    errors: dict[str, str]
    retried: dict[str, dict[str, str]]
    failed: int
    batch: int


def note_of(computed: Computed) -> Note:
    outcome = computed.outcome
    return Note(
        list(outcome.variables),
        outcome.facts,
        outcome.labels,
        outcome.times,
        outcome.names,
        {str(row): text for row, text in computed.errors.items()},
        {str(row): facts for row, facts in computed.retried.items()},
        int(np.count_nonzero(outcome.codes)),
        computed.batch,
    )


def variables_of(computed: Computed) -> dict[str, Variable]:
    """All arrays of a chunk, how its settings ended among them."""
    result, attempt = OWN_NAMES
    return {
        result: Variable((), computed.outcome.codes.astype(np.int8)),
        attempt: Variable((), computed.attempt),
        **computed.outcome.variables,
    }


def fill_of(name: str, dtype: np.dtype) -> Any:
    """What an array holds where nothing was computed."""
    own = dict(zip(OWN_NAMES, (NOT_RUN, 0), strict=True))
    return own[name] if name in own else missing(dtype)


class AbstractStorage(abc.ABC):
    """Arrays of every group of a sweep, written chunk by chunk."""

    @abc.abstractmethod
    def notes(self) -> dict[int, Note]:
        """The notes of all chunks that are there as a whole, by their numbers."""

    @abc.abstractmethod
    def write(self, chunk: Chunk, computed: Computed) -> None:
        """Keeps a chunk; after this `notes` has it."""

    @abc.abstractmethod
    def read(self, group: int) -> dict[str, tuple[tuple[str, ...], Any]]:
        """Dimensions and values of all arrays of a group, those of the settings first."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Called once all chunks are there."""

    @abc.abstractmethod
    def close(self) -> None:
        """Called at the end, also of a sweep that was interrupted."""


@final
class Memory(AbstractStorage):
    """Arrays of NumPy."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._notes: dict[int, Note] = {}
        self._groups: dict[int, dict[str, Variable]] = {}

    def notes(self) -> dict[int, Note]:
        return dict(self._notes)

    def write(self, chunk: Chunk, computed: Computed) -> None:
        arrays = self._groups.setdefault(chunk.group, {})
        for name, (dims, values) in variables_of(computed).items():
            if name not in arrays:
                shape = (*self._layout.shape, *values.shape[1:])
                filled = np.full(shape, fill_of(name, values.dtype), values.dtype)
                arrays[name] = Variable((*self._layout.inner, *dims), filled)
            whole = arrays[name].values
            check_shape(name, whole.shape[len(chunk.shape) :], values.shape[1:])
            whole[chunk.region] = values.reshape((*chunk.shape, *values.shape[1:]))
        self._notes[chunk.number] = note_of(computed)

    def read(self, group: int) -> dict[str, tuple[tuple[str, ...], Any]]:
        return dict(self._groups.get(group, {}))

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def check_shape(name: str, known: tuple[int, ...], now: tuple[int, ...]) -> None:
    """`ValueError` for settings of one program whose results have other shapes."""
    if known != now:
        raise ValueError(
            f"`{name}` has shape {now} for some settings and {known} for others of the "
            "same axes: return arrays of one shape, such as a maximum or a sum over what "
            "differs, or sweep over these settings apart."
        )
