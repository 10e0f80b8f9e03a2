#include "check.h"
#include "launch.h"

namespace llave {

namespace {

constexpr int kThreads = 128;

__global__ void combine_kernel(Combination rows, Combination columns) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < rows.length) {
    rows.combine(index);
  } else if (index - rows.length < columns.length) {
    columns.combine(index - rows.length);
  }
}

}  // namespace

void select_device(int device) {
  check(cudaSetDevice(device), "device");
}

void launch_combine(const Combination& rows, const Combination& columns, cudaStream_t stream) {
  const int64_t blocks = (rows.length + columns.length + kThreads - 1) / kThreads;
  combine_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(rows, columns);
  check(cudaGetLastError(), "combine");
}

}  // namespace llave
