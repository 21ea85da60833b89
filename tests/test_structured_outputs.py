"""Outputs that must have a form: with the built-in model they have it, and what cannot be had is
refused."""

import json
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.errors import InvalidRequestError, MissingDependencyError
from nanovllm.grammar import check_grammar, fault
from nanovllm.tokenizer import Tokenizer
from tests.llm.helpers import VOCAB_SIZE, assert_idle, tokens_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "floor": {"const": 3}},
            "required": ["city", "floor"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "kind", "tags", "home"],
    "additionalProperties": False,
}
GBNF = 'root ::= "x" number ("," number)? "."\nnumber ::= [0-9]{2}\n'
LARK = 'start: "x" NUMBER ("," NUMBER)? "."\nNUMBER: /[0-9]{2}/\n'
FIELDS = {field.name for field in fields(StructuredOutputsParams)}
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[LLM]:
    with LLM(smollm2, dtype="float32", max_model_len=512, num_kv_blocks=64) as llm:
        yield llm
        assert_idle(llm)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


def formed(temperature: float = 0, max_tokens: int = 100, **form: Any) -> SamplingParams:
    """Parameters of an output that must have this form; other names are SamplingParams'."""
    own = {name: form.pop(name) for name in FIELDS & form.keys()}
    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        structured_outputs=StructuredOutputsParams(**own),
        **{"seed": 1} | form,
    )


def text_of(llm: LLM, params: SamplingParams) -> str:
    """The text of an output that ended of itself."""
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    [completion] = output.outputs
    assert completion.finish_reason == "stop", completion
    return completion.text


def assert_is_of_schema(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "kind", "tags", "home"]
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert value["kind"] in ("cat", "dog")
    assert len(value["tags"]) <= 3 and all(isinstance(tag, str) for tag in value["tags"])
    assert list(value["home"]) == ["city", "floor"] and value["home"]["floor"] == 3


# What comes out


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_of_a_schema(llm: LLM, temperature: float) -> None:
    params = formed(temperature, json=SCHEMA, disable_any_whitespace=True)
    text = text_of(llm, params)
    assert_is_of_schema(text)
    assert '": ' not in text and "\n" not in text


def test_a_schema_may_be_text_and_white_space_a_pattern(llm: LLM) -> None:
    text = text_of(llm, formed(json=json.dumps(SCHEMA), whitespace_pattern=" "))
    assert_is_of_schema(text)
    assert text.startswith('{ "name": "') and "\n" not in text


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"\d{3}-[a-z]{2,4}"}, r"\d{3}-[a-z]{2,4}"),
        ({"regex": r"^(yes|no) \p{Lu}$"}, r"(yes|no) \w"),
        ({"choice": ["Berlin", 'a "quoted"\n|one', "Pa|ris"]}, r'Berlin|a "quoted"\n\|one|Pa\|ris'),
        ({"choice": ["\N{GRINNING FACE}", "\x7f"]}, "\N{GRINNING FACE}|\x7f"),
        ({"grammar": GBNF}, r"x\d\d(,\d\d)?\."),
        ({"grammar": LARK}, r"x\d\d(,\d\d)?\."),
    ],
)
def test_text_of_a(llm: LLM, form: dict[str, Any], pattern: str, temperature: float) -> None:
    assert re.fullmatch(pattern, text_of(llm, formed(temperature, **form)))


def test_any_json_object(llm: LLM) -> None:
    bias = {llm.get_tokenizer().encode("{}")[0]: -100.0}  # not the empty one
    params = formed(json_object=True, disable_any_whitespace=True, logit_bias=bias, max_tokens=400)
    [output] = llm.generate(['{"a": 1, "b": "c"}\n' * 3], params, use_tqdm=False)
    assert isinstance(json.loads(output.outputs[0].text), dict)


def test_samples_have_matchers_of_their_own(llm: LLM) -> None:
    params = formed(1, n=4, regex="[a-z]{4,9}!")
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    texts = [completion.text for completion in output.outputs]
    assert len(set(texts)) == 4 and all(re.fullmatch("[a-z]{4,9}!", text) for text in texts)
    single = formed(1, seed=3, regex="[a-z]{4,9}!")
    assert text_of(llm, single) == texts[2]


def test_requests_without_a_form_are_untouched_by_those_with_one(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=20)
    params = [free, formed(regex="[a-z]{9,12}"), free, formed(1, 20, json=SCHEMA)]
    prompts = [PROMPT, PROMPT, "Once upon a time", PROMPT]
    alone = [llm.generate([p], q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == tokens_of(alone)


def test_preemption_changes_nothing(llm: LLM, smollm2: Path) -> None:
    params = [formed(i % 2, json=SCHEMA, disable_any_whitespace=True) for i in range(3)]
    expected = tokens_of(llm.generate([PROMPT] * 3, params, use_tqdm=False))
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_kv_blocks": 6}
    with LLM(smollm2, **settings) as scarce:
        outputs = scarce.generate([PROMPT] * 3, params, use_tqdm=False)
        assert scarce.get_metrics()["num_preemptions_total"] > 0
        assert tokens_of(outputs) == expected


def test_reported_logprobs_are_the_models_own(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    forced = formed(choice=["Paris"], max_tokens=1, logprobs=1)
    first, second = llm.generate([PROMPT] * 2, [plain, forced], use_tqdm=False)
    assert first.outputs[0].logprobs and second.outputs[0].logprobs
    likeliest = first.outputs[0].token_ids[0]
    found, expected = (out.outputs[0].logprobs[0][likeliest] for out in (second, first))
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)


# A form together with other parameters


def test_a_complete_output_ends_before_min_tokens(llm: LLM) -> None:
    params = [formed(choice=["Paris"], min_tokens=9), formed(regex="[a-z]+", min_tokens=9)]
    done, going_on = llm.generate([PROMPT] * 2, params, use_tqdm=False)
    assert (done.outputs[0].text, done.outputs[0].finish_reason) == ("Paris", "stop")
    assert len(going_on.outputs[0].token_ids) > 9


def test_when_the_end_does_not_count_nothing_but_ends_follow(llm: LLM) -> None:
    params = formed(regex="[0-9]{2}", ignore_eos=True, max_tokens=12, skip_special_tokens=True)
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert re.fullmatch("[0-9]{2}", output.outputs[0].text)
    assert len(output.outputs[0].token_ids) == 12
    assert set(output.outputs[0].token_ids[3:]) <= llm.engine.core.eos_token_ids


def test_a_stop_token_may_come_when_the_output_is_complete(llm: LLM) -> None:
    [stop] = llm.get_tokenizer().encode("!")
    params = formed(regex="[0-9]{2}", ignore_eos=True, stop_token_ids=[stop])
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    ends = llm.engine.core.eos_token_ids | {stop}
    assert set(output.outputs[0].token_ids[-1:]) <= ends


def test_a_form_and_other_masks_that_leave_nothing_fail_the_request(llm: LLM) -> None:
    params = formed(regex="[0-9]+", allowed_token_ids=llm.get_tokenizer().encode("a"))
    [output] = llm.generate([PROMPT], params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    assert "no token is possible" in str(output.outputs[0].stop_reason)


# Memory


def test_matchers_are_forgotten_after_the_end_and_after_an_abort(llm: LLM) -> None:
    runner = llm.engine.core.executor.runner  # type: ignore[attr-defined]
    stream = llm.stream(PROMPT, formed(regex="[a-z]{40}"))
    next(stream)
    assert len(runner.grammars.progress) == 1
    stream.close()
    llm.generate([PROMPT], formed(choice=["a"]), use_tqdm=False)
    llm.generate([PROMPT], SamplingParams(max_tokens=1), use_tqdm=False)
    assert runner.grammars.progress == {}


def test_a_default_run_does_not_load_llguidance(smollm2: Path) -> None:
    code = (
        "import sys; from nanovllm import LLM, SamplingParams\n"
        f"with LLM({str(smollm2)!r}, max_model_len=64) as llm:\n"
        "    llm.generate('a', SamplingParams(max_tokens=1, top_k=5), use_tqdm=False)\n"
        "print({'llguidance', 'nanovllm.worker.grammar'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_what_was_checked_is_kept_up_to_a_bound(tokenizer: Tokenizer) -> None:
    fault.cache_clear()
    for i in range(fault.cache_info().maxsize + 3):  # type: ignore[operator]
        with pytest.raises(InvalidRequestError):
            check_grammar(StructuredOutputsParams(grammar=f"root ::= ({i}"), tokenizer, VOCAB_SIZE)
    assert fault.cache_info().currsize == fault.cache_info().maxsize
    spec = StructuredOutputsParams(regex="a+")
    for _ in range(2):
        check_grammar(spec, tokenizer, VOCAB_SIZE)
    assert fault.cache_info().hits == 1


# Refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"structured_outputs=\[\]: give exactly one of json, regex, choice"),
        ({"json_object": False}, "give exactly one of"),
        ({"regex": "a", "choice": ["a"]}, r"\['regex', 'choice'\]: give exactly one"),
        ({"regex": 5}, "regex=5: must be a string"),
        ({"regex": ""}, "regex=.*must not be empty"),
        ({"regex": "a" * 70_000}, "has 70000 characters; at most 65536"),
        ({"choice": []}, "choice=.*must not be empty"),
        ({"choice": "ab"}, "choice='ab': must be a list"),
        ({"choice": ["a", 1]}, "choice=1: must be a string"),
        ({"choice": ["\ud800"]}, "choice=.*not valid Unicode"),
        ({"json": "{"}, "json='{': is no JSON"),
        ({"json": "[1]"}, "must be a JSON schema"),
        ({"json": True}, "must be a JSON schema"),
        ({"json": {"const": float("nan")}}, "is no JSON"),
        ({"json": '{"properties":{"a":' * 3000 + "{}" + "}}" * 3000}, "nested too deeply"),
        ({"json": {"enum": ["x" * 1000] * 1000}}, "at most 65536"),
        ({"json_object": "yes"}, "json_object='yes': must be True or False"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern=' ': goes with JSON only"),
        ({"structural_tag": "x", "regex": "a"}, "structural_tag='x': is not supported; there are"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_fields_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        StructuredOutputsParams.make(given)
    assert caught.value.field.startswith("structured_outputs")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "(["}, "unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"[^\s\S]"}, "nothing has this form"),
        ({"regex": "(?:(?:a{0,500}){0,500}){0,500}"}, "too many expressions"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"$ref": "#"}}, "nothing has this form"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "does not fetch"),
        (
            {"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
            "unsatisfiable",
        ),
        ({"json": {"type": "integer", "multipleOf": 100_000_007}}, "takes more than 1 s"),
        ({"json": {}, "whitespace_pattern": "(["}, "unclosed character class"),
        ({"grammar": 'start: "a'}, "lexer error"),
        ({"grammar": "start: nope"}, "unknown name"),
        ({"grammar": "start: a\na: a"}, "nothing has this form"),
        ({"grammar": "hello"}, "Expected token"),
        ({"grammar": "start: " + "x? " * 3000 + '\nx: "a" | "b" x'}, "Too many items"),
        ({"grammar": "root ::= ("}, r"Expected '\)'"),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "recursion"),
        ({"grammar": f'root ::= "{"a" * 20_000}"'}, "at most 16384 characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_forms_that_are_refused(tokenizer: Tokenizer, form: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_grammar(StructuredOutputsParams(**form), tokenizer, VOCAB_SIZE)
    assert caught.value.field == f"structured_outputs.{next(iter(form))}"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_explosive_intersection_is_refused(tokenizer: Tokenizer) -> None:
    grammar = "start: A\nA: /.*/ & " + " & ".join(f"~/.*{i}.*/" for i in range(40))
    with pytest.raises(InvalidRequestError, match="to compile; simplify it"):
        check_grammar(StructuredOutputsParams(grammar=grammar), tokenizer, VOCAB_SIZE)


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(a|a)*{1000}"},
        {"regex": "[a-z]{1,100000}"},
        {"json": {"properties": {"a": {"$ref": "#"}}, "additionalProperties": False}},
        {"choice": [f"choice {i}" for i in range(3500)]},
    ],
    ids=lambda value: str(value)[:30],
)
def test_large_forms_that_can_be_borne(tokenizer: Tokenizer, form: dict[str, Any]) -> None:
    check_grammar(StructuredOutputsParams(**form), tokenizer, VOCAB_SIZE)


def test_a_refused_request_is_not_queued(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="unclosed"):
        llm.generate([PROMPT, PROMPT], [formed(choice=["a"]), formed(regex="([")], use_tqdm=False)
    wrong: Any = {"regex": "a"}
    with pytest.raises(InvalidRequestError, match="must be StructuredOutputsParams"):
        llm.generate([PROMPT], SamplingParams(structured_outputs=wrong), use_tqdm=False)
    assert_idle(llm)


def test_a_form_needs_a_tokenizer_and_llguidance(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StructuredOutputsParams(regex="a")
    with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        check_grammar(spec, None, VOCAB_SIZE)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"nano-vllm\[server\]"):
        check_grammar(spec, tokenizer, VOCAB_SIZE)


def test_several_threads_may_check_at_once(tokenizer: Tokenizer) -> None:
    found: list[str] = []

    def check(pattern: str) -> None:
        try:
            check_grammar(StructuredOutputsParams(regex=pattern), tokenizer, VOCAB_SIZE)
            found.append("fine")
        except InvalidRequestError:
            found.append("refused")

    threads = [threading.Thread(target=check, args=("q+" if i % 2 else "q(",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["fine"] * 3 + ["refused"] * 3


def test_forms_are_plain_data() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    spec = StructuredOutputsParams(json=schema)
    schema["type"] = "array"  # is not seen any more
    assert spec.json == '{"type": "object", "properties": {"b": {}, "a": {}}}'
    for form in (spec, StructuredOutputsParams(choice=["a", "b"])):
        assert pickle.loads(pickle.dumps(form)) == form
        assert hash(form) == hash(pickle.loads(pickle.dumps(form)))
