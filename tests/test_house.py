"""The house is intact: who imports whom, what may stand where, and that the checks themselves can fail."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# room: what it may import of this project ("*" is the room's own files)
ROOMS = {
    "errors": set(),
    "types": {"errors"},
    "functional": {"errors", "types"},
    "assets": {"errors"},
    "records": {"errors"},
    "specs": {"errors", "types"},
    "encoding": {"errors", "types", "assets"},
    "models": {"errors", "types", "functional", "encoding", "assets", "records"},
    "data": {"errors", "types", "functional", "encoding", "assets", "records"},
    "modules": {"errors", "types", "functional", "models", "encoding", "specs"},
    "callbacks": {"errors", "types", "functional", "models", "records", "specs", "plots", "plots_reward"},
    "plots": {"errors", "functional", "records"},
    "plots_reward": {"plots"},
    "report": {"errors", "functional", "records", "plots", "report_parts", "report_constraints", "report_reward"},
    "report_parts": {"functional"},
    "report_constraints": {"records", "plots", "plots_constraints", "report_parts"},
    "plots_constraints": {"records", "plots"},
    "report_reward": {"errors", "functional", "records", "plots", "plots_reward", "report_parts"},
    "judge": {"errors", "types", "records"},
}
BANNED = {
    "functional": {"lightning", "transformers", "peft", "datasets"},
    "models": {"lightning"},
    "types": {"lightning", "transformers", "numpy"},
    "report": {"torch", "lightning", "transformers"},
    "report_parts": {"torch", "lightning", "transformers"},
    "report_reward": {"torch", "lightning", "transformers"},
    "report_constraints": {"torch", "lightning", "transformers"},
    "plots": {"torch", "lightning", "transformers"},
    "plots_reward": {"torch", "lightning", "transformers"},
    "plots_constraints": {"torch", "lightning", "transformers"},
    "records": {"torch", "lightning", "transformers"},
    "judge": {"torch", "lightning", "transformers"},
}


def room_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return parts[0] if parts[0] == "callbacks" else parts[1] if len(parts) > 1 else parts[0]


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = node.module in ("lit_rlhf", "callbacks")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def violations(root: Path) -> list[str]:
    bad = []
    files = [p.relative_to(root) for top in ("lit_rlhf", "callbacks") for p in (root / top).rglob("*.py")]
    for path in files:
        room = room_of(path)
        for name in imports((root / path).read_text()):
            top, _, rest = name.partition(".")
            target = "callbacks" if top == "callbacks" else rest.split(".")[0] if top == "lit_rlhf" else None
            if top in BANNED.get(room, set()):
                bad.append(f"{path} imports {name}")
            if target and room in ROOMS and target not in ROOMS[room] | {room}:
                bad.append(f"{path} imports {name}")
    return bad


def test_rooms_import_only_what_they_may():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("functional", "import lightning"),
        ("functional", "from lit_rlhf.models.backbone import Backbone"),
        ("models", "from lit_rlhf.modules import SFTModule"),
        ("functional", "from lit_rlhf import modules"),
        ("data", "from lit_rlhf.models.backbone import Backbone"),
    ],
)
def test_a_planted_violation_is_reported(tmp_path, room, line):
    folder = tmp_path / "lit_rlhf" / room
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text(line + "\n")
    (found,) = violations(tmp_path)
    assert found.startswith(f"lit_rlhf/{room}/planted.py imports {line.split()[1]}")


def modules():
    found = []
    for top in ("lit_rlhf", "callbacks"):
        package = importlib.import_module(top)
        found += [m.name for m in pkgutil.walk_packages(package.__path__, f"{top}.")]
    return found


def test_every_module_imports():
    names = modules()
    assert len(names) > 20
    for name in names:
        importlib.import_module(name)


def test_the_front_door_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from lit_rlhf.front import main; main([]); main(['--help']); main(['--version']);"
        "import lit_rlhf.report; "
        "heavy = {'torch', 'lightning', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_no_tolerance_hides_a_wrong_number():
    pattern = re.compile(r"rtol\s*=\s*([0-9.e+-]+)|rel\s*=\s*([0-9.e+-]+)")
    for path in (ROOT / "tests" / "functional").glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in pattern.finditer(line):
                value = float(match.group(1) or match.group(2))
                assert value <= 0.1, f"{path.name}:{number} tolerates {value}"
                assert value <= 1e-3 or "#" in line, f"{path.name}:{number} tolerates {value} without a comment"


def test_nothing_committed_names_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    forbidden = re.compile("|".join(["/wo" + "rk/", "/ro" + "ot/", r"\.\./sha" + "red", "/ho" + "me/[a-z]"]))
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".smk", ".j2", ".txt"} and path.exists():
            assert not forbidden.search(path.read_text(errors="ignore")), name


def test_importing_has_no_side_effects(tmp_path):
    code = "import lit_rlhf.modules, lit_rlhf.data, callbacks, lit_rlhf.report"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
