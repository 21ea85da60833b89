"""Text to tokens and back, whole and token by token, with two kinds of tokenizer: SmolLM2's
(pieces of bytes) and one like Llama 2's (words that carry their space, bytes as a fallback)."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from nanovllm.bad_words import bad_token_ids
from nanovllm.errors import InvalidRequestError, ModelLoadError
from nanovllm.tokenizer import HALF, Detokenizer, Tokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces,\n\n a tab\t and a line\r\n",
    "naïve café, \u00c5 and A\u030a",  # one character, and A with a combining ring
    "日本語のテキストと中文和한국어",
    "😀 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷",
    "עברית العربية हिन्दी ไทย",
    "\U0001d518\U0001d52b \U0001f9ff \x00\x7f",
    "def f(x):\n    return x ** 2  # ²",
    "<|im_start|>user\nHi<|im_end|>",
    "a real \ufffd in the text \ufffd",
    "",
]
# SmolLM2 has no token for some bytes, which only these and unassigned planes need.
CHARACTERS = st.characters(
    exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF
)


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="session")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words carry the space before them, a text loses its first one, and what is no word is
    bytes, each a token of its own."""
    words = ["▁Hello", "▁world", "▁a", "▁", "b", "c", "!", "▁the"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    folder = tmp_path_factory.mktemp("spaced")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def ids_of(tokenizer: Tokenizer, *names: str) -> list[int]:
    found = [tokenizer.backend.token_to_id(name) for name in names]
    assert None not in found
    return found


def stream(
    tokenizer: Tokenizer, token_ids: list[int], context: list[int] | None = None, skip: bool = True
) -> list[str]:
    """What each token shows, and what the end does."""
    detokenizer = Detokenizer(tokenizer, context or [], skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


# Whole


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_encoded_is_decoded_again(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(st.text(CHARACTERS))
@settings(max_examples=200, deadline=None)
def test_any_text_is_decoded_again(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_ids_are_those_of_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello") == ids_of(tokenizer, "Hello")
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("") == []


def test_special_tokens_are_left_out_or_shown(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("<|im_start|>Hi<|im_end|>")
    assert tokenizer.decode(token_ids) == "Hi"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<|im_start|>Hi<|im_end|>"


def test_a_long_text_is_neither_cut_nor_padded(tmp_path: Path, smollm2: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode("one two three four five six")) == 6


@pytest.mark.parametrize("text", ["\ud83d", "half \udc00 a pair", "\udfff\ud800"])
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="not valid Unicode") as found:
        tokenizer.encode(text)
    assert (found.value.field, found.value.value) == ("prompt", text)
    str(found.value).encode()  # the message can be printed


def test_the_forms_of_a_bad_word_are_how_it_begins_a_text_and_follows_a_space(
    tokenizer: Tokenizer,
) -> None:
    assert bad_token_ids(["world"], tokenizer) == [
        ids_of(tokenizer, "world"),
        ids_of(tokenizer, "Ġworld"),
    ]


def test_a_word_given_with_its_space_is_banned_without_it_too(tokenizer: Tokenizer) -> None:
    assert bad_token_ids([" world"], tokenizer) == bad_token_ids(["world"], tokenizer)


# Token by token


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_whole(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    for skip in (True, False):
        expected = tokenizer.decode(token_ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, token_ids, skip=skip)) == expected


@given(st.text(CHARACTERS, min_size=1), st.integers(0, 10))
@settings(max_examples=300, deadline=None)
def test_no_piece_of_any_text_holds_half_a_character(
    tokenizer: Tokenizer, text: str, num_context: int
) -> None:
    assume(HALF not in text)
    token_ids = tokenizer.encode(text)
    context, output = token_ids[:num_context], token_ids[num_context:]
    before = tokenizer.decode(context, skip_special_tokens=False).rstrip(HALF)
    pieces = stream(tokenizer, output, context, skip=False)
    assert "".join(pieces) == text[len(before) :]
    assert pieces[-1] == ""
    shown = before
    for end, piece in enumerate(pieces[:-1], len(context) + 1):
        shown += piece  # as much as is whole is shown at once
        known = tokenizer.decode(token_ids[:end], skip_special_tokens=False)
        assert shown == known.rstrip(HALF)


@given(st.text(st.sampled_from("abc! é😀日\u200b"), min_size=1), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_the_same_where_bytes_are_tokens(spaced: Tokenizer, text: str, num_context: int) -> None:
    token_ids = spaced.encode(text)
    context, output = token_ids[:num_context], token_ids[num_context:]
    assume(HALF not in spaced.decode(context))
    pieces = stream(spaced, output, context)
    assert spaced.decode(context) + "".join(pieces) == spaced.decode(token_ids)
    assert HALF not in "".join(pieces)


def test_a_character_is_shown_when_its_last_byte_is_there(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("x😀y")
    assert len(token_ids) == 5
    assert stream(tokenizer, token_ids) == ["x", "", "", "😀", "y", ""]


def test_text_before_half_a_character_is_shown_at_once(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(" 😀")  # the first token is a space and a byte
    assert tokenizer.decode(token_ids[:1]) == " " + HALF
    assert stream(tokenizer, token_ids)[0] == " "
    assert "".join(stream(tokenizer, token_ids)) == " 😀"


def test_a_real_replacement_character_is_shown_with_what_follows(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, tokenizer.encode("a\ufffdb"))) == "a\ufffdb"
    assert "".join(stream(tokenizer, tokenizer.encode("a\ufffd"))) == "a\ufffd"


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("x😀")[:-1]
    assert stream(tokenizer, token_ids) == ["x", "", "", HALF]
    assert tokenizer.decode(token_ids) == "x" + HALF


def test_bytes_that_never_become_a_character_are_shown_when_text_follows(
    tokenizer: Tokenizer,
) -> None:
    token_ids = [*tokenizer.encode("😀")[:-1], *tokenizer.encode("x")]
    assert "".join(stream(tokenizer, token_ids)) == HALF + "x"
    assert stream(tokenizer, token_ids)[-1] == ""


def test_nothing_is_left_at_the_end_twice(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    detokenizer.push(tokenizer.encode("😀")[0])
    assert detokenizer.finish() == HALF
    assert detokenizer.finish() == ""


def test_a_token_shows_its_space_after_a_context_and_not_at_the_start(spaced: Tokenizer) -> None:
    hello, world = ids_of(spaced, "▁Hello", "▁world")
    assert stream(spaced, [hello, world]) == ["Hello", " world", ""]
    assert stream(spaced, [hello, world], context=[world]) == [" Hello", " world", ""]
    assert stream(spaced, [hello], context=[world] * 20) == [" Hello", ""]


def test_a_skipped_token_leaves_the_space_of_the_next_one(spaced: Tokenizer) -> None:
    hello, end, world = ids_of(spaced, "▁Hello", "</s>", "▁world")
    token_ids = [hello, end, world, end, end, end, end, end, end, world]
    assert spaced.decode(token_ids) == "Hello world world"
    assert "".join(stream(spaced, token_ids)) == "Hello world world"


def test_a_context_of_special_tokens_only(spaced: Tokenizer) -> None:
    begin, hello, world = ids_of(spaced, "<s>", "▁Hello", "▁world")
    assert "".join(stream(spaced, [hello, world], context=[begin])) == "Hello world"


def test_a_character_that_the_prompt_began_is_shown_whole(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("ab😀c")
    half = len(token_ids) - 2
    assert tokenizer.decode(token_ids[:half]).endswith(HALF)
    assert stream(tokenizer, token_ids[half:], context=token_ids[:half]) == ["😀", "c", ""]


def test_a_context_that_is_cut_within_a_character_spoils_nothing(spaced: Tokenizer) -> None:
    context, output = spaced.encode("😀😀😀😀"), spaced.encode("😀b")[1:]
    assert "".join(stream(spaced, output, context=context)) == "😀b"


def test_special_tokens_are_skipped_or_shown_as_they_come(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("Hi<|im_end|>!")
    assert stream(tokenizer, token_ids) == ["Hi", "", "!", ""]
    assert stream(tokenizer, token_ids, skip=False) == ["Hi", "<|im_end|>", "!", ""]


# Files


def test_a_folder_without_a_tokenizer_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="missing") as found:
        Tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(found.value)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe\x00", b'{"model": 5}'])
def test_a_damaged_tokenizer_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError) as found:
        Tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(found.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"\xff"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_beside_the_tokenizer_is_named(
    tmp_path: Path, smollm2: Path, name: str, content: bytes
) -> None:
    (tmp_path / "tokenizer.json").symlink_to(smollm2 / "tokenizer.json")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError) as found:
        Tokenizer(tmp_path)
    assert str(tmp_path / name) in str(found.value)


def test_a_tokenizer_alone_is_enough_and_a_template_of_its_own_file_wins(
    tmp_path: Path, smollm2: Path
) -> None:
    (tmp_path / "tokenizer.json").symlink_to(smollm2 / "tokenizer.json")
    assert Tokenizer(tmp_path).config == {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert Tokenizer(tmp_path).config == {"chat_template": "old"}
    (tmp_path / "chat_template.jinja").write_text("née", encoding="utf-8")
    assert Tokenizer(tmp_path).config == {"chat_template": "née"}
