"""What a sweep costs beside the bare vmapped call, and what memory it takes.

    python scripts/sweep_overhead.py
    python scripts/sweep_overhead.py --seeds 256 --repeats 5

1. CPU time of a sweep with a store, beside `jax.jit(jax.vmap(run))` over the same chunks,
   both compiled before; and of the sweep's parts.
2. The largest resident memory of a sweep with a store, at 256 and at 4,096 seeds.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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


def bare(compiled: Callable, seeds: int, chunk: int) -> None:
    for start in range(0, seeds, chunk):
        result = compiled(np.arange(start, start + chunk))
        jax.device_get((result.losses, result.laws, result.stats.numbers))


def cpu_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def overhead(name: str, seeds: int, chunk: int, repeats: int) -> None:
    run = RUNS[name]
    compiled = jax.jit(jax.vmap(run))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "sweep.zarr"

        def swept(store):
            over = {"seed": range(seeds)}
            return hf.sweep(run, over, chunk=chunk, store=store, progress=False)

        swept(None)
        bare(compiled, chunk, chunk)
        times: dict[str, list[float]] = {"bare": [], "sweep": [], "stored": []}
        for _ in range(repeats):
            times["bare"].append(cpu_time(lambda: bare(compiled, seeds, chunk)))
            times["sweep"].append(cpu_time(lambda: swept(None)))
            times["stored"].append(cpu_time(lambda: swept(store)))
            shutil.rmtree(store)
    seconds = {key: statistics.median(values) for key, values in times.items()}
    print(
        f"{name}, {seeds} seeds in chunks of {chunk}: bare {seconds['bare']:.2f} s CPU, "
        f"sweep in memory {seconds['sweep'] / seconds['bare'] - 1:+.1%}, "
        f"with a store {seconds['stored'] / seconds['bare'] - 1:+.1%}",
        flush=True,
    )


def peak_memory(seeds: int) -> float:
    """The largest resident size of a process that sweeps so many seeds, in megabytes."""
    code = [sys.executable, __file__, "--memory-of", str(seeds)]
    return float(
        subprocess.run(code, check=True, capture_output=True, text=True).stdout
    )


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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory alone")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of is not None:
        sweep_to_measure(options.memory_of)
        return 0
    if not options.memory:
        for name in RUNS:
            overhead(name, options.seeds, options.chunk, options.repeats)
    for seeds in (256, 4096):
        print(
            f"{seeds} seeds in chunks of 256: {peak_memory(seeds):.0f} MB", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
