"""The group of rescalings of a model that leave its function as it is."""

from ._balance import balance as balance
from ._commuting import commuting_laws as commuting_laws
from ._generating_laws import (
    generating_laws as generating_laws,
    laws_of_entries as laws_of_entries,
    names_of_some as names_of_some,
)
from ._projection import Rescaling as Rescaling, RescalingGroup as RescalingGroup
from ._translations import (
    Translations as Translations,
    make_translations as make_translations,
)
