// Attention over a paged cache in bfloat16: rotates, stores, attends (FlashAttention, Dao et al.,
// 2022: a running maximum and sum, so that no row of scores is ever whole).
//
// A block of one key-value head is made of units of 16 positions, laid out for `tile`:
//
//     keys    [D / 2][16 positions][2]        scores = queries x keys: sums over D
//     values  [D / 32][8 pairs][32][2]        output = weights x values: sums over positions
//
// A work item is one key-value head of a few neighbouring queries of one sequence, whose rows are
// those queries' heads of the group: all read the same keys. A single query, of a decode, waits for
// memory, not for products: its item is a part of its context with all heads, so that blocks are
// read as they lie, and the parts are put together at the end.
#include <omp.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "tile.h"

namespace {

constexpr long UNIT = 16;    // positions
constexpr long CHUNK = 128;  // positions whose scores are held at once
constexpr long AHEAD = 4;    // units that are fetched before they are read
constexpr long ROWS = 48;    // queries times heads of an item, if a group is not larger
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Rotation {  // cos, sin: [T, D] with equal halves
  const bf16 *cos, *sin;
  long size;

  // Turns pairs (x[i], x[i + D/2]) of one head by the angles of a token.
  void turn(const bf16* x, long token, bf16* to) const {
    const bf16 *c = cos + token * size, *s = sin + token * size;
    for (long i = 0, half = size / 2; i < half; i += LANES) {
      __m512 a = load(x + i), b = load(x + half + i), cosine = load(c + i), sine = load(s + i);
      store(to + i, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)));
      store(to + half + i, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)));
    }
  }
};

struct Cache {
  bf16 *k, *v;
  long heads, block_size, size;

  // Where the unit of a block that holds an offset starts, in k as in v.
  long unit(long block, long offset, long head) const {
    return ((block * heads + head) * block_size + offset / UNIT * UNIT) * size;
  }

  // `last`: no neighbour follows in this step. Its half of the pair is cleared, so that weights of
  // zero meet no leftover that is not a number.
  void put(long slot, long head, const bf16* key, const bf16* value, bool last) const {
    long at = slot % block_size % UNIT;
    long start = unit(slot / block_size, slot % block_size, head);
    for (long pair = 0; pair < size / 2; pair++)
      std::memcpy(k + start + (pair * UNIT + at) * 2, key + 2 * pair, 4);
    for (long d = 0; d < size; d++) {
      bf16* pair = v + start + d / COLUMNS * COLUMNS * UNIT + at / 2 * 64 + d % COLUMNS * 2;
      pair[at % 2] = value[d];
      if (last && at % 2 == 0) pair[1] = 0;
    }
  }
};

struct Item {
  long sequence, head, heads, query, queries, begin, end;  // positions [begin, end) of the context
  long part;  // its place among the parts, or -1 if it is whole
};

struct Join {  // the parts of one query's context
  long sequence, part, parts;
};

// The rows of an item: what is added up, its maximum and the sum of the weights so far.
struct Rows {
  long size;
  std::unique_ptr<bf16[]> q, weights;
  std::unique_ptr<float[]> scores, sums, most, total;

  Rows(long rows, long size)
      : size(size), q(new bf16[rows * size]), weights(new bf16[rows * CHUNK]),
        scores(new float[rows * CHUNK]), sums(new float[rows * size]), most(new float[rows]),
        total(new float[rows]) {}

  void reset(long rows) {
    std::fill_n(sums.get(), rows * size, 0.0f);
    std::fill_n(most.get(), rows, NEVER);
    std::fill_n(total.get(), rows, 0.0f);
  }

  // Scores of `count` rows with two units of keys, into columns from `at` on. next: see `tile`.
  void score(long row, long count, const bf16* const (&k)[2], const bf16* const (&next)[2],
             long at) {
    in_parts(count, MAX_ROWS, [&](long part, long some) {
      with_rows(some, [&](auto R) {
        long first = row + part;
        __m512 acc[R][2];
        clear(acc);
        tile<R>(&q[first * size], size, k[0], k[1], 2 * UNIT, size / 2, next[0], next[1], acc);
        unrolled<R>([&](auto r) {
          _mm512_storeu_ps(&scores[(first + r) * CHUNK + at], acc[r][0]);
          _mm512_storeu_ps(&scores[(first + r) * CHUNK + at + LANES], acc[r][1]);
        });
      });
    });
  }

  // Turns columns [from, to) of a row's scores into weights, and all others below `padded` to 0.
  void weigh(long row, long from, long to, long padded, float scale) {
    const float* s = &scores[row * CHUNK];
    bf16* w = &weights[row * CHUNK];
    __m512 top = _mm512_set1_ps(NEVER), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
    bool all = from <= 0 && to >= padded;
    auto lanes = [&](long i) -> __mmask16 {
      return all ? 0xFFFF : first_lanes(to - i) & ~first_lanes(from - i);
    };
    for (long i = 0; i < padded; i += LANES)
      top = _mm512_mask_max_ps(top, lanes(i), top, _mm512_loadu_ps(s + i));
    float before = most[row];
    float now = std::max(before, _mm512_reduce_max_ps(top) * scale);
    __m512 shift = _mm512_set1_ps(now);
    for (long i = 0; i < padded; i += LANES) {
      __m512 weight = exp(_mm512_fmsub_ps(_mm512_loadu_ps(s + i), by, shift));
      weight = _mm512_maskz_mov_ps(lanes(i), weight);
      sum = _mm512_add_ps(sum, weight);
      store(w + i, weight);
    }
    float keep = before == NEVER ? 0 : std::exp(before - now);
    most[row] = now;
    total[row] = total[row] * keep + _mm512_reduce_add_ps(sum);
    if (keep != 1)
      for (long d = 0; d < size; d += LANES) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(&sums[row * size + d]), _mm512_set1_ps(keep));
        _mm512_storeu_ps(&sums[row * size + d], scaled);
      }
  }

  // Adds the values of columns [at, end), weighted, to `count` rows. units: those of all columns,
  // and AHEAD more, `shift` elements further on.
  void add(long row, long count, long at, long end, const bf16* const* units, long shift) {
    for (long d = 0; d < size; d += COLUMNS)
      in_parts(count, MAX_ROWS, [&](long part, long some) {
        with_rows(some, [&](auto R) {
          long first = row + part;
          __m512 acc[R][2];
          clear(acc);
          for (long i = at; i < end; i += UNIT) {
            const bf16* v = units[i / UNIT] + shift + d * UNIT;
            const bf16* next = units[i / UNIT + AHEAD] + shift + d * UNIT;
            long pairs = std::min(UNIT, end - i + 1) / 2;
            tile<R>(&weights[first * CHUNK + i], CHUNK, v, v + 32, 64, pairs, next, next + 32, acc);
          }
          unrolled<R>([&](auto r) {
            float* to = &sums[(first + r) * size + d];
            _mm512_storeu_ps(to, _mm512_add_ps(acc[r][0], _mm512_loadu_ps(to)));
            _mm512_storeu_ps(to + LANES, _mm512_add_ps(acc[r][1], _mm512_loadu_ps(to + LANES)));
          });
        });
      });
  }
};

}  // namespace

extern "C" {

// Rotates q and k, stores k and v in the cache, and attends.
//   q [T, heads, D], k and v [T, kv_heads, D]: tokens are *_stride elements apart.
//   cos, sin [T, D]. slots [T]: block * block_size + offset; -1 stores nothing.
//   query_starts [B + 1], context_lens [B], tables [B, table_stride]: see AttentionBatch.
//   window: positions seen, from the own one back; 0 is all. out [T, heads, D].
// D is a multiple of 32, block_size of 16.
void attention(const bf16* q, long q_stride, const bf16* k, long k_stride, const bf16* v,
               long v_stride, const bf16* cos, const bf16* sin, const int64_t* query_starts,
               const int64_t* context_lens, const int64_t* tables, const int64_t* slots,
               long table_stride, bf16* k_cache, bf16* v_cache, bf16* out, long num_seqs,
               long heads, long kv_heads, long size, long block_size, long window) {
  Rotation rotation{cos, sin, size};
  Cache cache{k_cache, v_cache, kv_heads, block_size, size};
  long group = heads / kv_heads, tokens = query_starts[num_seqs];
  long most_queries = std::max(1L, ROWS / group);
  float scale = 1 / std::sqrt(float(size));

  std::vector<Item> items;
  std::vector<Join> joins;
  long num_parts = 0;
  // Parts of a context: large, unless there are too few sequences to keep all threads busy.
  long part_length = num_seqs < 2 * omp_get_max_threads() ? 64 : 512;
  for (long b = 0; b < num_seqs; b++) {
    long queries = query_starts[b + 1] - query_starts[b], past = context_lens[b] - queries;
    long heads_each = queries == 1 ? kv_heads : 1;
    for (long head = 0; head < kv_heads; head += heads_each)
      in_parts(queries, most_queries, [&](long first, long count) {
        long begin = window ? std::max(0L, past + first + 1 - window) : 0;
        long end = past + first + count, length = queries == 1 ? part_length : end;
        begin = begin / UNIT * UNIT;
        bool whole = end - begin <= length;
        if (!whole) joins.push_back({b, num_parts, (end - begin + length - 1) / length});
        for (; begin < end; begin += length)
          items.push_back({b, head, heads_each, first, count, begin, std::min(end, begin + length),
                           whole ? -1 : num_parts++});
      });
  }
  std::vector<float> parts(num_parts * heads * (size + 2));

  auto unit = [&](const Item& item, long at) {
    unsigned position = at, size = block_size;  // divided sooner than long ones
    long block = tables[item.sequence * table_stride + position / size];
    return cache.unit(block, position % size, item.head);
  };

  // A thread takes a few items at a turn, so that it most often knows what it will read next.
  long turn = 1 + items.size() / (16 * omp_get_max_threads());

#pragma omp parallel if (tokens > 1 || items.size() > 1)
  {
    std::vector<bf16> turned(size);
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++) {
      if (slots[t] < 0) continue;
      bool last = t + 1 == tokens || slots[t + 1] != slots[t] + 1;
      for (long head = 0; head < kv_heads; head++) {
        rotation.turn(k + t * k_stride + head * size, t, turned.data());
        cache.put(slots[t], head, turned.data(), v + t * v_stride + head * size, last);
      }
    }

    Rows rows(std::max(most_queries * group, heads), size);
#pragma omp for schedule(dynamic, turn)
    for (size_t index = 0; index < items.size(); index++) {
      const Item& item = items[index];
      const Item& then = items[std::min(index + 1, items.size() - 1)];
      long token = query_starts[item.sequence] + item.query;
      long position = context_lens[item.sequence] - query_starts[item.sequence + 1] + token;
      long per_head = item.queries * group, count = per_head * item.heads;
      // A row is a head of the group, of a query, of a key-value head.
      auto query_of = [&](long row) { return row % per_head / group; };
      auto head_of = [&](long row) { return (item.head + row / per_head) * group + row % group; };
      rows.reset(count);
      long ahead = (query_starts[then.sequence] + then.query - token) * q_stride;
      ahead += (then.head - item.head) * group * size;
      for (long row = 0; row < count; row++) {
        const bf16* from = q + (token + query_of(row)) * q_stride + head_of(row) * size;
        rotation.turn(from, token + query_of(row), &rows.q[row * size]);
        for (long d = 0; d < size; d += 32) _mm_prefetch((const char*)(from + ahead + d), _MM_HINT_T0);
      }
      for (long chunk = item.begin; chunk < item.end; chunk += CHUNK) {
        long positions = std::min(CHUNK, item.end - chunk);
        long padded = (positions + COLUMNS - 1) / COLUMNS * COLUMNS;
        // In the order in which they are read: keys, values, and the first keys of what follows.
        const bf16* units[2 * CHUNK / UNIT + AHEAD];
        long keys = padded / UNIT;
        for (long i = 0; i < keys; i++) {
          long start = unit(item, chunk + std::min(i * UNIT, positions - 1));
          units[i] = cache.k + start;
          units[keys + i] = cache.v + start;
        }
        bool more = chunk + CHUNK < item.end;
        const Item& follows = more ? item : then;
        for (long i = 0; i < AHEAD; i++) {
          long at = (more ? chunk + CHUNK : then.begin) + i * UNIT;
          units[2 * keys + i] = cache.k + unit(follows, std::min(at, follows.end - 1));
        }

        for (long i = 0; i < keys; i += 2)
          for (long h = 0; h < item.heads; h++) {
            long shift = h * block_size * size;
            rows.score(h * per_head, per_head, {units[i] + shift, units[i + 1] + shift},
                       {units[i + AHEAD] + shift, units[i + AHEAD + 1] + shift}, i * UNIT);
          }
        for (long row = 0; row < count; row++) {
          long end = position + query_of(row) + 1 - chunk;
          rows.weigh(row, window ? end - window : 0, std::min(end, positions), padded, scale);
        }
        long step = item.heads > 1 ? COLUMNS : CHUNK;
        for (long at = 0; at < positions; at += step)
          for (long h = 0; h < item.heads; h++) {
            long shift = h * block_size * size;
            rows.add(h * per_head, per_head, at, std::min(at + step, positions), units + keys, shift);
          }
      }
      for (long row = 0; row < count; row++) {
        const float* sums = &rows.sums[row * size];
        if (item.part >= 0) {
          float* to = &parts[(item.part * heads + head_of(row)) * (size + 2)];
          std::memcpy(to, sums, size * 4);
          to[size] = rows.most[row];
          to[size + 1] = rows.total[row];
          continue;
        }
        bf16* to = out + ((token + query_of(row)) * heads + head_of(row)) * size;
        __m512 by = _mm512_set1_ps(1 / rows.total[row]);
        for (long d = 0; d < size; d += LANES)
          store(to + d, _mm512_mul_ps(_mm512_loadu_ps(sums + d), by));
      }
    }

    // Each part weighs as much as its sum, moved to the common maximum.
#pragma omp for schedule(static)
    for (size_t index = 0; index < joins.size() * heads; index++) {
      const Join& join = joins[index / heads];
      long head = index % heads, step = heads * (size + 2);
      const float* first = &parts[(join.part * heads + head) * (size + 2)];
      float top = NEVER, total = 0;
      for (long i = 0; i < join.parts; i++) top = std::max(top, first[i * step + size]);
      for (long i = 0; i < join.parts; i++)
        total += first[i * step + size + 1] * std::exp(first[i * step + size] - top);
      bf16* to = out + (query_starts[join.sequence] * heads + head) * size;
      for (long d = 0; d < size; d += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < join.parts; i++) {
          float by = std::exp(first[i * step + size] - top) / total;
          sum = _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_loadu_ps(first + i * step + d), sum);
        }
        store(to + d, sum);
      }
    }
  }
}
}
