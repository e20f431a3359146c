// The rule: Adam, AdamW, AMSGrad and NAdam for one element.
//
// This text is compiled by the host compiler into the CPU twin and by NVRTC into the CUDA kernel;
// kernels/reference.py is the same rule in torch operations. They agree bit for bit: every
// operation here is one correctly rounded IEEE operation (no contraction into fma, no fast-math),
// in an order that is fixed.
//
// Arithmetic is in double, storage is not: a stored fp32 moment or param is rounded once, from a
// value that is exact to about 2^-52. So each step is within half an ulp of the real numbers; in
// float it would be 2 to 6 ulp (docs/numerics.md has the measurement).
#pragma once

#include "portable.h"

namespace shardadam {

// What is the same for every element that shares hyperparameters and step t. With
// c1 = 1 - beta1^t and c2 = 1 - beta2^t, Adam's  lr * (m / c1) / (sqrt(v / c2) + eps)  is
//   (exp_avg_to_update * m) / (sqrt(v) + epsilon),
//   exp_avg_to_update = lr * sqrt(c2) / c1,   epsilon = eps * sqrt(c2);
// NAdam adds grad_to_update * g to the numerator (Dozat 2016, in torch.optim.NAdam's form).
//
// The gradient's factor f (loss-scale inverse * clip coefficient, negative to maximize) costs
// nothing per element: it is folded into what the gradient is multiplied by anyway. Only L2 decay,
// which adds to the gradient before, applies it first. The layout is shared with kernels/cpu.py.
struct Coefficients {
  double beta1;
  double beta2;
  double grad_to_exp_avg;     // (1 - beta1) * f
  double grad_to_exp_avg_sq;  // (1 - beta2) * f^2
  double grad_to_update;      // NAdam's term * f
  double exp_avg_to_update;
  double epsilon;
  double keep;         // 1 - lr * weight_decay if decoupled (Loshchilov & Hutter 2019), else 1
  double l2;           // weight_decay if not decoupled
  double grad_factor;  // f with L2 decay, and the three above are without f then
  double step;         // for random bits
};

struct Element {
  double param;
  double exp_avg;
  double exp_avg_sq;
  double max_exp_avg_sq;
};

// Kingma & Ba 2015, algorithm 1; AMSGrad: Reddi et al. 2018.
template <bool kAmsgrad, bool kNesterov, bool kL2>
SHARDADAM_FN void update(Element& x, double grad, const Coefficients& c) {
  if (kL2) grad = c.grad_factor * grad + c.l2 * x.param;
  x.exp_avg = c.beta1 * x.exp_avg + c.grad_to_exp_avg * grad;
  x.exp_avg_sq = c.beta2 * x.exp_avg_sq + c.grad_to_exp_avg_sq * (grad * grad);
  double square = x.exp_avg_sq;
  if (kAmsgrad) {
    // NaN on either side stays NaN, as in torch.maximum.
    const bool take = x.exp_avg_sq > x.max_exp_avg_sq || x.exp_avg_sq != x.exp_avg_sq;
    x.max_exp_avg_sq = square = take ? x.exp_avg_sq : x.max_exp_avg_sq;
  }
  double numerator = c.exp_avg_to_update * x.exp_avg;
  if (kNesterov) numerator = numerator + c.grad_to_update * grad;
  x.param = c.keep * x.param - numerator / (sqrt(square) + c.epsilon);
}

}  // namespace shardadam
