// csrc/lateral_fuse.cuh for NumPy: tensors come as arrays in (N, C, T, H, W) order with channels side by side, 16-bit
// types as their bits. With ONLY_BFLOAT16 the other types are left out, for builds that are made once and thrown away.
#include "lateral_fuse.cuh"

#include <stdexcept>
#include <string>
#include <utility>

#include "module.h"

using namespace slowfast_ext;
using emulator::Array;

namespace {

int64_t pitch(const Array& array) { return array.strides(4) / array.itemsize(); }

// y is the lateral part; slow and slow_y are None where slow is not copied.
void lateral_fuse(const std::string& math, const Array& slow, const Array& fast, const Array& weight, const Array& bias,
                  const Array& slow_y, const Array& y, int stride, bool relu, int multiprocessors, int shared_limit) {
  LateralParameters p{};
  p.fast = fast.data();
  p.weight = weight.data();
  p.bias = static_cast<const float*>(bias.data());
  p.y = y.mutable_data();
  p.fast_pitch = pitch(fast);
  p.y_pitch = pitch(y);
  if (!slow.is_none()) {
    p.slow = slow.data();
    p.slow_y = slow_y.mutable_data();
    p.slow_pitch = pitch(slow);
    p.slow_channels = slow.shape(1);
  }
  p.batch = fast.shape(0);
  p.area = fast.shape(3) * fast.shape(4);
  p.in_frames = fast.shape(2);
  p.out_frames = y.shape(2);
  p.in_channels = fast.shape(1);
  p.out_channels = y.shape(1);
  p.taps = weight.shape(2);
  p.stride = stride;
  p.padding = p.taps / 2;
  p.relu = relu;
  if (math == "bfloat16") return launch_lateral_fuse<HalfMath<bfloat16>>(p, multiprocessors, shared_limit, nullptr);
#ifndef ONLY_BFLOAT16
  if (math == "float16") return launch_lateral_fuse<HalfMath<float16>>(p, multiprocessors, shared_limit, nullptr);
  if (math == "tf32") return launch_lateral_fuse<Tf32Math>(p, multiprocessors, shared_limit, nullptr);
  if (math == "float32") return launch_lateral_fuse<SplitTf32Math>(p, multiprocessors, shared_limit, nullptr);
#endif
  throw std::invalid_argument("not built for " + math);
}

}  // namespace

EMULATED_MODULE(module) { module.def("lateral_fuse", &lateral_fuse); }
