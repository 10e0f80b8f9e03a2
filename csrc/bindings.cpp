// The Python module `llave_kernels._cuda`. It checks its arguments, then launches kernels.
//
// Tensors are passed as addresses, so that one build serves every version of torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <iterator>
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

void require_pitch(const char* name, int64_t pitch, const Problem& p) {
  if (pitch < p.m || pitch % 8 != 0) {
    refuse(std::string(name) + " = " + std::to_string(pitch) +
           "; expected a multiple of 8 not below m = " + std::to_string(p.m));
  }
}

void require(const char* name, const void* place, size_t alignment) {
  require(name, reinterpret_cast<Address>(place), alignment);
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
  std::string expected;
  for (int number = 0; number < static_cast<int>(std::size(kHardnessModes)); ++number) {
    if (name == kHardnessModes[number]) return static_cast<Hardness>(number);
    expected += (number == 0 ? "" : ", ") + std::string(kHardnessModes[number]);
  }
  refuse("hardness = '" + name + "'; expected one of " + expected);
}

int parse_size(const char* name, int64_t size) {
  // Leaves room for the edge of the last tile.
  if (size < 1 || size > std::numeric_limits<int>::max() - 2 * kMostRows) {
    refuse(std::string(name) + " = " + std::to_string(size) + "; expected 1 to 2^31 - 257");
  }
  return static_cast<int>(size);
}

void require_rows(const char* name, const void* place, int64_t stride, const Problem& p) {
  require(name, place, 16);
  if (stride < p.d || stride * element_bytes(p) % 16 != 0) {
    refuse(std::string(name) + "_stride = " + std::to_string(stride) +
           "; expected at least d and a multiple of 16 bytes: pass a padded copy");
  }
}

// The keyword arguments of a call. Each must be taken once, and none may be left over.
class Keywords {
 public:
  explicit Keywords(const py::kwargs& given) : left_(given) {}

  template <class Value>
  Value take(const char* name) {
    if (!left_.contains(name)) throw py::type_error("missing argument: " + std::string(name));
    const py::object value = left_.attr("pop")(name);
    try {
      return value.cast<Value>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + " = " + std::string(py::repr(value)) +
                           " is not of the expected type");
    }
  }

  template <class Value>
  const Value* take_pointer(const char* name) {
    return pointer<Value>(take<Address>(name));
  }

  // Null if the argument is left out.
  template <class Value>
  const Value* take_optional(const char* name) {
    return left_.contains(name) ? take_pointer<Value>(name) : nullptr;
  }

  void finish() const {
    for (const auto& item : left_) {
      throw py::type_error("unknown argument: " + std::string(py::str(item.first)));
    }
  }

 private:
  py::dict left_;
};

Rules take_rules(Keywords& arguments) {
  Rules rules = {};
  rules.labels = arguments.take_pointer<int64_t>("labels");
  rules.owners = arguments.take_pointer<int64_t>("owners");
  rules.query_ids = arguments.take_pointer<int64_t>("query_ids");
  rules.target_ids = arguments.take_pointer<int64_t>("target_ids");
  rules.row_limit = arguments.take_pointer<float>("row_limit");
  rules.column_limit = arguments.take_pointer<float>("column_limit");
  rules.query_bias = arguments.take_optional<float>("query_bias");
  rules.target_bias = arguments.take_optional<float>("target_bias");
  rules.alpha = arguments.take<float>("alpha");
  rules.target_alpha = arguments.take<float>("target_alpha");
  rules.hardness = parse_hardness(arguments.take<std::string>("hardness"));
  rules.symmetric = arguments.take<bool>("symmetric");
  if ((rules.query_ids == nullptr) != (rules.target_ids == nullptr)) {
    refuse("query_ids and target_ids go together");
  }
  if ((rules.row_limit == nullptr) != (rules.column_limit == nullptr)) {
    refuse("row_limit and column_limit go together");
  }
  return rules;
}

Problem make_problem(const py::kwargs& given) {
  Keywords arguments(given);
  Problem p = {};
  p.type = parse_type(arguments.take<std::string>("type"));
  p.n = parse_size("n", arguments.take<int64_t>("n"));
  p.m = parse_size("m", arguments.take<int64_t>("m"));
  p.d = parse_size("d", arguments.take<int64_t>("d"));
  if (p.d * element_bytes(p) % 16 != 0) {
    refuse("d = " + std::to_string(p.d) +
           "; expected a multiple of 16 bytes: pass copies padded with zeros");
  }
  p.query = arguments.take_pointer<void>("query");
  p.target = arguments.take_pointer<void>("target");
  p.query_stride = arguments.take<int64_t>("query_stride");
  p.target_stride = arguments.take<int64_t>("target_stride");
  require_rows("query", p.query, p.query_stride, p);
  require_rows("target", p.target, p.target_stride, p);
  const py::object scale = arguments.take<py::object>("scale");
  if (py::isinstance<py::float_>(scale)) {
    p.scale_value = scale.cast<float>();
  } else {
    p.scale = pointer<float>(scale.cast<Address>());
    require("scale", p.scale, 4);
  }
  p.rules = take_rules(arguments);
  if (p.rules.labels == nullptr && p.n > p.m) {
    refuse("labels is a null pointer: row i's positive is column i, and n = " +
           std::to_string(p.n) + " exceeds m = " + std::to_string(p.m));
  }
  arguments.finish();
  return p;
}

void require_strip(const Problem& p, int start, int stop) {
  if (start < 0 || stop <= start || stop > p.n) {
    refuse("rows " + std::to_string(start) + " to " + std::to_string(stop) +
           "; expected a range within 0 to n = " + std::to_string(p.n));
  }
}

// The kept similarities from row `start` on, or nothing for a null pointer.
Kept take_kept(Address kept, int64_t pitch, const Problem& p, int start) {
  if (kept == 0) return {nullptr, 0};
  require("kept", kept, 16);
  require_pitch("kept_pitch", pitch, p);
  return {pointer<float>(kept) + start * pitch, pitch};
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

py::tuple hardness_modes() {
  py::list names;
  for (const char* name : kHardnessModes) names.append(name);
  return py::tuple(names);
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

// Bytes of workspace of a forward pass over strips of `rows` rows. The workspace holds the columns'
// sums so far, then the column parts and the row parts of one strip.
int64_t forward_workspace(const Problem& p, int rows) {
  require_strip(p, 0, rows);
  const int64_t columns = p.rules.symmetric ? p.m : 0;
  const int64_t column_parts = (tiles_over(rows, kFewestRows) + 1) * columns;
  const int64_t row_parts = int64_t(tiles_over(p.m, kFewestColumns)) * rows;
  return (column_parts + row_parts) * sizeof(ShiftedSum);
}

void forward(int device, int architecture, const Problem& whole, int start, int stop,
             Address workspace, int64_t workspace_bytes, Address positive, Address query_lse,
             Address target_lse, Address stream, Address kept, int64_t kept_pitch) {
  require_strip(whole, start, stop);
  require("workspace", workspace, 8);
  require("positive", positive, 4);
  require("query_lse", query_lse, 4);
  if (whole.rules.symmetric) require("target_lse", target_lse, 4);
  const Problem p = whole.rows(start, stop);
  if (workspace_bytes < forward_workspace(p, p.n)) {
    refuse("workspace_bytes = " + std::to_string(workspace_bytes) + "; expected at least " +
           std::to_string(forward_workspace(p, p.n)) + ", see forward_workspace");
  }
  auto* state = pointer<ShiftedSum>(workspace);
  auto* column_parts = p.rules.symmetric ? state + p.m : state;
  auto* row_parts =
      p.rules.symmetric ? column_parts + int64_t(tiles_over(p.n, kFewestRows)) * p.m : column_parts;
  const ForwardOutputs outputs = {row_parts, column_parts, pointer<float>(positive) + start,
                                  take_kept(kept, kept_pitch, whole, start)};
  auto* cuda_stream = pointer<CUstream_st>(stream);
  const Size size = dispatch(architecture, p.type, [&](auto number, auto element) {
    select_device(device);
    return launch_forward<decltype(number)::value, decltype(element)>(p, outputs, cuda_stream);
  });
  const Combination rows = {row_parts,
                            tiles_over(p.m, tile_columns(size)),
                            p.n,
                            nullptr,
                            true,
                            pointer<float>(query_lse) + start,
                            p.rules.query_bias,
                            outputs.positive,
                            p.rules,
                            p.m};
  const Combination columns = {column_parts,
                               tiles_over(p.n, tile_rows(size)),
                               p.rules.symmetric ? p.m : 0,
                               state,
                               start == 0,
                               pointer<float>(target_lse),
                               p.rules.target_bias,
                               nullptr,
                               p.rules,
                               p.m};
  launch_combine(rows, columns, cuda_stream);
}

void loss(int device, const Problem& p, Address positive, Address query_lse, Address target_lse,
          float weight, Address total, Address gain, Address d_positive, Address d_query_lse,
          Address d_target_lse, Address stream) {
  require("positive", positive, 4);
  require("query_lse", query_lse, 4);
  require("total", total, 4);
  require("gain", gain, 4);
  require("d_positive", d_positive, 4);
  require("d_query_lse", d_query_lse, 4);
  if (p.rules.symmetric) {
    require("target_lse", target_lse, 4);
    require("d_target_lse", d_target_lse, 4);
  }
  const LossCall call = {p,
                         pointer<float>(positive),
                         pointer<float>(query_lse),
                         pointer<float>(target_lse),
                         weight,
                         pointer<float>(total),
                         pointer<float>(gain),
                         pointer<float>(d_positive),
                         pointer<float>(d_query_lse),
                         pointer<float>(d_target_lse)};
  select_device(device);
  launch_loss(call, pointer<CUstream_st>(stream));
}

int64_t backward(int device, int architecture, const Problem& whole, int start, int stop,
                 Address query_lse, Address target_lse, Address d_positive, Address d_query_lse,
                 Address d_target_lse, Address gain, Address ds, int64_t pitch, Address stream,
                 Address kept, int64_t kept_pitch, Address positive, Address scale_parts) {
  require_strip(whole, start, stop);
  require("query_lse", query_lse, 4);
  require("d_positive", d_positive, 4);
  require("d_query_lse", d_query_lse, 4);
  if (whole.rules.symmetric) {
    require("target_lse", target_lse, 4);
    require("d_target_lse", d_target_lse, 4);
  }
  require("ds", ds, 16);
  require_pitch("pitch", pitch, whole);
  if (scale_parts != 0) {
    require("scale_parts", scale_parts, 4);
    require("positive", positive, 4);
  }
  const Problem p = whole.rows(start, stop);
  const BackwardOutputs outputs = {pointer<float>(query_lse) + start,
                                   pointer<float>(target_lse),
                                   pointer<float>(d_positive) + start,
                                   pointer<float>(d_query_lse) + start,
                                   pointer<float>(d_target_lse),
                                   pointer<float>(gain),
                                   pointer<void>(ds),
                                   pitch,
                                   take_kept(kept, kept_pitch, whole, start),
                                   positive == 0 ? nullptr : pointer<float>(positive) + start,
                                   pointer<float>(scale_parts)};
  return dispatch(architecture, p.type, [&](auto number, auto element) {
    select_device(device);
    return launch_backward<decltype(number)::value, decltype(element)>(
        p, outputs, pointer<CUstream_st>(stream));
  });
}

int64_t most_scale_parts(const Problem& p, int rows) {
  return tile_count(rows, p.m, Size::small) * kMostWarps;
}

py::tuple sigmoid(int device, int architecture, const Problem& whole, int start, int stop,
                  Address bias, Address weights, Address gain, Address ds, int64_t pitch,
                  Address loss_parts, Address sums, Address stream) {
  require_strip(whole, start, stop);
  require("bias", bias, 4);
  require("loss_parts", loss_parts, 4);
  require("sums", sums, 4);
  if (ds != 0) {
    require("ds", ds, 16);
    require_pitch("pitch", pitch, whole);
  }
  const Problem p = whole.rows(start, stop);
  const SigmoidOutputs outputs = {pointer<float>(bias),
                                  weights == 0 ? nullptr : pointer<float>(weights) + start,
                                  pointer<float>(gain),
                                  pointer<void>(ds),
                                  pitch,
                                  pointer<float>(loss_parts),
                                  pointer<float>(sums)};
  const SigmoidParts parts = dispatch(architecture, p.type, [&](auto number, auto element) {
    select_device(device);
    return launch_sigmoid<decltype(number)::value, decltype(element)>(p, outputs,
                                                                      pointer<CUstream_st>(stream));
  });
  return py::make_tuple(parts.row_parts, parts.sums);
}

py::tuple most_sigmoid_parts(const Problem& p, int rows) {
  return py::make_tuple(int64_t(tiles_over(p.m, kFewestColumns)) * kMostWarpsAcross,
                        tile_count(rows, p.m, Size::small) * kMostWarps);
}

}  // namespace

}  // namespace llave

PYBIND11_MODULE(_cuda, m) {
  using namespace llave;
  m.doc() = "CUTLASS kernels of the hardness-weighted contrastive loss; addresses are integers.";
  m.attr("architectures") = architectures();
  m.attr("hardness_modes") = hardness_modes();
#if defined(LLAVE_SIMULATED)
  m.attr("device") = "cpu";
#else
  m.attr("device") = "cuda";
#endif
  py::class_<Problem>(m, "Problem", "The inputs and rules of one call, by keyword.")
      .def(py::init(&make_problem));
  m.def("forward_workspace", &forward_workspace, py::arg("problem"), py::arg("rows"),
        "Bytes of workspace that `forward` needs for strips of `rows` rows.");
  m.def("forward", &forward, py::kw_only(), py::arg("device"), py::arg("architecture"),
        py::arg("problem"), py::arg("start"), py::arg("stop"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("positive"), py::arg("query_lse"),
        py::arg("target_lse"), py::arg("stream"), py::arg("kept") = 0, py::arg("kept_pitch") = 0,
        "Positive logits and log-sum-exps of rows start to stop. The strips of a call go from "
        "the first row on with one workspace; target_lse is complete after the last. The "
        "similarities go into kept (n, kept_pitch) unless that is 0.");
  m.def(
      "loss", &loss, py::kw_only(), py::arg("device"), py::arg("problem"), py::arg("positive"),
      py::arg("query_lse"), py::arg("target_lse"), py::arg("weight"), py::arg("total"),
      py::arg("gain"), py::arg("d_positive"), py::arg("d_query_lse"), py::arg("d_target_lse"),
      py::arg("stream"),
      "`weight` times the sum of the rows' losses, its gradients with respect to the log-sum-exps, "
      "and the `gain` for the backward in float16.");
  m.def("backward", &backward, py::kw_only(), py::arg("device"), py::arg("architecture"),
        py::arg("problem"), py::arg("start"), py::arg("stop"), py::arg("query_lse"),
        py::arg("target_lse"), py::arg("d_positive"), py::arg("d_query_lse"),
        py::arg("d_target_lse"), py::arg("gain"), py::arg("ds"), py::arg("pitch"),
        py::arg("stream"), py::arg("kept") = 0, py::arg("kept_pitch") = 0, py::arg("positive") = 0,
        py::arg("scale_parts") = 0,
        "dS of rows start to stop, times `gain` (0: 1), into ds (stop - start, pitch). It computes "
        "no similarities if the forward has kept them. `scale_parts` takes parts that sum to the "
        "gradient of the scale, times `gain`, from these rows. It returns how many, or 0 if the "
        "tiles are too large for that.");
  m.def("most_scale_parts", &most_scale_parts, py::arg("problem"), py::arg("rows"),
        "The most parts of the scale's gradient that `backward` writes for `rows` rows.");
  m.def("sigmoid", &sigmoid, py::kw_only(), py::arg("device"), py::arg("architecture"),
        py::arg("problem"), py::arg("start"), py::arg("stop"), py::arg("bias"), py::arg("weights"),
        py::arg("gain"), py::arg("ds"), py::arg("pitch"), py::arg("loss_parts"), py::arg("sums"),
        py::arg("stream"),
        "The sigmoid loss of rows start to stop, and its dS times `gain` (0: 1) into ds "
        "(stop - start, pitch) unless that is 0. `loss_parts` (row parts, stop - start) sum to the "
        "rows' losses. `sums` (sums, 2) sum to the gradients of scale and bias. `weights` (0: 1) "
        "are the upstream gradients of the rows' losses. It returns (row parts, sums).");
  m.def("most_sigmoid_parts", &most_sigmoid_parts, py::arg("problem"), py::arg("rows"),
        "The most (row parts, sums) that `sigmoid` writes for `rows` rows.");
}
