"""Read a run's YAML into `RunConfig`, and write the resolved one back. The only importer of omegaconf."""

from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megavar.config.schema import RunConfig, validate


def load_config(file: Path, overrides: list[str]) -> RunConfig:
    """Merge, weakest first: defaults, the files named in `include`, `file`, `overrides`.

    Args:
        file: a YAML file; its optional key `include` lists other YAML files, relative to it.
        overrides: `key.path=value` strings.

    Raises:
        ValueError: for a missing file, an unknown key, a value of the wrong type or out of range.
    """
    if not file.is_file():
        raise ValueError(f"No config file {file}; give a YAML file such as conf/demo.yaml.")
    bad = [item for item in overrides if "=" not in item]
    if bad:
        raise ValueError(f"Override {bad[0]!r} is not of the form key=value, for example sample.num_traces=4.")
    try:
        top = OmegaConf.load(file)
        if not isinstance(top, DictConfig):
            raise ValueError(f"{file} is not a mapping of keys to values.")
        included = [OmegaConf.load(file.parent / name) for name in top.pop("include", [])]
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), *included, top, *map(_override, overrides))
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ValueError(
                f"{file}: no value for {', '.join(sorted(missing))}; set each in the file or as key=value."
            )
        config = cast(RunConfig, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    validate(config)
    return config


def _override(item: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([item])
    except YAMLError as error:
        raise ValueError(
            f"Override {item!r} has a value that is not valid YAML: {' '.join(str(error).split())}; quote the value."
        ) from error


def save_config(config: RunConfig, file: Path) -> None:
    """Write the resolved configuration as YAML."""
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
