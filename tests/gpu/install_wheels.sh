#!/usr/bin/env bash
# Installs what tests/gpu/pack_wheels.py has packed: bash PART/install.sh TARGET for every part, in any order, at once or
# in several calls. Nothing is fetched. The last part joins wheels that were cut, checks all of them and installs them into
# an environment of its own, the folder TARGET, which also sees all that the given Python has: torch, above all. It is no
# PYTHONPATH, which processes that are started with python -I or with one of their own would not see.
# PYTHON names another Python than python3.
set -euo pipefail
part="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
target="$(readlink -f -- "${1:?usage: bash PART/install.sh TARGET}")"
store="$target.wheels"
mkdir -p "$store"
cp -- "$part"/*.whl* "$part/SHA256SUMS" "$store"
cd "$store"
absent=0
while read -r sum name; do
    if [ ! -e "$name" ] && [ -e "$name.00" ]; then
        cat "$name".[0-9][0-9] > "$name.joined"
        if echo "$sum  $name.joined" | sha256sum --check --status; then
            mv "$name.joined" "$name"
            rm "$name".[0-9][0-9]
        else # a piece of it is in another part
            rm "$name.joined"
        fi
    fi
    [ -e "$name" ] || absent=$((absent + 1))
done < SHA256SUMS
if [ "$absent" -gt 0 ]; then
    echo "$absent of $(wc -l < SHA256SUMS) wheels are in other parts: run their install.sh, too"
    exit 0
fi
sha256sum --check --quiet SHA256SUMS
python="${PYTHON:-python3}"
"$python" -m venv --without-pip "$target"
site="$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$site/those-of-the-given-python.pth"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" ./*.whl
rm -r "$store"
echo "$target/bin/python -m pipeline.cli test --gpu"
