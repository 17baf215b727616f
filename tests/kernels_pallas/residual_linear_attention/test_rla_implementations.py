"""Every implementation against the quadratic float32 reference: values, and each gradient apart."""

import numpy as np
import pytest
import rla_suite as suite
from rla_suite import IMPLEMENTATIONS

CASE_NAMES = tuple(suite.cases(chunk=8, H=4))

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_matches_reference(implementation, name):
    case = suite.cases(implementation.chunk, implementation.H)[name]
    ids = suite.document_rows(case, implementation.chunk)
    arrays = suite.random_arrays(case, batch=len(ids))
    # A cotangent on one result at a time, so that neither path hides behind the other.
    for zero in ("d_o", "d_state"):
        one_sided = arrays | {zero: np.zeros_like(arrays[zero])}
        suite.assert_close(suite.run(implementation, case, one_sided, ids), suite.run_reference(case, one_sided, ids))
