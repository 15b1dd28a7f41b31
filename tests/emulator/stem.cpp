// csrc/stem.cuh for NumPy: x as (N, T, H, W, 3) in uint8 or (N, 3, T, H, W), 16-bit types as their bits, all with any
// strides. With ONLY_BFLOAT16 the other types are left out, for builds that are made once and thrown away.
#include "stem.cuh"

#include <stdexcept>
#include <string>

#include "module.h"

using namespace slowfast_ext;
using emulator::Array;

namespace {

void stem(const std::string& math, const Array& x, const Array& weight, const Array& bias, const Array& frames,
          const Array& scale, const Array& shift, const Array& y, int chunk, int multiprocessors) {
  const auto stride = [&](int dimension) { return x.strides(dimension) / x.itemsize(); };
  StemParameters p{};
  p.x = x.data();
  p.weight = weight.data();
  p.bias = static_cast<const float*>(bias.data());
  p.scale = static_cast<const float*>(scale.data());
  p.shift = static_cast<const float*>(shift.data());
  if (!frames.is_none()) {
    p.frames = frames.data();
    p.long_indices = frames.itemsize() == 8;
  }
  p.y = y.mutable_data();
  p.bytes = x.itemsize() == 1;
  const int t = p.bytes ? 1 : 2;
  p.x_stride_n = stride(0);
  p.x_stride_c = stride(p.bytes ? 4 : 1);
  p.x_stride_t = stride(t);
  p.x_stride_h = stride(t + 1);
  p.x_stride_w = stride(t + 2);
  p.y_pitch = y.strides(4) / y.itemsize();
  p.batch = x.shape(0);
  p.in_t = x.shape(t);
  p.in_h = x.shape(t + 1);
  p.in_w = x.shape(t + 2);
  p.channels = y.shape(1);
  p.kernel_t = weight.shape(2);
  p.conv_h = (p.in_h + 1) / 2;
  p.conv_w = (p.in_w + 1) / 2;
  p.out_t = y.shape(2);
  p.out_h = y.shape(3);
  p.out_w = y.shape(4);
  p.chunk = chunk;
  p.vector = is_aligned(p.y, 16) && p.y_pitch * y.itemsize() % 16 == 0;
  if (math == "bfloat16") return launch_stem<HalfMath<bfloat16>>(p, multiprocessors, nullptr);
#ifndef ONLY_BFLOAT16
  if (math == "float16") return launch_stem<HalfMath<float16>>(p, multiprocessors, nullptr);
  if (math == "float32") return launch_stem<SplitTf32Math>(p, multiprocessors, nullptr);
#endif
  throw std::invalid_argument("not built for " + math);
}

}  // namespace

EMULATED_MODULE(module) {
  module.def("stem", &stem);
  module.def("choose_chunk", &choose_chunk);
}
