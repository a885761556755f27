"""Which rescalings keep the linear laws."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jax._arrays import tree_norm
from .._laws._law import Law
from ._group import apply_generator, scatter_rows, unit_rows
from ._projection import RescalingGroup
from ._translations import Translations

#: What rounding explains, relative to the tangent; single precision is enough to tell.
_ROUNDING = 1e-4


def commuting_laws(
    laws: Iterable[Law], translations: Translations, weights: PyTree
) -> tuple[Law, ...]:
    """The laws whose rescalings leave the linear laws of `translations` at 0.

    Those with A·C ⊂ C, where C is spanned by the translations: then weights without a
    component in C are rescaled to such weights. It is tried at random weights.
    """
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), weights)
    with jax.ensure_compile_time_eval():
        part = translations.component(drawn)
        free = jax.tree.map(jnp.subtract, drawn, part)
        return tuple(law for law in laws if _commutes(law, translations, free, rng))


def _commutes(
    law: Law, translations: Translations, free: PyTree, rng: np.random.Generator
) -> bool:
    group = RescalingGroup((law,), free)
    leaves, structure = jax.tree.flatten(free)
    generator = rng.normal(size=jnp.shape(group.values(free)[0])).astype(np.float32)
    moved = [jnp.zeros_like(leaf) for leaf in leaves]
    for _, array, term in group.terms:
        place = group.places[array]
        rows = unit_rows(law, term, leaves[place])
        change = apply_generator(law, term, jnp.asarray(generator), rows)
        moved[place] += scatter_rows(law, term, change, leaves[place])
    tangent = jax.tree.unflatten(structure, moved)
    lost = tree_norm(translations.component(tangent))
    return bool(lost <= _ROUNDING * tree_norm(tangent))
