"""Adapters -> numbers and pictures: what was learned, where, how much, and how it lies to the base and to others."""

from deltaw.analysis.amplification import Amplification, Amplifications, amplification
from deltaw.analysis.overlap import Intruders, IntruderTable, intruders, overlap
from deltaw.analysis.similarity import Similarities, Similarity, similarity, subspace_similarity
from deltaw.analysis.spectrum import Advice, Spectra, Spectrum, spectrum

__all__ = [
    "Advice",
    "Amplification",
    "Amplifications",
    "IntruderTable",
    "Intruders",
    "Similarities",
    "Similarity",
    "Spectra",
    "Spectrum",
    "amplification",
    "intruders",
    "overlap",
    "similarity",
    "spectrum",
    "subspace_similarity",
]
