"""The dependency rule: rooms import lower ones only, siblings never one another; heavy libraries have one home."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megavar"
LEVELS = [
    {"records", "record_files", "disk", "joins", "config", "progress", "ranks", "stopping", "liveness", "checksums"},
    {"objectives", "verifiers", "evaluation", "models", "packing", "sequences", "data", "runs"},
    {"checkpoints"},
    {"rollout", "training"},
    {"stages", "report"},
    {"cli", "launch", "__main__"},
]
TOP = len(LEVELS) - 1
HOMES = {
    "megatron": "training/",
    "transformer_engine": "training/",
    "aiohttp": "rollout/",
    "nemo_run": "launch/nemo.py",
    "omegaconf": "config/load.py",
}


def room_of(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(file: Path, relative: str) -> list[str]:
    room = relative.split("/")[0].removesuffix(".py")
    level = next((index for index, rooms in enumerate(LEVELS) if room in rooms), None)
    found = []
    for name in imports(file):
        top = name.split(".")[0]
        if top in HOMES and not relative.startswith(HOMES[top]):
            found.append(f"{relative} imports {top}, whose home is {HOMES[top]}")
        if top != "megavar" or level is None:
            continue
        other = room_of(name)
        lower = set().union(*LEVELS[:level])
        allowed = lower | {room} | (LEVELS[level] if level in (0, TOP) else set())
        if other not in allowed:
            found.append(f"{relative} imports {name}")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_dependency_rule(file):
    assert violations(file, str(file.relative_to(PACKAGE))) == []


def test_the_rule_sees_a_violation(tmp_path):
    file = tmp_path / "weights.py"
    file.write_text("from megavar.training.loop import train_model\nimport aiohttp\n")
    assert len(violations(file, "objectives/weights.py")) == 2
