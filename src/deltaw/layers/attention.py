"""nn.MultiheadAttention: it runs with W + ΔW, because its function takes weights, not layers.

Sites are `in_proj_weight` (q, k and v in one; adapt chosen ones as parts, "attn.in_proj_weight[0:64]") or, where kdim or
vdim differ, `q_proj_weight`, `k_proj_weight`, `v_proj_weight`. `out_proj` is a layer of its own that attention reads
without calling it: a target that names the attention means it too, and attention passes its changed weight on. The
library's fast path is kept, it gets the changed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.core.host import Example, Host
from deltaw.core.registry import host
from deltaw.core.twin import shell
from deltaw.layers.linear import LinearHost
from deltaw.layers.weight import WeightHost

PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@host
class MultiheadAttentionHost(WeightHost, nn.MultiheadAttention):
    """An adapted nn.MultiheadAttention."""

    family: ClassVar[str] = "multihead_attention"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    watches: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    children_too: ClassVar[tuple[str, ...]] = ("out_proj",)

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.MultiheadAttention)

    @classmethod
    def sites(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        weights = {s: layer._parameters.get(s) for s in ("in_proj_weight", *PROJECTIONS)}
        return {s: tuple(w.shape) for s, w in weights.items() if w is not None}

    @classmethod
    def biases(cls, layer: nn.Module) -> tuple[str, ...]:
        return () if layer._parameters.get("in_proj_bias") is None else ("in_proj_bias",)

    def bias_of(self, site: str) -> tuple[str, slice | None] | None:
        if self._parameters.get("in_proj_bias") is None or site not in ("in_proj_weight", *PROJECTIONS):
            return None
        if site == "in_proj_weight":
            return "in_proj_bias", None
        start = PROJECTIONS.index(site) * self.embed_dim
        return "in_proj_bias", slice(start, start + self.embed_dim)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        # Batch-first ones are left to the unit tests: there torch chooses kernels by `requires_grad`, so bits may differ.
        def selves(*shape: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
            return lambda dtype: (torch.randn(*shape, dtype=dtype),) * 3

        def three(dtype: torch.dtype) -> tuple[Tensor, ...]:
            return (
                torch.randn(4, 2, 6, dtype=dtype),
                torch.randn(5, 2, 4, dtype=dtype),
                torch.randn(5, 2, 7, dtype=dtype),
            )

        causal = {"attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1), "need_weights": False, "is_causal": True}
        padding = {"key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True]])}
        by_head = {"average_attn_weights": False}
        yield Example("fused", lambda: nn.MultiheadAttention(6, 3), selves(4, 2, 6))
        yield Example("unbatched", lambda: nn.MultiheadAttention(6, 2, bias=False), selves(4, 6))
        yield Example("causal", lambda: nn.MultiheadAttention(6, 3), selves(4, 2, 6), causal)
        yield Example("padding", lambda: nn.MultiheadAttention(6, 3), selves(4, 2, 6), padding)
        yield Example("kdim and vdim", lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=7), three, by_head)
        yield Example(
            "bias_k and zeros",
            lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True),
            selves(4, 2, 6),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sites, out = self.active_sites(), self._modules["out_proj"]
        inner = out.active_sites() if isinstance(out, Host) else set()
        if not sites and not inner:
            return self.base_class.forward(self, *args, **kwargs)
        twin = self.twin(sites)
        if isinstance(out, Host) and inner:
            changed: dict[str, Tensor | None] = {s: out.changed(s, dropout=self.training) for s in inner}
            twin.__dict__["_modules"] = {**self._modules, "out_proj": shell(out, out.base_class, changed)}
        return self.base_class.forward(twin, *args, **kwargs)


@host
class OutProjectionHost(LinearHost):
    """The output projection of nn.MultiheadAttention, which is read and not called."""

    family: ClassVar[str] = "multihead_attention.out_proj"
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.modules.linear.NonDynamicallyQuantizableLinear,)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        return ()

    def listed_as(self) -> str:
        return MultiheadAttentionHost.family
