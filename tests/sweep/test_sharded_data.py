"""Data shared out over devices: one sum over devices a gradient, and the same answer."""

import json

import pytest
from test_engines import answer, outside

pytestmark = pytest.mark.slow

CODE = """
    import json, re
    import diffrax as dfx
    import equinox as eqx
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import homoflow as hf

    x = np.random.default_rng(0).standard_normal((64, 5))
    data = (jnp.asarray(x), jnp.asarray(np.tanh(x[:, :1] + x[:, 1:2])))
    mesh = Mesh(np.array(jax.devices()), ("sample",))
    sharded = jax.device_put(data, NamedSharding(mesh, P("sample")))
    model = hf.MLP((5, 8, 1), activation=ACTIVATION, key=jax.random.key(0))
    run = lambda data: RUN

    def arrays(data):
        return jax.tree.leaves(eqx.filter(run(data), eqx.is_array))

    text = jax.jit(arrays).lower(sharded).compile().as_text()
    parts = {part.split(" ")[0]: part for part in re.split(r"\\n(?=\\S)", text)}
    bodies = [parts[name] for name in re.findall(r"body=(%[\\w.\\-]+)", text)]
    sums = [len(re.findall(r" all-reduce(?:-start)?\\(", part)) for part in bodies]
    words = r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\\("
    others = [word for part in bodies for word in re.findall(words, part)]
    error = jnp.max(jnp.abs(run(sharded).losses / run(data).losses - 1))
    print(json.dumps([sums, others, float(error), len(jax.devices())]))
"""

RUNS = {
    "descend": "hf.descend(model, data, 20, learning_rate=0.1, throw=False)",
    "minibatches": "hf.descend(model, data, 20, learning_rate=0.1, batch_size=16, "
    "key=jax.random.key(1), throw=False)",
    "flow": "hf.flow(model, data, 1.0, solver=dfx.Dopri8(), throw=False)",
}


@pytest.mark.parametrize("name", RUNS)
def test_one_sum_for_each_gradient(name):
    """In the loop over steps of descent, and over the stages of a step of the flow."""
    code = CODE.replace("ACTIVATION", "jnp.tanh").replace("RUN", RUNS[name])
    sums, others, error, devices = json.loads(answer(outside(code, devices=8)))
    assert devices == 8
    assert others == []
    assert max(sums) == 1
    # In all: one for a gradient, and of the flow one for what is recorded.
    assert sum(sums) == {"descend": 1, "minibatches": 1, "flow": 2}[name]
    assert error < 1e-13
