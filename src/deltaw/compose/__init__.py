"""Adapters -> adapter: combinations of changes with their error stated, and the search for good weights."""

from deltaw.compose.cat import Cat
from deltaw.compose.combination import combine
from deltaw.compose.combiner import Combiner, combiner, combiners
from deltaw.compose.dare import Dare
from deltaw.compose.linear import Linear
from deltaw.compose.magnitude import Magnitude
from deltaw.compose.slerp import Slerp
from deltaw.compose.svd import SVD
from deltaw.compose.ties import Ties

__all__ = [
    "SVD",
    "Cat",
    "Combiner",
    "Dare",
    "Linear",
    "Magnitude",
    "Slerp",
    "Ties",
    "combine",
    "combiner",
    "combiners",
]
