// csrc/pool_head.cuh for NumPy: features come as arrays in (N, C, T, H, W) order with channels side by side, 16-bit
// types as their bits. With ONLY_BFLOAT16 the other types are left out, for builds that are made once and thrown away.
#include "pool_head.cuh"

#include <array>
#include <stdexcept>
#include <string>

#include "module.h"

using namespace slowfast_ext;
using emulator::Array;

namespace {

PathwayMap pathway_map(const Array& x, std::array<int, 2> window) {
  PathwayMap map{};
  map.x = x.data();
  map.pixel_pitch = x.strides(4) / x.itemsize();
  map.channels = x.shape(1);
  map.frames = x.shape(2);
  map.height = x.shape(3);
  map.width = x.shape(4);
  map.window_h = window[0] ? window[0] : map.height;
  map.window_w = window[1] ? window[1] : map.width;
  return map;
}

// A window of (0, 0) is the whole map. The workspaces are results here, too.
void pool_head(const std::string& type, const std::string& weight_type, const Array& slow, const Array& fast,
               const Array& weight, const Array& bias, std::array<int, 2> window, int group, bool logarithm,
               const Array& averages, const Array& logits, const Array& y) {
  PoolHeadParameters p{};
  p.slow = pathway_map(slow, window);
  p.fast = pathway_map(fast, window);
  p.weight = weight.data();
  p.bias = static_cast<const float*>(bias.data());
  p.averages = static_cast<float*>(averages.mutable_data());
  p.logits = static_cast<float*>(logits.mutable_data());
  p.y = static_cast<float*>(y.mutable_data());
  p.batch = slow.shape(0);
  p.classes = weight.shape(0);
  p.features = weight.shape(1);
  p.positions = averages.shape(0) / slow.shape(0);
  p.group = group;
  p.logarithm = logarithm;
  if (type == "bfloat16") launch_pool_head_average<bfloat16>(p, nullptr);
#ifndef ONLY_BFLOAT16
  if (type == "float16") launch_pool_head_average<float16>(p, nullptr);
  if (type == "float32") launch_pool_head_average<float>(p, nullptr);
#endif
  if (weight_type == "bfloat16") launch_pool_head_classify<bfloat16>(p, nullptr);
#ifndef ONLY_BFLOAT16
  if (weight_type == "float16") launch_pool_head_classify<float16>(p, nullptr);
  if (weight_type == "float32") launch_pool_head_classify<float>(p, nullptr);
#endif
}

}  // namespace

EMULATED_MODULE(module) { module.def("pool_head", &pool_head); }
