// The kernels between the GEMMs. They work on vectors.
#include "check.h"
#include "launch.h"

namespace llave {

namespace {

constexpr int kThreads = 128, kLossThreads = 1024;

__global__ void combine_kernel(Combination rows, Combination columns) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < rows.length) {
    rows.combine(index);
  } else if (index - rows.length < columns.length) {
    columns.combine(index - rows.length);
  }
}

// One block, so that one launch sums the loss in a fixed order.
__global__ void __launch_bounds__(kLossThreads) loss_kernel(LossCall call) {
  const Problem& p = call.problem;
  if (p.rules.symmetric) {
    for (int j = threadIdx.x; j < p.m; j += kLossThreads) call.d_target_lse[j] = 0.0f;
    __syncthreads();
  }
  LossPart part = LossPart::nothing();
  for (int i = threadIdx.x; i < p.n; i += kLossThreads) part.add(call.row(i));
  __shared__ LossPart parts[kLossThreads];
  parts[threadIdx.x] = part;
  for (int half = kLossThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x].add(parts[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) call.finish(parts[0]);
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

void launch_loss(const LossCall& call, cudaStream_t stream) {
  loss_kernel<<<1, kLossThreads, 0, stream>>>(call);
  check(cudaGetLastError(), "loss");
}

}  // namespace llave
