// Host side of conv3d_bn_relu: checks, layouts, dispatch. What the operator means is in
// slowfast_ext/ops/conv3d_bn_relu.py.
#include <optional>

#include "checks.h"
#include "common.h"
#include "conv3d_bn_relu.cuh"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "conv3d_bn_relu";

Sizes output_shape(const Tensor& x, const Tensor& weight, const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(x.dim() == 5, "conv3d_bn_relu: x must be (N, C, T, H, W), got ", shape_of(x));
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(1) == x.size(1) && weight.size(0) > 0 && weight.size(1) > 0,
                  "conv3d_bn_relu: weight must be (K, ", x.size(1), ", kernel_t, kernel_h, kernel_w), got ",
                  shape_of(weight));
  STD_TORCH_CHECK(stride.size() == 3 && stride[0] > 0 && stride[1] > 0 && stride[2] > 0,
                  "conv3d_bn_relu: stride must be three positive integers, got ", text_of(stride));
  STD_TORCH_CHECK(padding.size() == 3 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0,
                  "conv3d_bn_relu: padding must be three integers of at least 0, got ", text_of(padding));
  Sizes shape = {x.size(0), weight.size(0)};
  for (int i = 0; i < 3; ++i) {
    const int64_t padded = x.size(2 + i) + 2 * padding[i];
    STD_TORCH_CHECK(weight.size(2 + i) > 0 && padded >= weight.size(2 + i),
                    "conv3d_bn_relu: the kernel must fit into the padded input, got kernel ", weight.size(2 + i),
                    " for ", padded, " elements in dimension ", 2 + i);
    shape.push_back((padded - weight.size(2 + i)) / stride[i] + 1);
  }
  return shape;
}

void launch(const Conv3dParameters& p, bool allow_tf32, const Tensor& x) {
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const Conv3dPlan plan = plan_conv3d_bn_relu(p, element_size(x), multiprocessors);
  // Freed after the launch, but only to the allocator of this stream: no later use can overtake the kernels.
  std::optional<Tensor> partial;
  if (plan.splits > 1) {
    partial = torch::stable::empty({partial_size(p, plan.splits)}, ScalarType::Float, std::nullopt, x.device());
  }
  float* sums = partial ? partial->mutable_data_ptr<float>() : nullptr;
  const cudaStream_t stream = current_stream(x);
  if (x.scalar_type() == ScalarType::BFloat16) {
    launch_conv3d_bn_relu<HalfMath<bfloat16>>(p, plan, sums, stream);
  } else if (x.scalar_type() == ScalarType::Half) {
    launch_conv3d_bn_relu<HalfMath<float16>>(p, plan, sums, stream);
  } else if (allow_tf32) {
    launch_conv3d_bn_relu<Tf32Math>(p, plan, sums, stream);
  } else {
    launch_conv3d_bn_relu<SplitTf32Math>(p, plan, sums, stream);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void conv3d_bn_relu_out(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                        const std::optional<Tensor>& residual_, Sizes stride, Sizes padding, bool relu, bool allow_tf32,
                        Tensor out) {
  const Sizes shape = output_shape(x_, weight_, stride, padding);
  const ScalarType dtype = x_.scalar_type();
  check_capability(x_, kName);
  check_dtype(x_, kName);
  check_like(weight_, kName, "weight", x_);
  check_like(out, kName, "out", x_);
  check_shape(out, kName, "out", shape);
  const int64_t y_pitch = pixel_pitch(out);
  STD_TORCH_CHECK(y_pitch > 0,
                  "conv3d_bn_relu: out must be channels_last_3d or a slice of the channels of such a tensor");
  if (bias_) check_vector(*bias_, kName, "bias", x_, shape[1]);
  if (residual_) {
    check_like(*residual_, kName, "residual", x_);
    check_shape(*residual_, kName, "residual", shape);
  }
  if (out.numel() == 0) return;
  const DeviceGuard guard(x_.get_device_index());

  // Named, so that they outlive the launch. Any strides do for x, but channels far apart are gathered slowly: copy
  // once unless there are only few, as in a stem.
  const int64_t element = element_size(x_);
  const Tensor x = x_.stride(1) != 1 && x_.size(1) * element >= 16 ? channels_last(x_) : x_;
  const Tensor weight = channels_last(weight_);
  const Tensor bias = bias_ ? torch::stable::contiguous(*bias_) : weight;
  const Tensor residual = !residual_ ? weight : pixel_pitch(*residual_) > 0 ? *residual_ : channels_last(*residual_);

  Conv3dParameters p{};
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = bias_ ? bias.const_data_ptr<float>() : nullptr;
  p.residual = residual_ ? residual.data_ptr() : nullptr;
  p.y = out.data_ptr();
  p.x_stride_n = x.stride(0);
  p.x_stride_c = x.stride(1);
  p.x_stride_t = x.stride(2);
  p.x_stride_h = x.stride(3);
  p.x_stride_w = x.stride(4);
  p.residual_pitch = residual_ ? pixel_pitch(residual) : 0;
  p.y_pitch = y_pitch;
  p.in_channels = checked_int(kName, x.size(1), "the number of input channels");
  p.in_t = checked_int(kName, x.size(2), "T");
  p.in_h = checked_int(kName, x.size(3), "H");
  p.in_w = checked_int(kName, x.size(4), "W");
  p.out_channels = checked_int(kName, shape[1], "the number of output channels");
  p.out_t = checked_int(kName, shape[2], "the output's T");
  p.out_h = checked_int(kName, shape[3], "the output's H");
  p.out_w = checked_int(kName, shape[4], "the output's W");
  p.kernel_t = checked_int(kName, weight.size(2), "kernel_t");
  p.kernel_h = checked_int(kName, weight.size(3), "kernel_h");
  p.kernel_w = checked_int(kName, weight.size(4), "kernel_w");
  p.stride_t = checked_int(kName, stride[0], "stride_t");
  p.stride_h = checked_int(kName, stride[1], "stride_h");
  p.stride_w = checked_int(kName, stride[2], "stride_w");
  p.padding_t = checked_int(kName, padding[0], "padding_t");
  p.padding_h = checked_int(kName, padding[1], "padding_h");
  p.padding_w = checked_int(kName, padding[2], "padding_w");
  p.pixels = checked_int(kName, shape[0] * shape[2] * shape[3] * shape[4], "the number of output pixels");
  p.reduction =
      checked_int(kName, weight.size(1) * weight.size(2) * weight.size(3) * weight.size(4), "the size of a filter");
  p.relu = relu;
  p.wide = is_wide(p, element);
  launch(p, allow_tf32, x);
}

Tensor conv3d_bn_relu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, Sizes stride, Sizes padding, bool relu, bool allow_tf32) {
  const Sizes shape = output_shape(x, weight, stride, padding);
  Tensor y = torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  MemoryFormat::ChannelsLast3d);
  conv3d_bn_relu_out(x, weight, bias, residual, stride, padding, relu, allow_tf32, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) {
  m.impl("conv3d_bn_relu", TORCH_BOX(&conv3d_bn_relu));
  m.impl("conv3d_bn_relu.out", TORCH_BOX(&conv3d_bn_relu_out));
}

}  // namespace slowfast_ext
