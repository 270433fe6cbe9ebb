// A GPU of compute capability 8.0 in software: as much of CUDA's driver and runtime as TVM's runtime calls. Memory is the
// processor's. A kernel's blocks run one after another; a block's threads are fibers that run until they wait. Those that
// wait in a shuffle go on when no other thread of the block can run, those that wait for the whole block when nobody waits
// in a shuffle. Kernels are compiled from the same source as for a GPU, after kernels.h.
#include <cuda.h>
#include <driver_types.h>
#include <dlfcn.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "kernels.h"

EmulatedIndex emulated_thread, emulated_block;

namespace {
constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
enum State { kRuns, kShuffles, kWaits, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  EmulatedIndex index;
  unsigned long long value;
  int source;
};

std::vector<Fiber> fibers;
std::vector<char*> stacks;
ucontext_t scheduler;
int current;
void (*kernel)(void**);
void** arguments;

struct Launch {
  CUlaunchConfig how;
  CUfunction function;
  std::vector<long long> values;  // numbers or addresses, of 8 bytes at most
};
std::vector<Launch>* recorded;  // while launches are kept in place of being run
std::map<CUfunction, int> counts;  // of parameters

void begin() {
  kernel(arguments);
  fibers[current].state = kDone;
}

void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

// Exchange the values of the threads of a warp that wait in a shuffle; a source that doesn't takes part in none.
void exchange(int first, int last) {
  std::vector<unsigned long long> given(last - first);
  std::vector<bool> there(last - first);
  for (int i = first; i < last; ++i) {
    given[i - first] = fibers[i].value;
    there[i - first] = fibers[i].state == kShuffles;
  }
  for (int i = first; i < last; ++i) {
    if (fibers[i].state != kShuffles) continue;
    int source = fibers[i].source;
    if (source < last - first && there[source]) fibers[i].value = given[source];
    fibers[i].state = kRuns;
  }
}

void run_block(int count) {
  for (;;) {
    bool ran = false;
    for (int i = 0; i < count; ++i) {
      if (fibers[i].state != kRuns) continue;
      ran = true;
      current = i;
      emulated_thread = fibers[i].index;
      swapcontext(&scheduler, &fibers[i].context);
    }
    if (ran) continue;
    bool shuffled = false;
    for (int first = 0; first < count; first += kWarp) {
      int last = std::min(first + kWarp, count);
      for (int i = first; i < last; ++i) shuffled |= fibers[i].state == kShuffles;
      exchange(first, last);
    }
    if (shuffled) continue;
    bool waited = false;
    for (int i = 0; i < count; ++i) {
      if (fibers[i].state == kWaits) fibers[i].state = kRuns, waited = true;
    }
    if (!waited) return;
  }
}
}  // namespace

void emulated_barrier() { wait(kWaits); }

unsigned long long emulated_shuffle(unsigned long long value, int source) {
  int self = current;
  fibers[self].value = value;
  fibers[self].source = source;
  wait(kShuffles);
  return fibers[self].value;
}

int emulated_lane() { return current % kWarp; }

extern "C" {
CUresult emulated_no_tensor_maps() asm("cuTensorMapEncodeTiled");  // 13 parameters that nobody passes
CUresult emulated_no_tensor_maps() { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 0;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void*) { return *module = (CUmodule)dlopen(nullptr, RTLD_NOW), CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = (CUfunction)dlsym(RTLD_DEFAULT, (std::string("emulated_") + name).c_str());
  if (!*function) return CUDA_ERROR_NOT_FOUND;
  counts[*function] = *(int*)dlsym(RTLD_DEFAULT, (std::string("emulated_count_") + name).c_str());
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char** name) { return *name = "emulated", CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "emulated", CUDA_SUCCESS; }
CUresult cuDeviceGetName(char*, int, CUdevice) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction function, void** parameters, void**) {
  if (recorded) {
    Launch launch{*how, function, {}};
    for (int i = 0; i < counts[function]; ++i) memcpy(&launch.values.emplace_back(), parameters[i], sizeof(long long));
    return recorded->push_back(std::move(launch)), CUDA_SUCCESS;
  }
  int count = how->blockDimX * how->blockDimY * how->blockDimZ;
  while ((int)stacks.size() < count) stacks.push_back((char*)malloc(kStack));
  fibers.resize(count);
  kernel = (void (*)(void**))function;
  arguments = parameters;
  for (unsigned z = 0; z < how->gridDimZ; ++z)
    for (unsigned y = 0; y < how->gridDimY; ++y)
      for (unsigned x = 0; x < how->gridDimX; ++x) {
        emulated_block = {x, y, z};
        for (int i = 0; i < count; ++i) {
          Fiber& fiber = fibers[i];
          unsigned row = i / how->blockDimX;
          fiber.index = {i % how->blockDimX, row % how->blockDimY, row / how->blockDimY};
          fiber.state = kRuns;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = stacks[i];
          fiber.context.uc_stack.ss_size = kStack;
          fiber.context.uc_link = &scheduler;
          makecontext(&fiber.context, begin, 0);
        }
        run_block(count);
      }
  return CUDA_SUCCESS;
}

void emulated_record() { recorded = new std::vector<Launch>; }
void* emulated_recorded() {
  void* launches = recorded;
  return recorded = nullptr, launches;
}
void emulated_replay(void* launches) {
  for (Launch& launch : *(std::vector<Launch>*)launches) {
    std::vector<void*> parameters;
    for (long long& value : launch.values) parameters.push_back(&value);
    cuLaunchKernelEx(&launch.how, launch.function, parameters.data(), nullptr);
  }
}
void emulated_forget(void* launches) { delete (std::vector<Launch>*)launches; }
}
