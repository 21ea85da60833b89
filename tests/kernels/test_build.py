"""The native kernels are compiled once, and what goes wrong is said."""

import subprocess
from pathlib import Path

import pytest

from nanovllm.kernels.native import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small kernel to compile, and an empty cache."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "tile.h").write_text("#pragma once\n")
    source = tmp_path / "sources" / "one.cpp"
    source.write_text('#include "tile.h"\nextern "C" int answer() { return 41; }\n')
    return source


@needs_compiler
def test_a_library_is_compiled_once(
    one_source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build.library()
    assert made.parent == one_source.parent.parent / "cache" / "kernels"
    assert "Compiling kernels" in capsys.readouterr().err
    monkeypatch.setattr(subprocess, "Popen", None)
    assert build.library() == made
    assert capsys.readouterr().err == ""
    assert list(made.parent.iterdir()) == [made]


@needs_compiler
def test_the_library_goes_where_it_is_told(
    one_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_KERNEL_CACHE", str(tmp_path / "own"))
    assert build.library().parent == tmp_path / "own"


@needs_compiler
def test_other_sources_are_another_library(one_source: Path) -> None:
    made = build.library()
    (one_source.parent / "tile.h").write_text("#pragma once\n// changed\n")
    assert build.library() != made


@needs_compiler
def test_the_compilers_words_are_handed_on(one_source: Path) -> None:
    one_source.write_text("no C++")
    with pytest.raises(build.CompileError, match="does not name a type"):
        build.library()


def test_the_compiler_is_cxx_if_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own-c++"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("CXX", str(own))
    assert build.compiler() == str(own)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiler() is None
