// What the host functions of conv3d_bn_relu and conv3d_bn_relu_pair share: checks, layouts, parameters of the kernels.
#pragma once

#include <optional>

#include "checks.h"
#include "common.h"
#include "conv3d_tile.cuh"

namespace slowfast_ext {

// What an operator calls the arguments of a convolution.
struct Conv3dNames {
  const char *weight = "weight", *bias = "bias", *stride = "stride", *padding = "padding", *out = "out";
};

inline Sizes conv3d_output_shape(const char* op, const Conv3dNames& names, const Tensor& x, const Tensor& weight,
                                 const Sizes& stride, const Sizes& padding) {
  STD_TORCH_CHECK(x.dim() == 5, op, ": x must be (N, C, T, H, W), got ", shape_of(x));
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(1) == x.size(1) && weight.size(0) > 0 && weight.size(1) > 0, op,
                  ": ", names.weight, " must be (K, ", x.size(1), ", kernel_t, kernel_h, kernel_w), got ",
                  shape_of(weight));
  STD_TORCH_CHECK(stride.size() == 3 && stride[0] > 0 && stride[1] > 0 && stride[2] > 0, op, ": ", names.stride,
                  " must be three positive integers, got ", text_of(stride));
  STD_TORCH_CHECK(padding.size() == 3 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0, op, ": ", names.padding,
                  " must be three integers of at least 0, got ", text_of(padding));
  Sizes shape = {x.size(0), weight.size(0)};
  for (int i = 0; i < 3; ++i) {
    const int64_t padded = x.size(2 + i) + 2 * padding[i];
    STD_TORCH_CHECK(weight.size(2 + i) > 0 && padded >= weight.size(2 + i), op, ": ", names.weight,
                    "'s kernel must fit into the padded input, got kernel ", weight.size(2 + i), " for ", padded,
                    " elements in dimension ", 2 + i);
    shape.push_back((padded - weight.size(2 + i)) / stride[i] + 1);
  }
  return shape;
}

// `shape`: of the output.
inline void check_conv3d(const char* op, const Conv3dNames& names, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& bias, const Tensor& out, const Sizes& shape) {
  check_like(weight, op, names.weight, x);
  check_like(out, op, names.out, x);
  check_shape(out, op, names.out, shape);
  STD_TORCH_CHECK(pixel_pitch(out) > 0, op, ": ", names.out,
                  " must be channels_last_3d or a slice of the channels of such a tensor");
  if (bias) check_vector(*bias, op, names.bias, x, shape[1]);
}

// What a convolution reads, in layouts that the kernels take. Must outlive the launch.
struct Conv3dOperands {
  Tensor x, weight;
  std::optional<Tensor> bias, residual;
};

// Any strides do for x, but channels far apart are gathered slowly: copied once unless there are only few, as in a
// stem.
inline Tensor conv3d_input(const Tensor& x) {
  return x.stride(1) != 1 && x.size(1) * element_size(x) >= 16 ? channels_last(x) : x;
}

inline Conv3dOperands conv3d_operands(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& residual) {
  Conv3dOperands operands{input, channels_last(weight), std::nullopt, std::nullopt};
  if (bias) operands.bias = torch::stable::contiguous(*bias);
  if (residual) operands.residual = pixel_pitch(*residual) > 0 ? *residual : channels_last(*residual);
  return operands;
}

inline Conv3dParameters conv3d_parameters(const char* op, const Conv3dOperands& operands, const Sizes& stride,
                                          const Sizes& padding, bool relu, const Tensor& out) {
  const Tensor &x = operands.x, &weight = operands.weight;
  Conv3dParameters p{};
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = operands.bias ? operands.bias->const_data_ptr<float>() : nullptr;
  p.residual = operands.residual ? operands.residual->data_ptr() : nullptr;
  p.y = out.data_ptr();
  p.x_stride_n = x.stride(0);
  p.x_stride_c = x.stride(1);
  p.x_stride_t = x.stride(2);
  p.x_stride_h = x.stride(3);
  p.x_stride_w = x.stride(4);
  p.residual_pitch = operands.residual ? pixel_pitch(*operands.residual) : 0;
  p.y_pitch = pixel_pitch(out);
  p.in_channels = checked_int(op, x.size(1), "the number of input channels");
  p.in_t = checked_int(op, x.size(2), "T");
  p.in_h = checked_int(op, x.size(3), "H");
  p.in_w = checked_int(op, x.size(4), "W");
  p.out_channels = checked_int(op, out.size(1), "the number of output channels");
  p.out_t = checked_int(op, out.size(2), "the output's T");
  p.out_h = checked_int(op, out.size(3), "the output's H");
  p.out_w = checked_int(op, out.size(4), "the output's W");
  p.kernel_t = checked_int(op, weight.size(2), "kernel_t");
  p.kernel_h = checked_int(op, weight.size(3), "kernel_h");
  p.kernel_w = checked_int(op, weight.size(4), "kernel_w");
  p.stride_t = checked_int(op, stride[0], "stride_t");
  p.stride_h = checked_int(op, stride[1], "stride_h");
  p.stride_w = checked_int(op, stride[2], "stride_w");
  p.padding_t = checked_int(op, padding[0], "padding_t");
  p.padding_h = checked_int(op, padding[1], "padding_h");
  p.padding_w = checked_int(op, padding[2], "padding_w");
  p.pixels = checked_int(op, out.size(0) * out.size(2) * out.size(3) * out.size(4), "the number of output pixels");
  p.reduction =
      checked_int(op, weight.size(1) * weight.size(2) * weight.size(3) * weight.size(4), "the size of a filter");
  p.relu = relu;
  p.wide = is_wide(p, element_size(x));
  return p;
}

inline int count_multiprocessors(const Tensor& x) {
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  return multiprocessors;
}

// Room for the sums of splits, none for none. Freed after the launch, but only to the allocator of this stream: no
// later use can overtake the kernels.
inline std::optional<Tensor> allocate_partial(int64_t floats, const Tensor& x) {
  if (floats == 0) return std::nullopt;
  return torch::stable::empty({floats}, ScalarType::Float, std::nullopt, x.device());
}

// Calls function(math) with how tensor cores multiply elements of x.
template <typename Function>
void with_math(const Tensor& x, bool allow_tf32, Function function) {
  if (x.scalar_type() == ScalarType::BFloat16) return function(HalfMath<bfloat16>{});
  if (x.scalar_type() == ScalarType::Half) return function(HalfMath<float16>{});
  return allow_tf32 ? function(Tf32Math{}) : function(SplitTf32Math{});
}

}  // namespace slowfast_ext
