// A float that divides and takes roots by a straight course of instructions, and knows where that course leads astray.
//
// The machine has no IEEE division and square root: it has approximations, which a compiler makes exact by a few
// fused multiply-adds (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990),
// and for operands far from 1 it branches to a slower course, at every single division. Those branches keep the
// scheduler from working on several values at once. Here the course is the same, without branches, and so are the bits
// where `fine` holds; where it does not, for any value of a warp, the warp does all of it again with plain floats.
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
LB_FN float near_reciprocal(float x) { return 1.0f / x; }
LB_FN float near_reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(x); }
#endif

struct Truth {
  bool holds, fine;
};

struct Quick {
  float x;
  bool fine;
#ifdef __CUDACC__
  __device__ __forceinline__
#endif
  Quick(float number = 0.0f, bool known = true) : x(number), fine(known) {}
};

template <> struct Same<Quick> {
  using type = float;
};

// Takes a number's value; whether it is what plain floats would have given.
LB_FN bool take(Quick from, float &to) {
  to = from.x;
  return from.fine;
}
LB_FN bool take(float from, float &to) {
  to = from;
  return true;
}

// Whether low <= |x| <= high, by one subtraction and one comparison.
LB_FN bool between(float x, float low, float high) {
  return bits_of(x) * 2u - bits_of(low) * 2u <= bits_of(high) * 2u - bits_of(low) * 2u;
}

LB_FN Quick operator+(Quick a, Quick b) { return {a.x + b.x, a.fine && b.fine}; }
LB_FN Quick operator-(Quick a, Quick b) { return {a.x - b.x, a.fine && b.fine}; }
LB_FN Quick operator*(Quick a, Quick b) { return {a.x * b.x, a.fine && b.fine}; }
LB_FN Quick operator-(Quick a) { return {-a.x, a.fine}; }

LB_FN Quick operator/(Quick a, Quick b) {
  const float near = near_reciprocal(b.x);
  const float inverse = fma(near, fma(-b.x, near, 1.0f), near);
  const float quotient = a.x * inverse;
  // The quotient is normal, and what is left of a when it has been subtracted is a float: 0 is, and has its sign.
  const bool fine = (between(a.x, 0x1p-96f, 0x1p60f) || bits_of(a.x) == 0u) && between(b.x, 0x1p-60f, 0x1p28f);
  return {fma(fma(-b.x, quotient, a.x), inverse, quotient), a.fine && b.fine && fine};
}

LB_FN Quick sqrt(Quick a) {
  const float near = near_reciprocal_root(a.x), root = a.x * near;
  const bool fine = bits_of(a.x) - bits_of(0x1p-100f) < bits_of(0x1p126f) - bits_of(0x1p-100f);  // positive, too
  return {fma(fma(-root, root, a.x), near * 0.5f, root), a.fine && fine};
}

LB_FN Truth operator<(Quick a, Quick b) { return {a.x < b.x, a.fine && b.fine}; }
LB_FN Truth operator<=(Quick a, Quick b) { return {a.x <= b.x, a.fine && b.fine}; }
LB_FN Truth operator>(Quick a, Quick b) { return {a.x > b.x, a.fine && b.fine}; }
LB_FN Truth operator>=(Quick a, Quick b) { return {a.x >= b.x, a.fine && b.fine}; }
LB_FN Truth operator==(Quick a, Quick b) { return {a.x == b.x, a.fine && b.fine}; }
LB_FN Truth operator!=(Quick a, Quick b) { return {a.x != b.x, a.fine && b.fine}; }
LB_FN Truth operator&(Truth a, Truth b) { return {a.holds && b.holds, a.fine && b.fine}; }
LB_FN Truth operator|(Truth a, Truth b) { return {a.holds || b.holds, a.fine && b.fine}; }
LB_FN Truth operator!(Truth a) { return {!a.holds, a.fine}; }

// The words of lowbit/native/words.h.
LB_FN Quick where(Truth condition, Quick a, Quick b) {
  return {condition.holds ? a.x : b.x, condition.fine && a.fine && b.fine};
}
LB_FN Quick where(bool condition, Quick a, Quick b) { return where(Truth{condition, true}, a, b); }
LB_FN Quick lerp(Quick a, Quick b, Quick weight) {
  return {lerp(a.x, b.x, weight.x), a.fine && b.fine && weight.fine};
}
LB_FN Quick reciprocal(Quick a) { return Quick(1.0f) / a; }
LB_FN Quick binade(Quick a) { return {binade(a.x), a.fine}; }
LB_FN Quick abs(Quick a) { return {abs(a.x), a.fine}; }
LB_FN Quick sign(Quick a) { return {sign(a.x), a.fine}; }
LB_FN Quick maximum(Quick a, Quick b) { return {maximum(a.x, b.x), a.fine && b.fine}; }
LB_FN Quick minimum(Quick a, Quick b) { return {minimum(a.x, b.x), a.fine && b.fine}; }
LB_FN Quick clip(Quick a, Quick low, Quick high) { return minimum(maximum(a, low), high); }

}  // namespace lb
