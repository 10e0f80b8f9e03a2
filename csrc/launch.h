// The functions that the bindings call. Launches go to `stream` and return at once. Architecture is
// 80 or 90. Element is the inputs' type.
#pragma once

#include <cuda_runtime_api.h>

#include "combine.h"
#include "loss.h"
#include "problem.h"
#include "sigmoid.h"
#include "sizes.h"

namespace llave {

// Makes `device` current in this module's CUDA runtime, which is not the one that torch uses.
void select_device(int device);

// Returns the size of the tiles whose sums it writes.
template <int Architecture, class Element>
Size launch_forward(const Problem&, const ForwardOutputs&, cudaStream_t stream);

// Returns how many parts of the scale's gradient it writes if they are asked for.
template <int Architecture, class Element>
int64_t launch_backward(const Problem&, const BackwardOutputs&, cudaStream_t stream);

template <int Architecture, class Element>
SigmoidParts launch_sigmoid(const Problem&, const SigmoidOutputs&, cudaStream_t stream);

void launch_combine(const Combination& rows, const Combination& columns, cudaStream_t stream);

void launch_loss(const LossCall&, cudaStream_t stream);

}  // namespace llave
