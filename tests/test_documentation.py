"""Examples in README and in public docstrings run as they are printed."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import pytest

import homoflow as hf
import homoflow.plot

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent


def python_blocks(text):
    blocks = re.findall(
        r"^([ ]*)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE
    )
    return [inspect.cleandoc("\n" + body) for _, body in blocks]


def documented():
    named = {f"hf.{name}": thing for name, thing in vars(hf).items() if name[0] != "_"}
    named |= {f"hf.plot.{name}": thing for name, thing in vars(hf.plot).items()}
    return {
        name: thing
        for name, thing in named.items()
        if callable(thing)
        and thing.__module__.startswith("homoflow")
        and python_blocks(thing.__doc__ or "")
    }


def test_readme_examples_run(capsys):
    namespace = {}
    with jax.numpy_dtype_promotion("standard"):  # As a reader's own session has it.
        for block in python_blocks((ROOT / "README.md").read_text(encoding="utf-8")):
            exec(block, namespace)
    assert "drift of neurons[1]" in capsys.readouterr().out
    assert namespace["flow"].laws["neurons[1]"].shape == (101, 30)
    assert namespace["times"].size > 1
    assert namespace["sweep"].losses.shape == (4, 101)


def test_functions_that_people_call_have_examples():
    examples = documented()
    assert {"hf.flow", "hf.descend", "hf.compare", "hf.laws", "hf.MLP"} <= set(examples)


@pytest.fixture(scope="module")
def runs():
    """What the examples of `homoflow.plot` take for granted."""
    model = hf.MLP((3, 4, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 3))
    gd = hf.descend(model, (x, x[:, :1]), 20, learning_rate=0.1, ledger=True)
    # As in `Filippov`'s example, which compiles it.
    x = jax.random.normal(jax.random.key(1), (20, 3))
    exact = hf.flow(
        hf.MLP((3, 8, 1), key=jax.random.key(0)), (x, x[:, :1]), 5.0,
        solver=hf.Filippov(max_active=32, events=500),
    )  # fmt: skip
    return {"flow": gd, "gd": gd, "exact": exact}


@pytest.mark.parametrize("name", list(documented()))
def test_docstring_examples_run(name, runs, capsys):
    for block in python_blocks(documented()[name].__doc__):
        exec(block, {"hf": hf, "jax": jax, "jnp": jnp, **runs})
    plt.close("all")
