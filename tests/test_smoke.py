import functools
import jax.numpy as jnp, jax.random as jr, optax, jax, equinox as eqx
import diffrax as dfx
import pytest
import homoflow as hf

@pytest.mark.parametrize("dtype",[jnp.float32,jnp.float64])
def test_all(dtype,getkey):
    model=hf.MLP((3,8,2),key=getkey(),dtype=dtype,use_bias=True)
    x=jr.normal(getkey(),(20,3)); data=(x,x[:,:2])
    f=hf.flow(model,data,5.)
    assert f.losses.dtype==dtype
    g=hf.descend(model,data,50,learning_rate=.1)
    hf.compare(f,g,x.astype(dtype))
    hf.descend(model,data,50,learning_rate=optax.linear_schedule(.1,.01,50),optimizer=optax.adam,batch_size=7,key=getkey(),save_models=True)
    hf.flow(hf.MLP((3,8,2),activation="linear",key=getkey(),dtype=dtype),data,5.,save_models=True,estimate_error=True)
    m=hf.ConvNet((1,8,8),(3,4),2,padding=1,stride=2,key=getkey(),dtype=dtype)
    x=jr.normal(getkey(),(5,1,8,8))
    hf.flow(m,(x,jnp.array([0,1,1,0,1])),2.,loss=hf.SoftmaxCrossEntropy())
    m=hf.MatrixFactorization(4,3,2,key=getkey(),dtype=dtype)
    print(hf.flow(m,jnp.ones((4,3)),2.,objective=hf.factorization_objective).laws)
    f=hf.flow(m,jnp.ones((4,3)),2.,objective=hf.regularized_factorization_objective); print(f.laws, f.stats)
    g=jax.grad(lambda m: hf.flow(m,jnp.ones((4,3)),2.,objective=hf.factorization_objective).losses[-1])(m)
    g2=jax.grad(lambda m: hf.flow(m,jnp.ones((4,3)),2.,objective=hf.factorization_objective,adjoint=dfx.BacksolveAdjoint()).losses[-1])(m)
    print(g.U,g2.U)
