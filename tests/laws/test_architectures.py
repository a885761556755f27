"""Random networks: laws against null spaces, certificates against ranks of gradients."""

import jax.numpy as jnp
import pytest
from architectures import INPUTS, Oracle, make_case

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
#: Seeds of networks that have few stages in common.
SMOKE = (0, 12)
NUM_CASES = 200


def check(seed: int) -> None:
    case = make_case(seed)
    oracle = Oracle(case)
    laws = hf.laws(case.model, jnp.ones(INPUTS), case.loss)
    rank, violation = oracle.judge(laws)
    assert violation < 1e-10, case.name
    existing = oracle.rank_of_null_laws()
    if "More may exist" not in laws.note:
        assert rank == existing, case.name
    certificate = hf.certify(case.model, jnp.ones(INPUTS), case.loss)
    most = oracle.size - oracle.rank_of_gradients()
    verdict, _, _ = certificate.verdict.partition(":")
    assert verdict in ("complete", "incomplete", "undecided"), case.name
    if verdict == "complete":
        assert existing <= certificate.rank <= most, case.name
    if verdict == "incomplete":
        assert certificate.rank < most, case.name


@pytest.mark.parametrize("seed", SMOKE)
def test_some_random_networks(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_many_random_networks(seed):
    check(seed)
