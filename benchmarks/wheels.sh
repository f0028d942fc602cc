#!/usr/bin/env bash
# Downloads into work/wheels what `benchmarks/gpu.sh` needs on a machine without a network that has torch for CUDA,
# pandas, pyarrow, accelerate and pytest but an older transformers: 16 MB, most of it transformers.
#
#     bash benchmarks/wheels.sh [PYTHON_VERSION]      # of the machine with the GPU, 3.12 by default
set -euo pipefail
cd "$(dirname "$0")/.."

folder=work/wheels
rm -rf "$folder"
for package in 'transformers==5.24.*' 'trl==1.16.0' 'datasets==5.2.*' 'multiprocess<0.70.20' 'dill<0.4.2'; do
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "${1:-3.12}" --dest "$folder" "$package"
done
du -sh "$folder"
