"""A sweep's store: Zarr arrays, chunk by chunk, each with a mark that is written last."""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np

from ._compute import Computed
from ._fingerprint import differences
from ._layout import Layout, layout_from
from ._lock import Lock
from ._marks import Marks
from ._plan import Chunk
from ._storage import (
    AbstractStorage,
    Note,
    check_shape,
    fill_of,
    note_of,
    variables_of,
)

#: The attribute of a store that says what it is the store of.
_KEY = "homoflow_sweep"
_FORMAT = 1
#: The group with the marks of chunks that are whole.
_MARKS = "_chunks"
#: Files that Zarr was writing when its process ended.
_LEFTOVERS = "*.partial"


@final
class ZarrStore(AbstractStorage):
    """Arrays in a Zarr store (format 3), whose chunks are those of the sweep.

    A chunk of the sweep is a file for each array and then its mark. A file is written
    aside and put in place as a whole, so that a process that is killed leaves chunks that
    are whole, or have no mark and are written again.
    """

    def __init__(self, url: str | os.PathLike[str], root: Any, layout: Layout):
        self._url = url
        self._root = root
        self._layout = layout
        self._marks = Marks(url, _MARKS)
        self._notes = {n: Note(**json.loads(text)) for n, text in self._marks.read()}
        self._arrays: dict[tuple[int, str], Any] = {}
        self._groups: dict[int, Any] = {}
        self._lock: Lock | None = None

    @classmethod
    def open_to_write(
        cls,
        url: str | os.PathLike[str],
        fingerprint: dict[str, Any],
        layout: Layout,
        resume: bool | str,
    ) -> "ZarrStore":
        """The store of a sweep, new or gone on with; an error if it is of another one."""
        zarr = _zarr()
        lock = None if is_remote(url) else Lock(Path(url))
        try:
            found = _open_root(url, "r")
            if found is None:
                _refuse_strangers(url)
                attributes = {_KEY: {"format": _FORMAT, **fingerprint}}
                zarr.open_group(url, mode="a", zarr_format=3, attributes=attributes)
            else:
                _check_same(url, found, fingerprint, resume)
            if not is_remote(url):
                for leftover in Path(url).rglob(_LEFTOVERS):
                    leftover.unlink()
            root = zarr.open_group(url, mode="r+", use_consolidated=False)
            root.require_group(_MARKS)
            store = cls(url, root, layout)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        store._lock = lock
        return store

    @classmethod
    def open_to_read(cls, url: str | os.PathLike[str]) -> tuple["ZarrStore", dict]:
        """A store, and what it is the store of."""
        _zarr()
        root = _open_root(url, "r")
        if root is None:
            raise FileNotFoundError(f"There is no store of a sweep at {url}.")
        fingerprint = _fingerprint_of(url, root)
        return cls(url, root, layout_from(fingerprint["layout"])), fingerprint

    @property
    def layout(self) -> Layout:
        return self._layout

    def notes(self) -> dict[int, Note]:
        return dict(self._notes)

    def write(self, chunk: Chunk, computed: Computed) -> None:
        note = note_of(computed)
        with self._explaining():
            for name, (dims, values) in variables_of(computed).items():
                array = self._array(chunk.group, name, dims, values)
                # Zarr's own indexing; a group of one setting has no axes of its own.
                region = (*chunk.region, ...) if chunk.region else ...
                array[region] = values.reshape((*chunk.shape, *values.shape[1:]))
            self._marks.write(chunk.number, json.dumps(dataclasses.asdict(note)))
        self._notes[chunk.number] = note

    def read(self, group: int) -> dict[str, tuple[tuple[str, ...], Any]]:
        import xarray as xr

        path = self._path_of(group)
        if path is not None and path not in self._root:
            return {}
        data = xr.open_zarr(
            self._url,  # pyright: ignore[reportArgumentType]
            group=path,
            chunks=None,  # pyright: ignore[reportArgumentType]
            consolidated=False,
            mask_and_scale=False,
            decode_times=False,
        )
        return {str(name): (v.dims, v.variable) for name, v in data.data_vars.items()}  # pyright: ignore[reportReturnType]

    def finish(self) -> None:
        """Puts all metadata in one place, which xarray looks for first."""
        with warnings.catch_warnings(), self._explaining():
            # Zarr says that other programs may not know of it: they need not.
            warnings.simplefilter("ignore")
            _zarr().consolidate_metadata(self._root.store)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _path_of(self, group: int) -> str | None:
        return None if self._layout.num_groups == 1 else f"group-{group}"

    def _group(self, group: int) -> Any:
        """The Zarr group of a group of settings, with the numbers that label it."""
        if group in self._groups:
            return self._groups[group]
        path = self._path_of(group)
        found = self._root if path is None else self._root.require_group(path)
        for dim in self._layout.inner:
            for name, labels in self._layout.axes[dim].items():
                values = np.asarray(labels)
                if values.dtype.kind not in "biuf":
                    continue
                if name not in found:
                    self._create(found, name, (dim,), values, values.shape, 0)
                # A process that was killed may have made it, and written nothing.
                found[name][:] = values
        self._groups[group] = found
        return found

    def _array(
        self, group: int, name: str, dims: tuple[str, ...], values: np.ndarray
    ) -> Any:
        if (group, name) not in self._arrays:
            where = self._group(group)
            if name in where:
                self._arrays[group, name] = where[name]
            else:
                layout, rest = self._layout, values.shape[1:]
                fill = fill_of(name, values.dtype)
                # An array without numbers has chunks of one all the same.
                chunks = (*layout.box, *(max(size, 1) for size in rest))
                self._arrays[group, name] = self._create(
                    where, name, (*layout.inner, *dims), values,
                    (*layout.shape, *rest), fill, chunks,
                )  # fmt: skip
        array = self._arrays[group, name]
        check_shape(name, array.shape[len(self._layout.inner) :], values.shape[1:])
        return array

    def _create(
        self,
        where: Any,
        name: str,
        dims: tuple[str, ...],
        like: np.ndarray,
        shape: tuple[int, ...],
        fill: Any,
        chunks: tuple[int, ...] | None = None,
    ) -> Any:
        return where.create_array(
            name,
            shape=shape,
            chunks=shape if chunks is None else chunks,
            dtype=like.dtype,
            dimension_names=dims,
            fill_value=fill,
        )

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Adds to an error of the file system what is safe and what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"The store cannot be written: {error.strerror or error}. "
                f"{len(self._notes)} chunks are there as a whole. Make room (or see to "
                "the rights), and call the sweep again: it goes on from there",
                str(self._url),
            ) from error


def is_remote(url: str | os.PathLike[str]) -> bool:
    return isinstance(url, str) and "://" in url


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "`store` needs Zarr: `pip install 'homoflow[sweep]'`. Without it a sweep is "
            "kept in memory, `store=None`."
        ) from error
    return zarr


def _open_root(url: str | os.PathLike[str], mode: str) -> Any:
    try:
        return _zarr().open_group(url, mode=mode, use_consolidated=False)
    except FileNotFoundError:
        return None


def _refuse_strangers(url: str | os.PathLike[str]) -> None:
    if is_remote(url):
        return
    path = Path(url)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"{url} is there already and is no store of a sweep: choose another path."
        )


def _fingerprint_of(url: str | os.PathLike[str], root: Any) -> dict[str, Any]:
    fingerprint = dict(root.attrs).get(_KEY)
    if fingerprint is None:
        raise ValueError(
            f"{url} is there already and is no store of a sweep: choose another path."
        )
    if fingerprint["format"] != _FORMAT:
        raise ValueError(
            f"{url} was written by another version of homoflow, in format "
            f"{fingerprint['format']}; this one reads {_FORMAT}."
        )
    return fingerprint


def _check_same(
    url: str | os.PathLike[str],
    root: Any,
    fingerprint: dict[str, Any],
    resume: bool | str,
) -> None:
    old = _fingerprint_of(url, root)
    if resume is False:
        raise ValueError(
            f"{url} has a sweep already, and `resume` is False: delete it first, or "
            "choose another path."
        )
    found, may_be_forced = differences(old, fingerprint)
    if not found or (resume == "force" and may_be_forced):
        return
    way = (
        '`resume="force"` goes on with it all the same; else choose another path'
        if may_be_forced
        else "Choose another path"
    )
    raise ValueError(f"{url} is the store of another sweep: {'; '.join(found)}. {way}.")
