"""Conservation laws: what they are, and how they are found."""

from ._completeness import Certificate as Certificate, certify as certify
from ._law import Law as Law, Laws as Laws
from ._laws import known_laws as known_laws, laws as laws
from ._residuals import (
    relative_violation as relative_violation,
    threshold as threshold,
    violations_at_random_weights as violations_at_random_weights,
)
from ._rotations import (
    Rotation as Rotation,
    rotations_of as rotations_of,
    torque as torque,
)
