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

#ifdef __cplusplus
}
#endif
