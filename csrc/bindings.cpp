// The Python module `llave_kernels._cuda`: checks of what is passed in, then launches.
//
// Tensors come as addresses, so that one build serves every version of torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>

#include "cutlass/numeric_types.h"
#include "launch.h"
#include "sizes.h"

namespace py = pybind11;

namespace llave {

namespace {

using Address = uintptr_t;

[[noreturn]] void refuse(const std::string& message) {
  throw py::value_error(message);
}

template <class Value>
Value* pointer(Address address) {
  return reinterpret_cast<Value*>(address);
}

void require(const char* name, Address address, size_t alignment) {
  if (address == 0) refuse(std::string(name) + " is a null pointer; expected device memory");
  if (address % alignment != 0) {
    refuse(std::string(name) + " = " + std::to_string(address) + " is not aligned to " +
           std::to_string(alignment) + " bytes; pass a copy that is");
  }
}

int64_t element_bytes(const Problem& p) {
  return p.type == Type::float32 ? 4 : 2;
}

Type parse_type(const std::string& name) {
  if (name == "float32") return Type::float32;
  if (name == "bfloat16") return Type::bfloat16;
  if (name == "float16") return Type::float16;
  refuse("type = '" + name + "'; expected float32, bfloat16 or float16");
}

Hardness parse_hardness(const std::string& name) {
  if (name == "in_batch") return Hardness::in_batch;
  if (name == "hard_negatives") return Hardness::hard_negatives;
  if (name == "all") return Hardness::all;
  refuse("hardness = '" + name + "'; expected in_batch, hard_negatives or all");
}

int parse_size(const char* name, int64_t size) {
  // Room for the last tile's edge.
  if (size < 1 || size > std::numeric_limits<int>::max() - 2 * kLargeRows) {
    refuse(std::string(name) + " = " + std::to_string(size) + "; expected 1 to 2^31 - 257");
  }
  return static_cast<int>(size);
}

void require_rows(const char* name, Address address, int64_t stride, const Problem& p) {
  require(name, address, 16);
  if (stride < p.d || stride * element_bytes(p) % 16 != 0) {
    refuse(std::string(name) + "_stride = " + std::to_string(stride) +
           "; expected at least d and a multiple of 16 bytes: pass a padded copy");
  }
}

Problem make_problem(const std::string& type, Address query, Address target, int64_t query_stride,
                     int64_t target_stride, int64_t n, int64_t m, int64_t d, Address scale,
                     Address labels, Address owners, Address query_ids, Address target_ids,
                     Address row_limit, Address column_limit, float alpha, float target_alpha,
                     const std::string& hardness, bool symmetric) {
  Problem p = {};
  p.type = parse_type(type);
  p.n = parse_size("n", n);
  p.m = parse_size("m", m);
  p.d = parse_size("d", d);
  if (d * element_bytes(p) % 16 != 0) {
    refuse("d = " + std::to_string(d) +
           "; expected a multiple of 16 bytes: pass copies padded with zeros");
  }
  require_rows("query", query, query_stride, p);
  require_rows("target", target, target_stride, p);
  require("scale", scale, 4);
  require("labels", labels, 8);
  if ((query_ids == 0) != (target_ids == 0)) refuse("query_ids and target_ids go together");
  if ((row_limit == 0) != (column_limit == 0)) refuse("row_limit and column_limit go together");
  p.query = pointer<void>(query);
  p.target = pointer<void>(target);
  p.query_stride = query_stride;
  p.target_stride = target_stride;
  p.scale = pointer<float>(scale);
  p.labels = pointer<int64_t>(labels);
  p.owners = pointer<int64_t>(owners);
  p.query_ids = pointer<int64_t>(query_ids);
  p.target_ids = pointer<int64_t>(target_ids);
  p.row_limit = pointer<float>(row_limit);
  p.column_limit = pointer<float>(column_limit);
  p.alpha = alpha;
  p.target_alpha = target_alpha;
  p.hardness = parse_hardness(hardness);
  p.symmetric = symmetric;
  return p;
}

void require_strip(const Problem& p, int start, int stop) {
  if (start < 0 || stop <= start || stop > p.n) {
    refuse("rows " + std::to_string(start) + " to " + std::to_string(stop) +
           "; expected a range within 0 to n = " + std::to_string(p.n));
  }
}

// Calls `launch` with the architecture and the element type as types.
template <class Launch>
auto dispatch(int architecture, Type type, Launch launch) {
  auto with_type = [&](auto number) {
    if (type == Type::float32) return launch(number, float{});
    if (type == Type::bfloat16) return launch(number, cutlass::bfloat16_t{});
    return launch(number, cutlass::half_t{});
  };
#if defined(LLAVE_SM90)
  if (architecture == 90) return with_type(std::integral_constant<int, 90>{});
#endif
#if defined(LLAVE_SM80)
  if (architecture == 80) return with_type(std::integral_constant<int, 80>{});
#endif
  refuse("architecture = " + std::to_string(architecture) +
         " is not in this build; see `architectures`");
}

py::tuple architectures() {
  py::list built;
#if defined(LLAVE_SM80)
  built.append(80);
#endif
#if defined(LLAVE_SM90)
  built.append(90);
#endif
  return py::tuple(built);
}

// The workspace of a forward pass over strips of `rows` rows: the columns' sums so far, then the
// parts of a strip's columns and rows.
int64_t forward_workspace(const Problem& p, int rows) {
  require_strip(p, 0, rows);
  const int64_t column_parts = p.symmetric ? int64_t(tiles_over(rows, kSmallRows) + 1) * p.m : 0;
  const int64_t row_parts = int64_t(tiles_over(p.m, kColumns)) * rows;
  return (column_parts + row_parts) * sizeof(ShiftedSum);
}

void forward(int device, int architecture, const Problem& whole, int start, int stop,
             Address workspace, int64_t workspace_bytes, Address positive, Address query_lse,
             Address target_lse, Address stream) {
  require_strip(whole, start, stop);
  require("workspace", workspace, 8);
  require("positive", positive, 4);
  require("query_lse", query_lse, 4);
  if (whole.symmetric) require("target_lse", target_lse, 4);
  const Problem p = whole.rows(start, stop);
  if (workspace_bytes < forward_workspace(p, p.n)) {
    refuse("workspace_bytes = " + std::to_string(workspace_bytes) + "; expected at least " +
           std::to_string(forward_workspace(p, p.n)) + ", see forward_workspace");
  }
  auto* state = pointer<ShiftedSum>(workspace);
  auto* column_parts = p.symmetric ? state + p.m : state;
  auto* row_parts =
      p.symmetric ? column_parts + int64_t(tiles_over(p.n, kSmallRows)) * p.m : column_parts;
  const ForwardOutputs outputs = {row_parts, column_parts, pointer<float>(positive) + start};
  auto* cuda_stream = pointer<CUstream_st>(stream);
  const int tile_rows = dispatch(architecture, p.type, [&](auto number, auto element) {
    select_device(device);
    return launch_forward<decltype(number)::value, decltype(element)>(p, outputs, cuda_stream);
  });
  const Combination rows = {row_parts, tiles_over(p.m, kColumns),        p.n,      nullptr,
                            true,      pointer<float>(query_lse) + start, p.labels, p.m,
                            outputs.positive};
  const Combination columns = {
      column_parts, tiles_over(p.n, tile_rows), p.symmetric ? p.m : 0, state,
      start == 0,   pointer<float>(target_lse), nullptr, 0, nullptr};
  launch_combine(rows, columns, cuda_stream);
}

void backward(int device, int architecture, const Problem& whole, int start, int stop,
              Address query_lse, Address target_lse, Address d_positive, Address d_query_lse,
              Address d_target_lse, Address gain, Address ds, int64_t pitch, Address stream) {
  require_strip(whole, start, stop);
  require("query_lse", query_lse, 4);
  require("d_positive", d_positive, 4);
  require("d_query_lse", d_query_lse, 4);
  if (whole.symmetric) {
    require("target_lse", target_lse, 4);
    require("d_target_lse", d_target_lse, 4);
  }
  require("ds", ds, 16);
  if (pitch < whole.m || pitch % 8 != 0) {
    refuse("pitch = " + std::to_string(pitch) +
           "; expected a multiple of 8 not below m = " + std::to_string(whole.m));
  }
  const Problem p = whole.rows(start, stop);
  const BackwardOutputs outputs = {pointer<float>(query_lse) + start,
                                   pointer<float>(target_lse),
                                   pointer<float>(d_positive) + start,
                                   pointer<float>(d_query_lse) + start,
                                   pointer<float>(d_target_lse),
                                   pointer<float>(gain),
                                   pointer<void>(ds),
                                   pitch};
  dispatch(architecture, p.type, [&](auto number, auto element) {
    select_device(device);
    launch_backward<decltype(number)::value, decltype(element)>(p, outputs,
                                                                pointer<CUstream_st>(stream));
  });
}

}  // namespace

}  // namespace llave

PYBIND11_MODULE(_cuda, m) {
  using namespace llave;
  m.doc() = "CUTLASS kernels of the hardness-weighted contrastive loss; addresses are integers.";
  m.attr("architectures") = architectures();
#if defined(LLAVE_SIMULATED)
  m.attr("device") = "cpu";
#else
  m.attr("device") = "cuda";
#endif
  py::class_<Problem>(m, "Problem", "The inputs and rules of one call.")
      .def(py::init(&make_problem), py::kw_only(), py::arg("type"), py::arg("query"),
           py::arg("target"), py::arg("query_stride"), py::arg("target_stride"), py::arg("n"),
           py::arg("m"), py::arg("d"), py::arg("scale"), py::arg("labels"), py::arg("owners"),
           py::arg("query_ids"), py::arg("target_ids"), py::arg("row_limit"),
           py::arg("column_limit"), py::arg("alpha"), py::arg("target_alpha"), py::arg("hardness"),
           py::arg("symmetric"));
  m.def("forward_workspace", &forward_workspace, py::arg("problem"), py::arg("rows"),
        "Bytes of workspace that `forward` needs for strips of `rows` rows.");
  m.def("forward", &forward, py::kw_only(), py::arg("device"), py::arg("architecture"),
        py::arg("problem"), py::arg("start"), py::arg("stop"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("positive"), py::arg("query_lse"),
        py::arg("target_lse"), py::arg("stream"),
        "Positive logits and log-sum-exps of rows start to stop. The strips of a call go from "
        "the first row on with one workspace; target_lse is complete after the last.");
  m.def("backward", &backward, py::kw_only(), py::arg("device"), py::arg("architecture"),
        py::arg("problem"), py::arg("start"), py::arg("stop"), py::arg("query_lse"),
        py::arg("target_lse"), py::arg("d_positive"), py::arg("d_query_lse"),
        py::arg("d_target_lse"), py::arg("gain"), py::arg("ds"), py::arg("pitch"),
        py::arg("stream"),
        "dS of rows start to stop, times `gain` (0: 1), into ds (stop - start, pitch).");
}
