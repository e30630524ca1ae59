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

// what a CUDA build can say about itself: {"compiled": "80 90a", "devices": [...]}, or None
py::object cuda_info() {
#ifdef LIAR_CUDA
  py::dict info;
  info["compiled"] = LIAR_CUDA;
  py::list devices;
  int count = 0;
  const int status = liar_cuda_device_count(&count);
  if (status != 0) info["error"] = liar_cuda_error(status);
  for (int device = 0; status == 0 && device < count; ++device) {
    int capability = 0, binary = 0;
    const int error = liar_cuda_device(device, &capability, &binary);
    py::dict entry;
    entry["capability"] = capability;
    entry["runs"] = binary;
    if (error != 0) entry["error"] = liar_cuda_error(error);
    devices.append(entry);
  }
  info["devices"] = devices;
  return info;
#else
  return py::none();
#endif
}

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
}
