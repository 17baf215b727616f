import pytest

from kernels_pallas.residual_linear_attention import chunked, tuning
from tests.kernels_pallas.residual_linear_attention.rla_suite import CHUNK


@pytest.fixture(autouse=True)
def small_chunk(monkeypatch):
    """Several chunks in a short sequence."""
    monkeypatch.setattr(chunked, "MIN_CHUNK", CHUNK)
    monkeypatch.setattr(tuning, "TPU_CHUNK", CHUNK)
    monkeypatch.setattr(tuning, "TPU_CHUNKS", 2)
