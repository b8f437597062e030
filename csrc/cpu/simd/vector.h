// One vector of T in the instruction set of this translation unit: loads, stores, partial ones,
// transposition.
//
// Arithmetic is written with the operators of GCC's vector extension (v * w + u contracts to a fused
// multiply-add where there is one; a scalar operand is broadcast).
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tk::TK_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, vector_registers = 32;
#else
constexpr int vector_bytes = 16, vector_registers = 16;
#endif

// `count` numbers in a register. Pass this on to templates, not Unaligned: a type that is a template argument
// is aligned again.
template <class T, int count>
struct Lanes {
  static constexpr int lanes = count;
  typedef T Type __attribute__((vector_size(count * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(count * sizeof(T)), aligned(alignof(T)), may_alias));

  static Type load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(T* p, Type v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

// As many as the instruction set has.
template <class T>
struct Vector : Lanes<T, vector_bytes / sizeof(T)> {
  using All = Lanes<T, vector_bytes / sizeof(T)>;
  using All::load;
  using All::store;
  using typename All::Type;

  // The first `count` lanes (0 to `lanes`); the others are not touched in memory and load as zero.
  struct First {
    explicit First(int64_t count);
#if defined(__AVX512F__)
    uint32_t bits;
#elif defined(__AVX2__)
    __m256i bits;
#else
    int count;
#endif
  };
  static Type load(const T* p, First first);
  static void store(T* p, Type v, First first);
};

#if defined(__AVX512F__)

template <class T>
inline Vector<T>::First::First(int64_t count) : bits((1u << count) - 1) {}
template <>
inline auto Vector<float>::load(const float* p, First first) -> Type {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first.bits), p);
}
template <>
inline auto Vector<double>::load(const double* p, First first) -> Type {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first.bits), p);
}
template <>
inline void Vector<float>::store(float* p, Type v, First first) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first.bits), v);
}
template <>
inline void Vector<double>::store(double* p, Type v, First first) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first.bits), v);
}

#elif defined(__AVX2__)

template <>
inline Vector<float>::First::First(int64_t count)
    : bits(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
template <>
inline Vector<double>::First::First(int64_t count)
    : bits(_mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3))) {}
template <>
inline auto Vector<float>::load(const float* p, First first) -> Type {
  return _mm256_maskload_ps(p, first.bits);
}
template <>
inline auto Vector<double>::load(const double* p, First first) -> Type {
  return _mm256_maskload_pd(p, first.bits);
}
template <>
inline void Vector<float>::store(float* p, Type v, First first) {
  _mm256_maskstore_ps(p, first.bits, v);
}
template <>
inline void Vector<double>::store(double* p, Type v, First first) {
  _mm256_maskstore_pd(p, first.bits, v);
}

#else

template <class T>
inline Vector<T>::First::First(int64_t count) : count(static_cast<int>(count)) {}
template <class T>
inline auto Vector<T>::load(const T* p, First first) -> Type {
  Type v = {};
  for (int i = 0; i < first.count; ++i) v[i] = p[i];
  return v;
}
template <class T>
inline void Vector<T>::store(T* p, Type v, First first) {
  for (int i = 0; i < first.count; ++i) p[i] = v[i];
}

#endif

// Whether a partial load costs as little as a full one, so that kernels may use it inside a loop.
#if defined(__AVX512F__)
constexpr bool cheap_partial_loads = true;
#else
constexpr bool cheap_partial_loads = false;
#endif

// Lanes first, first + 1, … of a and of b in turn. Compilers make one or two shuffles of it.
template <int first, class Vec, int... i>
inline Vec zip(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return Vec{(i % 2 ? b : a)[first + i / 2]...};
}

// Transposes rows[lanes] in registers: log2(lanes) perfect shuffles, row i zipped with row i + lanes/2.
template <class T>
inline void transpose(typename Vector<T>::Type (&rows)[Vector<T>::lanes]) {
  constexpr int lanes = Vector<T>::lanes;
  constexpr auto all = std::make_integer_sequence<int, lanes>();
  typename Vector<T>::Type next[lanes];
#pragma GCC unroll 4
  for (int stage = 1; stage < lanes; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = zip<0>(rows[i], rows[i + lanes / 2], all);
      next[2 * i + 1] = zip<lanes / 2>(rows[i], rows[i + lanes / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

}  // namespace tk::TK_ISA
