// As much of CUDA's runtime as TVM's calls, over the processor's memory; driver.cpp runs the kernels.
#include <driver_types.h>

#include <cstdlib>
#include <cstring>

#define DOES_NOTHING(name) \
  cudaError_t name() { return cudaSuccess; }

// In driver.cpp: launches are kept in place of being run, until they are asked for as one.
extern "C" void emulated_record();
extern "C" void* emulated_recorded();
extern "C" void emulated_replay(void*);
extern "C" void emulated_forget(void*);

extern "C" {
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return emulated_record(), cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  return *graph = (cudaGraph_t)emulated_recorded(), cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* program, cudaGraph_t graph, unsigned long long) {
  return *program = (cudaGraphExec_t)graph, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t program, cudaStream_t) { return emulated_replay(program), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t program) { return emulated_forget(program), cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(*memory, 0xff, bytes);  // what nobody wrote is no number
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
DOES_NOTHING(cudaSetDevice)
DOES_NOTHING(cudaGraphDestroy)
DOES_NOTHING(cudaGetLastError)
DOES_NOTHING(cudaPeekAtLastError)
DOES_NOTHING(cudaStreamDestroy)
DOES_NOTHING(cudaStreamSynchronize)
DOES_NOTHING(cudaStreamWaitEvent)
// Never called here, but TVM's runtime names them
DOES_NOTHING(cudaEventCreate)
DOES_NOTHING(cudaEventDestroy)
DOES_NOTHING(cudaEventElapsedTime)
DOES_NOTHING(cudaEventRecord)
DOES_NOTHING(cudaEventSynchronize)
DOES_NOTHING(cudaFreeHost)
DOES_NOTHING(cudaGetDeviceProperties)
DOES_NOTHING(cudaMallocHost)
DOES_NOTHING(cudaMemGetInfo)
DOES_NOTHING(cudaMemcpyPeerAsync)
}
