"""Kill a sweep at random moments, resume it, and compare its store byte by byte.

    python scripts/kill_sweeps.py --kills 50

A child process runs a sweep of small gradient descents into a store, most of its time
spent in writing. It is killed (`kill -9`) at a random moment after its first write and
started again, until it comes to its end; then its store must have the bytes of one that
was never interrupted. That is done with new stores until there were as many kills as asked
for. A line for each store says how many kills left a file half written or a chunk without
its mark.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import sys

import jax
import jax.numpy as jnp
import homoflow as hf

jax.config.update("jax_enable_x64", True)
x = jax.random.normal(jax.random.key(1), (8, 2))

def run(seed, scale):
    model = hf.MLP((2, 4, 1), activation="linear", key=jax.random.key(seed))
    model = jax.tree.map(lambda w: scale * w, model)
    return hf.descend(model, (x, x[:, :1]), 20, learning_rate=0.1, throw=False)

over = {"seed": range(64), "scale": [0.1, 0.3, 1.0, 40.0]}
hf.sweep(run, over, chunk=4, store=sys.argv[1], models=True, progress=False)
"""


def start(store: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "kill_sweeps"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen([sys.executable, "-c", CHILD, str(store)], env=environment)


def files_of(store: Path) -> dict[str, bytes]:
    paths = [path for path in store.rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


def kill_at_random(
    store: Path, rng: random.Random, seconds: float
) -> tuple[bool, bool, bool]:
    """Whether the child was killed, and whether that left a half file or a half chunk."""
    before = num_done(store)
    child = start(store)
    # Not while it compiles: from its first new chunk on.
    while child.poll() is None and num_done(store) == before:
        time.sleep(0.001)
    end = time.monotonic() + rng.uniform(0, seconds)
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    if child.poll() is not None:
        assert child.returncode == 0, "the child failed by itself"
        return False, False, False
    child.send_signal(signal.SIGKILL)
    child.wait()
    has_half_file = any(store.rglob("*.partial"))
    # The array that is written first.
    begun = sum(path.is_file() for path in (store / "result" / "c").rglob("*"))
    return True, has_half_file, begun > num_done(store)


def num_done(store: Path) -> int:
    """How many chunks have their mark."""
    return len(list(store.glob("_chunks/[0-9]*.json")))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill sweeps and resume them.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="longest life after its first chunk"
    )
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    killed = half_files = half_chunks = stores = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.zarr"
        assert start(whole).wait() == 0
        wanted = files_of(whole)
        while killed < options.kills:
            store, stores = Path(folder) / f"{stores}.zarr", stores + 1
            while killed < options.kills:
                was_killed, half_file, half_chunk = kill_at_random(
                    store, rng, options.seconds
                )
                if not was_killed:
                    break
                killed += 1
                half_files += half_file
                half_chunks += half_chunk
            assert start(store).wait() == 0
            found = files_of(store)
            differing = [n for n in wanted | found if wanted.get(n) != found.get(n)]
            if differing:
                print(f"{store.name} differs after {killed} kills: {differing[:5]}")
                return 1
            print(
                f"store {stores}: {len(found)} files the same; {killed} kills so far, of "
                f"which {half_files} left a file half written and {half_chunks} a chunk "
                "without its mark",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
