// y = x Wᵀ + bias, with the weights packed into panels of 32 columns (rows of W), in three forms.
//
// A work item is one panel times a chunk of rows. A panel stays in the second cache while the rows
// go by, twelve at a time, so the weights come from memory once and the products set the pace.
#include <memory>

#include "tile.h"

namespace {

constexpr long CHUNK = 96;  // rows of x: with a panel, what the second cache holds
constexpr long GROUP = 32;  // weights that share a scale

// Runs f(panel, first row, rows) for all panels and chunks, over the threads.
template <class F>
void for_panels(long rows, long columns, F&& f) {
  long panels = (columns + COLUMNS - 1) / COLUMNS, chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) schedule(static)
  for (long chunk = 0; chunk < chunks; chunk++)
    for (long panel = 0; panel < panels; panel++)
      f(panel, chunk * CHUNK, std::min(CHUNK, rows - chunk * CHUNK));
}

// x * sigmoid(x), without overflow; the reciprocal is right to 14 bits, bfloat16 keeps 8.
inline __m512 silu(__m512 x) {
  __m512 one = _mm512_set1_ps(1), small = exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
  __m512 above = _mm512_mask_mov_ps(small, positive, one);
  __m512 reciprocal = _mm512_rcp14_ps(_mm512_add_ps(one, small));
  return _mm512_mul_ps(x, _mm512_mul_ps(above, reciprocal));
}

// Where results go, as bfloat16 or float32. bias, of all panels' columns, may be null. If gated, the
// left half of each panel is a gate and the right half what it lets through.
struct Output {
  void* y;
  bool is_float, gated;
  long columns;
  const bf16* bias;

  inline __attribute__((always_inline)) void put(long row, long panel, __m512 left,
                                                 __m512 right) const {
    long column = panel * COLUMNS;
    if (bias) {
      left = _mm512_add_ps(left, load(bias + column));
      right = _mm512_add_ps(right, load(bias + column + LANES));
    }
    if (gated) return write(row, column / 2, columns / 2, _mm512_mul_ps(silu(left), right));
    write(row, column, columns, left);
    write(row, column + LANES, columns, right);
  }

  inline __attribute__((always_inline)) void write(long row, long column, long width,
                                                   __m512 values) const {
    __mmask16 lanes = first_lanes(width - column);
    long at = row * width + column;
    if (is_float)
      _mm512_mask_storeu_ps((float*)y + at, lanes, values);
    else
      _mm256_mask_storeu_epi16((bf16*)y + at, lanes, (__m256i)_mm512_cvtneps_pbh(values));
  }
};

// `rows` rows of x from `first` on, times one panel in bfloat16.
void multiply(const bf16* x, const bf16* weights, const Output& out, long panel, long first,
              long rows, long size) {
  in_parts(rows, MAX_ROWS, [&](long part, long count) {
    with_rows(count, [&](auto R) {
      __m512 acc[R][2];
      long row = first + part;
      clear(acc);
      const bf16* next = weights + 2048;  // at the end of a panel, the one that follows
      tile<R>(x + row * size, size, weights, weights + 32, 64, size / 2, next, next + 32, acc);
      unrolled<R>([&](auto r) { out.put(row + r, panel, acc[r][0], acc[r][1]); });
    });
  });
}

// ---- Weights in groups of 32 with a scale and a minimum: w = scale * q + minimum.
//
// A group of a panel: for each 4 bits of q a plane [16 pairs][32 bytes], the byte of (pair, column
// c of 16, k of 2) at 2c + k, low half column c, high half column c + 16; then 32 scales and 32
// minima in float16. Eight bits are two planes, the upper half first.

constexpr long PLANE = 16 * 32;

template <int PLANES>
constexpr long GROUP_BYTES = PLANES * PLANE + 2 * COLUMNS * 2;

inline __m512 halves(const uint8_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
}

// Tables from four bits to bfloat16: 0 to 15, and 16 times that.
inline __m512i digits(float unit) {
  alignas(64) bf16 table[32];
  for (int i = 0; i < 32; i++) {
    float value = unit * (i % 16);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    table[i] = bits >> 16;
  }
  return _mm512_load_si512(table);
}

template <int PLANES>
struct Groups {
  __m512i table[PLANES];

  Groups() {
    table[PLANES - 1] = digits(1);
    if (PLANES == 2) table[0] = digits(16);
  }

  // The pairs of 32 columns, of one plane, as bfloat16.
  inline __attribute__((always_inline)) void pair(const uint8_t* group, int plane, int p,
                                                  __m512i& left, __m512i& right) const {
    const uint8_t* bytes = group + plane * PLANE + p * 32;
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
    left = _mm512_permutexvar_epi16(words, table[plane]);  // reads 5 bits; the table repeats
    right = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table[plane]);
  }

  // A few rows at once, from the groups themselves.
  template <int R>
  void multiply(const bf16* x, const float* sums, const uint8_t* weights, const Output& out,
                long panel, long first, long size) const {
    __m512 acc[R][2];
    long groups = size / GROUP;
    clear(acc);
    for (long g = 0; g < groups; g++) {
      const uint8_t* group = weights + g * GROUP_BYTES<PLANES>;
      for (int line = 0; line < GROUP_BYTES<PLANES>; line += 64)
        _mm_prefetch((const char*)group + 4096 + line, _MM_HINT_T0);
      __m512 part[R][2];
      clear(part);
      for (int p = 0; p < GROUP / 2; p++)
        for (int plane = 0; plane < PLANES; plane++) {
          __m512i left, right;
          pair(group, plane, p, left, right);
          unrolled<R>([&](auto r) {
            int both;
            std::memcpy(&both, x + (first + r) * size + g * GROUP + 2 * p, 4);
            part[r][0] = dot_pairs(part[r][0], _mm512_set1_epi32(both), left);
            part[r][1] = dot_pairs(part[r][1], _mm512_set1_epi32(both), right);
          });
        }
      const uint8_t* scales = group + PLANES * PLANE;
      unrolled<2>([&](auto half) {
        __m512 scale = halves(scales + 32 * half), minimum = halves(scales + 64 + 32 * half);
        unrolled<R>([&](auto r) {
          __m512 sum = _mm512_set1_ps(sums[(first + r) * groups + g]);
          acc[r][half] = _mm512_fmadd_ps(scale, part[r][half], acc[r][half]);
          acc[r][half] = _mm512_fmadd_ps(minimum, sum, acc[r][half]);
        });
      });
    }
    unrolled<R>([&](auto r) { out.put(first + r, panel, acc[r][0], acc[r][1]); });
  }

  // A panel in bfloat16, for many rows.
  void unpack(const uint8_t* panel, long size, bf16* to) const {
    const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
    const __m512i interleave = _mm512_load_si512(order);
    for (long g = 0; g < size / GROUP; g++) {
      const uint8_t* group = panel + g * GROUP_BYTES<PLANES>;
      const uint8_t* scales = group + PLANES * PLANE;
      __m512 scale[2] = {halves(scales), halves(scales + 32)};
      __m512 minimum[2] = {halves(scales + 64), halves(scales + 96)};
      for (int p = 0; p < GROUP / 2; p++, to += 64) {
        __m512i found[PLANES][2];
        unrolled<PLANES>([&](auto plane) {
          pair(group, plane, p, found[plane][0], found[plane][1]);
        });
        unrolled<2>([&](auto half) {
          __m512 even = minimum[half], odd = even;
          unrolled<PLANES>([&](auto plane) {
            __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(found[plane][half], 16));
            __m512 second = _mm512_castsi512_ps(_mm512_and_si512(found[plane][half], upper));
            even = _mm512_fmadd_ps(first, scale[half], even);
            odd = _mm512_fmadd_ps(second, scale[half], odd);
          });
          __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
          _mm512_storeu_si512(to + 32 * half, _mm512_permutexvar_epi16(interleave, both));
        });
      }
    }
  }

  void linear(const bf16* x, const uint8_t* weights, const Output& out, long rows,
              long size) const {
    constexpr long FEW = PLANES == 1 ? 24 : 12;  // more rows are faster from an unpacked panel
    long panel_bytes = size / GROUP * GROUP_BYTES<PLANES>, groups = size / GROUP;
    std::unique_ptr<float[]> sums(new float[rows * groups]);
    for (long i = 0; rows <= FEW && i < rows * groups; i++) {
      sums[i] = 0;
      for (long k = 0; k < GROUP; k++) sums[i] += to_float(x[i * GROUP + k]);
    }
    for_panels(rows, out.columns, [&](long panel, long first, long count) {
      const uint8_t* packed = weights + panel * panel_bytes;
      if (rows <= FEW)
        return in_parts(count, 6, [&](long part, long some) {
          with_rows<6>(some, [&](auto R) {
            multiply<R>(x, sums.get(), packed, out, panel, first + part, size);
          });
        });
      std::unique_ptr<bf16[]> plain(new bf16[size * COLUMNS]);
      unpack(packed, size, plain.get());
      ::multiply(x, plain.get(), out, panel, first, count, size);
    });
  }
};

// ---- Eight bits throughout: w = scale of the column * q, x = scale of the group * q.
//
// A panel is [size / 4][32 columns][4] bytes, q + 128; `dpbusd` adds four products of unsigned and
// signed bytes, so a group starts from -128 times the sum of its part of x. Neighbours in a row of
// x share a scale, 64 as a rule: one scale for a whole row would lose too much to its outliers.

struct Bytes {
  long size, group, groups;
  std::unique_ptr<int8_t[]> q;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<int32_t[]> starts;

  Bytes(long rows, long size, long group)
      : size(size), group(group), groups(size / group), q(new int8_t[rows * size]),
        scales(new float[rows * groups]), starts(new int32_t[rows * groups]) {}

  void quantize(const bf16* x, long row) {
    for (long g = row * groups; g < (row + 1) * groups; g++) {
      const bf16* from = x + g * group;
      __m512 most = _mm512_setzero_ps();
      for (long k = 0; k < group; k += LANES)
        most = _mm512_max_ps(most, _mm512_abs_ps(load(from + k)));
      float largest = _mm512_reduce_max_ps(most);
      __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
      __m512i sum = _mm512_setzero_si512();
      for (long k = 0; k < group; k += LANES) {
        __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(load(from + k), inverse));
        sum = _mm512_add_epi32(sum, value);
        _mm_storeu_si128((__m128i*)&q[g * group + k], _mm512_cvtepi32_epi8(value));
      }
      scales[g] = largest / 127;
      starts[g] = -128 * _mm512_reduce_add_epi32(sum);
    }
  }

  // R rows from `first` on times a panel.
  template <int R>
  inline __attribute__((always_inline)) void multiply(const uint8_t* weights, const float* by,
                                                      const Output& out, long panel,
                                                      long first) const {
    __m512 acc[R][2];
    clear(acc);
    const int8_t* x = &q[first * size];
    const float* row_scales = &scales[first * groups];
    const int32_t* row_starts = &starts[first * groups];
    const long size = this->size, group = this->group, groups = this->groups;
    for (long g = 0; g < groups; g++) {
      __m512i part[R][2];
      unrolled<R>([&](auto r) {
        part[r][0] = part[r][1] = _mm512_set1_epi32(row_starts[r * groups + g]);
      });
      for (long k = g * group; k < (g + 1) * group; k += 4) {
        const uint8_t* w = weights + k * COLUMNS;
        __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 64);
        asm("" : "+v"(left), "+v"(right));  // read once, not again for each row
        _mm_prefetch((const char*)w + 4096, _MM_HINT_T0);
        _mm_prefetch((const char*)w + 4096 + 64, _MM_HINT_T0);
        unrolled<R>([&](auto r) {
          int four;
          std::memcpy(&four, x + r * size + k, 4);
          __m512i bytes = _mm512_set1_epi32(four);  // the intrinsic copies the sum each time
          asm("vpdpbusd %2, %1, %0" : "+v"(part[r][0]) : "v"(left), "v"(bytes));
          asm("vpdpbusd %2, %1, %0" : "+v"(part[r][1]) : "v"(right), "v"(bytes));
        });
      }
      unrolled<R>([&](auto r) {
        __m512 scale = _mm512_set1_ps(row_scales[r * groups + g]);
        acc[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r][0]), scale, acc[r][0]);
        acc[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r][1]), scale, acc[r][1]);
      });
    }
    __m512 left = _mm512_loadu_ps(by), right = _mm512_loadu_ps(by + LANES);
    unrolled<R>([&](auto r) {
      out.put(first + r, panel, _mm512_mul_ps(acc[r][0], left), _mm512_mul_ps(acc[r][1], right));
    });
  }
};

}  // namespace

extern "C" {

// A product, as Python describes it: y [rows, columns], or half the columns if gated, in bfloat16 or
// float32, from x [rows, size].
struct Product {
  long kind;  // 16: bfloat16, size is even; 8: bytes; 4 or 5: groups of 4 or of 8 bits
  long columns, size, is_float, gated;
  long group;           // neighbours of x that share a scale (bytes only): a multiple of 16
  const void* weights;  // in panels
  const float* scales;  // of the columns (bytes only), as many as all panels have
  const bf16* bias;     // likewise, or null
};

void linear(const Product* product, const bf16* x, void* y, long rows) {
  const Product& p = *product;
  Output out{y, p.is_float != 0, p.gated != 0, p.columns, p.bias};
  if (p.kind == 4) return Groups<1>().linear(x, (const uint8_t*)p.weights, out, rows, p.size);
  if (p.kind == 5) return Groups<2>().linear(x, (const uint8_t*)p.weights, out, rows, p.size);
  if (p.kind == 16)
    return for_panels(rows, p.columns, [&](long panel, long first, long count) {
      const bf16* packed = (const bf16*)p.weights + panel * COLUMNS * p.size;
      multiply(x, packed, out, panel, first, count, p.size);
    });
  Bytes bytes(rows, p.size, p.group);
#pragma omp parallel for schedule(static) if (rows > 4)
  for (long row = 0; row < rows; row++) bytes.quantize(x, row);
  for_panels(rows, p.columns, [&](long panel, long first, long count) {
    const uint8_t* packed = (const uint8_t*)p.weights + panel * COLUMNS * p.size;
    in_parts(count, MAX_ROWS / 2, [&](long part, long some) {
      with_rows<MAX_ROWS / 2>(some, [&](auto R) {
        bytes.multiply<R>(packed, p.scales + panel * COLUMNS, out, panel, first + part);
      });
    });
  });
}
}
