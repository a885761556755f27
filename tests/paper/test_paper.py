"""The paper's experiments: what they claim, what they write, and how they are stopped."""

import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from paper import __main__ as command, digits, figure1, figure2
from paper._figure2_study import StudyConfig
from paper._report import as_text, load, save

matplotlib.use("Agg")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def factorization():
    return figure1.run(figure1.QUICK)


@pytest.fixture(scope="module")
def balancing():
    return figure2.run(
        figure2.Config(
            sizes=(30, 12, 12, 5),
            samples=30,
            steps=400,
            learning_rate=0.01,
            study=StudyConfig(
                label_variances=(10.5,), data=("gaussian",), rates=(0.05,), time=150.0
            ),
        )
    )


def test_figure_1_problem_is_of_the_stated_rank_and_scale():
    model, target = figure1.problem(figure1.Config(d1=12, d2=9, rank=2))
    values = np.linalg.svd(np.asarray(target), compute_uv=False)
    assert values[0] == pytest.approx(1, abs=1e-12)
    assert np.all(values[2:] < 1e-12)
    assert (model.U.shape, model.V.shape) == ((12, 2), (9, 2))


def test_figure_1_claims_hold(factorization):
    assert [claim.text for claim in factorization.claims if not claim.holds] == []


def test_controls_fail(factorization, balancing):
    for report in (factorization, balancing):
        assert report.controls
        assert [claim.text for claim in report.controls if claim.holds] == []


def test_figure_1_claims_can_fail():
    # Far too few steps to converge: the first claim has to say so.
    runs = figure1.measure(figure1.Config(d1=12, d2=9, rank=2, steps=20))
    assert not figure1._convergence(runs[figure1.PLAIN], "").holds


def test_figure_1_descends_as_equation_9_prints_it():
    config = figure1.Config(d1=5, d2=4, rank=2, steps=30)
    model, target = figure1.problem(config)
    u, v, m = (np.asarray(a) for a in (model.U, model.V, target))
    for _ in range(config.steps):
        residual = u @ v.T - m
        step = config.learning_rate
        u, v = u - step * residual @ v, v - step * residual.T @ u
    run = figure1.measure(config)[figure1.PLAIN]
    assert run["U"][-1] == pytest.approx((u**2).sum(), rel=1e-12)
    assert run["V"][-1] == pytest.approx((v**2).sum(), rel=1e-12)
    residual = u @ v.T - m
    assert run["objective"][-1] == pytest.approx((residual**2).sum() / 2, rel=1e-12)


@pytest.mark.parametrize("start", list(figure2.PRINTED))
def test_figure_2_starts_with_the_papers_variances(start):
    config = figure2.Config(samples=2)
    model, _ = figure2.problem(config, start)
    variances = (1e-6, 1e-5, 1e-4) if start == "balanced" else (1e-4,) * 3
    for layer, variance in zip(model.layers, variances, strict=True):
        entries = layer.weight.size
        measured = float(jnp.mean(layer.weight**2))
        assert measured == pytest.approx(variance, rel=5 * np.sqrt(2 / entries))


def test_figure_2_records_both_halves_at_the_same_times(balancing):
    gd, flow = (balancing.tables[f"{kind}, balanced"] for kind in ("GD", "flow"))
    assert np.array_equal(gd["t"], flow["t"])
    assert len(gd["t"]) == 400 // 50 + 1


def test_figure_2_differences_are_those_of_the_norms(balancing):
    for name in ("GD, unbalanced", "flow, unbalanced"):
        table = balancing.tables[name]
        for h in (1, 2):
            expected = table[f"layer {h}"] - table[f"layer {h + 1}"]
            np.testing.assert_allclose(table[f"difference {h}"], expected, atol=1e-12)


def test_figures_have_labelled_axes(factorization, balancing):
    for report, draw in ((factorization, figure1.draw), (balancing, figure2.draw)):
        figure = draw(report)
        axes = figure.axes
        assert all(ax.get_ylabel() and ax.get_title() for ax in axes)
        assert all(ax.get_xlabel() for ax in axes)
        plt.close(figure)


def test_digits_are_all_there_and_split_without_overlap():
    config = digits.Config()
    (x, labels), (x_test, labels_test) = digits.digits(config)
    assert len(x) + len(x_test) == len(labels) + len(labels_test) == 1797
    images = {bytes(np.asarray(row)) for row in x}
    assert len(images & {bytes(np.asarray(row)) for row in x_test}) == 0
    assert float(x.min()) == 0.0
    assert float(x.max()) == 1.0


def test_a_saved_report_is_the_same_and_draws(factorization, tmp_path):
    path = tmp_path / "figure1.json"
    save(factorization, figure1.QUICK, path)
    loaded = load(path, figure1.QUICK)
    assert loaded is not None
    assert loaded.claims == factorization.claims
    for name, table in factorization.tables.items():
        for column, values in table.items():
            assert np.array_equal(loaded.tables[name][column], values, equal_nan=True)
    plt.close(figure1.draw(loaded))
    assert load(path, figure1.Config()) is None


def test_summary_puts_the_papers_numbers_beside_ours(balancing):
    text = as_text(balancing)
    assert "42.90 / 43.76 / 43.68" in text
    assert "leaves open" in text


def test_every_experiment_can_be_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in command.EXPERIMENTS)


def test_an_interrupted_run_keeps_what_it_finished_and_goes_on(tmp_path, capsys):
    arguments = ["--quick", "--only", "figure1", "figure2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "paper", "--no-progress", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": "scripts"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[2/2]"):
            process.send_signal(signal.SIGINT)
            break
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Finished, and kept" in printed
    assert "figure1" in printed
    written = {path.name for path in tmp_path.iterdir()}
    summaries = {"summary.md", "summary.json", "report.html"}
    assert written == {"figure1.png", "figure1.json"} | summaries
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 1
    assert "fails, as it must" in page

    assert command.main([*arguments[:3], *arguments[-2:]]) == 0
    assert "figure1: kept from an earlier run" in capsys.readouterr().out


def test_importing_homoflow_loads_no_optional_dependency():
    code = (
        "import sys, homoflow; "
        "print({'matplotlib', 'sklearn', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"
