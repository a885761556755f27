"""What people type in the wrong kind is refused by a sentence that says what to write."""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import homoflow as hf

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
Y = X[:, :2]
MODEL = hf.MLP((3, 4, 2), activation="linear", key=KEY)
ONE_OUTPUT = hf.MLP((3, 4, 1), activation="linear", key=KEY)
NEURONS = hf.laws(MODEL)["neurons[1]"]
KINDS = (TypeError, ValueError)


class ListOfLists:
    """An object that is no array and cannot be made one."""

    def __array__(self, *args, **keywords):
        raise RuntimeError("call `.detach()` first")


def flow(model=MODEL, data=(X, Y), t1=1.0, **keywords):
    return hf.flow(model, data, t1, **keywords)


def descend(model=MODEL, data=(X, Y), steps=3, learning_rate=0.1, **keywords):
    return hf.descend(model, data, steps, learning_rate=learning_rate, **keywords)


# What both halves refuse.
PROBLEMS = {
    "loss by name": ({"loss": "mse"}, r"`homoflow\.SquaredLoss\(\)`.*got 'mse'"),
    "no loss": ({"loss": None}, r"`homoflow\.HuberLoss\(\)`.*got None"),
    "loss class": ({"loss": hf.LogisticLoss}, "class LogisticLoss: pass an instance"),
    "loss over a batch": (
        {"loss": lambda f, y: jnp.mean((f - y) ** 2, axis=1)},
        "IndexError.*each sample by itself.*no batch axis",
    ),
    "loss over two axes": (
        {"loss": lambda f, y: jnp.sum(jnp.abs(f - y), axis=(0, 1))},
        "each sample by itself.*no batch axis",
    ),
    "loss of the model": (
        {"loss": lambda model, x, y: jnp.sum(model(x) - y)},
        "TypeError.*one prediction and one target|one prediction and one target.*TypeError",
    ),
    "loss that stays a vector": (
        {"loss": optax.l2_loss},
        "must return one real number.*over the outputs of one sample",
    ),
    "objective by name": ({"objective": "mse"}, "`objective` must be a function"),
    "objective class": ({"objective": hf.SquaredLoss}, "class SquaredLoss"),
    "objective of the model alone": (
        {"objective": lambda model: 0.0},
        "called with the model and its data",
    ),
    "loss beside an objective": (
        {"loss": hf.HuberLoss(), "objective": lambda m, d: jnp.sum(d[0])},
        "`loss` and `objective` are both given",
    ),
    "vmapped model": ({"model": jax.vmap(MODEL)}, "pass the model itself.*each sample"),
    "compiled model": ({"model": jax.jit(MODEL)}, "pass the model itself.*each sample"),
    "plain function": ({"model": lambda x: x[:2]}, "plain function, whose weights"),
    "filter-vmapped model": (
        {"model": eqx.filter_vmap(MODEL)},
        r"`equinox\.filter_vmap\(model\)` pass the model itself",
    ),
    "model class": ({"model": hf.MLP}, "class MLP: pass an instance"),
    "weights alone": ({"model": {"w": X}}, "type dict, which cannot be called.*objective"),
    "targets without an axis of outputs": (
        {"model": ONE_OUTPUT, "data": (X, Y[:, 0])},
        r"shape \(m,\) and outputs of shape \(1,\) use `y\[:, None\]`",
    ),
    "list of targets without an axis": (
        {"model": ONE_OUTPUT, "data": (X, [0.5] * 6)},
        r"np\.asarray\(y\)\[:, None\]",
    ),
    "classes for a squared loss": (
        {"data": (X, jnp.zeros(6, int))},
        r"SoftmaxCrossEntropy\(\)` with their indices as integers",
    ),
    "ragged rows": ({"data": ([[1.0, 2.0], [3.0]], Y[:2])}, "rows must be of equal length"),
    "list of samples": ({"data": (list(X), list(Y))}, r"make one array, `jnp\.stack\(x\)`"),
    "words in the data": ({"data": (np.array([["a"] * 3] * 6), Y)}, "no array of numbers"),
    "no array": ({"data": (ListOfLists(), Y)}, r"ListOfLists.*call `\.detach\(\)` first"),
    "one law": ({"laws": NEURONS}, r"goes into a list, `laws=\[law\]`"),
    "name of a law": ({"laws": "neurons[1]"}, r'homoflow\.laws\(model\)\["neurons\[1\]"\]'),
    "names of laws": ({"laws": ("layers[1]",)}, r"laws\(model\)\['layers\[1\]'\]"),
    "the function laws": ({"laws": hf.laws}, r"such as `homoflow\.laws\(model\)`"),
    "progress": ({"progress": "yes"}, r"True, False or a progress meter.*got 'yes'"),
    "progress class": ({"progress": dfx.TextProgressMeter}, "pass an instance"),
    "number as trainable": ({"trainable": 1}, "`trainable` must be a function.*holds 1"),
    "path as trainable": ({"trainable": "layers[0]"}, r"holds 'layers\[0\]'"),
    "trainable of another form": ({"trainable": [True]}, "or a prefix of it"),
    "save_models": ({"save_models": "x"}, "`save_models` must be True or False"),
    "throw": ({"throw": "no"}, "`throw` must be True or False; got 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("run", [flow, descend])
@pytest.mark.parametrize(("keywords", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_of_the_wrong_kind(refused, run, keywords, message):
    refused(lambda: run(**keywords), f"(?s){message}", KINDS)


FLOWS = {
    "t1 as text": ({"t1": "1"}, "`t1` must be a real number.*got '1'"),
    "t1 = True": ({"t1": True}, "`t1` must be a real number.*got True"),
    "t1 of an array of booleans": ({"t1": jnp.array(True)}, "`t1` must be a real number"),
    "complex t1": ({"t1": 1j}, "`t1` must be a real number"),
    "list as t1": ({"t1": [1.0]}, r"`t1` must be one number; got shape \(1,\)"),
    "ts as text": ({"ts": "x"}, r"`ts` must be a sequence.*jnp\.linspace.*got 'x'"),
    "one time": ({"ts": 0.5}, "`ts` must be a sequence.*got 0.5"),
    "words as ts": ({"ts": ["a", "b"]}, "`ts` must hold real numbers"),
    "booleans as ts": ({"ts": [False, True]}, "`ts` must hold real numbers"),
    "ts as text for t1 = inf": ({"t1": jnp.inf, "ts": "x"}, "`ts` must be a sequence"),
    "controller by name": (
        {"stepsize_controller": "pid"},
        r"`stepsize_controller`.*`diffrax\.PIDController\(rtol.*got 'pid'",
    ),
    "controller class": ({"stepsize_controller": dfx.PIDController}, "an instance"),
    "adjoint by name": ({"adjoint": "direct"}, r"`diffrax\.DirectAdjoint\(\)`"),
    "adjoint class": ({"adjoint": dfx.DirectAdjoint}, "pass an instance"),
    "solver by name": ({"solver": "rk45"}, r"Diffrax's solvers.*got 'rk45'"),
    "solver class": ({"solver": hf.ExponentialAdams}, "class ExponentialAdams: pass an"),
    "dynamics by name": ({"dynamics": "heavy"}, "one of homoflow's dynamics.*got 'heavy'"),
    "dynamics class": ({"dynamics": hf.HeavyBall}, "class HeavyBall: pass an instance"),
    "dt0 as text": ({"dt0": "a"}, "`dt0` must be a real number.*got 'a'"),
    "atol = True": ({"atol": True}, "`atol` must be a real number"),
    "rtol as text": ({"rtol": "1e-6"}, "`rtol` must be a real number"),
    "negative rtol": ({"rtol": -1}, "`rtol` must be positive"),
    "fractional max_steps": ({"max_steps": 1.5}, "`max_steps` must be a positive integer"),
    "max_steps = True": ({"max_steps": True}, "`max_steps` must be a positive integer"),
    "negative decay": ({"weight_decay": -1.0}, "`weight_decay` must be finite and not"),
    "decay as text": ({"weight_decay": "small"}, "`weight_decay` must be a real number"),
    "project": ({"project": "yes"}, "`project` must be True, False or None"),
    "estimate_error": ({"estimate_error": "x"}, "`estimate_error` must be True, False or"),
}  # fmt: skip


@pytest.mark.parametrize(("keywords", "message"), FLOWS.values(), ids=FLOWS)
def test_a_flow_of_the_wrong_kind(refused, keywords, message):
    refused(lambda: flow(**keywords), message, KINDS)


DESCENTS = {
    "steps as text": ({"steps": "10"}, "`steps` must be an integer; got '10'"),
    "number as key": ({"key": 0}, r"`jax\.random\.key\(0\)`; got 0"),
    "number as key of batches": ({"key": 7, "batch_size": 2}, r"random\.key\(0\)`; got 7"),
    "floats as key": ({"key": jnp.zeros(2)}, "an array of type float64"),
    "many keys": ({"key": jax.random.split(KEY, 3)}, "single random key.*filter_vmap"),
    "optimizer by name": ({"optimizer": "adam"}, r"`optax\.adam` itself.*Got 'adam'"),
    "optimizer instance": ({"optimizer": optax.sgd(0.1)}, r"not `optax\.adam\(1e-3\)`"),
    "rate as text": ({"learning_rate": "0.1"}, "`learning_rate` must be a real number"),
    "rate = True": ({"learning_rate": True}, "`learning_rate` must be a real number"),
    "maker of schedules": (
        {"learning_rate": optax.cosine_decay_schedule},
        "called with the count of steps.*missing 1 required",
    ),
    "schedule of two rates": (
        {"learning_rate": lambda count: jnp.ones(2)},
        "must be one number",
    ),
    "ledger": ({"ledger": "yes"}, "`ledger` must be True or False"),
    "ledger of no laws": ({"ledger": True, "laws": ()}, "no law to record.*Pass `laws`"),
    "ledger of a model without laws": (
        {"ledger": True, "model": eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=KEY)},
        "no law to record. No quadratic law was found.*leave `ledger` out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("keywords", "message"), DESCENTS.values(), ids=DESCENTS)
def test_a_descent_of_the_wrong_kind(refused, keywords, message):
    refused(lambda: descend(**keywords), message, KINDS)


#: homoflow as a type checker does not see it.
any_: Any = hf


def perceptron(**keywords):
    return any_.MLP((3, 4, 2), **{"key": KEY, **keywords})


MODELS = {
    "number as key": (lambda: perceptron(key=0), r"`jax\.random\.key\(0\)`; got 0"),
    "key of a convolution": (lambda: any_.ConvNet((1, 5), (2,), 1, key=1), "got 1"),
    "key of shared weights": (lambda: any_.SharedMLP([[[1]]], key=None), "got None"),
    "key of factors": (lambda: any_.MatrixFactorization(2, 2, 1, key=0), "got 0"),
    "key of an initializer": (lambda: any_.Kaiming()(3, [], X.dtype), "got 3"),
    "key of linear layers": (
        lambda: any_.MLP((2, 2), init=any_.BalancedLinear(), key=0), "got 0"
    ),
    "activation by its name": (lambda: perceptron(activation="gelu"), r"`jax\.nn\.gelu`"),
    "unknown activation": (lambda: perceptron(activation="rellu"), "the names are abs"),
    "activation class": (lambda: perceptron(activation=any_.ReLU), "pass an instance"),
    "number as activation": (lambda: perceptron(activation=2), "or a function; got 2"),
    "activation with weights": (
        lambda: perceptron(activation=eqx.nn.PReLU()), "Equinox module of your own"
    ),
    "start by name": (lambda: perceptron(init="xavier"), r"`homoflow\.Xavier\(…\)`"),
    "start class": (lambda: perceptron(init=any_.Xavier), "pass an instance"),
    "start of one array": (
        lambda: perceptron(init=lambda key, shape: jnp.ones(shape)),
        r"called once for the whole network, as `init\(key, specs, dtype\)`",
    ),
    "start of JAX": (
        lambda: perceptron(init=jax.nn.initializers.glorot_normal()),
        "a list of one array for each",
    ),
    "transposed start": (
        lambda: perceptron(init=lambda k, s, d: [jnp.ones(a.shape[::-1]) for a in s]),
        r"of shapes \[\(4, 3\), \(2, 4\)\]; it returned \[\(3, 4\), \(4, 2\)\]",
    ),
    "bias as text": (lambda: perceptron(use_bias="no"), "`use_bias` must be True or"),
    "one size": (lambda: any_.MLP(5, key=KEY), "at least 2 positive integers"),
    "spread as text": (lambda: any_.Gaussian("0.1"), "`std` must be a real number"),
    "a spread as text": (lambda: any_.Gaussian((0.1, "b")), "`std` must be a real number"),
    "variance = True": (lambda: any_.Gaussian(variance=True), "`variance` must be a real"),
    "balanced spread": (lambda: any_.Balanced("a"), "`std` must be a real number"),
    "negative spread": (lambda: any_.BalancedLinear(-1.0), "finite and not negative"),
    "scale as text": (lambda: any_.Orthogonal("a"), "`scale` must be a real number"),
    "spread of factors": (
        lambda: any_.MatrixFactorization(2, 2, 1, std="a", key=KEY), "`std` must be a real"
    ),
    "rank 0": (lambda: any_.MatrixFactorization(2, 2, 0, key=KEY), "`r` must be a posi"),
    "delta as text": (lambda: any_.HuberLoss(delta="a"), "`delta` must be a real number"),
    "slope as text": (lambda: any_.LeakyReLU("a"), "`slope` must be a real number"),
    "models to compare": (lambda: any_.compare(MODEL, MODEL), "a trajectory.*not a m"),
    "a model to judge": (lambda: any_.raise_unless_successful(MODEL), "a trajectory, w"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_a_model_of_the_wrong_kind(refused, make, message):
    refused(make, f"(?s){message}", KINDS)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_numbers_are_arrays(kind):
    rows = kind(kind(row) for row in np.asarray(X).tolist())
    problem = hf.make_problem(ONE_OUTPUT, (rows, kind([[0.5]] * 6)))
    x, y = problem.data
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, np.full((6, 1), 0.5))


def test_a_list_of_arrays_is_still_several_inputs():
    class Sum(eqx.Module):
        w: jax.Array

        def __call__(self, inputs):
            return self.w * (inputs[0] + inputs[1])

    problem = hf.make_problem(Sum(jnp.ones(3)), ([X, X], X))
    assert [a.shape for a in problem.data[0]] == [(6, 3), (6, 3)]


def test_a_start_may_be_a_function():
    model = perceptron(
        init=lambda key, specs, dtype: [jnp.ones(s.shape) for s in specs]
    )
    np.testing.assert_array_equal(model(jnp.ones(3)), [12.0, 12.0])
