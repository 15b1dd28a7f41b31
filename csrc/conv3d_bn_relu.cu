// Host side of conv3d_bn_relu: checks, layouts, dispatch. What the operator means is in
// slowfast_ext/ops/conv3d_bn_relu.py.
#include "conv3d_bn_relu.cuh"
#include "conv3d_host.h"

namespace slowfast_ext {
namespace {

constexpr const char* kName = "conv3d_bn_relu";
constexpr Conv3dNames kNames{};

// `given`: in place of what the cost model chooses.
void run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
         const std::optional<Tensor>& residual, const Sizes& stride, const Sizes& padding, bool relu, bool allow_tf32,
         const std::optional<Conv3dPlan>& given, const Tensor& out) {
  const Sizes shape = conv3d_output_shape(kName, kNames, x, weight, stride, padding);
  check_capability(x, kName);
  check_dtype(x, kName);
  check_conv3d(kName, kNames, x, weight, bias, out, shape);
  if (residual) {
    check_like(*residual, kName, "residual", x);
    check_shape(*residual, kName, "residual", shape);
  }
  if (out.numel() == 0) return;
  const DeviceGuard guard(x.get_device_index());
  const Conv3dOperands operands = conv3d_operands(conv3d_input(x), weight, bias, residual);
  const Conv3dParameters p = conv3d_parameters(kName, operands, stride, padding, relu, out);
  const Conv3dPlan plan = given ? *given : plan_conv3d_bn_relu(p, element_size(x), count_multiprocessors(x));
  STD_TORCH_CHECK(can_split(p, plan.splits, element_size(x)),
                  "conv3d_bn_relu: the blocks that share a sum must have four steps of the reduction each, got ",
                  plan.splits, " blocks for ", p.reduction, " terms");
  const std::optional<Tensor> partial = allocate_partial(partial_size(p, plan.splits), x);
  float* sums = partial ? partial->mutable_data_ptr<float>() : nullptr;
  const cudaStream_t stream = current_stream(x);
  with_math(x, allow_tf32, [&](auto math) { launch_conv3d_bn_relu<decltype(math)>(p, plan, sums, stream); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void conv3d_bn_relu_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, Sizes stride, Sizes padding, bool relu, bool allow_tf32,
                        Tensor out) {
  run(x, weight, bias, residual, stride, padding, relu, allow_tf32, std::nullopt, out);
}

void conv3d_bn_relu_tiled(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual, Sizes stride, Sizes padding, bool relu,
                          bool allow_tf32, int64_t tile, int64_t splits, Tensor out) {
  STD_TORCH_CHECK(tile >= 0 && tile <= static_cast<int64_t>(TileShape::k128x16),
                  "conv3d_bn_relu: tile must be from 0 to 4, got ", tile);
  STD_TORCH_CHECK(splits >= 1 && splits <= 16, "conv3d_bn_relu: splits must be from 1 to 16, got ", splits);
  const Conv3dPlan plan{static_cast<TileShape>(tile), static_cast<int>(splits)};
  run(x, weight, bias, residual, stride, padding, relu, allow_tf32, plan, out);
}

Tensor conv3d_bn_relu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, Sizes stride, Sizes padding, bool relu, bool allow_tf32) {
  const Sizes shape = conv3d_output_shape(kName, kNames, x, weight, stride, padding);
  Tensor y = torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  MemoryFormat::ChannelsLast3d);
  run(x, weight, bias, residual, stride, padding, relu, allow_tf32, std::nullopt, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) {
  m.impl("conv3d_bn_relu", TORCH_BOX(&conv3d_bn_relu));
  m.impl("conv3d_bn_relu.out", TORCH_BOX(&conv3d_bn_relu_out));
  m.impl("conv3d_bn_relu.tiled", TORCH_BOX(&conv3d_bn_relu_tiled));
}

}  // namespace slowfast_ext
