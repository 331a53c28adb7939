"""Where in a model the tensors of a PEFT file belong, and the form in which PEFT keeps them there.

PEFT's tensor names carry the layer family: `.lora_A.weight` (Linear, GPT-2's Conv1D, convolutions), `.lora_embedding_A`
(Embedding), a bare `.lora_A` (nn.MultiheadAttention's fused in_proj). deltaw's factors are always A (rank, in) and
B (out, rank) of the (out, in) matrix; a convolution's matrix is (out, in·kernel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaw.core.adapter import Change, join_key, split_key
from deltaw.core.variant import Variant
from deltaw.errors import AdapterError

EMBEDDING = ("embedding",)
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
IN_PROJ = "in_proj_weight"


@dataclass(frozen=True)
class Place:
    """One adapted weight in a PEFT file. `path` is the module as PEFT names it; `style` how its tensors are kept."""

    path: str
    style: str = "linear"
    site: str = "weight"
    nested: str = ""
    """What PEFT's wrapping puts into the path of a nested layer (`mha.base_layer.out_proj`)."""

    @property
    def key(self) -> str:
        """The base parameter's name."""
        return join_key(self.path, self.site)

    @property
    def bias_key(self) -> str:
        """The name of the bias beside it."""
        return join_key(self.path, "bias")

    def read(self, variant: Variant, parts: Mapping[str, Tensor]) -> Change:
        """The file's tensors -> a change in matrix form.

        Raises:
            AdapterError: shapes that are not those of one layer.
        """
        A, B = parts["A"], parts["B"]
        if not all(t.is_floating_point() for t in parts.values()):
            raise AdapterError(f"{self.path!r}: an adapter's tensors are real numbers, found {A.dtype} and {B.dtype}")
        rank = A.shape[0]
        layer: str | None = None
        shape: tuple[int, ...] | None = None
        if self.style == "linear" and A.ndim > 2:
            if A.ndim > 5 or B.ndim != A.ndim or any(n != 1 for n in B.shape[2:]) or B.shape[1] != rank:
                raise AdapterError(
                    f"{self.path!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are no convolution's factors"
                    + ("; a grouped convolution's cannot be used: see the docs on formats" if B.ndim == A.ndim else "")
                )
            layer = f"conv{A.ndim - 2}d"
            shape = (B.shape[0], *A.shape[1:])
            A, B = A.reshape(rank, -1), B.reshape(B.shape[0], rank)
        elif self.style == "embedding":
            layer = "embedding"
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"{self.path!r}: A {tuple(parts['A'].shape)} and B {tuple(parts['B'].shape)} do not fit together"
            )
        found = {"A": A.contiguous(), "B": B.contiguous()}
        if "m" in parts:
            m = parts["m"]
            if m.numel() != B.shape[0] or math.prod(m.shape) != max(m.shape, default=0):
                raise AdapterError(
                    f"{self.path!r}: the magnitude vector has shape {tuple(m.shape)}, not ({B.shape[0]},)"
                )
            found["m"] = m.reshape(-1).contiguous()
        change = Change(variant, found, layer, shape)
        _ = change.matrix_shape
        return change

    def cannot(self, change: Change) -> str | None:
        """Why PEFT's grammar has no words for this change here, or None."""
        if self.style == "conv" and change.shape is None:
            return "a convolution's kernel shape is not known"
        if self.style == "conv" and change.shape is not None:
            out, columns = change.matrix_shape
            if (out, columns) != (change.shape[0], math.prod(change.shape[1:])):
                return "the matrix is not the kernel's"
        if self.style == "mha" and "m" in change.tensors:
            return "PEFT has no DoRA on nn.MultiheadAttention"
        if self.style == "none":
            return f"PEFT has no LoRA for a {change.layer} layer's {self.site!r}"
        return None

    def write(self, change: Change) -> dict[str, Tensor]:
        """A change -> the tensors of the file, without PEFT's prefix."""
        A, B = change.tensors["A"], change.tensors["B"]
        m = change.tensors.get("m")
        path = self.nested or self.path
        if self.style == "embedding":
            found = {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B}
        elif self.style == "mha":
            found = {f"{path}.lora_A": A, f"{path}.lora_B": B}
        elif self.style == "conv":
            assert change.shape is not None
            ones = (1,) * (len(change.shape) - 2)
            found = {
                f"{path}.lora_A.weight": A.reshape(A.shape[0], *change.shape[1:]),
                f"{path}.lora_B.weight": B.reshape(*B.shape, *ones),
            }
            m = None if m is None else m.reshape(1, -1, *ones)
        else:
            found = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        if m is not None:
            found[f"{path}.lora_magnitude_vector"] = m
        return found


def read_place(path: str, part: str) -> Place:
    """The place that a tensor name means, from the module path in it and the part's suffix."""
    outer, inner, rest = path.partition(".base_layer.")
    if inner and rest == "out_proj" and outer:
        return Place(f"{outer}.out_proj", "linear", "weight", path)
    if part in (".lora_A", ".lora_B"):
        return Place(path, "mha", IN_PROJ)
    if "embedding" in part:
        return Place(path, "embedding")
    return Place(path)


def place_of(key: str, change: Change) -> Place:
    """The place of a change, from its parameter's name and its layer's family."""
    path, site = split_key(key)
    layer = change.layer
    if layer in CONVOLUTIONS:
        return Place(path, "conv", site)
    if layer in EMBEDDING:
        return Place(path, "embedding", site)
    if site == IN_PROJ:
        return Place(path, "mha", site)
    outer, _, name = path.rpartition(".")
    if name == "out_proj" and layer == "multihead_attention":
        return Place(path, "linear", site, f"{outer}.base_layer.out_proj")
    if site != "weight" or layer not in (None, "linear", "linear (own forward)", "conv1d_gpt2"):
        return Place(path, "none", site)
    return Place(path, "linear", site)
