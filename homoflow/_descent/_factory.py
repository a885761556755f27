"""How an optimizer is made from a learning rate."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._jax._same_function import same_function
from .._jax._structural_cache import cached_by_structure

_FLATTENED = (
    "The optimizer cannot use the gradient that it is given: Optax hands a line search "
    "`grad` and `value_fn` of the weights as they are, also inside of `optax.flatten`, "
    "which has made one vector of the updates. Put the line search outside of it."
)

OptimizerFactory = Callable[[Any], optax.GradientTransformation]


class Factory(eqx.Module):
    """An optimizer factory that is equal to another one that does the same.

    Two `functools.partial` objects never compare equal, and would compile twice.

    - `numbers`: keywords that are arrays of the program, which does for others as well.
    """

    function: Callable = eqx.field(static=True)
    args: tuple = eqx.field(static=True)
    keywords: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    numbers: dict[str, Array] = eqx.field(default_factory=dict)

    @staticmethod
    def create(optimizer: Any) -> "Factory":
        """The factory that a user passes, or an error if it is none."""
        if not callable(optimizer):
            got = "" if isinstance(optimizer, tuple) else f" Got {optimizer!r}."
            raise TypeError(
                "`optimizer` must be a function from the learning rate to an Optax "
                "transformation, such as `optax.adam` itself (not `optax.adam(1e-3)`)."
                f"{got}"
            )
        if isinstance(optimizer, functools.partial):
            keywords = tuple(sorted(optimizer.keywords.items()))
            try:
                hash((optimizer.args, keywords))
            except TypeError:
                return Factory(optimizer, (), ())
            return Factory(optimizer.func, optimizer.args, keywords)
        return Factory(same_function(optimizer), (), ())

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        keywords = dict(self.keywords) | self.numbers
        return as_transformation(self.function(*self.args, learning_rate, **keywords))

    def check(self, learning_rate: Any) -> None:
        """An error if what it makes is no transformation; nothing is compiled."""
        with jax.numpy_dtype_promotion("standard"):
            eqx.filter_eval_shape(lambda rate: (self(rate), None)[1], learning_rate)

    def with_arrays(self, weights: PyTree) -> "Factory":
        """With numbers such as a momentum as arrays, where that changes nothing else.

        Optax itself gives its own factories arrays for numbers (`inject_hyperparams`); of
        others one cannot know. 0 and 1 may decide what there is to do. In single precision
        1 − 0.999 would lose digits that Python's floats have.
        """
        module = getattr(self.function, "__module__", None) or ""
        numbers = {
            name: value
            for name, value in self.keywords
            if isinstance(value, float) and value not in (0.0, 1.0)
        }
        is_optax = module.partition(".")[0] == "optax"
        if not (numbers and is_optax and jax.config.jax_enable_x64):  # pyright: ignore[reportAttributeAccessIssue]
            return self
        keywords = tuple(kv for kv in self.keywords if kv[0] not in numbers)
        # Weakly typed, as the numbers are.
        arrays = {name: jnp.asarray(value) for name, value in numbers.items()}
        factory = Factory(self.function, self.args, keywords, arrays)
        return factory if _can_be_traced(factory, weights) else self

    @property
    def name(self) -> str:
        """What to call it in `stats`."""
        text = getattr(self.function, "__name__", type(self.function).__name__)
        given = [repr(a) for a in self.args]
        given += [f"{k}={v!r}" for k, v in self.keywords]
        return f"{text}({', '.join(given)})" if given else text


@cached_by_structure()
def _can_be_traced(factory: Factory, weights: PyTree) -> bool:
    """Whether the optimizer can be made, and used, of numbers that are not known."""

    def step(factory: Factory, weights: PyTree) -> PyTree:
        optimizer = factory(jnp.zeros((), jax.tree.leaves(weights)[0].dtype))
        state = optimizer.init(weights)
        return optimizer.update(weights, state, weights)

    try:
        with jax.numpy_dtype_promotion("standard"):
            eqx.filter_eval_shape(step, factory, weights)
    except Exception:  # whatever an optimizer raises, it is used with numbers
        return False
    return True


def as_transformation(made: Any) -> optax.GradientTransformation:
    """An Optax transformation, or an error that says what was given instead."""
    if isinstance(made, optax.MultiSteps):
        made = made.gradient_transformation()
    if not isinstance(made, optax.GradientTransformation):
        raise TypeError(
            "`optimizer(learning_rate)` must return an Optax transformation; got "
            f"{type(made).__name__}."
        )
    return made


def update_with_extras(update: Callable, loss_fn: Callable, **extras: Any) -> Any:
    """`update(**extras)`, or with what else an optimizer asks for.

    `grad_fn`, for gradients elsewhere, is not offered to all: some refuse what they do not
    know.
    """

    def grad_fn(weights, _):
        return jax.grad(loss_fn)(weights)

    try:
        return update(value_fn=loss_fn, **extras)
    except ValueError as error:
        if "grad_fn" not in str(error):
            raise
        return update(value_fn=loss_fn, grad_fn=grad_fn, **extras)
    except TypeError as error:
        if "not a valid JAX array type" in str(error):
            raise TypeError(_FLATTENED) from error
        if "unexpected keyword argument" not in str(error):
            raise
        return update(grad_fn=grad_fn)


@contextlib.contextmanager
def one_set_of_weights(params: Any = None) -> Iterator[None]:
    """`TypeError` for `optax.lookahead`, which reads a pair of weights."""
    sentence = (
        "`optax.lookahead` keeps two sets of weights, and homoflow follows one: pass the "
        "optimizer inside of it."
    )
    if isinstance(params, optax.LookaheadParams):
        raise TypeError(sentence)
    try:
        yield
    except AttributeError as error:
        if error.name not in optax.LookaheadParams._fields:
            raise
        raise TypeError(sentence) from error
