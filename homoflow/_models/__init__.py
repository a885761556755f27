"""Models: pure functions of one sample that know their structure."""

from ._activations import (
    Abs as Abs,
)
from ._activations import (
    AbstractActivation as AbstractActivation,
)
from ._activations import (
    Elementwise as Elementwise,
)
from ._activations import (
    LeakyReLU as LeakyReLU,
)
from ._activations import (
    Linear as Linear,
)
from ._activations import (
    Power as Power,
)
from ._activations import (
    ReLU as ReLU,
)
from ._activations import (
    ReLUPower as ReLUPower,
)
from ._factorization import (
    MatrixFactorization as MatrixFactorization,
)
from ._factorization import (
    factorization_objective as factorization_objective,
)
from ._factorization import (
    regularized_factorization_objective as regularized_factorization_objective,
)
from ._initializers import (
    AbstractInitializer as AbstractInitializer,
)
from ._initializers import (
    Balanced as Balanced,
)
from ._initializers import (
    BalancedLinear as BalancedLinear,
)
from ._initializers import (
    Gaussian as Gaussian,
)
from ._initializers import (
    Kaiming as Kaiming,
)
from ._initializers import (
    Orthogonal as Orthogonal,
)
from ._initializers import (
    WeightSpec as WeightSpec,
)
from ._initializers import (
    Xavier as Xavier,
)
from ._networks import (
    MLP as MLP,
)
from ._networks import (
    AbstractNetwork as AbstractNetwork,
)
from ._networks import (
    ConvNet as ConvNet,
)
from ._networks import (
    SharedMLP as SharedMLP,
)
from ._shared import SharedLinear as SharedLinear
