"""What is known of a descent before it starts."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from .._jax._tracing import is_addressable, is_concrete
from .._laws import Laws
from .._observe._base import AbstractObservable
from .._observe._recorder import STANDARD, Recorder
from .._problem._problem import Problem
from ._batches import Batches, EpochOrder
from ._clock import ClockState
from ._factory import Factory

#: Room for recorded steps comes in powers of two from here on, as long as what is recorded
#: is no more than so many numbers.
_MIN_ROOM, _MAX_NUMBERS = 256, 2**22
#: An account holds so many arrays of a law's size at most.
_LEDGER_COPIES = 12


class Continuation(eqx.Module):
    """What gradient descent hands on to a run that goes on where it ended.

    - `optimizer_state`: the optimizer's memory; `order`: of the samples in this epoch.
    - `step`: how many steps were taken so far; `clock`: where its clock is.
    """

    optimizer_state: PyTree
    step: Int[Array, ""]
    order: EpochOrder | None
    clock: ClockState | None


class Plan(eqx.Module):
    """Everything about a run that is known before it starts.

    - `steps`, `record_every`: numbers, of which others compile anew; or arrays, of a
        program that does for all of them.
    - `room`: for so many recorded steps there is room, if not for all that there are.
    - `are_values_known`: whether weights and data are checked already, as numbers.
    - `laws`: those that an account is kept of.
    """

    steps: int | Int[Array, ""]
    record_every: int | Int[Array, ""]
    batches: Batches | None
    save_models: bool = eqx.field(static=True)
    factory: Factory
    laws: Laws | None
    recorder: Recorder
    room: int = eqx.field(static=True)
    are_values_known: bool = eqx.field(static=True)

    @property
    def num_recorded(self) -> int | Int[Array, ""]:
        """At how many steps something is recorded, the end included."""
        return self.row(self.steps) + 1

    def row(self, step: int | Int[Array, ""]) -> int | Int[Array, ""]:
        """The place of a step among those recorded, or of the next one that is."""
        if isinstance(step, int) and isinstance(self.record_every, int):
            return -(-step // self.record_every)
        # Of numbers that are not negative: `//` is ten operations.
        return jax.lax.div(step + (self.record_every - 1), self.record_every)

    def is_due(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether something is recorded before a step, the end apart."""
        return jax.lax.rem(step, jnp.asarray(self.record_every, step.dtype)) == 0

    @property
    def is_for_all_sizes(self) -> bool:
        """Whether `steps` and `record_every` are known only when the program runs."""
        return not isinstance(self.steps, int)

    def recorded_steps(self) -> Int[Array, " room"]:
        """The steps before which something is recorded, and the end."""
        return jnp.minimum(jnp.arange(self.room) * self.record_every, self.steps)

    def for_all_sizes(self, problem: Problem) -> "Plan":
        """A plan whose program does for other `steps` and `record_every` as well.

        The same plan where there may be too much to record to have room for more of it
        than there is.
        """
        assert isinstance(self.num_recorded, int)
        laws = self.recorder.laws
        room = max(_MIN_ROOM, 1 << (self.num_recorded - 1).bit_length())
        copies = 1 if self.laws is None else _LEDGER_COPIES
        numbers = copies * laws.whole.num_values(problem.weights)
        is_standard = self.recorder.observables.keys() == STANDARD
        if self.save_models or not is_standard or room * numbers > _MAX_NUMBERS:
            return self
        sizes = np.asarray(self.steps), np.asarray(self.record_every)
        steps, record_every = jax.device_put(sizes)
        return dataclasses.replace(
            self, steps=steps, record_every=record_every, room=room
        )


def make_plan(
    problem: Problem,
    recorded: Laws,
    asked: dict[str, AbstractObservable],
    sizes: tuple[int, int],
    *,
    batches: Batches | None,
    save_models: bool,
    factory: Factory,
    ledger: bool,
) -> Plan:
    """The plan of a run of `sizes`: how many steps, and after how many it records."""
    steps, record_every = sizes
    record_every = min(record_every, steps)
    num_recorded = -(-steps // record_every) + 1
    return Plan(
        steps=steps,
        record_every=record_every,
        batches=batches,
        save_models=save_models,
        factory=factory.with_arrays(problem.weights),
        laws=recorded.whole if ledger else None,
        recorder=Recorder.create(recorded, {}, asked, num_recorded),
        room=num_recorded,
        are_values_known=is_concrete(problem) and is_addressable(problem),
    )
