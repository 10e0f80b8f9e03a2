#!/usr/bin/env bash
# Run compute-sanitizer on short calls of the compiled kernels.
# Usage: sanitize.sh [memcheck|racecheck]...
# Exit status: 1 if it found something, 3 if compute-sanitizer is not installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed" >&2; exit 3; }
# Each tensor gets its own allocation, so that a read beyond it is found.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "${@:-memcheck racecheck}"; do
  for name in $tool; do
    for architecture in 80 90; do
      LLAVE_CUDA_ARCH=$architecture compute-sanitizer --tool "$name" --error-exitcode 1 \
        "${PYTHON:-python3}" -m tests.gpu.short_calls
    done
  done
done
