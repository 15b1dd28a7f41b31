// Host side of conv3d_bn_relu_pair: checks, layouts, dispatch. What the operator means is in
// slowfast_ext/ops/conv3d_bn_relu_pair.py.
#include <tuple>

#include "conv3d_bn_relu_pair.cuh"
#include "conv3d_host.h"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "conv3d_bn_relu_pair";
constexpr Conv3dNames kNames{};
constexpr Conv3dNames kShortcutNames{"weight_shortcut", "bias_shortcut", "stride_shortcut", "padding_shortcut",
                                     "out_shortcut"};

void conv3d_bn_relu_pair_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                             const Tensor& weight_shortcut, const std::optional<Tensor>& bias_shortcut, Sizes stride,
                             Sizes padding, Sizes stride_shortcut, Sizes padding_shortcut, bool relu,
                             bool relu_shortcut, bool allow_tf32, Tensor out, Tensor out_shortcut) {
  const Sizes shape = conv3d_output_shape(kName, kNames, x, weight, stride, padding);
  const Sizes shape_shortcut =
      conv3d_output_shape(kName, kShortcutNames, x, weight_shortcut, stride_shortcut, padding_shortcut);
  check_capability(x, kName);
  check_dtype(x, kName);
  check_conv3d(kName, kNames, x, weight, bias, out, shape);
  check_conv3d(kName, kShortcutNames, x, weight_shortcut, bias_shortcut, out_shortcut, shape_shortcut);
  if (x.size(0) == 0) return;  // an output has no elements if and only if there are no clips
  const DeviceGuard guard(x.get_device_index());
  const Tensor input = conv3d_input(x);
  const Conv3dOperands first = conv3d_operands(input, weight, bias, std::nullopt);
  const Conv3dOperands second = conv3d_operands(input, weight_shortcut, bias_shortcut, std::nullopt);
  const Conv3dParameters problems[2] = {
      conv3d_parameters(kName, first, stride, padding, relu, out),
      conv3d_parameters(kName, second, stride_shortcut, padding_shortcut, relu_shortcut, out_shortcut)};
  const Conv3dPairPlan plan = plan_conv3d_bn_relu_pair(problems, element_size(x), count_multiprocessors(x));
  const std::optional<Tensor> partial = allocate_partial(partial_size(problems, plan), x);
  float* sums = partial ? partial->mutable_data_ptr<float>() : nullptr;
  const cudaStream_t stream = current_stream(x);
  with_math(x, allow_tf32,
            [&](auto math) { launch_conv3d_bn_relu_pair<decltype(math)>(problems, plan, sums, stream); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> conv3d_bn_relu_pair(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& weight_shortcut,
                                               const std::optional<Tensor>& bias_shortcut, Sizes stride, Sizes padding,
                                               Sizes stride_shortcut, Sizes padding_shortcut, bool relu,
                                               bool relu_shortcut, bool allow_tf32) {
  const auto allocate = [&](const Sizes& shape) {
    return torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                MemoryFormat::ChannelsLast3d);
  };
  Tensor y = allocate(conv3d_output_shape(kName, kNames, x, weight, stride, padding));
  Tensor shortcut =
      allocate(conv3d_output_shape(kName, kShortcutNames, x, weight_shortcut, stride_shortcut, padding_shortcut));
  conv3d_bn_relu_pair_out(x, weight, bias, weight_shortcut, bias_shortcut, stride, padding, stride_shortcut,
                          padding_shortcut, relu, relu_shortcut, allow_tf32, y, shortcut);
  return {y, shortcut};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) {
  m.impl("conv3d_bn_relu_pair", TORCH_BOX(&conv3d_bn_relu_pair));
  m.impl("conv3d_bn_relu_pair.out", TORCH_BOX(&conv3d_bn_relu_pair_out));
}

}  // namespace slowfast_ext
