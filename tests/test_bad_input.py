"""Bad input is a clear error before anything is compiled, or a result code in a trace."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import homoflow as hf

NAN, INF = float("nan"), float("inf")
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
Y = X[:, :2]


class Matrix(eqx.Module):
    """x ↦ Wx, smooth and cheap to compile; its tag may be any array."""

    w: jax.Array
    tag: jax.Array | None = None

    def __call__(self, x):
        return self.w @ x


def matrix(dtype=jnp.float64, **keywords):
    return Matrix(jnp.linspace(-1, 1, 6, dtype=jnp.float32).reshape(2, 3).astype(dtype),
                  **keywords)  # fmt: skip


def flow(model=None, data=(X, Y), t1=1.0, **keywords):
    return hf.flow(matrix() if model is None else model, data, t1, **keywords)


def descend(model=None, data=(X, Y), steps=3, learning_rate=0.1, **keywords):
    model = matrix() if model is None else model
    return hf.descend(model, data, steps, learning_rate=learning_rate, **keywords)


def with_entry(a, value):
    return a.at[1, 1].set(value)


LAWS = hf.laws(hf.MLP((3, 2, 2), key=jax.random.key(0)))

# What both halves refuse: keywords, and what the message has to say.
PROBLEMS = {
    "mismatched numbers of samples": (
        {"data": (X, Y[:4])},
        r"different numbers of samples: \[4, 6\].*first axis",
    ),
    "wrong feature size": (
        {"data": (X[:, :2], Y)},
        r"cannot be applied to one input sample of shape \(2,\)",
    ),
    "NaN in the inputs": ({"data": (with_entry(X, NAN), Y)}, "data contain NaN or inf"),
    "inf in the inputs": ({"data": (with_entry(X, INF), Y)}, "data contain NaN or inf"),
    "NaN in the targets": (
        {"data": (X, with_entry(Y, NAN))},
        "data contain NaN or inf",
    ),
    "NaN in the weights": (
        {"model": Matrix(with_entry(matrix().w, NAN))},
        "weights contain NaN or inf",
    ),
    "inf in the weights": (
        {"model": Matrix(with_entry(matrix().w, INF))},
        "weights contain NaN or inf",
    ),
    "empty data": ({"data": (X[:0], Y[:0])}, "empty: there are no samples"),
    "data without targets": ({"data": X}, r"pair \(x, y\).*`objective`"),
    "scalar data": ({"data": (1.0, 2.0)}, "first axis that counts the samples"),
    "complex inputs": (
        {"data": (X.astype(complex), Y)},
        "complex: give real and imaginary",
    ),
    "complex targets": (
        {"data": (X, Y.astype(complex))},
        "complex: give real and imaginary",
    ),
    "integer weights": (
        {"model": Matrix(jnp.ones((2, 3), jnp.int32))},
        r"array at `w` has the integer type int32.*astype\(float\)",
    ),
    "an integer array beside the weights": (
        {"model": matrix(tag=jnp.arange(3))},
        r"array at `tag`.*trainable=eqx\.is_inexact_array",
    ),
    "complex weights": (
        {"model": Matrix(jnp.ones((2, 3), jnp.complex128))},
        "`w`, of type complex128: only real",
    ),
    "integers picked as trainable": (
        {"model": matrix(tag=jnp.arange(3)), "trainable": eqx.is_array},
        "selects `tag`, of type int",
    ),
    "no array": ({"model": jnp.tanh}, "no trainable array.*pass the model itself"),
    "empty weights": ({"model": Matrix(jnp.ones((0, 3)))}, "no trainable array"),
    "everything frozen": ({"trainable": False}, "no trainable array.*`trainable`"),
    "mixed dtypes": (
        {"model": matrix(tag=jnp.ones(2, jnp.float32))},
        "different dtypes.*float32.*float64.*make them one",
    ),
    "a loss that returns a vector": (
        {"loss": jnp.subtract},
        r"loss must return one real number.*shape=\(2,\).*Sum or average",
    ),
    "a loss that returns an integer": (
        {"loss": lambda f, y: jnp.sum(f > y)},
        "loss must return one real number",
    ),
    "an objective that returns a vector": (
        {"objective": lambda m, d: m.w[0], "data": X},
        "objective must return one real number",
    ),
    "NaN in an objective's data": (
        {"objective": lambda m, d: jnp.sum(m.w) * jnp.sum(d), "data": X * NAN},
        "data contain NaN or inf",
    ),
    "targets of another shape": (
        {"data": (X, Y[:, 0])},
        r"predicts shape \(2,\).*target has shape \(\).*SoftmaxCrossEntropy",
    ),
    "more targets than outputs": (
        {"data": (X, X)},
        r"predicts shape \(2,\).*target has shape \(3,\)",
    ),
    "two laws of the same name": (
        {"laws": [*LAWS, LAWS[0]]},
        r"same name: \['neurons\[1\]', 'layers\[1\]', 'neurons\[1\]'\]",
    ),
}


@pytest.mark.parametrize("run", [flow, descend])
@pytest.mark.parametrize(("keywords", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_bad_problem_is_refused(refused, run, keywords, message):
    refused(lambda: run(**keywords), message)


@pytest.mark.parametrize("run", [flow, descend])
def test_laws_must_be_law_objects(refused, run):
    refused(lambda: run(laws=["neurons[1]"]), "law objects.*not str", TypeError)


@pytest.mark.parametrize("run", [flow, descend])
def test_a_target_of_matrix_factorization_has_its_shape(refused, run):
    model = hf.MatrixFactorization(4, 3, 2, key=jax.random.key(0))
    target, objective = jnp.ones((3, 4)), hf.factorization_objective
    refused(lambda: run(model, target, objective=objective), r"UVᵀ has shape \(4, 3\)")


FLOWS = {
    "t1 = 0": ({"t1": 0.0}, "`t1` must be positive and finite; got 0"),
    "t1 < 0": ({"t1": -1.0}, "`t1` must be positive and finite; got -1"),
    "t1 = NaN": ({"t1": NAN}, "`t1` must be positive and finite; got nan"),
    "t1 = -inf": ({"t1": -INF}, "`t1` must be positive and finite; got -inf"),
    "ts that decrease": ({"ts": [0.5, 0.2]}, "`ts` must be increasing"),
    "ts that repeat": ({"ts": [0.2, 0.2]}, "without repetition"),
    "ts with NaN": ({"ts": [0.2, NAN]}, "`ts` must be increasing"),
    "ts below 0": ({"ts": [-0.1, 0.5]}, r"lie in \[0, t1\] = \[0, 1\]"),
    "ts beyond t1": ({"ts": [0.5, 1.1]}, r"lie in \[0, t1\] = \[0, 1\]"),
    "no ts": ({"ts": []}, "sequence of times"),
    "ts of two axes": ({"ts": jnp.ones((2, 2))}, "sequence of times"),
    "rtol = 0": ({"rtol": 0.0}, "`rtol` must be positive"),
    "rtol = NaN": ({"rtol": NAN}, "`rtol` must be positive"),
    "atol < 0": ({"atol": -1e-6}, "`atol` must be positive"),
    "dt0 < 0": ({"dt0": -0.1}, "`dt0` must be positive"),
    "max_steps = 0": ({"max_steps": 0}, "`max_steps` must be a positive integer"),
    "half precision": ({"model": matrix(jnp.float16)}, "needs float32 or float64"),
    "bfloat16": ({"model": matrix(jnp.bfloat16)}, "needs float32 or float64"),
}


@pytest.mark.parametrize(("keywords", "message"), FLOWS.values(), ids=FLOWS)
def test_a_bad_flow_is_refused(refused, keywords, message):
    refused(lambda: flow(**keywords), message)


def test_a_tolerance_that_float32_cannot_reach_says_how_to_enable_float64(refused):
    """20 units of rounding: 2.4e-6 in float32, 4.4e-15 in float64."""
    single = matrix(jnp.float32)
    refused(lambda: flow(single, rtol=2.3e-6), "tightest.*jax_enable_x64.*float64")
    refused(lambda: flow(rtol=4.4e-15), r"tightest.*that float64 can reach\.$")
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        flow(single, rtol=2.5e-6)


DESCENTS = {
    "steps = 0": ({"steps": 0}, "`steps` must be at least 1; got 0"),
    "steps < 0": ({"steps": -2}, "`steps` must be at least 1; got -2"),
    "fractional steps": ({"steps": 2.5}, "`steps` must be an integer; got 2.5"),
    "steps = True": ({"steps": True}, "`steps` must be an integer"),
    "record_every = 0": ({"record_every": 0}, "`record_every` must be at least 1"),
    "learning rate 0": ({"learning_rate": 0.0}, "must be positive and finite; got 0"),
    "negative rate": ({"learning_rate": -0.1}, "must be positive and finite; got -0.1"),
    "learning rate NaN": ({"learning_rate": NAN}, "must be positive and finite"),
    "learning rate inf": ({"learning_rate": INF}, "must be positive and finite"),
    "two rates": ({"learning_rate": jnp.ones(2)}, "a number or a schedule"),
    "batch_size > m": (
        {"batch_size": 7, "key": jax.random.key(0)},
        "`batch_size` is 7, but there are 6 samples",
    ),
    "batch_size = 0": ({"batch_size": 0, "key": jax.random.key(0)}, "at least 1"),
    "batches without key": ({"batch_size": 2}, "pass a random `key`"),
    "batches of an objective": (
        {
            "batch_size": 2,
            "key": jax.random.key(0),
            "data": X,
            "objective": lambda m, d: jnp.sum(m.w**2),
        },
        "cannot be used with `objective`",
    ),
}


@pytest.mark.parametrize(("keywords", "message"), DESCENTS.values(), ids=DESCENTS)
def test_a_bad_descent_is_refused(refused, keywords, message):
    refused(lambda: descend(**keywords), message)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.adam(1e-3), r"`optax.adam` itself \(not `optax.adam\(1e-3\)`\)"),
        (lambda learning_rate: learning_rate, "must return an Optax transformation"),
    ],
    ids=["instance", "not an optimizer"],
)
def test_optimizer_must_be_a_factory(refused, optimizer, message):
    refused(lambda: descend(optimizer=optimizer), message, TypeError)


# Under jit and vmap, where values are unknown -----------------------------------------


def arrays_over_time(t):
    return [t.losses, t.grad_norms, *t.laws.values(), *t.squared_norms.values()]


def batch_of(good, faults):
    """Arguments stacked for vmap: the good ones, then one bad at a time."""
    cases = [good] + [good | {name: bad} for _, name, bad in faults]
    return {name: jnp.stack([jnp.asarray(c[name]) for c in cases]) for name in good}


def assert_only_faults_are_reported(sweep, faults):
    results = [hf.RESULTS.successful] + [getattr(hf.RESULTS, f[0]) for f in faults]
    for i, expected in enumerate(results):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], sweep)
        assert one.result == expected, i
        for values in arrays_over_time(one):
            numbers = np.isfinite(np.asarray(values))
            assert numbers.all() if i == 0 else not numbers.any(), (i, values)


FLOW_FAULTS = [
    ("bad_data", "x", with_entry(X, NAN)),
    ("bad_data", "x", with_entry(X, INF)),
    ("bad_weights", "w", with_entry(matrix().w, NAN)),
    ("bad_weights", "w", with_entry(matrix().w, INF)),
    ("bad_time", "t1", NAN),
    ("bad_time", "t1", INF),
    ("bad_time", "t1", 0.0),
    ("bad_time", "t1", -1.0),
    ("bad_times", "ts", [0.0, 0.7, 0.5]),
    ("bad_times", "ts", [0.0, 0.5, 0.5]),
    ("bad_times", "ts", [0.0, 0.5, 1.5]),
    ("bad_times", "ts", [-0.5, 0.5, 1.0]),
    ("bad_times", "ts", [0.0, NAN, 1.0]),
    ("bad_tolerance", "rtol", 1e-16),
    ("bad_tolerance", "rtol", -1e-3),
    ("bad_tolerance", "rtol", NAN),
    ("bad_step", "dt0", 0.0),
    ("bad_step", "dt0", -0.1),
    ("bad_step", "dt0", NAN),
    ("bad_step", "dt0", INF),
]


def test_faults_of_a_traced_flow_are_result_codes():
    good = {
        "x": X, "w": matrix().w, "t1": 1.0, "ts": [0.0, 0.5, 1.0], "rtol": 1e-6, "dt0": 0.1
    }  # fmt: skip

    @jax.jit
    @jax.vmap
    def sweep(x, w, t1, ts, rtol, dt0):
        return hf.flow(Matrix(w), (x, Y), t1, ts=ts, rtol=rtol, dt0=dt0, throw=False)

    trajectories = sweep(*batch_of(good, FLOW_FAULTS).values())
    assert_only_faults_are_reported(trajectories, FLOW_FAULTS)


DESCENT_FAULTS = [
    ("bad_data", "x", with_entry(X, NAN)),
    ("bad_weights", "w", with_entry(matrix().w, INF)),
    ("bad_learning_rate", "rate", NAN),
    ("bad_learning_rate", "rate", INF),
    ("bad_learning_rate", "rate", 0.0),
    ("bad_learning_rate", "rate", -0.1),
]


def test_faults_of_a_traced_descent_are_result_codes():
    good = {"x": X, "w": matrix().w, "rate": 0.1}

    @jax.jit
    @jax.vmap
    def sweep(x, w, rate):
        return hf.descend(Matrix(w), (x, Y), 3, learning_rate=rate, throw=False)

    trajectories = sweep(*batch_of(good, DESCENT_FAULTS).values())
    assert_only_faults_are_reported(trajectories, DESCENT_FAULTS)


#: Labels that a loss does not take, and some that it does.
LABELS = [
    (hf.LogisticLoss(), [[0.0], [1.0], [1.0]], [[-1.0], [1.0], [1.0]]),
    (hf.LogisticLoss(), [[-1.0], [1.0], [0.5]], [[1.0], [1.0], [-1.0]]),
    (hf.ExponentialLoss(), [[0.0], [1.0], [0.0]], [[-1.0], [1.0], [-1.0]]),
    (hf.ExponentialLoss(), [[2.0], [1.0], [1.0]], [[1.0], [1.0], [1.0]]),
    (hf.SoftmaxCrossEntropy(), [0, 2, 3], [0, 2, 1]),
    (hf.SoftmaxCrossEntropy(), [0, -1, 1], [0, 2, 1]),
]


@pytest.mark.parametrize(("loss", "bad", "good"), LABELS)
@pytest.mark.parametrize("run", ["flow", "descend"])
def test_labels_of_another_kind_are_refused_or_a_result_code(run, loss, bad, good):
    """Eagerly an error; of traced labels a code, and no number."""
    outputs = 3 if isinstance(loss, hf.SoftmaxCrossEntropy) else 1
    model = hf.MLP((2, outputs), activation="linear", key=jax.random.key(0))
    x = jnp.array([[1.0, 0.5], [-0.3, 1.0], [0.2, -1.0]])

    def of(y, **options):
        if run == "flow":
            return hf.flow(model, (x, y), 0.1, loss=loss, **options)
        return hf.descend(model, (x, y), 2, learning_rate=0.1, loss=loss, **options)

    with pytest.raises(ValueError, match=r"label|Class indices"):
        of(jnp.array(bad))
    both = jax.jit(jax.vmap(lambda y: of(y, throw=False)))(jnp.array([bad, good]))
    first, second = (jax.tree.map(lambda a, i=i: a[i], both) for i in (0, 1))
    assert first.result == hf.RESULTS.bad_labels
    assert second.result == hf.RESULTS.successful
    assert np.all(np.isnan(first.losses))
    assert np.all(np.isfinite(second.losses))
