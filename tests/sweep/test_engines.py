"""Sweeps on several devices and in several processes: the same answer on each."""

import concurrent.futures
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf
from homoflow._sweep import _engines

ROOT = Path(__file__).resolve().parent.parent.parent
OVER = {"seed": range(12), "scale": [0.5, 1.0]}


def outside(code: str, *, devices: int = 1, **environment: str) -> subprocess.Popen:
    """Another Python, with so many devices, that runs this code."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])
    settings = {
        "PYTHONPATH": path,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_ENABLE_X64": "true",
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


#: A flow and a descent, and the numbers of both as text of all digits.
PROBLEM = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    import homoflow as hf

    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2)))

    def run(seed, scale):
        model = hf.MLP((2, 3, 1), activation="linear", key=jax.random.key(seed))
        model = jax.tree.map(lambda w: scale * w, model)
        data = (x, x[:, :1])
        ts = jnp.linspace(0, 1, 5)
        return {
            "flow": hf.flow(model, data, 1.0, ts=ts, rtol=1e-6, throw=False),
            "descent": hf.descend(model, data, 10, learning_rate=0.1, throw=False),
        }

    def numbers(data):
        kept = {n: np.asarray(v) for n, v in data.items() if v.dtype.kind in "fi"}
        return {n: v.astype(float).ravel().tolist() for n, v in sorted(kept.items())}

    over = {"seed": range(12), "scale": [0.5, 1.0]}
"""
WHOLE = (
    PROBLEM
    + "    print(json.dumps(numbers(hf.sweep(run, over, progress=False, chunk=24))))"
)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """The numbers of the sweep on one device of one process."""
    return of_all(answer(outside(WHOLE)))


def of_all(out: str) -> dict[str, list[float]]:
    """The numbers of the last line: before it Gloo says who is connected."""
    return json.loads(out.strip().splitlines()[-1])


def test_devices_share_a_chunk_without_a_word(alone):
    """Each device has what it would have with its share by itself, to rounding."""
    code = (
        PROBLEM
        + """
    from homoflow._sweep._program import Program

    seeds, scales = np.arange(24) % 12, np.repeat([0.5, 1.0], 12)
    columns = {"seed": seeds, "scale": scales}
    every, one = jax.devices(), jax.devices()[:1]
    program = Program(run, {}, columns, batch=24, devices=every, models=False)
    text = program.compiled().as_text()
    words = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    share = Program(run, {}, columns, batch=3, devices=one, models=False)
    parts = [
        share({name: column[i : i + 3] for name, column in columns.items()})
        for i in range(0, 24, 3)
    ]
    whole = jax.tree.leaves(program(columns))
    apart = jax.tree.leaves(jax.tree.map(lambda *p: np.concatenate(p), *parts))
    is_same = [
        np.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)
        for a, b in zip(whole, apart, strict=True)
    ]
    data = hf.sweep(run, over, progress=False, chunk=24)
    losses = np.asarray(data["flow.losses"]).ravel().tolist()
    found = [word for word in words if word in text]
    print(json.dumps([len(every), found, all(is_same), losses]))
    """
    )
    count, found, is_same, losses = json.loads(answer(outside(code, devices=8)))
    assert (count, found, is_same) == (8, [], True)
    # Programs of other sizes add in another order, and take other steps.
    np.testing.assert_allclose(losses, alone["flow.losses"], rtol=1e-6)


def test_processes_of_jax_share_the_chunks(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        f"""
    import jax, sys
    jax.distributed.initialize("127.0.0.1:{port}", 2, NUMBER)
    """
        + PROBLEM
        + """
    options = {"progress": False, "chunk": 8}
    data = hf.sweep(run, over, **options)
    stored = hf.sweep(run, over, store=STORE, **options)
    assert numbers(stored) == numbers(data)
    print(json.dumps(numbers(data)))
    """
    )
    code = code.replace("STORE", repr(str(tmp_path / "store.zarr")))
    processes = [outside(code.replace("NUMBER", str(number))) for number in range(2)]
    # Read at once: each waits for the other at its end.
    with concurrent.futures.ThreadPoolExecutor(2) as readers:
        first, second = readers.map(answer, processes)
    # The same chunks in the same programs: the same bits.
    np.testing.assert_equal(of_all(first), alone)
    np.testing.assert_equal(of_all(second), alone)


def test_processes_of_an_executor_give_the_same():
    offset = jnp.asarray([0.1, 0.2, 0.3])

    def run(seed, scale):
        return {"value": jnp.exp(scale * offset) + jnp.asarray(seed, float)}

    wanted = hf.sweep(run, OVER, chunk=6, progress=False)

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        found = hf.sweep(run, OVER, chunk=6, executor=executor, progress=False)
    assert found.value.dtype == jnp.float64  # JAX's settings go with the job.
    np.testing.assert_array_equal(found.value, wanted.value)


def test_a_worker_that_is_killed_is_told():
    def run(x):
        if x == 2.0:
            os.kill(os.getpid(), 9)
        return {"value": x}

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        options = {"vectorize": (), "executor": executor, "progress": False}
        with pytest.raises(
            RuntimeError, match=r"worker process .* ended.*call the sweep"
        ):
            hf.sweep(run, {"x": [1.0, 2.0]}, **options)


def test_executors_that_fork_are_refused():
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        options = {"executor": executor, "progress": False}
        with pytest.raises(ValueError, match="get_context"):
            hf.sweep(lambda x: x, {"x": [1.0]}, **options)


def test_threads_are_an_executor():
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        found = hf.sweep(
            lambda x: {"double": 2 * x}, {"x": range(10)}, chunk=3, executor=executor,
            progress=False,
        )  # fmt: skip
    np.testing.assert_array_equal(found.double, 2 * np.arange(10))


def test_futures_of_others_are_waited_for():
    """As those of submitit: with `done` and `result`, and no class of Python's."""

    class Job:
        def __init__(self, result):
            self.looks, self._result = 0, result

        def done(self):
            self.looks += 1
            return self.looks > 2

        def result(self):
            return self._result

    class Cluster:
        def submit(self, function, *arguments):
            return Job(function(*arguments))

    found = hf.sweep(
        lambda x: {"double": 2 * x}, {"x": range(6)}, chunk=2, executor=Cluster(),
        progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(found.double, 2 * np.arange(6))


def test_what_cannot_be_sent_is_told(monkeypatch):
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        options = {"executor": executor, "progress": False}
        generator = (i for i in range(3))
        with pytest.raises(TypeError, match=r"cannot be sent.*generators"):
            hf.sweep(lambda x: next(generator) + x, {"x": [1]}, vectorize=(), **options)
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
        with pytest.raises(TypeError, match=r"cannot be sent.*Define it by `def`"):
            hf.sweep(lambda x: {"double": 2 * x}, {"x": [1]}, **options)
        with pytest.raises(ValueError, match="Give one of the two"):
            hf.sweep(_engines.check_executor, {"executor": [1]}, devices=[], **options)


def test_dask_goes_on_without_a_killed_worker(tmp_path):
    """A scheduler and two workers on this machine; the first to compute is killed."""
    import distributed

    mark = tmp_path / "killed"

    def run(x):
        import time

        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        time.sleep(0.05)
        return {"square": x * x}

    options = {"vectorize": (), "progress": False}
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
            host="127.0.0.1", silence_logs=50,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):  # fmt: skip
        found = hf.sweep(
            run, {"x": np.arange(1.0, 9.0)}, executor=client.get_executor(), **options
        )
    assert mark.exists()
    np.testing.assert_array_equal(found.square, np.arange(1.0, 9.0) ** 2)
    assert (found.result == "successful").all()
