// What all kernels here are made of: bfloat16, and the product of a few rows with 32 columns.
//
// AVX-512 multiplies bfloat16 in pairs: `dpbf16(acc, a, b)` adds a[2i]*b[2i] + a[2i+1]*b[2i+1] to
// each of 16 float32. So the right side of every product lies in pairs along the dimension that is
// summed over,
//
//     b[pair][column][2]            16 columns fill a register
//
// while the left side is read as it is: a pair of neighbours in a row, broadcast to all lanes.
// Weights, keys and values are stored this way; linear layers and attention are the same `tile`.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

using bf16 = uint16_t;

constexpr int LANES = 16;     // float32 in a register
constexpr int COLUMNS = 32;   // of a tile: two registers
constexpr int MAX_ROWS = 12;  // of a tile: 24 of 32 registers add up, as many as keep the unit busy

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline __m512 load(const bf16* x) {
  __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

inline void store(bf16* y, __m512 x) {
  _mm256_storeu_si256((__m256i*)y, (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

// Loads as many of 16 as there are; lanes past `count` are off.
inline __mmask16 first_lanes(long count) {
  return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1;
}

// f(0), f(1) ... f(COUNT - 1) with constants, so that arrays indexed by them become registers.
template <int COUNT, class F>
inline __attribute__((always_inline)) void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, COUNT>());
}

template <int R>
inline __attribute__((always_inline)) void clear(__m512 (&acc)[R][2]) {
  unrolled<R>([&](auto r) { acc[r][0] = acc[r][1] = _mm512_setzero_ps(); });
}

// acc[r] += row r of a times 32 columns, over `pairs` pairs.
//   a: R rows, `lda` apart. b0, b1: 16 columns each, a pair's columns `stride` elements after the
//   pair before. next0, next1: what will be read soon, in the same steps, is fetched meanwhile.
template <int R>
inline __attribute__((always_inline)) void tile(const bf16* a, long lda, const bf16* b0,
                                                const bf16* b1, long stride, long pairs,
                                                const bf16* next0, const bf16* next1,
                                                __m512 (&acc)[R][2]) {
  auto add = [&](long p, __m512(&to)[R][2]) __attribute__((always_inline)) {
    __m512i left = _mm512_loadu_si512(b0 + p * stride);
    __m512i right = _mm512_loadu_si512(b1 + p * stride);
    _mm_prefetch((const char*)(next0 + p * stride), _MM_HINT_T1);
    _mm_prefetch((const char*)(next1 + p * stride), _MM_HINT_T1);
    unrolled<R>([&](auto r) {
      int pair;
      std::memcpy(&pair, a + r * lda + 2 * p, 4);
      __m512i both = _mm512_set1_epi32(pair);
      to[r][0] = dot_pairs(to[r][0], both, left);
      to[r][1] = dot_pairs(to[r][1], both, right);
    });
  };
  long p = 0;
  if constexpr (R <= MAX_ROWS / 3) {  // few sums would wait for each other: two sets of them
    __m512 other[R][2];
    clear(other);
    for (; p + 1 < pairs; p += 2) {
      add(p, acc);
      add(p + 1, other);
    }
    unrolled<R>([&](auto r) {
      acc[r][0] = _mm512_add_ps(acc[r][0], other[r][0]);
      acc[r][1] = _mm512_add_ps(acc[r][1], other[r][1]);
    });
  }
  for (; p < pairs; p++) add(p, acc);
}

// Calls f with the number of rows as a constant, so that its loops over rows unroll.
template <int R = MAX_ROWS, class F>
inline void with_rows(int rows, F&& f) {
  if (rows == R) return f(std::integral_constant<int, R>());
  if constexpr (R > 1) with_rows<R - 1>(rows, f);
}

// Calls f(first, count) for parts of `rows` of about equal size, at most `most` each.
template <class F>
inline void in_parts(long rows, long most, F&& f) {
  long parts = (rows + most - 1) / most;
  for (long i = 0; i < parts; i++) {
    long first = rows * i / parts;
    f(first, rows * (i + 1) / parts - first);
  }
}

// e to the power of x, for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2], right
// to 4e-5, a hundredth of a step of bfloat16.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // in this order it hands on what is no number
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.0f / 24);
  for (float c : {1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}
