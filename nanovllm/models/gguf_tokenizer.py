"""The tokenizer that a GGUF file carries in its metadata, rebuilt as Hugging Face's would be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from nanovllm.errors import ModelLoadError
from nanovllm.models.gguf_file import GGUFFile, open_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
SPACE = "▁"  # what sentencepiece writes for a space
REMEDY = "name a folder with a tokenizer.json as the tokenizer"

# How text is cut before byte-level merging: the patterns of the models' own tokenizer.json.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "llama-bpe": WORDS.format(digits="{1,3}"),
    "qwen2": WORDS.format(digits=""),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word of the vocabulary is not put together by merges
BEGIN_WITH_BOS = ("llama-bpe", "tekken")  # unless add_bos_token says otherwise
# tokenizer.ggml.pre -> one of PATTERNS, "gpt-2" (byte-level's own) or "smollm" (digits alone)
PRE_TOKENIZERS = {name: name for name in ("gpt-2", "smollm", *PATTERNS)} | {
    "default": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
}


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file, and what its tokenizer_config.json would hold.

    Raises:
        ModelLoadError: the file is damaged, has no tokenizer, or one of an unknown kind.
    """
    return build_tokenizer(open_gguf(path))


def build_tokenizer(file: GGUFFile) -> tuple[Tokenizer, dict[str, Any]]:
    """See `gguf_tokenizer`."""
    tokens = file.require("tokenizer.ggml.tokens", list)
    ids = special_ids(file, len(tokens))
    types = file.optional("tokenizer.ggml.token_type", list) or [
        CONTROL if i in ids.values() else NORMAL for i in range(len(tokens))
    ]
    if len(types) != len(tokens):
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.token_type has {len(types)} entries, but there are "
            f"{len(tokens)} tokens"
        )
    kind = file.require("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported; {REMEDY}"
        )
    build = byte_level if kind == "gpt2" else sentencepiece
    try:
        tokenizer = build(file, tokens, types)
        add_special_tokens(tokenizer, tokens, types)
    except ModelLoadError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelLoadError(f"{file.path}: its tokenizer cannot be built ({error})") from error
    begins = kind == "llama" or PRE_TOKENIZERS.get(pre_tokenizer_name(file)) in BEGIN_WITH_BOS
    adds_bos = file.optional("tokenizer.ggml.add_bos_token", bool, begins) and "bos" in ids
    adds_eos = file.optional("tokenizer.ggml.add_eos_token", bool, False) and "eos" in ids
    if adds_bos or adds_eos:
        before, after = [ids["bos"]] * adds_bos, [ids["eos"]] * adds_eos
        tokenizer.post_processor = surround(tokens, before, after)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.metadata.get(
            f"{file.metadata.get('general.architecture')}.context_length"
        ),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "chat_template": file.optional("tokenizer.chat_template", str),
        **{f"{name}_token": tokens[i] for name, i in ids.items()},
    }
    return tokenizer, {name: value for name, value in config.items() if value is not None}


def add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Let control and user-defined tokens be found in text before anything else."""
    for kind, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, token_type in zip(tokens, types, strict=True)
                if token_type == kind
            ]
        )


def surround(
    tokens: Sequence[str], before: Sequence[int], after: Sequence[int]
) -> processors.PostProcessor:
    """Puts tokens before and after each text."""
    first, last = [tokens[i] for i in before], [tokens[i] for i in after]
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B:1", *last],
        special_tokens=[(tokens[i], i) for i in {*before, *after}],
    )


def special_ids(file: GGUFFile, num_tokens: int) -> dict[str, int]:
    """Ids of bos, eos, pad and unk, of those that the file names."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {}
    for name, long_name in names.items():
        key = f"tokenizer.ggml.{long_name}_token_id"
        value = file.metadata.get(key)
        if value is not None:
            if not isinstance(value, int) or not 0 <= value < num_tokens:
                raise ModelLoadError(
                    f"{file.path}: {key}={value!r}, but there are {num_tokens} tokens"
                )
            found[name] = value
    return found


def pre_tokenizer_name(file: GGUFFile) -> str:
    name: str = file.optional("tokenizer.ggml.pre", str, "default")
    return name


def byte_level(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """GPT-2's kind: text is cut into words, and merges start from bytes."""
    name = pre_tokenizer_name(file)
    if name not in PRE_TOKENIZERS:
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.pre {name!r} is not supported; these are: "
            f"{', '.join(PRE_TOKENIZERS)}; {REMEDY}"
        )
    kind = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in file.require("tokenizer.ggml.merges", list)]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind in WHOLE_WORDS))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if kind == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if kind in PATTERNS:
        steps.append(pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated"))
    add_space = file.optional("tokenizer.ggml.add_space_prefix", bool, False)
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=add_space, use_regex=kind not in PATTERNS)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Llama 2's kind: merges start from characters; one that is unknown becomes its bytes.

    Sentencepiece joins the neighbours whose union scores best. Here each way to make a piece from
    two others is a merge, and better scores come first.
    """
    scores = file.require("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries, but there are "
            f"{len(tokens)} tokens"
        )
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    pieces = {token: i for token, i in vocab.items() if types[i] in (NORMAL, USER_DEFINED)}
    merges = [
        (-scores[i], pieces[token[:cut]], pieces[token[cut:]], token[:cut], token[cut:])
        for token, i in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    unknown = next((token for token, i in vocab.items() if types[i] == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [merge[-2:] for merge in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    add_space = file.optional("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if add_space else spaces
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
