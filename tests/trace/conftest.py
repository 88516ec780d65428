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


@pytest.fixture(scope="session")
def traced(tmp_path_factory, run_ranks):
    """``traced(name, n, *arguments)``: the trace of `spimpi verify` on n ranks, made once."""
    folder, made = tmp_path_factory.mktemp("traced"), {}

    def trace(name, n, *arguments):
        path = folder / f"{name}.h5"
        if name not in made:
            made[name] = n, arguments
            done = run_ranks(n, "spimpi", "verify", "--tokens", 4, *arguments, "--trace", path)
            assert path.exists(), done.stdout + done.stderr
        assert made[name] == (n, arguments)
        return path

    return trace


@pytest.fixture(autouse=True)
def faults_show(monkeypatch):
    """A fault of spimpi's own is not to pass for a damaged file here."""
    monkeypatch.setenv("SPIMPI_DEBUG", "1")
