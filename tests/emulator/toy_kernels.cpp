// Small kernels that exercise the emulator, right ones and, where a macro or an argument says so, wrong ones.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "device/ptx.h"

namespace py = pybind11;
using slowfast_ext::bfloat16;
using slowfast_ext::float16;
using slowfast_ext::launch_kernel;
namespace ptx = slowfast_ext::ptx;

namespace {

template <typename T>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  ptx::mma_m16n8k16(d, a, b, type);
}

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  ptx::mma_m16n8k8_tf32(d, a, b);
}

// c = a b^T with a (64 blocks, k), b (64, k), k a multiple of the tile's 64 bytes: four warps, each 32x32 of the
// 64x64 tile, a double buffer of cp.async, chunks of 16 bytes swizzled so that ldmatrix meets no bank twice.
template <typename T>
__global__ void __launch_bounds__(128)
    matmul_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ c, int k) {
  constexpr int kTile = 64, kRowBytes = 64, kStage = 2 * kTile * kRowBytes;
  SHARED_MEMORY(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = k * int(sizeof(T)) / kRowBytes;
  a += size_t(blockIdx.x) * kTile * k;
  const auto chunk_of = [](int row, int chunk) { return row * kRowBytes + ((chunk ^ (row >> 1 & 3)) << 4); };
  const auto fetch = [&](int step) {
    for (int i = threadIdx.x; i < 2 * kTile * 4; i += blockDim.x) {
      const int row = i / 4 % kTile, chunk = i % 4, operand = i / (4 * kTile);
      const T* source = (operand ? b : a) + size_t(row) * k + step * (kRowBytes / sizeof(T)) + chunk * (16 / sizeof(T));
      ptx::cp_async_16(shared + step % 2 * kStage + operand * kTile * kRowBytes + chunk_of(row, chunk), source,
                       step < steps);
    }
    ptx::cp_async_commit();
  };
  float sum[2][4][4] = {};
  fetch(0);
  for (int step = 0; step < steps; ++step) {
#ifndef NO_TRAILING_BARRIER
    __syncthreads();  // everyone has read the stage that the next fetch overwrites
#endif
    fetch(step + 1);
#ifdef LATE_WAIT
    ptx::cp_async_wait<2>();
#else
    ptx::cp_async_wait<1>();
#endif
#ifndef NO_LEADING_BARRIER
    __syncthreads();
#endif
    const unsigned char* stage = shared + step % 2 * kStage;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[2][4], right[4][2];
      for (int i = 0; i < 2; ++i) {
        const int row = warp / 2 * 32 + i * 16 + lane % 16;
        ptx::ldmatrix_x4(left[i], stage + chunk_of(row, half * 2 + lane / 16));
      }
      for (int j = 0; j < 2; ++j) {
        uint32_t pair[4];
        const int row = warp % 2 * 32 + j * 16 + lane % 8 + lane / 16 * 8;
        ptx::ldmatrix_x4(pair, stage + kTile * kRowBytes + chunk_of(row, half * 2 + lane / 8 % 2));
        for (int i = 0; i < 4; ++i) right[2 * j + i / 2][i % 2] = pair[i];
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) multiply(sum[i][j], left[i], right[j], T());
      }
    }
  }
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = warp / 2 * 32 + i * 16 + lane / 4 + e / 2 * 8;
        const int column = warp % 2 * 32 + j * 8 + lane % 4 * 2 + e % 2;
        c[(size_t(blockIdx.x) * kTile + row) * kTile + column] = sum[i][j][e];
      }
    }
  }
}

using Words = py::array_t<uint16_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

template <typename T, typename Array>
Floats matmul(const Array& a, const Array& b) {
  const int blocks = int(a.shape(0)) / 64, k = int(a.shape(1));
  Floats c({a.shape(0), py::ssize_t(64)});
  launch_kernel(matmul_kernel<T>, blocks, 128, 4 * 64 * 64, nullptr, reinterpret_cast<const T*>(a.data()),
                reinterpret_cast<const T*>(b.data()), c.mutable_data(), k);
  return c;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, module) {
  module.def("matmul_bfloat16", &matmul<bfloat16, Words>);
  module.def("matmul_float16", &matmul<float16, Words>);
  module.def("matmul_float32", &matmul<float, Floats>);
}
