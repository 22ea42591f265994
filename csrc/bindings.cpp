// fastdiff._C: the CPU kernels with plain integers as arguments. No torch headers, so one build
// serves every torch: tensors are passed as addresses (0 for none), sizes and strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#if defined(FASTDIFF_CUDA)
#include "cuda/kernels.h"
#endif
#include "kernels.h"
#include "parallel.h"
#include "watch.h"

namespace py = pybind11;
using namespace fastdiff;

namespace {

template <size_t N>
using Ints = std::array<int64_t, N>;

const void* in(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* out(uintptr_t address) { return reinterpret_cast<void*>(address); }

// The instruction sets that are in this build and that this processor supports, best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(FASTDIFF_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16());
    found.push_back(&kernels_avx512());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&kernels_avx2());
#endif
  found.push_back(&kernels_baseline());
  return found;
}

const Kernels* chosen = available().front();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->isa);
  return names;
}

void set_isa(const std::string& name) {
  for (const Kernels* kernels : available())
    if (name == kernels->isa) {
      chosen = kernels;
      return;
    }
  std::string valid;
  for (const std::string& isa : isas()) valid += (valid.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("instruction set '" + name + "' is not available here; there are: " +
                              valid);
}

// Joins the rows of two tensors; left and right are the bytes per row of each. The second repeats
// after that many rows.
struct Concat {
  const char *first, *second;
  int64_t rows, left, right, second_rows;
  char* out;
};

void execute(const Conv& p) { chosen->conv(p); }
void execute(const Attention& p) { chosen->attention(p); }
void execute(const GroupNorm& p) { chosen->group_norm(p); }
void execute(const JointAttention& p) { chosen->joint_attention(p); }
void execute(const AdaNorm& p) { chosen->ada_norm(p); }
void execute(const QkNorm& p) { chosen->qk_norm(p); }
void execute(const Residual& p) { chosen->residual(p); }
void execute(const MeanPool& p) { chosen->mean_pool(p); }
void execute(const SlabMoments& p) { chosen->moments(p); }
void execute(const LineSilu& p) { chosen->line_silu(p); }
void execute(const GuidedStep& p) { chosen->guided_step(p); }
void execute(const Concat& p) {
  const auto copy = [](char* to, const char* from, int64_t bytes) {
    constexpr int64_t kMemcpy = 1024;  // calling it takes longer than copying fewer bytes
    if (bytes >= kMemcpy) {
      std::memcpy(to, from, bytes);
      return;
    }
    int64_t at = 0;
    for (; at + 64 <= bytes; at += 64) std::memcpy(to + at, from + at, 64);
    std::memcpy(to + at, from + at, bytes - at);
  };
  constexpr int64_t kPage = 4096;  // of the output: the threads share long rows, too
  const int64_t wide = p.left + p.right, all = p.rows * wide;
  const auto copy_pages = [&](int64_t begin, int64_t end) {
    int64_t at = begin * kPage, row = at / wide, column = at % wide;
    const int64_t last = std::min(end * kPage, all);
    while (at < last) {
      const bool left = column < p.left;
      const char* from = left ? p.first + row * p.left + column
                              : p.second + row % p.second_rows * p.right + column - p.left;
      const int64_t bytes = std::min((left ? p.left : wide) - column, last - at);
      copy(p.out + at, from, bytes);
      at += bytes;
      column += bytes;
      if (column == wide) column = 0, ++row;
    }
  };
  constexpr int64_t kSerialBelow = 1 << 18;  // bytes that one core copies while another wakes up
  const int64_t pages = (all + kPage - 1) / kPage;
  if (all < kSerialBelow) copy_pages(0, pages);
  else parallel_for(pages, copy_pages);
}

// The kernels that a thread called between start and stop, to run again on the same addresses.
class Tape {
 public:
  void start() {
    if (current) throw std::runtime_error("this thread records a tape already");
    current = this;
  }
  void stop() { current = nullptr; }
  void run() const {
    for (const auto& call : calls_) std::visit([](const auto& p) { execute(p); }, call);
  }
  size_t size() const { return calls_.size(); }
  template <typename P>
  static void note(const P& p) {
    if (current) current->calls_.emplace_back(p);
  }

 private:
  static thread_local Tape* current;
  std::vector<std::variant<Conv, Attention, JointAttention, GroupNorm, AdaNorm, QkNorm, Residual,
                           MeanPool, SlabMoments, LineSilu, GuidedStep, Concat>>
      calls_;
};
thread_local Tape* Tape::current = nullptr;

template <typename P>
void run(const P& p) {
  Tape::note(p);
  py::gil_scoped_release unlocked;
  execute(p);
}

void run_conv(int dtype, uintptr_t x, const Ints<4>& shape, const Ints<2>& enlarged,
              const Ints<3>& window, const Ints<2>& out_shape, const Ints<3>& weight,
              uintptr_t bias, std::pair<uintptr_t, int64_t> residual, int act, int algorithm,
              uintptr_t output) {
  if (algorithm < kDirect || algorithm > kWinograd2x4)
    throw std::invalid_argument("conv: there is no algorithm " + std::to_string(algorithm));
  const bool same = window == Ints<3>{3, 1, 1} && out_shape == enlarged;
  if (algorithm != kDirect && (!same || is_gated(act)))
    throw std::invalid_argument(
        "conv: Winograd's algorithms take a 3x3 window at stride 1, one zero around the picture and "
        "no gate; got a " + std::to_string(window[0]) + "x" + std::to_string(window[0]) +
        " window at stride " + std::to_string(window[1]) + ", " + std::to_string(window[2]) +
        " zeros before it and an output of " + std::to_string(out_shape[0]) + "x" +
        std::to_string(out_shape[1]) + (is_gated(act) ? ", gated" : ""));
  const Conv p{dtype,        in(x),        shape[0],      shape[1],   shape[2],
               shape[3],     enlarged[0],  enlarged[1],   window[0],  window[1],
               window[2],    out_shape[0], out_shape[1],  in(weight[0]), weight[1],
               weight[2],    in(bias),     in(residual.first), residual.second, act, algorithm,
               out(output)};
  run(p);
}

void run_attention(int dtype, const Ints<4>& q, const Ints<4>& k, const Ints<4>& v,
                   const Ints<5>& mask, const Ints<5>& sizes, float scale, uintptr_t output) {
  Attention p{};
  p.dtype = dtype;
  p.q = in(q[0]);
  p.k = in(k[0]);
  p.v = in(v[0]);
  p.mask = in(mask[0]);
  for (int i = 0; i < 3; ++i) {
    p.q_stride[i] = q[i + 1];
    p.k_stride[i] = k[i + 1];
    p.v_stride[i] = v[i + 1];
  }
  for (int i = 0; i < 4; ++i) p.mask_stride[i] = mask[i + 1];
  p.batch = sizes[0];
  p.heads = sizes[1];
  p.queries = sizes[2];
  p.keys = sizes[3];
  p.width = sizes[4];
  p.scale = scale;
  p.out = out(output);
  run(p);
}

// One sequence: q, k and v with their strides, queries and keys, the output.
using Sequence = std::tuple<Ints<4>, Ints<4>, Ints<4>, int64_t, int64_t, uintptr_t>;

JointAttention::Sequence sequence(const Sequence& s) {
  const auto& [q, k, v, queries, keys, output] = s;
  return {in(q[0]),           in(k[0]), in(v[0]), {q[1], q[2], q[3]}, {k[1], k[2], k[3]},
          {v[1], v[2], v[3]}, queries,  keys,     out(output)};
}

// sizes: batch, heads, width
void run_joint_attention(int dtype, const Sequence& picture, const Sequence& text,
                         uintptr_t text_bias, const Ints<3>& sizes, float scale) {
  const JointAttention p{dtype,    sequence(picture), sequence(text),
                         static_cast<const float*>(in(text_bias)),
                         sizes[0], sizes[1],          sizes[2],       scale};
  run(p);
}

// One row per sample: its address, and the stride between rows.
using Rows = std::pair<uintptr_t, int64_t>;

// sizes: batch, pixels, channels, groups
void run_group_norm(int dtype, uintptr_t x, const Rows& row, uintptr_t residual, uintptr_t weight,
                    uintptr_t bias, const Rows& scale_shift, const Ints<4>& sizes, float eps,
                    int act, uintptr_t y, uintptr_t total) {
  if (act != kNone && act != kSilu && act != kGelu)
    throw std::invalid_argument("group_norm: there is no activation " + std::to_string(act));
  const GroupNorm p{dtype,    in(x),      in(row.first), in(residual),
                    in(weight), in(bias), in(scale_shift.first), row.second,
                    scale_shift.second, sizes[0], sizes[1], sizes[2],
                    sizes[3], eps,        act,           out(y),
                    out(total)};
  run(p);
}

// sizes: samples of the residual, batch, tokens, width
void run_ada_norm(int dtype, uintptr_t x, uintptr_t weight, uintptr_t bias, const Rows& scale,
                  const Rows& shift, const Rows& gate, uintptr_t residual, const Ints<4>& sizes,
                  float eps, bool rms, uintptr_t y, uintptr_t total) {
  const AdaNorm p{dtype,          in(x),          in(weight),  in(bias),     in(scale.first),
                  in(shift.first), in(gate.first), scale.second, shift.second, gate.second,
                  in(residual),   sizes[0],       sizes[1],    sizes[2],     sizes[3],
                  eps,            rms,            out(y),      out(total)};
  run(p);
}

void run_qk_norm(int dtype, const Ints<4>& q, const Ints<4>& k, uintptr_t q_weight,
                 uintptr_t k_weight, uintptr_t cos, uintptr_t sin, const Ints<4>& sizes,
                 float eps, uintptr_t q_out, uintptr_t k_out) {
  const QkNorm p{dtype,
                 in(q[0]),
                 in(k[0]),
                 in(q_weight),
                 in(k_weight),
                 static_cast<const float*>(in(cos)),
                 static_cast<const float*>(in(sin)),
                 {q[1], q[2], q[3]},
                 {k[1], k[2], k[3]},
                 sizes[0],
                 sizes[1],
                 sizes[2],
                 sizes[3],
                 eps,
                 out(q_out),
                 out(k_out)};
  run(p);
}

// sizes: batch, tokens, width, then how often a pixel is repeated and the columns of a picture
void run_residual(int dtype, uintptr_t x, uintptr_t other, uintptr_t shift, const Rows& gate,
                  const Ints<5>& sizes, float scale, uintptr_t y) {
  const Residual p{dtype,       in(x),    in(other), in(shift), in(gate.first), gate.second,
                   sizes[0],    sizes[1], sizes[2],  sizes[3],  sizes[4],       scale,
                   out(y)};
  run(p);
}

void run_mean_pool(int dtype, uintptr_t x, const Ints<4>& shape, uintptr_t y) {
  run(MeanPool{dtype, in(x), shape[0], shape[1], shape[2], shape[3], out(y)});
}

// sizes: rows, width, rows per slab
void run_moments(int dtype, uintptr_t x, const Ints<3>& sizes, uintptr_t output) {
  run(SlabMoments{dtype, in(x), sizes[0], sizes[1], sizes[2], static_cast<float*>(out(output))});
}

// sizes: rows, width
void run_line_silu(int dtype, uintptr_t x, uintptr_t line, const Ints<2>& sizes, bool silu,
                   uintptr_t y) {
  run(LineSilu{dtype, in(x), static_cast<const float*>(in(line)), sizes[0], sizes[1], silu, out(y)});
}

// extra: noise, mask, original, original_noise
void run_guided_step(int dtype, uintptr_t output, uintptr_t table, uintptr_t step,
                     const std::array<uintptr_t, 4>& extra, const Ints<7>& sizes, uintptr_t sample,
                     uintptr_t history, uintptr_t next, uintptr_t limits) {
  const auto floats = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
  const GuidedStep p{dtype,
                     in(output),
                     floats(table),
                     static_cast<const int64_t*>(in(step)),
                     floats(extra[0]), floats(extra[1]), floats(extra[2]), floats(extra[3]),
                     sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                     floats(sample),
                     floats(history),
                     out(next),
                     floats(limits)};
  run(p);
}

// counts: rows, bytes per row of each, rows of the second
void run_concat(uintptr_t first, uintptr_t second, const Ints<4>& counts, uintptr_t output) {
  run(Concat{static_cast<const char*>(in(first)), static_cast<const char*>(in(second)), counts[0],
             counts[1], counts[2], counts[3], static_cast<char*>(out(output))});
}

#if defined(FASTDIFF_CUDA)
void run_cuda_group_norm_silu(int dtype, bool vector,
                              const std::array<uintptr_t, cuda::kAddresses>& addresses,
                              const Ints<cuda::kSizes>& sizes, float eps, bool silu, int device,
                              uintptr_t stream) {
  const auto arguments = cuda::group_norm_silu(addresses.data(), sizes.data(), eps, silu);
  if (const char* error = cuda::start(arguments, dtype, vector, device, stream))
    throw std::runtime_error(std::string("group_norm_silu: CUDA says: ") + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastdiff; see csrc/kernels.h for what each argument means.";
  m.def("isa", [] { return std::string(chosen->isa); }, "The instruction set in use.");
  m.def("isas", &isas, "Instruction sets that this build holds and this processor runs.");
  m.def("set_isa", &set_isa, "Use another of isas(); for tests.");
  m.def("threads", &num_threads, "Threads a kernel called now would use.");
  m.def("thread_runtime", [] { return std::string(thread_runtime()); });
  py::list kernels;
  const auto kernel = [&](const char* name, auto function) {
    m.def(name, function);
    kernels.append(name);
  };
  kernel("conv", &run_conv);
  kernel("attention", &run_attention);
  kernel("group_norm", &run_group_norm);
  kernel("joint_attention", &run_joint_attention);
  kernel("ada_norm", &run_ada_norm);
  kernel("qk_norm", &run_qk_norm);
  kernel("residual", &run_residual);
  kernel("mean_pool", &run_mean_pool);
  kernel("moments", &run_moments);
  kernel("line_silu", &run_line_silu);
  kernel("guided_step", &run_guided_step);
  kernel("concat", &run_concat);
  m.attr("KERNELS") = kernels;
#if defined(FASTDIFF_CUDA)
  m.def("cuda_group_norm_silu", &run_cuda_group_norm_silu);
#endif
  py::class_<Tape>(m, "Tape")
      .def(py::init<>())
      .def("start", &Tape::start)
      .def("stop", &Tape::stop)
      .def("run", &Tape::run, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &Tape::size);
  py::class_<Watch>(m, "Watch", py::custom_type_setup(&Watch::collected))
      .def(py::init<std::vector<std::tuple<py::dict, py::object, py::object>>,
                    std::vector<py::object>, std::vector<py::dict>>())
      .def("intact", &Watch::intact);
}
