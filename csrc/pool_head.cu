// Host side of pool_head: checks, layouts, workspace, dispatch. What the operator means is in
// slowfast_ext/ops/pool_head.py.
#include <optional>

#include "checks.h"
#include "common.h"
#include "pool_head.cuh"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "pool_head";

void check_map(const Tensor& map, const char* name, const Sizes& window) {
  STD_TORCH_CHECK(map.dim() == 5, "pool_head: ", name, " must be (N, C, T, H, W), got ", shape_of(map));
  STD_TORCH_CHECK(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0 && map.size(4) > 0, "pool_head: ", name,
                  " must be at least one channel, frame, row and column, got ", shape_of(map));
  STD_TORCH_CHECK(window.empty() || (map.size(3) >= window[0] && map.size(4) >= window[1]), "pool_head: ", name,
                  " must be at least as large as the window ", text_of(window), ", got ", shape_of(map));
}

PathwayMap pathway_map(const Tensor& map, const Sizes& window) {
  PathwayMap result{};
  result.x = map.data_ptr();
  result.pixel_pitch = pixel_pitch(map);
  result.channels = checked_int(kName, map.size(1), "the number of channels");
  result.frames = checked_int(kName, map.size(2), "T");
  result.height = checked_int(kName, map.size(3), "H");
  result.width = checked_int(kName, map.size(4), "W");
  checked_int(kName, map.size(2) * map.size(3) * map.size(4) + 4096, "the number of pixels of a clip");
  result.window_h = window.empty() ? result.height : static_cast<int>(window[0]);
  result.window_w = window.empty() ? result.width : static_cast<int>(window[1]);
  return result;
}

void launch_average(const PoolHeadParameters& p, ScalarType dtype, cudaStream_t stream) {
  if (dtype == ScalarType::BFloat16) return launch_pool_head_average<bfloat16>(p, stream);
  if (dtype == ScalarType::Half) return launch_pool_head_average<float16>(p, stream);
  launch_pool_head_average<float>(p, stream);
}

void launch_classify(const PoolHeadParameters& p, ScalarType dtype, cudaStream_t stream) {
  if (dtype == ScalarType::BFloat16) return launch_pool_head_classify<bfloat16>(p, stream);
  if (dtype == ScalarType::Half) return launch_pool_head_classify<float16>(p, stream);
  launch_pool_head_classify<float>(p, stream);
}

Tensor pool_head(const Tensor& slow_, const Tensor& fast_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                 Sizes window, bool softmax_positions, int64_t views) {
  STD_TORCH_CHECK(window.empty() || (window.size() == 2 && window[0] > 0 && window[1] > 0),
                  "pool_head: window must be two positive integers or empty, got ", text_of(window));
  check_map(slow_, "slow", window);
  check_map(fast_, "fast", window);
  const Sizes like_slow = {slow_.size(0), fast_.size(1), fast_.size(2), window.empty() ? fast_.size(3) : slow_.size(3),
                           window.empty() ? fast_.size(4) : slow_.size(4)};
  check_shape(fast_, kName, "fast", like_slow);
  STD_TORCH_CHECK(weight_.dim() == 2 && weight_.size(0) > 0 && weight_.size(1) == slow_.size(1) + fast_.size(1),
                  "pool_head: weight must be (classes, ", slow_.size(1) + fast_.size(1), "), got ", shape_of(weight_));
  STD_TORCH_CHECK(views >= 0 && (views == 0 || slow_.size(0) % views == 0),
                  "pool_head: views must be 0 or a divisor of the batch size ", slow_.size(0), ", got ", views);
  check_dtype(slow_, kName);
  check_like(fast_, kName, "fast", slow_);
  check_dtype(weight_, kName);
  STD_TORCH_CHECK(weight_.is_cuda() && weight_.get_device_index() == slow_.get_device_index(),
                  "pool_head: weight must be on the device of slow, cuda:", slow_.get_device_index());
  if (bias_) check_vector(*bias_, kName, "bias", slow_, weight_.size(0));

  const DeviceGuard guard(slow_.get_device_index());
  const auto empty = [&](const Sizes& shape) {
    return torch::stable::empty(shape, ScalarType::Float, std::nullopt, slow_.device());
  };
  Tensor y = empty({views == 0 ? slow_.size(0) : slow_.size(0) / views, weight_.size(0)});
  if (y.numel() == 0) return y;

  // Named, so that they outlive the launches.
  const Tensor slow = pixel_pitch(slow_) > 0 ? slow_ : channels_last(slow_);
  const Tensor fast = pixel_pitch(fast_) > 0 ? fast_ : channels_last(fast_);
  const Tensor weight = torch::stable::contiguous(weight_);
  const Tensor bias = bias_ ? torch::stable::contiguous(*bias_) : weight;

  PoolHeadParameters p{};
  p.slow = pathway_map(slow, window);
  p.fast = pathway_map(fast, window);
  const int64_t windows = int64_t(p.slow.height - p.slow.window_h + 1) * (p.slow.width - p.slow.window_w + 1);
  const int64_t positions = softmax_positions ? windows : 1;
  const int64_t rows = slow.size(0) * positions;
  const bool softmax = softmax_positions || views > 0;
  const Tensor averages = empty({rows, weight.size(1)});
  const Tensor logits = softmax ? empty({rows, weight.size(0)}) : y;
  p.weight = weight.data_ptr();
  p.bias = bias_ ? bias.const_data_ptr<float>() : nullptr;
  p.averages = averages.mutable_data_ptr<float>();
  p.logits = logits.mutable_data_ptr<float>();
  p.y = y.mutable_data_ptr<float>();
  p.batch = checked_int(kName, slow.size(0), "N");
  p.classes = checked_int(kName, weight.size(0), "the number of classes");
  p.features = checked_int(kName, weight.size(1), "the number of features");
  checked_int(kName, rows * p.features, "N * positions * features");  // so the grids fit, too
  checked_int(kName, rows * p.classes, "N * positions * classes");
  p.positions = static_cast<int>(positions);
  p.group = softmax ? static_cast<int>(positions * (views == 0 ? 1 : views)) : 0;
  p.logarithm = views == 0;
  const cudaStream_t stream = current_stream(slow);
  launch_average(p, slow.scalar_type(), stream);
  launch_classify(p, weight.scalar_type(), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) { m.impl("pool_head", TORCH_BOX(&pool_head)); }

}  // namespace slowfast_ext
