"""Plug-ins: Python code outside the project whose backbones, methods, heads and data sets take part like its own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from ris_bench.backbones.base import BACKBONES
from ris_bench.code import LOADED
from ris_bench.data.dataset import DATASETS
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS

REGISTRIES = (DATASETS, BACKBONES, METHODS, HEADS)


@dataclass(frozen=True)
class Plugin:
    """A module or a file, as it was found; it may be sent to another process, which loads the same or nothing."""

    name: str
    """As the experiment writes it."""
    sha256: str
    """Of the file; of all Python files of a package."""
    source: bytes | None = field(repr=False)
    """What a file holds: another machine need not have it. A module is imported, and sent by its `roots`."""

    def load(self) -> None:
        """Run the code, once a process. UserError where it fails, registers nothing, or is another than was found."""
        if LOADED.get(self.name) == self:
            return
        if self.name in LOADED or (self.source is None and _digest(_files(self.name)) != self.sha256):
            raise UserError(f"plug-in {self.name!r} is not what it was when the experiment was read: start again")
        with ExitStack() as stack:
            new = [stack.enter_context(registry.plugged(self.sha256)) for registry in REGISTRIES]
            try:
                self._run()
            except (Exception, SystemExit) as error:
                raise UserError(f"plug-in {self.name!r} cannot be imported: {_brief(error, self.name)}") from error
        if not any(new):
            kinds = ", ".join(registry.kind for registry in REGISTRIES)
            raise UserError(
                f"plug-in {self.name!r} registers nothing that was not there before: decorate a {kinds}, as in "
                "@METHODS('my-method')"
            )
        LOADED[self.name] = self

    def roots(self) -> list[Path]:
        """Where the top-level package of a module lies, or its file; nothing for a plug-in that travels with this."""
        if self.source is not None:
            return []
        spec = importlib.util.find_spec(self.name.partition(".")[0])
        return list(map(Path, spec.submodule_search_locations or [spec.origin]))

    def _run(self) -> None:
        if self.source is None:
            importlib.import_module(self.name)
            return
        module = ModuleType(f"plugin_{self.sha256[:12]}")
        module.__file__ = self.name
        sys.modules[module.__name__] = module  # dataclasses look their module up
        exec(compile(self.source, self.name, "exec", dont_inherit=True), module.__dict__)


def find(name: str, folder: Path) -> Plugin:
    """A plug-in by the name of an importable module, or by the path of a .py file, relative to the folder.

    Raises UserError where there is none.
    """
    if name.endswith(".py"):
        path = folder / name
        try:
            source = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"plug-in {name!r}: {path} cannot be read ({error.strerror}); a path begins there"
            ) from None
        return Plugin(name, hashlib.sha256(source).hexdigest(), source)
    return Plugin(name, _digest(_files(name)), None)


def _files(name: str) -> list[Path]:
    # Without importing the packages above it, which may register what the plug-in is to be known by.
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for part in below:
            spec = spec and PathFinder.find_spec(part, spec.submodule_search_locations or [])
    except (ImportError, ValueError):
        spec = None
    files = []
    if spec is not None:
        folders = map(Path, spec.submodule_search_locations or ())
        files = [path for folder in folders for path in sorted(folder.rglob("*.py"))] or [Path(spec.origin or "")]
    if not files or files[0].suffix != ".py":
        raise UserError(
            f"plug-in {name!r}: there is no such module of Python code; name one that can be imported, or a .py file "
            "by its path from the experiment's folder"
        )
    return files


def _digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _brief(error: BaseException, name: str) -> str:
    lines = str(error).strip().splitlines() or [""]
    at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    return f"{type(error).__name__}: {lines[0]}{f' (line {at[-1]})' if at else ''}"
