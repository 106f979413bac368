#!/usr/bin/env bash
# The two environments for nodes with CUDA, in this checkout: run it once, on a file system that the nodes share.
#
#   PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cu130 examples/slurm/environment.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cu130}

# Training: the locked versions, torch for CUDA, Transformer Engine.
make .venv/.done PYTHON="$PYTHON" TORCH_INDEX="$TORCH_INDEX"
.venv/bin/pip install --quiet --no-build-isolation -e '.[gpu]'

# Serving: SGLang's own pins, which exclude those of training.
"$PYTHON" -m venv .venv-sglang
.venv-sglang/bin/pip install --quiet sglang==0.5.23

.venv/bin/python -c 'import megavar, torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
.venv-sglang/bin/python -c 'import sglang; print("sglang", sglang.__version__)'
