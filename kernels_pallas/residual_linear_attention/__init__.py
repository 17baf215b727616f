"""Residual linear attention: the part of causal attention that a sliding window leaves out."""

from kernels_pallas.residual_linear_attention.api import (
    implementation_for,
    residual_linear_attention,
    residual_linear_state,
)
from kernels_pallas.residual_linear_attention.naming import CHECKPOINT_NAME

__all__ = ["CHECKPOINT_NAME", "implementation_for", "residual_linear_attention", "residual_linear_state"]
