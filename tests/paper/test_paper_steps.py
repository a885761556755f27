"""What the reports say that steps add, against every batch there is; and the page."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paper import digits
from paper._page import _shown_width, _text
from paper._steps import balance_change, norms_by_start, ratio

import homoflow as hf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

#: Nine samples for training, in batches of two: 36 batches.
TINY = digits.Config(
    images=12, hidden=(4, 4), dense_std=0.5, steps=8, batch_size=2, record_every=1
)


@pytest.fixture(scope="module")
def run():
    return digits.train(TINY, digits.NOISY)


def test_every_step_of_sgd_is_in_the_sum(run):
    found = digits._additions(TINY, run)
    for name, account in run.ledger.items():
        # Every step is recorded: the steps one by one are the whole account.
        total = float(account.discretization[-1])
        assert found[name].observed == pytest.approx(total, rel=1e-10)
    # 1e-12 in the report, where rounding is that of users.
    assert float(balance_change(run).left) < 1e-14


def test_the_expected_sum_is_the_mean_over_all_batches(run):
    x, labels = digits.training_data(TINY, digits.DENSE)
    loss = hf.SoftmaxCrossEntropy()

    def of_batch(model, batch):
        return jnp.mean(jax.vmap(loss)(jax.vmap(model)(x[batch]), labels[batch]))

    gradient = eqx.filter_jit(eqx.filter_grad(of_batch))
    batches = [jnp.array(b) for b in itertools.combinations(range(len(x)), 2)]
    arrays, rest = eqx.partition(run.models, eqx.is_array)
    expected = dict.fromkeys(run.laws, 0.0)
    of_mean = dict.fromkeys(run.laws, 0.0)
    for step in range(TINY.steps):
        model = eqx.combine(jax.tree.map(lambda a, t=step: a[t], arrays), rest)
        each = np.mean([_squares(gradient(model, b)) for b in batches], axis=0)
        full = _squares(gradient(model, jnp.arange(len(x))))
        for h, name in enumerate(run.laws):
            expected[name] += TINY.learning_rate**2 * (each[h] - each[h + 1])
            of_mean[name] += TINY.learning_rate**2 * (full[h] - full[h + 1])
    found = digits._additions(TINY, run)
    for name in run.laws:
        assert found[name].expected == pytest.approx(expected[name], rel=1e-9)
        assert found[name].of_mean == pytest.approx(of_mean[name], rel=1e-9)


def _squares(gradient):
    return np.array([float(jnp.sum(layer.weight**2)) for layer in gradient.layers])


def test_all_layers_gain_the_same():
    start, end = np.array([5.0, 3.0, 1.0]), np.array([9.5, 6.5, 5.0])
    said = norms_by_start(start, end)
    assert said.sum() == pytest.approx(end.sum())
    np.testing.assert_allclose(np.diff(said), np.diff(start))
    assert ratio(said) == pytest.approx(9 / 5)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("‖W_{h+1}[:,i]‖_F²", "‖W<sub>h+1</sub>[:,i]‖<sub>F</sub>²"),
        ("η_t = t^{−(½+δ)}", "η<sub>t</sub> = t<sup>−(½+δ)</sup>"),
        ("(t+1)^(−0.55)", "(t+1)<sup>(−0.55)</sup>"),
        ("leaky_relu by `predict_drift`", "leaky_relu by <code>predict_drift</code>"),
        ("a < b & c", "a &lt; b &amp; c"),
        ("left over 1e-10", "left over 1e\N{NON-BREAKING HYPHEN}10"),
    ],
)
def test_formulas_are_typeset(text, shown):
    assert _text(text) == shown


def test_pictures_are_shown_in_proportion_to_their_size(tmp_path):
    from matplotlib.figure import Figure

    widths = []
    for inches in (4, 8):
        path = tmp_path / f"{inches}.png"
        Figure(figsize=(inches, 2)).savefig(path, dpi=150)
        widths.append(_shown_width(path.read_bytes()))
    assert widths[1] == 2 * widths[0]
