#!/usr/bin/env bash
# Reproduce the paper's claim in the Shapes world, and write a report (docs/reproduction.md is one). Run it again to go on.
#   scripts/reproduce.sh --quick       about 40 CPU minutes, frame-wise, one seed
#   scripts/reproduce.sh               everything, three seeds; --plan says first how long it takes here
set -euo pipefail
cd "$(dirname "$0")/.."
# Threads that wait actively, each on a core of its own: 20 times faster than the default on shared machines.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-ACTIVE}"
export OMP_PROC_BIND="${OMP_PROC_BIND:-true}"
exec python scripts/reproduce.py "$@"
