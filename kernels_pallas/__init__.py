"""Kernels that rattn exists for; everything else is bought."""
