// Compiled once per instruction set (see CMakeLists.txt); FASTDIFF_ISA is its name and namespace.
#include <algorithm>

#include "attention.h"
#include "norm.h"
#include "rows.h"
#include "step.h"
#include "strips.h"
#include "winograd.h"

#define FASTDIFF_JOIN_(a, b) a##b
#define FASTDIFF_JOIN(a, b) FASTDIFF_JOIN_(a, b)
#define FASTDIFF_TEXT_(a) #a
#define FASTDIFF_TEXT(a) FASTDIFF_TEXT_(a)

namespace FASTDIFF_ISA {

template <typename Args, void (*in_float)(const Args&), void (*in_bf16)(const Args&)>
static void by_dtype(const Args& args) {
  args.dtype == fastdiff::kBFloat16 ? in_bf16(args) : in_float(args);
}

}  // namespace FASTDIFF_ISA

namespace fastdiff {

const Kernels& FASTDIFF_JOIN(kernels_, FASTDIFF_ISA)() {
  using namespace FASTDIFF_ISA;
  static const Kernels kernels{
      FASTDIFF_TEXT(FASTDIFF_ISA),
      by_dtype<Conv, convolve<float>, convolve<bf16>>,
      by_dtype<Attention, attention<float>, attention<bf16>>,
      by_dtype<GroupNorm, group_norm<float>, group_norm<bf16>>,
      by_dtype<JointAttention, joint_attention<float>, joint_attention<bf16>>,
      by_dtype<AdaNorm, ada_norm<float>, ada_norm<bf16>>,
      by_dtype<QkNorm, qk_norm<float>, qk_norm<bf16>>,
      by_dtype<Residual, residual<float>, residual<bf16>>,
      by_dtype<MeanPool, mean_pool<float>, mean_pool<bf16>>,
      by_dtype<SlabMoments, moments<float>, moments<bf16>>,
      by_dtype<LineSilu, line_silu<float>, line_silu<bf16>>,
      by_dtype<GuidedStep, guided_step<float>, guided_step<bf16>>,
  };
  return kernels;
}

}  // namespace fastdiff
