// Norms: each reads its input once.
#include <cmath>

#include "tile.h"

namespace {

inline __m512 load(const bf16* x, __mmask16 lanes) {
  __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

inline void store(bf16* y, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(y, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

// y = x / sqrt(mean(x²) + eps) * weight
void norm_row(const bf16* x, const bf16* weight, float eps, long size, bf16* y) {
  __m512 squares = _mm512_setzero_ps();
  for (long i = 0; i < size; i += LANES) {
    __m512 value = load(x + i, first_lanes(size - i));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  __m512 by = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
  for (long i = 0; i < size; i += LANES) {
    __mmask16 lanes = first_lanes(size - i);
    __m512 scaled = _mm512_mul_ps(load(x + i, lanes), by);
    store(y + i, _mm512_mul_ps(scaled, load(weight + i, lanes)), lanes);
  }
}

}  // namespace

extern "C" {

// x [tokens, heads, size], with tokens `stride` elements apart; y likewise, close together.
void norm(const bf16* x, long stride, const bf16* weight, float eps, bf16* y, long tokens,
          long heads, long size) {
#pragma omp parallel for schedule(static) if (tokens > 4)
  for (long t = 0; t < tokens; t++)
    for (long head = 0; head < heads; head++)
      norm_row(x + t * stride + head * size, weight, eps, size, y + (t * heads + head) * size);
}

// residual += x, y = norm(residual); all [tokens, size].
void add_norm(const bf16* x, bf16* residual, const bf16* weight, float eps, bf16* y, long tokens,
              long size) {
#pragma omp parallel for schedule(static) if (tokens > 4)
  for (long t = 0; t < tokens; t++) {
    const bf16* from = x + t * size;
    bf16* sum = residual + t * size;
    for (long i = 0; i < size; i += LANES) {
      __mmask16 lanes = first_lanes(size - i);
      store(sum + i, _mm512_add_ps(load(from + i, lanes), load(sum + i, lanes)), lanes);
    }
    norm_row(sum, weight, eps, size, y + t * size);
  }
}
}
