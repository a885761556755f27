"""Strict settings for every test: double precision, no silent dtype promotion."""

import gc
import itertools
import os
from pathlib import Path
from typing import Any

# OpenBLAS under JAX and NumPy: on small matrices its threads take turns waiting, so that
# two workers on two cores slow each other down several times. Before JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.random as jr
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Most of the suite's time is the compilation of programs that were compiled before: by the
# other worker, or in an earlier run. They are kept here; JAX's key of a program has its
# operations, options and XLA's version. Files that no version reads can be deleted.
PROGRAMS = Path(__file__).resolve().parent.parent / ".cache" / f"jax-{jax.__version__}"
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Tracing makes many small objects that live on. Looking through them as often as Python
# does by default takes a twentieth of the time.
gc.set_threshold(100_000, 20, 10)


#: A compiled flow takes 400 to 800 memory mappings. Linux lets a process have 65,530, and
#: LLVM crashes at the next.
MOST_MAPPINGS = 25_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """What a worker has compiled is given up where there is no room for much more."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


#: The files that take longest, which no worker should begin when the other is done.
LONGEST = (
    "test_transformations", "test_projection", "test_documentation", "test_filippov",
    "test_filippov_derivatives", "test_flow", "test_track", "test_choose",
    "test_exponential_adams", "test_law_search", "test_events", "test_stationary",
    "test_heavy_ball_flow", "test_predict_drift", "test_modified_flow",
)  # fmt: skip


#: Tests that took more than a few seconds, by `scripts/slow_tests.py`.
SLOW = {
    line.split(maxsplit=1)[1]
    for line in (Path(__file__).parent / "slow_tests.txt")
    .read_text("utf-8")
    .splitlines()
}


def pytest_addoption(parser):
    parser.addoption("--shard", help="take every n-th test from the i-th on: i/n")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks slow tests, takes a share if asked for, and orders files.

    Files with `quick_compilation` come last, so that no other test gets their programs.

    A worker keeps what it has compiled, and takes whole files in this order: of both kinds
    of files those of `LONGEST` first.
    """
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if config.option.shard is not None:
        first, of = map(int, config.option.shard.split("/"))
        items[:] = items[first - 1 :: of]
    quick = {item.path for item in items if "quick_compilation" in item.fixturenames}
    rank = {name: place for place, name in enumerate(LONGEST)}

    def place(item):
        return item.path in quick, rank.get(item.path.stem, len(rank))

    items.sort(key=place)


@pytest.fixture(scope="module")
def quick_compilation():
    """Few of XLA's passes, for tests whose time is the compilation of code that runs once.

    Not for tests of the last digits: rounding differs from what users run.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same in every run."""
    counter = itertools.count()
    return lambda: jr.fold_in(jr.key(20180601), next(counter))


@pytest.fixture
def refused(monkeypatch):
    """A function that asserts that a call is refused, without compiling a solve.

    Type checking is off, as it is for users: what they read are homoflow's own messages.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def compiled(*args, **keywords):
        pytest.fail("something was compiled")

    monkeypatch.setattr("homoflow._methods._integrate._solve", compiled)
    monkeypatch.setattr("homoflow._descent._descend.run_descent", compiled)

    def assert_refused(call, message, error: Any = ValueError):
        with pytest.raises(error, match=message):
            call()

    return assert_refused
