// The step counters and the coefficients of a step, on the GPU: what depends on a loss scale, a
// norm or a flag that the host does not know and need not wait for, and what the replay of a CUDA
// graph must compute anew.
#include "coefficients.h"

namespace shardadam {

constexpr int kRows = 24;  // kernels/cuda_arguments.py has the same

// Neighbours of one group in one bucket that have a gradient: `count` spans from `first` on.
// Layouts are shared with kernels/cuda_arguments.py.
struct Row {
  Hyperparameters hyper;
  const double* lr;            // instead of hyper.lr, where it is not null
  float* step;                 // of the bucket's spans
  double* mu_product;          // of the bucket's spans; null without NAdam
  Coefficients* coefficients;  // of the bucket's spans
  int first;
  int count;
};

struct Rows {
  Row row[kRows];
  const double* factor;  // of the gradients: loss-scale inverse and clip coefficient; null: 1
  const float* skip;     // where it is not 0 no step is counted; may be null
};
static_assert(sizeof(Rows) <= 4096, "kernel arguments");

}  // namespace shardadam

// Counts a step for every span of the rows and folds its coefficients. A block per row.
extern "C" __global__ void shardadam_advance(const __grid_constant__ shardadam::Rows rows) {
  using namespace shardadam;
  const Row& row = rows.row[blockIdx.x];
  if (rows.skip && *rows.skip != 0) return;
  Hyperparameters hyper = row.hyper;
  if (row.lr) hyper.lr = *row.lr;
  const double factor = rows.factor ? *rows.factor : 1;
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const int span = row.first + i;
    const float step = row.step[span] + 1;
    row.step[span] = step;
    double mu_product = 1;
    if (row.mu_product) {
      mu_product = row.mu_product[span] * momentum(hyper, step);
      row.mu_product[span] = mu_product;
    }
    row.coefficients[span] = fold(hyper, step, mu_product, factor);
  }
}
