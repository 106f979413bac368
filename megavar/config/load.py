"""Read a run's YAML into `RunConfig`, and write the resolved one back. The only importer of omegaconf."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megavar.config.schema import EvaluationConfig, RunConfig, validate

MAX_NODES = 100_000
"""Of a file, its aliases written out: nobody writes more, and a few aliases of aliases make billions."""
MAX_DEPTH = 50
MAX_MESSAGE_CHARACTERS = 400
Settings = TypeVar("Settings")
_RESOLVER = re.compile(r"\$\{[^}]*:")


def load_config(file: Path, overrides: list[str]) -> RunConfig:
    """Merge, weakest first: defaults, the files named in `include`, `file`, `overrides`.

    Args:
        file: a YAML file; its optional key `include` lists other YAML files, relative to it.
        overrides: `key.path=value` strings.

    Raises:
        ValueError: for a missing file, one that is not sound YAML, an unknown key, a value of the wrong type or out of
            range; with file and line, or the override.
    """
    return _resolve(RunConfig, file, [*_layers(file), *_overrides(overrides)])


def load_evaluation(file: Path | None, overrides: list[str]) -> EvaluationConfig:
    """The sections of an evaluation without a run, merged as `load_config` does.

    Args:
        file: a YAML file with some or all keys of a run, such as conf/eval/paper.yaml or a run's config.yaml; None:
            the defaults.

    Raises:
        ValueError: as `load_config`, and for an override of a section that is not read.
    """
    names = [item.name for item in fields(EvaluationConfig)]
    for item in overrides:
        if "=" in item and item.partition("=")[0].split(".")[0] not in names:
            raise ValueError(f"Override {item!r:.200} has no effect on an evaluation, which reads {', '.join(names)}.")
    source, layers = file or Path("the command line"), [] if file is None else _layers(file)
    with _merging(source):
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), *layers, *_overrides(overrides))
        values: dict[str, Any] = {name: OmegaConf.select(merged, name) for name in names}
        sections = {name: OmegaConf.to_object(value) for name, value in values.items() if OmegaConf.is_config(value)}
        config = EvaluationConfig(**{**values, **sections})
    validate(config)
    return config


def _layers(file: Path) -> list[DictConfig]:
    """A file and what it includes, weakest first."""
    top = _read(file)
    names = top.pop("include", OmegaConf.create([]))
    if not isinstance(names, ListConfig) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: include={names!r:.100} is not a list of file names, such as [base.yaml].")
    return [*(_read(file.parent / name) for name in names), top]


def _with_list(values: DictConfig) -> DictConfig:
    """`reuse` of one run, as the list that it is."""
    given = cast(dict[str, Any], OmegaConf.to_container(values, resolve=False)).get("reuse")
    if isinstance(given, str):
        values["reuse"] = [given]
    return values


def _overrides(items: list[str]) -> list[DictConfig]:
    bad = [item for item in items if "=" not in item]
    if bad:
        raise ValueError(f"Override {bad[0]!r} is not of the form key=value, for example sample.num_traces=4.")
    return list(map(_override, items))


def load_settings(kind: type[Settings], file: Path) -> Settings:
    """Read a YAML file of other settings than a run's into their dataclass, with the same checks.

    Raises:
        ValueError: as `load_config`.
    """
    return _resolve(kind, file, [_read(file)])


def _resolve(kind: type[Settings], file: Path, layers: list[DictConfig]) -> Settings:
    """Merge the layers, weakest first, over the defaults of a dataclass, and check the values."""
    with _merging(file):
        merged = OmegaConf.merge(OmegaConf.structured(kind), *layers)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ValueError(
                f"{file}: no value for {', '.join(sorted(missing))}; set each in the file or as key=value."
            )
        settings = cast(Settings, OmegaConf.to_object(merged))
    validate(settings)
    return settings


@contextmanager
def _merging(source: Path) -> Iterator[None]:
    """Turn what OmegaConf raises into one line that names the file and the key."""
    try:
        yield
    except (OmegaConfBaseException, TypeError, AttributeError, RecursionError, OverflowError) as error:
        key = getattr(error, "full_key", None)
        place = f"{source}: {_printable(str(key))}" if key else str(source)
        raise ValueError(f"{place}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    first = (str(error).split("\n") or [""])[0] or type(error).__name__
    return _printable(first[:MAX_MESSAGE_CHARACTERS])


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _read(file: Path) -> DictConfig:
    """One YAML file, checked before its values are."""
    if not file.is_file():
        raise ValueError(f"No config file {file}; give a YAML file such as conf/demo.yaml.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text ({_first_line(error)}).") from error
    with _parsing(str(file)):
        _check(text, str(file))
        found = OmegaConf.create(text)
    if not isinstance(found, DictConfig):
        raise ValueError(f"{file} is not a mapping of keys to values.")
    return _with_list(found)


@contextmanager
def _parsing(source: str) -> Iterator[None]:
    """Turn what YAML parsers raise into one line; `source` names the text."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{source}{line} is not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError, AssertionError) as error:
        if isinstance(error, _Mistake):
            raise
        raise ValueError(f"{source} is not valid YAML: {' '.join(_first_line(error).split())}.") from error


def _check(text: str, source: str) -> None:
    """Refuse YAML that no configuration needs; see `_check_node`."""
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if root is not None:
        _check_node(root, source, {}, 0)


class _Mistake(ValueError):
    """Its message names the place."""


def _check_node(node: yaml.Node, source: str, sizes: dict[int, int], depth: int) -> int:
    """Number of nodes below this one, aliases written out.

    Raises:
        ValueError: for doubled or complex keys, references to the environment, or too many or too deep nodes.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
    else:
        where = f"{source}, line {node.start_mark.line + 1}"
        if depth > MAX_DEPTH:
            raise _Mistake(f"{where}: nested deeper than {MAX_DEPTH} levels.")
        sizes[id(node)] = MAX_NODES  # what an alias inside of its own node counts
        size = 1
        if isinstance(node, yaml.ScalarNode) and _RESOLVER.search(node.value):
            raise _Mistake(
                f"{where}: {node.value!r:.100} asks for a resolver; only keys can be referred to, such as ${{seed}}. "
                "What the environment holds (a path, never a secret: values are saved with the run) is given on the "
                'command line as key="$NAME".'
            )
        lines: dict[str, int] = {}
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise _Mistake(f"{where}: a key must be a plain name.")
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _Mistake(
                    f"{source}, line {line}: the key {key.value!r:.99} is on line {lines[key.value]} already; keep one."
                )
            lines[key.value] = line
            size += 1 + _check_node(value, source, sizes, depth + 1)
        for item in node.value if isinstance(node, yaml.SequenceNode) else ():
            size += _check_node(item, source, sizes, depth + 1)
        sizes[id(node)] = size
    if size >= MAX_NODES:
        raise _Mistake(
            f"{source}, line {node.start_mark.line + 1}: more than {MAX_NODES:,} values, aliases written out."
        )
    return size


def _override(item: str) -> DictConfig:
    """One `key.path=value`, whose value is YAML."""
    _, _, value = item.partition("=")
    source = f"Override {item!r:.200}"
    if not item.isprintable() and any(not (char.isprintable() or char in "\n\t") for char in item):
        raise ValueError(f"{source} contains a control character or half of a character; remove it.")
    try:
        with _parsing(source):
            _check(value, source)
    except _Mistake:
        raise
    except ValueError as error:
        raise ValueError(f"{error} Quote the value.") from error
    try:
        return _with_list(OmegaConf.from_dotlist([item]))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{source} cannot be read: {' '.join(_first_line(error).split())}; quote the value."
        ) from error


def save_config(config: RunConfig | EvaluationConfig, file: Path) -> None:
    """Write the resolved configuration as YAML."""
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
