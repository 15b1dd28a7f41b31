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

float* output(const Array& array) { return const_cast<float*>(vector(array)); }

template <typename Element>
void launch(const std::string& pass, const BatchNormParameters& p, float* first, float* second, float* third,
            float eps) {
  if (pass == "statistics") return launch_batch_norm_statistics<Element>(p, {first, second, third, eps}, nullptr);
  if (pass == "apply") return launch_batch_norm_apply<Element>(p, nullptr);
  if (pass == "reduce_gradient") return launch_batch_norm_reduce_gradient<Element>(p, first, second, nullptr);
  if (pass == "apply_gradient") return launch_batch_norm_apply_gradient<Element>(p, nullptr);
  throw std::invalid_argument("pass must be statistics, apply, reduce_gradient or apply_gradient, got " + pass);
}

// One of the passes; None stands for what it does not have. Vectors of groups are (groups, channels). A thread has
// `thread_rows` rows, by default as planned. A reduction's results are `first` to `third`, in their order.
void batch_norm(const std::string& pass, const std::string& type, int groups, int thread_rows, bool relu,
                const Array& x, const Array& residual, const Array& y, const Array& grad, const Array& grad_x,
                const Array& grad_residual, const Array& mean, const Array& inverse_std, const Array& weight,
                const Array& bias, const Array& sum_grad, const Array& sum_grad_normalized, const Array& first,
                const Array& second, const Array& third, float count, float eps) {
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
  p.sum_grad = vector(sum_grad);
  p.sum_grad_normalized = vector(sum_grad_normalized);
  p.inverse_count = 1 / count;
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
  const auto run = [&](auto element) {
    launch<decltype(element)>(pass, p, output(first), output(second), output(third), eps);
  };
  if (type == "bfloat16") run(bfloat16());
#ifndef ONLY_BFLOAT16
  if (type == "float16") run(float16());
  if (type == "float32") run(float());
#endif
}

// Partials (groups, blocks, channels, 2).
void merge_statistics(const Array& partials, int rows, int rows_per_block, const Array& mean, const Array& variance,
                      const Array& inverse_std, float eps) {
  const BatchNormMergeParameters p{static_cast<const float2*>(partials.data()),
                                   static_cast<int>(partials.shape(0)),
                                   static_cast<int>(partials.shape(1)),
                                   static_cast<int>(partials.shape(2)),
                                   rows,
                                   rows_per_block};
  launch_batch_norm_merge<MergeMoments>(p, {output(mean), output(variance), output(inverse_std), eps}, nullptr);
}

}  // namespace

EMULATED_MODULE(module) {
  module.def("batch_norm", &batch_norm);
  module.def("merge_statistics", &merge_statistics);
}
