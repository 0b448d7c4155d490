"""Every Python block of every README runs, block after block in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = sorted(
    x.relative_to(ROOT)
    for x in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "node_modules" for part in x.parts)
)


@pytest.mark.parametrize("path", READMES, ids=str)
def test_blocks_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / path).read_text()
    namespace = {"__name__": "readme"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text[: block.start()].count("\n") + 2
        source = "\n" * (line - 1) + block[1]  # so that a traceback names the line of the file
        exec(compile(source, str(path), "exec"), namespace)
