// Left singular vectors of many square matrices in one launch, by one-sided Jacobi, with the rank chosen on
// the device. A matrix that fits the shared memory of a block has one block, a larger one several.
//
//   A ← A J  until its columns are orthogonal;  σ_j = ‖a_j‖,  u_j = a_j / σ_j,
//   rank = min k with Σ_{j≥k} σ_j² <= bound·trace, clamped
//
// Dropping columns of A J loses no more than their norms say, at any stage: the bound holds however few
// sweeps are made. A comes as a sorted Cholesky factor, so that a matrix whose rows are nearly orthogonal
// needs none. Layout: factor column-major; basis row-major. In shared memory a block has its columns, 2n
// elements and n doubles: n = 239 of float32 fill 227 KiB, n = 168 of float64. Tiling: a warp holds two
// groups of G columns in registers and rotates all pairs between them, G independent pairs at a time; lanes
// run along rows for products and along pairs for angles. Round-robin groups, n/G − 1 rounds a sweep with a
// barrier each, so that a sweep moves every column n/G times instead of n. G = 4 up to n = 256, 2 up to 512,
// then 1 (float64: 96 and 192).
//
// A larger matrix is cut into B column blocks of `width` columns, which meet round-robin like groups: B − 1
// rounds a sweep, in each of which B/2 thread blocks rotate all pairs between two column blocks in shared
// memory, in the first round those inside them, too. By count, for n = 512 of float32 and width = 32: a sweep
// is 4n³ operations on 8 multiprocessors in 15 rounds, which move 2n² elements each between L2 and shared
// memory, 31 MB in all. One block that left in L2 what does not fit would have 255 such rounds, and n³ alone.
// The rounds need no launch each (30 sweeps of 15, most of them empty) and no cluster, which sm_80 lacks and
// n = 1,024 does not fit: see Turns.
//
// Numerics: T, columns scaled by 1/sqrt(trace) so that squares neither overflow nor vanish; squared norms are
// updated by every rotation and summed anew whenever columns are loaded or a sweep begins; those that choose
// the rank are summed in double. Which block does what decides nothing: results are the same in every run.
// Template: T = float, double. Any number of threads that is a multiple of 32. Sizes up to 1,024. Source:
// Hestenes 1958; Drmač & Veselić 2008 (Jacobi on the Cholesky factor); Bečka & Vajteršic 1999 (column
// blocks). Loops are not unrolled where 128 registers (512 threads) would spill.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"
#include "kernels/warp.cuh"

namespace tk {

// Two players that meet: m = others + 1 of them (an even number) meet round-robin. In round r, m − 1 meets r,
// and r + k meets r − k (mod m − 1).
struct Meeting {
  int low, high;
  __device__ Meeting(int a, int b) : low(min(a, b)), high(max(a, b)) {}
  static __device__ Meeting round_robin(int round, int k, int others) {
    if (k == 0) return {others, round};
    return {(round + k) % others, (round + others - k) % others};
  }
};

template <class T>
struct JacobiColumns {
  double* energy;  // of column j, relative to the trace
  T* squares;      // ‖column j‖²
  int* order;      // columns by descending energy
  T* columns;
  int n, rows;  // columns, and rows of one

  // `memory` holds what jacobi_svd_shared says, the columns at its end unless they lie elsewhere.
  __device__ JacobiColumns(void* memory, int n, int rows, T* columns = nullptr)
      : energy(static_cast<double*>(memory)),
        squares(reinterpret_cast<T*>(energy + n)),
        order(reinterpret_cast<int*>(squares + n)),
        columns(columns ? columns : squares + 2 * n),
        n(n),
        rows(rows) {}
  __device__ __forceinline__ T* column(int j) const { return columns + j * rows; }

  // Columns from `begin` on become those from `from` on, `count` of them; zero from `live` on.
  __device__ void load(int begin, int count, const T* from, int live, T scale) const {
    T* to = column(begin);
#pragma unroll(sizeof(T) == 4 ? 4 : 2)
    for (int e = threadIdx.x; e < live * rows; e += blockDim.x) to[e] = from[e] * scale;
    for (int e = live * rows + threadIdx.x; e < count * rows; e += blockDim.x) to[e] = 0;
  }
  __device__ void store(int begin, int count, T* to) const {
    const T* from = column(begin);
#pragma unroll(sizeof(T) == 4 ? 4 : 2)
    for (int e = threadIdx.x; e < count * rows; e += blockDim.x) to[e] = from[e];
  }

  __device__ void sum_squares() const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
      const T* x = column(j);
      T sum = 0;
#pragma unroll 1
      for (int i = lane; i < rows; i += 32) sum += x[i] * x[i];
      sum = warp_sum(sum);
      if (lane == 0) squares[j] = sum;
    }
    __syncthreads();
  }

  // The columns of two groups of G, R elements of each in a lane. In step s column c meets c^s: within the
  // groups for s < G, between them for the others.
  template <int G, int R>
  struct Tile {
    T x[2 * G][R];
    int low, high;  // groups

    __device__ __forceinline__ int index(int c) const { return (c < G ? low : high - 1) * G + c; }
    // The smaller column of the k-th pair: k with a zero put in where s has its highest bit.
    static __device__ __forceinline__ int first(int k, int s) {
      const int bit = s >= 4 ? 4 : s >= 2 ? 2 : 1;
      return (k & -bit) * 2 + (k & (bit - 1));
    }
  };

  // Makes the G pairs of a step orthogonal; whether that took a rotation. One warp.
  template <int G, int R>
  __device__ __forceinline__ bool rotate(Tile<G, R>& tile, int step, T tolerance) const {
    constexpr int share = 32 / G;  // lanes that find the angle of one pair
    const int lane = threadIdx.x % 32;
    const int column_p = tile.first(lane / share, step);
    const int p = tile.index(column_p), q = tile.index(column_p ^ step);
    constexpr int most_rows = G == 1 ? largest_factorization : 0;  // beyond what lanes hold, in memory
    T dots[G];
#pragma unroll
    for (int k = 0; k < G; ++k) {
      const int c = tile.first(k, step);
      dots[k] = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) dots[k] += tile.x[c][r] * tile.x[c ^ step][r];
    }
    if (32 * R < most_rows) {
#pragma unroll 1
      for (int i = lane + 32 * R; i < rows; i += 32) dots[0] += column(p)[i] * column(q)[i];
    }
    const T dot = warp_sums(dots);
    const T xx = p < n ? squares[p] : T(0), yy = q < n ? squares[q] : T(0);
    const bool turns = fabs(dot) > tolerance * sqrt(xx) * sqrt(yy) && xx > 0 && yy > 0;
    if (!__any_sync(full_warp, turns)) return false;
    T cosine = 1, sine = 0;
    __syncwarp();  // every lane has read the squares
    if (turns) {
      const T zeta = (yy - xx) / (2 * dot);
      const T tangent = (zeta < 0 ? T(-1) : T(1)) / (fabs(zeta) + sqrt(1 + zeta * zeta));
      cosine = 1 / sqrt(1 + tangent * tangent);
      sine = tangent * cosine;
      if (lane % share == 0) {
        squares[p] = xx - tangent * dot;
        squares[q] = yy + tangent * dot;
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < G; ++k) {
      const int c = tile.first(k, step);
      const T cos_k = __shfl_sync(full_warp, cosine, k * share),
              sin_k = __shfl_sync(full_warp, sine, k * share);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const T a = tile.x[c][r], b = tile.x[c ^ step][r];
        tile.x[c][r] = cos_k * a - sin_k * b;
        tile.x[c ^ step][r] = sin_k * a + cos_k * b;
      }
    }
    if (32 * R < most_rows) {
#pragma unroll 1
      for (int i = lane + 32 * R; i < rows; i += 32) {
        const T a = column(p)[i], b = column(q)[i];
        column(p)[i] = cosine * a - sine * b;
        column(q)[i] = sine * a + cosine * b;
      }
    }
    return true;
  }

  // Rotates all pairs between two groups of columns, and with `within` those inside them.
  template <int G, int R>
  __device__ bool meet(int low, int high, bool within, T tolerance) const {
    const int lane = threadIdx.x % 32;
    Tile<G, R> tile;
    tile.low = low, tile.high = high;
#pragma unroll
    for (int c = 0; c < 2 * G; ++c) {
      const int j = tile.index(c);
      const T* from = column(j);
#pragma unroll
      for (int r = 0; r < R; ++r) tile.x[c][r] = j < n && lane + 32 * r < rows ? from[lane + 32 * r] : T(0);
    }
    bool rotated = false;
#pragma unroll
    for (int step = 1; step < 2 * G; ++step)
      if (step >= G || within) rotated |= rotate(tile, step, tolerance);
    if (!rotated) return false;
    // A broadcast, so that addresses are found anew rather than kept in registers meanwhile.
    tile.low = __shfl_sync(full_warp, low, 0), tile.high = __shfl_sync(full_warp, high, 0);
#pragma unroll
    for (int c = 0; c < 2 * G; ++c) {
      const int j = tile.index(c);
      T* to = column(j);
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (j < n && lane + 32 * r < rows) to[lane + 32 * r] = tile.x[c][r];
    }
    return true;
  }

  // All pairs once, or with `across` those between the first half of the columns and the second; whether any
  // was rotated. A group without a partner is alone in the first round, which also rotates within groups.
  template <int G, int R>
  __device__ bool sweep(T tolerance, bool across) const {
    const int groups = (n + G - 1) / G, half = (groups + 1) / 2, others = 2 * half - 1;
    bool rotated = false;
    for (int round = 0; round < (across ? half : others); ++round) {
      const bool within = round == 0 && !across;
#pragma unroll 1
      for (int k = threadIdx.x / 32; k < half; k += blockDim.x / 32) {
        const Meeting at =
            across ? Meeting(k, half + (k + round) % half) : Meeting::round_robin(round, k, others);
        if (at.high < groups || (G > 1 && within)) rotated |= meet<G, R>(at.low, at.high, within, tolerance);
      }
      __syncthreads();
    }
    return __syncthreads_or(rotated);
  }

  __device__ bool sweep(T tolerance, bool across = false) const {
    constexpr int held = sizeof(T) == 4 ? 64 : 24;  // elements in the registers of a lane
    if (sizeof(T) == 4 && rows <= 128) return sweep<4, 4>(tolerance, across);
    if (rows <= 4 * held) return sweep<4, held / 8>(tolerance, across);
    if (rows <= 8 * held) return sweep<2, held / 4>(tolerance, across);
    return sweep<1, held / 4>(tolerance, across);
  }

  // Energies and the order of the columns. `shift` is what the factor's squares have too much.
  __device__ void sort(double shift, bool zero) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
      const T* x = column(j);
      double sum = 0;
#pragma unroll 1
      for (int i = lane; i < rows; i += 32) sum += double(x[i]) * double(x[i]);
      sum = warp_sum(sum);
      if (lane == 0) {
        squares[j] = T(sum);
        energy[j] = zero ? 0 : max(sum - shift, 0.0);
      }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
      int place = 0;
      for (int l = 0; l < n; ++l) place += squares[l] > squares[j] || (squares[l] == squares[j] && l < j);
      order[place] = j;
    }
    __syncthreads();
  }

  __device__ int rank(double bound, int least, int most) const {
    int wanted = n;
    for (double tail = 0; wanted > 0 && bound >= 0; --wanted) {
      tail += energy[order[wanted - 1]];
      if (tail > bound) break;
    }
    return max(min(min(wanted, most), n), min(least, n));
  }
};

// Sorts rotated columns, chooses the rank, and writes what is wanted.
template <class T>
__device__ void finish_jacobi(const JacobiProblem<T>& p, const JacobiColumns<T>& a) {
  TK_SHARED(int, rank);
  const int n = p.size;
  const double trace = *p.trace;
  a.sort(p.shift, !(trace > 0));
  if (threadIdx.x == 0) {
    rank = p.bound < 0 ? min(p.max_rank, n) : a.rank(p.bound, p.min_rank, p.max_rank);
    if (p.rank != nullptr) *p.rank = rank;
  }
  __syncthreads();
  if (p.sigma != nullptr)
    for (int j = threadIdx.x; j < n; j += blockDim.x) p.sigma[j] = T(sqrt(a.energy[a.order[j]] * trace));
#pragma unroll 1
  for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
    const int i = e / n, j = e - i * n, column = a.order[j];
    const bool live = j < rank && a.squares[column] > 0;
    p.basis[e] = live ? a.column(column)[i] / sqrt(a.squares[column]) : T(0);
  }
}

template <class T>
__device__ T scale_of(const JacobiProblem<T>& p) {
  return *p.trace > 0 ? T(1 / sqrt(*p.trace)) : T(1);
}

// The two column blocks that meet in a turn. Only the later one can have less than `width` columns, or none.
template <class T>
struct ColumnBlocks {
  T *low, *high;
  int width, low_live, high_live;

  __device__ ColumnBlocks(const JacobiProblem<T>& p, int turn) : width(p.width) {
    const int others = 2 * p.meetings - 1, n = p.size;
    const Meeting at = Meeting::round_robin(turn / p.meetings % others, turn % p.meetings, others);
    low = p.factor + at.low * width * n, high = p.factor + at.high * width * n;
    low_live = min(width, n - at.low * width), high_live = min(width, max(n - at.high * width, 0));
  }
  __device__ void load(const JacobiColumns<T>& a, T scale) const {
    a.load(0, width, low, low_live, scale);
    a.load(width, width, high, high_live, scale);
  }
  __device__ void store(const JacobiColumns<T>& a) const {
    a.store(0, low_live, low);
    a.store(width, high_live, high);
  }
};

// How several blocks share the rounds of one matrix. A turn is one meeting of column blocks. Turns are handed
// out in order, and one may begin when those of all earlier rounds are done. So a block waits only for turns
// that blocks took before it, which run: some block always goes on, however few fit on the device, whichever
// come first, and whether or not the others come at all.
struct Turns {
  int32_t *taken, *done;  // how many
  int32_t* rotated;       // the last sweep in which something turned, from 1 on
  int rounds, meetings;   // of a sweep, of a round

  template <class T>
  __device__ explicit Turns(const JacobiProblem<T>& p)
      : taken(p.progress),
        done(p.progress + 1),
        rotated(p.progress + 2),
        rounds(2 * p.meetings - 1),
        meetings(p.meetings) {}
  __device__ int sweep(int turn) const { return turn / meetings / rounds; }
  __device__ int round(int turn) const { return turn / meetings % rounds; }
  __device__ bool first_of_sweep(int turn) const { return turn % (meetings * rounds) == 0; }

  // The next turn, once it may begin: then all that earlier rounds wrote can be read. One thread. `over`:
  // before this turn's sweep nothing was left to rotate; the first of its turns is to finish.
  __device__ int take(int sweeps, bool& over) const {
    const int turn = atomicAdd(taken, 1), round_begins = turn / meetings * meetings;
    wait(round_begins - round(turn) * meetings);
    over = sweep(turn) == sweeps || atomicAdd(rotated, 0) < sweep(turn);
    if (!over) wait(round_begins);
    return turn;
  }
  __device__ void wait(int turns) const {
    while (atomicAdd(done, 0) < turns) __nanosleep(100);
    __threadfence();
  }

  // After a barrier behind the last write of the turn. One thread.
  __device__ void end(int turn, bool turned) const {
    if (turned) atomicMax(rotated, sweep(turn) + 1);
    __threadfence();
    atomicAdd(done, 1);
  }
};

template <class T>
__device__ void jacobi_svd_in(const JacobiProblem<T>* problem, void* memory) {
  // In shared memory, so that nothing of it takes registers while columns rotate. For the same reason there
  // is one call of `sweep`, and `most` is worked out anew: else registers spill.
  TK_SHARED(JacobiProblem<T>, p);
  TK_SHARED(int, turn);
  TK_SHARED(bool, over);
  if (threadIdx.x == 0) p = *problem, over = false;
  __syncthreads();
  const bool alone = p.width == 0;
  // Blocks that share a matrix take as many turns as each has where all get on equally well, and one to end.
  const auto most = [&] { return alone ? p.sweeps : p.sweeps * Turns(p).rounds + 1; };
  const JacobiColumns<T> a(memory, alone ? p.size : 2 * p.width, p.size);
  if (alone) a.load(0, p.size, p.factor, p.size, scale_of(p));
  bool turned = true;
  for (int count = 0; count < most() && (turned || !alone); ++count) {
    if (!alone) {
      if (threadIdx.x == 0) turn = Turns(p).take(p.sweeps, over);
      __syncthreads();
      if (over) break;
      ColumnBlocks<T>(p, turn).load(a, turn < p.meetings ? scale_of(p) : T(1));
    }
    __syncthreads();
    a.sum_squares();
    turned = a.sweep(T(p.tolerance), !alone && Turns(p).round(turn) > 0);
    if (!alone) {
      if (turned || turn < p.meetings) ColumnBlocks<T>(p, turn).store(a);
      __syncthreads();
      if (threadIdx.x == 0) Turns(p).end(turn, turned);
    }
  }
  __syncthreads();
  if (alone) finish_jacobi(p, a);
  if (over && Turns(p).first_of_sweep(turn))
    finish_jacobi(p, JacobiColumns<T>(memory, p.size, p.size, p.factor));
}

template <class T>
__global__ void __launch_bounds__(jacobi_svd_threads, 1)
    jacobi_svd(const JacobiProblem<T>* __restrict__ problems, int count) {
  TK_DYN_SMEM(double, memory);
  const int block = blockIdx.x;
  const JacobiProblem<T>& p =
      problems[problem_of_tile(problems, count, block, &JacobiProblem<T>::first_block)];
  if (p.flag != nullptr && *p.flag != 0) {
    if (block != p.first_block) return;
    for (int e = threadIdx.x; e < p.size * p.size; e += blockDim.x)
      p.basis[e] = e / p.size == e % p.size ? T(1) : T(0);
    if (p.sigma != nullptr)
      for (int j = threadIdx.x; j < p.size; j += blockDim.x) p.sigma[j] = T(NAN);
    if (p.rank != nullptr && threadIdx.x == 0) *p.rank = p.size;
    return;
  }
  jacobi_svd_in(&p, memory);
}

}  // namespace tk
