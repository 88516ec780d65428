#!/usr/bin/env bash
# A node check in the manner of a Slurm prolog: every core of this node verifies the embedded model.
# As Prolog= in slurm.conf a non-zero exit status drains the node; by hand it is just run.
# SPIMPI: the folder of the environment that spimpi is installed in, the same on every node.
set -euo pipefail

SPIMPI=${SPIMPI:-/opt/spimpi/.venv}
RANKS=${RANKS:-$(nproc)}

# A prolog has no PATH, no HOME and no Slurm step of its own.
export PATH=$SPIMPI/bin:/usr/bin:/bin
export SPIMPI_CACHE_DIR=${SPIMPI_CACHE_DIR:-/var/tmp/spimpi}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
unset "${!SLURM_@}"

exec mpirun -n "$RANKS" spimpi verify --no-trace --expect-ranks "$RANKS"
