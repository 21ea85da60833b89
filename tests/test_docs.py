"""The code in the documents runs, and prints what the documents say.

Each file is one session: its ```python blocks run in order and share their names. A ```output block
after one holds all that it prints. "```python no-run: REASON" is only compiled.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "serving.md")
FILES = [ROOT / "README.md", *PAGES]  # serving.md needs a server: tests/server/test_serving_docs.py
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str, str]]:
    """(line of the first line of its body, what stands behind the fence, body) of each."""
    return [
        (text.count("\n", 0, match.start("body")), match["info"].strip(), match["body"])
        for match in FENCE.finditer(text)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_code_in_a_document_runs_and_prints_what_it_says(path: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for line, info, body in blocks(path.read_text()):
        if info == "output":
            assert printed == body, f"{path.name}:{line + 1}"
        printed = None
        if info.split() and info.split()[0] == "python":
            code = compile("\n" * line + body, str(path), "exec")  # tracebacks show the right line
            if info == "python":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, names)
                printed = out.getvalue()
            else:
                assert re.fullmatch(r"python no-run: \w.*", info), f"{path.name}:{line}: {info}"


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n\n```python\nx = 1\n```\nb\n```output\n1\n```\n"
    assert blocks(text) == [(3, "python", "x = 1\n"), (7, "output", "1\n")]
