/* The boundary between the library and a TensorRT module: a table of C functions. */
#pragma once

#include <stdint.h>

#include <cstddef>

/* Increase it when the table changes. */
#define DYNEXPORT_TENSORRT_TABLE 1
#define DYNEXPORT_TENSORRT_SYMBOL "dynexport_tensorrt"

extern "C" {

/* The first error of a call, cut to fit; empty if TensorRT gave no reason. */
typedef struct {
  char text[512];
} DynexportReason;

/* TensorRT's opened library; its parts are a runtime and a logger. One thread at a time uses it and what it made. */
typedef struct DynexportRuntime DynexportRuntime;
typedef struct DynexportEngine DynexportEngine;
typedef struct DynexportContext DynexportContext;

/* Functions that can fail return null or 0 and say why. */
typedef struct {
  int32_t table;
  /* The version of the headers that the module was compiled against; the library's has to have the same. */
  int32_t major, minor;
  /* Name of TensorRT's library, looked for if ``library`` is empty. */
  const char* usual_name;

  /* Returns null for a library that cannot be opened; its version is 0 then. Returns null with a version and no reason
     for a library of another version: nothing else of it was called. */
  DynexportRuntime* (*open)(const char* library, int32_t version[4], DynexportReason* why);
  void (*close)(DynexportRuntime* runtime);
  int (*load_plugins)(DynexportRuntime* runtime, const char* path, DynexportReason* why);

  DynexportEngine* (*deserialize)(DynexportRuntime* runtime, const void* content, size_t bytes, DynexportReason* why);
  void (*free_engine)(DynexportEngine* engine);
  /* Bytes of device memory that a context needs for intermediate results. */
  int64_t (*scratch_bytes)(const DynexportEngine* engine);

  /* Memory for intermediate results stays the caller's; several contexts may share it if they never run at once. */
  DynexportContext* (*make_context)(DynexportEngine* engine, int32_t profile, void* stream, void* scratch,
                                    int64_t scratch_bytes, DynexportReason* why);
  void (*free_context)(DynexportContext* context);
  int (*set_shape)(DynexportContext* context, const char* input, const int64_t* sizes, int32_t rank,
                   DynexportReason* why);
  int (*set_address)(DynexportContext* context, const char* tensor, void* address, DynexportReason* why);
  int (*enqueue)(DynexportContext* context, void* stream, DynexportReason* why);
} DynexportTensorRt;

typedef const DynexportTensorRt* (*DynexportTensorRtTable)(void);
}
