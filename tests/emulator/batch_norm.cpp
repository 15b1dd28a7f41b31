// csrc/batch_norm_merge.cuh for NumPy.
#include "batch_norm_merge.cuh"
#include "module.h"

using namespace slowfast_ext;
using emulator::Array;

namespace {

// Partials (groups, blocks, channels, 2).
void merge_statistics(const Array& partials, int rows, int rows_per_block, const Array& mean, const Array& variance) {
  launch_merge_statistics(static_cast<const float2*>(partials.data()), static_cast<float*>(mean.mutable_data()),
                          static_cast<float*>(variance.mutable_data()), partials.shape(0), partials.shape(1),
                          partials.shape(2), rows, rows_per_block, nullptr);
}

}  // namespace

EMULATED_MODULE(module) { module.def("merge_statistics", &merge_statistics); }
