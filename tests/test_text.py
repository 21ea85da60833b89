"""The text of a request and what ends it, with SmolLM2's tokenizer and an executor that says a
given line. Token 2, <|im_end|>, is the model's own end; 0, <|endoftext|>, is another."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import CompletionOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text_engine import Request, TextEngine
from nanovllm.tokenizer import HALF, Tokenizer
from tests.core.fakes import Rig

EOS, OTHER_EOS = 2, 0
LINE = "Hello wonderful day, my friend"


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


class Speaker:
    """An engine whose every request goes on with the given tokens, and then with the end."""

    def __init__(
        self, tokenizer: Tokenizer | None, line: list[int], eos: tuple[int, ...] = (EOS,)
    ) -> None:
        def say(tokens: list[int]) -> int:
            said = len(tokens) - len(self.prompt)
            return line[said] if said < len(line) else EOS

        self.prompt = [30, 40, 50]
        self.rig = Rig(num_blocks=256, max_num_batched_tokens=256, sample=say, eos_token_ids=eos)
        self.engine = TextEngine(self.rig.engine, tokenizer, 49_152)

    def submit(self, **params: Any) -> Request:
        prepared = self.engine.prepare(self.prompt, SamplingParams(**params))
        return self.engine.submit(prepared)

    def shown(self, request: Request) -> list[str]:
        """Run to the end; the text that may be shown after each step."""
        texts = []
        while not request.finished:
            assert self.engine.step()
            texts.append(self.engine.output(request, partial=True).outputs[0].text)
        assert not self.rig.engine.has_unfinished
        return texts

    def output(self, request: Request) -> CompletionOutput:
        [output] = self.engine.output(request).outputs
        return output


def speak(tokenizer: Tokenizer, line: str | list[int], **params: Any) -> CompletionOutput:
    """What comes of a request whose tokens are this line and then the end."""
    token_ids = tokenizer.encode(line) if isinstance(line, str) else line
    speaker = Speaker(tokenizer, token_ids)
    request = speaker.submit(**{"max_tokens": 100, **params})
    speaker.shown(request)
    return speaker.output(request)


def pieces(tokenizer: Tokenizer, line: str) -> list[str]:
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(line)]


def test_the_line_of_these_tests_has_these_tokens(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, LINE) == ["Hello", " wonderful", " day", ",", " my", " friend"]


# The model's end, and the length


def test_the_models_end_is_a_token_without_text_or_reason(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE)
    assert output.text == LINE
    assert output.token_ids == [*tokenizer.encode(LINE), EOS]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_max_tokens_ends_in_the_midst(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, max_tokens=2)
    assert output.text == "Hello wonderful"
    assert output.token_ids == tokenizer.encode("Hello wonderful")
    assert (output.finish_reason, output.stop_reason) == ("length", None)


def test_half_a_character_at_the_end_is_shown_then_only(tokenizer: Tokenizer) -> None:
    line = tokenizer.encode("x😀")
    speaker = Speaker(tokenizer, line)
    request = speaker.submit(max_tokens=len(line) - 1)
    assert speaker.shown(request) == ["x", "x", "x" + HALF]


def test_ignore_eos_goes_on(tokenizer: Tokenizer) -> None:
    line = [*tokenizer.encode("Hi"), EOS, *tokenizer.encode(" there")]
    output = speak(tokenizer, line, ignore_eos=True, max_tokens=3)
    assert (output.text, output.token_ids) == ("Hi there", line)
    assert output.finish_reason == "length"
    shown = speak(tokenizer, line, ignore_eos=True, max_tokens=3, skip_special_tokens=False)
    assert shown.text == "Hi<|im_end|> there"


# Stop strings


def test_a_stop_string_within_a_token_cuts_the_text_and_not_the_tokens(
    tokenizer: Tokenizer,
) -> None:
    output = speak(tokenizer, LINE, stop="nder")
    assert output.text == "Hello wo"
    assert output.token_ids == tokenizer.encode("Hello wonderful")
    assert (output.finish_reason, output.stop_reason) == ("stop", "nder")


def test_a_stop_string_may_lie_across_tokens(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, stop=["lo wonderful d"])
    assert output.text == "Hel"
    assert output.token_ids == tokenizer.encode("Hello wonderful day")
    assert (output.finish_reason, output.stop_reason) == ("stop", "lo wonderful d")


def test_a_stop_string_may_be_the_first_thing_said(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, stop="Hello")
    assert (output.text, output.token_ids) == ("", tokenizer.encode("Hello"))


def test_a_stop_string_that_never_comes_changes_nothing(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, stop=["goodbye", "frienD"])
    assert (output.text, output.stop_reason) == (LINE, None)


def test_of_several_stop_strings_the_first_in_the_text_counts(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, stop=["friend", "day", "my"])
    assert (output.text, output.stop_reason) == ("Hello wonderful ", "day")
    output = speak(tokenizer, LINE, stop=["ful", "on"])  # one token completes both
    assert (output.text, output.stop_reason) == ("Hello w", "on")


def test_a_stop_string_is_found_where_it_first_occurs(tokenizer: Tokenizer) -> None:
    assert speak(tokenizer, "aaab", stop="aab").text == "a"
    assert speak(tokenizer, LINE, stop="e").text == "H"


def test_a_stop_string_can_be_shown(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, stop="nder", include_stop_str_in_output=True)
    assert output.text == "Hello wonder"
    assert output.token_ids == tokenizer.encode("Hello wonderful")
    assert output.stop_reason == "nder"


def test_a_stop_string_in_the_prompt_or_half_in_it_does_not_count(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode(LINE))
    speaker.prompt[:] = tokenizer.encode("day and day: He")
    request = speaker.submit(stop=["and", "HeHello", " He"], max_tokens=100)
    speaker.shown(request)
    assert speaker.output(request).text == LINE


def test_a_stop_string_of_characters_that_are_several_tokens(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, "ab😀cd", stop="😀")
    assert (output.text, output.stop_reason) == ("ab", "😀")
    assert output.token_ids == tokenizer.encode("ab😀")


def test_a_stop_string_that_the_last_allowed_token_completes_is_the_reason(
    tokenizer: Tokenizer,
) -> None:
    output = speak(tokenizer, LINE, stop="nder", max_tokens=2)
    assert output.text == "Hello wo"
    assert (output.finish_reason, output.stop_reason) == ("stop", "nder")


# min_tokens


def test_a_stop_string_within_min_tokens_is_no_stop(tokenizer: Tokenizer) -> None:
    line = "one two one two one"
    assert pieces(tokenizer, line) == ["one", " two", " one", " two", " one"]
    assert speak(tokenizer, line, stop="one", min_tokens=1).text == "one two "
    assert speak(tokenizer, line, stop="one", min_tokens=2).text == "one two "
    assert speak(tokenizer, line, stop="one", min_tokens=3).text == "one two one two "
    assert speak(tokenizer, line, stop="one", min_tokens=5).text == line


@pytest.mark.parametrize("longer", [[], ["something much longer than the line is so far"]])
def test_a_stop_string_within_min_tokens_stays_none_afterwards(
    tokenizer: Tokenizer, longer: list[str]
) -> None:
    output = speak(tokenizer, LINE, stop=["won", *longer], min_tokens=2)
    assert (output.text, output.stop_reason) == (LINE, None)


def test_a_stop_string_that_is_complete_after_min_tokens_is_one(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, stop="ful day", min_tokens=2)
    assert (output.text, output.stop_reason) == ("Hello wonder", "ful day")


# Stop tokens


def test_a_stop_token_ends_the_output_and_has_no_text(tokenizer: Tokenizer) -> None:
    [day] = tokenizer.encode(" day")
    output = speak(tokenizer, LINE, stop_token_ids=[7, day])
    assert output.text == "Hello wonderful"
    assert output.token_ids == tokenizer.encode("Hello wonderful day")
    assert (output.finish_reason, output.stop_reason) == ("stop", day)


def test_a_stop_token_can_be_shown(tokenizer: Tokenizer) -> None:
    [day] = tokenizer.encode(" day")
    output = speak(tokenizer, LINE, stop_token_ids=[day], include_stop_str_in_output=True)
    assert (output.text, output.stop_reason) == ("Hello wonderful day", day)


def test_the_models_end_can_be_shown(tokenizer: Tokenizer) -> None:
    show = {"include_stop_str_in_output": True}
    assert speak(tokenizer, "Hi", **show).text == "Hi"
    assert speak(tokenizer, "Hi", **show, skip_special_tokens=False).text == "Hi<|im_end|>"
    assert speak(tokenizer, "Hi", skip_special_tokens=False).text == "Hi"


def test_the_models_end_named_as_a_stop_token_has_no_reason(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, "Hi", stop_token_ids=[EOS])
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_the_models_end_ignored_but_named_as_a_stop_token_is_the_reason(
    tokenizer: Tokenizer,
) -> None:
    output = speak(tokenizer, "Hi", stop_token_ids=[EOS], ignore_eos=True)
    assert (output.finish_reason, output.stop_reason) == ("stop", EOS)


def test_any_end_of_several_that_the_model_has_ends(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, [*tokenizer.encode("Hi"), OTHER_EOS], eos=(EOS, OTHER_EOS))
    request = speaker.submit(max_tokens=100)
    speaker.shown(request)
    output = speaker.output(request)
    assert (output.text, output.token_ids[-1]) == ("Hi", OTHER_EOS)
    assert output.finish_reason == "stop"


# What is shown while it goes on


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode(LINE))
    request = speaker.submit(stop=["lo wonderful night"], max_tokens=100)
    texts = speaker.shown(request)
    assert "Hello".startswith(texts[0]) and texts[0] in ("", "H", "He", "Hel")
    assert texts[-1] == LINE


def test_a_text_shorter_than_the_stop_string_is_held_back_too(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode(LINE))
    assert speaker.shown(speaker.submit(stop="Hello wonderful day")) == ["", "", ""]


def test_without_stop_strings_all_text_is_shown_at_once(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode("Hello wonderful day"))
    assert speaker.shown(speaker.submit()) == [
        "Hello",
        "Hello wonderful",
        "Hello wonderful day",
        "Hello wonderful day",
    ]


@given(
    st.text("ab 😀", min_size=1, max_size=30),
    st.lists(st.text("ab 😀", min_size=1, max_size=5), max_size=3),
    st.booleans(),
    st.integers(0, 6),
    st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_what_was_shown_is_never_taken_back(
    tokenizer: Tokenizer, line: str, stop: list[str], include: bool, least: int, most: int
) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode(line))
    params = {"stop": stop, "include_stop_str_in_output": include}
    request = speaker.submit(min_tokens=min(least, most), max_tokens=most, **params)
    texts = speaker.shown(request)
    for before, after in pairwise(texts):
        assert after.startswith(before)
    output = speaker.output(request)
    assert texts[-1] == output.text
    assert all(HALF not in text for text in texts[:-1])
    if least == 0:  # the text ends before the first stop string, or has none
        ends = [line.index(one) + len(one) * include for one in stop if one in output.text]
        assert not ends or (include and output.text.endswith(str(output.stop_reason)))
        if output.finish_reason == "stop" and output.stop_reason is not None:
            assert output.stop_reason in stop
        elif output.finish_reason == "stop":
            assert output.text == line


# Tokens only, several samples, errors


def test_without_detokenizing_there_is_no_text(tokenizer: Tokenizer) -> None:
    output = speak(tokenizer, LINE, detokenize=False)
    assert (output.text, output.token_ids) == ("", [*tokenizer.encode(LINE), EOS])


def test_stop_strings_without_detokenizing_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError) as found:
        speak(tokenizer, LINE, detokenize=False, stop="day")
    assert found.value.field == "stop"


def test_without_a_tokenizer_token_ids_still_come_and_stop_tokens_count() -> None:
    speaker = Speaker(None, [5, 6, 7, 8])
    request = speaker.submit(stop_token_ids=[7])
    speaker.shown(request)
    output = speaker.output(request)
    assert (output.text, output.token_ids, output.stop_reason) == ("", [5, 6, 7], 7)


def test_each_sample_has_a_text_of_its_own(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode(LINE))
    request = speaker.submit(n=3, stop="day", max_tokens=100)
    while not request.finished:
        speaker.engine.step()
    outputs = speaker.engine.output(request).outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    assert [output.text for output in outputs] == ["Hello wonderful "] * 3


def test_an_aborted_request_keeps_what_it_has(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode(LINE))
    request = speaker.submit(max_tokens=100)
    speaker.engine.step()
    speaker.engine.step()
    speaker.engine.abort(request)
    output = speaker.output(request)
    assert request.finished
    assert (output.text, output.finish_reason) == ("Hello wonderful", "abort")
    assert not speaker.rig.engine.has_unfinished


def test_an_error_in_detokenizing_ends_that_request_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = Speaker(tokenizer, tokenizer.encode(LINE))
    broken, whole = speaker.submit(max_tokens=100), speaker.submit(max_tokens=100)

    def fail(token_id: int) -> str:
        raise ValueError("no text for this")

    speaker.engine.step()
    monkeypatch.setattr(broken.texts[0].detokenizer, "push", fail)
    speaker.shown(whole)
    output = speaker.output(broken)
    assert (output.finish_reason, output.text) == ("error", "Hello")
    assert output.stop_reason == "ValueError: no text for this"
    output = speaker.output(whole)
    assert (output.finish_reason, output.text) == ("stop", LINE)
