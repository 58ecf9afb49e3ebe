"""YAML values that know where they were written, so that every complaint begins with FILE:LINE."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypeVar

import yaml
from yaml.composer import ComposerError

from ris_bench.errors import UserError
from ris_bench.registry import checked, type_hints

Record = TypeVar("Record")

_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}


@dataclass(frozen=True)
class Located:
    """A scalar, a list of `Located` or a dict of str to `Located`, and the place where it stands."""

    value: Any
    at: str
    """ "experiments/pet_r101.yaml:12", or the command line option that gave the value."""

    def error(self, message: str) -> UserError:
        """To be raised: the place, then one line that says what was given, what is allowed and what to do."""
        return UserError(f"{self.at}: {' '.join(message.split())}")

    def plain(self) -> Any:
        """The value as `yaml.safe_load` gives it."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value

    def typed(self, hint: Any, what: str) -> Any:
        """The plain value as the annotated type."""
        try:
            return checked(self.plain(), hint, what)
        except UserError as error:
            raise self.error(str(error)) from None

    def mapping(self, what: str) -> dict[str, Located]:
        if not isinstance(self.value, dict):
            raise self.error(f"{what} is {self.plain()!r}; it must be a mapping; write `key: value` lines below it")
        return self.value

    def items(self, what: str) -> list[Located]:
        """The items of a list that has some."""
        if not isinstance(self.value, list) or not self.value:
            raise self.error(f"{what} is {self.plain()!r}; it must be a list with at least one item: [a, b]")
        return self.value

    def keys(self, what: str, allowed: Collection[str], required: Collection[str]) -> dict[str, Located]:
        """A mapping with no unknown and no missing key."""
        items = self.mapping(what)
        for key, item in items.items():
            if key not in allowed:
                raise item.error(f"{what} has no key {key!r}; its keys are {', '.join(allowed)}; correct or remove it")
        if missing := [key for key in required if key not in items]:
            raise self.error(f"{what} lacks {', '.join(missing)}; its keys are {', '.join(allowed)}; add them")
        return items

    def record(self, kind: type[Record], what: str) -> Record:
        """A dataclass from a mapping: no unknown key, none missing that has no default, every value of its type."""
        hints = type_hints(kind)
        required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        items = self.keys(what, hints, required)
        return kind(**{key: item.typed(hints[key], f"{what}.{key}") for key, item in items.items()})

    def put(self, keys: Sequence[str], item: Located, what: str) -> Located:
        """A copy with `item` at the end of a path of keys; those before the last must be there."""
        if not keys:
            return item
        items = self.value if isinstance(self.value, dict) else {}
        if not items or (keys[1:] and keys[0] not in items):
            raise item.error(f"{what} has no key {keys[0]!r}; it has {', '.join(items) or 'none'}; correct the name")
        inner = items[keys[0]].put(keys[1:], item, f"{what}.{keys[0]}") if keys[1:] else item
        return replace(self, value={**items, keys[0]: inner})


def read(text: str, at: Callable[[int], str]) -> Located:
    """Read one YAML document of plain values; `at` names the place of a line, counted from 1.

    Raises UserError for bad syntax, a key given twice, an alias and a tag that would construct an object.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Located(None, at(1)) if node is None else _located(loader, node, at, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Located(None, at(mark.line + 1)).error(f"this is not YAML: {error.problem}; correct it") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Located(None, at(line)).error(f"this is not YAML: {error.reason}; remove the character") from None
    except RecursionError:
        raise Located(None, at(1)).error("this is nested too deeply; an experiment needs few levels") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        # A few nested aliases can stand for gigabytes, and one can contain itself.
        if self.check_event(yaml.AliasEvent):
            problem = "an alias (*name) is not read; write the value out"
            raise ComposerError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _located(loader: _Loader, node: yaml.Node, at: Callable[[int], str], start: yaml.Node) -> Located:
    # The value of a key stands where its key stands: that is the line to look at.
    here = Located(None, at(start.start_mark.line + 1))
    if node.tag not in _PLAIN_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise here.error(f"the tag {tag} is not read; only text, numbers, lists and mappings are; quote or remove it")
    if isinstance(node, yaml.SequenceNode):
        return replace(here, value=[_located(loader, item, at, item) for item in node.value])
    if isinstance(node, yaml.MappingNode):
        items: dict[str, Located] = {}
        for key_node, value_node in node.value:
            key = _located(loader, key_node, at, key_node)
            if isinstance(key.value, (list, dict)):
                raise key.error(f"the key {key.plain()!r} is not a name; write a name before the colon")
            if str(key.value) in items:
                raise key.error(f"the key {str(key.value)!r} is given twice; a key is given once; remove one")
            items[str(key.value)] = _located(loader, value_node, at, key_node)
        return replace(here, value=items)
    try:
        return replace(here, value=loader.construct_object(node))
    except ValueError:
        raise here.error(f"{node.value!r} is not what its form says; quote it or correct it") from None
