"""docs/cluster.md lists the settings that there are."""

from dataclasses import MISSING, fields
from pathlib import Path

from megavar.launch.slurm import SlurmSettings

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"


def test_the_table_has_every_setting_with_its_default():
    section = PAGE.read_text().partition("## Settings")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    expected = []
    for setting in fields(SlurmSettings):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        expected.append(f"| `{setting.name}` | `{'null' if default is None else default}` |")
    assert [row[: len(start)] for row, start in zip(rows, expected, strict=True)] == expected
