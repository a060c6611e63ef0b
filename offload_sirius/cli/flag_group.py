"""Flags that belong together. A command has them as one parameter, and gets a config that is made of what they say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import typer

from offload_sirius.config import default_of, help_of, names_of

Values = dict[str, Any]
"""What the flags of a group say, by name, for a command that makes the config itself."""

Result = TypeVar("Result")


class Form(NamedTuple):
    """How a setting is written on the command line."""

    kind: Any
    """What typer reads: text, where the config reads on."""
    metavar: str | None = None
    """What stands for the value in --help; None for switches, which have none."""
    envvar: str | None = None
    """A variable of the environment that is read where the flag is not given."""


@dataclass(frozen=True)
class FlagGroup:
    """Flags in the order of --help, each a parameter such as typer takes."""

    flags: tuple[inspect.Parameter, ...]

    @classmethod
    def of(cls, config: type, panel: str, /, **forms: Form) -> FlagGroup:
        """Flags for settings of a config, which has their texts and defaults."""
        return cls(tuple(_flag(config, panel, name, form) for name, form in forms.items()))

    def __add__(self, other: FlagGroup) -> FlagGroup:
        return FlagGroup(self.flags + other.flags)

    def only(self, *names: str) -> FlagGroup:
        """Some of them, in that order."""
        by_name = {flag.name: flag for flag in self.flags}
        return FlagGroup(tuple(by_name[name] for name in names))

    def without(self, *names: str) -> FlagGroup:
        """All but some, which must be among them."""
        left_out = self.only(*names).flags
        return FlagGroup(tuple(flag for flag in self.flags if flag not in left_out))

    def option(self, name: str) -> Any:
        """What typer is told of one of them, for a command that has it as a parameter of its own."""
        (flag,) = self.only(name).flags
        return get_args(flag.annotation)[1]


def with_flag_groups(command: Callable[..., Result]) -> Callable[..., Result]:
    """For typer: a command some of whose parameters are groups, written Annotated[CONFIG, GROUP] or Annotated[Values, GROUP].

    A parameter of the command's own that is named like a flag of a group takes that flag's place, and what it says is for the
    command alone. --help lists each flag where its name comes first.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: found for name, each in signature.parameters.items() if (found := _group(each)) is not None}
    own = {name: each for name, each in signature.parameters.items() if name not in groups}
    listed: dict[str, inspect.Parameter] = {}
    for name in signature.parameters:
        for flag in groups[name][1].flags if name in groups else [own[name]]:
            listed.setdefault(flag.name, own.get(flag.name, flag))

    @wraps(command)
    def run(**said: Any) -> Result:
        taken = {name: said[name] for name in own}
        for name, (kind, group) in groups.items():
            values = {flag.name: said[flag.name] for flag in group.flags if flag.name not in own}
            taken[name] = _made(kind, values) if is_dataclass(kind) else values
        return command(**taken)

    run.__signature__ = signature.replace(parameters=list(listed.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: flag.annotation for name, flag in listed.items()}
    return run


def _flag(config: type, panel: str, name: str, form: Form) -> inspect.Parameter:
    flag, default = "--" + name.replace("_", "-"), default_of(config, name)
    if form.metavar is None and default is not False:  # what is off anyway need not be turned off
        flag += "/--no-" + name.replace("_", "-")
    option = typer.Option(
        flag,
        help=help_of(config, name),
        metavar=form.metavar,
        envvar=form.envvar,
        show_envvar=False,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if default == () else default,  # one that may be given several times, and is not
        annotation=Annotated[form.kind, option],
    )


def _group(parameter: inspect.Parameter) -> tuple[Any, FlagGroup] | None:
    """What is made of a parameter's group, and the group; None where it is a flag."""
    kind, *more = get_args(parameter.annotation) or [None]
    return next(((kind, each) for each in more if isinstance(each, FlagGroup)), None)


def _made(config: Any, values: Mapping[str, Any]) -> Any:
    """A config and those in it, of the values that are theirs. What was not given is as the config has it."""
    inner = {each.name: _made(each.default_factory, values) for each in fields(config) if is_dataclass(each.default_factory)}
    given = {name: value for name, value in values.items() if name in names_of(config) and value is not None}
    return config(**inner, **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
