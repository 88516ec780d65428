#!/usr/bin/env bash
# A node check in the manner of a Slurm prolog: every core of this node verifies the embedded model.
# As Prolog= in slurm.conf a non-zero exit status drains the node; by hand it is just run.
# SPIMPI: the folder of the environment that spimpi is installed in, the same on every node.
#
# Exit status: 0 verified; 1 corruption found, and its verdict printed; 2 it could not be checked;
# 3 it did not come to a verdict. mpirun's own failures have status 1 too, so the words decide.
set -uo pipefail

# A prolog has no PATH, no HOME and no Slurm step of its own.
SPIMPI=${SPIMPI:-/opt/spimpi/.venv}
export PATH=$SPIMPI/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# nproc heeds what is meant for threads of programs: every core counts here.
RANKS=${RANKS:-$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)}
in_prolog=${SLURM_JOB_ID:+yes}
unset "${!SLURM_@}"
if [ -z "${HOME:-}" ]; then
    HOME=$(getent passwd "$(id -u)" | cut -d: -f6)
    export HOME=${HOME:-/}
fi

# Compiled kernels are code. Those that root loads lie where root alone writes.
if [ "$(id -u)" -eq 0 ]; then
    export SPIMPI_CACHE_DIR=${SPIMPI_CACHE_DIR:-/var/cache/spimpi}
fi

# As many ranks as asked for, whatever a host file says of slots; 4.x and 5.x read different names.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none

said=$(mpirun -n "$RANKS" spimpi verify --no-trace --expect-ranks "$RANKS" 2>&1 < /dev/null)
status=$?
printf '%s\n' "$said"

# In a prolog nobody reads that: the system's log keeps the verdict, or the last words.
# A site's settings may have mpirun begin each line with the time or a rank: "[1,0]<stdout>:".
tagged='^([^<>]*<std(out|err)>: ?)?'
verdict=$(sed -nE "s/$tagged((verdict +[A-Z]+|spimpi: corrupted):.*)/\\3/p" <<< "$said" | tail -n 1)
if [ -n "$in_prolog" ] && command -v logger > /dev/null; then
    logger -t spimpi -- "${verdict:-no verdict, status $status: $(tail -n 3 <<< "$said")}"
fi

case "$status $verdict" in
    "0 verdict"*VERIFIED:*) exit 0 ;;
    *"verdict"*CORRUPTED:* | "1 spimpi: corrupted:"*) exit 1 ;;
    "0 "* | "3 "*) exit 3 ;;
    *) exit 2 ;;
esac
