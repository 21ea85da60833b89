"""`nanovllm eval-ppl`: what it scores, prints and writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm.cli import main
from nanovllm.llm import LLM
from nanovllm.perplexity import cut, perplexity

TEXT = "The rain had not stopped for three days, and the river at the end of the garden rose.\n"
SMALL = ["--num-kv-blocks", "64"]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status of `nanovllm eval-ppl WORDS` and its line on stderr."""
    try:
        status = main(["eval-ppl", *words])
    except SystemExit as stop:
        status = int(str(stop.code))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err.removeprefix("nanovllm: error: ").rstrip("\n")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A long text and a short one."""
    texts = {"long.txt": TEXT * 3, "short.txt": "Über alles.\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return [str(tmp_path / name) for name in texts]


def test_each_text_is_cut_into_windows_of_its_own(
    tiny: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM(tiny, num_kv_blocks=64) as llm:
        ids = [llm.get_tokenizer().encode(Path(file).read_text("utf-8")) for file in files]
        num_tokens, value = perplexity(llm, [w for text in ids for w in cut(text, 20)])
    num_windows = sum(-(-len(text) // 20) for text in ids)
    assert num_tokens == sum(map(len, ids)) - num_windows
    result = tmp_path / "result.json"
    words = ["--model", str(tiny), *SMALL, "--context", "20", "--json", str(result)]
    assert main(["eval-ppl", files[0], *words, files[1]]) == 0
    expected = f"Tokens scored: {num_tokens}\nPerplexity: {value:.4f}\n"
    assert capsys.readouterr().out == expected
    assert json.loads(result.read_text()) == {
        "perplexity": pytest.approx(value, rel=1e-9),
        "num_tokens": num_tokens,
        "context": 20,
        "model": str(tiny),
        "dtype": "auto",
        "quantization": None,
        "files": files,
    }


def test_the_settings_of_an_engine_count(
    tiny: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval-ppl", files[0], "-m", str(tiny), *SMALL]
    shown = []
    for more in ([], ["--dtype", "float32"], ["-q", "int4"]):
        assert main([*words, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_what_is_impossible_is_refused_and_named(
    tiny: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin").write_bytes(b"\xdcber")
    (tmp_path / "empty").write_text("")
    usual = ["-m", str(tiny), *SMALL]
    for words, start in (
        ([], "FILE is missing"),
        ([str(tmp_path / "no")], f"FILE='{tmp_path}/no': name a text in UTF-8 ("),
        ([str(tmp_path / "latin")], f"FILE='{tmp_path}/latin': name a text in UTF-8 ("),
        ([str(tmp_path / "empty")], f"FILE='{tmp_path}/empty': holds fewer than two tokens"),
        ([files[0], "--context", "1"], "context=1: must be an integer from 2"),
        ([files[0], "--json", "/no/such/x"], "json='/no/such/x': name a file in a folder"),
        ([files[0], "--block-size", "0"], "block_size=0: must be"),
        ([files[0], "--skip-tokenizer-init"], "unrecognized arguments: --skip-tokenizer-init"),
        ([files[0], "--max-model-len", "32"], "context=512: 31 is the most here"),
    ):
        status, message = error_of([*words, *usual], capsys)
        assert (status, message[: len(start)]) == (2, start)


def test_a_context_longer_than_the_texts_needs_no_room(
    tiny: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [files[1], "-m", str(tiny), "--num-kv-blocks", "2", "--context", "100000"]
    assert main(["eval-ppl", *words]) == 0


def test_help_and_bad_values_load_no_torch() -> None:
    code = (
        "import sys, nanovllm.cli\n"
        "for words in (['--help'], ['x', '--context', '0'], ['/no/such/file']):\n"
        "    try: nanovllm.cli.main(['eval-ppl', *words])\n"
        "    except SystemExit: pass\n"
        "print('LOADED', {'torch', 'numpy', 'tokenizers', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("LOADED set()\n"), done.stderr
