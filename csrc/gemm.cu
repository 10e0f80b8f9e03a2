// The forward and backward GEMM kernels of one architecture and one type. The build compiles this
// file for each combination. LLAVE_ARCHITECTURE is 80 or 90. LLAVE_ELEMENT is a C++ type.
#include "backward_epilogue.h"
#include "check.h"
#include "forward_epilogue.h"
#include "launch.h"
#include "per_device.h"
#include "sigmoid_epilogue.h"

#if LLAVE_ARCHITECTURE == 90
#include "sm90/gemm.h"
#else
#include "sm80/gemm.h"
#endif

#include "cutlass/device_kernel.h"

namespace llave {

namespace {

template <Size size, template <class, class, class> class Epilogue>
#if LLAVE_ARCHITECTURE == 90
using Gemm = Gemm90<LLAVE_ELEMENT, size, Epilogue>;
#else
using Gemm = Gemm80<LLAVE_ELEMENT, size, Epilogue>;
#endif

template <class Gemm, class Outputs>
void launch(const Problem& p, const Outputs& outputs, const cutlass::KernelHardwareInfo& hardware,
            cudaStream_t stream, const char* name) {
  using Kernel = typename Gemm::Kernel;
  using Value = typename Gemm::Mainloop::ElementA;
  const typename Kernel::Params params =
      Kernel::to_underlying_arguments({cutlass::gemm::GemmUniversalMode::kGemm,
                                       {p.n, p.m, p.d, 1},
                                       {static_cast<const Value*>(p.query),
                                        {p.query_stride, cute::_1{}, 0},
                                        static_cast<const Value*>(p.target),
                                        {p.target_stride, cute::_1{}, 0}},
                                       {p, outputs},
                                       hardware,
                                       Gemm::schedule()},
                                      nullptr);

  auto* kernel = &cutlass::device_kernel<Kernel>;
  static PerDevice<bool> has_shared_memory;
  has_shared_memory(hardware.device_id, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Kernel::SharedStorageSize),
          name);
    return true;
  });
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(typename Gemm::Cluster{}),
                            cute::size<1>(typename Gemm::Cluster{}), 1};
  if (LLAVE_ARCHITECTURE == 90) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, params), name);
}

// The backward without its product: the forward has kept the similarities.
template <class Epilogue, class Tile>
__global__ void __launch_bounds__(Place<Tile>::kThreads, 2)
    kept_kernel(CUTLASS_GRID_CONSTANT const typename Epilogue::Params params) {
  using namespace cute;
  __shared__ typename Epilogue::SharedStorage shared;
  const Problem& p = params.problem;
  const int across = tiles_over(p.m, Tile::kColumns), thread = threadIdx.x;
  const int i = blockIdx.x / across, j = blockIdx.x % across;
  typename Tile::Mma mma;
  auto accumulators = partition_fragment_C(mma, select<0, 1>(typename Tile::Shape{}));
  auto s = make_tensor(accumulators.data(), matrix_layout(accumulators.layout()));
  load_kept(s, Place<Tile>(thread), params.outputs.kept, p.n, i * Tile::kRows, j * Tile::kColumns);
  Epilogue epilogue(params);
  epilogue(make_shape(p.n, p.m, p.d, 1), typename Tile::Shape{}, make_coord(i, j, 0, 0),
           accumulators, mma, 0, thread, reinterpret_cast<char*>(&shared));
}

template <Size largest, template <class, class, class> class Epilogue, class Outputs>
Size launch_size(const Problem& p, const Outputs& outputs, cudaStream_t stream, const char* name) {
  cutlass::KernelHardwareInfo hardware;
  check(cudaGetDevice(&hardware.device_id), name);
  static PerDevice<int> sm_counts;
  hardware.sm_count = sm_counts(hardware.device_id, [&] {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, hardware.device_id), name);
    return count;
  });
  const Size size =
      choose_size(p.n, p.m, hardware.sm_count, p.rules.biased() ? Size::large : largest);
  if (size == Size::small) {
    launch<Gemm<Size::small, Epilogue>>(p, outputs, hardware, stream, name);
  } else if constexpr (largest != Size::small) {
    if (size == Size::large) {
      launch<Gemm<Size::large, Epilogue>>(p, outputs, hardware, stream, name);
    } else {
      launch<Gemm<largest, Epilogue>>(p, outputs, hardware, stream, name);
    }
  }
  return size;
}

}  // namespace

template <>
Size launch_forward<LLAVE_ARCHITECTURE, LLAVE_ELEMENT>(const Problem& p,
                                                       const ForwardOutputs& outputs,
                                                       cudaStream_t stream) {
  constexpr Size largest = kLargestForward<LLAVE_ARCHITECTURE>;
  return launch_size<largest, ForwardEpilogue>(p, outputs, stream, "forward");
}

template <>
int64_t launch_backward<LLAVE_ARCHITECTURE, LLAVE_ELEMENT>(const Problem& p,
                                                           const BackwardOutputs& outputs,
                                                           cudaStream_t stream) {
  if (outputs.kept.similarities != nullptr) {
    using Tile = KeptTile<LLAVE_ELEMENT>;
    using Epilogue = BackwardEpilogue<Warp, LLAVE_ELEMENT, Tile>;
    const int64_t blocks = int64_t(tiles_over(p.n, Tile::kRows)) * tiles_over(p.m, Tile::kColumns);
    kept_kernel<Epilogue, Tile>
        <<<static_cast<unsigned>(blocks), Place<Tile>::kThreads, 0, stream>>>({p, outputs});
    check(cudaGetLastError(), "backward");
    return scale_parts<80, LLAVE_ELEMENT>(p, Size::small);
  }
  constexpr Size largest = kLargestBackward<LLAVE_ARCHITECTURE, LLAVE_ELEMENT>;
  const Size size = launch_size<largest, BackwardEpilogue>(p, outputs, stream, "backward");
  return scale_parts<LLAVE_ARCHITECTURE, LLAVE_ELEMENT>(p, size);
}

template <>
SigmoidParts launch_sigmoid<LLAVE_ARCHITECTURE, LLAVE_ELEMENT>(const Problem& p,
                                                               const SigmoidOutputs& outputs,
                                                               cudaStream_t stream) {
  launch_size<kSigmoidSize, SigmoidEpilogue>(p, outputs, stream, "sigmoid");
  return sigmoid_parts<LLAVE_ARCHITECTURE, LLAVE_ELEMENT>(p);
}

}  // namespace llave
