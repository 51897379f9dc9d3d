"""Whether what a checkpoint says of a run has the form of a run's own state; reads no files.

A checkpoint may be a stranger's, its manifest true of whatever it holds. Each check raises
ValueError with the place and what is wrong there.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

LARGEST = 2**53
LARGEST_NUMBER = 2.0**64  # a phase without an end lasts 2**62 steps
MOST_SHOWN = 100


def read_progress(kind: type[Any], value: object) -> Any:  # noqa: ANN401 (an instance of `kind`)
    """The plain dataclass `kind` of a JSON value, its types and ranges checked."""
    try:
        progress = TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": ""}
        raise ValueError(f"progress.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    unknown = set(value) - set(vars(progress)) if isinstance(value, dict) else set()
    if unknown:
        raise ValueError(f"progress: {brief(unknown)} is no part of it")
    for name, number in vars(progress).items():
        if isinstance(number, int) and not 0 <= number < LARGEST:
            raise ValueError(f"progress.{name}: {brief([number])} is no count")
        if isinstance(number, float) and math.isinf(number):
            raise ValueError(f"progress.{name}: is infinite")
    if not progress.seconds >= 0:
        raise ValueError(f"progress.seconds: {progress.seconds} is no duration")
    return progress


def check_form(saved: object, ours: object, place: str) -> None:
    """Compares the types and lengths of two nested values.

    Keys that only one has are not looked at. Numbers of `saved` must be finite, and whole where
    ours are.
    """
    if isinstance(ours, Mapping):
        if not isinstance(saved, Mapping):
            raise ValueError(f"{place}: not an object")
        for key in ours.keys() & saved.keys():
            check_form(saved[key], ours[key], f"{place}.{key}")
    elif isinstance(ours, list | tuple):
        if not isinstance(saved, list) or len(saved) != len(ours):
            raise ValueError(f"{place}: not a list of {len(ours)}")
        for index, pair in enumerate(zip(saved, ours, strict=True)):
            check_form(*pair, f"{place}[{index}]")
    elif isinstance(ours, bool | str):
        if not isinstance(saved, type(ours)):
            raise ValueError(f"{place}: {brief([saved])} is of another type")
    elif isinstance(ours, int | float):
        _check_number(saved, place, whole=isinstance(ours, int))


def _check_number(value: object, place: str, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{place}: {brief([value])} is no {'whole ' if whole else ''}number")
    if not abs(value) < LARGEST_NUMBER:  # nan too
        raise ValueError(f"{place}: {brief([value])} is no number that a run has")


def check_optimizer(
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Checks the optimizer's groups, and that its state fits the parameters, one by one.

    `described` has groups of the right parameters already. Parameters of one group with as many
    dimensions have the same kinds of state.
    """
    for index, group in enumerate(described["groups"]):
        for key in ("lr", "initial_lr"):
            _check_number(group[key], f"optimizer.groups[{index}].{key}")
    kinds = _kinds_of_state(described["values"], tensors, parameters)
    for index, group in enumerate(described["groups"]):
        first: dict[int, str] = {}
        for name in group["parameters"]:
            same = first.setdefault(parameters[name].ndim, name)
            if kinds[name] != kinds[same]:
                odd = brief(kinds[name] ^ kinds[same])
                raise ValueError(f"optimizer.groups[{index}]: {odd} of {name} or {same} is missing")


def _kinds_of_state(
    values: Mapping[str, Mapping[str, object]],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, set[str]]:
    """What the optimizer remembers of each parameter, after every piece was checked."""
    kinds: dict[str, set[str]] = {name: set() for name in parameters}
    for name, numbers in values.items():
        if name not in parameters:
            raise ValueError(f"optimizer.values: {brief([name])} is no parameter")
        for key, value in numbers.items():
            if value is not None and not isinstance(value, bool):
                _check_number(value, f"optimizer.values.{name}.{brief([key])}")
            kinds[name].add(key)
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        if name not in parameters:
            raise ValueError(f"the optimizer's state is of an unknown parameter {brief([name])}")
        _check_tensor(tensor, key, parameters[name], full_name)
        kinds[name].add(key)
    return kinds


def _check_tensor(tensor: Tensor, key: str, parameter: nn.Parameter, name: str) -> None:
    """Whether a tensor of the optimizer's has the shape that its kind has for a parameter."""
    shape = tuple(parameter.shape)
    shapes = {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}
    wanted = shapes.get(key, shape)
    if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32:
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{brief([name])}: {found} in the file, {wanted} torch.float32 needed")


def check_generators(saved: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Compares shapes and types of the tensors that both have; that of the CPU must be there."""
    if "cpu" not in saved:
        raise ValueError("the generator of the CPU is missing")
    for name in saved.keys() & ours.keys():
        found, wanted = saved[name], ours[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ValueError(
                f"{name}: {tuple(found.shape)} {found.dtype} in the file, "
                f"{tuple(wanted.shape)} {wanted.dtype} needed"
            )


def brief(values: Iterable[object]) -> str:
    """Some values in words, few and short whatever they are."""
    shown = [repr(value)[:MOST_SHOWN] for value in list(values)[:3]]
    return ", ".join(shown)
