"""Examples run as they are printed, and every public name is documented."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import pytest
from documentation.coverage import public_names, undocumented
from documentation.examples import DOCS, ROOT, pages, picture_names, python_blocks, run

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

matplotlib.use("Agg")
README = ROOT / "README.md"


def documented():
    """The public names whose docstrings have examples."""
    return {
        name: value
        for name, value in public_names().items()
        if callable(value) and python_blocks(value.__doc__ or "")
    }


def test_every_public_name_has_a_docstring_and_an_entry():
    assert undocumented() == []


def test_functions_that_people_call_have_examples():
    called = ("flow", "descend", "compare", "laws", "MLP", "plot.losses")
    assert {f"homoflow.{name}" for name in called} <= set(documented())


@pytest.mark.parametrize("page", [README, *pages()], ids=lambda page: page.stem)
def test_examples_of_a_page_run(page):
    drawn = 0

    def count_figures():
        nonlocal drawn
        drawn += len(plt.get_fignums())
        plt.close("all")

    # As a reader's own session has it.
    with jax.numpy_dtype_promotion("standard"):
        for _ in run(page.read_text(encoding="utf-8"), after_block=count_figures):
            pass
    if page != README:
        assert drawn == len(picture_names(page))


def test_readme_is_a_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_links_to_what_there_is():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_faq_has_twenty_questions():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^### ", text, re.MULTILINE)) >= 20


def small_sweep():
    def run(seed, scale, learning_rate):
        model = hf.MLP((3, 4, 1), activation="linear", key=jax.random.key(seed))
        model = jax.tree.map(lambda w: jnp.asarray(scale, w.dtype) * w, model)
        x = jax.random.normal(jax.random.key(1), (8, 3))
        data = (x, x[:, :1])
        return hf.descend(model, data, 5, learning_rate=learning_rate, throw=False)

    over = {"seed": range(3), "scale": [0.5, 1.0], "learning_rate": [0.1, 0.2]}
    return hf.sweep(run, over, progress=False)


@pytest.fixture(scope="module")
def runs():
    """What the examples of `homoflow.plot` take for granted."""
    model = hf.MLP((3, 4, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 3))
    gd = hf.descend(model, (x, x[:, :1]), 20, learning_rate=0.1, ledger=True)
    # As in `Filippov`'s example, which compiles it.
    x = jax.random.normal(jax.random.key(1), (20, 3))
    exact = hf.flow(
        hf.MLP((3, 8, 1), key=jax.random.key(0)),
        (x, x[:, :1]),
        5.0,
        solver=hf.Filippov(max_active=32, events=500),
    )
    return {
        "flow": gd,
        "gd": gd,
        "exact": exact,
        "sweep": small_sweep(),
    }


def runs_at_the_edge():
    model = hf.MLP((3, 4, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 3))
    data = (x, x[:, :1])
    return {
        "central": hf.central_flow(model, data, 2.0, learning_rate=0.1),
        "gd": hf.descend(model, data, 20, learning_rate=0.1),
    }


def late_run():
    x = jax.random.normal(jax.random.key(1), (8, 2))
    data = (x, jnp.sign(x[:, :1]))
    model = hf.MLP((2, 1), activation="linear", key=jax.random.key(0))
    options = {"loss": hf.LogisticLoss(), "save_models": True}
    return {"data": data, "run": hf.flow(model, data, jnp.inf, **options)}


def early_run():
    model = hf.MLP((2, 2, 2), activation="linear", key=jax.random.key(0))
    model = jax.tree.map(lambda w: 1e-3 * w, model)
    x = jnp.diag(jnp.array([3.0, 1.0]))
    return {"data": (x, x), "run": hf.flow(model, (x, x), 60.0, save_models=True)}


@pytest.mark.parametrize("name", list(documented()))
def test_docstring_examples_run(name, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Some write files.
    namespace = {"hf": hf, "jax": jax, "jnp": jnp, "diffrax": diffrax, **runs}
    namespace |= {"eqx": eqx}
    if name == "homoflow.plot.edge":
        namespace |= runs_at_the_edge()
    if name in ("homoflow.plot.margins", "homoflow.plot.distances"):
        namespace |= late_run()
    if name == "homoflow.plot.saddles":
        namespace |= early_run()
    for block in python_blocks(documented()[name].__doc__):
        exec(block, namespace.copy())
    plt.close("all")
