/* A CUDA runtime without a card, for tests of code that uses one.

   Loaded before the real libraries (LD_PRELOAD), it answers for libcudart, libcuda, cuBLAS and NCCL. Device memory is main memory
   and kernels do nothing, but devices, streams, events, stream capture and graphs follow the rules that CUDA documents, so that
   torch's own host code runs on it; what a card would refuse is refused, with a line on standard error. fake_cuda.py computes
   what the kernels leave out, records that too in the graphs, and writes a function that does nothing for every other name.

   FAKE_CUDA_EXCLUSIVE=FOLDER     a card belongs to the first process that opens it (exclusive-process mode): lock files there
   FAKE_CUDA_FULL=capture|graph   memory runs out while a graph is captured, or when a graph is made ready to run */
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

enum { CARDS = 2, HOST = -1, BLAS_FAILED = 14, NCCL_FAILED = 1 };

typedef struct Node { struct Node *next; void *to; const void *from; size_t size; int value; long call; } Node;
typedef struct { Node *first, *last; long length; } Graph;
typedef struct Capture { struct Capture *next; struct Stream *stream; enum cudaStreamCaptureMode mode;
                         pthread_t thread; unsigned long long id; int spoilt; Graph *graph; } Capture;
typedef struct Stream { int card, priority; Capture *capture; } Stream;
typedef struct { int card, recorded; Capture *capture; } Event;
typedef struct Block { struct Block *next; char *start; size_t size; int card; } Block;
typedef struct { int card; cudaStream_t stream; } Blas;
typedef struct { int card, size, rank; } Communicator;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Stream default_streams[CARDS] = {{0}, {1}};
static Capture *captures; /* those that go on */
static Block *blocks;
static int opened[CARDS];
static long refusals, replays, graphs;
static void (*run_call)(long);
static __thread int current;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last_error;
#define LOCK pthread_mutex_lock(&mutex)
#define UNLOCK pthread_mutex_unlock(&mutex)

long fake_cuda_refusals(void) { return refusals; }
long fake_cuda_replays(void) { return replays; }
long fake_cuda_graphs(void) { return graphs; }
static int full(const char *when) { return getenv("FAKE_CUDA_FULL") && !strcmp(getenv("FAKE_CUDA_FULL"), when); }
static cudaError_t error(cudaError_t code) { return last_error = code; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) { cudaError_t code = last_error; return last_error = cudaSuccess, code; }
const char *cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorMemoryAllocation ? "out of memory" : code == cudaErrorDevicesUnavailable ? "device is busy"
    : code == cudaErrorInvalidDevice ? "invalid device ordinal" : code == cudaErrorInvalidResourceHandle ? "wrong card"
    : code >= cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "error";
}
const char *cudaGetErrorName(cudaError_t code) { return cudaGetErrorString(code); }

/* An error that only a fault in the program under test can cause. */
static cudaError_t refuse(cudaError_t code, const char *what) {
  refusals++;
  fprintf(stderr, "made-up card: %s: %s\n", what, cudaGetErrorString(code));
  return error(code);
}

/* ---------------------------------------------------------------------------------------------------------- cards */

static cudaError_t open_card(int card) {
  const char *folder = getenv("FAKE_CUDA_EXCLUSIVE");
  char path[4096];
  if (folder && !opened[card]) {
    snprintf(path, sizeof path, "%s/card%d", folder, card);
    int file = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600); /* held until the process ends */
    if (flock(file, LOCK_EX | LOCK_NB)) return close(file), refuse(cudaErrorDevicesUnavailable, path);
  }
  opened[card] = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) { return *count = CARDS, cudaSuccess; }
cudaError_t cudaGetDevice(int *card) { return *card = current, cudaSuccess; }
cudaError_t cudaSetDevice(int card) {
  if (card < 0 || card >= CARDS) return error(cudaErrorInvalidDevice);
  return current = card, open_card(card);
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int card) {
  *p = (struct cudaDeviceProp){.name = "made-up card", .major = 9, .multiProcessorCount = 132, .warpSize = 32,
    .totalGlobalMem = 80ull << 30, .sharedMemPerBlock = 48 << 10, .sharedMemPerBlockOptin = 227 << 10,
    .sharedMemPerMultiprocessor = 228 << 10, .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .maxThreadsPerBlock = 1024,
    .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535}, .maxThreadsPerMultiProcessor = 2048,
    .maxBlocksPerMultiProcessor = 32, .textureAlignment = 512, .l2CacheSize = 50 << 20, .unifiedAddressing = 1,
    .canMapHostMemory = 1, .cooperativeLaunch = 1, .concurrentKernels = 1, .pciBusID = card + 1, .uuid.bytes = {card + 1}};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int card) {
  static const int known[][2] = {{cudaDevAttrComputeCapabilityMajor, 9}, {cudaDevAttrMaxGridDimX, 2147483647},
    {cudaDevAttrMaxGridDimY, 65535}, {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrWarpSize, 32}, {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
    {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10}, {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10}};
  *value = 0;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) if (known[i][0] == attribute) *value = known[i][1];
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int card) { return snprintf(s, n, "0000:%02x:00.0", card + 1), cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int card, int peer) { return *can = 1, cudaSuccess; }

/* ----------------------------------------------------------------------------------------- what a capture forbids */

static Stream *stream_of(cudaStream_t stream) {
  return (uintptr_t)stream < 16 ? &default_streams[current] : (Stream *)stream; /* small numbers name default streams */
}

/* Calls that may wait for the card, or change it, are forbidden by captures of this thread and, in global mode, of others. */
static cudaError_t unsafe(const char *what) {
  int forbidden = 0;
  LOCK;
  for (Capture *c = captures; c; c = c->next) {
    if (thread_mode == cudaStreamCaptureModeRelaxed || c->mode == cudaStreamCaptureModeRelaxed) continue;
    int both_global = thread_mode == cudaStreamCaptureModeGlobal && c->mode == cudaStreamCaptureModeGlobal;
    if (both_global || pthread_equal(c->thread, pthread_self())) c->spoilt = forbidden = 1;
  }
  UNLOCK;
  return forbidden ? refuse(cudaErrorStreamCaptureUnsupported, what) : open_card(current);
}

/* Put work on a stream: 1 if a graph records it, 0 if it is to be done now, -1 if it is refused. */
static int put(Stream *s, const char *what, int same_card) {
  if (open_card(s->card)) return -1;
  if (same_card && s->card != current) return refuse(cudaErrorInvalidResourceHandle, what), -1;
  if (s->capture && s->capture->spoilt) return error(cudaErrorStreamCaptureInvalidated), -1;
  if (s->capture) return s->capture->graph->length++, 1;
  int escapes = 0; /* a card allows this, but a replay would not repeat it */
  LOCK;
  for (Capture *c = captures; c; c = c->next) escapes |= pthread_equal(c->thread, pthread_self());
  UNLOCK;
  return escapes ? refuse(cudaErrorStreamCaptureImplicit, what), -1 : 0;
}

static cudaError_t record(Stream *s, Node node) {
  Graph *g = s->capture->graph;
  Node *copy = malloc(sizeof *copy);
  *copy = node;
  *(g->last ? &g->last->next : &g->first) = copy;
  g->last = copy;
  return cudaSuccess;
}

/* For fake_cuda.py: 1 if the call of this number is recorded on the stream, 0 if it is to be made now. */
int fake_cuda_record(cudaStream_t stream, long call) {
  return stream_of(stream)->capture ? record(stream_of(stream), (Node){.call = call}), 1 : 0;
}
void fake_cuda_set_run_call(void (*function)(long)) { run_call = function; }

/* --------------------------------------------------------------------------------------------------------- memory */

static Block *block_of(const void *address) {
  LOCK;
  Block *b = blocks;
  while (b && !((char *)address >= b->start && (char *)address < b->start + b->size)) b = b->next;
  UNLOCK;
  return b;
}
static cudaError_t take(void **address, size_t size, int card, const char *what) {
  if (unsafe(what)) return last_error;
  char *start = calloc(1, size + 512); /* not touched: a large block costs nothing until it is used */
  if (!start || (card != HOST && captures && full("capture"))) return free(start), error(cudaErrorMemoryAllocation);
  *address = (void *)(((uintptr_t)start + 511) & ~(uintptr_t)511);
  Block *b = malloc(sizeof *b);
  LOCK;
  *b = (Block){blocks, start, size + 512, card};
  blocks = b;
  UNLOCK;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void **address, size_t size) { return take(address, size, current, "cudaMalloc"); }
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) { return take(address, size, HOST, "cudaHostAlloc"); }
cudaError_t cudaFree(void *address) {
  if (unsafe("cudaFree")) return last_error;
  Block *b = block_of(address), **link = &blocks;
  if (!b) return cudaSuccess;
  LOCK;
  while (*link != b) link = &(*link)->next;
  *link = b->next;
  UNLOCK;
  return free(b->start), free(b), cudaSuccess;
}
cudaError_t cudaFreeHost(void *address) { return cudaFree(address); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { return *free = *total = 80ull << 30, open_card(current); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
  Block *b = block_of(address);
  *a = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = -2};
  if (b) *a = (struct cudaPointerAttributes){b->card == HOST ? cudaMemoryTypeHost : cudaMemoryTypeDevice,
                                             b->card == HOST ? 0 : b->card, (void *)address, (void *)address};
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  Stream *s = stream_of(stream);
  int recorded = put(s, "cudaMemcpyAsync", 0);
  if (recorded < 0) return last_error;
  if (!recorded) return memmove(to, from, size), cudaSuccess;
  if (!block_of(to) || !block_of(from)) return refuse(cudaErrorStreamCaptureUnsupported, "copy of pageable memory");
  return record(s, (Node){.to = to, .from = from, .size = size});
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return unsafe("cudaMemcpy") ? last_error : (memmove(to, from, size), cudaSuccess);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  int recorded = put(stream_of(stream), "cudaMemsetAsync", 0);
  if (recorded > 0) return record(stream_of(stream), (Node){.to = to, .size = size, .value = value});
  return recorded < 0 ? last_error : (memset(to, value, size), cudaSuccess);
}

/* ---------------------------------------------------------------------------------------------- streams and events */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  Stream *s = calloc(1, sizeof *s);
  *s = (Stream){current, priority};
  return *stream = (cudaStream_t)s, open_card(current);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { return *p = stream_of(s)->priority, cudaSuccess; }
static cudaError_t spoil(Capture *c, cudaError_t code, const char *what) { return c->spoilt = 1, refuse(code, what); }
static cudaError_t wait_for(Capture *c, const char *what) {
  return c ? spoil(c, cudaErrorStreamCaptureUnsupported, what) : unsafe(what);
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for(stream_of(s)->capture, "cudaStreamSynchronize"); }
cudaError_t cudaStreamQuery(cudaStream_t s) { return wait_for(stream_of(s)->capture, "cudaStreamQuery"); }
cudaError_t cudaDeviceSynchronize(void) { /* forbidden by a capture of any mode and thread on this card */
  LOCK;
  Capture *c = captures;
  while (c && c->stream->card != current) c = c->next;
  UNLOCK;
  return wait_for(c, "cudaDeviceSynchronize");
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  Event *e = calloc(1, sizeof *e);
  e->card = current;
  return *event = (cudaEvent_t)e, open_card(current);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  Event *e = (Event *)event;
  if (e->card != stream_of(stream)->card) return refuse(cudaErrorInvalidResourceHandle, "cudaEventRecord");
  *e = (Event){e->card, 1, stream_of(stream)->capture};
  return open_card(e->card);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) { return cudaEventRecordWithFlags(event, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return wait_for(((Event *)event)->capture, "cudaEventQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for(((Event *)event)->capture, "cudaEventSynchronize"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Capture *own = stream_of(stream)->capture, *other = ((Event *)event)->capture;
  if (!((Event *)event)->recorded || own == other) return cudaSuccess;
  if (own) return spoil(own, cudaErrorStreamCaptureIsolation, "a capturing stream waits for work outside");
  LOCK;
  Capture *c = captures;
  while (c && c != other) c = c->next;
  UNLOCK; /* a card lets other streams join a capture; the suite has no use for that */
  return c ? spoil(c, cudaErrorStreamCaptureImplicit, "another stream waits for a capturing one") : cudaSuccess;
}

/* ---------------------------------------------------------------------------------------------- capture and graphs */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  return thread_mode = *mode, *mode = before, cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  static unsigned long long ids;
  Stream *s = stream_of(stream);
  if (s == &default_streams[s->card] || s->capture) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture");
  s->capture = calloc(1, sizeof(Capture));
  LOCK;
  *s->capture = (Capture){captures, s, mode, pthread_self(), ++ids, 0, calloc(1, sizeof(Graph))};
  captures = s->capture;
  UNLOCK;
  return open_card(s->card);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  Stream *s = stream_of(stream);
  Capture *c = s->capture, **link = &captures;
  *graph = 0;
  if (!c) return error(cudaErrorInvalidValue);
  LOCK;
  while (*link != c) link = &(*link)->next;
  *link = c->next;
  UNLOCK;
  s->capture = 0;
  if (c->spoilt) return error(cudaErrorStreamCaptureInvalidated);
  if (!pthread_equal(c->thread, pthread_self())) return refuse(cudaErrorStreamCaptureWrongThread, "cudaStreamEndCapture");
  return *graph = (cudaGraph_t)c->graph, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  Capture *c = stream_of(stream)->capture;
  *status = !c ? cudaStreamCaptureStatusNone : c->spoilt ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n) {
  Capture *c = stream_of(stream)->capture;
  if (c && id) *id = c->id;
  if (c && graph) *graph = (cudaGraph_t)c->graph;
  if (n) *n = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) { return *n = ((Graph *)g)->length, cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
  if (full("graph")) return error(cudaErrorMemoryAllocation);
  return *ready = (cudaGraphExec_t)graph, graphs++, unsafe("cudaGraphInstantiate");
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream) {
  if (put(stream_of(stream), "cudaGraphLaunch", 1)) return last_error;
  replays++;
  for (Node *n = ((Graph *)ready)->first; n; n = n->next)
    if (n->call) run_call(n->call);
    else if (n->from) memmove(n->to, n->from, n->size);
    else memset(n->to, n->value, n->size);
  return cudaSuccess;
}

/* ------------------------------------------------------------------------------------- kernels, driver and cuBLAS */

void **__cudaRegisterFatBinary(void *binary) { static void *handle[2]; return handle; }
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed[16];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed[depth].grid = grid, pushed[depth].block = block, pushed[depth].shared = shared, pushed[depth].stream = stream;
  return depth++, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  depth--;
  *grid = pushed[depth].grid, *block = pushed[depth].block, *shared = pushed[depth].shared;
  return *(cudaStream_t *)stream = pushed[depth].stream, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t stream) {
  if (!g.x || !g.y || !g.z || !b.x || (size_t)b.x * b.y * b.z > 1024 || g.y > 65535 || g.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "size of a launch");
  return put(stream_of(stream), "a kernel", 1) < 0 ? last_error : cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *function, void **arguments) {
  return cudaLaunchKernel(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, g, b, arguments, shared, stream);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  *a = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90,
                                   .maxDynamicSharedSizeBytes = 48 << 10};
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t s, unsigned x) {
  return *n = block > 0 && block <= 1024 ? 2048 / block : 1, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
int cuCtxGetCurrent(void **context) { return *context = (void *)8, 0; }
int cuDevicePrimaryCtxGetState(int card, unsigned *flags, int *active) { return *flags = 0, *active = opened[card], 0; }
int cublasCreate_v2(Blas **handle) {
  if (unsafe("cublasCreate")) return BLAS_FAILED;
  *handle = calloc(1, sizeof(Blas));
  return (*handle)->card = current, 0;
}
int cublasSetStream_v2(Blas *handle, cudaStream_t stream) { return handle->stream = stream, 0; }
int fake_cublas(Blas *handle, const char *what) { /* every product of cuBLAS, by a function that fake_cuda.py writes */
  if (handle->card != current) return refuse(cudaErrorInvalidResourceHandle, what), BLAS_FAILED;
  return put(stream_of(handle->stream), what, 1) < 0 ? BLAS_FAILED : 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) { return memset(results, 0, 96), *found = 1, 0; }

/* ------------------------------------------------- NCCL: nothing is exchanged, but memory must lie on the own card */

typedef struct { char bytes[128]; } Id;
int ncclGetVersion(int *version) { return *version = 22800, 0; }
int ncclGetUniqueId(Id *id) { return memset(id, 3, sizeof *id), 0; }
int ncclCommInitRankConfig(Communicator **c, int size, Id id, int rank, void *config) {
  *c = malloc(sizeof **c);
  return **c = (Communicator){current, size, rank}, open_card(current);
}
int ncclCommGetAsyncError(Communicator *c, int *code) { return *code = 0; }
int ncclCommCount(Communicator *c, int *size) { return *size = c->size, 0; }
int ncclCommUserRank(Communicator *c, int *rank) { return *rank = c->rank, 0; }
const char *ncclGetErrorString(int code) { return "the made-up NCCL refuses"; }
const char *ncclGetLastError(Communicator *c) { return ""; }
static int give(const void *from, void *to, size_t count, int type, int times, Communicator *c, cudaStream_t stream) {
  static const int width[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* of ncclDataType_t, in bytes */
  size_t size = count * width[type];
  Block *a = block_of(from), *b = block_of(to);
  if (size && (!a || !b || a->card != c->card || b->card != c->card))
    return refuse(cudaErrorInvalidValue, "NCCL gets memory that is not on its card"), NCCL_FAILED;
  if (put(stream_of(stream), "NCCL", 1) < 0) return NCCL_FAILED;
  for (int i = 0; i < times; i++) memmove((char *)to + i * size, from, size);
  return 0;
}
int ncclAllReduce(const void *a, void *b, size_t n, int type, int operation, Communicator *c, cudaStream_t s) {
  return give(a, b, n, type, 1, c, s);
}
int ncclBroadcast(const void *a, void *b, size_t n, int type, int root, Communicator *c, cudaStream_t s) {
  return give(a ? a : b, b, n, type, 1, c, s);
}
int ncclBcast(void *b, size_t n, int type, int root, Communicator *c, cudaStream_t s) { return give(b, b, n, type, 1, c, s); }
int ncclAllGather(const void *a, void *b, size_t n, int type, Communicator *c, cudaStream_t s) {
  return give(a, b, n, type, c->size, c, s);
}
