// the C interface of the native sources: raw pointers and sizes, no torch, no Python.
// a launcher returns 0, or one of LiarStatus; the caller turns it into a message.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { LIAR_F32 = 0, LIAR_F16 = 1, LIAR_BF16 = 2 } LiarDtype;

typedef enum {
  LIAR_OK = 0,
  LIAR_OUT_OF_MEMORY = 1,  // the packing buffer could not be allocated
  LIAR_NO_SUCH_PATH = 2,   // this CPU or this process cannot run the path that was asked for
} LiarStatus;

// the ways to multiply on a CPU, fastest first where they can run
typedef enum {
  LIAR_PATH_AUTO = 0,
  LIAR_PATH_AVX512_BF16 = 1,  // bf16 only: own kernel on vdpbf16ps
  LIAR_PATH_AVX512 = 2,       // own fp32 kernel; 16-bit input is widened while packing
  LIAR_PATH_BLAS = 3,     // the BLAS inside libtorch_cpu.so: sgemm, or gemm_bf16bf16f32 with AMX
  LIAR_PATH_GENERIC = 4,  // portable C++
} LiarPath;

// G += X_oᵀ X_o[:, :panel] on entries row ≥ column, s += Σ x, over the rows that the mask keeps
typedef struct {
  const void* x;  // (rows, columns), dtype, unit column stride
  int32_t dtype;  // LiarDtype
  int64_t rows;
  int64_t columns;
  int64_t row_stride;    // elements
  const int64_t* valid;  // (valid_count,) row indices
  int64_t valid_count;   // -1 for all rows: NULL is also what an empty tensor points to
  const int64_t* order;  // (columns,) column order of G, or NULL for the natural one
  float* gram;           // (columns, panel) fp32; entries row < column may hold anything after
  int64_t gram_stride;   // elements
  int64_t panel;         // columns of G that are wanted, counted in the order
  double* sum;           // (columns,) fp64, natural order
  int32_t threads;
  int32_t path;  // LiarPath
} LiarGram;

int liar_gram_cpu(const LiarGram* args);

// 1 when the path can run here on this dtype
int liar_gram_cpu_can(int32_t path, int32_t dtype);

// the path LIAR_PATH_AUTO takes for this dtype
int liar_gram_cpu_path(int32_t dtype);

// the rest exists only in a CUDA build (LIAR_CUDA defined); each returns a cudaError_t
int liar_cuda_device_count(int* count);

// compute capability of a device (90 for 9.0), and the architecture of the code compiled here that
// it would run (0 when there is none)
int liar_cuda_device(int device, int* capability, int* binary);

const char* liar_cuda_error(int error);

// the ridge solves of a batch of small systems: d = (diag A + λ)^(-1/2), zero in dead rows (diag A
// zero), Ã = d (A + λI) d with a unit diagonal, Z = d Ã⁻¹ d B, which is zero in dead rows, and
// P = b - Zᵀ a. A system that fails (it does where diag A + λ is not positive) says so in info; its
// Z, P, smallest and error are NaN, and the others do not notice.
typedef struct {
  const double* matrix;  // (batch, size, size), lower triangle read, unit column stride
  int64_t matrix_batch, matrix_row;
  const double* right;  // (batch, size, columns), unit column stride
  int64_t right_batch, right_row;
  const double* strength;      // (batch,) λ
  const double* mean_kept;     // (batch, size) a, or NULL for P = 0
  const double* mean_dropped;  // (batch, columns) b
  double* solution;            // (batch, size, columns) Z, contiguous
  double* shift;               // (batch, columns) P
  int32_t* info;               // (batch,) 0, or 1 + row of the first pivot that is not positive
  double* pivot;               // (batch,) smallest pivot, or the one that info names
  double* largest;             // (batch,) largest eigenvalue of Ã, estimated from below
  double* smallest;            // (batch,) smallest eigenvalue of Ã, estimated from above
  double* error;               // (batch,) ‖ÃZ̃ - B̃‖ / (‖Ã‖‖Z̃‖ + ‖B̃‖), Frobenius norms and ‖Ã‖₂
  double* workspace;           // liar_solve_small_workspace(batch, columns) numbers
  int64_t batch;
  int32_t size;     // ≤ 128
  int64_t columns;  // of B, ≥ 0
  int32_t single;   // 1: factor in float32 and refine by float64 residuals; 0: float64
  void* stream;
} LiarSolveSmall;

int liar_solve_small(const LiarSolveSmall* args);

int64_t liar_solve_small_workspace(int64_t batch, int64_t columns);

// bytes of shared memory that a system of this size takes at least; -1 above 128 rows
int64_t liar_solve_small_shared(int32_t size, int32_t single);

// bytes of shared memory that one block may take on a device; 0 where it cannot be asked
int64_t liar_solve_shared_limit(int device);

// one panel step of a blocked Cholesky factorisation, for a batch: the diagonal block becomes its
// lower triangular factor (what is above the diagonal stays), `inverse` the inverse of that factor
// with zeros above the diagonal
typedef struct {
  void* matrix;  // (batch, size, size) in place, unit column stride
  int64_t matrix_batch, matrix_row;
  void* inverse;  // (batch, size, size), unit column stride
  int64_t inverse_batch, inverse_row;
  int32_t* info;  // (batch,) kept where it is not 0: the first failure counts
  double* pivot;  // (batch,) running minimum; with a failure, the pivot that failed
  int64_t batch;
  int32_t size;    // ≤ 128
  int64_t first;   // row of the whole matrix that this block starts at
  int32_t single;  // 1: float32, 0: float64
  void* stream;
} LiarPanel;

int liar_solve_panel(const LiarPanel* args);

// bytes of shared memory that a panel of 128 rows takes at least
int64_t liar_solve_panel_shared(int32_t single);

// G += Xᵀ X[:, :panel] on entries row ≥ column, and no other entry is touched; sum += Σ x. Hopper
// (compute capability 9.0) only. x holds one plane, or three bfloat16 ones whose sum is the data.
typedef struct {
  const void* x;  // (planes, tokens, columns), unit column stride, 16-byte aligned
  int32_t dtype;  // LIAR_F16 or LIAR_BF16; with three planes LIAR_BF16
  int32_t planes;
  int64_t tokens;
  int64_t columns;       // in the order of G: the panel first
  int64_t row_stride;    // elements, a multiple of 8
  int64_t plane_stride;  // a multiple of row_stride; read where planes is 3
  float* gram;           // (columns, panel)
  int64_t gram_stride;   // elements
  int64_t panel;
  double* sum;      // (columns,), in the order of x, or NULL
  void* workspace;  // 16-byte aligned, at least liar_gram_sm90_workspace bytes; contents irrelevant
  int64_t workspace_bytes;
  int32_t tile;     // columns of a tile, 128 or 256; 0 chooses
  int32_t period;   // pipeline stages between two moves of the running sums; 0 for the default
  int32_t blocks;   // at most so many, 0 for one per multiprocessor
  int32_t cluster;  // blocks that share loads: 1, or 2 with tiles of 256 columns; 0 for the default
  void* stream;
} LiarGramSm90;

int liar_gram_sm90(const LiarGramSm90* args);

int liar_gram_sm90_workspace(const LiarGramSm90* args, int64_t* bytes);

#ifdef __cplusplus
}
#endif
