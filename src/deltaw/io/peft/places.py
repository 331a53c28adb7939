"""Where in a model the tensors of a PEFT file belong, and the form in which PEFT keeps them there.

PEFT's tensor names carry the layer family: `.lora_A.weight` (Linear, GPT-2's Conv1D, convolutions), `.lora_embedding_A`
(Embedding), both `.lora_A.weight` (older: `.lora_A`) and `.base_layer.out_proj.lora_A.weight` (nn.MultiheadAttention's
in_proj and out_proj), and for raw parameters `.lora_A.weight` on the module that owns them, one `.base_layer` deeper for each one registered later;
layers inside that module lie as many `.base_layer` deeper as it has adapted parameters.
deltaw's factors are always A (rank, in) and B (out, rank) of the (out, in) matrix; a convolution's matrix is
(out, in · kernel); stacks of E expert weights have A (E, rank, in) and B (E, out, rank), which PEFT lays side by side,
A by expert first, B by rank first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaw.core.adapter import Change, join_key, split_key
from deltaw.core.variant import Variant
from deltaw.errors import AdapterError
from deltaw.io.peft.claims import Claims
from deltaw.io.peft.grammar import Shapes

IN_PROJ = "in_proj_weight"
INSIDE = ".base_layer"
WRAPPER = re.compile(r"(?P<path>.*?)(?:\.base_layer)*\.lora_A\.weight")
WRAPPED = re.compile(r"(?P<path>.*?)(?P<levels>(?:\.base_layer)+)(?P<inner>\.[^.]+\..+)")
FAMILIES = {"embedding": "embedding", "mha": "multihead_attention", "parameter": "module"}
"""The layer family that a style tells of. A raw parameter's matrix is as the module stores it."""
REGISTERED = ("gate_proj", "gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
"""Expert weights in the order in which all of transformers' models register them."""


@dataclass(frozen=True)
class Place:
    """One adapted weight in a PEFT file. `path` and `site` name the base parameter; `style` is how its tensors are kept."""

    path: str
    style: str = "linear"
    site: str = "weight"
    written: str = ""
    """The path in the file, where it is not `path`."""
    shape: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """The base parameter's name."""
        return join_key(self.path, self.site)

    @property
    def bias_key(self) -> str:
        """The name of the bias beside it."""
        return join_key(self.path, "in_proj_bias" if self.style == "mha" else "bias")

    @property
    def inside_attention(self) -> bool:
        """True for the out_proj of an nn.MultiheadAttention.

        PEFT (up to 0.21.2) merges its change twice before each forward: what was trained there is W + 2ΔW. So B is
        doubled when read and halved when written, both exact.
        """
        return self.style == "linear" and self.written.endswith(f"{INSIDE}.out_proj")

    @property
    def target(self) -> str:
        """The name by which PEFT's config calls it: the module, or the parameter."""
        if self.style == "parameter":
            return self.key
        return self.path.removesuffix(".out_proj") if INSIDE in self.written else self.path

    def read(self, variant: Variant, parts: Mapping[str, Tensor]) -> Change:
        """The file's tensors -> a change in matrix form.

        Raises:
            AdapterError: shapes that are not those of one layer.
        """
        A, B = parts["A"], parts["B"]
        if not all(t.is_floating_point() for t in parts.values()):
            raise AdapterError(f"{self.key!r}: an adapter's tensors are real numbers, found {A.dtype} and {B.dtype}")
        layer, shape = FAMILIES.get(self.style), self.shape
        if self.style == "linear" and A.ndim > 2:
            layer, shape, A, B = self._convolution(A, B)
        elif self.style == "parameter":
            A, B = self._experts(variant, A, B)
        if self.inside_attention:
            B = 2 * B
        if A.ndim not in (2, 3) or A.ndim != B.ndim or A.shape[-2] != B.shape[-1]:
            raise AdapterError(
                f"{self.key!r}: A {tuple(parts['A'].shape)} and B {tuple(parts['B'].shape)} do not fit together"
            )
        found = {"A": A.contiguous(), "B": B.contiguous()}
        if "m" in parts:
            m = parts["m"]
            if m.numel() != B.shape[0] or math.prod(m.shape) != max(m.shape, default=0):
                raise AdapterError(
                    f"{self.key!r}: the magnitude vector has shape {tuple(m.shape)}, not ({B.shape[0]},)"
                )
            found["m"] = m.reshape(-1).contiguous()
        change = Change(variant, found, layer, shape)
        _ = change.matrix_shape
        return change

    def _convolution(self, A: Tensor, B: Tensor) -> tuple[str, tuple[int, ...], Tensor, Tensor]:
        """(rank, in, *kernel) and (out, rank, 1 ...) -> factors of the (out, in · kernel) matrix."""
        if A.ndim > 5 or B.ndim != A.ndim or any(n != 1 for n in B.shape[2:]):
            raise AdapterError(f"{self.key!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are no convolution's factors")
        if B.shape[1] != A.shape[0]:
            raise AdapterError(
                f"{self.key!r}: a grouped convolution's factors, A {tuple(A.shape)} and B {tuple(B.shape)}. PEFT's A "
                f"reaches across the groups, so that its change is no change of the grouped weight: train it again here"
            )
        shape = (B.shape[0], *A.shape[1:])
        return f"conv{A.ndim - 2}d", shape, A.reshape(A.shape[0], -1), B.reshape(B.shape[0], A.shape[0])

    def _experts(self, variant: Variant, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(E·rank, in) and (out, rank·E) -> (E, rank, in) and (E, out, rank), or as they are for a plain matrix."""
        rank = int(variant.rank)  # type: ignore[attr-defined]
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
            raise AdapterError(f"{self.key!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are no stack of rank {rank}")
        count = A.shape[0] // rank
        if count == 1 and (self.shape is None or len(self.shape) == 2):
            return A, B
        return A.reshape(count, rank, -1), B.reshape(B.shape[0], rank, count).permute(2, 0, 1)

    def cannot(self, change: Change) -> str | None:
        """Why PEFT's grammar has no words for this change here, or None."""
        if self.style == "conv":
            if change.shape is None:
                return "a convolution's kernel shape is not known"
            if tuple(change.matrix_shape) != (change.shape[0], math.prod(change.shape[1:])):
                return "the matrix is not the kernel's"
        if self.style in ("mha", "parameter") and "m" in change.tensors:
            return "PEFT has no DoRA here"
        if self.style == "parameter" and getattr(change.variant, "dropout", None):
            return "PEFT has no dropout for raw parameters"
        if self.style != "parameter" and change.tensors["A"].ndim != 2:
            return "PEFT keeps stacks of weights for raw parameters only"
        if self.style == "none":
            return f"PEFT has no LoRA for {self.site!r} of a {change.layer} layer"
        if change.tied:
            return f"it is one parameter with {change.tied[0]!r}, and PEFT would change one of the two"
        return None

    def write(self, change: Change) -> dict[str, Tensor]:
        """A change -> the tensors of the file, without PEFT's prefix."""
        A, B = change.tensors["A"], change.tensors["B"]
        m = change.tensors.get("m")
        path = self.written or self.path
        if self.inside_attention:
            B = B / 2
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        if self.style == "embedding":
            a, b = f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
        elif self.style == "conv":
            assert change.shape is not None
            ones = (1,) * (len(change.shape) - 2)
            A, B = A.reshape(A.shape[0], *change.shape[1:]), B.reshape(*B.shape, *ones)
            m = None if m is None else m.reshape(1, -1, *ones)
        elif A.ndim == 3:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        found = {a: A, b: B}
        if m is not None:
            found[f"{path}.lora_magnitude_vector"] = m
        return found


def without_wrappers(tensors: Mapping[str, Tensor], claims: Claims, shapes: Shapes) -> dict[str, Tensor]:
    """`tensors`, those of layers inside a module whose raw parameters are adapted under the layers' own names.

    PEFT wraps such a module once for each of these parameters, and the paths of its layers say so.

    Raises:
        AdapterError: two tensors become one.
    """
    if not claims.parameters:
        return dict(tensors)
    paths = {found["path"] for found in map(WRAPPER.fullmatch, tensors) if found}
    levels = {path: INSIDE * len(targeted(path, claims, shapes)) for path in paths}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        inner = WRAPPED.fullmatch(key)
        wrapped = inner is not None and levels.get(inner["path"]) == inner["levels"]
        own = inner["path"] + inner["inner"] if inner is not None and wrapped else key
        if own in found:
            raise AdapterError(f"two tensors of the file mean {own!r}")
        found[own] = tensor
    return found


def cannot_wrap(places: Mapping[str, Place], changed: Iterable[str]) -> str | None:
    """Why PEFT would lose changes inside a module whose raw parameters are adapted, or None."""
    raw = {place.path + ".": key for key, place in places.items() if place.style == "parameter"}
    inside = next((k for k in changed if split_key(k)[0].startswith(tuple(raw))), None)
    if inside is None:
        return None
    around = next(key for path, key in raw.items() if inside.startswith(path))
    return f"it wraps the module of {around!r}, and would not find {inside!r} in it by that name"


def read_places(raw: Iterable[tuple[str, str]], claims: Claims, shapes: Shapes) -> dict[tuple[str, str], Place]:
    """(path in the file, style) -> place.

    Raises:
        AdapterError: a path that none of PEFT's ways of wrapping explains.
    """
    raw = list(raw)
    found = {}
    for written, style in raw:
        path = written.replace(INSIDE, "")
        attention = style == "mha" or (f"{written}{INSIDE}.out_proj", "linear") in raw
        key = join_key(path, IN_PROJ if attention else "weight")
        if style == "linear" and (names := targeted(path, claims, shapes)):
            site = nth(written, names, [w for w, s in raw if s == style and w.replace(INSIDE, "") == path])
            found[written, style] = Place(path, "parameter", site, written, (shapes or {}).get(join_key(path, site)))
        elif path == written:
            shape = None if shapes is None else shapes.get(key)
            found[written, style] = Place(path, "mha" if attention else style, split_key(key)[1], "", shape)
        elif style == "linear" and written.endswith(f"{INSIDE}.out_proj") and written.count(INSIDE) == 1:
            found[written, style] = Place(path, "linear", "weight", written)
        else:
            raise AdapterError(f"{written!r} is a path that nothing in the config explains")
    return found


def targeted(path: str, claims: Claims, shapes: Shapes) -> list[str]:
    """The raw parameters of the module at `path` that the config targets, in the order in which the model registers them.

    Where nothing is known of the module, names must tell the order: the config's own is arbitrary (PEFT keeps a set).

    Raises:
        AdapterError: they do not.
    """

    if not claims.parameters or claims.targets(path):
        return []
    known = [split_key(k)[1] for k in shapes or () if split_key(k)[0] == path and claims.names(k)]
    if known:
        return known
    names = {s for s in (split_key(n)[1] for n in claims.parameters) if claims.names(join_key(path, s))}
    if len(names) > 1 and not names <= set(REGISTERED):
        raise AdapterError(
            f"{path!r}: the config targets {', '.join(sorted(names))} there; which tensor is which only the model can "
            f"tell: load it onto the model (dw.load) and save it from there"
        )
    return registered(names)


def registered(keys: Iterable[str]) -> list[str]:
    """`keys` with expert weights last, in the order in which models register them."""
    sites = {key: split_key(key)[1] for key in keys}
    return sorted(sites, key=lambda k: REGISTERED.index(sites[k]) + 1 if sites[k] in REGISTERED else 0)


def nth(written: str, names: list[str], levels: list[str]) -> str:
    """Which of a module's parameters a path means: the last registered lies outermost.

    Raises:
        AdapterError: the file has more or fewer than the config targets.
    """
    if len(names) != len(levels):
        raise AdapterError(
            f"{written!r}: the config targets {', '.join(names)} there, the file has {len(levels)}; "
            f"which is which only the model can tell: load it onto the model"
        )
    return names[len(names) - 1 - written.count(INSIDE)]


def family(key: str, change: Change) -> str:
    """The layer family of a changed weight, from its parameter's name where a file does not say it."""
    site = split_key(key)[1]
    return change.layer or {"weight": "linear", IN_PROJ: "multihead_attention"}.get(site, "module")


def place_of(key: str, change: Change, among: Iterable[str] = ()) -> Place:
    """The place of a change, from its parameter's name and its layer's family.

    among: all changed raw parameters, in the order in which the model registers them.
    """
    path, site = split_key(key)
    layer = family(key, change)
    if layer == "module" and path and "[" not in site:
        mine = [k for k in among if split_key(k)[0] == path]
        depth = len(mine) - 1 - mine.index(key) if key in mine else 0
        return Place(path, "parameter", site, path + INSIDE * depth, change.shape)
    if layer == "multihead_attention" and site == IN_PROJ:
        return Place(path, "mha", site)
    outer, _, name = path.rpartition(".")
    if layer == "multihead_attention" and name == "out_proj":
        return Place(path, "linear", site, f"{outer}{INSIDE}.out_proj")
    if site != "weight":
        return Place(path, "none", site)
    if layer in ("conv1d", "conv2d", "conv3d"):
        return Place(path, "conv")
    if layer == "embedding":
        return Place(path, "embedding")
    return Place(path, "linear" if layer in ("linear", "linear (own forward)", "conv1d_gpt2") else "none")
