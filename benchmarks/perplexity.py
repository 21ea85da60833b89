"""What each format of the weights costs: perplexity on this repository's own pages, which no model
has learned, beside llama.cpp on the file that the model came in.

    python benchmarks/perplexity.py [--formats bfloat16,int4] [--rows 512] [--json FILE]

The pages are tokenized once, and all get the same windows of token ids; the first token of each is
given, not scored. A product may have one form for many rows and another for few: --rows 1 computes
as decoding does, a token at a time, which takes a few minutes. Each format is a process of its own;
llama.cpp's runs in the virtual environment that compare.py describes (--peers), where the GGUF is.
"""

import argparse
import json
import subprocess
import sys
from math import exp, fsum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MODEL, GGUF = "smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMATS: dict[str, dict[str, Any]] = {  # name -> settings of nanovllm
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
    "gguf": {"dtype": "bfloat16", "quantization": "gguf"},
    "llama.cpp": {},
}
BASE = "bfloat16"


class Task(NamedTuple):
    """What every format computes.

    Attributes:
        windows: token ids. context: of the longest. rows: tokens computed at once.
        gguf: the file.
    """

    windows: list[list[int]]
    context: int
    rows: int
    gguf: str


class Found(NamedTuple):
    num_tokens: int
    perplexity: float


# Each of these is imported in its own process only.


def nanovllm(name: str, task: Task) -> Found:
    from nanovllm import LLM
    from nanovllm.perplexity import perplexity

    model = task.gguf if name == "gguf" else MODEL
    sizes = {"max_model_len": task.context + 1, "max_num_batched_tokens": task.rows}
    with LLM(model, **sizes, **FORMATS[name]) as llm:
        return Found(*perplexity(llm, task.windows))


def llama_cpp(task: Task) -> Found:
    import numpy as np
    from llama_cpp import Llama

    sizes = {"n_ctx": task.context, "n_batch": min(task.rows, task.context)}
    llm = Llama(task.gguf, **sizes, logits_all=True, verbose=False)
    logprobs: list[float] = []
    for window in task.windows:
        llm.reset()
        llm.eval(window)
        logits = llm.scores[: len(window) - 1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        found = logits[np.arange(len(logits)), window[1:]] - np.log(np.exp(logits).sum(axis=1))
        logprobs += found.tolist()
    return Found(len(logprobs), exp(-fsum(logprobs) / len(logprobs)))


def measure(name: str, task: Task) -> Found:
    return llama_cpp(task) if name == "llama.cpp" else nanovllm(name, task)


# The comparison


def obstacle(name: str, peers: Path) -> str:
    """What a format lacks and how to get it, or nothing."""
    from compare import missing  # beside this file

    if name == "gguf" and (peers / GGUF).exists():
        return ""
    return missing("llama.cpp", peers) if name in ("gguf", "llama.cpp") else ""


def cut_pages(context: int) -> list[list[int]]:
    """The pages as windows of token ids."""
    from nanovllm.models.checkpoint import locate
    from nanovllm.perplexity import cut
    from nanovllm.tokenizer import Tokenizer

    encode = Tokenizer(locate(MODEL)).encode
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [window for page in pages for window in cut(encode(page.read_text("utf-8")), context)]


def in_process(python: str, name: str, file: Path) -> Found:
    """Run `measure` in a process of the format's interpreter."""
    command = [python, "-P", __file__, "--measure", name, "--task", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-8:]) or f"rc {done.returncode}")
    return Found(*json.loads(done.stdout.splitlines()[-1]))


def compare(names: list[str], peers: Path, task: Task) -> dict[str, Found]:
    """What each format found; what cannot be had is named and left out."""
    results = {}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task))
        for name in names:
            if how := obstacle(name, peers):
                print(f"{name} is skipped; to have it: {how}", file=sys.stderr)
                continue
            python = str(peers / "bin/python") if name == "llama.cpp" else sys.executable
            try:
                results[name] = in_process(python, name, file)
            except RuntimeError as error:
                print(f"{name} failed and is left out:\n{error}", file=sys.stderr)
                continue
            print(f"{name:<12}{results[name].perplexity:.4f}", file=sys.stderr)
    return results


def table(results: dict[str, Found]) -> str:
    """In Markdown."""
    lines = [["weights", "tokens", "perplexity", f"/ {BASE}"], ["---", *["---:"] * 3]]
    for name, found in results.items():
        engine = f"llama.cpp {GGUF[-9:-5]}" if name == "llama.cpp" else f"nanovllm {name}"
        ratio = f"{found.perplexity / results[BASE].perplexity:.4f}" if BASE in results else ""
        lines.append([engine, f"{found.num_tokens:,}", f"{found.perplexity:.3f}", ratio])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="names between commas")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rows", type=int, default=512, help="tokens computed at once")
    parser.add_argument("--peers", type=Path, default="~/.cache/peers", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    for internal in ("--measure", "--task"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        task = Task(*json.loads(Path(args.task).read_text()))
        print("\n" + json.dumps(measure(args.measure, task)))
        return
    names = list(dict.fromkeys(args.formats.split(",")))
    for name in names:
        if name not in FORMATS:
            parser.error(f"no format {name!r}; there are {', '.join(FORMATS)}")
    if args.context < 2 or args.rows < 1:
        parser.error("--context must be at least 2, --rows at least 1")
    peers = args.peers.expanduser().absolute()
    task = Task(cut_pages(args.context), args.context, args.rows, str(peers / GGUF))
    results = compare(names, peers, task)
    print(table(results))
    if args.json:
        formats = {name: found._asdict() for name, found in results.items()}
        figures = {"context": args.context, "rows": args.rows, "formats": formats}
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
