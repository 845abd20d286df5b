#!/usr/bin/env bash
# The one command. Finds a Python; pipeline/setup/bootstrap.py makes .venv once and then starts the stage asked for.
# The working directory stays the caller's, so relative paths in the arguments mean what they say.
set -euo pipefail
root="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
probe='import sys; print(sys.executable if sys.version_info >= (3, 11) else "")'
for candidate in "${LORADROP_PYTHON:-python3}" python3.13 python3.12 python3.11 python3; do
    python="$("$candidate" -c "$probe" 2>/dev/null || true)"
    [ -z "$python" ] || exec "$python" -I "$root/pipeline/setup/bootstrap.py" "$@"
done
echo "loradrop: no Python >= 3.11 found. Install one (Debian, Ubuntu: apt install python3 python3-venv)," \
     "or name it: LORADROP_PYTHON=/path/to/python3 bash launch.sh" >&2
exit 2
