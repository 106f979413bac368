#!/usr/bin/env bash
# Runs tools/gpu_kit.py with the packages of a folder, for machines without a network: tools/gpu_kit.sh SITE [--out FOLDER]
set -euo pipefail
site=$(realpath "${1:?a folder with Transformer Engine and megatron-core, such as pip install --target makes}")
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec python3 tools/gpu_kit.py "$@"
