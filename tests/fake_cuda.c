/* A CUDA runtime without a card, for tests of code that uses one.

   Loaded before the real libraries (LD_PRELOAD), it answers for libcudart, libcuda, cuBLAS and NCCL. Device memory is main
   memory and kernels do nothing, but devices, streams, events, stream capture and graphs follow the rules that CUDA documents,
   so that torch's own host code runs on it; what a card would refuse is refused, with a line on standard error. fake_cuda.py
   computes what the kernels leave out, and records that too in the graphs.

   FAKE_CUDA_EXCLUSIVE=FOLDER   a card belongs to the first process that opens it (exclusive-process mode), by a lock file there
   FAKE_CUDA_FULL=capture|graph memory runs out while a graph is captured, or when it is made ready to run */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

enum { CARDS = 2, KERNELS = 1 << 18, HOST = -1, BLAS_FAILED = 14 };
static const size_t CAPACITY = 80ull << 30;

typedef struct Node { struct Node *next; void *to; const void *from; size_t size; int value; long call; } Node;
typedef struct { Node *first, *last; long length; } Graph;
typedef struct Capture {
  struct Capture *next;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  struct Stream *origin;
  unsigned long long id;
  int spoilt, over;
  Graph *graph;
} Capture;
typedef struct Stream { int card, priority; Capture *capture; long done, joined; struct Stream *next; } Stream;
typedef struct { int card; Stream *stream; Capture *capture; long done; } Event;
typedef struct Block { struct Block *next; char *start; size_t size; int card; } Block;
typedef struct { const void *function; const char *name; int has_run; } Kernel;
typedef struct { int card; cudaStream_t stream; } Blas;
typedef struct { int card, size, rank; } Communicator;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Stream default_streams[CARDS] = {{0}, {1}};
static Capture *captures; /* those that go on */
static Block *blocks;
static Kernel kernels[KERNELS];
static int opened[CARDS];
static size_t used[CARDS];
static long refusals, replays;
static void (*run_call)(long);
static __thread int current;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last_error;

static cudaError_t error(cudaError_t code) { return last_error = code; }

/* An error that only a fault in the program under test can cause. */
static cudaError_t refuse(cudaError_t code, const char *what) {
  refusals++;
  fprintf(stderr, "made-up card: %s: %s\n", what, cudaGetErrorName(code));
  return error(code);
}

long fake_cuda_refusals(void) { return refusals; }
long fake_cuda_replays(void) { return replays; }
int fake_cuda_opened(int card) { return opened[card]; }

/* ---------------------------------------------------------------------------------------------------- devices */

static cudaError_t open_card(int card) {
  const char *folder = getenv("FAKE_CUDA_EXCLUSIVE");
  if (folder && !opened[card]) {
    char path[4096];
    snprintf(path, sizeof path, "%s/card%d", folder, card);
    int file = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600); /* held until the process ends */
    if (flock(file, LOCK_EX | LOCK_NB)) {
      close(file);
      snprintf(path, sizeof path, "card %d is opened while another process holds it", card);
      return refuse(cudaErrorDevicesUnavailable, path);
    }
  }
  opened[card] = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = CARDS, cudaSuccess; }
cudaError_t cudaGetDevice(int *card) { return *card = current, cudaSuccess; }
cudaError_t cudaSetDevice(int card) {
  if (card < 0 || card >= CARDS) return error(cudaErrorInvalidDevice);
  current = card;
  return open_card(card);
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int card) {
  *p = (struct cudaDeviceProp){.major = 9, .multiProcessorCount = 132, .warpSize = 32, .totalGlobalMem = CAPACITY,
    .sharedMemPerBlock = 48 << 10, .sharedMemPerBlockOptin = 227 << 10, .sharedMemPerMultiprocessor = 228 << 10,
    .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
    .maxGridSize = {2147483647, 65535, 65535}, .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32,
    .textureAlignment = 512, .l2CacheSize = 50 << 20, .unifiedAddressing = 1, .canMapHostMemory = 1, .cooperativeLaunch = 1,
    .concurrentKernels = 1, .pciBusID = card + 1, .totalConstMem = 65536};
  p->uuid.bytes[0] = card + 1;
  snprintf(p->name, sizeof p->name, "made-up card %d", card);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int card) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *name, int size, int card) {
  snprintf(name, size, "0000:%02x:00.0", card + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int card, int peer) { return *can = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetLastError(void) {
  cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorDevicesUnavailable: return "CUDA-capable device(s) is/are busy or unavailable";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capture was not joined to the original stream";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread: return "capture ended by another thread than began it";
    default: return "error";
  }
}
const char *cudaGetErrorString(cudaError_t code) { return cudaGetErrorName(code); }

/* ----------------------------------------------------------------------------------- what a capture forbids */

static Stream *stream_of(cudaStream_t stream) {
  return (uintptr_t)stream < 16 ? &default_streams[current] : (Stream *)stream; /* small numbers name default streams */
}

/* Calls that might wait for the card, or change it, are forbidden by a capture in strict modes of capture and of thread. */
static cudaError_t unsafe(const char *what) {
  int forbidden = 0;
  pthread_mutex_lock(&mutex);
  for (Capture *c = captures; c; c = c->next) {
    int own = pthread_equal(c->thread, pthread_self());
    if (thread_mode == cudaStreamCaptureModeRelaxed || c->mode == cudaStreamCaptureModeRelaxed) continue;
    if (own || (thread_mode == cudaStreamCaptureModeGlobal && c->mode == cudaStreamCaptureModeGlobal))
      c->spoilt = forbidden = 1;
  }
  pthread_mutex_unlock(&mutex);
  return forbidden ? refuse(cudaErrorStreamCaptureUnsupported, what) : open_card(current);
}

/* Put work on a stream: 1 if a graph records it, 0 if it is to be done now, -1 if it is refused. */
static int put(Stream *s, const char *what, int same_card) {
  if (open_card(s->card)) return -1;
  if (same_card && s->card != current) return refuse(cudaErrorInvalidResourceHandle, what), -1;
  if (s->capture && s->capture->spoilt) return error(cudaErrorStreamCaptureInvalidated), -1;
  if (s->capture) return s->done++, 1;
  pthread_mutex_lock(&mutex);
  int escapes = 0; /* a card allows this, but a replay would not repeat it */
  for (Capture *c = captures; c; c = c->next) escapes |= pthread_equal(c->thread, pthread_self());
  pthread_mutex_unlock(&mutex);
  return escapes ? refuse(cudaErrorStreamCaptureImplicit, what), -1 : 0;
}

static void record(Stream *s, Node node) {
  Node *copy = malloc(sizeof *copy);
  *copy = node;
  Graph *g = s->capture->graph;
  pthread_mutex_lock(&mutex);
  *(g->last ? &g->last->next : &g->first) = copy;
  g->last = copy;
  pthread_mutex_unlock(&mutex);
}

/* For fake_cuda.py: 1 if the call with this number is recorded on the stream, 0 if it is to be made now. */
int fake_cuda_record(cudaStream_t stream, long call) {
  Stream *s = stream_of(stream);
  if (s->capture) record(s, (Node){.call = call});
  return s->capture != 0;
}
void fake_cuda_set_run_call(void (*function)(long)) { run_call = function; }

/* ----------------------------------------------------------------------------------------------------- memory */

static Block *block_of(const void *address) {
  pthread_mutex_lock(&mutex);
  Block *b = blocks;
  while (b && !((char *)address >= b->start && (char *)address < b->start + b->size)) b = b->next;
  pthread_mutex_unlock(&mutex);
  return b;
}

static cudaError_t take(void **address, size_t size, int card) {
  const char *full = getenv("FAKE_CUDA_FULL");
  if (card != HOST && (used[card] + size > CAPACITY || (full && !strcmp(full, "capture") && captures)))
    return error(cudaErrorMemoryAllocation);
  Block *b = malloc(sizeof *b);
  char *start = calloc(1, size + 512); /* not touched: large blocks cost nothing until they are used */
  *b = (Block){.start = start, .size = size + 512, .card = card};
  *address = (void *)(((uintptr_t)start + 511) & ~(uintptr_t)511);
  pthread_mutex_lock(&mutex);
  b->next = blocks;
  blocks = b;
  if (card != HOST) used[card] += size;
  pthread_mutex_unlock(&mutex);
  return cudaSuccess;
}

static cudaError_t drop(void *address) {
  Block *b = block_of(address), **link = &blocks;
  if (!b) return cudaSuccess;
  pthread_mutex_lock(&mutex);
  while (*link != b) link = &(*link)->next;
  *link = b->next;
  if (b->card != HOST) used[b->card] -= b->size - 512;
  pthread_mutex_unlock(&mutex);
  free(b->start);
  free(b);
  return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t size, cudaStream_t stream, const char *what) {
  Stream *s = stream_of(stream);
  int state = put(s, what, 0);
  if (state < 0) return last_error;
  if (!state) return memmove(to, from, size), cudaSuccess;
  if (!block_of(to) || !block_of(from)) return refuse(cudaErrorStreamCaptureUnsupported, "copy of pageable memory");
  return record(s, (Node){.to = to, .from = from, .size = size}), cudaSuccess;
}

cudaError_t cudaMalloc(void **address, size_t size) {
  cudaError_t code = unsafe("cudaMalloc");
  return code ? code : take(address, size, current);
}
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
  cudaError_t code = unsafe("cudaHostAlloc");
  return code ? code : take(address, size, HOST);
}
cudaError_t cudaFree(void *address) {
  cudaError_t code = unsafe("cudaFree");
  return code ? code : drop(address);
}
cudaError_t cudaFreeHost(void *address) { return cudaFree(address); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *total = CAPACITY;
  *free = CAPACITY - used[current];
  return open_card(current);
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
  Block *b = block_of(address);
  *a = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = -2};
  if (b) *a = (struct cudaPointerAttributes){b->card == HOST ? cudaMemoryTypeHost : cudaMemoryTypeDevice,
                                             b->card == HOST ? 0 : b->card, (void *)address, (void *)address};
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, size, stream, "cudaMemcpyAsync");
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream, "cudaMemcpyPeerAsync");
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  cudaError_t code = unsafe("cudaMemcpy");
  return code ? code : (memmove(to, from, size), cudaSuccess);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  Stream *s = stream_of(stream);
  int state = put(s, "cudaMemsetAsync", 0);
  if (state > 0) record(s, (Node){.to = to, .size = size, .value = value});
  if (state == 0) memset(to, value, size);
  return state < 0 ? last_error : cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) {
  cudaError_t code = unsafe("cudaMemset");
  return code ? code : (memset(to, value, size), cudaSuccess);
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  static char room[1 << 20];
  return *address = room, cudaSuccess;
}

/* ------------------------------------------------------------------------------------------ streams and events */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  Stream *s = calloc(1, sizeof *s);
  *s = (Stream){.card = current, .priority = priority};
  *stream = (cudaStream_t)s;
  return open_card(current);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { return *p = stream_of(s)->priority, cudaSuccess; }

static cudaError_t wait_for(Stream *s, const char *what) {
  if (!s->capture) return unsafe(what);
  s->capture->spoilt = 1;
  return refuse(cudaErrorStreamCaptureUnsupported, what);
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for(stream_of(s), "cudaStreamSynchronize"); }
cudaError_t cudaStreamQuery(cudaStream_t s) { return wait_for(stream_of(s), "cudaStreamQuery"); }
cudaError_t cudaDeviceSynchronize(void) {
  int forbidden = 0;
  pthread_mutex_lock(&mutex);
  for (Capture *c = captures; c; c = c->next)
    if (c->origin->card == current) c->spoilt = forbidden = 1; /* in every mode */
  pthread_mutex_unlock(&mutex);
  return forbidden ? refuse(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize") : open_card(current);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  Event *e = calloc(1, sizeof *e);
  e->card = current;
  *event = (cudaEvent_t)e;
  return open_card(current);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  Stream *s = stream_of(stream);
  Event *e = (Event *)event;
  if (e->card != s->card) return refuse(cudaErrorInvalidResourceHandle, "an event of another card is recorded");
  *e = (Event){.card = e->card, .stream = s, .capture = s->capture, .done = s->done};
  return open_card(s->card);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) { return cudaEventRecordWithFlags(event, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
  Event *e = (Event *)event;
  if (!e->capture) return unsafe("cudaEventQuery");
  e->capture->spoilt = 1;
  return refuse(cudaErrorCapturedEvent, "cudaEventQuery");
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) { return *ms = 1, cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Stream *s = stream_of(stream);
  Event *e = (Event *)event;
  if (!e->stream) return cudaSuccess; /* never recorded */
  if (s->capture && e->capture != s->capture) {
    s->capture->spoilt = 1;
    return refuse(cudaErrorStreamCaptureIsolation, "a capturing stream waits for work outside");
  }
  if (s->capture) {
    if (e->stream != s) e->stream->joined = e->done;
  } else if (e->capture && !e->capture->over) { /* the stream joins the capture of the event */
    if (s == &default_streams[s->card]) {
      e->capture->spoilt = 1;
      return refuse(cudaErrorStreamCaptureImplicit, "the default stream waits for a capturing one");
    }
    Stream *origin = e->capture->origin;
    *s = (Stream){.card = s->card, .priority = s->priority, .capture = e->capture, .next = origin->next};
    origin->next = s;
  }
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
  int state = put(stream_of(stream), "cudaLaunchHostFunc", 1);
  if (!state) function(argument);
  return state < 0 ? last_error : cudaSuccess;
}

/* ------------------------------------------------------------------------------------------ capture and graphs */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  static unsigned long long ids;
  Stream *s = stream_of(stream);
  if (s == &default_streams[s->card] || s->capture)
    return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture");
  Capture *c = calloc(1, sizeof *c);
  *c = (Capture){.mode = mode, .thread = pthread_self(), .origin = s, .graph = calloc(1, sizeof(Graph))};
  pthread_mutex_lock(&mutex);
  c->id = ++ids;
  c->next = captures;
  captures = c;
  s->capture = c;
  s->next = 0;
  s->done = s->joined = 0;
  pthread_mutex_unlock(&mutex);
  return open_card(s->card);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  Stream *s = stream_of(stream);
  Capture *c = s->capture, **link = &captures;
  cudaError_t code = cudaSuccess;
  *graph = 0;
  if (!c) return error(cudaErrorInvalidValue);
  pthread_mutex_lock(&mutex);
  while (*link != c) link = &(*link)->next;
  *link = c->next;
  c->over = 1;
  for (Stream *x = s; x; x = x->next) {
    if (x != s && x->done > x->joined) code = cudaErrorStreamCaptureUnjoined;
    c->graph->length += x->done;
    x->capture = 0;
  }
  pthread_mutex_unlock(&mutex);
  if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self()))
    code = cudaErrorStreamCaptureWrongThread;
  if (c->spoilt) return error(cudaErrorStreamCaptureInvalidated);
  if (code) return refuse(code, "cudaStreamEndCapture");
  *graph = (cudaGraph_t)c->graph;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  Capture *c = stream_of(stream)->capture;
  *status = !c ? cudaStreamCaptureStatusNone : c->spoilt ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  Capture *c = stream_of(stream)->capture;
  if (c && id) *id = c->id;
  if (c && graph) *graph = (cudaGraph_t)c->graph;
  if (dependencies) *dependencies = 0;
  if (edges) *edges = 0;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = ((Graph *)graph)->length;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
  const char *full = getenv("FAKE_CUDA_FULL");
  cudaError_t code = unsafe("cudaGraphInstantiate");
  *ready = (cudaGraphExec_t)graph;
  return full && !strcmp(full, "graph") ? error(cudaErrorMemoryAllocation) : code;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(ready, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream) {
  if (put(stream_of(stream), "cudaGraphLaunch", 1)) return last_error;
  replays++;
  for (Node *n = ((Graph *)ready)->first; n; n = n->next) {
    if (n->call) run_call(n->call);
    else if (n->from) memmove(n->to, n->from, n->size);
    else memset(n->to, n->value, n->size);
  }
  return cudaSuccess;
}

/* ---------------------------------------------------------------------------------------------------- kernels */

static Kernel *kernel_of(const void *function) {
  size_t place = (uint32_t)((uintptr_t)function * 2654435769u) >> 14; /* Fibonacci hashing to 18 bits */
  while (kernels[place].function && kernels[place].function != function) place = (place + 1) % KERNELS;
  return &kernels[place];
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[2];
  return handle;
}
void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid_size, int *warp) {
  *kernel_of(function) = (Kernel){function, name, 0};
}
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed[16];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed[depth].grid = grid;
  pushed[depth].block = block;
  pushed[depth].shared = shared;
  pushed[depth++].stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed[--depth].grid;
  *block = pushed[depth].block;
  *shared = pushed[depth].shared;
  *(cudaStream_t *)stream = pushed[depth].stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t stream) {
  Kernel *kernel = kernel_of(function);
  const char *name = kernel->name ? kernel->name : "a kernel";
  if (!g.x || !g.y || !g.z || !b.x || (size_t)b.x * b.y * b.z > 1024 || g.y > 65535 || g.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, name);
  int state = put(stream_of(stream), name, 1);
  if (state < 0) return last_error;
  if (state > 0 && kernel->name && !kernel->has_run) /* loading it would be forbidden */
    return refuse(cudaErrorStreamCaptureUnsupported, "a kernel that never ran before is captured");
  kernel->has_run = 1;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel((const void *)kernel, g, b, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *function, void **arguments) {
  return cudaLaunchKernel(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  *a = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90,
                                   .maxDynamicSharedSizeBytes = 48 << 10};
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t s, unsigned x) {
  return *n = block > 0 && block <= 1024 ? 2048 / block : 1, cudaSuccess;
}

/* --------------------------------------------------------------------------------------------- driver and cuBLAS */

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
int cuCtxGetCurrent(void **context) { return *context = (void *)8, 0; }
int cuDeviceGet(int *card, int number) { return *card = number, 0; }
int cuDevicePrimaryCtxGetState(int card, unsigned *flags, int *active) { return *flags = 0, *active = opened[card], 0; }
int cuGetErrorString(int code, const char **text) { return *text = "error of the made-up driver", 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long address) { return 1; }

int cublasCreate_v2(Blas **handle) {
  if (unsafe("cublasCreate")) return BLAS_FAILED;
  *handle = calloc(1, sizeof(Blas));
  (*handle)->card = current;
  return 0;
}
int cublasSetStream_v2(Blas *handle, cudaStream_t stream) { return handle->stream = stream, 0; }
int cublasGetMathMode(Blas *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(Blas *handle, int *mode) { return *mode = 0; }
int cublasDestroy_v2(Blas *handle) { return 0; }
int cublasSetPointerMode_v2(Blas *handle, int mode) { return 0; }
int cublasSetMathMode(Blas *handle, int mode) { return 0; }
int cublasSetWorkspace_v2(Blas *handle, void *room, size_t size) { return 0; }
int cublasSetSmCountTarget(Blas *handle, int count) { return 0; }
/* What every other function of cuBLAS does; fake_cuda.py writes them. */
int fake_cublas(Blas *handle, const char *what) {
  if (handle->card != current) return refuse(cudaErrorInvalidResourceHandle, what), BLAS_FAILED;
  return put(stream_of(handle->stream), what, 1) < 0 ? BLAS_FAILED : 0;
}
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmul(void *handle, void *operation, void *alpha, void *a, void *a_layout, void *b, void *b_layout, void *beta,
                   void *c, void *c_layout, void *d, void *d_layout, void *algorithm, void *room, size_t size,
                   cudaStream_t stream) {
  return put(stream_of(stream), "cublasLtMatmul", 1) < 0 ? BLAS_FAILED : 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  memset(results, 0, 96);
  return *found = 1, 0;
}
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { return *d = calloc(1, 512), 0; }
int cublasLtMatmulPreferenceCreate(void **preference) { return *preference = calloc(1, 512), 0; }
int cublasLtMatrixLayoutCreate(void **l, int t, uint64_t r, uint64_t c, int64_t ld) { return *l = calloc(1, 512), 0; }

/* -------------------------------------------------------- NCCL: nothing is exchanged, but the memory must be the card's */

typedef struct { char bytes[128]; } Id;
int ncclGetVersion(int *version) { return *version = 22800, 0; }
int ncclGetUniqueId(Id *id) { return memset(id, 3, sizeof *id), 0; }
int ncclCommInitRank(Communicator **c, int size, Id id, int rank) {
  *c = malloc(sizeof **c);
  **c = (Communicator){current, size, rank};
  return open_card(current);
}
int ncclCommInitRankConfig(Communicator **c, int n, Id id, int r, void *config) { return ncclCommInitRank(c, n, id, r); }
int ncclCommGetAsyncError(Communicator *c, int *code) { return *code = 0; }
int ncclCommCount(Communicator *c, int *size) { return *size = c->size, 0; }
int ncclCommUserRank(Communicator *c, int *rank) { return *rank = c->rank, 0; }
const char *ncclGetErrorString(int code) { return "the made-up NCCL refused"; }
const char *ncclGetLastError(Communicator *c) { return ""; }

static size_t bytes(size_t count, int type) {
  static const int width[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* of ncclDataType_t */
  return count * width[type];
}
static int pass_on(const void *from, void *to, size_t size, int times, Communicator *c, cudaStream_t stream) {
  Block *a = block_of(from), *b = block_of(to);
  if (size && (!a || !b || a->card != c->card || b->card != c->card))
    return refuse(cudaErrorInvalidValue, "NCCL gets memory that is not on the card of its communicator"), 4;
  if (put(stream_of(stream), "NCCL", 1) < 0) return 1;
  for (int i = 0; i < times; i++)
    if (from != (char *)to + i * size) memmove((char *)to + i * size, from, size);
  return 0;
}
int ncclAllReduce(const void *a, void *b, size_t n, int type, int operation, Communicator *c, cudaStream_t s) {
  return pass_on(a, b, bytes(n, type), 1, c, s);
}
int ncclBroadcast(const void *a, void *b, size_t n, int type, int root, Communicator *c, cudaStream_t s) {
  return pass_on(a ? a : b, b, bytes(n, type), 1, c, s);
}
int ncclBcast(void *b, size_t n, int type, int root, Communicator *c, cudaStream_t s) {
  return pass_on(b, b, bytes(n, type), 1, c, s);
}
int ncclAllGather(const void *a, void *b, size_t n, int type, Communicator *c, cudaStream_t s) {
  return pass_on(a, b, bytes(n, type), c->size, c, s);
}
