"""Conservation laws: what they are, and how they are found."""

from ._certify import relative_violation as relative_violation
from ._find import laws as laws
from ._law import Law as Law, Laws as Laws
