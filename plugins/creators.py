"""Register the operators' plugins (IPluginV3) in Python, for TensorRT-RTX, or TensorRT without the C++ library."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from onnx_ir import DataType

from dynexport.plugins.driver import Kernels
from dynexport.plugins.kernels import LAUNCHES, dtype_of, read_sizes
from dynexport.plugins.operators import OPERATORS
from dynexport.plugins.schema import DOMAIN, FLOATS, TENSORRT_TYPES, VERSION, Operator, T
from dynexport.runtime.bundle.errors import DynexportError

# The creators by module, kept alive here: the registry holds no reference.
_REGISTERED: dict[str, list[Any]] = {}


def register(trt: Any, kernels: Kernels | None = None) -> None:
    """Register a creator for every operator, so that the parser uses plugins for nodes that name them.

    Building an engine needs ``allow_in_place`` but no kernels. A second call only sets the kernels of plugins created
    from then on.

    Args:
        trt: the module ``tensorrt``, or ``tensorrt_rtx`` as loaded by ``rtx.load``.
        kernels: the kernels to launch when an engine runs; None if engines are only built.

    Raises:
        DynexportError: when the registry refuses a creator.
    """
    made = _REGISTERED.setdefault(trt.__name__, [])
    for creator in made:
        creator.kernels = kernels
    for operator in OPERATORS[len(made) :]:
        creator = _creator(trt, operator, kernels)
        if not trt.get_plugin_registry().register_creator(creator, DOMAIN):
            raise DynexportError(f"{trt.__name__} refused the plugin {DOMAIN}::{operator.name}: is there one already?")
        made.append(creator)


def allow_in_place(trt: Any, config: Any) -> None:
    """Allow plugins to write in their inputs' memory, in a builder configuration; two operators need it to build."""
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def unregister(trt: Any) -> None:
    """Remove all creators from the registry; the parser then uses the operators' bodies."""
    for creator in _REGISTERED.pop(trt.__name__, []):
        trt.get_plugin_registry().deregister_creator(creator)


def _creator(trt: Any, operator: Operator, kernels: Kernels | None) -> Any:
    plugin = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = operator.name, DOMAIN, str(VERSION)
            self.field_names = trt.PluginFieldCollection([])
            self.kernels = kernels

        def create_plugin(self, name: str, fields: Sequence[Any], phase: Any) -> Any:
            if len(fields):
                raise DynexportError(f"{operator.name} {name}: expected no attributes, found {fields[0].name}")
            return plugin(operator, self.kernels)

    return Creator()


def _plugin_class(trt: Any) -> Any:
    """Return the plugin class for a TensorRT module; one class serves all operators."""
    types = {dtype: getattr(trt, name) for dtype, name in TENSORRT_TYPES.items()}
    dtypes: dict[Any, Any] = {native: dtype for dtype, native in types.items()}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, operator: Operator, kernels: Kernels | None) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = operator.name, DOMAIN, str(VERSION)
            self.num_outputs = len(operator.outputs)
            self.operator, self.kernels = operator, kernels

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.operator, self.kernels)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            takes = zip(inputs, self.operator.inputs, strict=True)
            generic = next((native for native, tensor in takes if tensor.dtype == T), None)
            return [generic if tensor.dtype == T else types[tensor.dtype] for tensor in self.operator.outputs]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], build: Any) -> list[Any]:
            for tensor, dims in zip(self.operator.inputs, inputs, strict=True):
                if len(dims) != len(tensor.dims):
                    raise DynexportError(
                        f"{self.operator.name}: {tensor.name} has {len(dims)} dimensions, expected {tensor.dims}"
                    )
            outputs = []
            for tensor in self.operator.outputs:
                places = map(self.operator.source, tensor.dims)
                outputs.append(trt.DimsExprs([inputs[place][axis] for place, axis in places]))
            return outputs

        def supports_format_combination(self, pos: int, tensors: Sequence[Any], num_inputs: int) -> bool:
            wanted = (*self.operator.inputs, *self.operator.outputs)
            if tensors[pos].desc.format != trt.TensorFormat.LINEAR:
                return False
            dtype = dtypes.get(tensors[pos].desc.type)
            if wanted[pos].dtype != T:
                return dtype == wanted[pos].dtype
            first = next(i for i, tensor in enumerate(wanted) if tensor.dtype == T)
            return dtype in FLOATS if pos == first else dtype == dtypes[tensors[first].desc.type]

        def get_aliased_input(self, output_index: int) -> int:
            return 0 if self.operator.in_place and output_index == 0 else -1

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return 0

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            read_sizes(self.operator, [tuple(desc.dims) for desc in inputs])

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> int:
            shapes = [tuple(desc.dims) for desc in input_desc]
            types_in = [dtypes[desc.type] for desc in input_desc]
            run(self.operator, self.kernels, shapes, types_in, inputs, outputs, stream)
            return 0

    return Plugin


def run(
    operator: Operator,
    kernels: Kernels | None,
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[DataType],
    inputs: Sequence[int],
    outputs: Sequence[int],
    stream: int,
) -> None:
    """Launch an operator's kernel on device memory, without waiting for it.

    Args:
        operator: the operator.
        kernels: the loaded kernels; None raises an error.
        shapes: shapes of the inputs.
        dtypes: element types of the inputs.
        inputs: device addresses of the inputs, row-major and dense.
        outputs: device addresses of the outputs, row-major and dense.
        stream: handle of the CUDA stream.

    Raises:
        DynexportError: when there are no kernels, shapes do not fit, or the driver returns an error.
    """
    if kernels is None:
        raise DynexportError(f"{operator.name} cannot run without its kernels: give them to creators.register")
    launch, sizes = LAUNCHES[operator.name], read_sizes(operator, shapes)
    if operator.in_place and inputs[0] != outputs[0]:
        kernels.copy(outputs[0], inputs[0], int(prod(shapes[0]) * dtypes[0].itemsize), stream)
    blocks = launch.blocks(sizes)
    if blocks:  # CUDA refuses an empty grid
        told = [sizes[letter] for letter in launch.sizes]
        kernels.launch(launch.name(dtype_of(operator, dtypes)), blocks, launch.threads, inputs, told, outputs, stream)


__all__ = ["allow_in_place", "register", "run", "unregister"]
