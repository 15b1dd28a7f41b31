// csrc/batch_norm.cuh, batch_norm_gradient.cuh and batch_norm_merge.cuh for NumPy: maps come as arrays in
// (N, C, T, H, W) order with channels side by side, 16-bit types as their bits. With ONLY_BFLOAT16 the other types are
// left out, for builds that are made once and thrown away.
#include "batch_norm.cuh"

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "batch_norm_gradient.cuh"
#include "module.h"

using namespace slowfast_ext;
using emulator::Array;

namespace {

PixelMap pixel_map(const Array& map) {
  if (map.is_none()) return {};
  return {const_cast<void*>(map.data()), map.strides(4) / map.itemsize()};
}

const float* vector(const Array& array) { return static_cast<const float*>(array.data()); }

template <typename Element>
void launch(const std::string& pass, const BatchNormParameters& p) {
  if (pass == "statistics") return launch_batch_norm_statistics<Element>(p, nullptr);
  if (pass == "apply") return launch_batch_norm_apply<Element>(p, nullptr);
  if (pass == "reduce_gradient") return launch_batch_norm_reduce_gradient<Element>(p, nullptr);
  if (pass == "apply_gradient") return launch_batch_norm_apply_gradient<Element>(p, nullptr);
  throw std::invalid_argument("pass must be statistics, apply, reduce_gradient or apply_gradient, got " + pass);
}

// One of the passes; None stands for what it does not have. Vectors of groups are (groups, channels). A thread has
// `thread_rows` rows, by default as planned.
void batch_norm(const std::string& pass, const std::string& type, int groups, int thread_rows, bool relu,
                const Array& x, const Array& residual, const Array& y, const Array& grad, const Array& grad_x,
                const Array& grad_residual, const Array& mean, const Array& inverse_std, const Array& weight,
                const Array& bias, const Array& mean_grad, const Array& mean_grad_normalized, const Array& first,
                const Array& second) {
  const Array& map = x.is_none() ? grad : x;
  BatchNormParameters p{};
  p.x = pixel_map(x);
  p.residual = pixel_map(residual);
  p.y = pixel_map(y);
  p.grad = pixel_map(grad);
  p.grad_x = pixel_map(grad_x);
  p.grad_residual = pixel_map(grad_residual);
  p.mean = vector(mean);
  p.inverse_std = vector(inverse_std);
  p.weight = vector(weight);
  p.bias = vector(bias);
  p.mean_grad = vector(mean_grad);
  p.mean_grad_normalized = vector(mean_grad_normalized);
  p.first = const_cast<float*>(vector(first));
  p.second = const_cast<float*>(vector(second));
  p.channels = map.shape(1);
  p.groups = groups;
  p.clip_pixels = map.shape(2) * map.shape(3) * map.shape(4);
  p.rows = map.shape(0) / groups * p.clip_pixels;
  p.relu = relu;
  plan_batch_norm(p, map.itemsize());
  if (thread_rows) {
    p.rows_per_block = kBatchNormThreads / p.columns * thread_rows;
    p.blocks = ceil_div(p.rows, p.rows_per_block);
  }
  const float unwritten = std::numeric_limits<float>::quiet_NaN();
  std::vector<float2> partials(size_t(groups) * p.blocks * p.channels, make_float2(unwritten, unwritten));
  p.partials = partials.data();
  if (type == "bfloat16") launch<bfloat16>(pass, p);
#ifndef ONLY_BFLOAT16
  if (type == "float16") launch<float16>(pass, p);
  if (type == "float32") launch<float>(pass, p);
#endif
}

// Partials (groups, blocks, channels, 2).
void merge_statistics(const Array& partials, int rows, int rows_per_block, const Array& mean, const Array& variance) {
  launch_merge_statistics(static_cast<const float2*>(partials.data()), static_cast<float*>(mean.mutable_data()),
                          static_cast<float*>(variance.mutable_data()), partials.shape(0), partials.shape(1),
                          partials.shape(2), rows, rows_per_block, nullptr);
}

}  // namespace

EMULATED_MODULE(module) {
  module.def("batch_norm", &batch_norm);
  module.def("merge_statistics", &merge_statistics);
}
