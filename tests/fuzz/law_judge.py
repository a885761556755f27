"""Laws and certificates of drawn architectures, beside null spaces and ranks.

What it is compared with knows nothing of homoflow: gradients at random weights and data
(`architectures.Oracle`).
"""

import dataclasses
import warnings
from collections.abc import Iterator

import jax.numpy as jnp
from architectures import INPUTS, Oracle, make_case
from judgement import Judgement, refused

import homoflow as hf


@dataclasses.dataclass(frozen=True)
class Case:
    """The network of a seed."""

    seed: int

    def simpler(self) -> Iterator["Case"]:
        """None: networks are small."""
        return iter(())


def draw_case(number: int) -> Case:
    return Case(number)


def judge(case: Case) -> Judgement:
    """No false law; all laws or a note; no certificate that is wrong."""
    made = make_case(case.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            laws = hf.laws(made.model, jnp.ones(INPUTS), made.loss)
            certificate = hf.certify(made.model, jnp.ones(INPUTS), made.loss)
        except Exception as error:
            return refused(error)
    oracle = Oracle(made)
    rank, violation = oracle.judge(laws)
    if violation > 1e-10:
        return Judgement("SILENTLY WRONG", violation, 1e-10, f"false law, {made.name}")
    existing = oracle.rank_of_null_laws()
    most = oracle.size - oracle.rank_of_gradients()
    verdict, _, _ = certificate.verdict.partition(":")
    numbers = f"{rank} laws, {existing} by null space, at most {most}; {made.name}"
    if verdict == "complete" and not existing <= certificate.rank <= most:
        return Judgement("SILENTLY WRONG", detail=f"not complete: {numbers}")
    if verdict == "incomplete" and certificate.rank >= most:
        return Judgement("SILENTLY WRONG", detail=f"not incomplete: {numbers}")
    if rank == existing:
        return Judgement("right")
    if "More may exist" in laws.note:
        return Judgement("told", detail=numbers)
    return Judgement("SILENTLY WRONG", detail=f"missed without a word: {numbers}")
