#!/usr/bin/env bash
# compute-sanitizer over short calls of the compiled kernels. Usage: sanitize.sh [memcheck|racecheck]...
# Exit status: 1 where it found something, 3 where compute-sanitizer is not installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed" >&2; exit 3; }
# One allocation a tensor, so that reads beyond one are seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "${@:-memcheck racecheck}"; do
  for name in $tool; do
    for architecture in 80 90; do
      LLAVE_CUDA_ARCH=$architecture compute-sanitizer --tool "$name" --error-exitcode 1 \
        "${PYTHON:-python3}" -m tests.gpu.short_calls
    done
  done
done
