// csrc/fast_bottleneck.cuh for NumPy: tensors come as arrays in (N, C, T, H, W) order, channels last, 16-bit types as
// their bits. With ONLY_BFLOAT16 the other type is left out, for builds that are made once and thrown away.
#include "fast_bottleneck.cuh"

#include <stdexcept>
#include <string>

#include "module.h"

using namespace slowfast_ext;
using emulator::Array;

namespace {

int64_t pitch(const Array& array) { return array.strides(4) / array.itemsize(); }

void fast_bottleneck(const std::string& dtype, const Array& x, const Array& weight_a, const Array& bias_a,
                     const Array& weight_b, const Array& bias_b, const Array& weight_c, const Array& bias_c,
                     const Array& weight_shortcut, const Array& bias_shortcut, const Array& y, int stride,
                     int frames_per_chunk, int multiprocessors, int shared_memory) {
  FastBottleneckParameters p{};
  p.x = x.data();
  p.weight_a = weight_a.data();
  p.weight_b = weight_b.data();
  p.weight_c = weight_c.data();
  p.weight_shortcut = weight_shortcut.data();
  p.bias_a = static_cast<const float*>(bias_a.data());
  p.bias_b = static_cast<const float*>(bias_b.data());
  p.bias_c = static_cast<const float*>(bias_c.data());
  p.bias_shortcut = static_cast<const float*>(bias_shortcut.data());
  p.y = y.mutable_data();
  p.x_pitch = pitch(x);
  p.y_pitch = pitch(y);
  p.batch = x.shape(0);
  p.frames = x.shape(2);
  p.in_h = x.shape(3);
  p.in_w = x.shape(4);
  p.out_h = y.shape(3);
  p.out_w = y.shape(4);
  p.frames_per_chunk = frames_per_chunk;
  p.wide = stores_in_chunks(p);
  const int in_channels = x.shape(1), channels = weight_a.shape(0);
  const auto launch = [&](auto element) {
    return launch_fast_bottleneck<decltype(element)>(p, in_channels, channels, stride, multiprocessors, shared_memory,
                                                     nullptr);
  };
  bool served = false;
  if (dtype == "bfloat16") served = launch(bfloat16{});
#ifndef ONLY_BFLOAT16
  if (dtype == "float16") served = launch(float16{});
#endif
  if (!served) throw std::invalid_argument("not served");
}

// The bytes of the tile that is chosen, 0 if there is none.
int shared_bytes(int in_channels, int channels, int stride, int shared_memory) {
  int bytes = 0;
  with_fast_bottleneck_tile(in_channels, channels, stride, shared_memory,
                            [&](auto tile) { bytes = FastBottleneckBlock<bfloat16, decltype(tile)>::kSharedBytes; });
  return bytes;
}

}  // namespace

EMULATED_MODULE(module) {
  module.def("fast_bottleneck", &fast_bottleneck);
  module.def("shared_bytes", &shared_bytes);
  module.def("choose_frames_per_chunk", &choose_frames_per_chunk);
}
