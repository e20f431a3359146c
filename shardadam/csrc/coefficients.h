// From hyperparameters to what a step multiplies by. kernels/coefficients.py has the same
// operations in the same order, for steps that are counted on the host, and says where the formulas
// come from.
#pragma once

#include "adam_update.h"

namespace shardadam {

// The layout is shared with kernels/cuda_arguments.py.
struct Hyperparameters {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double momentum_decay;  // of one step: 0.96 to the power of torch's momentum_decay
  int decoupled;
  int maximize;
  int nesterov;  // NAdam
  int reserved;
};

// base^exponent for a whole exponent: multiplications, so that it has the same bits everywhere.
SHARDADAM_FN double power(double base, double exponent) {
  double result = 1;
  for (int64 left = int64(exponent); left > 0; left /= 2) {
    if (left % 2) result = result * base;
    base = base * base;
  }
  return result;
}

SHARDADAM_FN double momentum(const Hyperparameters& h, double step) {
  return h.beta1 * (1 - 0.5 * power(h.momentum_decay, step));
}

SHARDADAM_FN Coefficients fold(const Hyperparameters& h, double step, double mu_product,
                               double factor) {
  const double root = sqrt(1 - power(h.beta2, step));
  double exp_avg_rate, grad_rate = 0;
  if (h.nesterov) {
    const double next = momentum(h, step + 1);
    exp_avg_rate = h.lr * next / (1 - mu_product * next);
    grad_rate = h.lr * (1 - momentum(h, step)) / (1 - mu_product);
  } else {
    exp_avg_rate = h.lr / (1 - power(h.beta1, step));
  }
  if (h.maximize) factor = -factor;
  const double l2 = h.decoupled ? 0 : h.weight_decay;
  const double folded = l2 != 0 ? 1 : factor;
  return {h.beta1,
          h.beta2,
          (1 - h.beta1) * folded,
          (1 - h.beta2) * (folded * folded),
          grad_rate * root * folded,
          exp_avg_rate * root,
          h.eps * root,
          h.decoupled ? 1 - h.lr * h.weight_decay : 1,
          l2,
          factor,
          step};
}

}  // namespace shardadam
