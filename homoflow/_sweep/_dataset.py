"""The labelled data set of a sweep, from what its storage has."""

import itertools
import json
from typing import Any

import numpy as np

from ._compute import missing
from ._layout import Layout
from ._plan import Chunk
from ._storage import AbstractStorage, Note
from ._variables import NOT_RUN, OWN_NAMES, RAISED, RESULT_NAMES

_RESULT, _ATTEMPT = OWN_NAMES
#: Numbers that are looked at together.
_MAX_NUMBERS = 100_000


def import_xarray() -> Any:
    try:
        import xarray as xr
    except ImportError as error:
        raise ImportError(
            "`sweep` returns a data set of xarray: `pip install 'homoflow[sweep]'`, or "
            "xarray alone."
        ) from error
    return xr


def make_dataset(
    layout: Layout, storage: AbstractStorage, chunks: list[Chunk], fingerprint: dict
) -> Any:
    """The data set of all settings of a sweep, those that have not run included.

    Of a store with one group the arrays stay on disk until they are used.
    """
    xr = import_xarray()
    notes = storage.notes()
    merged = _merged(list(notes.values()))
    groups = [storage.read(group) for group in range(layout.num_groups)]
    data = {
        name: _assembled(name, layout, groups)
        for name in (*OWN_NAMES, *merged.variables)
    }
    result = np.asarray(data[_RESULT][1]).astype(int)
    is_missing = np.isin(result, (RAISED, NOT_RUN))
    has_gaps = bool(is_missing.any()) or any(note.retried for note in notes.values())
    if has_gaps:
        data = {
            name: (dims, values if name in OWN_NAMES else _with_nan(values, is_missing))
            for name, (dims, values) in data.items()
        }
    data[_RESULT] = (data[_RESULT][0], result)
    names = {_RESULT: list(RESULT_NAMES), **merged.names}
    for name, members in names.items():
        dims, values = data[name]
        data[name] = (dims, _named(np.asarray(values), members))
    coordinates = {**_coordinates(layout), **_times(layout, data, merged, is_missing)}
    for dim, labels in merged.labels.items():
        coordinates[dim] = ((dim,), labels)
    for name in coordinates:
        data.pop(name, None)
    data |= _errors(layout, notes, chunks)
    dataset = xr.Dataset(data, coordinates)
    return _with_facts(dataset, layout, notes, chunks, fingerprint)


def _merged(notes: list[Note]) -> Note:
    """Labels, times and names of all chunks."""
    found = Note([], {}, {}, {}, {}, {}, {}, 0, 0)
    for note in notes:
        found.variables.extend(n for n in note.variables if n not in found.variables)
        for whole, part in (
            (found.labels, note.labels),
            (found.times, note.times),
            (found.names, note.names),
        ):
            whole.update(part)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return found


def _assembled(
    name: str, layout: Layout, groups: list[dict[str, tuple[tuple[str, ...], Any]]]
) -> tuple[tuple[str, ...], Any]:
    """One variable of all groups, its dimensions in the order of the settings."""
    order = [dim for dim in layout.axes if dim in (*layout.outer, *layout.inner)]
    there = [group[name] for group in groups if name in group]
    dims = there[0][0]
    if not layout.outer:
        return dims, there[0][1]
    if any(len(other) != len(dims) for other, _ in there):
        raise ValueError(
            f"`{name}` has {len(dims)} axes for some settings and another number for "
            "others: return the same from all, or sweep over these settings apart."
        )
    num_inner = len(layout.inner)
    shapes = [np.shape(values)[num_inner:] for _, values in there]
    union = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    dtype = np.result_type(*(values.dtype for _, values in there))
    is_own = name in OWN_NAMES
    has_gaps = any(shape != union for shape in shapes) or len(there) < len(groups)
    has_gaps = has_gaps and not is_own
    if has_gaps and dtype.kind not in "fc":
        dtype = np.dtype(float)
    absent = {_RESULT: NOT_RUN, _ATTEMPT: 0}.get(name, missing(dtype))
    whole = np.full((layout.num_groups, *layout.shape, *union), absent, dtype)
    for number, group in enumerate(groups):
        if name in group:
            values = np.asarray(group[name][1])
            if has_gaps and values.dtype.kind in "iu":
                gaps = values == missing(values.dtype)
                values = np.where(gaps, np.nan, values.astype(float))
            part = tuple(slice(size) for size in values.shape)
            whole[(number, *part)] = values
    whole = whole.reshape(*layout.outer_shape, *layout.shape, *union)
    now = (*layout.outer, *dims)
    wanted = (*order, *dims[num_inner:])
    return wanted, whole.transpose([now.index(dim) for dim in wanted])


def _with_nan(values: Any, is_missing: np.ndarray) -> Any:
    """Integers and flags as numbers with NaN where a setting has none."""
    kind = values.dtype.kind
    if kind not in "iub":
        return values
    array = np.asarray(values)
    gaps = np.broadcast_to(
        is_missing.reshape(*is_missing.shape, *[1] * (array.ndim - is_missing.ndim)),
        array.shape,
    )
    if kind in "iu":
        gaps = gaps | (array == missing(array.dtype))
    return np.where(gaps, np.nan, array.astype(float)) if gaps.any() else values


def _named(indices: np.ndarray, members: list[str]) -> np.ndarray:
    known = np.where(np.isfinite(indices) & (indices >= 0), indices, len(members))
    return np.array([*members, ""])[known.astype(int)]


def _coordinates(layout: Layout) -> dict[str, Any]:
    return {
        name: ((dim,), np.asarray(labels))
        for dim, columns in layout.axes.items()
        for name, labels in columns.items()
    }


def _times(
    layout: Layout, data: dict[str, Any], merged: Note, is_missing: np.ndarray
) -> dict[str, Any]:
    """Coordinates of time; as a variable where settings were recorded at other times.

    Times that differ by rounding are the same.
    """
    found = {}
    for dim, name in merged.times.items():
        dims, values = data.pop(name)
        shared, is_shared = _shared_times(values, is_missing)
        if is_shared and shared is not None:
            found[dim] = ((dim,), shared)
        elif not is_shared:
            found[name] = (dims, values)
    return found


def _shared_times(
    values: Any, is_missing: np.ndarray
) -> tuple[np.ndarray | None, bool]:
    """The times of the first setting that has some, and whether all others have them.

    Only some settings are in memory at once.
    """
    first = None
    rows = max(_MAX_NUMBERS * len(values) // max(values.size, 1), 1)
    for start in range(0, len(values), rows):
        part = np.asarray(values[start : start + rows])
        ts = part.reshape(-1, part.shape[-1])
        here = ~is_missing[start : start + rows].ravel()
        known = ts[here & ~np.isnan(ts).all(axis=1)]
        if not len(known):
            continue
        first = known[0] if first is None else first
        if not np.allclose(known, first, 8 * np.finfo(ts.dtype).eps, 0):
            return first, False
    return first, True


def _errors(
    layout: Layout, notes: dict[int, Note], chunks: list[Chunk]
) -> dict[str, Any]:
    """What was raised, as text for each setting; nothing if nothing was."""
    if not any(note.errors for note in notes.values()):
        return {}
    shape = (*layout.outer_shape, *layout.shape)
    texts = np.full(shape, "", dtype=object)
    for number, note in notes.items():
        for row, text in note.errors.items():
            texts[chunks[number].place(int(row))] = text
    now = (*layout.outer, *layout.inner)
    wanted = tuple(layout.axes)
    texts = texts.transpose([now.index(dim) for dim in wanted])
    return {"error": (wanted, texts.astype(str))}


def _with_facts(
    dataset: Any,
    layout: Layout,
    notes: dict[int, Note],
    chunks: list[Chunk],
    fingerprint: dict,
) -> Any:
    """Facts and versions as attributes; facts that differ between groups as variables."""
    of_groups: dict[int, dict[str, str]] = {}
    for number, note in notes.items():
        of_groups.setdefault(chunks[number].group, {}).update(note.facts)
    names = dict.fromkeys(itertools.chain(*of_groups.values()))
    for name in names:
        texts = [of_groups.get(g, {}).get(name, "") for g in range(layout.num_groups)]
        if len(set(texts)) == 1:
            dataset.attrs[name] = texts[0]
        else:
            shaped = np.array(texts).reshape(layout.outer_shape)
            dataset[name] = (layout.outer, shaped)
    retried = {
        layout.describe(chunks[number].place(int(row))): facts.get("solver_reason", "")
        for number, note in notes.items()
        for row, facts in note.retried.items()
    }
    if retried:
        dataset.attrs["run_again"] = json.dumps(retried)
    for package, version in fingerprint["versions"].items():
        dataset.attrs[f"{package}_version"] = version
    for name in ("function", "backend"):
        dataset.attrs[name] = fingerprint[name]
    return dataset
