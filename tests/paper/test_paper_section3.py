"""The paper's §3, matrix factorization: what the experiments compute, and say."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from paper import footnote11, lemma31, lemma32, thm31, thm32
from paper._binomial import fraction
from paper._factorizations import starts, target
from paper._report import Claim, Report, load, save

import homoflow as hf

matplotlib.use("Agg")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

CONFIGS = {
    "lemma31": lemma31.Config(d1=6, d2=5, rank=1, steps=400, delta=0.01, seeds=40),
    "lemma32": lemma32.Config(
        d1=8, d2=7, rank=2, excesses=(0.0, 0.1, 10.0, 100.0), seeds=3
    ),
    "thm31": thm31.Config(
        d1=6, d2=5, rank=1, steps=2000, seeds=40, times=121, t1=30.0, rtol=1e-7
    ),
    "footnote11": footnote11.Config(
        d1=6, d2=5, rank=1, deltas=(0.01,), control_steps=2000, seeds=5
    ),
    "thm32": thm32.Config(
        dimensions=(10, 1000), accuracies=(1e-2, 1e-6), steps=400, seeds=250
    ),
}
MODULES = {m.__name__.split(".")[-1]: m for m in (
    lemma31, lemma32, thm31, footnote11, thm32
)}  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    return {name: MODULES[name].run(config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_claims_hold_and_controls_fail(reports, name):
    report = reports[name]
    assert [c for c in report.claims if not c.holds] == []
    assert report.controls
    assert [c for c in report.controls if c.holds] == []
    assert report.verdict == "holds"


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_saved_report_draws_and_says_the_same(reports, name, tmp_path):
    save(reports[name], CONFIGS[name], tmp_path / "r.json")
    loaded = load(tmp_path / "r.json", CONFIGS[name])
    assert loaded is not None
    assert (loaded.claims, loaded.controls) == (
        reports[name].claims,
        reports[name].controls,
    )
    for key, table in reports[name].tables.items():
        for column, values in table.items():
            np.testing.assert_array_equal(loaded.tables[key][column], values)
    figure = MODULES[name].draw(loaded)
    shown = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title() for ax in shown)
    plt.close(figure)
    other = dataclasses.replace(CONFIGS[name], seed=1)
    assert load(tmp_path / "r.json", other) is None


def test_a_control_that_holds_spoils_the_verdict():
    good, bad = Claim("a", "1", True), Claim("b", "2", False)
    report = Report("n", "t", "s", (good,), (bad,), {}, ())
    assert report.holds
    assert not dataclasses.replace(report, controls=(good,)).holds
    assert "control" in dataclasses.replace(report, controls=(good,)).verdict
    assert dataclasses.replace(report, claims=(good, bad)).verdict == "fails in 1 of 2"


def test_the_interval_of_a_fraction_is_clopper_and_pearsons():
    # (α/2)^(1/n) is the exact lower end if all n succeed.
    found = fraction(50, 50)
    assert found.low == pytest.approx(0.025 ** (1 / 50), rel=1e-9)
    assert found.high == 1.0


def test_the_plane_of_theorem_32_has_the_descent_of_all_dimensions():
    d, steps = 7, 60
    key, config = jr.key(3), thm32.Config()
    u, v = np.asarray(config.init / np.sqrt(d) * jr.normal(key, (2, d)))
    matrix = np.zeros((d, d))
    matrix[0, 0] = 1
    distances, ratios = [], []
    for _ in range(steps + 1):
        distances.append(np.linalg.norm(np.outer(u, v) - matrix))
        ratios.append(abs(u[0] / v[0]))
        residual = np.outer(u, v) - matrix
        u, v = u - 0.1 * residual @ v, v - 0.1 * residual.T @ u
    gd = hf.descend(
        thm32.start(d, config.init, key),
        jnp.diag(jnp.array([1.0, 0.0])),
        steps,
        learning_rate=0.1,
        objective=hf.factorization_objective,
        laws=(),
        save_models=True,
    )
    np.testing.assert_allclose(np.sqrt(2 * gd.losses), distances, rtol=1e-10)
    models = gd.models
    measured = np.abs(models.U[:, 0, 0] / models.V[:, 0, 0])
    np.testing.assert_allclose(measured, ratios, rtol=1e-10)


def test_lemma_31_measures_what_its_letters_say():
    config = lemma31.Config(d1=4, d2=3, rank=2, steps=30, seeds=2)
    measured = lemma31.measure(config, 0.3, lemma31.footnote_schedule(config))
    models = starts(4, 3, 2, 0.3, 2, config.seed)
    matrix = np.asarray(target(4, 3, 2, config.seed))
    assert np.linalg.norm(matrix) == pytest.approx(1)
    for seed in range(2):
        u, v = np.asarray(models.U[seed]), np.asarray(models.V[seed])
        for t in range(31):
            residual = u @ v.T - matrix
            ours = [part[seed, t] for part in measured]
            norms = np.sum(u**2), np.sum(v**2)
            letters = (
                np.linalg.norm(u.T @ u - v.T @ v),
                0.5 * np.sum(residual**2),
                max(norms),
            )
            np.testing.assert_allclose(ours, letters, rtol=1e-10)
            step = np.sqrt(0.1 / 2) * (t + 1) ** -0.55
            u, v = u - step * residual @ v, v - step * residual.T @ u


def test_theorem_31_counts_iterations_as_the_sum_of_its_steps_does():
    config = thm31.Config(steps=100)
    constant = np.sqrt(0.1 / 2) / 100
    later = np.arange(100, 1_000_000)
    time = np.sum(constant / (later + 1))
    counted = thm31.log_iterations(config, np.array([time]))
    assert counted[0] == pytest.approx(np.log(1_000_000), abs=0.01)


def test_theorem_31_bounds_the_hessian():
    model = hf.MatrixFactorization(4, 3, 2, std=0.8, key=jr.key(0))
    matrix = target(4, 3, 2, 0)
    flat, unravel = jax.flatten_util.ravel_pytree(model)
    hessian = jax.hessian(lambda w: hf.factorization_objective(unravel(w), matrix))(
        flat
    )
    values = np.linalg.eigvalsh(hessian)
    batch = jax.tree.map(lambda w: w[None], model)
    residual = np.linalg.norm(model.U @ model.V.T - matrix, 2)
    assert np.abs(values).max() <= float(thm31._smoothness(matrix, batch)[0])
    assert values.min() >= -residual


def test_lemma_32_finds_the_curvature_of_the_dense_hessian():
    config = CONFIGS["lemma32"]
    built = lemma32.stationary_point(
        config, jr.key(5), jnp.asarray(1), jnp.asarray(2.0), config.rank
    )
    flat, unravel = jax.flatten_util.ravel_pytree(built.model)
    hessian = jax.hessian(
        lambda w: hf.factorization_objective(unravel(w), built.target)
    )(flat)
    lowest = np.linalg.eigvalsh(hessian)[0]
    found = lemma32.examine(*built)
    assert float(found.curvature) == pytest.approx(lowest, abs=1e-10)
    expected = lemma32.closed_form(2.0, float(built.left_out))
    assert lowest == pytest.approx(expected, abs=1e-10)
    values = np.linalg.svd(np.asarray(built.target), compute_uv=False)
    assert float(built.left_out) == pytest.approx(values[1])
    assert np.linalg.matrix_rank(built.model.U @ built.model.V.T, tol=1e-10) == 1


def test_footnote_11_runs_for_the_time_that_the_flow_needs():
    config = footnote11.Config(constant=0.5)
    steps = footnote11._steps(config, 0.25, 3.0)
    terms = 0.5 * np.arange(1, steps + 1.0) ** -0.75
    assert terms.sum() == pytest.approx(1.3 * 3.0, abs=2 * terms[-1])
    capped = dataclasses.replace(config, most_steps=50)
    assert footnote11._steps(capped, 0.5, 100.0) == 50
