#!/bin/sh
# On a host with a CUDA device, from the root of the repository: test the CUDA path, then measure it.
# Arguments go to the sweep, as `--model FOLDER --commit SHA` where the package or git is missing.
set -eu
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
python -m pytest tests/embedding/test_cuda.py -rs
PYTHONPATH=. python benchmarks/engine_sweep.py --device cuda --threads 8 --texts 16384 --encode-batch 256 \
    --budgets 1024,4096,16384,65536,262144 "$@"
