"""What is known of a descent before it starts."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from .._laws import Laws
from .._observe._recorder import Recorder
from ._batches import Batches, EpochOrder
from ._clock import ClockState
from ._factory import Factory

#: Room for recorded steps comes in powers of two from here on, as long as what is recorded
#: is no more than so many numbers.
_MIN_ROOM, _MAX_NUMBERS = 256, 2**22


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

    def for_all_sizes(self, numbers: int) -> "Plan":
        """A plan whose program does for other `steps` and `record_every` as well.

        `numbers`: how many are recorded at a step. The same plan where they are too many
        to have room for more of them than there are.
        """
        assert isinstance(self.num_recorded, int)
        room = max(_MIN_ROOM, 1 << (self.num_recorded - 1).bit_length())
        if room * numbers > _MAX_NUMBERS:
            return self
        sizes = jax.device_put((np.asarray(self.steps), np.asarray(self.record_every)))
        return dataclasses.replace(
            self, steps=sizes[0], record_every=sizes[1], room=room
        )
