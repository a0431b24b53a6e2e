"""A setting of torch's, read in one step where it is plainly one.

Dynamo reads some for every instruction that it traces; torch looks each time whether it is hidden, another name of one elsewhere, given
by the environment, or to be asked of a service. (torch 2.13 keeps values apart by context, and reads them as it does.)
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import wraps
from typing import Any

from fxfuse._torch import ConfigModule, config_modules, dynamo_config

_of_torch = ConfigModule.__getattr__
_UNSET = config_modules._UNSET_SENTINEL
_CHANGING = (list, set, dict)  # what torch copies before it is read
_APART = any(isinstance(entry.user_override, ContextVar) for entry in dynamo_config._config.values())


@wraps(_of_torch)
def read(self: Any, name: str) -> Any:
    entry = self._config.get(name)
    if entry is None or entry.hide or entry.alias is not None or entry.env_value_force is not _UNSET:
        return _of_torch(self, name)
    value = entry.user_override
    if value is _UNSET and entry.env_value_default is _UNSET and entry.justknob is None:
        value = entry.default
    return _of_torch(self, name) if value is _UNSET or isinstance(value, _CHANGING) else value


SETTINGS: tuple[tuple[Any, str, Any], ...] = () if _APART else ((ConfigModule, "__getattr__", read),)
