// What a kernel for a GPU calls, for kernels that are compiled as a processor's C++.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>

struct EmulatedIndex {
  unsigned x, y, z;
};
extern EmulatedIndex emulated_thread, emulated_block;
void emulated_barrier();
unsigned long long emulated_shuffle(unsigned long long value, int source);
int emulated_lane();

#define threadIdx emulated_thread
#define blockIdx emulated_block
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __syncthreads emulated_barrier
#define __activemask() 0xffffffffu

// CUDA has these for numbers; else those for half floats, which come with the kernels, would be taken
#define EMULATED_CHOICES(T)                        \
  inline T max(T a, T b) { return a > b ? a : b; } \
  inline T min(T a, T b) { return a < b ? a : b; }
EMULATED_CHOICES(float)
EMULATED_CHOICES(int)
EMULATED_CHOICES(long)

template <typename T>
T emulated_exchange(T value, int source) {
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulated_shuffle(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Widths below 32 cut a warp into parts, and a source beyond its part is the thread itself.
template <typename T>
T __shfl_down_sync(unsigned, T value, int offset, int width) {
  int lane = emulated_lane(), place = lane % width;
  return emulated_exchange(value, place + offset < width ? lane + offset : lane);
}

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width) {
  return emulated_exchange(value, emulated_lane() / width * width + source % width);
}
