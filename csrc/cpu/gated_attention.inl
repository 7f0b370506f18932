// Included by gated_attention_<isa>.cpp with P2S_ISA defined; see vectors.h for what differs between the instruction sets.

#include "gated_attention_isa.h"
#include "products.h"

namespace {
namespace P2S_ISA {

using p2s::GatedAttentionArgs;
using p2s::GatedAttentionGradArgs;

constexpr int64_t kQueryRows = GatedScratch::kQueryRows;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

GatedScratch scratch_of(const GatedAttentionArgs& args) { return {args.n, args.dim, args.heads, args.queries}; }

inline float root(float x) { return __builtin_sqrtf(x); }

// Which lanes of the vector at `start` lie before `end`.
inline Ints before(int64_t start, int64_t end) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(at_most(end - start, kLanes));
}

// One head of one item.
template <class T>
struct Head {
  const GatedAttentionArgs& args;
  int64_t item, head;

  int64_t d() const { return args.dim / args.heads; }
  float scale() const { return 1.0f / root(static_cast<float>(d())); }
  Rows<T> rows(const void* p, int64_t item_stride, int64_t stride, int64_t begin, int64_t count) const {
    return {static_cast<const T*>(p) + item * item_stride + begin * stride + head * d(), count, stride, d(), nullptr};
  }
  Rows<T> q_rows(int64_t begin, int64_t count) const {
    return rows(args.q, args.q_item, args.q_row, args.first_row + begin, count);
  }
  Rows<T> k_rows() const { return rows(args.k, args.k_item, args.k_row, 0, args.n); }
  Rows<T> v_rows(const float* gate) const {
    Rows<T> v = rows(args.v, args.v_item, args.v_row, 0, args.n);
    v.gains = gate;
    return v;
  }
  // of out or of its gradient
  Rows<T> out_rows(const void* p, int64_t begin, int64_t count) const {
    return rows(p, args.rows * args.dim, args.dim, begin, count);
  }
  float* lse() const { return args.lse + (item * args.heads + head) * args.rows; }
};

// Mean over the query tokens of the maps of `item`, or null without a gate.
inline const float* mean_map(const GatedAttentionArgs& args, int64_t item, float* gate) {
  if (!args.gate) return nullptr;
  const float* maps = args.maps + item * args.queries * args.n;
  for (int64_t j = 0; j < args.n; ++j) gate[j] = maps[j];
  for (int64_t g = 1; g < args.queries; ++g) {
    for (int64_t j = 0; j < args.n; ++j) gate[j] += maps[g * args.n + j];
  }
  for (int64_t j = 0; j < args.n; ++j) gate[j] /= static_cast<float>(args.queries);
  return gate;
}

// Rows [0, count) of q as floats, `dim` channels each, rows padded.
template <class T>
void copy_queries(const GatedAttentionArgs& args, int64_t item, float* to) {
  for (int64_t g = 0; g < args.queries; ++g) {
    const T* row = static_cast<const T*>(args.q) + item * args.q_item + (args.n - args.queries + g) * args.q_row;
    pack_row<Singles>(row, args.dim, 1.0f, to + g * padded(args.dim));
  }
}

constexpr int kQueriesAtOnce = 4;

template <class T>
void maps(const GatedAttentionArgs& args, int64_t item, int64_t begin, int64_t end, float* workspace) {
  float* query_q = workspace + scratch_of(args).query_q;
  copy_queries<T>(args, item, query_q);
  const int64_t pitch = padded(args.dim);
  const float scale = 1.0f / (root(static_cast<float>(args.dim / args.heads)) * static_cast<float>(args.heads));
  for (int64_t g = 0; g < args.queries; g += kQueriesAtOnce) {
    const int64_t high = at_most(kQueriesAtOnce, args.queries - g);
    float* out = args.maps + (item * args.queries + g) * args.n;
    for (int64_t j = begin; j < end; ++j) {
      const T* k = static_cast<const T*>(args.k) + item * args.k_item + j * args.k_row;
      Floats sums[kQueriesAtOnce];
      for (auto& x : sums) x = splat(0.0f);
      for (int64_t c = 0; c < args.dim; c += kLanes) {
        const Floats x = load_up_to(k + c, args.dim - c);
        for (int i = 0; i < kQueriesAtOnce; ++i) {
          sums[i] = fused(load(query_q + (g + at_most(i, high - 1)) * pitch + c), x, sums[i]);
        }
      }
      for (int i = 0; i < high; ++i) out[i * args.n + j] = sum(sums[i]) * scale;
    }
    const Floats one = splat(1.0f);
    for (int i = 0; i < high; ++i) {
      for (int64_t j = begin; j < end; j += kLanes) {
        float* x = out + i * args.n + j;
        store_up_to(x, one / (one + exp2(load_up_to(x, end - j) * splat(-kLog2E))), end - j);
      }
    }
  }
}

// Rows of logits -> exp(scale (x - largest of its row)), in place, 0 beyond n. Gives the sums' inverses and logarithms.
template <class Unit>
inline void softmax(float* logits, int64_t rows, int64_t pitch, int64_t n, float scale, float* lse, float* inverse) {
  const int64_t last = (n - 1) / kLanes * kLanes;
  float most[kQueryRows], sums[kQueryRows];
  for (int64_t i = 0; i < rows; ++i) {
    float* row = logits + i * pitch;
    const Floats end = before(last, n) ? load(row + last) : splat(-__builtin_inff());
    store(row + last, end);
    Floats top = end;
    for (int64_t j = 0; j < last; j += kLanes) top = larger(top, load(row + j));
    most[i] = largest(top) * (scale * kLog2E);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* row = logits + i * pitch;
    const Floats offset = splat(-most[i]), factor = splat(scale * kLog2E);
    Floats total = splat(0.0f);
    for (int64_t j = 0; j <= last; j += kLanes) {
      const Floats p = Unit::exp2(fused(load(row + j), factor, offset));
      total += p;
      if constexpr (Unit::per_unit == 1) {
        store(row + j, p);
      } else {
        store(reinterpret_cast<Bf16*>(row) + j, p);  // never ahead of what is read
      }
    }
    sums[i] = sum(total);
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const Floats all = load_up_to(sums + i, rows - i);
    store_up_to(lse + i, (load_up_to(most + i, rows - i) + log2(all)) * splat(kLn2), rows - i);
    store_up_to(inverse + i, splat(1.0f) / all, rows - i);
  }
}

template <class Unit, class T>
void attend(const GatedAttentionArgs& args, int64_t item, int64_t index, int64_t begin, int64_t end, float* workspace) {
  const GatedScratch at = scratch_of(args);
  const Head<T> head{args, item, index};
  const int64_t n = args.n, d = head.d(), wide_d = padded(d), wide_n = padded(n);
  const int64_t key_units = units_of(n, Unit::per_unit), d_units = units_of(d, Unit::per_unit);
  float *k_columns = workspace + at.k_columns, *v_rows = workspace + at.v_rows, *left = workspace + at.left;
  float *logits = workspace + at.logits, *block = workspace + at.block;
  const float* gate = mean_map(args, item, workspace + at.gate);
  // What a tile reads is asked for one step ahead, what it writes at its start.
  const auto q_rows = [&](int64_t first) { return head.q_rows(first, at_most(kQueryRows, end - first)); };
  if (begin < end) q_rows(begin).prefetch_all();
  pack_transposed<Unit>(head.k_rows(), workspace + at.stage, k_columns);
  pack_rows<Unit>(head.v_rows(gate), v_rows);
  for (int64_t first = begin; first < end; first += kQueryRows) {
    const int64_t rows = at_most(kQueryRows, end - first);
    const Rows<T> out_rows = head.out_rows(args.out, first, rows);
    out_rows.template prefetch_all<1>();
    pack_left<Unit>(q_rows(first), wide_d, left);
    if (first + rows < end) q_rows(first + rows).prefetch_all();
    product<Unit>({left, wide_d, 1}, rows, k_columns, d_units, vectors_of(n), {logits, wide_n, false});
    float inverse[kQueryRows];
    softmax<Unit>(logits, rows, wide_n, n, head.scale(), head.lse() + first, inverse);
    product<Unit>({logits, wide_n, 1}, rows, v_rows, key_units, vectors_of(d), {block, wide_d, false});
    for (int64_t i = 0; i < rows; ++i) {
      T* out = const_cast<T*>(out_rows.row(i));
      const Floats gain = splat(inverse[i]);
      for (int64_t c = 0; c < d; c += kLanes) store_up_to(out + c, load(block + i * wide_d + c) * gain, d - c);
    }
  }
}

// Sum over the channels of one row of a and b.
template <class T>
inline float dot(const T* a, const T* b, int64_t count) {
  Floats total = splat(0.0f);
  for (int64_t c = 0; c < count; c += kLanes) {
    total = fused(load_up_to(a + c, count - c), load_up_to(b + c, count - c), total);
  }
  return sum(total);
}

// Where one tile of rows keeps p (softmax weights) and ds (gradient of the scaled logits) for the products after it.
template <class Unit>
struct TileWeights {
  float *logits, *grad_logits, *paired;
  int64_t pitch;

  // inner dimension = keys
  Left grads_by_row() const { return {grad_logits, pitch, 1}; }
  // inner dimension = rows of the tile
  Left weights_by_key() const { return {Unit::per_unit == 1 ? logits : paired, 1, pitch}; }
  Left grads_by_key() const { return {Unit::per_unit == 1 ? grad_logits : logits, 1, pitch}; }
};

struct RowTerms {
  float offset, delta;  // -log2 of the softmax's sum, sum over channels of out * grad_out
};

// p and ds of `Unit::per_unit` rows from row i on, for which logits hold q.k and grad_logits grad_out.v. In pairs, rows
// from `count` on count as zero.
template <class Unit>
inline void weigh(const TileWeights<Unit>& tile, int64_t i, int64_t count, int64_t n, float scale,
                  const RowTerms* terms) {
  constexpr int kRows = Unit::per_unit;
  for (int64_t j = 0; j < n; j += kLanes) {
    Floats p[kRows], ds[kRows];
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) {
        p[r] = ds[r] = splat(0.0f);
        continue;
      }
      const int64_t here = (i + r) * tile.pitch + j;
      const Floats x = Unit::exp2(fused(load(tile.logits + here), splat(scale * kLog2E), splat(terms[r].offset)));
      p[r] = before(j, n) ? x : splat(0.0f);
      ds[r] = p[r] * (load(tile.grad_logits + here) - splat(terms[r].delta));
    }
    if constexpr (kRows == 1) {
      store(tile.logits + i * tile.pitch + j, p[0]);
      store(tile.grad_logits + i * tile.pitch + j, ds[0]);
    } else {
      // rows 2u and 2u + 1 of logits are read by now up to j: row u holds ds by key from here on
      store(tile.paired + i / 2 * tile.pitch + j, pair_up(p[0], p[1]));
      store(tile.logits + i / 2 * tile.pitch + j, pair_up(ds[0], ds[1]));
      for (int r = 0; r < at_most(kRows, count); ++r) {
        store(reinterpret_cast<Bf16*>(tile.grad_logits + (i + r) * tile.pitch) + j, ds[r]);
      }
    }
  }
}

template <class Unit, class T>
void attend_backward(const GatedAttentionGradArgs& grads, int64_t item, int64_t index, float* workspace) {
  const GatedAttentionArgs& args = grads.forward;
  const GatedScratch at = scratch_of(args);
  const Head<T> head{args, item, index};
  const int64_t n = args.n, d = head.d(), wide_d = padded(d), wide_n = padded(n);
  const int64_t key_units = units_of(n, Unit::per_unit), d_units = units_of(d, Unit::per_unit);
  const float scale = head.scale();
  float *k_columns = workspace + at.k_columns, *v_columns = workspace + at.v_columns, *k_rows = workspace + at.v_rows;
  float *left = workspace + at.left, *right = workspace + at.right, *block = workspace + at.block;
  float *grad_k = workspace + at.grad_k, *grad_v = workspace + at.grad_v;
  const TileWeights<Unit> tile{workspace + at.logits, workspace + at.grad_logits, workspace + at.paired, wide_n};
  const float* gate = mean_map(args, item, workspace + at.gate);
  pack_transposed<Unit>(head.k_rows(), workspace + at.stage, k_columns);
  pack_transposed<Unit>(head.v_rows(gate), workspace + at.stage, v_columns);
  pack_rows<Unit>(head.k_rows(), k_rows);

  T* grad_q = static_cast<T*>(grads.grad_q) + item * n * args.dim + index * d;
  for (int64_t i = 0; i < n; ++i) {
    if (i < args.first_row || i >= args.first_row + args.rows) {
      std::memset(grad_q + i * args.dim, 0, static_cast<size_t>(d) * sizeof(T));
    }
  }
  for (int64_t first = 0; first < args.rows; first += at.grad_rows) {
    const int64_t rows = at_most(at.grad_rows, args.rows - first), row_units = units_of(rows, Unit::per_unit);
    const Rows<T> q = head.q_rows(first, rows), out = head.out_rows(args.out, first, rows);
    const Rows<T> grad_out = head.out_rows(grads.grad_out, first, rows);
    pack_left<Unit>(q, wide_d, left);
    product<Unit>({left, wide_d, 1}, rows, k_columns, d_units, vectors_of(n), {tile.logits, wide_n, false});
    pack_left<Unit>(grad_out, wide_d, left);
    product<Unit>({left, wide_d, 1}, rows, v_columns, d_units, vectors_of(n), {tile.grad_logits, wide_n, false});
    for (int64_t i = 0; i < rows; i += Unit::per_unit) {
      RowTerms terms[Unit::per_unit];
      for (int64_t r = 0; r < at_most(Unit::per_unit, rows - i); ++r) {
        out.prefetch_after(i + r);
        terms[r] = {head.lse()[first + i + r] * -kLog2E, dot(grad_out.row(i + r), out.row(i + r), d)};
      }
      weigh(tile, i, rows - i, n, scale, terms);
    }
    product<Unit>(tile.grads_by_row(), rows, k_rows, key_units, vectors_of(d), {block, wide_d, false});
    for (int64_t i = 0; i < rows; ++i) {
      T* to = grad_q + (args.first_row + first + i) * args.dim;
      for (int64_t c = 0; c < d; c += kLanes) {
        store_up_to(to + c, load(block + i * wide_d + c) * splat(scale), d - c);
      }
    }
    pack_rows<Unit>(grad_out, right);
    product<Unit>(tile.weights_by_key(), n, right, row_units, vectors_of(d), {grad_v, wide_d, first > 0});
    pack_rows<Unit>(q, right);
    product<Unit>(tile.grads_by_key(), n, right, row_units, vectors_of(d), {grad_k, wide_d, first > 0});
  }
  float* grad_gate = grads.grad_gate + (item * args.heads + index) * n;
  const Rows<T> v_rows = head.v_rows(nullptr);
  for (int64_t j = 0; j < n; ++j) {
    v_rows.prefetch_after(j);
    const int64_t here = (item * n + j) * args.dim + index * d;
    const T* v = v_rows.row(j);
    Floats total = splat(0.0f);
    for (int64_t c = 0; c < d; c += kLanes) {
      const Floats x = load(grad_v + j * wide_d + c);
      total = fused(x, load_up_to(v + c, d - c), total);
      store_up_to(static_cast<T*>(grads.grad_v) + here + c, gate ? x * splat(gate[j]) : x, d - c);
      store_up_to(static_cast<T*>(grads.grad_k) + here + c, load(grad_k + j * wide_d + c) * splat(scale), d - c);
    }
    grad_gate[j] = sum(total);
  }
}

template <class T>
void maps_backward(const GatedAttentionGradArgs& grads, int64_t item, float* workspace) {
  const GatedAttentionArgs& args = grads.forward;
  const GatedScratch at = scratch_of(args);
  const int64_t n = args.n, dim = args.dim, queries = args.queries, pitch = padded(dim);
  float *gate = workspace + at.gate, *query_q = workspace + at.query_q, *grad_z = workspace + at.grad_z;
  float* query_grad = workspace + at.query_grad;
  const float scale = 1.0f / (root(static_cast<float>(dim / args.heads)) * static_cast<float>(args.heads));
  for (int64_t j = 0; j < n; ++j) gate[j] = 0.0f;
  for (int64_t h = 0; args.gate && h < args.heads; ++h) {
    for (int64_t j = 0; j < n; ++j) gate[j] += grads.grad_gate[(item * args.heads + h) * n + j];
  }
  for (int64_t g = 0; g < queries; ++g) {
    const float* mu = args.maps + (item * queries + g) * n;
    const float* grad = grads.grad_maps + (item * queries + g) * n;
    for (int64_t j = 0; j < n; ++j) {
      grad_z[g * n + j] = (gate[j] / static_cast<float>(queries) + grad[j]) * mu[j] * (1.0f - mu[j]) * scale;
    }
  }
  copy_queries<T>(args, item, query_q);
  T* grad_k = static_cast<T*>(grads.grad_k) + item * n * dim;
  T* grad_q = static_cast<T*>(grads.grad_q) + (item * n + n - queries) * dim;
  for (int64_t j = 0; j < n; ++j) {
    const T* k = static_cast<const T*>(args.k) + item * args.k_item + j * args.k_row;
    for (int64_t c = 0; c < dim; c += kLanes) {
      const int64_t here = dim - c;
      Floats total = load_up_to(grad_k + j * dim + c, here);
      const Floats x = load_up_to(k + c, here);
      for (int64_t g = 0; g < queries; ++g) {
        const Floats z = splat(grad_z[g * n + j]);
        float* grad = query_grad + g * pitch + c;
        total = fused(z, load(query_q + g * pitch + c), total);
        store(grad, fused(z, x, j == 0 ? splat(0.0f) : load(grad)));
      }
      store_up_to(grad_k + j * dim + c, total, here);
    }
  }
  for (int64_t g = 0; g < queries; ++g) {
    for (int64_t c = 0; c < dim; c += kLanes) {
      T* to = grad_q + g * dim + c;
      store_up_to(to, load_up_to(to, dim - c) + load(query_grad + g * pitch + c), dim - c);
    }
  }
}

#if defined(__AVX512BF16__)
using HalfUnit = Pairs;
#else
using HalfUnit = Singles;
#endif

}  // namespace P2S_ISA
}  // namespace

namespace p2s {

using namespace ::P2S_ISA;

const char* P2S_NAME(gated_maps)(const GatedAttentionArgs& args, int64_t item, int64_t begin, int64_t end,
                                 float* workspace) {
  const bool halves = args.number == Number::bfloat16;
  halves ? maps<Bf16>(args, item, begin, end, workspace) : maps<float>(args, item, begin, end, workspace);
  return kIsaName;
}

const char* P2S_NAME(gated_head)(const GatedAttentionArgs& args, int64_t item, int64_t head, int64_t begin, int64_t end,
                                 float* workspace) {
  const bool halves = args.number == Number::bfloat16;
  halves ? attend<HalfUnit, Bf16>(args, item, head, begin, end, workspace)
         : attend<Singles, float>(args, item, head, begin, end, workspace);
  return kIsaName;
}

const char* P2S_NAME(gated_backward_head)(const GatedAttentionGradArgs& args, int64_t item, int64_t head,
                                          float* workspace) {
  const bool halves = args.forward.number == Number::bfloat16;
  halves ? attend_backward<HalfUnit, Bf16>(args, item, head, workspace)
         : attend_backward<Singles, float>(args, item, head, workspace);
  return kIsaName;
}

const char* P2S_NAME(gated_backward_maps)(const GatedAttentionGradArgs& args, int64_t item, float* workspace) {
  const bool halves = args.forward.number == Number::bfloat16;
  halves ? maps_backward<Bf16>(args, item, workspace) : maps_backward<float>(args, item, workspace);
  return kIsaName;
}

}  // namespace p2s
