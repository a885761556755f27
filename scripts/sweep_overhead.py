"""What a sweep costs beside the bare vmapped call, and what memory it takes.

    python scripts/sweep_overhead.py
    python scripts/sweep_overhead.py --seeds 256 --repeats 5

1. Time of a sweep, in memory and with a store, beside `jax.jit(jax.vmap(run))` over the
   same chunks: of first calls in new processes, and of later ones (of which the bare one
   would not see that something that `run` reads had changed).
2. The largest resident memory of a sweep with a store, at 256 and at 4,096 seeds.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import homoflow as hf

jax.config.update("jax_enable_x64", True)
X = jnp.asarray(np.random.default_rng(0).standard_normal((50, 10)))
DATA = (X, X[:, :1])


def descend(seed):
    model = hf.MLP((10, 16, 16, 1), activation=jnp.tanh, key=jax.random.key(seed))
    return hf.descend(model, DATA, 500, learning_rate=0.05, throw=False)


def flow(seed):
    model = hf.MLP((2, 8, 1), activation=jnp.tanh, key=jax.random.key(seed))
    return hf.flow(model, (X[:20, :2], X[:20, :1]), 20.0, throw=False)


RUNS: dict[str, Callable] = {"descend": descend, "flow": flow}
WAYS = ("bare", "in memory", "with a store")


def bare(compiled: Callable, seeds: int, chunk: int) -> None:
    for start in range(0, seeds, chunk):
        result = compiled(np.arange(start, start + chunk))
        jax.device_get((result.losses, result.laws, result.stats.numbers))


def times_of(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU time, and of a clock on the wall."""
    start = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def calls(name: str, seeds: int, chunk: int, folder: Path) -> dict[str, Callable]:
    """The same numbers three ways."""
    run = RUNS[name]
    compiled = jax.jit(jax.vmap(run))

    def swept(store):
        over = {"seed": range(seeds)}
        return hf.sweep(run, over, chunk=chunk, store=store, progress=False)

    def stored():
        swept(folder / "sweep.zarr")
        shutil.rmtree(folder / "sweep.zarr")

    return {
        "bare": lambda: bare(compiled, seeds, chunk),
        "in memory": lambda: swept(None),
        "with a store": stored,
    }


def overhead(name: str, seeds: int, chunk: int, repeats: int) -> dict[str, Any]:
    """First calls, each in a process of its own, and later ones here.

    Seconds of the bare one, and how much longer the sweeps take, as a part of it.
    """
    first = {way: first_call(name, way, seeds, chunk) for way in WAYS}
    later: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        made = calls(name, seeds, chunk, Path(folder))
        for way in WAYS:
            made[way]()
        for _ in range(repeats):
            for way in WAYS:
                later[way].append(times_of(made[way]))
    cpu, wall = (
        {way: statistics.median(pair[i] for pair in later[way]) for way in WAYS}
        for i in range(2)
    )
    found = {}
    for what, seconds in {"first": first, "later": cpu, "later, wall": wall}.items():
        bare, *rest = (seconds[way] for way in WAYS)
        more = {
            way: round(s / bare - 1, 3) for way, s in zip(WAYS[1:], rest, strict=True)
        }
        found[what] = {"bare, seconds": round(bare, 2), **more}
        text = ", ".join(f"{way} {part:+.1%}" for way, part in more.items())
        print(
            f"{name}, {seeds} seeds in chunks of {chunk}, {what}: bare {bare:.2f} s, "
            f"sweep {text}",
            flush=True,
        )
    return found


def first_call(name: str, way: str, seeds: int, chunk: int) -> float:
    """CPU seconds of a call in a new process, JAX's import and start left out."""
    return _in_new_process("--first", name, way, "--seeds", seeds, "--chunk", chunk)


def _in_new_process(*arguments: Any) -> float:
    code = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(code, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def peak_memory(seeds: int) -> float:
    """The largest resident size of a process that sweeps so many seeds, in megabytes."""
    return _in_new_process("--memory-of", seeds)


def sweep_to_measure(seeds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hf.sweep(
            descend,
            {"seed": range(seeds)},
            chunk=256,
            store=Path(folder) / "sweep.zarr",
            progress=False,
        )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="What a sweep costs.")
    parser.add_argument("--seeds", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    parser.add_argument("--out", type=Path, help="a file of JSON for what was measured")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of is not None:
        sweep_to_measure(options.memory_of)
        return 0
    if options.first is not None:
        name, way = options.first
        jax.block_until_ready(jax.jit(jnp.sin)(X))
        with tempfile.TemporaryDirectory() as folder:
            made = calls(name, options.seeds, options.chunk, Path(folder))
            print(times_of(made[way])[0])
        return 0
    found: dict[str, Any] = {}
    if not options.memory:
        sizes = options.seeds, options.chunk
        found = {name: overhead(name, *sizes, options.repeats) for name in RUNS}
    found["megabytes"] = {}
    for seeds in (256, 4096):
        peak = peak_memory(seeds)
        found["megabytes"][seeds] = round(peak)
        print(f"{seeds} seeds in chunks of 256: {peak:.0f} MB", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
