"""Models: pure functions of one sample that know their structure."""

from ._activations import (
    Abs as Abs,
    AbstractActivation as AbstractActivation,
    Elementwise as Elementwise,
    LeakyReLU as LeakyReLU,
    Linear as Linear,
    Power as Power,
    ReLU as ReLU,
    ReLUPower as ReLUPower,
)
from ._factorization import (
    MatrixFactorization as MatrixFactorization,
    factorization_objective as factorization_objective,
    regularized_factorization_objective as regularized_factorization_objective,
)
from ._initializers import (
    AbstractInitializer as AbstractInitializer,
    Balanced as Balanced,
    BalancedLinear as BalancedLinear,
    Gaussian as Gaussian,
    Kaiming as Kaiming,
    Orthogonal as Orthogonal,
    WeightSpec as WeightSpec,
    Xavier as Xavier,
)
from ._networks import (
    MLP as MLP,
    AbstractNetwork as AbstractNetwork,
    ConvNet as ConvNet,
    SharedMLP as SharedMLP,
)
from ._shared import SharedLinear as SharedLinear
