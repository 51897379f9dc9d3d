"""What a checkpoint says of a run is looked at before it is used."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from gpt.checkpoint import Progress
from gpt.saved import check_form, check_generators, check_optimizer, read_progress


def test_progress_comes_back_as_it_was():
    progress = Progress(step=3, tokens=9, best_val_loss=1.5, guard_norms=[0.1], seconds=2.0)
    assert read_progress(Progress, asdict(progress)) == progress
    assert read_progress(Progress, {"step": 3}) == Progress(step=3)


@pytest.mark.parametrize(
    "odd",
    [
        *({"step": value} for value in (None, "3", 1.5, -1, 10**400, True, [])),
        *({"seconds": value} for value in ("x", -1.0, float("inf"), float("nan"))),
        {"guard_losses": 3},
        {"guard_losses": ["x"]},
        {"interval": {"a": "b"}},
        {"best_step": -2},
        {"another": 1},
    ],
)
def test_odd_progress_is_named(odd: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"progress.*{next(iter(odd))}"):
        read_progress(Progress, odd)


@pytest.mark.parametrize("value", [None, [], 3, "x"])
def test_progress_of_another_kind(value: object):
    with pytest.raises(ValueError, match="progress"):
        read_progress(Progress, value)


@pytest.mark.parametrize(
    ("saved", "place"),
    [
        ([], "x: not an object"),
        ({"a": 1.5}, "x.a: 1.5 is no whole number"),
        ({"a": True}, "x.a: True is no whole number"),
        ({"b": float("nan")}, "x.b: nan is no number that"),
        ({"c": [1]}, "x.c: not a list of 2"),
        ({"d": {"e": 3}}, "x.d.e: 3 is of another type"),
    ],
)
def test_other_forms_are_named(saved: object, place: str):
    ours = {"a": 1, "b": 1.0, "c": [1, 2], "d": {"e": "text"}, "f": None}
    check_form({**ours, "later": 1}, ours, "x")
    with pytest.raises(ValueError, match=place):
        check_form(saved, ours, "x")


def optimizer_of(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    parameters = dict(model.named_parameters())
    kinds = {"adafactor": torch.optim.Adafactor, "adamw": torch.optim.AdamW}
    optimizer = kinds[name](model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = {
        f"{key}|{inner}": value
        for key, parameter in parameters.items()
        for inner, value in optimizer.state[parameter].items()
    }
    group = {"parameters": list(parameters), "lr": 0.1, "initial_lr": 0.1}
    return {"groups": [group], "values": {}}, tensors


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_piece_of_an_optimizers_state_must_fit(name: str):
    model = nn.Linear(3, 2)
    parameters = dict(model.named_parameters())
    described, tensors = optimizer_of(model, name)
    check_optimizer(described, tensors, parameters)
    for key, tensor in tensors.items():
        for odd in (tensor.double(), tensor.reshape(1, -1, 1), torch.zeros(7)):
            with pytest.raises(ValueError, match="needed"):
                check_optimizer(described, {**tensors, key: odd}, parameters)
    with pytest.raises(ValueError, match="unknown parameter"):
        check_optimizer(described, {**tensors, "other|step": torch.zeros(())}, parameters)


def test_state_that_is_missing_or_no_number_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parameters = dict(model.named_parameters())
    described, tensors = optimizer_of(model, "adamw")
    less = {key: value for key, value in tensors.items() if key != "0.weight|exp_avg"}
    with pytest.raises(ValueError, match=r"exp_avg.*missing"):
        check_optimizer(described, less, parameters)
    described["groups"][0]["lr"] = "0.1"
    with pytest.raises(ValueError, match=r"groups\[0\].lr"):
        check_optimizer(described, tensors, parameters)


def test_generators():
    ours = {"cpu": torch.get_rng_state()}
    check_generators(ours, ours)
    check_generators({**ours, "cuda": torch.zeros(3)}, ours)
    for odd in ({}, {"cpu": ours["cpu"][:9]}, {"cpu": ours["cpu"].float()}):
        with pytest.raises(ValueError, match=r"cpu|CPU"):
            check_generators(odd, ours)
