// The CUDA language as far as the kernels use it: qualifiers, vector types, 16-bit floating point, host functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local  // one block at a time runs on an operating-system thread

// Alignment as in CUDA: a misaligned vector access is undefined here too, and -fsanitize=alignment reports it.
#define EMULATOR_VECTOR_TYPES(scalar, name)                                         \
  struct __align__(2 * sizeof(scalar)) name##2 { scalar x, y; };                    \
  struct name##3 { scalar x, y, z; };                                               \
  struct __align__(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };              \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }              \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(unsigned, uint)
EMULATOR_VECTOR_TYPES(float, float)
#undef EMULATOR_VECTOR_TYPES

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return std::min<Common>(static_cast<Common>(a), static_cast<Common>(b));
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return std::max<Common>(static_cast<Common>(a), static_cast<Common>(b));
}

template <typename T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}

namespace slowfast_ext {
namespace emulator {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace emulator

// Conversions from float round to nearest even; every NaN becomes 0x7fff, as on the GPU.
struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float value) {
    const uint32_t single = emulator::bit_cast<uint32_t>(value);
    const bool nan = (single & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? 0x7fffu : (single + 0x7fffu + (single >> 16 & 1u)) >> 16);
  }
  explicit operator float() const { return emulator::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct float16 {
  uint16_t bits;

  float16() = default;
  explicit float16(float value) {
    const uint32_t single = emulator::bit_cast<uint32_t>(value);
    const uint32_t sign = single >> 16 & 0x8000u, magnitude = single & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      bits = 0x7fff;
      return;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
      half = static_cast<uint32_t>(std::lrint(std::fabs(value) * 0x1p24f));
    } else {
      half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | half);
  }
  explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 1023u;
    if (exponent == 0) return emulator::bit_cast<float>(emulator::bit_cast<uint32_t>(fraction * 0x1p-24f) | sign);
    return emulator::bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
  }
};

}  // namespace slowfast_ext
