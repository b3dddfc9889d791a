"""A YAML file as values plus the line of each key, so that every fault can say where it stands."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peftune.errors import ConfigError, Fault

KeyPath = tuple[str | int, ...]
Place = tuple[str, int | None]
Replaces = Callable[[str, Mapping[str, Any], Mapping[str, Any]], bool]
"""Key, section below and section above -> whether nothing of the one below is to stay."""

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Document:
    """Settings as nested dicts, and where each key path was written."""

    values: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place | None:
        """File and line of the key path, or of its nearest written parent."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-4 is a number, 010 is ten and 1:30 is a text, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would read as a number, or in which it would read another end of a line."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None))


def to_yaml(values: Any, **how: Any) -> str:
    """Values as a YAML text, from which `read` and `parse_value` get equal ones. `how`: options of PyYAML."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **how)
    return text


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """YAML 1.1 takes 010 for eight, and 1:30 for ninety."""
    written = str(node.value)
    if ":" in written:
        return written
    return int(written) if re.fullmatch(r"[-+]?0[0-9_]+", written) else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, read as YAML. Raises YAMLError or ValueError."""
    with _tag_faults():
        return yaml.load(text, Loader=_Loader)


@contextlib.contextmanager
def _tag_faults() -> Iterator[None]:
    """PyYAML raises what comes up where an explicit tag does not suit its value, as in `!!timestamp x`."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(f"a value that its tag does not suit, or too deep: {error}") from None


def read(path: Path) -> Document:
    """Read one YAML file without following its `base`.

    Raises:
        ConfigError: missing, unreadable, not a mapping, or with a key written twice.
    """
    name = str(path)
    try:
        loader = _Loader(_text(path))  # looks for characters that YAML forbids
    except yaml.reader.ReaderError as error:
        raise ConfigError(Fault(kind="config", file=name, mend="save it as plain UTF-8 text",
                                message=f"not YAML: character {error.character!r} at {error.position}")) from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(Fault(kind="config", file=name, message="the file is empty",
                                    mend="peftune init DATA writes a config to begin with"))
        places, faults = _places(node, name)
        if faults:
            raise ConfigError(faults)
        with _tag_faults():
            values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise ConfigError(
            Fault(kind="config", file=name, line=line, message=f"not valid YAML: {error.problem or error.context}",
                  mend="mend the syntax of this line or the one above it")
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(Fault(kind="config", file=name, message=f"not valid YAML: {error}")) from None
    finally:
        loader.dispose()
    return Document(values, places)


def _text(path: Path) -> str:
    name = str(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(Fault(kind="config", file=name, message="no file: a folder, a device or a pipe",
                                    mend="name a YAML file"))
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(Fault(kind="config", file=name, message="larger than 1 MiB: not a config"))
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        mend = f"the folder {path.parent} holds {_listing(path.parent)}" if path.parent.is_dir() else "check the path"
        raise ConfigError(Fault(kind="config", file=name, message="no such config file", mend=mend)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            Fault(kind="config", file=name, message=f"not UTF-8 at byte {error.start}", mend="save it as UTF-8")
        ) from None
    except OSError as error:
        raise ConfigError(Fault(kind="config", file=name, message=f"cannot be read: {error.strerror}")) from None


def _listing(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob("*.yaml"))
    return ", ".join(names[:10]) if names else "no .yaml file"


def _places(root: yaml.Node, file: str) -> tuple[dict[KeyPath, Place], list[Fault]]:
    """Line of every key, and the keys that are written twice (YAML itself would keep the last in silence)."""
    places: dict[KeyPath, Place] = {}
    faults: list[Fault] = []
    if not isinstance(root, yaml.MappingNode):
        faults.append(Fault(kind="config", file=file, line=root.start_mark.line + 1,
                            message="a config is a mapping of keys to values", mend="begin with `task: ...`"))
        return places, faults
    for count, (path, key, twice) in enumerate(_keys(root, (), frozenset())):
        if count > MAX_NODES:
            faults.append(Fault(kind="config", file=file, message=f"more than {MAX_NODES} values: not a config"))
            break
        line = key.start_mark.line + 1
        if twice:
            first = places[path][1]
            faults.append(Fault(kind="config", file=file, line=line, mend="keep one of them",
                                message=f"{dotted(path)} is written twice, first on line {first}"))
        else:
            places[path] = (file, line)
    return places, faults


def _keys(
    node: yaml.Node, path: KeyPath, above: frozenset[int]
) -> Iterator[tuple[KeyPath, yaml.Node, bool]]:
    if id(node) in above:
        raise yaml.YAMLError("an alias that contains itself")
    inside = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            yield (*path, name), key, name in seen
            seen.add(name)
            yield from _keys(value, (*path, name), inside)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value, False
            yield from _keys(value, (*path, index), inside)


def dotted(path: KeyPath) -> str:
    """('data', 'train', 0, 'path') -> 'data.train[0].path'."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def merge(below: Document, above: Document) -> Document:
    """`above` laid over `below`, section by section; another adapter method replaces the whole adapter."""
    return _laid_over(below, above, _other_method)


def joined(first: Document, second: Document) -> Document:
    """Two that say one thing together, whichever comes first. Of what both say, the second counts."""
    return _laid_over(first, second, lambda *_: False)


def _laid_over(below: Document, above: Document, replaces: Replaces) -> Document:
    return Document(_merged(below.values, above.values, replaces), {**below.places, **above.places})


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], replaces: Replaces) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping) and not replaces(key, under, value):
            result[key] = _merged(under, value, replaces)
        else:
            result[key] = value
    return result


def _other_method(key: str, below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Fields of one adapter method mean nothing to another."""
    return key == "adapter" and "method" in above and method_of(above) != method_of(below)


def method_of(adapter: Mapping[str, Any]) -> str:
    """The method that an adapter's section names, in lower case; LoRA where it names none."""
    return str(adapter.get("method", "lora")).lower()
