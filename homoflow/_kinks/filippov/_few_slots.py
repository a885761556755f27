"""Events resolved in as few slots as they need.

The time of resolving one grows with the square of the number of slots, used or not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._system import System
from ._event_point import EventPoint
from ._iterate import Iterate
from ._resolve_event import resolve

#: Most events of small networks have room in so many slots.
FEW = 32


def resolve_in_few_slots(system: System, event: EventPoint) -> Iterate:
    """What `resolve` finds, in the first `FEW` slots where no later one is used.

    With not many more slots than that a second program would cost more to compile than it
    saves: products and factors of matrices are made in as few slots as are used anyway.
    """
    capacity = event.pairs.is_used.size
    if capacity <= 4 * FEW:
        return resolve(system, event)

    def resolve_few() -> Iterate:
        return _widen(resolve(system, _narrow(event)), Iterate.blank(event))

    has_later_ones = jnp.any(event.pairs.is_used[FEW:])
    return lax.cond(has_later_ones, lambda: resolve(system, event), resolve_few)


def _narrow(event: EventPoint) -> EventPoint:
    """The point with its first slots."""
    few = slice(FEW)
    return event._replace(
        pairs=event.pairs.truncate(FEW),
        side_before=event.side_before[few],
        arrives=event.arrives[few],
        may_reconnect=event.may_reconnect[few],
        groups=event.groups.truncate(FEW),
    )


def _widen(few: Iterate, blank: Iterate) -> Iterate:
    """An iterate of the first slots, with the further ones of a blank one."""

    def widen(values: Any, blanks: Any) -> Array:
        if values.shape == blanks.shape:
            return values
        return jnp.concatenate([values, blanks[FEW:].astype(values.dtype)])

    wide: Iterate = jax.tree.map(widen, few, blank)
    # A slot that is not used is its own leader.
    own = jnp.arange(blank.base.size, dtype=jnp.int32)
    leader = own.at[:FEW].set(few.groups.leader)
    return wide._replace(groups=wide.groups._replace(leader=leader))
