"""What a trajectory shows of itself."""

import dataclasses
import html.parser

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import homoflow as hf

X = jr.normal(jr.key(1), (6, 3))
DATA = (X, X[:, :1])


def model(seed=0):
    return hf.MLP((3, 4, 1), activation="linear", key=jr.key(seed))


@pytest.fixture(scope="module")
def run():
    return hf.descend(model(), DATA, 20, learning_rate=0.01)


@pytest.fixture(scope="module")
def batch():
    rates = jnp.array([0.01, 0.02, 100.0])
    return jax.vmap(
        lambda rate: hf.descend(model(), DATA, 20, learning_rate=rate, throw=False)
    )(rates)


class Cells(html.parser.HTMLParser):
    """The text of a table's cells, and all tags that are opened and closed."""

    def __init__(self):
        super().__init__()
        self.text, self.opened, self.closed = [], [], []

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.closed.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def cells(trajectory) -> Cells:
    parser = Cells()
    parser.feed(trajectory._repr_html_())
    return parser


def test_a_trajectory_is_printed(run):
    lines = repr(run).split("\n")
    assert lines[0] == "Trajectory"
    assert lines[1] == "  times   21 times to t = 0.2"
    first, last = float(run.losses[0]), float(run.losses[-1])
    assert lines[2] == f"  loss    {first:.4g} → {last:.4g}"
    assert lines[3] == "  result  successful"
    assert lines[4] == "  solver  sgd"
    size = sum(float(s[0]) for s in run.squared_norms.values())
    for line, (name, values) in zip(lines[5:], run.laws.items(), strict=True):
        drift = np.max(np.abs(np.asarray(values) - np.asarray(values[:1]))) / size
        assert name in line
        assert line.endswith(f"drifts by {drift:.2g}·‖w‖²")
        assert str(values.shape[1:]) in line or values.ndim == 1


def test_the_table_has_the_same_rows_and_no_assets(run):
    table = cells(run)
    text = " ".join(table.text)
    for part in ("21 times to t = 0.2", "successful", "sgd", *run.laws):
        assert part in text
    tags = [tag for tag, _ in table.opened]
    assert sorted(tags) == sorted(table.closed)
    assert not {"script", "link", "img", "style"} & set(tags)
    # In the colours of the page, dark or light.
    styles = " ".join(attributes.get("style", "") for _, attributes in table.opened)
    assert "url(" not in styles
    assert "#" not in styles


def test_names_are_escaped(run):
    named = dataclasses.replace(run, observed={"<b>&": run.losses})
    assert "&lt;b&gt;&amp;" in named._repr_html_()
    assert "<b>" not in named._repr_html_()


def test_a_batch_counts_its_results(batch):
    text = repr(batch)
    assert "3 runs, 21 times to t = 0.2 … 2000" in text
    assert "2 successful, 1 diverged" in text
    assert "2 successful, 1 diverged" in " ".join(cells(batch).text)


def test_inside_of_a_transformation_there_is_less_to_show(run):
    seen = []

    @jax.jit
    def inside(losses):
        traced = eqx.tree_at(lambda t: t.losses, run, losses)
        seen.append((repr(traced), traced._repr_html_()))
        return losses

    inside(run.losses)
    assert seen[0][0].startswith("Trajectory(shape of ts: (21,)")
    assert seen[0][1].startswith("Trajectory(shape of ts: (21,)")


def test_observables_are_masked_at_their_own_times():
    from homoflow._results._trajectory import masked_after

    run = hf.descend(model(), DATA, 6, learning_rate=0.01)
    observed = {
        "all": {"x": jnp.arange(7.0), "n": jnp.arange(7)},
        "every third": jnp.ones((3, 2)),
        "first": jnp.ones(1),
    }
    every = (("every third", 3), ("first", 50))
    run = dataclasses.replace(run, observed=observed, observed_every=every)
    masked = masked_after(run, jnp.array([1, 1, 1, 1, 0, 0, 0], bool))
    np.testing.assert_array_equal(np.isnan(masked.losses), [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(
        masked.observed["all"]["x"], [0, 1, 2, 3, np.nan, np.nan, np.nan]
    )
    np.testing.assert_array_equal(masked.observed["all"]["n"], np.arange(7))
    wide = np.isnan(masked.observed["every third"])
    np.testing.assert_array_equal(wide, [[0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(masked.observed["first"], [1])
