"""scripts/loc counts what it says it counts."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from tests.kernels.test_attention import needs_native

ROOT = Path(__file__).resolve().parent.parent
GENERATE = """
import sys
from nanovllm import LLM
with LLM(sys.argv[1], max_model_len=64) as llm:
    llm.generate("Hello", use_tqdm=False)
print(*(name for name in sys.modules if name.partition(".")[0] == "nanovllm"))
"""


@pytest.fixture(scope="module")
def loc() -> ModuleType:
    loader = SourceFileLoader("loc", str(ROOT / "scripts" / "loc"))
    spec = spec_from_loader("loc", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@needs_native  # elsewhere a default run takes other kernels
def test_the_path_is_what_a_default_generate_imports(loc: ModuleType, smollm2: Path) -> None:
    command = [sys.executable, "-c", GENERATE, str(smollm2)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    imported = set()
    for name in names:
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        imported.add(str(file.relative_to(ROOT / "nanovllm").with_suffix("")))
    assert imported == {*loc.PATH, *loc.BESIDE}


def test_only_code_counts(loc: ModuleType) -> None:
    source = '''"""A module."""
# a comment

def f(
    a,  # counts
):
    """Two
    lines."""
    return """not a
docstring"""
'''
    assert loc.code_lines(source) == 5


def test_comments_of_cpp_do_not_count(loc: ModuleType) -> None:
    source = """// A file.
#include "tile.h"

int f() {  // counts
  // why
  return 1;
}
"""
    assert loc.cpp_lines(source) == 4
