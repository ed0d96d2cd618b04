// Vectors of float32 numbers, those of GCC and Clang, as wide as the machine's (-march=native).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define NEGCACHE_INTEGERS 1  // multiplies pairs of 16-bit integers
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define NEGCACHE_AMX 1  // multiplies tiles of bfloat16
#endif

namespace negcache {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef _Float16 Float16s __attribute__((vector_size(2 * kLanes)));

struct Bfloat16 {
  uint16_t bits;
};

template <typename Vector, typename T>
inline Vector load_vector(const T* from) {
  Vector to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// A vector of stored numbers as float32: one overload for each storage.
inline Floats load(const float* from) { return load_vector<Floats>(from); }
inline Ints load(const int32_t* from) { return load_vector<Ints>(from); }
#ifdef __AVX512F__  // GCC 12 converts the vectors of the other branch one number at a time
inline Floats load(const _Float16* from) { return (Floats)_mm512_cvtph_ps((__m256i)load_vector<Halves>(from)); }
inline Floats load(const int8_t* from) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)load_vector<Bytes>(from)));
}
#else
inline Floats load(const _Float16* from) { return __builtin_convertvector(load_vector<Float16s>(from), Floats); }
inline Floats load(const int8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(load_vector<Bytes>(from), Ints), Floats);
}
#endif
inline Floats load(const Bfloat16* from) {
  return (Floats)(__builtin_convertvector(load_vector<Halves>(from), Words) << 16);
}

// The first `count` numbers of a vector, then zeros.
template <typename T>
inline auto load(const T* from, int64_t count) -> decltype(load(from)) {
  if (count >= kLanes) return load(from);
  T padded[kLanes] = {};
  std::copy(from, from + std::max<int64_t>(0, count), padded);
  return load(padded);
}

inline void store(float* to, Floats from) { std::memcpy(to, &from, sizeof(from)); }

// 0, 1, 2, ...
inline Ints lane_numbers() {
  Ints numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

inline Floats splat(float value) { return value - Floats{}; }

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// A bit for every lane where a > b.
inline uint32_t lanes_above(Floats a, Floats b) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(a[i] > b[i]) << i;
  return bits;
#endif
}

inline float sum(Floats v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}

// The largest lane, none of which is NaN.
inline float largest_lane(Floats v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, v[i]);
  return largest;
#endif
}

// exp(x) for x <= 88, to 2 ulp; below -86, near the end of float32's range, exp(-86). NaN stays NaN. (The polynomial is
// minimax: within ln(2) / 2 of 0 its relative error is 2^-27.)
inline Floats exponential(Floats x) {
  const Floats least = splat(-86.0f);
  x = least > x ? least : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.3814320555e-3f + 8.3688516170e-3f;
  p = p * r + 4.1668400168e-2f;
  p = p * r + 1.6666519642e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The integer sits in the low bits of `shifted`: add it to the exponent.
  return (Floats)((Words)p + ((Words)shifted << 23));
}

// log(x) for x > 0, to 2 ulp. NaN stays NaN. (Cephes logf.)
inline Floats logarithm(Floats x) {
  const Ints bits = (Ints)x;
  Floats m = (Floats)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  Floats e = __builtin_convertvector((bits >> 23) - 126, Floats);
  const Ints low = m < 0.707106781186547524f;
  e = low ? e - 1.0f : e;
  m = (low ? m + m : m) - 1.0f;
  const Floats z = m * m;
  Floats y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z - e * 2.12194440e-4f - z * 0.5f;
  const Floats result = m + y + e * 0.693359375f;
  return x == x ? result : x;
}

#ifdef NEGCACHE_INTEGERS

// The largest size of a row's numbers; infinite or NaN if one is.
template <typename T>
inline float largest_size(const T* row, int64_t dim) {
  __m512i most = _mm512_setzero_si512();  // of sizes as integers, in which NaN is above infinity
  const auto take = [&](Floats numbers) { most = _mm512_max_epi32(most, (__m512i)((Words)numbers & 0x7fffffffu)); };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) take(load(row + d));
  if (d < dim) take(load(row + d, dim - d));
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float size;
  std::memcpy(&size, &bits, sizeof(size));
  return size;
}

// Numbers up to `largest` as integers up to `most`, times a factor. They are zeros if they are too small or not finite;
// then the factor is 0 or NaN.
struct Scaling {
  float factor, inverse;
  Scaling(float largest, float most) : factor(largest * (1.0f / most)), inverse(most / largest) {
    if (factor > 0.0f && largest <= std::numeric_limits<float>::max() && inverse <= std::numeric_limits<float>::max())
      return;
    factor = largest - largest;
    inverse = 0.0f;
  }
  Ints integers(Floats numbers) const { return (Ints)_mm512_cvtps_epi32((__m512)(numbers * inverse)); }
};

#endif  // NEGCACHE_INTEGERS

template <typename T>
inline float dot(const float* query, const T* embedding, int64_t dim) {
  Floats total[2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    total[0] += load(query + d) * load(embedding + d);
    total[1] += load(query + d + kLanes) * load(embedding + d + kLanes);
  }
  for (; d < dim; d += kLanes) total[0] += load(query + d, dim - d) * load(embedding + d, dim - d);
  return sum(total[0] + total[1]);
}

}  // namespace negcache
