"""How an optimizer is made from a learning rate."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import optax

OptimizerFactory = Callable[[Any], optax.GradientTransformation]


class Factory(eqx.Module):
    """An optimizer factory that is equal to another one that does the same.

    Two `functools.partial` objects never compare equal, and would compile twice.
    """

    function: Callable = eqx.field(static=True)
    args: tuple = eqx.field(static=True)
    keywords: tuple[tuple[str, Any], ...] = eqx.field(static=True)

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
        return Factory(optimizer, (), ())

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        made = self.function(*self.args, learning_rate, **dict(self.keywords))
        return as_transformation(made)

    @property
    def name(self) -> str:
        """What to call it in `stats`."""
        text = getattr(self.function, "__name__", type(self.function).__name__)
        given = [repr(a) for a in self.args]
        given += [f"{k}={v!r}" for k, v in self.keywords]
        return f"{text}({', '.join(given)})" if given else text


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
