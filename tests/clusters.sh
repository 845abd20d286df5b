#!/usr/bin/env bash
# Clusters that really run, on this one machine: ssh, pdsh, SLURM and Ray between network namespaces (tests/clusters).
# Needs root and apt (Debian, Ubuntu), a .venv with the test tools, a quarter of an hour and 4 GB.
#
#   bash tests/clusters.sh [words for pytest: -k hostfile]
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
if [ "$(id -u)" -ne 0 ]; then
    echo "tests/clusters.sh: network namespaces need root" >&2
    exit 2
fi
missing=()
for part in sshd:openssh-server ssh:openssh-client pdsh:pdsh sbatch:slurm-wlm munged:munge ip:iproute2; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${part%%:*}" > /dev/null || missing+=("${part##*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
    # A machine of its own may start what a package brings; what these tests start is theirs alone, and ended by them.
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD"
exec .venv/bin/python -m pytest -m slow -v --durations=0 -p no:warnings \
    tests/clusters tests/distributed/test_nodes.py "$@"
