#!/bin/sh
# Run the benchmark on a machine without a network: sh build/bench-gpu/run.sh [bench_gpu | bench_gpu_small] [overrides …]
# Start it in the root of the repository; PYTHON names the Python that has torch, transformers, lightning and accelerate.
set -eu
python=${PYTHON:-python3}
wheels=$(cd "$(dirname "$0")" && pwd)/wheels
experiment=${1:-bench_gpu}
[ $# -eq 0 ] || shift
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "$wheels" --target "$site" \
  -r experiments/speed/offline.txt
PYTHONPATH=$site:$(pwd) "$python" experiments/bench.py experiment="$experiment" "$@"
