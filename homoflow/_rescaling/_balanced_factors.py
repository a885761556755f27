"""The balanced factors of a product, by its singular value decomposition."""

import itertools
from collections.abc import Sequence

import numpy as np

from .._laws._law import Law, Path, rows_of
from ._units import replace_rows

#: Singular values below this many units of rounding of the product are taken for 0.
_ROUNDING = 2


def balance_factors(law: Law, arrays: dict[Path, np.ndarray]) -> dict:
    """The arrays of a matrix law, balanced: PPᵀ = NNᵀ with the same PᵀN.

    P and N have the units' rows of what the law counts as positive and as negative.
    Units that only meet linear maps may be mixed by any invertible matrix, P → gP and
    N → g⁻ᵀN. The least sum of squares is that of Σ^{1/2}Uᵀ and Σ^{1/2}Vᵀ, with PᵀN = UΣVᵀ
    the singular value decomposition, also where PᵀN has a lower rank than P and N.
    """
    sides = {}
    for sign in (1, -1):
        terms = [t for t in law.quadratic_terms if t.coefficient == sign]
        rows = [rows_of(t, arrays[t.path]) for t in terms]
        sides[sign] = terms, np.cumsum([r.shape[1] for r in rows])[:-1], rows
    positive, negative = (np.concatenate(sides[sign][2], axis=1) for sign in (1, -1))
    each = len(positive) // law.blocks
    for block in range(law.blocks):
        part = slice(block * each, (block + 1) * each)
        positive[part], negative[part] = _balance(positive[part], negative[part])
    for (terms, ends, _), rows in zip(
        sides.values(), (positive, negative), strict=True
    ):
        for term, part in zip(terms, np.split(rows, ends, axis=1), strict=True):
            arrays = arrays | {term.path: replace_rows(term, arrays[term.path], part)}
    return arrays


def balance_chain(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The matrices of W_N ⋯ W_1 with the same product and W_h W_hᵀ = W_{h+1}ᵀ W_{h+1}.

    They are Q_h Σ^{1/N} Q_{h−1}ᵀ, with UΣVᵀ the singular value decomposition of the
    product, Q_0 = V, Q_N = U, and in between matrices Q_h with orthonormal columns, which
    are chosen near the partial products W_h ⋯ W_1 V.
    """
    product, size = weights[0], _norm(weights[0])
    for weight in weights[1:]:
        product, size = weight @ product, _norm(weight) * size
    u, sigma, v = _truncate(*np.linalg.svd(product, full_matrices=False), size)
    root = sigma ** (1 / len(weights))
    bases, images = [v.T], v.T
    for weight in weights[:-1]:
        images = weight @ images
        images = images / np.linalg.norm(images, axis=0)
        bases.append(_nearest_orthonormal(images))
    bases.append(u)
    return [(above * root) @ below.T for below, above in itertools.pairwise(bases)]


def _balance(positive: np.ndarray, negative: np.ndarray):
    """P and N, balanced, in the coordinates of their rows nearest to the given ones."""
    units = len(positive)
    size = _norm(positive) * _norm(negative)
    if size == 0:
        return np.zeros_like(positive), np.zeros_like(negative)
    # Rows may be long: coordinates in their span are enough.
    basis_p, small_p = np.linalg.qr(positive.T)
    basis_n, small_n = np.linalg.qr(negative.T)
    u, sigma, v = _truncate(*np.linalg.svd(small_p @ small_n.T), size)
    root = np.sqrt(sigma)
    new_p, new_n = (u * root).T @ basis_p.T, v * root[:, None] @ basis_n.T
    # Columns that the other side does not see would be left as noise.
    limit = _ROUNDING * units * np.finfo(float).eps
    for new, old, other in ((new_p, positive, negative), (new_n, negative, positive)):
        seen = np.linalg.norm(root[:, None] * new, axis=0)
        new[:, seen <= limit * np.linalg.norm(old, axis=0) * _norm(other)] = 0
    overlap = positive @ new_p.T + negative @ new_n.T
    rotation = _nearest_orthonormal(overlap) if len(sigma) else np.zeros((units, 0))
    return rotation @ new_p, rotation @ new_n


def _truncate(u: np.ndarray, sigma: np.ndarray, v: np.ndarray, size: float):
    """Singular triples that are more than rounding of a product of that size."""
    limit = _ROUNDING * max(u.shape[0], v.shape[1]) * np.finfo(float).eps * size
    rank = int((sigma > limit).sum())
    return u[:, :rank], sigma[:rank], v[:rank]


def _nearest_orthonormal(matrix: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def _norm(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2))
