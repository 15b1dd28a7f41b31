// An empty Python module: importing it loads the library, whose static initialisers register the kernels.
#include <Python.h>

#include <string>

#include "common.h"

extern "C" PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace slowfast_ext {
namespace {

// The compute capabilities this library holds code for, as in TORCH_CUDA_ARCH_LIST, separated by spaces.
std::string build_info() { return SLOWFAST_EXT_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slowfast_ext, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

}  // namespace slowfast_ext
