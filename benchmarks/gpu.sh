#!/usr/bin/env bash
# Measures this project on this machine's GPU and writes benchmarks/results/DATE-CARD-COMMIT.md.
#
#     bash benchmarks/gpu.sh [MINUTES] [OPTIONS OF gpu.py]      # 9 minutes by default
#
# Without a network: wheels that `benchmarks/wheels.sh` brought to work/wheels are installed into a folder of their own.
set -euo pipefail
cd "$(dirname "$0")/.."

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G 'work/wheels/*.whl' >/dev/null; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" work/wheels/*.whl
fi
export PYTHONPATH="$site:$PWD/workflow${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python3 benchmarks/gpu.py --minutes "${1:-9}" "${@:2}"
