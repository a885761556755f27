"""Stores of sweeps: the same bytes however often a sweep was killed, and refusals."""

import collections
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

import homoflow as hf
from homoflow._sweep import _fingerprint
from homoflow._sweep._lock import Lock, StoreInUse
from homoflow._sweep._marks import Marks

ROOT = Path(__file__).resolve().parent.parent.parent
OVER = {"x": [1.0, 2.0, 3.0, 4.0, 5.0], "y": [0.5, 0.25]}


def run(x, y):
    return {"power": jnp.exp(y * x) * jnp.arange(3.0), "sum": x + y}


def sweep(store, over=OVER, run=run, **options):
    options = {"chunk": 4, "progress": False, **options}
    return hf.sweep(run, over, store=store, **options)


def files_of(store: Path) -> dict[str, bytes]:
    paths = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store.zarr"


def test_a_store_has_what_memory_has(store):
    there, here = sweep(store), sweep(None)
    xr.testing.assert_identical(there.load(), here)
    xr.testing.assert_identical(hf.load_sweep(store).load(), here)
    assert not store.with_name("store.zarr.lock").exists()


def test_xarray_reads_the_store_by_itself(store):
    sweep(store)
    with xr.open_zarr(store, chunks=None) as data:
        assert data.power.dims[:2] == ("x", "y")
        np.testing.assert_array_equal(data.x, OVER["x"])
        np.testing.assert_array_equal(data.power, sweep(None).power)


def test_groups_of_other_shapes_are_stored(store):
    def run(x, size):
        return {"draw": x * jnp.arange(float(size))}

    over = {"x": [1.0, 2.0, 3.0], "size": [2, 4]}
    there = sweep(store, over, run, vectorize=("x",), chunk=2)
    xr.testing.assert_identical(
        there.load(), sweep(None, over, run, vectorize=("x",), chunk=2)
    )
    np.testing.assert_array_equal(
        there["draw"].sel(size=2), np.outer([1, 2, 3], [0, 1, np.nan, np.nan])
    )


class Killed(BaseException):
    """As of `kill -9`: nothing catches it."""


@pytest.mark.parametrize(
    ("place", "count"),
    [("array", n) for n in (1, 2, 3, 8)] + [("mark", 1), ("mark", 3)],
)
def test_a_killed_sweep_ends_with_the_same_bytes(
    store, tmp_path, monkeypatch, place, count
):
    whole = tmp_path / "whole.zarr"
    sweep(whole)
    owner, name = {"array": (zarr.Array, "__setitem__"), "mark": (Marks, "write")}[
        place
    ]
    original, calls = getattr(owner, name), []

    def kill(self, *arguments):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, kill)
    with pytest.raises(Killed):
        sweep(store)
    monkeypatch.undo()
    leftover = store / "power" / "c.0123.partial"
    leftover.parent.mkdir(exist_ok=True, parents=True)
    leftover.write_bytes(b"half of a chunk")
    sweep(store)
    assert files_of(store) == files_of(whole)


def test_what_is_there_is_not_computed_again(store):
    rows = collections.deque()  # No number that `run` would depend on.

    def run(x):
        rows.append(float(x))
        return {"double": 2 * x}

    over = {"x": [1.0, 2.0, 3.0]}
    options = {"vectorize": (), "chunk": None}
    first = sweep(store, over, run, **options).load()
    again = sweep(store, over, run, **options).load()
    assert list(rows) == over["x"]
    xr.testing.assert_identical(first, again)


def test_an_unfinished_store_can_be_read(store, monkeypatch):
    original = Marks.write

    def kill(self, number, text):
        if number == 1:
            raise Killed
        original(self, number, text)

    monkeypatch.setattr(Marks, "write", kill)
    with pytest.raises(Killed):
        sweep(store)
    data = hf.load_sweep(store)
    assert (data.result == "not_run").sum() in (2, 6)
    assert (data.result == "successful").any()


def test_another_sweep_is_refused_and_says_what_differs(store, monkeypatch):
    sweep(store)
    before = files_of(store)

    def other(x, y):
        return {"power": jnp.exp(y * x) * jnp.arange(3.0), "sum": x - y}

    other.__qualname__ = run.__qualname__
    for change, message in (
        (
            {"over": {**OVER, "y": [0.5, 0.3]}},
            r"y \[0.5, 0.25\] there.*y \[0.5, 0.3\] here",
        ),
        ({"chunk": 2}, "chunks of .* there, .* here"),
        ({"run": other}, "`run` computes something else"),
        ({"models": True}, "`models`: False there, True here"),
        ({"resume": False}, "has a sweep already, and `resume` is False"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(store, **change)
    monkeypatch.setattr(_fingerprint.platform, "python_version", lambda: "2.7")
    with pytest.raises(ValueError, match=r'python .* there, 2.7 here.*resume="force"'):
        sweep(store)
    assert files_of(store) == before
    sweep(store, resume="force")
    with pytest.raises(ValueError, match="Choose another path"):
        sweep(store, {**OVER, "y": [1.0, 2.0]}, resume="force")


def test_other_data_behind_the_same_text_are_refused(store):
    def make(constant):
        data = jnp.full(3, constant)
        return lambda x: {"sum": jnp.sum(data * x)}

    over = {"x": [1.0, 2.0]}
    sweep(store, over, make(1.0))
    sweep(store, over, make(1.0))
    with pytest.raises(ValueError, match=r"computes something else.*data"):
        sweep(store, over, make(2.0))


def test_a_path_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no store of a sweep: choose another"):
        sweep(tmp_path)
    zarr.open_group(tmp_path / "mine.zarr", mode="w")
    with pytest.raises(ValueError, match="is no store of a sweep: choose another"):
        sweep(tmp_path / "mine.zarr")
    with pytest.raises(FileNotFoundError, match="no store of a sweep"):
        hf.load_sweep(tmp_path / "nowhere.zarr")


def test_a_second_writer_is_refused_until_the_first_ends(store):
    lock = Lock(store)
    with pytest.raises(StoreInUse, match=f"another sweep .process {os.getpid()} on"):
        sweep(store)
    lock.release()
    sweep(store)


def test_a_lock_dies_with_its_process(store):
    code = (
        "import os, pathlib, sys\n"
        "from homoflow._sweep._lock import Lock\n"
        f"lock = Lock(pathlib.Path({str(store)!r}))\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(StoreInUse, match=f"process {child.pid} on"):
        Lock(store)
    child.kill()
    child.communicate()
    Lock(store).release()


def test_a_full_disk_is_told_and_nothing_is_lost(store, monkeypatch):
    original, room = zarr.Array.__setitem__, [9]

    def write(self, *arguments):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, *arguments)

    monkeypatch.setattr(zarr.Array, "__setitem__", write)
    with pytest.raises(
        OSError, match=r"No space left.*1 chunks are there.*goes on"
    ) as told:
        sweep(store)
    assert told.value.errno == errno.ENOSPC
    monkeypatch.undo()
    xr.testing.assert_identical(sweep(store).load(), sweep(None))


def test_an_address_of_fsspec_is_a_store():
    there = sweep("memory://sweeps/one")
    xr.testing.assert_identical(there.load(), sweep(None))
    xr.testing.assert_identical(sweep("memory://sweeps/one").load(), sweep(None))


def test_without_zarr_it_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"pip install 'homoflow\[sweep\]'"):
        sweep(store)


def test_marks_are_json_with_the_facts(store):
    sweep(store)
    marks = sorted((store / "_chunks").glob("*.json"))
    notes = [json.loads(p.read_text()) for p in marks if p.name != "zarr.json"]
    assert len(notes) == 3
    assert all(note["failed"] == 0 and note["batch"] == 4 for note in notes)
