"""``use_liger_kernel=True`` of transformers' trainer, served by fxfuse, for scripts whose only switch is that flag.

The trainer hands a model to Liger, and Liger looks its type up in a public table of functions. ``enable`` puts ours into that
table, for every model type that transformers knows; ``disable`` puts the table back. Nothing does this by default, and nothing
else of Liger is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from transformers import CONFIG_MAPPING, PreTrainedModel

import fxfuse

# Liger's switches, by the rules that do the same work here.
RULES_OF = {
    "rope": ("rope", "qk_norm_rope"),
    "rms_norm": ("rms_norm", "residual_norm", "gated_norm", "qk_norm_rope"),
    "layer_norm": ("layer_norm",),
    "swiglu": ("gated_activation", "gated_mlp"),
    "geglu": ("gated_activation", "gated_mlp"),
    "cross_entropy": ("cross_entropy",),
    "fused_linear_cross_entropy": ("linear_loss",),
}

_replaced: dict[str, Callable] = {}
_lock = threading.Lock()


def enable(**options: Any) -> None:
    """Serve ``use_liger_kernel=True`` by ``fxfuse.optimize(model, **options)``, for every model type. Called again: other options."""
    with _lock:
        if not _replaced:
            _replaced.update(MODEL_TYPE_TO_APPLY_LIGER_FN)
        serve = _server(options)
        MODEL_TYPE_TO_APPLY_LIGER_FN.update(dict.fromkeys((*CONFIG_MAPPING, *_replaced), serve))


def disable() -> None:
    """Liger's own table again. Models that were optimized stay so (``fxfuse.restore``). Harmless where nothing is enabled."""
    with _lock:
        if _replaced:
            MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
            MODEL_TYPE_TO_APPLY_LIGER_FN.update(_replaced)
            _replaced.clear()


def _server(options: dict[str, Any]) -> Callable:
    def apply_fxfuse(
        model: PreTrainedModel | None = None,
        rope: bool | None = None,
        rms_norm: bool | None = None,
        layer_norm: bool | None = None,
        swiglu: bool | None = None,
        geglu: bool | None = None,
        cross_entropy: bool | None = None,
        fused_linear_cross_entropy: bool | None = None,
    ) -> None:
        """Liger's signature (it passes what it finds here); a switch that is off excludes its rules."""
        if model is None:
            raise ValueError(
                "fxfuse optimizes a model, not the class of one: build the model and pass use_liger_kernel=True to the trainer, "
                "or call fxfuse.optimize(model); fxfuse.integrations.liger_compat.disable() gives Liger its table back"
            )
        switches = dict(
            rope=rope, rms_norm=rms_norm, layer_norm=layer_norm, swiglu=swiglu, geglu=geglu, cross_entropy=cross_entropy,
            fused_linear_cross_entropy=fused_linear_cross_entropy,
        )  # fmt: skip
        off = {rule for name, on in switches.items() if on is False for rule in RULES_OF[name]}
        fxfuse.optimize(model, **{**options, "exclude": (*options.get("exclude", ()), *off)})

    return apply_fxfuse
