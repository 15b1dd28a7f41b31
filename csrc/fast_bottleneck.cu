// Host side of fast_bottleneck: checks, layouts, dispatch. What the operator means is in
// slowfast_ext/ops/fast_bottleneck.py.
#include <optional>

#include "checks.h"
#include "common.h"
#include "fast_bottleneck.cuh"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "fast_bottleneck";

void check_weight(const Tensor& weight, const char* name, const Tensor& x, const Sizes& shape) {
  check_like(weight, kName, name, x);
  check_shape(weight, kName, name, shape);
}

// Dense, channels last, and where it can be read in 16 bytes.
Tensor readable(const Tensor& weight) {
  const Tensor dense = channels_last(weight);
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

Sizes output_shape(const Tensor& x, const Tensor& weight_a, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 5 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0 && x.size(4) > 0,
                  "fast_bottleneck: x must be (N, C, T, H, W), not empty, got ", shape_of(x));
  STD_TORCH_CHECK(stride == 1 || stride == 2, "fast_bottleneck: stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(weight_a.dim() == 5 && weight_a.size(0) > 0, "fast_bottleneck: weight_a must be (M, ", x.size(1),
                  ", 3, 1, 1), got ", shape_of(weight_a));
  return {x.size(0), 4 * weight_a.size(0), x.size(2), (x.size(3) + stride - 1) / stride,
          (x.size(4) + stride - 1) / stride};
}

int attribute(cudaDeviceAttr name, const Tensor& x) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.get_device_index()));
  return value;
}

void launch(const FastBottleneckParameters& p, ScalarType dtype, int in_channels, int channels, int stride,
            const Tensor& x) {
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, x);
  const int shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, x);
  const auto launch =
      dtype == ScalarType::BFloat16 ? launch_fast_bottleneck<bfloat16> : launch_fast_bottleneck<float16>;
  const bool served = launch(p, in_channels, channels, stride, multiprocessors, shared_memory, current_stream(x));
  STD_TORCH_CHECK(served, "fast_bottleneck: in_channels, channels, stride must be those of a kernel that fits into ",
                  shared_memory, " bytes of shared memory, got (", in_channels, ", ", channels, ", ", stride,
                  "); see fast_bottleneck_reason_against");
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void fast_bottleneck_out(const Tensor& x_, const Tensor& weight_a_, const Tensor& bias_a_, const Tensor& weight_b_,
                         const Tensor& bias_b_, const Tensor& weight_c_, const Tensor& bias_c_,
                         const std::optional<Tensor>& weight_shortcut_, const std::optional<Tensor>& bias_shortcut_,
                         int64_t stride, Tensor out) {
  const Sizes shape = output_shape(x_, weight_a_, stride);
  const int64_t in_channels = x_.size(1), channels = weight_a_.size(0), out_channels = shape[1];
  check_capability(x_, kName);
  check_weight(weight_a_, "weight_a", x_, {channels, in_channels, 3, 1, 1});
  check_weight(weight_b_, "weight_b", x_, {channels, channels, 1, 3, 3});
  check_weight(weight_c_, "weight_c", x_, {out_channels, channels, 1, 1, 1});
  check_vector(bias_a_, kName, "bias_a", x_, channels);
  check_vector(bias_b_, kName, "bias_b", x_, channels);
  check_vector(bias_c_, kName, "bias_c", x_, out_channels);
  STD_TORCH_CHECK(
      weight_shortcut_.has_value() == bias_shortcut_.has_value(),
      "fast_bottleneck: bias_shortcut must be given exactly if weight_shortcut is, got one without the other");
  const bool identity_fits = stride == 1 && in_channels == out_channels;
  if (weight_shortcut_) {
    check_weight(*weight_shortcut_, "weight_shortcut", x_, {out_channels, in_channels, 1, 1, 1});
    check_vector(*bias_shortcut_, kName, "bias_shortcut", x_, out_channels);
    STD_TORCH_CHECK(!identity_fits,
                    "fast_bottleneck: weight_shortcut must be None on CUDA where the identity fits, got a projection");
  } else {
    STD_TORCH_CHECK(identity_fits, "fast_bottleneck: weight_shortcut must be given unless the stride is 1 and x has ",
                    out_channels, " channels, got None for stride ", stride, " and ", in_channels, " channels");
  }
  check_like(out, kName, "out", x_);
  check_shape(out, kName, "out", shape);
  const int64_t y_pitch = pixel_pitch(out);
  STD_TORCH_CHECK(y_pitch > 0,
                  "fast_bottleneck: out must be channels_last_3d or a slice of the channels of such a tensor");
  FastBottleneckParameters p{};
  p.batch = checked_int(kName, x_.size(0), "N");
  p.frames = checked_int(kName, x_.size(2), "T");
  p.in_h = checked_int(kName, x_.size(3), "H");
  p.in_w = checked_int(kName, x_.size(4), "W");
  p.out_h = checked_int(kName, shape[3], "the output's H");
  p.out_w = checked_int(kName, shape[4], "the output's W");
  checked_int(kName, x_.size(0) * x_.size(2) * x_.size(3) * x_.size(4), "the number of pixels of x");
  const int in = checked_int(kName, in_channels, "the number of input channels");
  const int inner = checked_int(kName, channels, "the number of inner channels");
  STD_TORCH_CHECK(x_.scalar_type() == ScalarType::Half || x_.scalar_type() == ScalarType::BFloat16,
                  "fast_bottleneck: x must be float16 or bfloat16 on CUDA, got another dtype");
  if (out.numel() == 0) return;
  const DeviceGuard guard(x_.get_device_index());

  // Named, so that they outlive the launch.
  const int64_t given_pitch = pixel_pitch(x_);
  const bool fits = given_pitch > 0 && given_pitch % 8 == 0 && reinterpret_cast<uintptr_t>(x_.data_ptr()) % 16 == 0;
  const Tensor x = fits ? x_ : given_pitch == in_channels ? torch::stable::clone(x_) : channels_last(x_);
  const Tensor weight_a = readable(weight_a_), weight_b = readable(weight_b_), weight_c = readable(weight_c_);
  const Tensor weight_shortcut = weight_shortcut_ ? readable(*weight_shortcut_) : weight_c;
  const Tensor bias_a = torch::stable::contiguous(bias_a_), bias_b = torch::stable::contiguous(bias_b_);
  const Tensor bias_c = torch::stable::contiguous(bias_c_);
  const Tensor bias_shortcut = bias_shortcut_ ? torch::stable::contiguous(*bias_shortcut_) : bias_c;
  p.x = x.data_ptr();
  p.weight_a = weight_a.data_ptr();
  p.weight_b = weight_b.data_ptr();
  p.weight_c = weight_c.data_ptr();
  p.weight_shortcut = weight_shortcut.data_ptr();
  p.bias_a = bias_a.const_data_ptr<float>();
  p.bias_b = bias_b.const_data_ptr<float>();
  p.bias_c = bias_c.const_data_ptr<float>();
  p.bias_shortcut = bias_shortcut.const_data_ptr<float>();
  p.y = out.data_ptr();
  p.x_pitch = pixel_pitch(x);
  p.y_pitch = y_pitch;
  p.wide = stores_in_chunks(p);

  launch(p, x.scalar_type(), in, inner, static_cast<int>(stride), x);
}

Tensor fast_bottleneck(const Tensor& x, const Tensor& weight_a, const Tensor& bias_a, const Tensor& weight_b,
                       const Tensor& bias_b, const Tensor& weight_c, const Tensor& bias_c,
                       const std::optional<Tensor>& weight_shortcut, const std::optional<Tensor>& bias_shortcut,
                       int64_t stride) {
  Tensor y = torch::stable::empty(output_shape(x, weight_a, stride), x.scalar_type(), std::nullopt, x.device(),
                                  std::nullopt, MemoryFormat::ChannelsLast3d);
  fast_bottleneck_out(x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, weight_shortcut, bias_shortcut, stride,
                      y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) {
  m.impl("fast_bottleneck", TORCH_BOX(&fast_bottleneck));
  m.impl("fast_bottleneck.out", TORCH_BOX(&fast_bottleneck_out));
}

}  // namespace slowfast_ext
