// How tensor cores multiply each element type: 16 x 8 sums in float32 grow by 32 bytes of the reduction.
#pragma once

#include "ptx.h"

namespace slowfast_ext {

template <typename Element_>
struct HalfMath {
  using Element = Element_;
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16(d, a, b, Element{});
  }
};

struct Tf32Math {
  using Element = float;
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t rounded_a[4], rounded_b[2];
    for (int i = 0; i < 4; ++i) rounded_a[i] = ptx::round_to_tf32(ptx::bits_to_float(a[i]));
    for (int i = 0; i < 2; ++i) rounded_b[i] = ptx::round_to_tf32(ptx::bits_to_float(b[i]));
    ptx::mma_m16n8k8_tf32(d, rounded_a, rounded_b);
  }
};

// Float32 out of tf32 tensor cores: each operand is the sum of two tf32 values (22 fraction bits), three of the four
// products are kept, the dropped one is 2^-22 of the result. An infinite operand gives NaN.
struct SplitTf32Math {
  using Element = float;
  static __device__ __forceinline__ void split(uint32_t value, uint32_t& high, uint32_t& low) {
    high = ptx::round_to_tf32(ptx::bits_to_float(value));
    low = ptx::round_to_tf32(ptx::bits_to_float(value) - ptx::bits_to_float(high));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    for (int i = 0; i < 4; ++i) split(a[i], high_a[i], low_a[i]);
    for (int i = 0; i < 2; ++i) split(b[i], high_b[i], low_b[i]);
    ptx::mma_m16n8k8_tf32(d, low_a, high_b);
    ptx::mma_m16n8k8_tf32(d, high_a, low_b);
    ptx::mma_m16n8k8_tf32(d, high_a, high_b);
  }
};

}  // namespace slowfast_ext
