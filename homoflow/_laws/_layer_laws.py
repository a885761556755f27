"""The laws of layered networks, read off their layers [Du, Hu & Lee 2018, §2]."""

import inspect
from typing import Any

import equinox as eqx
from jax.tree_util import GetAttrKey, SequenceKey

from .._models import (
    AbstractActivation,
    AbstractNetwork,
    MatrixFactorization,
    SharedLinear,
)
from ._law import Law, Path, Term

#: Where homoflow's own classes are defined.
_OWN = "homoflow."


def follows_layers(model: Any) -> bool:
    """Whether a model computes what its layers say, so that laws can be read off them.

    A subclass with a forward pass of its own, or other layers put in place of those of
    the class, may compute anything.
    """
    if isinstance(model, MatrixFactorization):
        return _definer(model, "__call__").__module__.startswith(_OWN)
    if not isinstance(model, AbstractNetwork):
        return False
    is_own = _definer(model, "__call__").__module__.startswith(_OWN)
    return is_own and all(map(_is_known_layer, model.layers))


def _is_known_layer(layer: Any) -> bool:
    if not isinstance(layer, eqx.nn.Linear | eqx.nn.Conv | SharedLinear):
        return False
    module = _definer(layer, "__call__").__module__
    is_plain = getattr(layer, "groups", 1) == 1
    return is_plain and module.startswith((_OWN, "equinox."))


def _definer(thing: Any, name: str) -> type:
    """The class that a method of an object is defined in."""
    return next((c for c in type(thing).__mro__ if name in vars(c)), type(thing))


def _degree(activation: AbstractActivation) -> int | None:
    """An activation's degree; `None` if a subclass changes the function only."""
    classes = type(activation).__mro__
    says = next(c for c in classes if "degree" in inspect.get_annotations(c))
    is_changed = classes.index(_definer(activation, "__call__")) < classes.index(says)
    return None if is_changed else activation.degree


def network_laws(model: AbstractNetwork) -> tuple[tuple[Law, ...], str]:
    """Every law between consecutive layers, and a note on the interfaces without one."""
    laws, without_law = [], []
    for h, activation in enumerate(model.activations):
        if _degree(activation) is None:
            without_law.append(h + 1)
        else:
            laws.extend(_interface_laws(model, h))
    return tuple(laws), _note(model, without_law)


def output_sum_laws(model: AbstractNetwork) -> tuple[Law, ...]:
    """Column sums of the output layer: softmax cross-entropy sees only differences."""
    h, layer = len(model.layers) - 1, model.layers[-1]
    if isinstance(layer, SharedLinear):
        return ()
    n = h + 1
    weight = Term(_path(h, "weight"), 1, axis=1)
    laws = [Law(f"output_sums[{n}]", f"Σ_i W{n}[i,:]", "units", (), (weight,))]
    if layer.bias is not None:
        bias = Term(_path(h, "bias"), 1)
        laws.append(Law(f"output_bias_sum[{n}]", f"Σ_i b{n}[i]", "total", (), (bias,)))
    return tuple(laws)


def factorization_laws(model: MatrixFactorization) -> tuple[Law, ...]:
    """UᵀU − VᵀV, its diagonal, and its trace [Theorem 2.2, for problem (1)]."""
    del model
    terms = (
        Term((GetAttrKey("U"),), 1, axis=1),
        Term((GetAttrKey("V"),), -1, axis=1),
    )
    return (
        Law("neurons[1]", "‖U[:,i]‖² − ‖V[:,i]‖²", "units", terms),
        Law("layers[1]", "‖U‖² − ‖V‖²", "total", terms),
        Law("matrix[1]", "UᵀU − VᵀV", "matrix", terms),
    )


def _interface_laws(model: AbstractNetwork, h: int) -> list[Law]:
    """Laws between layer h and h + 1 (counted from 0)."""
    lower, upper, activation = (
        model.layers[h],
        model.layers[h + 1],
        model.activations[h],
    )
    assert activation.degree is not None
    terms = (*_outgoing(lower, h), _incoming(upper, h + 1, lower, activation.degree))
    shared = isinstance(lower, SharedLinear) or isinstance(upper, SharedLinear)
    formulas = _Formulas(h + 1, lower, upper, activation.degree)
    laws = [Law(f"layers[{h + 1}]", formulas.total(), "total", terms)]
    if not shared:
        kind = "channels" if isinstance(lower, eqx.nn.Conv) else "neurons"
        laws.insert(0, Law(f"{kind}[{h + 1}]", formulas.units(), "units", terms))
        if activation.is_identity:
            laws.append(Law(f"matrix[{h + 1}]", formulas.matrix(), "matrix", terms))
    return laws


def _outgoing(layer, h: int) -> list[Term]:
    """A layer's share in the laws of its own units: weights and bias into each."""
    weight = "v" if isinstance(layer, SharedLinear) else "weight"
    terms = [Term(_path(h, weight), 1)]
    if layer.bias is not None:
        terms.append(Term(_path(h, "bias"), 1))
    return terms


def _incoming(layer, h: int, below, degree: int) -> Term:
    """A layer's share in the laws of the units below: the weights out of each."""
    if isinstance(layer, SharedLinear):
        return Term(_path(h, "v"), -degree)
    view = None
    if isinstance(below, eqx.nn.Conv) and isinstance(layer, eqx.nn.Linear):
        # Flattened images: each channel owns a block of consecutive columns.
        view = (layer.weight.shape[0], below.out_channels, -1)
    return Term(_path(h, "weight"), -degree, axis=1, view=view)


def _path(h: int, name: str) -> Path:
    return (GetAttrKey("layers"), SequenceKey(h), GetAttrKey(name))


def _note(model: AbstractNetwork, without_law: list[int]) -> str:
    if not without_law:
        return "" if model.activations else "A single layer has no balance law."
    layers = ", ".join(map(str, without_law))
    return (
        f"No balance law at hidden layer {layers}: its activation is not positively "
        "homogeneous, so rescaling a neuron changes the function."
    )


class _Formulas(eqx.Module):
    """Formulas in the paper's letters; v for free weights, b for biases."""

    h: int
    lower: eqx.Module
    upper: eqx.Module
    degree: int

    def units(self) -> str:
        bias = f" + b{self.h}[i]²" if self._has_bias else ""
        return f"‖W{self.h}[i,:]‖²{bias} − {self._k}‖W{self.h + 1}[:,i]‖²"

    def total(self) -> str:
        low = "v" if isinstance(self.lower, SharedLinear) else "W"
        up = "v" if isinstance(self.upper, SharedLinear) else "W"
        bias = f" + ‖b{self.h}‖²" if self._has_bias else ""
        return f"‖{low}{self.h}‖²{bias} − {self._k}‖{up}{self.h + 1}‖²"

    def matrix(self) -> str:
        bias = f" + b{self.h} b{self.h}ᵀ" if self._has_bias else ""
        return f"W{self.h} W{self.h}ᵀ{bias} − W{self.h + 1}ᵀ W{self.h + 1}"

    @property
    def _k(self) -> str:
        return "" if self.degree == 1 else f"{self.degree}"

    @property
    def _has_bias(self) -> bool:
        return getattr(self.lower, "bias", None) is not None
