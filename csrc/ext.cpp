// fastpo._C: the passes over logits that PyTorch's GEMMs leave to be done on a CPU (tile.inc has the math), and the bin
// packer (pack.inc). No PyTorch headers: pointers come in as integers, so it builds in seconds in an isolated environment
// and serves every PyTorch.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <new>
#include <numeric>
#include <queue>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace {

constexpr int kChunk = 2048;          // columns of one row between two looks at its maximum: 8 KiB of fp32 logits
constexpr int kBlock = 256;           // columns of one partial sum
constexpr float kHeadroom = 40.0f;    // exp(z - m) may reach e^40 before a row is restated for a larger m
constexpr int64_t kRowsPerTake = 16;  // rows a thread takes at a time

// One tile [rows, cols] of logits and the state of its rows; the columns col_offset .. col_offset + cols of the matrix.
struct Tile {
  const void* raw;        // [rows, cols], raw logits without bias
  void* out;              // [rows, cols], may be raw; null when nothing is kept
  const void* bias;       // [cols] or null
  const int64_t* target;  // [rows], in the whole vocabulary
  float* m;               // [rows], the shift of each row
  float* others;          // [rows], sum of exp(z - m) without the target
  float* z_target;        // [rows]
  float* ez;              // [rows], sum of (z - m) exp(z - m) without the target, or null
  float* top;             // [rows], the largest z so far, the target's among them; null where ez is
  float* past;            // [rows, past_cols] fp32 sums that share the shift, or null
  const float* factor;    // [rows], of the backward pass, else null
  float* slope;           // [rows], 1 - tanh^2 at the target, out of a forward pass with a soft cap; or null
  int64_t ld_raw, ld_out, rows, cols, col_offset;
  int64_t out_past;  // columns before `out` that share the shift
  int64_t past_cols;
  float softcap, scale;  // softcap 0 for none
  bool bf16;
};

}  // namespace

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTPO_X86 1
#endif

#define TILE_NAMESPACE generic
namespace {
#include "tile.inc"
}
#undef TILE_NAMESPACE

#if FASTPO_X86
#define TILE_NAMESPACE avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace {
#include "tile.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef TILE_NAMESPACE

#define TILE_NAMESPACE avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
namespace {
#include "tile.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef TILE_NAMESPACE
#endif

namespace {

#include "pack.inc"

using RowsFn = void (*)(const Tile&, int64_t, int64_t);

struct Isa {
  const char* name;
  RowsFn rows;
};

// The best instruction set that this machine has, or the one named; rows is null where it cannot run here.
Isa pick_isa(const char* wanted) {
  const bool any = wanted == nullptr;
#if FASTPO_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || !strcmp(wanted, "avx512"))) return {"avx512", avx512::rows};
  if (has_avx2 && (any || !strcmp(wanted, "avx2"))) return {"avx2", avx2::rows};
#endif
  if (any || !strcmp(wanted, "generic")) return {"generic", generic::rows};
  return {wanted, nullptr};
}

Isa current_isa = pick_isa(nullptr);

// PyTorch's own OpenMP team, when found: its threads are awake between two GEMMs, and a second pool would fight them for
// the cores. Every OpenMP runtime on Linux exports this entry point.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

struct Work {
  const Tile* tile;
  std::atomic<int64_t> next{0};
};

void work_through(void* arg) {
  Work* work = static_cast<Work*>(arg);
  const int64_t rows = work->tile->rows;
  for (int64_t begin; (begin = work->next.fetch_add(kRowsPerTake)) < rows;)
    current_isa.rows(*work->tile, begin, begin + kRowsPerTake < rows ? begin + kRowsPerTake : rows);
}

// A row's result does not depend on which thread computes it, so neither does anything on the number of threads.
void run(const Tile& tile, int threads) {
  Work work;
  work.tile = &tile;
  if (threads > 1 && tile.rows * tile.cols > 16384 && tile.rows > kRowsPerTake) {
    if (gomp_parallel) {
      gomp_parallel(work_through, &work, static_cast<unsigned>(threads), 0);
      return;
    }
    std::vector<std::thread> helpers;
    try {
      for (int i = 1; i < threads; i++) helpers.emplace_back(work_through, &work);
    } catch (const std::system_error&) {
      // No more threads to be had: those that started share the rows.
    }
    work_through(&work);
    for (auto& helper : helpers) helper.join();
    return;
  }
  work_through(&work);
}

template <class T>
T* pointer(unsigned long long address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

PyObject* tile_pass(PyObject*, PyObject* args) {
  unsigned long long raw, out, bias, target, m, others, z_target, ez, top, past, factor, slope;
  long long ld_raw, ld_out, rows, cols, col_offset, out_past, past_cols;
  float softcap, scale;
  int bf16, threads;
  if (!PyArg_ParseTuple(args, "KKKKKKKKKKKKLLLLLLLffpi", &raw, &out, &bias, &target, &m, &others, &z_target, &ez, &top,
                        &past, &factor, &slope, &ld_raw, &ld_out, &rows, &cols, &col_offset, &out_past, &past_cols, &softcap, &scale,
                        &bf16, &threads))
    return nullptr;
  Tile tile{pointer<void>(raw),
            pointer<void>(out),
            pointer<void>(bias),
            pointer<int64_t>(target),
            pointer<float>(m),
            pointer<float>(others),
            pointer<float>(z_target),
            pointer<float>(ez),
            pointer<float>(top),
            pointer<float>(past),
            pointer<float>(factor),
            pointer<float>(slope),
            ld_raw,
            ld_out,
            rows,
            cols,
            col_offset,
            out_past,
            past_cols,
            softcap,
            scale,
            bf16 != 0};
  Py_BEGIN_ALLOW_THREADS;
  run(tile, threads);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* pack_bins(PyObject*, PyObject* args) {
  unsigned long long sizes, cost, by_cost, out;
  long long n, capacity, ranks, least, nodes, nodes_a_bin, tries;
  if (!PyArg_ParseTuple(args, "KKKKLLLLLLL", &sizes, &cost, &by_cost, &out, &n, &capacity, &ranks, &least, &nodes,
                        &nodes_a_bin, &tries))
    return nullptr;
  const pack::Problem problem{pointer<int64_t>(sizes), pointer<int64_t>(cost), pointer<int64_t>(by_cost), n, capacity,
                              nodes_a_bin,             tries};
  int64_t count = -1;
  Py_BEGIN_ALLOW_THREADS;
  try {
    count = pack::run(problem, ranks, least, nodes, pointer<int64_t>(out));
  } catch (const std::bad_alloc&) {
  }
  Py_END_ALLOW_THREADS;
  return count < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(count);
}

PyObject* use_openmp_of(PyObject*, PyObject* args) {
  const char* path;
  if (!PyArg_ParseTuple(args, "z", &path)) return nullptr;
  gomp_parallel = nullptr;
#if defined(__linux__) || defined(__APPLE__)
  // A handle's symbols include those of its dependencies: this finds the runtime that PyTorch itself is linked to.
  if (void* handle = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr)
    gomp_parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
#endif
  return PyBool_FromLong(gomp_parallel != nullptr);
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(current_isa.name); }

PyObject* use_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "z", &name)) return nullptr;
  const Isa found = pick_isa(name);
  if (found.rows) current_isa = found;
  return PyBool_FromLong(found.rows != nullptr);
}

PyMethodDef methods[] = {
    {"tile_pass", tile_pass, METH_VARARGS,
     "One pass over a tile of logits; arguments are the fields of struct Tile in order, then the number of threads."},
    {"pack", pack_bins, METH_VARARGS,
     "The bin of each item, and how many bins; arguments as fastpo/data/packer.py passes them."},
    {"use_openmp_of", use_openmp_of, METH_VARARGS,
     "Run on the OpenMP threads of a loaded library (None: on threads of its own); whether it has any."},
    {"isa", isa, METH_NOARGS, "The instruction set in use: avx512, avx2 or generic."},
    {"use_isa", use_isa, METH_VARARGS, "Use this instruction set (None: the best one); whether it is there."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastpo._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
