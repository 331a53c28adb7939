"""Tensor mathematics, torch only: each fast operation beside its plain twin."""

from deltaw.ops.linear import adapted_linear, adapted_linear_reference

__all__ = ["adapted_linear", "adapted_linear_reference"]
