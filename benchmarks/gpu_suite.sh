#!/usr/bin/env bash
# Build, tests and benchmarks on a machine with an NVIDIA GPU, without a network: benchmarks/gpu_suite.sh OUT_DIR
# [--minutes M] [--commit REV] [--wheels DIR]; --help says more.
set -euo pipefail
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_suite.py" "$@"
