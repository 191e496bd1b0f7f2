// The classes of TensorRT 10.14 that its libraries implement, with every function that the stand-in does not have.
// Made from NvInferImpl.h: a table of functions has to be complete, or calls would land in others.
#pragma once

#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>

namespace standin {

using namespace nvinfer1;  // NOLINT(google-build-using-namespace): the signatures are copies of TensorRT's

[[noreturn]] inline void unused(const char* function) {
  std::fprintf(stderr, "the stand-in for TensorRT has no %s\n", function);
  std::abort();
}

class EmptyRuntime : public apiv::VRuntime {
 public:
  nvinfer1::ICudaEngine* deserializeCudaEngine(IStreamReader&) noexcept override { unused(__func__); }
  void setDLACore(int32_t) noexcept override { unused(__func__); }
  int32_t getDLACore() const noexcept override { unused(__func__); }
  int32_t getNbDLACores() const noexcept override { unused(__func__); }
  void setGpuAllocator(IGpuAllocator*) noexcept override { unused(__func__); }
  void setErrorRecorder(IErrorRecorder*) noexcept override { unused(__func__); }
  IErrorRecorder* getErrorRecorder() const noexcept override { unused(__func__); }
  ILogger* getLogger() const noexcept override { unused(__func__); }
  bool setMaxThreads(int32_t) noexcept override { unused(__func__); }
  int32_t getMaxThreads() const noexcept override { unused(__func__); }
  void setTemporaryDirectory(char const*) noexcept override { unused(__func__); }
  char const* getTemporaryDirectory() const noexcept override { unused(__func__); }
  void setTempfileControlFlags(TempfileControlFlags) noexcept override { unused(__func__); }
  TempfileControlFlags getTempfileControlFlags() const noexcept override { unused(__func__); }
  IPluginRegistry& getPluginRegistry() noexcept override { unused(__func__); }
  void setPluginRegistryParent(IPluginRegistry*) noexcept override { unused(__func__); }
  IRuntime* loadRuntime(char const*) noexcept override { unused(__func__); }
  void setEngineHostCodeAllowed(bool) noexcept override { unused(__func__); }
  bool getEngineHostCodeAllowed() const noexcept override { unused(__func__); }
  nvinfer1::ICudaEngine* deserializeCudaEngineV2(IStreamReaderV2&) noexcept override { unused(__func__); }
};

class EmptyEngine : public apiv::VCudaEngine {
 public:
  int32_t getNbLayers() const noexcept override { unused(__func__); }
  IHostMemory* serialize() const noexcept override { unused(__func__); }
  IExecutionContext* createExecutionContextWithoutDeviceMemory() noexcept override { unused(__func__); }
  size_t getDeviceMemorySize() const noexcept override { unused(__func__); }
  bool isRefittable() const noexcept override { unused(__func__); }
  char const* getName() const noexcept override { unused(__func__); }
  int32_t getNbOptimizationProfiles() const noexcept override { unused(__func__); }
  int32_t const* getProfileTensorValues(char const*, int32_t, OptProfileSelector) const noexcept override {
    unused(__func__);
  }
  EngineCapability getEngineCapability() const noexcept override { unused(__func__); }
  void setErrorRecorder(IErrorRecorder*) noexcept override { unused(__func__); }
  IErrorRecorder* getErrorRecorder() const noexcept override { unused(__func__); }
  bool hasImplicitBatchDimension() const noexcept override { unused(__func__); }
  TacticSources getTacticSources() const noexcept override { unused(__func__); }
  ProfilingVerbosity getProfilingVerbosity() const noexcept override { unused(__func__); }
  IEngineInspector* createEngineInspector() const noexcept override { unused(__func__); }
  Dims getTensorShape(char const*) const noexcept override { unused(__func__); }
  DataType getTensorDataType(char const*) const noexcept override { unused(__func__); }
  TensorLocation getTensorLocation(char const*) const noexcept override { unused(__func__); }
  bool isShapeInferenceIO(char const*) const noexcept override { unused(__func__); }
  TensorIOMode getTensorIOMode(char const*) const noexcept override { unused(__func__); }
  int32_t getTensorBytesPerComponent(char const*) const noexcept override { unused(__func__); }
  int32_t getTensorComponentsPerElement(char const*) const noexcept override { unused(__func__); }
  TensorFormat getTensorFormat(char const*) const noexcept override { unused(__func__); }
  char const* getTensorFormatDesc(char const*) const noexcept override { unused(__func__); }
  int32_t getTensorVectorizedDim(char const*) const noexcept override { unused(__func__); }
  Dims getProfileShape(char const*, int32_t, OptProfileSelector) const noexcept override { unused(__func__); }
  int32_t getNbIOTensors() const noexcept override { unused(__func__); }
  char const* getIOTensorName(int32_t) const noexcept override { unused(__func__); }
  HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept override { unused(__func__); }
  int32_t getNbAuxStreams() const noexcept override { unused(__func__); }
  int32_t getTensorBytesPerComponentV2(char const*, int32_t) const noexcept override { unused(__func__); }
  int32_t getTensorComponentsPerElementV2(char const*, int32_t) const noexcept override { unused(__func__); }
  TensorFormat getTensorFormatV2(char const*, int32_t) const noexcept override { unused(__func__); }
  char const* getTensorFormatDescV2(char const*, int32_t) const noexcept override { unused(__func__); }
  int32_t getTensorVectorizedDimV2(char const*, int32_t) const noexcept override { unused(__func__); }
  ISerializationConfig* createSerializationConfig() noexcept override { unused(__func__); }
  IHostMemory* serializeWithConfig(ISerializationConfig&) const noexcept override { unused(__func__); }
  size_t getDeviceMemorySizeForProfile(int32_t) const noexcept override { unused(__func__); }
  IRefitter* createRefitter(ILogger&) noexcept override { unused(__func__); }
  bool setWeightStreamingBudget(int64_t) noexcept override { unused(__func__); }
  int64_t getWeightStreamingBudget() const noexcept override { unused(__func__); }
  int64_t getMinimumWeightStreamingBudget() const noexcept override { unused(__func__); }
  int64_t getStreamableWeightsSize() const noexcept override { unused(__func__); }
  bool isDebugTensor(char const*) const noexcept override { unused(__func__); }
  bool setWeightStreamingBudgetV2(int64_t) noexcept override { unused(__func__); }
  int64_t getWeightStreamingBudgetV2() const noexcept override { unused(__func__); }
  int64_t getWeightStreamingAutomaticBudget() const noexcept override { unused(__func__); }
  int64_t getWeightStreamingScratchMemorySize() const noexcept override { unused(__func__); }
  int64_t getDeviceMemorySizeForProfileV2(int32_t) const noexcept override { unused(__func__); }
  int64_t const* getProfileTensorValuesV2(char const*, int32_t, OptProfileSelector) const noexcept override {
    unused(__func__);
  }
  IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig*) noexcept override { unused(__func__); }
  IRuntimeConfig* createRuntimeConfig() noexcept override { unused(__func__); }
  int64_t getEngineStat(EngineStat) const noexcept override { unused(__func__); }
};

class EmptyContext : public apiv::VExecutionContext {
 public:
  void setDebugSync(bool) noexcept override { unused(__func__); }
  bool getDebugSync() const noexcept override { unused(__func__); }
  void setProfiler(IProfiler*) noexcept override { unused(__func__); }
  IProfiler* getProfiler() const noexcept override { unused(__func__); }
  ICudaEngine const& getEngine() const noexcept override { unused(__func__); }
  void setName(char const*) noexcept override { unused(__func__); }
  char const* getName() const noexcept override { unused(__func__); }
  void setDeviceMemory(void*) noexcept override { unused(__func__); }
  int32_t getOptimizationProfile() const noexcept override { unused(__func__); }
  bool allInputDimensionsSpecified() const noexcept override { unused(__func__); }
  bool allInputShapesSpecified() const noexcept override { unused(__func__); }
  void setErrorRecorder(IErrorRecorder*) noexcept override { unused(__func__); }
  IErrorRecorder* getErrorRecorder() const noexcept override { unused(__func__); }
  bool executeV2(void* const*) noexcept override { unused(__func__); }
  void setEnqueueEmitsProfile(bool) noexcept override { unused(__func__); }
  bool getEnqueueEmitsProfile() const noexcept override { unused(__func__); }
  bool reportToProfiler() const noexcept override { unused(__func__); }
  Dims getTensorShape(char const*) const noexcept override { unused(__func__); }
  Dims getTensorStrides(char const*) const noexcept override { unused(__func__); }
  void const* getTensorAddress(char const*) const noexcept override { unused(__func__); }
  bool setInputTensorAddress(char const*, void const*) noexcept override { unused(__func__); }
  bool setOutputTensorAddress(char const*, void*) noexcept override { unused(__func__); }
  int32_t inferShapes(int32_t, char const**) noexcept override { unused(__func__); }
  bool setInputConsumedEvent(cudaEvent_t) noexcept override { unused(__func__); }
  cudaEvent_t getInputConsumedEvent() const noexcept override { unused(__func__); }
  void* getOutputTensorAddress(char const*) const noexcept override { unused(__func__); }
  bool setOutputAllocator(char const*, IOutputAllocator*) noexcept override { unused(__func__); }
  IOutputAllocator* getOutputAllocator(char const*) noexcept override { unused(__func__); }
  int64_t getMaxOutputSize(char const*) const noexcept override { unused(__func__); }
  bool setTemporaryStorageAllocator(IGpuAllocator*) noexcept override { unused(__func__); }
  IGpuAllocator* getTemporaryStorageAllocator() const noexcept override { unused(__func__); }
  void setPersistentCacheLimit(size_t) noexcept override { unused(__func__); }
  size_t getPersistentCacheLimit() const noexcept override { unused(__func__); }
  bool setNvtxVerbosity(ProfilingVerbosity) noexcept override { unused(__func__); }
  ProfilingVerbosity getNvtxVerbosity() const noexcept override { unused(__func__); }
  void setAuxStreams(cudaStream_t*, int32_t) noexcept override { unused(__func__); }
  bool setDebugListener(IDebugListener*) noexcept override { unused(__func__); }
  IDebugListener* getDebugListener() noexcept override { unused(__func__); }
  bool setTensorDebugState(char const*, bool) noexcept override { unused(__func__); }
  bool getDebugState(char const*) const noexcept override { unused(__func__); }
  bool setAllTensorsDebugState(bool) noexcept override { unused(__func__); }
  size_t updateDeviceMemorySizeForShapes() noexcept override { unused(__func__); }
  IRuntimeConfig* getRuntimeConfig() const noexcept override { unused(__func__); }
  bool setUnfusedTensorsDebugState(bool) noexcept override { unused(__func__); }
  bool getUnfusedTensorsDebugState() const noexcept override { unused(__func__); }
};

class EmptyRegistry : public IPluginRegistry {
 public:
  bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { unused(__func__); }
  IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { unused(__func__); }
  IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const,
                                   AsciiChar const* const) noexcept override {
    unused(__func__);
  }
  void setErrorRecorder(IErrorRecorder* const) noexcept override { unused(__func__); }
  IErrorRecorder* getErrorRecorder() const noexcept override { unused(__func__); }
  bool deregisterCreator(IPluginCreator const&) noexcept override { unused(__func__); }
  bool isParentSearchEnabled() const override { unused(__func__); }
  void setParentSearchEnabled(bool const) override { unused(__func__); }
  void deregisterLibrary(PluginLibraryHandle) noexcept override { unused(__func__); }
  bool registerCreator(IPluginCreatorInterface&, AsciiChar const* const) noexcept override { unused(__func__); }
  IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { unused(__func__); }
  IPluginCreatorInterface* getCreator(AsciiChar const* const, AsciiChar const* const,
                                      AsciiChar const* const) noexcept override {
    unused(__func__);
  }
  bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { unused(__func__); }
  IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { unused(__func__); }
  int32_t releasePluginResource(AsciiChar const*) noexcept override { unused(__func__); }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override { unused(__func__); }
};

}  // namespace standin
