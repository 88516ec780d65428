"""Fixtures of the trace's tests."""

import pytest
from trace_samples import skip_without_mpio


@pytest.fixture(params=["parts", "mpio", "gather"])
def driver(request):
    if request.param == "mpio":
        skip_without_mpio()
    return request.param


@pytest.fixture
def one():
    """A communicator of this process alone."""
    from mpi4py import MPI

    return MPI.COMM_SELF
