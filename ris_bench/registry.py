"""A registry maps a name to a factory whose keyword-only arguments are its options: there is no other configuration.

A module registers its factory by decorating it, and every module of the registry's package is imported at the first
look-up; so a new backbone, method or head is one new file, and no list names it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from ris_bench.errors import UserError
from ris_bench.records import Choice, tuples

Factory = TypeVar("Factory", bound=Callable[..., Any])
Record = TypeVar("Record")


class Registry:
    """Factories of one kind ("backbone", "method", ...), found in one module or in the modules of one package."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._factories: dict[str, Callable[..., Any]] = {}
        self._code: dict[str, str] = {}
        self._imported = False

    def __call__(self, name: str) -> Callable[[Factory], Factory]:
        """Decorator that registers a factory; a name can be taken once."""

        def register(factory: Factory) -> Factory:
            if name in self._factories:
                raise ValueError(f"two {self.kind}s are called {name!r}: {self._factories[name]} and {factory}")
            self._factories[name] = factory
            return factory

        return register

    def __iter__(self) -> Iterator[str]:
        """Every registered name, sorted."""
        self._import_siblings()
        return iter(sorted(self._factories))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        self._import_siblings()
        if name not in self._factories:
            raise UserError(f"there is no {self.kind} {name!r}; there are {', '.join(self)}")
        return self._factories[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The options of a factory: its keyword-only parameters, by name."""
        return dict(_options(self[name]))

    def resolve(self, name: str, options: Mapping[str, Any]) -> Choice:
        """Check the options given and fill in the defaults, so that a choice says all that it stands for.

        Raises UserError for an unknown name or option, a value of another type, and a missing option. A factory that
        has more to say of its options than their types has a static `check`, which is called with all of them.
        """
        factory = self[name]
        allowed = _options(factory)
        for key in options:
            if key not in allowed:
                some = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
                raise UserError(f"{self.kind} {name!r} has no option {key!r}; {some}")
        # The annotations of a class are those of its constructor.
        hints = type_hints(factory.__init__ if inspect.isclass(factory) else factory)
        resolved = {}
        for key, parameter in allowed.items():
            if key in options:
                resolved[key] = checked(options[key], hints[key], f"option {key!r} of {self.kind} {name!r}")
            elif parameter.default is parameter.empty:
                raise UserError(f"{self.kind} {name!r} needs the option {key!r}")
            else:
                resolved[key] = parameter.default
        if hasattr(factory, "check"):
            factory.check(**resolved)
        return Choice(name=name, options=resolved, code=self._code.get(name))

    def build(self, choice: Choice, *args: Any) -> Any:
        """Call the factory of a choice with its options. UserError where a plug-in made it that is not at hand."""
        if choice.code != self._code.get(choice.name):
            raise UserError(
                f"{self.kind} {choice.name!r} is of a plug-in whose code has the sha256 {choice.code}; "
                f"{'what is loaded under this name differs' if choice.name in self else 'name that plug-in'}"
            )
        return self[choice.name](*args, **choice.options)

    @contextmanager
    def plugged(self, code: str) -> Iterator[set[str]]:
        """What is registered inside comes from a plug-in with this sha256; where it fails, nothing of it stays.

        The set holds the new names afterwards.
        """
        before, new = set(self), set()
        try:
            yield new
        except BaseException:
            for name in self._factories.keys() - before:
                del self._factories[name]
            raise
        new |= self._factories.keys() - before
        self._code |= dict.fromkeys(new, code)

    def _import_siblings(self) -> None:
        if not self._imported:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{self._package}.{module.name}")
            self._imported = True


# Both are asked the same for each of thousands of trials, which would be most of the time of reading an experiment.


@cache
def _options(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return {p.name: p for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY}


@cache
def type_hints(of: Any) -> Mapping[str, Any]:
    """The annotations of a function or class, by name."""
    return typing.get_type_hints(of)


def checked(value: Any, hint: Any, what: str) -> Any:
    """`value` as the annotated type, or a UserError that says what was given and what is allowed.

    An int is accepted for a float and a list for a tuple; a bool is not a number, and a string never becomes one.
    Lists of which nothing is said become tuples, so that records compare equal after a round trip through JSON.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return tuples(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is typing.Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and (args[-1] is Ellipsis or len(value) == len(args)):
            hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
            return tuple(checked(v, h, what) for v, h in zip(value, hints, strict=True))
    elif origin is list:
        if isinstance(value, (list, tuple)):
            return [checked(v, args[0], what) for v in value]
    elif origin is dict:
        if isinstance(value, Mapping):
            return {checked(k, args[0], what): checked(v, args[1], what) for k, v in value.items()}
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return checked(value, arg, what)
            except UserError:
                continue
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    advice = " (YAML 1.1 reads 1e-4 as a string: write 1.0e-4)" if hint is float and isinstance(value, str) else ""
    raise UserError(f"{what} is {value!r}, which is not {describe(hint)}{advice}")


def record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A dataclass of which every value has the annotated type; UserError where one has not, TypeError for a field that
    there is not."""
    hints = type_hints(kind)
    return kind(**{key: checked(value, hints.get(key, Any), key) for key, value in values.items()})


def describe(hint: Any) -> str:
    """An annotation in words: "one of 'val', 'test'", "a list of str", "float"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(repr(a) for a in args)}"
    if origin is tuple:
        return f"a list of {describe(args[0])}" + ("" if args[-1] is Ellipsis else f" with {len(args)} items")
    if origin is list:
        return f"a list of {describe(args[0])}"
    if origin is dict or hint is dict:
        return "a mapping"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
