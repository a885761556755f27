"""Reading a traced function: what it is made of, before any number is computed."""

from ._affine import Degree as Degree, degree_in as degree_in
from ._fast_softplus import with_quick_softplus as with_quick_softplus
from ._interpreter import inner_jaxprs as inner_jaxprs, walk as walk
from ._kink_transform import (
    KinkedFunction as KinkedFunction,
    Operation as Operation,
    with_kinks as with_kinks,
)
from ._smoothness import nonsmooth_primitives as nonsmooth_primitives
