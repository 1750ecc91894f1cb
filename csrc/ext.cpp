// fastpo._C: what PyTorch's GEMMs leave to be done on a CPU: the passes over logits (tile.inc), attention over packed trees
// (attention.inc, attention_bf16.inc), a decoder's elementwise layers (layers.inc), AdamW (adamw.inc), and the bin packer
// (pack.inc). No PyTorch headers: pointers come in as integers, so it builds in seconds in an isolated environment and
// serves every PyTorch.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
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

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTPO_X86 1
#if __has_include(<avx512bf16intrin.h>)
#define FASTPO_BF16 1
#include <cpuid.h>
#include <immintrin.h>
#endif
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
  const float* tilt;  // [rows] beside `factor`, of a backward pass that has the entropy's gradient too, else null
  const float* at;    // [rows] with it: the target's element, without 1 - tanh^2
};

constexpr int64_t kRows = 64;  // query rows of attention at a time
constexpr int64_t kKeys = 64;  // and keys

// Attention of T packed tokens; what comes as `strides` is (token, head), the last dimension is dense.
struct Attention {
  const void *q, *k, *v;       // [T, heads, size], [T, kv_heads, size] twice
  void* out;                   // [T, heads, size]; of the backward the merged output
  float* lse;                  // [T, heads]
  const void* dout;            // [T, heads, size], or null in the forward
  void *dq, *dk, *dv;          // as q, k and v, but dense
  const int64_t* chains;       // [C, 4]: first token, end, and the same of the prompt that its tokens see, or 0, 0
  const int64_t* tasks;        // forward [tasks, 3]: chain, its first token, end; backward [tasks, 2]: first chain, end
  int64_t count;               // tasks
  int64_t heads, kv_heads, size;
  int64_t room;                // floats that a task needs
  int64_t sq[2], sk[2], sv[2], sdo[2];
  float scale;
  bool bf16;
};

constexpr int64_t kLayerRows = 32;  // rows of a layer that a thread takes at a time, and of one partial sum
enum LayerKind { kRmsNorm, kSiluMul, kRotary };

// One elementwise layer over rows [rows, cols]; layers.inc says what of it each kind reads.
struct Layer {
  int kind;
  const void *x, *w, *dy;
  void *y, *dx, *dw;
  float *rstd, *sums;  // [rows]; [chunks of kLayerRows, cols]
  int64_t rows, cols, heads;
  int64_t ld[3];
  float eps, offset;
  int x_bf16, w_bf16, y_bf16, back;
};

constexpr int64_t kAdamChunk = 1 << 14;  // numbers of a tensor that a thread takes at a time, and of one partial sum

// One tensor of a step of AdamW.
struct AdamW {
  void* weight;  // bf16, or null where `master` is the model's own weight
  const void* grad;
  float *master, *m, *v;
  double* sums;  // of each chunk's squared gradients: then nothing is stepped
  int64_t count;
  int grad_bf16;
  float scale;  // of the gradient
  float kept;   // 1 - rate * weight_decay
  float one_less_beta1, beta2, one_less_beta2;
  float rate;             // lr / (1 - beta1^step)
  float over_root_bias2;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

}  // namespace

#define TILE_NAMESPACE generic
namespace {
#include "tile.inc"
#include "attention.inc"
#include "layers.inc"
#include "adamw.inc"
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
#include "attention.inc"
#include "layers.inc"
#include "adamw.inc"
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
#include "attention.inc"
#include "layers.inc"
#include "adamw.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if FASTPO_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512,avx512bf16")
#endif
namespace {
#include "attention_bf16.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef TILE_NAMESPACE
#endif

namespace {

#include "pack.inc"

using RowsFn = void (*)(const Tile&, int64_t, int64_t);
using AttentionFn = void (*)(const Attention&, const int64_t* task, int64_t kv_head, float* room);
using LayerFn = void (*)(const Layer&, int64_t, int64_t);
using AdamFn = void (*)(const AdamW&, int64_t, int64_t);
using SquaresFn = double (*)(const AdamW&, int64_t, int64_t);

struct Isa {
  const char* name;
  RowsFn rows;
  LayerFn layer;
  AdamFn adamw;
  SquaresFn sum_of_squares;
  AttentionFn attention_forward, attention_backward;
  AttentionFn bf16_forward, bf16_backward;  // of attention in bf16
};

#define FASTPO_ISA(NAME, ISA, FORWARD, BACKWARD)                                                                       \
  {NAME, ISA::rows, ISA::layer, ISA::adamw, ISA::sum_of_squares, ISA::attention_forward, ISA::attention_backward,      \
   ISA::FORWARD, ISA::BACKWARD}

// The best instruction set that this machine has, or the one named; rows is null where it cannot run here.
Isa pick_isa(const char* wanted) {
  const bool any = wanted == nullptr;
#if FASTPO_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if FASTPO_BF16
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_bf16 = has_avx512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 5);
  if (has_bf16 && (any || !strcmp(wanted, "avx512_bf16")))
    return FASTPO_ISA("avx512_bf16", avx512, attention_forward_bf16, attention_backward_bf16);
#endif
  if (has_avx512 && (any || !strcmp(wanted, "avx512")))
    return FASTPO_ISA("avx512", avx512, attention_forward, attention_backward);
  if (has_avx2 && (any || !strcmp(wanted, "avx2")))
    return FASTPO_ISA("avx2", avx2, attention_forward, attention_backward);
#endif
  if (any || !strcmp(wanted, "generic"))
    return FASTPO_ISA("generic", generic, attention_forward, attention_backward);
  return {wanted, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}

Isa current_isa = pick_isa(nullptr);

// PyTorch's own OpenMP team, when found: its threads are awake between two GEMMs, and a second pool would fight them for
// the cores. Every OpenMP runtime on Linux exports this entry point.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

// `body(arg)` on so many threads, which share what there is to do among them.
void on_threads(int threads, void (*body)(void*), void* arg) {
  if (threads > 1 && gomp_parallel) {
    gomp_parallel(body, arg, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; i++) helpers.emplace_back(body, arg);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started do it all.
  }
  body(arg);
  for (auto& helper : helpers) helper.join();
}

struct TileWork {
  const Tile* tile;
  std::atomic<int64_t> next{0};
};

void work_on_tile(void* arg) {
  TileWork* work = static_cast<TileWork*>(arg);
  const int64_t rows = work->tile->rows;
  for (int64_t begin; (begin = work->next.fetch_add(kRowsPerTake)) < rows;)
    current_isa.rows(*work->tile, begin, begin + kRowsPerTake < rows ? begin + kRowsPerTake : rows);
}

// A row's result does not depend on which thread computes it, so neither does anything on the number of threads.
void run(const Tile& tile, int threads) {
  TileWork work;
  work.tile = &tile;
  on_threads(tile.rows * tile.cols > 16384 && tile.rows > kRowsPerTake ? threads : 1, work_on_tile, &work);
}

struct LayerWork {
  const Layer* layer;
  std::atomic<int64_t> next{0};
};

void work_on_layer(void* arg) {
  LayerWork* work = static_cast<LayerWork*>(arg);
  const int64_t rows = work->layer->rows;
  for (int64_t begin; (begin = work->next.fetch_add(kLayerRows)) < rows;)
    current_isa.layer(*work->layer, begin, begin + kLayerRows < rows ? begin + kLayerRows : rows);
}

struct AdamWork {
  const AdamW* tensor;
  std::atomic<int64_t> next{0};
};

void work_on_adamw(void* arg) {
  AdamWork* work = static_cast<AdamWork*>(arg);
  const AdamW& t = *work->tensor;
  for (int64_t begin; (begin = work->next.fetch_add(kAdamChunk)) < t.count;) {
    const int64_t end = begin + kAdamChunk < t.count ? begin + kAdamChunk : t.count;
    if (t.sums)
      t.sums[begin / kAdamChunk] = current_isa.sum_of_squares(t, begin, end);
    else
      current_isa.adamw(t, begin, end);
  }
}

struct AttentionWork {
  const Attention* attention;
  std::atomic<int64_t> next{0};
};

void work_on_attention(void* arg) {
  AttentionWork* work = static_cast<AttentionWork*>(arg);
  const Attention& a = *work->attention;
  float* room = static_cast<float*>(aligned_alloc(64, (sizeof(float) * a.room + 63) / 64 * 64));
  if (!room) return;
  const Isa& isa = current_isa;
  const auto task = a.bf16 ? (a.dout ? isa.bf16_backward : isa.bf16_forward)
                           : (a.dout ? isa.attention_backward : isa.attention_forward);
  for (int64_t i; (i = work->next.fetch_add(1)) < a.count * a.kv_heads;)
    task(a, a.tasks + i / a.kv_heads * (a.dout ? 2 : 3), i % a.kv_heads, room);
  free(room);
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
            bf16 != 0,
            nullptr,
            nullptr};
  Py_BEGIN_ALLOW_THREADS;
  run(tile, threads);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* tilted_pass(PyObject*, PyObject* args) {
  unsigned long long raw, out, bias, target, m, factor, tilt, at;
  long long ld_raw, ld_out, rows, cols, col_offset;
  float softcap, scale;
  int bf16, threads;
  if (!PyArg_ParseTuple(args, "KKKKKKKKLLLLLffpi", &raw, &out, &bias, &target, &m, &factor, &tilt, &at, &ld_raw, &ld_out,
                        &rows, &cols, &col_offset, &softcap, &scale, &bf16, &threads))
    return nullptr;
  Tile tile{};
  tile.raw = pointer<void>(raw), tile.out = pointer<void>(out), tile.bias = pointer<void>(bias);
  tile.target = pointer<int64_t>(target), tile.m = pointer<float>(m), tile.factor = pointer<float>(factor);
  tile.tilt = pointer<float>(tilt), tile.at = pointer<float>(at);
  tile.ld_raw = ld_raw, tile.ld_out = ld_out, tile.rows = rows, tile.cols = cols, tile.col_offset = col_offset;
  tile.softcap = softcap, tile.scale = scale, tile.bf16 = bf16 != 0;
  Py_BEGIN_ALLOW_THREADS;
  run(tile, threads);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* tree_attention(PyObject*, PyObject* args) {
  unsigned long long q, k, v, out, lse, dout, dq, dk, dv, chains, tasks;
  Attention a;
  long long n[13];
  int bf16, threads;
  if (!PyArg_ParseTuple(args, "KKKKKKKKKKKLLLLLLLLLLLLLfpi", &q, &k, &v, &out, &lse, &dout, &dq, &dk, &dv, &chains, &tasks,
                        &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6], &n[7], &n[8], &n[9], &n[10], &n[11], &n[12],
                        &a.scale, &bf16, &threads))
    return nullptr;
  a.q = pointer<void>(q), a.k = pointer<void>(k), a.v = pointer<void>(v), a.out = pointer<void>(out);
  a.lse = pointer<float>(lse), a.dout = pointer<void>(dout);
  a.dq = pointer<void>(dq), a.dk = pointer<void>(dk), a.dv = pointer<void>(dv);
  a.chains = pointer<int64_t>(chains), a.tasks = pointer<int64_t>(tasks);
  a.count = n[0], a.heads = n[1], a.kv_heads = n[2], a.size = n[3], a.room = n[4];
  for (int i = 0; i < 2; i++) a.sq[i] = n[5 + i], a.sk[i] = n[7 + i], a.sv[i] = n[9 + i], a.sdo[i] = n[11 + i];
  a.bf16 = bf16 != 0;
  AttentionWork work;
  work.attention = &a;
  Py_BEGIN_ALLOW_THREADS;
  on_threads(threads, work_on_attention, &work);
  Py_END_ALLOW_THREADS;
  // A thread without memory has left its share to the others; one had it, or nothing has been done.
  if (work.next.load() == 0) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* layer_pass(PyObject*, PyObject* args) {
  unsigned long long x, w, dy, y, dx, dw, rstd, sums;
  long long rows, cols, heads, ld[3];
  Layer t;
  int threads;
  if (!PyArg_ParseTuple(args, "iKKKKKKKKLLLLLLffppppi", &t.kind, &x, &w, &dy, &y, &dx, &dw, &rstd, &sums, &rows, &cols,
                        &heads, &ld[0], &ld[1], &ld[2], &t.eps, &t.offset, &t.x_bf16, &t.w_bf16, &t.y_bf16, &t.back,
                        &threads))
    return nullptr;
  t.x = pointer<void>(x), t.w = pointer<void>(w), t.dy = pointer<void>(dy), t.y = pointer<void>(y);
  t.dx = pointer<void>(dx), t.dw = pointer<void>(dw), t.rstd = pointer<float>(rstd), t.sums = pointer<float>(sums);
  t.rows = rows, t.cols = cols, t.heads = heads;
  for (int i = 0; i < 3; i++) t.ld[i] = ld[i];
  LayerWork work;
  work.layer = &t;
  Py_BEGIN_ALLOW_THREADS;
  on_threads(rows > kLayerRows && rows * cols * heads > 16384 ? threads : 1, work_on_layer, &work);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* adamw(PyObject*, PyObject* args) {
  unsigned long long weight, grad, master, m, v;
  long long count;
  AdamW t{};
  int threads;
  if (!PyArg_ParseTuple(args, "KKKKKLpffffffffi", &weight, &grad, &master, &m, &v, &count, &t.grad_bf16, &t.scale, &t.kept,
                        &t.one_less_beta1, &t.beta2, &t.one_less_beta2, &t.rate, &t.over_root_bias2, &t.eps, &threads))
    return nullptr;
  t.weight = pointer<void>(weight), t.grad = pointer<void>(grad), t.master = pointer<float>(master);
  t.m = pointer<float>(m), t.v = pointer<float>(v), t.count = count;
  AdamWork work;
  work.tensor = &t;
  Py_BEGIN_ALLOW_THREADS;
  on_threads(count > kAdamChunk ? threads : 1, work_on_adamw, &work);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// Does not depend on the number of threads: chunks are summed in order.
PyObject* sum_of_squares(PyObject*, PyObject* args) {
  unsigned long long grad;
  long long count;
  AdamW t{};
  int threads;
  if (!PyArg_ParseTuple(args, "KLpi", &grad, &count, &t.grad_bf16, &threads)) return nullptr;
  t.grad = pointer<void>(grad), t.count = count;
  double total = 0.0;
  bool failed = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    std::vector<double> sums((count + kAdamChunk - 1) / kAdamChunk);
    t.sums = sums.data();
    AdamWork work;
    work.tensor = &t;
    on_threads(count > kAdamChunk ? threads : 1, work_on_adamw, &work);
    for (double x : sums) total += x;
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  Py_END_ALLOW_THREADS;
  return failed ? PyErr_NoMemory() : PyFloat_FromDouble(total);
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
    {"tilted_pass", tilted_pass, METH_VARARGS,
     "The backward pass over a tile with the entropy's gradient; the fields of struct Tile that it reads, as tile_pass."},
    {"tree_attention", tree_attention, METH_VARARGS,
     "Attention over packed trees; the pointers of struct Attention, its numbers, strides, scale, bf16, then threads."},
    {"layer_pass", layer_pass, METH_VARARGS,
     "An elementwise layer; arguments are the fields of struct Layer in order, then the number of threads."},
    {"adamw", adamw, METH_VARARGS,
     "A step of AdamW of one tensor; pointers, count and numbers of struct AdamW, then the number of threads."},
    {"sum_of_squares", sum_of_squares, METH_VARARGS, "Of a tensor: pointer, count, whether bf16, number of threads."},
    {"pack", pack_bins, METH_VARARGS,
     "The bin of each item, and how many bins; arguments as fastpo/data/packer.py passes them."},
    {"use_openmp_of", use_openmp_of, METH_VARARGS,
     "Run on the OpenMP threads of a loaded library (None: on threads of its own); whether it has any."},
    {"isa", isa, METH_NOARGS, "The instruction set in use: avx512_bf16, avx512, avx2 or generic."},
    {"use_isa", use_isa, METH_VARARGS, "Use this instruction set (None: the best one); whether it is there."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastpo._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
