"""Gradient flow and gradient descent of homogeneous networks, side by side."""

import importlib.metadata

from . import observe as observe
from ._descent._descend import descend as descend
from ._descent._track import track as track, tracked as tracked
from ._dynamics._base import (
    AbstractDynamics as AbstractDynamics,
    AbstractStochasticDynamics as AbstractStochasticDynamics,
)
from ._dynamics._central import Central as Central
from ._dynamics._gradient_flow import GradientFlow as GradientFlow
from ._dynamics._heavy_ball import HeavyBall as HeavyBall
from ._dynamics._modified import Modified as Modified
from ._flows._central_flow import central_flow as central_flow
from ._flows._certify_margin import certify_margin as certify_margin
from ._flows._drift_prediction import (
    DriftPrediction as DriftPrediction,
    EdgeDrift as EdgeDrift,
)
from ._flows._early_flow import early_flow as early_flow
from ._flows._early_limit import early_limit as early_limit
from ._flows._flow import flow as flow
from ._flows._flow_solution import flow_solution as flow_solution
from ._flows._heavy_ball_flow import heavy_ball_flow as heavy_ball_flow
from ._flows._late_flow import late_flow as late_flow
from ._flows._modified_flow import modified_flow as modified_flow
from ._flows._predict_drift import predict_drift as predict_drift
from ._flows._saddles import saddles as saddles
from ._flows._sharpness import sharpness as sharpness
from ._flows._spectrum import spectrum as spectrum
from ._flows._split_discretization import (
    DiscretizationSplit as DiscretizationSplit,
    split_discretization as split_discretization,
)
from ._laws import (
    Certificate as Certificate,
    Law as Law,
    Laws as Laws,
    certify as certify,
    laws as laws,
)
from ._methods._averaged import Averaged as Averaged
from ._methods._base import AbstractMethod as AbstractMethod
from ._methods._choose import Auto as Auto, Selection as Selection
from ._methods._diffrax import Diffrax as Diffrax
from ._methods._filippov import Filippov as Filippov
from ._methods.edge._along_edge import AlongEdge as AlongEdge
from ._models import (
    MLP as MLP,
    Abs as Abs,
    AbstractActivation as AbstractActivation,
    AbstractInitializer as AbstractInitializer,
    AbstractNetwork as AbstractNetwork,
    Balanced as Balanced,
    BalancedLinear as BalancedLinear,
    ConvNet as ConvNet,
    Elementwise as Elementwise,
    Gaussian as Gaussian,
    Kaiming as Kaiming,
    LeakyReLU as LeakyReLU,
    Linear as Linear,
    MatrixFactorization as MatrixFactorization,
    Orthogonal as Orthogonal,
    Power as Power,
    ReLU as ReLU,
    ReLUPower as ReLUPower,
    SharedLinear as SharedLinear,
    SharedMLP as SharedMLP,
    WeightSpec as WeightSpec,
    Xavier as Xavier,
    factorization_objective as factorization_objective,
    regularized_factorization_objective as regularized_factorization_objective,
)
from ._problem._losses import (
    AbstractLoss as AbstractLoss,
    ExponentialLoss as ExponentialLoss,
    HuberLoss as HuberLoss,
    LogisticLoss as LogisticLoss,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
    SquaredLoss as SquaredLoss,
)
from ._problem._problem import Problem as Problem, make_problem as make_problem
from ._rescaling import balance as balance
from ._results._compare import Comparison as Comparison, compare as compare
from ._results._event_kind import EventKind as EventKind
from ._results._events import Event as Event, Events as Events, Slide as Slide
from ._results._failure import (
    TrajectoryError as TrajectoryError,
    TrajectoryInterrupt as TrajectoryInterrupt,
    raise_unless_successful as raise_unless_successful,
)
from ._results._flow_solution import FlowSolution as FlowSolution
from ._results._kink_layer import KinkLayer as KinkLayer
from ._results._ledger import (
    Account as Account,
    BatchSplit as BatchSplit,
    Ledger as Ledger,
)
from ._results._margin_certificate import MarginCertificate as MarginCertificate
from ._results._reason import Reason as Reason
from ._results._saddle import Saddle as Saddle
from ._results._saddle_limit import SaddleLimit as SaddleLimit
from ._results._save import load as load, save as save
from ._results._smooth import smooth as smooth
from ._results._stationary_kind import StationaryKind as StationaryKind
from ._results._stats import Stats as Stats
from ._results._status import RESULTS as RESULTS
from ._results._trajectory import Trajectory as Trajectory
from ._solvers import (
    AbstractFlowSolver as AbstractFlowSolver,
    ExponentialAdams as ExponentialAdams,
    GaussLegendre as GaussLegendre,
    Rodas5P as Rodas5P,
)
from ._sweep._models import models_of as models_of
from ._sweep._settings import Settings as Settings, grid as grid, zipped as zipped
from ._sweep._statistics import (
    fraction as fraction,
    mean_band as mean_band,
    quantile_band as quantile_band,
    slope_fit as slope_fit,
)
from ._sweep._sweep import (
    SweepError as SweepError,
    load_sweep as load_sweep,
    sweep as sweep,
)

__version__ = importlib.metadata.version("homoflow")
