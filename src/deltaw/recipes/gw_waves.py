"""Simulated binary black holes in three detectors: real waveforms, real antenna patterns, design noise curves.

One sample is a function of (seed, split, index) and of nothing else. The noise is Gaussian with the detectors' design
spectrum; whitening divides by that very spectrum, so it is drawn white, which is the same thing and ten times faster.
Units: seconds, Hz, solar masses, radians. The waveforms come from LIGO's lalsuite (`pip install 'deltaw[gw]'`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from deltaw.errors import ConfigError, MissingExtra, did_you_mean
from deltaw.training.order import generator

Array = np.ndarray[Any, Any]

RATE = 2048
"""Samples a second."""
SECONDS = 2.0
"""Length of a sample."""
GRID = 8
"""Length in seconds of the segment on which a sample is computed; long enough for 10 + 10 solar masses from 20 Hz."""
MERGER = 7.0
"""When the signal merges, in that segment."""
BAND = (20.0, 500.0)
"""Band-pass, and the band over which the signal-to-noise ratio counts."""
DETECTORS = {"H1": "LHO_4K_DETECTOR", "L1": "LLO_4K_DETECTOR", "V1": "VIRGO_DETECTOR"}
SPECTRA = {
    "H1": "SimNoisePSDaLIGOZeroDetHighPower",
    "L1": "SimNoisePSDaLIGOZeroDetHighPower",
    "V1": "SimNoisePSDAdvVirgo",
}
APPROXIMANTS = ("IMRPhenomD", "SEOBNRv4_opt")
TAPER = 0.25
"""Seconds over which a waveform that is longer than the segment fades in."""


@dataclass(frozen=True, kw_only=True)
class Sky:
    """What the samples are drawn from.

    snr: range of the network signal-to-noise ratio. masses: range of each mass. spin: largest aligned spin.
    merger: range of the merger's time in the sample. approximant: the waveform model.
    """

    snr: tuple[float, float] = (8.0, 20.0)
    masses: tuple[float, float] = (10.0, 80.0)
    spin: float = 0.9
    merger: tuple[float, float] = (1.0, 1.8)
    approximant: str = "IMRPhenomD"

    def __post_init__(self) -> None:
        for name, (low, high), least, most in (
            ("snr", self.snr, 0.0, math.inf),
            ("masses", self.masses, 8.0, 500.0),
            ("merger", self.merger, 0.0, SECONDS),
        ):
            if not least < low <= high < most:
                raise ConfigError(
                    f"{name}={low:g}:{high:g}: a range low:high is wanted, above {least:g} and below {most:g}"
                )
        if not 0 <= self.spin < 0.99:
            raise ConfigError(f"spin={self.spin:g}: from 0 to below 0.99")
        if self.approximant not in APPROXIMANTS:
            raise ConfigError(
                f"approximant={self.approximant!r}{did_you_mean(self.approximant, APPROXIMANTS)} (known: {', '.join(APPROXIMANTS)})"
            )


@dataclass(frozen=True)
class Strain:
    """One sample. data: (3, samples), whitened, float64. signal: 1 if there is one. facts: its parameters, if any.

    clean: (3, GRID * RATE), the whitened signal alone on the whole segment; noisy: the same with noise.
    """

    data: Array
    signal: int
    facts: dict[str, float] = field(default_factory=dict)
    clean: Array | None = None
    noisy: Array | None = None


FACTS = (
    "mass1",
    "mass2",
    "spin1",
    "spin2",
    "inclination",
    "polarization",
    "phase",
    "ra",
    "dec",
    "gps",
    "snr",
    "merger",
    "distance_mpc",
)
"""Parameters of a signal: solar masses, radians, seconds (gps; merger: since the sample's start)."""


@cache
def _lal() -> tuple[Any, Any]:
    try:
        import lal
        import lalsimulation
    except ImportError as error:
        raise MissingExtra(
            "simulated gravitational waves need lalsuite: pip install 'deltaw[gw]' (or, alone: pip install --no-deps lalsuite==7.26.16)"
        ) from error
    return lal, lalsimulation


@cache
def whitener() -> Array:
    """(3, frequencies): what a Fourier coefficient of the strain is multiplied by, so that the noise gets variance 1.

    A continuous-time spectrum of noise has |n(f)|^2 = S T / 2 on average, a discrete one of white noise N. Zero outside
    the band: filtered noise has the variance (500 - 20) / 1024, a standard deviation of .685.
    """
    _, sim = _lal()
    frequencies = np.arange(GRID * RATE // 2 + 1) / GRID
    inside = (frequencies >= BAND[0]) & (frequencies <= BAND[1])
    rows = []
    for name in DETECTORS:
        spectrum = getattr(sim, SPECTRA[name])
        density = np.array([spectrum(float(f)) if ok else 1.0 for f, ok in zip(frequencies, inside)])
        rows.append(np.where(inside, 1.0 / np.sqrt(density / RATE / 2), 0.0))
    return np.stack(rows)


def sample(seed: int, split: str, index: int, sky: Sky, *, segment: bool = False) -> Strain:
    """Sample `index` of `split`: a signal in noise if the index is odd, noise alone if it is even.

    segment: also return the whole segment, with and without noise.
    """
    random = generator("gw", seed, split, index)
    count = GRID * RATE
    inside = whitener() > 0  # (3, frequencies)
    white = np.fft.rfft(random.standard_normal((len(DETECTORS), count))) * inside
    facts: dict[str, float] = {}
    merger = float(random.uniform(*sky.merger))
    signal = np.zeros_like(white)
    if index % 2 == 1:
        signal, facts = _signal(random, sky)
        facts["merger"] = merger
    first = round((MERGER - merger) * RATE)
    noisy = np.fft.irfft(white + signal, n=count)
    data = noisy[:, first : first + round(SECONDS * RATE)]
    clean = np.fft.irfft(signal, n=count) if segment else None
    return Strain(data, index % 2, facts, clean, noisy if segment else None)


def _signal(random: np.random.Generator, sky: Sky) -> tuple[Array, dict[str, float]]:
    """(3, frequencies): a whitened signal, scaled to its signal-to-noise ratio; and its parameters."""
    lal, _ = _lal()
    low, high = sky.masses
    drawn = random.uniform(low, high, 2)
    facts = {
        "mass1": float(drawn.max()),
        "mass2": float(drawn.min()),
        "spin1": float(random.uniform(-sky.spin, sky.spin)),
        "spin2": float(random.uniform(-sky.spin, sky.spin)),
        "inclination": float(np.arccos(random.uniform(-1, 1))),
        "polarization": float(random.uniform(0, np.pi)),
        "phase": float(random.uniform(0, 2 * np.pi)),
        "ra": float(random.uniform(0, 2 * np.pi)),
        "dec": float(np.arcsin(random.uniform(-1, 1))),
        "gps": float(random.uniform(1.1e9, 1.4e9)),
        "snr": float(random.uniform(*sky.snr)),
    }
    megaparsecs = 1000.0
    plus, cross, epoch = _waveform(facts, sky.approximant, megaparsecs)
    time = lal.LIGOTimeGPS(facts["gps"])
    sidereal = lal.GreenwichMeanSiderealTime(time)
    frequencies = np.arange(GRID * RATE // 2 + 1) / GRID
    rows = []
    for factors, cached in zip(whitener(), DETECTORS.values()):
        detector = lal.CachedDetectors[getattr(lal, cached)]
        f_plus, f_cross = lal.ComputeDetAMResponse(
            detector.response, facts["ra"], facts["dec"], facts["polarization"], sidereal
        )
        delay = lal.TimeDelayFromEarthCenter(detector.location, facts["ra"], facts["dec"], time) + epoch
        strain = np.fft.rfft(f_plus * plus + f_cross * cross) / RATE
        rows.append(factors * strain * np.exp(-2j * np.pi * frequencies * delay))
    whitened = np.stack(rows)
    loudness = math.sqrt(float((np.abs(whitened) ** 2).sum()) * 2 / (GRID * RATE))
    facts["distance_mpc"] = megaparsecs * loudness / facts["snr"]
    return whitened * (facts["snr"] / loudness), facts


def _waveform(facts: dict[str, float], approximant: str, megaparsecs: float) -> tuple[Array, Array, float]:
    """Both polarisations on the segment, merging at MERGER up to a rest of less than a sample, which comes third."""
    lal, sim = _lal()
    spins = (0.0, 0.0, facts["spin1"], 0.0, 0.0, facts["spin2"])
    plus, cross = sim.SimInspiralChooseTDWaveform(
        facts["mass1"] * lal.MSUN_SI,
        facts["mass2"] * lal.MSUN_SI,
        *spins,
        megaparsecs * 1e6 * lal.PC_SI,
        facts["inclination"],
        facts["phase"],
        0.0,
        0.0,
        0.0,
        1.0 / RATE,
        BAND[0],
        BAND[0],
        None,
        getattr(sim, approximant),
    )
    start = MERGER + float(plus.epoch)  # epoch: the first sample's time, counted from the merger
    first = math.floor(start * RATE)
    found = []
    for series in (plus, cross):
        values = np.array(series.data.data)
        if first < 0:
            values = values[-first:]
            ramp = np.arange(round(TAPER * RATE)) / round(TAPER * RATE)
            values[: len(ramp)] *= np.sin(np.pi / 2 * ramp) ** 2
        values = values[: GRID * RATE - max(first, 0)]
        whole = np.zeros(GRID * RATE)
        whole[max(first, 0) : max(first, 0) + len(values)] = values
        found.append(whole)
    return found[0], found[1], start - first / RATE
