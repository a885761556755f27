"""What a user sees of the exact flow's events: who crossed, slid or left, and when."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

from .._jax._tracing import is_concrete
from ._event_kind import EventKind
from ._kink_layer import KinkLayer

#: How many events a printed list shows.
_SHOWN = 10
_EXITS = (EventKind.exit_up, EventKind.exit_down)


class Event(NamedTuple):
    """One event: at `time`, of `sample`, at the unit with index `unit` of a layer.

    `layer` is the number of the layer, `kind` the name of an `EventKind`.
    """

    time: float
    sample: int
    layer: int
    unit: tuple[int, ...]
    kind: str


class Slide(NamedTuple):
    """One stretch of sliding, from `start` to `end`, of a sample at a unit.

    `end` is that of what is known if the pair still slides there. `kink` is the unit's
    number among all units of all layers.
    """

    sample: int
    kink: int
    start: float
    end: float


class Events(eqx.Module):
    """The events of an exact flow: `trajectory.events`, with `Filippov(events=…)`.

    A pair of a sample and a unit has its pre-activation z on one side of 0, or slides
    with z pinned there. The arrays have room for a fixed number of events; the first
    `count` entries hold them in order of time, the rest is NaN or −1. Under vmap every
    array gains a leading axis, and the methods need one member:
    `jax.tree.map(lambda a: a[i], trajectory.events)`.

    - `times`: in the flow's units.
    - `samples`, `kinks`: the pair; a kink is the number of a unit among all units of
        all layers, see `layer_of` and `label`.
    - `kinds`: members of `homoflow.EventKind`, as integers. Pairs that slide from the
        start on have an entry at t = 0. A pair whose z nothing reaches any more (all
        units below are off for its sample) is on the side to which it would wake.
    - `count`: how many events are kept; `dropped`: how many there was no room for.
    - `complete_until`: no event before that time is missing.
    - `layers`: the kinked operations of the model, in order of evaluation.
    - `sample_count`: how many samples there are.

    The time of an exit is late by a little: it is taken when the slope is outside of its
    interval by 1e-5 of the interval.
    """

    times: Float[Array, " room"]
    samples: Int[Array, " room"]
    kinks: Int[Array, " room"]
    kinds: Int[Array, " room"]
    count: Int[Array, ""]
    dropped: Int[Array, ""]
    complete_until: Float[Array, ""]
    layers: tuple[KinkLayer, ...] = eqx.field(static=True)
    sample_count: int = eqx.field(static=True)

    def __iter__(self) -> Iterator[Event]:
        """The events in order of time."""
        for time, sample, kink, kind in zip(*self._kept(), strict=True):
            layer, unit = self.layer_of(int(kink))
            name = EventKind(kind).name
            yield Event(float(time), int(sample), layer.number, unit, name)

    def __len__(self) -> int:
        return len(self._kept()[0])

    def layer_of(self, kink: int) -> tuple[KinkLayer, tuple[int, ...]]:
        """The layer to which a unit belongs, and its index there.

        Raises `IndexError` if there are not so many units.
        """
        start = 0
        for layer in self.layers:
            size = math.prod(layer.shape)
            if 0 <= kink - start < size:
                index = np.unravel_index(kink - start, layer.shape)
                return layer, tuple(int(i) for i in index)
            start += size
        raise IndexError(f"There are {start} units; got the number {kink}.")

    def label(self, kink: int) -> str:
        """What to call a unit: "layer 1, unit 3", "relu 2, unit (0, 4, 4)"."""
        layer, unit = self.layer_of(kink)
        if not unit:
            return layer.label
        return f"{layer.label}, unit {unit[0] if len(unit) == 1 else unit}"

    def slides(self) -> list[Slide]:
        """All stretches of sliding, in order of unit, sample and start."""
        times, samples, kinks, kinds = self._complete()
        since: dict[tuple[int, int], float] = {}
        found = []
        for time, sample, kink, kind in zip(times, samples, kinks, kinds, strict=True):
            pair = int(sample), int(kink)
            if kind == EventKind.entry:
                since[pair] = float(time)
            elif kind in _EXITS:
                found.append(Slide(*pair, since.pop(pair), float(time)))
        end = float(self.complete_until)
        found += [Slide(*pair, start, end) for pair, start in since.items()]
        return sorted(found, key=lambda s: (s.kink, s.sample, s.start))

    def sliding_at(self, t: float) -> list[tuple[int, int]]:
        """The pairs (sample, kink) that slide at time t, right after its events.

        Raises `ValueError` for a time before 0 or after `complete_until`.
        """
        times, samples, kinks, kinds = self._complete()
        end, missing = float(self.complete_until), int(self.dropped)
        if not 0 <= t <= end or (missing and t == end):
            advice = (
                f" {missing} later events were dropped: make room for them with "
                "`homoflow.Filippov(events=…)`."
            )
            raise ValueError(
                f"What slides is known from 0 to t = {end:g}; got {t:g}."
                + (advice if missing else "")
            )
        slides: set[tuple[int, int]] = set()
        for time, sample, kink, kind in zip(times, samples, kinks, kinds, strict=True):
            if time <= t and kind == EventKind.entry:
                slides.add((int(sample), int(kink)))
            elif time <= t and kind in _EXITS:
                slides.remove((int(sample), int(kink)))
        return sorted(slides)

    def sliding_count(self) -> tuple[np.ndarray, np.ndarray]:
        """How many pairs slide: the size from each time on, until the next.

        The times begin with 0 and are those at which the size changes; the last size
        holds until `complete_until`.
        """
        times, _, _, kinds = self._complete()
        change = np.where(kinds == EventKind.entry, 1, 0)
        change = np.where(np.isin(kinds, _EXITS), -1, change)
        distinct, which = np.unique(np.append(0.0, times), return_inverse=True)
        steps = np.zeros(distinct.size, int)
        np.add.at(steps, which, np.append(0, change))
        keep = (steps != 0) | (distinct == 0)
        return distinct[keep], np.cumsum(steps)[keep]

    def sliding_time(self) -> np.ndarray:
        """The total time for which each pair slides, of shape (samples, kinks)."""
        kinks = sum(math.prod(layer.shape) for layer in self.layers)
        total = np.zeros((self.sample_count, kinks))
        for slide in self.slides():
            total[slide.sample, slide.kink] += slide.end - slide.start
        return total

    def __repr__(self) -> str:
        if not is_concrete(self) or self.count.ndim:
            return f"Events(shape of times: {self.times.shape})"
        lines = [f"Events({int(self.count)} kept, {int(self.dropped)} dropped"]
        for event, kink in zip(self, self._kept()[2][:_SHOWN], strict=False):
            what = event.kind.replace("_", " ")
            where = f"sample {event.sample}, {self.label(int(kink))}"
            lines.append(f"  t = {event.time:<12.6g} {what:<14} {where}")
        if int(self.count) > _SHOWN:
            lines.append("  …")
        return "\n".join(lines) + ")"

    def _kept(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        if not is_concrete(self) or self.count.ndim:
            raise ValueError(
                "These are the events of a batch, or of a run inside jit: take one "
                "member outside, `jax.tree.map(lambda a: a[i], events)`."
            )
        arrays = self.times, self.samples, self.kinks, self.kinds
        times, samples, kinks, kinds = (
            np.asarray(a)[: int(self.count)] for a in arrays
        )
        return times, samples, kinks, kinds

    def _complete(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The events before the first that is missing."""
        times, samples, kinks, kinds = self._kept()
        if int(self.dropped):
            known = times < float(self.complete_until)
            return times[known], samples[known], kinks[known], kinds[known]
        return times, samples, kinks, kinds
