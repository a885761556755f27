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
    parts = re.split(r"\\n(?=\\S)", text)
    bodies = {name for part in parts for name in re.findall(r"body=(%[\\w.\\-]+)", part)}
    sums = {
        part.split(" ")[0]: len(re.findall(r" all-reduce(?:-start)?\\(", part))
        for part in parts if part.split(" ")[0] in bodies
    }
    others = re.findall(r"all-gather|all-to-all|collective-permute", text)
    error = jnp.max(jnp.abs(run(sharded).losses / run(data).losses - 1))
    print(json.dumps([sums, others, float(error), len(jax.devices())]))
"""

RUNS = {
    "descend": "hf.descend(model, data, 20, learning_rate=0.1, throw=False)",
    "flow": "hf.flow(model, data, 1.0, solver=dfx.Dopri8(), throw=False)",
}


@pytest.mark.parametrize("activation", ["jnp.tanh", '"linear"'])
@pytest.mark.parametrize("name", RUNS)
def test_one_sum_for_each_gradient(name, activation):
    code = CODE.replace("ACTIVATION", activation).replace("RUN", RUNS[name])
    sums, others, error, devices = json.loads(answer(outside(code, devices=8)))
    assert devices == 8
    assert others == []
    assert sorted(sums.values())[-1] == 1
    assert error < 1e-12
