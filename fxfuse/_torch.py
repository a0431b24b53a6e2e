"""Every private piece of torch that fxfuse uses, by name: a version bump of torch is one diff of this file.

Each name is fetched when it is first used, so importing this module costs nothing. Keep the table sorted.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AutogradFunctionContextVariable": ("torch._dynamo.variables.misc", "AutogradFunctionContextVariable"),
    "AutogradFunctionVariable": ("torch._dynamo.variables.misc", "AutogradFunctionVariable"),
    "BackendCompilerFailed": ("torch._dynamo.exc", "BackendCompilerFailed"),
    "BoxedCodeGen": ("torch.fx.graph", "_BoxedCodeGen"),
    "ConfigModule": ("torch.utils._config_module", "ConfigModule"),
    "CompileContext": ("torch._guards", "CompileContext"),
    "CustomPartitionerFn": ("torch._inductor.custom_graph_pass", "CustomPartitionerFn"),
    "DataDependentOutputException": ("torch._subclasses.fake_tensor", "DataDependentOutputException"),
    "DisableTorchFunctionSubclass": ("torch._C", "DisableTorchFunctionSubclass"),
    "DynamicOutputShapeException": ("torch._subclasses.fake_tensor", "DynamicOutputShapeException"),
    "FailOnRecompileLimitHit": ("torch._dynamo.exc", "FailOnRecompileLimitHit"),
    "FakeTensor": ("torch._subclasses.fake_tensor", "FakeTensor"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    "InstructionTranslator": ("torch._dynamo.symbolic_convert", "InstructionTranslator"),
    "LocalMapVariable": ("torch._dynamo.variables.higher_order_ops", "LocalMapWrappedHigherOrderVariable"),
    "OpOverload": ("torch._ops", "OpOverload"),
    "OptimizedModule": ("torch._dynamo", "OptimizedModule"),
    "OutputGraph": ("torch._dynamo.output_graph", "OutputGraph"),
    "PhiloxState": ("torch._decomp.decompositions_for_rng", "PhiloxState"),
    "SavedTensor": ("torch._C._autograd", "SavedTensor"),
    "ShapeEnv": ("torch.fx.experimental.symbolic_shapes", "ShapeEnv"),
    "SymNode": ("torch.fx.experimental.sym_node", "SymNode"),
    "TensorGuards": ("torch._C._dynamo.guards", "TensorGuards"),
    "TensorifyScalarRestartAnalysis": ("torch._dynamo.exc", "TensorifyScalarRestartAnalysis"),
    "TorchDynamoException": ("torch._dynamo.exc", "TorchDynamoException"),
    "TracingContext": ("torch._guards", "TracingContext"),
    "ViewAndMutationMeta": ("torch._functorch._aot_autograd.schemas", "ViewAndMutationMeta"),
    "VariableBuilder": ("torch._dynamo.variables.builder", "VariableBuilder"),
    "VariableTracker": ("torch._dynamo.variables.base", "VariableTracker"),
    "aot_autograd": ("torch._dynamo.backends.common", "aot_autograd"),
    "aot_entry": ("torch._functorch", "aot_autograd"),
    "clear_cublas_workspaces": ("torch._C", "_cuda_clearCublasWorkspaces"),
    "config_modules": ("torch.utils", "_config_module"),
    "compile_fx": ("torch._inductor.compile_fx", "compile_fx"),
    "detach_with_memo": ("torch._functorch._aot_autograd.graph_capture", "_detach_and_copy_item_memo"),
    "disable_current_modes": ("torch.utils._python_dispatch", "_disable_current_modes"),
    "compile_callbacks": ("torch._dynamo.callback", "callback_handler"),
    "dispatch_keys": ("torch._C", "_dispatch_key_set"),
    "dispatch_mode": ("torch._C", "_get_dispatch_mode"),
    "dispatch_modes": ("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack"),
    "dynamo_config": ("torch._dynamo", "config"),
    "dynamo_guards": ("torch._dynamo", "guards"),
    "dynamo_metrics": ("torch._dynamo", "utils"),
    "dynamo_tracer": ("torch._dynamo", "symbolic_convert"),
    "empty_strided_cuda": ("torch._C._dynamo.guards", "_empty_strided_cuda"),
    "enable_python_dispatcher": ("torch._dispatch.python", "enable_python_dispatcher"),
    "functional_tensors": ("torch._subclasses", "functional_tensor"),
    "functorch_config": ("torch._functorch", "config"),
    "functorch_level": ("torch._C._functorch", "maybe_current_level"),
    "fake_tensors": ("torch._subclasses", "fake_tensor"),
    "flex_attention": ("torch._higher_order_ops.flex_attention", "flex_attention"),
    "flex_attention_backward": ("torch._higher_order_ops.flex_attention", "flex_attention_backward"),
    "flex_options": ("torch.nn.attention.flex_attention", "_apply_kernel_options"),
    "flex_score_graphs": ("torch._higher_order_ops.flex_attention", "create_fw_bw_graph"),
    "fx_graph_cse": ("torch._functorch.compile_utils", "fx_graph_cse"),
    "get_file_hash": ("torch._inductor.custom_graph_pass", "get_hash_for_files"),
    "get_proxy_mode": ("torch.fx.experimental.proxy_tensor", "get_proxy_mode"),
    "graph_break": ("torch._dynamo", "graph_break"),
    "graph_compile": ("torch._functorch._aot_autograd", "graph_compile"),
    "graph_is_kept": ("torch._C._autograd", "_get_current_graph_task_keep_graph"),
    "graph_task_id": ("torch._C", "_current_graph_task_id"),
    "host_empty_cache": ("torch._C", "_host_emptyCache"),
    "in_kernel_invocation": ("torch._subclasses.fake_tensor", "in_kernel_invocation_manager"),
    "in_foreign_dispatch_mode": ("torch.utils._python_dispatch", "is_in_any_mode_without_ignore_compile_internals"),
    "indexing_in_graphs": ("torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex"),
    "inductor_cache_dir": ("torch._inductor.runtime.cache_dir_utils", "cache_dir"),
    "is_batched_gradient": ("torch._C._functorch", "is_legacy_batchedtensor"),
    "is_traceable_wrapper_subclass": ("torch.utils._python_dispatch", "is_traceable_wrapper_subclass"),
    "len_dispatch_stack": ("torch._C", "_len_torch_dispatch_stack"),
    "library_impls": ("torch.library", "_impls"),
    "make_graph_module": ("torch.fx._lazy_graph_module", "_make_graph_module"),
    "min_cut_partition": ("torch._functorch.partitioners", "min_cut_rematerialization_partition"),
    "mode_keys": ("torch._C", "_TorchDispatchModeKey"),
    "no_python_dispatcher": ("torch._C", "_DisablePythonDispatcher"),
    "no_proxy_mode": ("torch.fx.experimental.proxy_tensor", "disable_proxy_modes_tracing"),
    "pre_dispatch_modes": ("torch._ops", "mode_stack_state_for_pre_dispatch"),
    "refs": ("torch", "_refs"),
    "saved_hooks_enabled": ("torch._C._autograd", "_saved_tensors_hooks_is_enabled"),
    "shape_config": ("torch.fx.experimental", "_config"),
    "size_kinds": ("torch.utils._sympy", "symbol"),
    "sleep_on_device": ("torch.cuda", "_sleep"),
    "sources": ("torch._dynamo", "source"),
    "storage_use_count": ("torch._C", "_storage_Use_Count"),
    "symbolic_shapes": ("torch.fx.experimental", "symbolic_shapes"),
    "tensor_facts": ("torch", "_prims_common"),
    "top_saved_tensors_hooks": ("torch._C._autograd", "_top_saved_tensors_default_hooks"),
    "trace_log": ("torch._logging._internal", "trace_log"),
    "tracing": ("torch._guards", "tracing"),
    "trees": ("torch.utils", "_pytree"),
    "without_transforms": ("torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack"),
}


def __getattr__(name: str) -> Any:
    """Fetch a private name of torch from where this version keeps it, once (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"fxfuse._torch lists no private torch name {name!r}; add a line to its table")
    module, attribute = _HOME[name]
    holder = importlib.import_module(module)
    value = getattr(holder, attribute) if hasattr(holder, attribute) else importlib.import_module(f"{module}.{attribute}")
    globals()[name] = value
    return value
