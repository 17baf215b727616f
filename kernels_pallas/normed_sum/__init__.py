"""RATTENTION's merge: the sum of two RMSNorms, each with its own scale."""

from kernels_pallas.normed_sum.api import implementation_for, normed_sum

__all__ = ["implementation_for", "normed_sum"]
