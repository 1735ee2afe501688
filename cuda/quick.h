// A float that divides, takes roots and averages by a straight course of instructions, and knows where that leads astray.
//
// The machine has no IEEE division and square root: it has approximations, which a compiler makes exact by a few
// fused multiply-adds (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990),
// and for operands far from 1 it branches to a slower course, at every single division. Those branches keep the
// scheduler from working on several values at once. Here the course is the compiler's own (a test compares them, for every
// architecture), without branches, and so are the bits unless there is `Doubt`; then all of it is done again with plain
// floats (step.cu).
//
// Doubt is cheap because it is summed up: integers are compared as they are, three at a time (VIMNMX3 on sm_90), and what
// is infinite or NaN stays so in a sum of squares.
#pragma once
#include "device.h"

namespace lb {

#ifdef __CUDACC__
LB_FN float near_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LB_FN float near_reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else  // the approximations' error is not in the results
LB_FN float flushed(float x) { return float_of(bits_of(x) & 0x7F800000u) == 0.0f ? x * 0.0f : x; }
LB_FN float near_reciprocal(float x) { return flushed(1.0f / flushed(x)); }
LB_FN float near_reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(flushed(x)); }
#endif

struct Doubt {
  float strange = 0.0f;           // infinite or NaN: some number was, or its square
  uint32_t numerator = ~0u;       // the least 2 |x| - 1, as bits: of 0 that is the largest
  uint32_t denominator = 0u;      // the largest, as bits: what is negative is larger than all others
  uint32_t least = ~0u, most = 0u;  // of numbers that must be 0 or above, as bits; less 1, which of 0 is the largest
  bool otherwise = false;         // what quick numbers do not know

  LB_FN void must_be_finite(Doubt &doubt, float x) { doubt.strange = fma(x, x, doubt.strange); }  // and below 2**64
  LB_FN void must_be_positive(Doubt &doubt, float x) {  // or 0
    const uint32_t bits = bits_of(x), less = bits - 1u;
    doubt.least = less < doubt.least ? less : doubt.least;
    doubt.most = bits > doubt.most ? bits : doubt.most;
  }

  LB_FN bool any(const Doubt &doubt) {
    return !(doubt.strange <= 3.4028234663852886e38f) | (doubt.numerator < 2u * LEAST_NUMERATOR - 1u) |
           (doubt.denominator > MOST_DENOMINATOR) | (doubt.least < LEAST_POSITIVE - 1u) | (doubt.most > MOST_POSITIVE) |
           doubt.otherwise;
  }

  static constexpr uint32_t LEAST_NUMERATOR = (127u - 80u) << 23, MOST_DENOMINATOR = (127u + 40u) << 23;
  static constexpr uint32_t LEAST_POSITIVE = (127u - 100u) << 23, MOST_POSITIVE = 0x7F7FFFFFu;
};

struct Quick {
  float x;
  Doubt *doubt;  // of all numbers of a computation; a plain float has none
};

template <> struct Same<Quick> {
  using type = float;
};

LB_FN Quick operator+(Quick a, Quick b) { return {a.x + b.x, a.doubt}; }
LB_FN Quick operator+(Quick a, float b) { return {a.x + b, a.doubt}; }
LB_FN Quick operator+(float a, Quick b) { return {a + b.x, b.doubt}; }
LB_FN Quick operator-(Quick a, Quick b) { return {a.x - b.x, a.doubt}; }
LB_FN Quick operator-(Quick a, float b) { return {a.x - b, a.doubt}; }
LB_FN Quick operator-(float a, Quick b) { return {a - b.x, b.doubt}; }
LB_FN Quick operator-(Quick a) { return {-a.x, a.doubt}; }
LB_FN Quick operator*(Quick a, Quick b) { return {a.x * b.x, a.doubt}; }
LB_FN Quick operator*(Quick a, float b) { return {a.x * b, a.doubt}; }
LB_FN Quick operator*(float a, Quick b) { return {a * b.x, b.doubt}; }

// Right for 0 <= b <= 2**40 and a that is 0 or 2**-80 <= |a|, if the quotient is below 2**64. The reciprocal of a smaller
// b is infinite, and the quotient then NaN. Otherwise the quotient is above 2**-120, and what is left of a when its product
// with b is taken away is a float: a multiple of 2**-127. Where nothing is left, the quotient keeps its sign, that of 0
// too: the remainder is taken the other way round, so that nothing is -0 beside +0.
LB_FN Quick divided(float a, float b, Doubt *doubt) {
  const float near = near_reciprocal(b);
  const float inverse = fma(near, fma(-b, near, 1.0f), near);
  const float quotient = a * inverse;
  const uint32_t twice = 2u * bits_of(a) - 1u, below = bits_of(b);
  doubt->numerator = twice < doubt->numerator ? twice : doubt->numerator;
  doubt->denominator = below > doubt->denominator ? below : doubt->denominator;
  Doubt::must_be_finite(*doubt, quotient);
  return {fma(fma(b, quotient, -a), -inverse, quotient), doubt};
}
LB_FN Quick operator/(Quick a, Quick b) { return divided(a.x, b.x, a.doubt); }
LB_FN Quick operator/(Quick a, float b) { return divided(a.x, b, a.doubt); }
LB_FN Quick operator/(float a, Quick b) { return divided(a, b.x, b.doubt); }

// Right for 0 and for 2**-100 <= a < infinity, which is not changed by what keeps the approximation for 0 finite.
LB_FN Quick sqrt(Quick a) {
  const float near = near_reciprocal_root(a.x + 0x1p-126f), root = a.x * near;
  Doubt::must_be_positive(*a.doubt, a.x);
  return {fma(fma(-root, root, a.x), near * 0.5f, root), a.doubt};
}

LB_FN bool operator<(Quick a, Quick b) { return a.x < b.x; }
LB_FN bool operator<(Quick a, float b) { return a.x < b; }
LB_FN bool operator<(float a, Quick b) { return a < b.x; }
LB_FN bool operator<=(Quick a, Quick b) { return a.x <= b.x; }
LB_FN bool operator<=(Quick a, float b) { return a.x <= b; }
LB_FN bool operator<=(float a, Quick b) { return a <= b.x; }
LB_FN bool operator>(Quick a, Quick b) { return a.x > b.x; }
LB_FN bool operator>(Quick a, float b) { return a.x > b; }
LB_FN bool operator>(float a, Quick b) { return a > b.x; }
LB_FN bool operator>=(Quick a, Quick b) { return a.x >= b.x; }
LB_FN bool operator>=(Quick a, float b) { return a.x >= b; }
LB_FN bool operator>=(float a, Quick b) { return a >= b.x; }
LB_FN bool operator==(Quick a, Quick b) { return a.x == b.x; }
LB_FN bool operator==(Quick a, float b) { return a.x == b; }
LB_FN bool operator==(float a, Quick b) { return a == b.x; }
LB_FN bool operator!=(Quick a, Quick b) { return a.x != b.x; }
LB_FN bool operator!=(Quick a, float b) { return a.x != b; }
LB_FN bool operator!=(float a, Quick b) { return a != b.x; }

// The words of lowbit/native/words.h; of several numbers, any may be a plain float.
LB_FN float plain(Quick a) { return a.x; }
LB_FN float plain(float a) { return a; }
template <class... Rest> LB_FN Doubt *doubt_of(Quick a, Rest...) { return a.doubt; }
template <class... Rest> LB_FN Doubt *doubt_of(float, Rest... rest) { return doubt_of(rest...); }

template <class A, class B> LB_FN auto where(bool condition, A a, B b) -> decltype(a + b) {
  return {condition ? plain(a) : plain(b), doubt_of(a, b)};
}
template <class A, class B> LB_FN auto lerp(A a, B b, Quick weight) -> decltype(a + b + weight) {
  return {lerp(plain(a), plain(b), weight.x), weight.doubt};
}
template <class A, class B> LB_FN auto lerp(A a, B b, float weight) -> decltype(a + b) {  // one of the two ways
  doubt_of(a, b)->otherwise |= bits_of(weight) >= bits_of(0.5f);
  return {plain(a) + weight * (plain(b) - plain(a)), doubt_of(a, b)};
}
template <class A, class B> LB_FN auto maximum(A a, B b) -> decltype(a + b) {
  return {maximum(plain(a), plain(b)), doubt_of(a, b)};
}
template <class A, class B> LB_FN auto minimum(A a, B b) -> decltype(a + b) {
  return {minimum(plain(a), plain(b)), doubt_of(a, b)};
}
template <class A, class L, class H> LB_FN auto clip(A a, L low, H high) -> decltype(a + low + high) {
  return minimum(maximum(a, low), high);
}
LB_FN Quick reciprocal(Quick a) { return 1.0f / a; }
LB_FN Quick binade(Quick a) { return {binade(a.x), a.doubt}; }
LB_FN Quick abs(Quick a) { return {abs(a.x), a.doubt}; }
LB_FN Quick sign(Quick a) { return {sign(a.x), a.doubt}; }

// A number to compute with, and its value.
template <class F> constexpr bool QUICK = false;
template <> constexpr bool QUICK<Quick> = true;
template <class F> struct Number;
template <> struct Number<Quick> {
  LB_FN Quick made(float x, Doubt &doubt) { return {x, &doubt}; }
  LB_FN float value(Quick a) { return a.x; }
};
template <> struct Number<float> {
  LB_FN float made(float x, Doubt &) { return x; }
  LB_FN float value(float a) { return a; }
};

}  // namespace lb
