"""Groups of flags as parameters of a command: what the command gets, and in which order typer is told of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer

from offload_sirius.cli.flag_group import FlagGroup, Form, Values, with_flag_groups


@dataclass(frozen=True, kw_only=True)
class Engine:
    fuel: str = field(default="wood", metadata={"help": "What is burnt."})
    hot: bool = field(default=True, metadata={"help": "Whether it is."})


@dataclass(frozen=True, kw_only=True)
class Train:
    speed: int = field(default=80, metadata={"help": "Of the train."})
    loud: bool = field(default=False, metadata={"help": "Whether it whistles."})
    stops: tuple[str, ...] = field(default=(), metadata={"help": "Where it stops."})
    engine: Engine = field(default_factory=Engine)


ENGINE = FlagGroup.of(Engine, "Engine", fuel=Form(str, "FUEL"), hot=Form(bool))
TRAIN = FlagGroup.of(Train, "Train", speed=Form(int, "N"), loud=Form(bool), stops=Form(list[str] | None, "NAME")) + ENGINE
Speed = Annotated[str, typer.Option("--speed")]


@with_flag_groups
def ride(*, train: Annotated[Train, TRAIN], far: bool = False) -> Any:
    return train, far


@with_flag_groups
def race(*, engine: Annotated[Values, TRAIN.without("stops")], speed: Speed = "top") -> Any:
    return engine, speed


@with_flag_groups
def rush(*, speed: Speed = "top", train: Annotated[Train, TRAIN]) -> Any:
    return train, speed


def called(command: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return app(arguments, standalone_mode=False)


def test_a_config_is_made_of_flags_with_the_config_in_it() -> None:
    assert called(ride) == (Train(), False)
    given = called(ride, "--speed", "120", "--loud", "--stops", "A", "--stops", "B", "--no-hot", "--fuel", "coal", "--far")
    assert given == (Train(speed=120, loud=True, stops=("A", "B"), engine=Engine(fuel="coal", hot=False)), True)


def test_values_are_for_the_command_to_make_a_config_of() -> None:
    assert called(race, "--loud", "--speed", "9") == ({"loud": True, "fuel": "wood", "hot": True}, "9")


@pytest.mark.parametrize(
    ("command", "order"),
    [
        (ride, ["speed", "loud", "stops", "fuel", "hot", "far"]),
        (race, ["speed", "loud", "fuel", "hot"]),
        (rush, ["speed", "loud", "stops", "fuel", "hot"]),
    ],
)
def test_a_flag_is_listed_where_its_name_comes_first(command: Any, order: list[str]) -> None:
    assert list(inspect.signature(command).parameters) == order


def test_a_commands_own_flag_takes_the_place_of_the_groups() -> None:
    assert inspect.signature(race).parameters["speed"].default == "top"
    assert called(rush, "--speed", "9", "--fuel", "coal") == (Train(engine=Engine(fuel="coal")), "9")


def test_only_some_flags_come_in_the_order_in_which_they_are_named() -> None:
    assert [flag.name for flag in TRAIN.only("hot", "speed").flags] == ["hot", "speed"]


def test_only_a_switch_that_can_be_on_already_can_be_turned_off() -> None:
    options = {flag.name: TRAIN.option(flag.name).default for flag in TRAIN.flags}
    assert (options["hot"], options["loud"], options["fuel"]) == ("--hot/--no-hot", "--loud", "--fuel")


@pytest.mark.parametrize("take", [TRAIN.only, TRAIN.without, TRAIN.option])
def test_a_flag_that_is_not_in_the_group_is_a_mistake(take: Any) -> None:
    with pytest.raises(KeyError, match="tender"):
        take("tender")
