// the one file that knows Python: checks nothing about tensors, `ops/_extension.py` does
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "liar.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void gram_cpu(uintptr_t x, int dtype, int64_t rows, int64_t columns, int64_t row_stride,
              uintptr_t valid, int64_t valid_count, uintptr_t order, uintptr_t gram,
              int64_t gram_stride, int64_t panel, uintptr_t sum, int threads, int path) {
  const LiarGram args{pointer<const void>(x),
                      dtype,
                      rows,
                      columns,
                      row_stride,
                      pointer<const int64_t>(valid),
                      valid_count,
                      pointer<const int64_t>(order),
                      pointer<float>(gram),
                      gram_stride,
                      panel,
                      pointer<double>(sum),
                      threads,
                      path};
  int status;
  {
    py::gil_scoped_release release;
    status = liar_gram_cpu(&args);
  }
  if (status == LIAR_OUT_OF_MEMORY)
    throw std::runtime_error("gram: no memory for the packed copy of " + std::to_string(columns) +
                             " columns");
  if (status != LIAR_OK)
    throw std::invalid_argument("gram: path " + std::to_string(path) +
                                " cannot run here on dtype " + std::to_string(dtype));
}

#ifdef LIAR_CUDA
// one device, which gets a context by this: {"capability": 90, "runs": 90}, or with an "error"
py::dict cuda_device(int device) {
  int capability = 0, binary = 0;
  const int error = liar_cuda_device(device, &capability, &binary);
  py::dict entry;
  entry["compiled"] = LIAR_CUDA;
  entry["capability"] = capability;
  entry["runs"] = binary;
  if (error != 0) entry["error"] = liar_cuda_error(error);
  return entry;
}
#endif

// what a CUDA build can say about itself: {"compiled": "80 90a", "devices": [...]}, or None
py::object cuda_info() {
#ifdef LIAR_CUDA
  py::dict info;
  info["compiled"] = LIAR_CUDA;
  py::list devices;
  int count = 0;
  const int status = liar_cuda_device_count(&count);
  if (status != 0) info["error"] = liar_cuda_error(status);
  for (int device = 0; status == 0 && device < count; ++device) devices.append(cuda_device(device));
  info["devices"] = devices;
  return info;
#else
  return py::none();
#endif
}

#ifdef LIAR_CUDA
// a CUDA status as an exception; the launch itself reports nothing later than this
void check_cuda(int error, const char* op) {
  if (error != 0) throw std::runtime_error(std::string(op) + ": " + liar_cuda_error(error));
}

void solve_small(uintptr_t matrix, int64_t matrix_batch, int64_t matrix_row, uintptr_t right,
                 int64_t right_batch, int64_t right_row, uintptr_t strength, uintptr_t mean_kept,
                 uintptr_t mean_dropped, uintptr_t solution, uintptr_t shift, uintptr_t info,
                 uintptr_t pivot, uintptr_t largest, uintptr_t smallest, uintptr_t error,
                 uintptr_t workspace, int64_t batch, int32_t size, int64_t columns, int32_t single,
                 uintptr_t stream) {
  const LiarSolveSmall args{pointer<const double>(matrix),
                            matrix_batch,
                            matrix_row,
                            pointer<const double>(right),
                            right_batch,
                            right_row,
                            pointer<const double>(strength),
                            pointer<const double>(mean_kept),
                            pointer<const double>(mean_dropped),
                            pointer<double>(solution),
                            pointer<double>(shift),
                            pointer<int32_t>(info),
                            pointer<double>(pivot),
                            pointer<double>(largest),
                            pointer<double>(smallest),
                            pointer<double>(error),
                            pointer<double>(workspace),
                            batch,
                            size,
                            columns,
                            single,
                            pointer<void>(stream)};
  check_cuda(liar_solve_small(&args), "solve_small");
}

void solve_panel(uintptr_t matrix, int64_t matrix_batch, int64_t matrix_row, uintptr_t inverse,
                 int64_t inverse_batch, int64_t inverse_row, uintptr_t info, uintptr_t pivot,
                 int64_t batch, int32_t size, int64_t first, int32_t single, uintptr_t stream) {
  const LiarPanel args{pointer<void>(matrix),
                       matrix_batch,
                       matrix_row,
                       pointer<void>(inverse),
                       inverse_batch,
                       inverse_row,
                       pointer<int32_t>(info),
                       pointer<double>(pivot),
                       batch,
                       size,
                       first,
                       single,
                       pointer<void>(stream)};
  check_cuda(liar_solve_panel(&args), "solve_panel");
}

LiarGramSm90 gram_sm90_shape(int dtype, int planes, int64_t tokens, int64_t columns,
                             int64_t row_stride, int64_t plane_stride, int64_t panel, int tile,
                             int blocks, int cluster) {
  LiarGramSm90 args{};
  args.dtype = dtype;
  args.planes = planes;
  args.tokens = tokens;
  args.columns = columns;
  args.row_stride = row_stride;
  args.plane_stride = plane_stride;
  args.panel = panel;
  args.tile = tile;
  args.blocks = blocks;
  args.cluster = cluster;
  return args;
}

int64_t gram_sm90_workspace(int dtype, int planes, int64_t tokens, int64_t columns,
                            int64_t row_stride, int64_t plane_stride, int64_t panel, int tile,
                            int blocks, int cluster) {
  const LiarGramSm90 args = gram_sm90_shape(dtype, planes, tokens, columns, row_stride,
                                            plane_stride, panel, tile, blocks, cluster);
  int64_t bytes = 0;
  check_cuda(liar_gram_sm90_workspace(&args, &bytes), "gram_sm90");
  return bytes;
}

void gram_sm90(int dtype, int planes, int64_t tokens, int64_t columns, int64_t row_stride,
               int64_t plane_stride, int64_t panel, int tile, int blocks, int cluster, uintptr_t x,
               uintptr_t gram, int64_t gram_stride, uintptr_t sum, uintptr_t workspace,
               int64_t workspace_bytes, int period, uintptr_t stream) {
  LiarGramSm90 args = gram_sm90_shape(dtype, planes, tokens, columns, row_stride, plane_stride,
                                      panel, tile, blocks, cluster);
  args.x = pointer<const void>(x);
  args.gram = pointer<float>(gram);
  args.gram_stride = gram_stride;
  args.sum = pointer<double>(sum);
  args.workspace = pointer<void>(workspace);
  args.workspace_bytes = workspace_bytes;
  args.period = period;
  args.stream = pointer<void>(stream);
  check_cuda(liar_gram_sm90(&args), "gram_sm90");
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "raw-pointer bindings of csrc/; call them through liar_ext.ops";
  py::enum_<LiarDtype>(m, "Dtype")
      .value("float32", LIAR_F32)
      .value("float16", LIAR_F16)
      .value("bfloat16", LIAR_BF16);
  py::enum_<LiarPath>(m, "Path")
      .value("auto", LIAR_PATH_AUTO)
      .value("avx512_bf16", LIAR_PATH_AVX512_BF16)
      .value("avx512", LIAR_PATH_AVX512)
      .value("blas", LIAR_PATH_BLAS)
      .value("generic", LIAR_PATH_GENERIC);
  m.def("gram_cpu", &gram_cpu);
  m.def("gram_cpu_can", &liar_gram_cpu_can);
  m.def("gram_cpu_path", &liar_gram_cpu_path);
  m.def("cuda_info", &cuda_info);
#ifdef LIAR_CUDA
  m.def("cuda_device", &cuda_device);
  m.def("solve_small", &solve_small);
  m.def("solve_small_workspace", &liar_solve_small_workspace);
  m.def("solve_small_shared", &liar_solve_small_shared);
  m.def("solve_shared_limit", &liar_solve_shared_limit);
  m.def("solve_panel", &solve_panel);
  m.def("solve_panel_shared", &liar_solve_panel_shared);
  m.def("gram_sm90", &gram_sm90);
  m.def("gram_sm90_workspace", &gram_sm90_workspace);
#endif
}
