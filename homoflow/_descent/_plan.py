"""What is known of a descent before it starts."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._laws import Laws
from .._observe._recorder import Recorder
from ._batches import Batches, EpochOrder
from ._clock import ClockState
from ._factory import Factory


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

    `laws`: those that an account is kept of.
    """

    steps: int = eqx.field(static=True)
    record_every: int = eqx.field(static=True)
    batches: Batches | None
    save_models: bool = eqx.field(static=True)
    factory: Factory
    laws: Laws | None
    recorder: Recorder

    @property
    def num_blocks(self) -> int:
        """How many times `record_every` steps are taken; some more may follow."""
        return self.steps // self.record_every

    @property
    def num_steps_left(self) -> int:
        """The steps after the last whole block."""
        return self.steps % self.record_every

    def recorded_steps(self) -> np.ndarray:
        """The steps before which something is recorded, and the end."""
        starts = np.arange(0, self.steps, self.record_every)
        return np.append(starts, self.steps)
