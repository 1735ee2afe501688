// A float that divides and takes roots by a straight course of instructions, and knows where that course leads astray.
//
// The machine has no IEEE division and square root: it has approximations, which a compiler makes exact by a few
// fused multiply-adds (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990),
// and for operands far from 1 it branches to a slower course, at every single division. Those branches keep the
// scheduler from working on several values at once. Here the course is the compiler's own (a test compares them, for every
// architecture), without branches, and so are the bits
// unless there is `Doubt`; then a warp does all of it again with plain floats.
//
// Doubt is a few sums: of squares that overflow where an operand is too large, of bits that are lost where one is too
// small. Comparisons would say it shorter, but they share a pipe with all integer work, at half the rate.
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
LB_FN float flushed_product(float a, float b) {  // 0 for what is subnormal
  float y;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
#else  // the approximations' error is not in the results
LB_FN float flushed(float x) { return float_of(bits_of(x) & 0x7F800000u) == 0.0f ? x * 0.0f : x; }
LB_FN float near_reciprocal(float x) { return flushed(1.0f / flushed(x)); }
LB_FN float near_reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(flushed(x)); }
LB_FN float flushed_product(float a, float b) { return flushed(flushed(a) * flushed(b)); }
#endif

struct Doubt {
  float large = 0.0f;  // infinite or NaN: an operand or a quotient was too large
  float roots = 0.0f;  // the same of roots, apart: then the same roots taken twice are the same sum
  float small = 0.0f;  // not 0: a quotient was too small
  int32_t least = 0;   // the smallest numerator's bits: it was -0

  LB_FN bool any(const Doubt &doubt) {
    return !(doubt.large + doubt.roots <= 3.4028234663852886e38f) || doubt.small != 0.0f ||
           doubt.least == (int32_t)0x80000000;
  }
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

// Right for 2**-64 < |b| < 2**64 and a that is +0 or makes 2**-38 < |a / b| < 2**64: then nothing overflows, no reciprocal
// is subnormal, and what is left of a is a float when the quotient's product with b is taken away.
LB_FN Quick divided(float a, float b, Doubt *doubt) {
  const float near = near_reciprocal(b);
  const float inverse = fma(near, fma(-b, near, 1.0f), near);
  const float quotient = a * inverse;
  doubt->large = fma(quotient, quotient, fma(b, b, fma(near, near, doubt->large)));
  doubt->small = doubt->small + abs(fma(flushed_product(quotient, 0x1p-88f), 0x1p88f, -quotient));
  doubt->least = (int32_t)bits_of(a) < doubt->least ? (int32_t)bits_of(a) : doubt->least;
  return {fma(fma(-b, quotient, a), inverse, quotient), doubt};
}
LB_FN Quick operator/(Quick a, Quick b) { return divided(a.x, b.x, a.doubt); }
LB_FN Quick operator/(Quick a, float b) { return divided(a.x, b, a.doubt); }
LB_FN Quick operator/(float a, Quick b) { return divided(a, b.x, b.doubt); }

// Right for 2**-100 < a < infinity.
LB_FN Quick sqrt(Quick a) {
  Doubt *doubt = a.doubt;
  const float near = near_reciprocal_root(a.x), root = a.x * near, scaled = near * 0x1p14f;
  doubt->roots = fma(root, 0.0f, fma(scaled, scaled, doubt->roots));
  return {fma(fma(-root, root, a.x), near * 0.5f, root), doubt};
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
template <class A, class B, class W> LB_FN auto lerp(A a, B b, W weight) -> decltype(a + b + weight) {
  return {lerp(plain(a), plain(b), plain(weight)), doubt_of(a, b, weight)};
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
