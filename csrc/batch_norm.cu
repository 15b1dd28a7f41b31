// Host side of batch norm's passes: checks, layouts, dispatch. What the operators mean is in
// slowfast_ext/ops/batch_norm.py.
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm.cuh"
#include "batch_norm_gradient.cuh"
#include "checks.h"
#include "common.h"

namespace slowfast_ext {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_x(const char* op, const Tensor& x, int64_t splits) {
  STD_TORCH_CHECK(x.dim() == 5, op, ": x must be (N, C, T, H, W), got ", shape_of(x));
  check_dtype(x, op);
  STD_TORCH_CHECK(splits > 0 && x.size(0) % splits == 0, op, ": splits must be a divisor of the ", x.size(0),
                  " clips, got ", splits);
}

void check_map(const char* op, const char* name, const OptionalTensor& map, const Tensor& x) {
  if (!map) return;
  check_like(*map, op, name, x);
  check_shape(*map, op, name, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
}

void check_affine(const char* op, const Tensor& x, const Tensor& mean, const Tensor& inverse_std,
                  const OptionalTensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(mean.dim() == 2 && mean.size(0) > 0, op, ": mean must be (splits, C), got ", shape_of(mean));
  check_x(op, x, mean.size(0));
  check_floats(mean, op, "mean", x, {mean.size(0), x.size(1)});
  check_floats(inverse_std, op, "inverse_std", x, {mean.size(0), x.size(1)});
  if (weight) check_floats(*weight, op, "weight", x, {x.size(1)});
  if (bias) check_floats(*bias, op, "bias", x, {x.size(1)});
}

Tensor empty_floats(const Tensor& x, const Sizes& shape) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, x.device());
}

// Parameters of the kernels, and what they point to, in layouts that the kernels take: must outlive the launches.
class Operands {
 public:
  BatchNormParameters p{};

  Operands(const char* op, const Tensor& x, int64_t splits) {
    const int64_t clip_pixels = x.size(2) * x.size(3) * x.size(4);
    checked_int(op, x.size(0) * clip_pixels + 4096, "the number of pixels");
    checked_int(op, splits * x.size(1), "splits * C");
    p.channels = static_cast<int>(x.size(1));
    p.groups = static_cast<int>(splits);
    p.rows = static_cast<int>(x.size(0) / splits * clip_pixels);
    p.clip_pixels = static_cast<int>(clip_pixels);
  }

  PixelMap read(const OptionalTensor& map) {
    if (!map) return {};
    kept_.push_back(pixel_pitch(*map) > 0 ? *map : channels_last(*map));
    return write(kept_.back());
  }
  static PixelMap write(const Tensor& map) { return {map.data_ptr(), pixel_pitch(map)}; }

  // A part of a longer vector may lie on 4 bytes only.
  const float* read_vector(const OptionalTensor& vector) {
    if (!vector) return nullptr;
    kept_.push_back(torch::stable::contiguous(*vector));
    if (reinterpret_cast<uintptr_t>(kept_.back().data_ptr()) % 16) kept_.back() = torch::stable::clone(kept_.back());
    return kept_.back().const_data_ptr<float>();
  }
  void read_affine(const Tensor& mean, const Tensor& inverse_std, const OptionalTensor& weight,
                   const OptionalTensor& bias) {
    p.mean = read_vector(mean);
    p.inverse_std = read_vector(inverse_std);
    p.weight = read_vector(weight);
    p.bias = read_vector(bias);
  }

  void plan(const Tensor& x) { plan_batch_norm(p, static_cast<int>(element_size(x))); }

  void plan_reduction(const Tensor& x) {
    plan(x);
    kept_.push_back(empty_floats(x, {p.groups, p.blocks, p.channels, 2}));
    p.partials = reinterpret_cast<float2*>(kept_.back().data_ptr());
  }

 private:
  std::vector<Tensor> kept_;
};

// Calls launch(element), an element of the type of x, on the device and stream of x.
template <typename Launch>
void with_element(const Tensor& x, Launch launch) {
  if (x.scalar_type() == ScalarType::BFloat16) {
    launch(bfloat16());
  } else if (x.scalar_type() == ScalarType::Half) {
    launch(float16());
  } else {
    launch(float());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor empty_like_channels_last(const Tensor& x) {
  const Sizes shape = {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)};
  return torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              MemoryFormat::ChannelsLast3d);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_statistics(const Tensor& x, int64_t splits, double eps) {
  constexpr const char* kName = "batch_norm_statistics";
  check_x(kName, x, splits);
  check_eps(kName, eps);
  const DeviceGuard guard(x.get_device_index());
  Operands operands(kName, x, splits);
  operands.p.x = operands.read(x);
  operands.plan_reduction(x);
  Tensor mean = empty_floats(x, {splits, x.size(1)}), variance = empty_floats(x, {splits, x.size(1)}),
         inverse_std = empty_floats(x, {splits, x.size(1)});
  if (x.size(1) == 0) return {mean, variance, inverse_std};
  const MergeMoments::Results results{mean.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>(),
                                      inverse_std.mutable_data_ptr<float>(), static_cast<float>(eps)};
  with_element(x, [&](auto element) {
    launch_batch_norm_statistics<decltype(element)>(operands.p, results, current_stream(x));
  });
  return {mean, variance, inverse_std};
}

void check_apply(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual) {
  check_affine("batch_norm_apply", x, mean, inverse_std, weight, bias);
  check_map("batch_norm_apply", "residual", residual, x);
}

void apply(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, const OptionalTensor& weight,
           const OptionalTensor& bias, const OptionalTensor& residual, bool relu, const Tensor& out) {
  if (x.numel() == 0) return;
  const DeviceGuard guard(x.get_device_index());
  Operands operands("batch_norm_apply", x, mean.size(0));
  operands.p.x = operands.read(x);
  operands.p.residual = operands.read(residual);
  operands.p.y = Operands::write(out);
  operands.read_affine(mean, inverse_std, weight, bias);
  operands.p.relu = relu;
  operands.plan(x);
  with_element(x, [&](auto element) { launch_batch_norm_apply<decltype(element)>(operands.p, current_stream(x)); });
}

Tensor batch_norm_apply(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, bool relu) {
  check_apply(x, mean, inverse_std, weight, bias, residual);
  const Tensor y = empty_like_channels_last(x);
  apply(x, mean, inverse_std, weight, bias, residual, relu, y);
  return y;
}

void batch_norm_apply_out(const Tensor& x, const Tensor& mean, const Tensor& inverse_std, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& residual, bool relu, Tensor out) {
  check_apply(x, mean, inverse_std, weight, bias, residual);
  check_map("batch_norm_apply", "out", out, x);
  STD_TORCH_CHECK(pixel_pitch(out) > 0,
                  "batch_norm_apply: out must be channels_last_3d or a slice of the channels of such a tensor");
  apply(x, mean, inverse_std, weight, bias, residual, relu, out);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_reduce_gradient(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                              const Tensor& inverse_std, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, const OptionalTensor& y,
                                                              bool relu, bool residual) {
  constexpr const char* kName = "batch_norm_reduce_gradient";
  check_affine(kName, x, mean, inverse_std, weight, bias);
  check_map(kName, "grad", grad, x);
  check_map(kName, "y", y, x);
  const DeviceGuard guard(x.get_device_index());
  Operands operands(kName, x, mean.size(0));
  operands.p.x = operands.read(x);
  operands.p.grad = operands.read(grad);
  if (relu) operands.p.y = operands.read(y);
  operands.read_affine(mean, inverse_std, weight, bias);
  operands.p.relu = relu;
  operands.plan_reduction(x);
  Tensor sum_grad = empty_floats(x, {mean.size(0), x.size(1)}),
         sum_grad_normalized = empty_floats(x, {mean.size(0), x.size(1)});
  const Tensor grad_residual = residual ? empty_like_channels_last(x)
                                        : torch::stable::empty(Sizes{0}, x.scalar_type(), std::nullopt, x.device());
  if (residual) operands.p.grad_residual = Operands::write(grad_residual);
  if (x.size(1) == 0) return {sum_grad, sum_grad_normalized, grad_residual};
  with_element(x, [&](auto element) {
    launch_batch_norm_reduce_gradient<decltype(element)>(operands.p, sum_grad.mutable_data_ptr<float>(),
                                                         sum_grad_normalized.mutable_data_ptr<float>(),
                                                         current_stream(x));
  });
  return {sum_grad, sum_grad_normalized, grad_residual};
}

Tensor batch_norm_apply_gradient(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& inverse_std,
                                 const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& y,
                                 bool relu, const OptionalTensor& sum_grad, const OptionalTensor& sum_grad_normalized,
                                 double count) {
  constexpr const char* kName = "batch_norm_apply_gradient";
  check_affine(kName, x, mean, inverse_std, weight, bias);
  check_map(kName, "grad", grad, x);
  check_map(kName, "y", y, x);
  STD_TORCH_CHECK(sum_grad.has_value() == sum_grad_normalized.has_value(), kName,
                  ": sum_grad must be given exactly with sum_grad_normalized, got one of them");
  if (sum_grad) {
    check_floats(*sum_grad, kName, "sum_grad", x, {mean.size(0), x.size(1)});
    check_floats(*sum_grad_normalized, kName, "sum_grad_normalized", x, {mean.size(0), x.size(1)});
    STD_TORCH_CHECK(count > 0 || x.numel() == 0, kName, ": count must be positive with sum_grad, got ", count);
  }
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad_x = empty_like_channels_last(x);
  if (x.numel() == 0) return grad_x;
  Operands operands(kName, x, mean.size(0));
  // Of x nothing is needed where neither the statistics nor the ReLU depend on it.
  if (sum_grad || (relu && !y)) operands.p.x = operands.read(x);
  operands.p.grad = operands.read(grad);
  if (relu) operands.p.y = operands.read(y);
  operands.p.grad_x = Operands::write(grad_x);
  operands.read_affine(mean, inverse_std, weight, bias);
  operands.p.sum_grad = operands.read_vector(sum_grad);
  operands.p.sum_grad_normalized = operands.read_vector(sum_grad_normalized);
  if (sum_grad) operands.p.inverse_count = static_cast<float>(1 / count);
  operands.p.relu = relu;
  operands.plan(x);
  with_element(
      x, [&](auto element) { launch_batch_norm_apply_gradient<decltype(element)>(operands.p, current_stream(x)); });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CUDA, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  m.impl("batch_norm_apply.out", TORCH_BOX(&batch_norm_apply_out));
  m.impl("batch_norm_reduce_gradient", TORCH_BOX(&batch_norm_reduce_gradient));
  m.impl("batch_norm_apply_gradient", TORCH_BOX(&batch_norm_apply_gradient));
}

}  // namespace slowfast_ext
