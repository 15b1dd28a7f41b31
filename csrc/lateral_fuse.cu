// Host side of lateral_fuse: checks, layouts, dispatch. What the operator means is in slowfast_ext/ops/lateral_fuse.py.
#include <optional>

#include "checks.h"
#include "common.h"
#include "lateral_fuse.cuh"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "lateral_fuse";

Sizes output_shape(const Tensor& fast, const Tensor& weight, int64_t stride) {
  STD_TORCH_CHECK(fast.dim() == 5, "lateral_fuse: fast must be (N, C, T, H, W), got ", shape_of(fast));
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(0) > 0 && weight.size(1) > 0 && weight.size(1) == fast.size(1) &&
                      weight.size(2) % 2 == 1 && weight.size(3) == 1 && weight.size(4) == 1,
                  "lateral_fuse: weight must be (K, ", fast.size(1), ", an odd number, 1, 1), got ", shape_of(weight));
  STD_TORCH_CHECK(stride > 0, "lateral_fuse: stride must be positive, got ", stride);
  STD_TORCH_CHECK(fast.size(2) > 0, "lateral_fuse: fast must be at least one frame, got ", shape_of(fast));
  return {fast.size(0), weight.size(0), (fast.size(2) - 1) / stride + 1, fast.size(3), fast.size(4)};
}

void check_operands(const Tensor& fast, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_dtype(fast, kName);
  check_like(weight, kName, "weight", fast);
  if (bias) check_vector(*bias, kName, "bias", fast, weight.size(0));
}

void launch(const LateralParameters& p, ScalarType dtype, bool allow_tf32, const Tensor& fast) {
  int multiprocessors = 0, shared = 0;
  const int device = fast.get_device_index();
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const cudaStream_t stream = current_stream(fast);
  if (dtype == ScalarType::BFloat16) {
    launch_lateral_fuse<HalfMath<bfloat16>>(p, multiprocessors, shared, stream);
  } else if (dtype == ScalarType::Half) {
    launch_lateral_fuse<HalfMath<float16>>(p, multiprocessors, shared, stream);
  } else if (allow_tf32) {
    launch_lateral_fuse<Tf32Math>(p, multiprocessors, shared, stream);
  } else {
    launch_lateral_fuse<SplitTf32Math>(p, multiprocessors, shared, stream);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Convolve into y; copy slow, if there is one, to slow_y, whose pixels are those of y.
void run(const Tensor* slow_, void* slow_y, const Tensor& fast_, const Tensor& weight_,
         const std::optional<Tensor>& bias_, int64_t stride, bool relu, bool allow_tf32, void* y, int64_t y_pitch) {
  const DeviceGuard guard(fast_.get_device_index());
  // Named, so that they outlive the launch.
  const Tensor fast = pixel_pitch(fast_) > 0 ? fast_ : channels_last(fast_);
  const Tensor weight = channels_last(weight_);
  const Tensor bias = bias_ ? torch::stable::contiguous(*bias_) : weight;
  const Tensor slow = !slow_ ? fast : pixel_pitch(*slow_) > 0 ? *slow_ : channels_last(*slow_);

  LateralParameters p{};
  p.fast = fast.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = bias_ ? bias.const_data_ptr<float>() : nullptr;
  p.y = y;
  p.fast_pitch = pixel_pitch(fast);
  p.y_pitch = y_pitch;
  if (slow_) {
    p.slow = slow.data_ptr();
    p.slow_y = slow_y;
    p.slow_pitch = pixel_pitch(slow);
    p.slow_channels = checked_int(kName, slow.size(1), "the number of channels of slow");
  }
  p.batch = checked_int(kName, fast.size(0), "N");
  p.area = checked_int(kName, fast.size(3) * fast.size(4), "H * W");
  checked_int(kName, fast.size(2) + weight.size(2), "T and the kernel together");
  p.in_frames = static_cast<int>(fast.size(2));
  p.stride = checked_int(kName, stride, "stride");
  p.out_frames = (p.in_frames - 1) / p.stride + 1;
  p.in_channels = checked_int(kName, fast.size(1), "the number of channels of fast");
  p.out_channels = checked_int(kName, weight.size(0), "the number of output channels");
  p.taps = static_cast<int>(weight.size(2));
  p.padding = p.taps / 2;
  p.relu = relu;
  checked_int(kName, weight.size(1) * weight.size(2), "the size of a filter");
  checked_int(kName, y_pitch * kLateralPixels, "the distance of 128 output pixels");
  checked_int(kName, fast.size(0) * p.out_frames * fast.size(3) * fast.size(4), "the number of output pixels");
  launch(p, fast.scalar_type(), allow_tf32, fast);
}

void lateral_fuse_out(const Tensor& fast, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                      bool relu, bool allow_tf32, Tensor out) {
  const Sizes shape = output_shape(fast, weight, stride);
  check_operands(fast, weight, bias);
  check_like(out, kName, "out", fast);
  check_shape(out, kName, "out", shape);
  STD_TORCH_CHECK(pixel_pitch(out) > 0,
                  "lateral_fuse: out must be channels_last_3d or a slice of the channels of such a tensor");
  if (out.numel() == 0) return;
  run(nullptr, nullptr, fast, weight, bias, stride, relu, allow_tf32, out.data_ptr(), pixel_pitch(out));
}

Tensor lateral_fuse(const Tensor& slow, const Tensor& fast, const Tensor& weight, const std::optional<Tensor>& bias,
                    int64_t stride, bool relu, bool allow_tf32) {
  Sizes shape = output_shape(fast, weight, stride);
  STD_TORCH_CHECK(slow.dim() == 5 && slow.size(1) > 0, "lateral_fuse: slow must be (N, C, T, H, W), got ",
                  shape_of(slow));
  const int64_t slow_channels = slow.size(1), lateral_channels = shape[1];
  shape[1] = slow_channels;
  check_shape(slow, kName, "slow", shape);
  check_operands(fast, weight, bias);
  check_like(slow, kName, "slow", fast);
  shape[1] += lateral_channels;
  Tensor y = torch::stable::empty(shape, fast.scalar_type(), std::nullopt, fast.device(), std::nullopt,
                                  MemoryFormat::ChannelsLast3d);
  if (y.numel() == 0) return y;
  unsigned char* slow_y = static_cast<unsigned char*>(y.data_ptr());
  unsigned char* lateral_y = slow_y + slow_channels * element_size(fast);
  run(&slow, slow_y, fast, weight, bias, stride, relu, allow_tf32, lateral_y, shape[1]);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) {
  m.impl("lateral_fuse", TORCH_BOX(&lateral_fuse));
  m.impl("lateral_fuse.out", TORCH_BOX(&lateral_fuse_out));
}

}  // namespace slowfast_ext
