"""Parts as JSON data, and back.

    a part          {"part": class name, field: value, ...}; "module:class name" for parts defined elsewhere
    a tensor        {"tensor": nested lists, "dtype": "float32"}, with "shape" where it has no elements and
                    "requires_grad": true where it is learned
    a dtype         {"dtype": "float32"}
    a function      {"function": "module:name"}
    a tuple         a list
    inf, -inf, nan  {"number": "inf"}; within a tensor the string alone, "inf", "-inf" or "nan"
    anything else   itself: null, booleans, finite numbers, strings

The data is strict JSON: `json.dumps(data, allow_nan=False)` takes it.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead.checks import given
from polyhead.description.part import Part, part_named
from polyhead.errors import ConfigError

__all__ = ["from_json", "to_json"]

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_json(value: Any) -> Any:
    """Plain JSON data for a part (or what may stand inside one); `from_json` gives it back.

    Dtypes, shapes and what is learned are kept; the device of a tensor is not. A function goes by its name
    and must be importable: one that a module defines at its top level.

    Args:
        value: a part, a tensor, a dtype, a number, text, None, a function, or a sequence of such.

    Raises:
        ConfigError: something that JSON cannot carry, such as a lambda or a complex tensor.
    """
    if isinstance(value, Part):
        fields = dataclasses.fields(value)  # type: ignore[arg-type]
        return {"part": value.kind} | {f.name: to_json(getattr(value, f.name)) for f in fields}
    if isinstance(value, Tensor):
        return _from_tensor(value)
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else {"number": _spell(float(value))}
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, bool | str):
        return value
    if callable(value):
        return {"function": _name_of(value)}
    raise ConfigError(f"a value of type {type(value).__name__} cannot go through JSON: {given(value)}")


def from_json(data: Any) -> Any:
    """What `to_json` made into plain data, made again.

    Read only data that you trust: a function goes by name, `{"function": "module:name"}`, so reading imports
    that module, which runs its code, and the function is called wherever the description is used. Only plain
    Python functions that the named module itself defines are taken.

    Args:
        data: what `json.loads` reads from the text that was written.

    Raises:
        UnknownName: a part that no module imported so far defines.
        ConfigError: data that is no description, a field that is missing or not known, or a value that
            the part does not allow.
    """
    if isinstance(data, list | tuple):
        return tuple(from_json(v) for v in data)
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, Mapping):
        if "part" in data:
            return _to_part(data)
        if "tensor" in data:
            return _to_tensor(data)
        for key, read in (("dtype", _to_dtype), ("function", _function), ("number", _to_number)):
            if set(data) == {key}:
                return read(data[key])
        raise ConfigError(f"not a description: a JSON object with the keys {sorted(map(str, data))}")
    raise ConfigError(f"not JSON data: {given(data)}")


def _to_part(data: Mapping[str, Any]) -> Part:
    kind = part_named(data["part"])
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    said = ", ".join(fields) or "none"
    unknown = [str(name) for name in data if name != "part" and name not in fields]
    if unknown:
        raise ConfigError(
            f"{kind.kind} has no field {' or '.join(map(repr, unknown))}; its fields are {said}"
        )
    nothing = dataclasses.MISSING
    missing = [
        f.name
        for f in fields.values()
        if f.default is nothing and f.default_factory is nothing and f.name not in data
    ]
    if missing:
        raise ConfigError(f"{kind.kind} needs {' and '.join(map(repr, missing))}; its fields are {said}")
    return kind(**{name: from_json(value) for name, value in data.items() if name != "part"})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype must be the name of one of torch's, such as 'float32'; got {given(name)}")
    return found


def _spell(number: float) -> str:
    return "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"


def _to_number(spelled: Any) -> float:
    if not isinstance(spelled, str) or spelled not in _NOT_FINITE:
        raise ConfigError(f"number must be one of {', '.join(map(repr, _NOT_FINITE))}; got {given(spelled)}")
    return _NOT_FINITE[spelled]


def _from_tensor(tensor: Tensor) -> dict[str, Any]:
    if tensor.is_complex() or tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided:
        kind = "a tensor on the device meta" if tensor.is_meta else given(tensor)
        raise ConfigError(
            f"{kind} cannot go through JSON; it takes dense tensors of real numbers, integers or booleans"
        )
    held = tensor.detach().cpu()
    if held.is_floating_point():
        held = held.double()
        numbers = held.tolist() if bool(held.isfinite().all()) else _spelled(held.tolist())
    else:
        numbers = held.tolist()
    data = {"tensor": numbers, "dtype": _name(tensor.dtype)}
    if not tensor.numel():
        data["shape"] = list(tensor.shape)  # nested lists do not say what stands behind a 0
    return data | ({"requires_grad": True} if tensor.requires_grad else {})


def _spelled(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_spelled(n) for n in numbers]
    return numbers if math.isfinite(numbers) else _spell(numbers)


def _read(numbers: Any) -> Any:
    if isinstance(numbers, list | tuple):
        return [_read(n) for n in numbers]
    if isinstance(numbers, str):
        return _to_number(numbers)
    if isinstance(numbers, bool | int | float):
        return numbers
    raise ConfigError(f"a tensor must be nested lists of numbers; got {given(numbers)} inside")


def _to_tensor(data: Mapping[str, Any]) -> Tensor:
    unknown = set(map(str, data)) - {"tensor", "dtype", "shape", "requires_grad"}
    if unknown or "dtype" not in data:
        wrong = f"has no key {sorted(unknown)}" if unknown else "needs the key 'dtype'"
        raise ConfigError(f"a tensor in JSON {wrong}; its keys are tensor, dtype, shape and requires_grad")
    dtype = _to_dtype(data["dtype"])
    try:
        tensor = torch.tensor(_read(data["tensor"]), dtype=dtype)
        if "shape" in data:
            tensor = tensor.reshape(data["shape"])
        return tensor.requires_grad_(bool(data.get("requires_grad", False)))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        said = ", ".join(f"{key}={given(data[key])}" for key in data)
        raise ConfigError(f"not a tensor in JSON: {said}: {str(error).splitlines()[0]}") from error


def _name_of(function: Any) -> str:
    """How a function can be imported again, or a `ConfigError`."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ConfigError(
            f"{given(function)} cannot go through JSON because it has no name to import it by; "
            "define a function at the top level of a module"
        )
    spelled = f"{module}:{name}"
    if "<" in spelled or module == "__main__":
        raise ConfigError(
            f"function {spelled} cannot go through JSON because it cannot be imported by name; "
            "define it at the top level of a module"
        )
    if _function(spelled) is not function:
        raise ConfigError(f"function {spelled} cannot go through JSON: that name gives another function")
    return spelled


def _function(spelled: Any) -> Any:
    """The plain Python function called `module:name`, or a `ConfigError`."""
    module, colon, name = spelled.partition(":") if isinstance(spelled, str) else ("", "", "")
    if not (module and colon and name):
        raise ConfigError(f"function must be spelled 'module:name'; got {given(spelled)}")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"function {spelled!r}: the module {module!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for step in name.split("."):
        if not hasattr(found, step):
            raise ConfigError(
                f"function {spelled!r}: there is no {step!r} in {getattr(found, '__name__', found)}"
            )
        found = getattr(found, step)
    if not isinstance(found, FunctionType):
        raise ConfigError(
            f"function {spelled!r} is a {type(found).__name__}; only plain Python functions go through JSON, "
            "not classes, builtins or other callables; wrap it in a function of your own"
        )
    if found.__module__ != module:
        raise ConfigError(
            f"function {spelled!r} is defined in {found.__module__!r}; name the module that defines it, "
            "so that data cannot reach what a module merely imports"
        )
    return found
