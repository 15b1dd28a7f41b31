// Host side of stem: checks, layouts, dispatch. What the operator means is in slowfast_ext/ops/stem.py.
#include <optional>

#include "checks.h"
#include "common.h"
#include "stem.cuh"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "stem";

Sizes output_shape(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& frames) {
  const bool raw = x.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(x.dim() == 5 && x.size(raw ? 4 : 1) == 3,
                  "stem: x must be (N, T, H, W, 3) in uint8 or (N, 3, T, H, W), got ", shape_of(x));
  const bool filters = weight.dim() == 5 && weight.size(0) > 0 && weight.size(0) % 8 == 0 && weight.size(1) == 3 &&
                       (weight.size(2) == 1 || weight.size(2) == 5) && weight.size(3) == 7 && weight.size(4) == 7;
  STD_TORCH_CHECK(filters,
                  "stem: weight must be (K, 3, kernel_t, 7, 7) with K a multiple of 8 and kernel_t 1 or 5, got ",
                  shape_of(weight));
  const int64_t height = x.size(raw ? 2 : 3), width = x.size(raw ? 3 : 4);
  int64_t length = x.size(raw ? 1 : 2);
  STD_TORCH_CHECK(length > 0 && height > 0 && width > 0, "stem: x must be of at least one frame and pixel, got ",
                  shape_of(x));
  if (frames) {
    STD_TORCH_CHECK(frames->dim() == 1 && frames->size(0) > 0, "stem: frames must be (T',) with T' > 0, got ",
                    shape_of(*frames));
    length = frames->size(0);
  }
  return {x.size(0), weight.size(0), length, (height + 3) / 4, (width + 3) / 4};
}

void check_types(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& frames,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "stem: weight must be float32, float16 or bfloat16 on CUDA, got another dtype");
  const bool raw = x.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(raw || x.scalar_type() == dtype, "stem: x must be uint8 or in the dtype of weight");
  STD_TORCH_CHECK(scale.has_value() == raw && shift.has_value() == raw,
                  "stem: scale and shift must be given for uint8 and for no other dtype of x");
  STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == x.get_device_index(),
                  "stem: weight must be on the device of x, cuda:", x.get_device_index());
  if (frames) {
    STD_TORCH_CHECK(frames->is_cuda() && frames->get_device_index() == x.get_device_index(),
                    "stem: frames must be on the device of x, cuda:", x.get_device_index());
    STD_TORCH_CHECK(frames->scalar_type() == ScalarType::Int || frames->scalar_type() == ScalarType::Long,
                    "stem: frames must be int32 or int64");
  }
}

void launch(const StemParameters& p, ScalarType dtype, const Tensor& x) {
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const cudaStream_t stream = current_stream(x);
  if (dtype == ScalarType::BFloat16) {
    launch_stem<HalfMath<bfloat16>>(p, multiprocessors, stream);
  } else if (dtype == ScalarType::Half) {
    launch_stem<HalfMath<float16>>(p, multiprocessors, stream);
  } else {
    launch_stem<SplitTf32Math>(p, multiprocessors, stream);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void stem_out(const Tensor& x, const Tensor& weight_, const std::optional<Tensor>& bias_,
              const std::optional<Tensor>& frames_, const std::optional<Tensor>& scale_,
              const std::optional<Tensor>& shift_, Tensor out) {
  const Sizes shape = output_shape(x, weight_, frames_);
  check_types(x, weight_, frames_, scale_, shift_);
  check_capability(x, kName);
  if (bias_) check_vector(*bias_, kName, "bias", x, shape[1]);
  if (scale_) check_vector(*scale_, kName, "scale", x, 3);
  if (shift_) check_vector(*shift_, kName, "shift", x, 3);
  check_shape(out, kName, "out", shape);
  STD_TORCH_CHECK(
      out.is_cuda() && out.get_device_index() == x.get_device_index() && out.scalar_type() == weight_.scalar_type(),
      "stem: out must be in the dtype of weight on the device of x, cuda:", x.get_device_index());
  const int64_t y_pitch = pixel_pitch(out);
  STD_TORCH_CHECK(y_pitch > 0, "stem: out must be channels_last_3d or a slice of the channels of such a tensor");
  if (out.numel() == 0) return;
  const DeviceGuard guard(x.get_device_index());

  // Named, so that they outlive the launch.
  const Tensor weight = channels_last(weight_);
  const auto vector = [&](const std::optional<Tensor>& tensor) {
    return tensor ? torch::stable::contiguous(*tensor) : weight;
  };
  const Tensor bias = vector(bias_), frames = vector(frames_), scale = vector(scale_), shift = vector(shift_);

  StemParameters p{};
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = bias_ ? bias.const_data_ptr<float>() : nullptr;
  p.scale = scale_ ? scale.const_data_ptr<float>() : nullptr;
  p.shift = shift_ ? shift.const_data_ptr<float>() : nullptr;
  p.frames = frames_ ? frames.data_ptr() : nullptr;
  p.y = out.data_ptr();
  p.bytes = x.scalar_type() == ScalarType::Byte;
  p.long_indices = frames_ && frames.scalar_type() == ScalarType::Long;
  const int t = p.bytes ? 1 : 2;  // where time, height and width begin
  p.x_stride_n = x.stride(0);
  p.x_stride_c = x.stride(p.bytes ? 4 : 1);
  p.x_stride_t = x.stride(t);
  p.x_stride_h = x.stride(t + 1);
  p.x_stride_w = x.stride(t + 2);
  p.y_pitch = y_pitch;
  p.batch = checked_int(kName, shape[0], "N");
  p.in_t = checked_int(kName, x.size(t), "T");
  p.in_h = checked_int(kName, x.size(t + 1), "H");
  p.in_w = checked_int(kName, x.size(t + 2), "W");
  p.channels = checked_int(kName, shape[1], "the number of output channels");
  p.kernel_t = static_cast<int>(weight.size(2));
  p.out_t = checked_int(kName, shape[2], "the output's T");
  p.out_h = static_cast<int>(shape[3]);
  p.out_w = static_cast<int>(shape[4]);
  p.conv_h = (p.in_h + 1) / 2;
  p.conv_w = (p.in_w + 1) / 2;
  p.vector = is_aligned(p.y, 16) && y_pitch * element_size(out) % 16 == 0;
  checked_int(kName, shape[0] * shape[1] * shape[2] * shape[3] * shape[4], "the number of output elements");
  launch(p, weight.scalar_type(), x);
}

Tensor stem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& frames, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& shift) {
  const Sizes shape = output_shape(x, weight, frames);
  Tensor y = torch::stable::empty(shape, weight.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  MemoryFormat::ChannelsLast3d);
  stem_out(x, weight, bias, frames, scale, shift, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) {
  m.impl("stem", TORCH_BOX(&stem));
  m.impl("stem.out", TORCH_BOX(&stem_out));
}

}  // namespace slowfast_ext
