"""Tokenizers rebuilt from GGUF metadata, against transformers and ids written out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm.errors import ModelLoadError
from nanovllm.models.gguf import convert
from nanovllm.models.gguf_tokenizer import gguf_tokenizer
from tests.models.gguf_files import METADATA, TOKENS, small_gguf, small_tensors, write_gguf

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "two  spaces   three    four",
    "tab\tand\t\ttabs",
    "one\ntwo\n\nthree\r\n\r\n  four\n",
    "\n\n\n",
    "1 12 123 1234567890",
    "3.14159, -2e10, 0x1F, 1,000,000",
    "x1y22z333 v2.0.1-rc3",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    '{"key": [1, 2.5, null, true], "s": "\\u00e9"}',
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "don't I'll WE'VE they'd it's 'quoted'",
    "camelCase snake_case SCREAMING_CASE kebab-case",
    "naïve café — “quotes” … €5",
    "e\u0301 is not é",
    "日本語のテキストと漢字、かな。",
    "한국어 텍스트",
    "Русский текст и ещё",
    "مرحبا بالعالم",
    "हिन्दी पाठ",
    "🙂 👨‍👩‍👧 🇫🇷",
    "∑∫√ ≤≥ αβγ",
    "\u00a0\u2003\u200b odd spaces",
    "\x00\x01\x7f",
    "a" * 100,
    "https://example.org/path?query=1&b=%20#top",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x<|endoftext|>y <|im_start|><|im_end|>",
    "<|not_special|> <|im_start",
]


@pytest.fixture(scope="module")
def smollm2_gguf(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the tokenizer of SmolLM2, as llama.cpp's converter writes it."""
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    control = {token["id"] for token in tokenizer["added_tokens"]}
    metadata = METADATA | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": [3 if i in control else 1 for i in range(len(vocab))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}!",
    }
    folder = tmp_path_factory.mktemp("smollm2-gguf")
    return write_gguf(folder / "model.gguf", metadata, small_tensors())


def test_smollm2_has_the_ids_that_transformers_reads(smollm2_gguf: Path, smollm2: Path) -> None:
    """From the GGUF by our code and by transformers', and from the converted folder."""
    ours, _ = gguf_tokenizer(smollm2_gguf)
    folder = AutoTokenizer.from_pretrained(smollm2)
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == folder.encode(text) == theirs.encode(text), text
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert folder.decode(ids) == text


def test_smollm2_ids_written_out(smollm2_gguf: Path) -> None:
    tokenizer, _ = gguf_tokenizer(smollm2_gguf)
    assert tokenizer.encode("Hello world").ids == [19556, 905]
    assert tokenizer.encode("123 45").ids == [33, 34, 35, 216, 36, 37]  # digits stand alone
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n").ids == [1, 4093, 198, 26843, 2, 198]
    assert tokenizer.decode([1, 26843, 2], skip_special_tokens=True) == "Hi"
    assert tokenizer.get_vocab_size() == 49_152


def test_the_converted_folder_has_the_chat_template(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# Byte-level

TEXT = "I'LL pay €12345 for\n\n  Ünï fooBar/x"
START = ["I", "'LL", " pay", " €"]
END = [" for", "\n\n", " ", " Ünï"]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("llama-bpe", [*START, "123", "45", *END, " fooBar", "/x"]),
        ("qwen2", [*START, *"12345", *END, " fooBar", "/x"]),
        ("tekken", [*START, *"12345", *END, " foo", "Bar", "/x"]),
        (
            "gpt-2",
            ["I", "'", "LL", " pay", " €", "12345", " for", "\n\n ", " Ünï", " fooBar", "/", "x"],
        ),
        (
            "smollm",
            ["I", "'", "LL", " pay", " €", *"12345", " for", "\n\n ", " Ünï", " fooBar", "/", "x"],
        ),
    ],
)
def test_text_is_cut_into_words_as_each_model_does_it(
    pre: str, words: list[str], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"tokenizer.ggml.pre": pre}
    tokenizer, _ = gguf_tokenizer(small_gguf(tmp_path / "model.gguf", changes))
    assert tokenizer.pre_tokenizer is not None
    found = tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in found] == words


def test_qwen_composes_characters_first(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tokenizer.ggml.pre": "qwen2"}
    tokenizer, _ = gguf_tokenizer(small_gguf(tmp_path / "model.gguf", changes))
    assert tokenizer.normalizer is not None
    assert tokenizer.normalizer.normalize_str("e\u0301") == "é"


def test_llama_3_takes_a_known_word_without_merging(tmp_path: Path) -> None:
    tokens = ["a", "b", "ab", "abb", "<end>", "<turn>"]
    for pre, ids in (("llama-bpe", [3]), ("gpt-2", [2, 1])):
        changes = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens}
        tokenizer, _ = gguf_tokenizer(small_gguf(tmp_path / "model.gguf", changes))
        assert tokenizer.encode("abb").ids == ids


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, [2]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [5, 2]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, [2]),
        ({"tokenizer.ggml.add_bos_token": True}, [5, 2]),
        ({"tokenizer.ggml.add_eos_token": True}, [2, 4]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [5, 2, 4]),
    ],
)
def test_bos_and_eos_are_added_if_the_file_says_so(
    changes: dict[str, Any], ids: list[int], tmp_path: Path
) -> None:
    path = small_gguf(tmp_path / "model.gguf", {"tokenizer.ggml.bos_token_id": 5} | changes)
    tokenizer, config = gguf_tokenizer(path)
    assert tokenizer.encode("ab").ids == ids
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [2]
    assert config["add_bos_token"] == (5 in ids)
    assert config["add_eos_token"] == (4 in ids)
    convert(path, tmp_path / "folder")
    assert AutoTokenizer.from_pretrained(tmp_path / "folder").encode("ab") == ids


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.token_type": [1, 1, 1, 1, 3, 4]}
    tokenizer, _ = gguf_tokenizer(small_gguf(tmp_path / "model.gguf", changes))
    assert tokenizer.encode("a<end>b<turn>").ids == [0, 4, 1, 5]
    assert tokenizer.decode([0, 4, 1, 5], skip_special_tokens=True) == "ab<turn>"


def test_without_types_the_named_tokens_are_special(tmp_path: Path) -> None:
    tokens = {key: value for key, value in TOKENS.items() if not key.endswith("token_type")}
    path = write_gguf(tmp_path / "model.gguf", METADATA | tokens, small_tensors())
    tokenizer, _ = gguf_tokenizer(path)
    assert tokenizer.encode("ab<end>").ids == [2, 4]


def test_the_config_is_what_tokenizer_config_json_would_hold(tmp_path: Path) -> None:
    changes = {"tokenizer.chat_template": "{{ x }}", "tokenizer.ggml.padding_token_id": 5}
    _, config = gguf_tokenizer(small_gguf(tmp_path / "model.gguf", changes))
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": "{{ x }}",
        "eos_token": "<end>",
        "pad_token": "<turn>",
    }


# Sentencepiece

PIECES = ["el", "he", "ll", "▁he", "llo", "▁", "h", "e", "l", "o", "w"]
SPM: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        *("<unk>", "<s>", "</s>"),
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *PIECES,
    ],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
    "tokenizer.ggml.scores": [0.0] * 259 + [-1.0 - i for i in range(len(PIECES))],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
EL, HE, LL, SPACE_HE, LLO, SPACE, H, E, L, O, W = range(259, 270)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", [1]),
        ("he llo", [1, SPACE_HE, SPACE, LLO]),  # he, then ll, then ▁he, then llo
        ("hello", [1, SPACE, H, EL, L, O]),  # el scores best, and nothing joins with it
        ("  he", [1, SPACE, SPACE, SPACE_HE]),
        ("whé", [1, SPACE, W, H, 3 + 0xC3, 3 + 0xA9]),  # é is not in the vocabulary
        ("\n🙂", [1, SPACE, 3 + 0x0A, 3 + 0xF0, 3 + 0x9F, 3 + 0x99, 3 + 0x82]),
        ("he</s>he", [1, SPACE_HE, 2, SPACE_HE]),
        ("<0x41>", [1, SPACE, *(3 + ord(character) for character in "<0x41>")]),
    ],
)
def test_sentencepiece_ids_written_out(text: str, ids: list[int], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", METADATA | SPM, small_tensors())
    tokenizer, config = gguf_tokenizer(path)
    assert tokenizer.encode(text).ids == ids
    assert config["add_bos_token"]
    if "</s>" not in text:
        assert tokenizer.decode(ids) == text


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    metadata = METADATA | SPM | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer, _ = gguf_tokenizer(write_gguf(tmp_path / "m.gguf", metadata, small_tensors()))
    assert tokenizer.encode("he he").ids == [1, HE, SPACE_HE]
    assert tokenizer.decode([SPACE_HE, HE]) == " hehe"


def test_sentencepiece_merges_only_to_normal_pieces(tmp_path: Path) -> None:
    types = list(SPM["tokenizer.ggml.token_type"])
    types[LLO] = 2
    metadata = METADATA | SPM | {"tokenizer.ggml.token_type": types}
    tokenizer, _ = gguf_tokenizer(write_gguf(tmp_path / "m.gguf", metadata, small_tensors()))
    assert tokenizer.encode("he llo").ids == [1, SPACE_HE, SPACE, LL, O]


# What cannot be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, r"tokenizer\.ggml\.pre 'klingon'.*tokenizer\.json"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.ggml\.model 't5'.*tokenizer\.json"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries, but there are 6 tokens"),
        ({"tokenizer.ggml.eos_token_id": 6}, r"eos_token_id=6, but there are 6 tokens"),
        ({"tokenizer.ggml.merges": ["a z"]}, "its tokenizer cannot be built"),
        ({"tokenizer.ggml.tokens": 3}, r"tokenizer\.ggml\.tokens is 3; it must be list"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.scores is missing"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.gguf: .*" + message):
        gguf_tokenizer(small_gguf(tmp_path / "model.gguf", changes))


def test_a_file_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", METADATA, small_tensors())
    with pytest.raises(ModelLoadError, match=r"model\.gguf: metadata tokenizer\.ggml\.tokens"):
        gguf_tokenizer(path)
