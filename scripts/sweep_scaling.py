"""How sweeps scale: with devices by counting work, with processes by the clock.

    python scripts/sweep_scaling.py --out docs/data/scaling.json

1. On 1, 2, 4 and 8 simulated devices, each number in a process of its own: the settings in
   the program that each device runs, the collective operations in it, and the work of the
   busiest device. A vmapped flow takes the steps of its slowest setting for all of them, so
   the work of a device is its settings times these steps.
2. With 1 and 2 worker processes: seconds of the wall clock. This needs an idle machine.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sweep_overhead import RUNS

import homoflow as hf
from homoflow._sweep._program import Program

_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
#: Settings of the counted sweep, one chunk, and of the timed one, with its chunks.
_COUNTED, _TIMED, _CHUNK = 64, 2048, 128


def count_work() -> dict[str, Any]:
    """What each of the devices of this process does of one chunk of flows."""
    devices = jax.devices()
    seeds = {"seed": np.arange(_COUNTED)}
    program = Program(
        RUNS["flow"], {}, seeds, batch=_COUNTED, devices=devices, models=False
    )
    text = program.compiled().as_text()
    data = hf.sweep(
        RUNS["flow"], {"seed": range(_COUNTED)}, chunk=_COUNTED, progress=False
    )
    steps = np.asarray(data["steps"] + data["rejected_steps"]).reshape(len(devices), -1)
    work = steps.shape[1] * steps.max(axis=1)
    return {
        "devices": len(devices),
        "settings": steps.shape[1],
        "collectives": sum(text.count(f" {name}") for name in _COLLECTIVES),
        "busiest": int(work.max()),
        "all": int(work.sum()),
    }


def on_devices(count: int) -> dict[str, Any]:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(count)}
    code = [sys.executable, __file__, "--count"]
    done = subprocess.run(
        code, check=True, capture_output=True, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def time_processes(count: int, repeats: int) -> float:
    """Seconds of a sweep by so many workers that have compiled the program before."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as executor:

        def sweep(seeds: int) -> float:
            start = time.perf_counter()
            hf.sweep(
                RUNS["descend"],
                {"seed": range(seeds)},
                chunk=_CHUNK,
                executor=executor,
                progress=False,
            )
            return time.perf_counter() - start

        # Two chunks for each: a worker that is slow to start gets one too.
        sweep(2 * count * _CHUNK)
        return min(sweep(_TIMED) for _ in range(repeats))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file of JSON for what was measured")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.count:
        print(json.dumps(count_work()))
        return 0
    found: dict[str, Any] = {"devices": [on_devices(n) for n in (1, 2, 4, 8)]}
    alone = found["devices"][0]["busiest"]
    for row in found["devices"]:
        row["efficiency"] = round(alone / row["devices"] / row["busiest"], 3)
        print(row, flush=True)
    seconds = {n: time_processes(n, options.repeats) for n in (1, 2)}
    found["processes"] = {n: round(time, 2) for n, time in seconds.items()}
    found["speedup"] = round(seconds[1] / seconds[2], 2)
    print(found["processes"], found["speedup"], flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
