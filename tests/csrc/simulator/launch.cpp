// The launchers of csrc/launch.h on a CPU. A plain matrix product replaces the tensor cores. Then
// the kernels' own epilogues run, thread by thread.
#include "launch.h"

#include <cstring>
#include <vector>

#include "backward_epilogue.h"
#include "block.h"
#include "forward_epilogue.h"
#include "sigmoid_epilogue.h"

namespace llave {

namespace {

constexpr int kMultiprocessors = 4;  // few, so that small problems take larger tiles too

template <class Element>
std::vector<float> operand(const void* data, int rows, int d, int64_t stride) {
  std::vector<float> values(size_t(rows) * d);
  const cutlass::NumericConverter<Operand<Element>, Element> convert;  // as sm80/gemm.h and TMA do
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < d; ++k) {
      const Element x = static_cast<const Element*>(data)[i * stride + k];
      values[size_t(i) * d + k] = static_cast<float>(convert(x));
    }
  }
  return values;
}

// Calls `fill(accumulators, thread, down, across)`, then the epilogue, for each thread of each
// tile.
template <class Tile, class Epilogue, class Outputs, class Prepare, class Fill>
void run_tiles(const Problem& p, const Outputs& outputs, Prepare prepare, Fill fill) {
  using namespace cute;
  std::vector<char> shared(sizeof(typename Epilogue::SharedStorage) + 1);
  const typename Epilogue::Params params = {p, outputs};
  // The loop runs one extra row of tiles, because a cluster may reach beyond the last row.
  for (int down = 0; down <= tiles_over(p.n, Tile::kRows); ++down) {
    for (int across = 0; across < tiles_over(p.m, Tile::kColumns); ++across) {
      prepare(down, across);
      std::memset(shared.data(), 0xff, shared.size());  // NaN
      Block::run(size(typename Tile::Mma{}), [&](int thread) {
        typename Tile::Mma mma;
        auto accumulators = partition_fragment_C(mma, select<0, 1>(typename Tile::Shape{}));
        fill(accumulators, thread, down, across);
        Epilogue epilogue(params);
        epilogue(make_shape(p.n, p.m, p.d, 1), typename Tile::Shape{},
                 make_coord(down, across, 0, 0), accumulators, mma, 0, thread, shared.data());
      });
    }
  }
}

// The products fill the accumulators, as in a GEMM.
template <class Tile, class Epilogue, class Element, class Outputs>
void run(const Problem& p, const Outputs& outputs) {
  using namespace cute;
  const auto query = operand<Element>(p.query, p.n, p.d, p.query_stride);
  const auto target = operand<Element>(p.target, p.m, p.d, p.target_stride);
  std::vector<float> products(size_t(Tile::kRows) * Tile::kColumns);
  const auto multiply = [&](int down, int across) {
    std::fill(products.begin(), products.end(), 0.0f);  // products beyond the edges are 0
    for (int i = 0; i < Tile::kRows && down * Tile::kRows + i < p.n; ++i) {
      for (int j = 0; j < Tile::kColumns && across * Tile::kColumns + j < p.m; ++j) {
        const float* q = &query[size_t(down * Tile::kRows + i) * p.d];
        const float* t = &target[size_t(across * Tile::kColumns + j) * p.d];
        float sum = 0.0f;
        for (int k = 0; k < p.d; ++k) sum += q[k] * t[k];
        products[size_t(i) * Tile::kColumns + j] = sum;
      }
    }
  };
  const auto fill = [&](auto& accumulators, int thread, int, int) {
    auto coordinates = typename Tile::Mma().get_thread_slice(thread).partition_C(
        make_identity_tensor(select<0, 1>(typename Tile::Shape{})));
    for (int k = 0; k < size(accumulators); ++k) {
      const auto [i, j] = coordinates(k);
      accumulators(k) = products[size_t(i) * Tile::kColumns + j];
    }
  };
  run_tiles<Tile, Epilogue>(p, outputs, multiply, fill);
}

// What the forward has kept fills the accumulators.
template <class Tile, class Epilogue>
void run_kept(const Problem& p, const BackwardOutputs& outputs) {
  const auto load = [&](auto& accumulators, int thread, int down, int across) {
    auto s = cute::make_tensor(accumulators.data(), matrix_layout(accumulators.layout()));
    load_kept(s, Place<Tile>(thread), outputs.kept, p.n, down * Tile::kRows,
              across * Tile::kColumns);
  };
  run_tiles<Tile, Epilogue>(p, outputs, [](int, int) {}, load);
}

template <int Architecture, class Element, Size largest,
          template <class, class, class> class Epilogue, class Outputs>
Size run_size(const Problem& p, const Outputs& outputs) {
  const Size size = choose_size(p.n, p.m, kMultiprocessors, p.rules.biased() ? Size::large : largest);
  const auto with = [&](auto tile) {
    using Tile = decltype(tile);
    run<Tile, Epilogue<SimulatedWarp, Element, Tile>, Element>(p, outputs);
  };
  if (size == Size::small) {
    with(Tile<Architecture, Element, Size::small>());
  } else if (size == Size::large) {
    with(Tile<Architecture, Element, Size::large>());
  } else {
    with(Tile<Architecture, Element, largest>());
  }
  return size;
}

}  // namespace

template <int Architecture, class Element>
Size launch_forward(const Problem& p, const ForwardOutputs& outputs, cudaStream_t) {
  constexpr Size largest = kLargestForward<Architecture>;
  return run_size<Architecture, Element, largest, ForwardEpilogue>(p, outputs);
}

template <int Architecture, class Element>
int64_t launch_backward(const Problem& p, const BackwardOutputs& outputs, cudaStream_t) {
  if (outputs.kept.similarities != nullptr) {
    using Tile = KeptTile<Element>;
    run_kept<Tile, BackwardEpilogue<SimulatedWarp, Element, Tile>>(p, outputs);
    return scale_parts<80, Element>(p, Size::small);
  }
  constexpr Size largest = kLargestBackward<Architecture, Element>;
  const Size size = run_size<Architecture, Element, largest, BackwardEpilogue>(p, outputs);
  return scale_parts<Architecture, Element>(p, size);
}

template <int Architecture, class Element>
SigmoidParts launch_sigmoid(const Problem& p, const SigmoidOutputs& outputs, cudaStream_t) {
  run_size<Architecture, Element, kSigmoidSize, SigmoidEpilogue>(p, outputs);
  return sigmoid_parts<Architecture, Element>(p);
}

void select_device(int) {
}

void launch_combine(const Combination& rows, const Combination& columns, cudaStream_t) {
  for (int64_t i = 0; i < rows.length; ++i) rows.combine(i);
  for (int64_t j = 0; j < columns.length; ++j) columns.combine(j);
}

void launch_loss(const LossCall& call, cudaStream_t) {
  const Problem& p = call.problem;
  for (int j = 0; p.rules.symmetric && j < p.m; ++j) call.d_target_lse[j] = 0.0f;
  LossPart all = LossPart::nothing();
  for (int i = 0; i < p.n; ++i) all.add(call.row(i));
  call.finish(all);
}

#define LLAVE_INSTANTIATE(architecture, element)                                                  \
  template Size launch_forward<architecture, element>(const Problem&, const ForwardOutputs&,      \
                                                      cudaStream_t);                              \
  template int64_t launch_backward<architecture, element>(const Problem&, const BackwardOutputs&, \
                                                          cudaStream_t);                          \
  template SigmoidParts launch_sigmoid<architecture, element>(                                    \
      const Problem&, const SigmoidOutputs&, cudaStream_t);
LLAVE_INSTANTIATE(80, float)
LLAVE_INSTANTIATE(80, cutlass::bfloat16_t)
LLAVE_INSTANTIATE(80, cutlass::half_t)
LLAVE_INSTANTIATE(90, float)
LLAVE_INSTANTIATE(90, cutlass::bfloat16_t)
LLAVE_INSTANTIATE(90, cutlass::half_t)

}  // namespace llave
