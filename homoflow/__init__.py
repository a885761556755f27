"""Gradient flow and gradient descent of homogeneous networks, side by side."""

from ._compare import Comparison as Comparison
from ._compare import compare as compare
from ._descent import descend as descend
from ._flow import flow as flow
from ._laws import Law as Law
from ._laws import Laws as Laws
from ._laws import laws as laws
from ._losses import (
    AbstractLoss as AbstractLoss,
)
from ._losses import (
    ExponentialLoss as ExponentialLoss,
)
from ._losses import (
    HuberLoss as HuberLoss,
)
from ._losses import (
    LogisticLoss as LogisticLoss,
)
from ._losses import (
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
)
from ._losses import (
    SquaredLoss as SquaredLoss,
)
from ._models import (
    MLP as MLP,
)
from ._models import (
    Abs as Abs,
)
from ._models import (
    AbstractActivation as AbstractActivation,
)
from ._models import (
    AbstractInitializer as AbstractInitializer,
)
from ._models import (
    AbstractNetwork as AbstractNetwork,
)
from ._models import (
    Balanced as Balanced,
)
from ._models import (
    BalancedLinear as BalancedLinear,
)
from ._models import (
    ConvNet as ConvNet,
)
from ._models import (
    Elementwise as Elementwise,
)
from ._models import (
    Gaussian as Gaussian,
)
from ._models import (
    Kaiming as Kaiming,
)
from ._models import (
    LeakyReLU as LeakyReLU,
)
from ._models import (
    Linear as Linear,
)
from ._models import (
    MatrixFactorization as MatrixFactorization,
)
from ._models import (
    Orthogonal as Orthogonal,
)
from ._models import (
    Power as Power,
)
from ._models import (
    ReLU as ReLU,
)
from ._models import (
    ReLUPower as ReLUPower,
)
from ._models import (
    SharedLinear as SharedLinear,
)
from ._models import (
    SharedMLP as SharedMLP,
)
from ._models import (
    WeightSpec as WeightSpec,
)
from ._models import (
    Xavier as Xavier,
)
from ._models import (
    factorization_objective as factorization_objective,
)
from ._models import (
    regularized_factorization_objective as regularized_factorization_objective,
)
from ._trajectory import (
    RESULTS as RESULTS,
)
from ._trajectory import (
    Stats as Stats,
)
from ._trajectory import (
    Trajectory as Trajectory,
)
from ._trajectory import (
    TrajectoryError as TrajectoryError,
)

__version__ = "0.1.0"
