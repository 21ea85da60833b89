"""Checkpoints that are damaged, incomplete or of an unknown kind: each is a ModelLoadError that
names the file or the tensor."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.config import EngineConfig
from nanovllm.errors import ModelLoadError
from nanovllm.kernels import reference
from nanovllm.models.checkpoint import locate, open_tensors, read_config
from nanovllm.models.gguf import convert
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.load import load_model
from tests.models.gguf_files import METADATA, small_gguf, write_gguf

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint: a llama of one layer with a tied head."""
    convert(small_gguf(tmp_path / "small.gguf"), tmp_path / "model")
    return tmp_path / "model"


def load(path: Path, load_format: str = "auto") -> LlamaForCausalLM:
    return load_model(
        EngineConfig(load_format=load_format, max_model_len=8),
        read_config(path),
        path,
        reference,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def head(model: LlamaForCausalLM) -> Tensor:
    """The weight of the head [V, H], seen through its product."""
    return model.logits(torch.eye(8)).T


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def write_header(folder: Path, header: dict[str, Any], num_bytes: int) -> None:
    """A safetensors file with this header and so many bytes of data."""
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(num_bytes)
    (folder / "model.safetensors").write_bytes(data)


def shard(folder: Path) -> None:
    """Split the checkpoint into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_whole_checkpoint_loads(folder: Path) -> None:
    model = load(folder)
    expected = load_file(folder / "model.safetensors")[EMBEDDING]
    assert torch.equal(model.model.embed_tokens.weight, expected)
    assert torch.equal(head(model), expected)


def test_a_sharded_checkpoint_loads(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    shard(folder)
    found = dict(open_tensors(folder, "auto"))
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_that_the_index_does_not_name_are_not_read(folder: Path) -> None:
    shard(folder)
    save_file({"copy": torch.zeros(1)}, folder / "consolidated.safetensors")
    load(folder)


# Folders


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model: holds no weights \(\*\.safetensors"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_weights_are_not_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelLoadError, match=f"{name} can run code"):
        load(folder)


def test_a_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"model/config\.json: No such file"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[1, 2]", "null"])
def test_a_config_that_is_not_a_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json: not a JSON obj"):
        load(folder)


def test_a_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelLoadError, match=r"config\.json: not a JSON object"):
        load(folder)


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "architectures"])
def test_a_config_without_a_field_names_it(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=rf"config\.json.*{name}"):
        load(folder)


def test_a_checkpoint_that_brings_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.MyModel"})
    with pytest.raises(ModelLoadError, match=r"config\.json: auto_map asks to run code"):
        load(folder)


def test_an_unknown_architecture_lists_the_known_ones(folder: Path) -> None:
    change_config(folder, architectures=["GPT9ForCausalLM"])
    with pytest.raises(
        ModelLoadError, match=r"'GPT9ForCausalLM' is not supported.*LlamaForCausalLM"
    ):
        load(folder)


# Safetensors files


def test_a_truncated_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors"):
            load(folder)


def test_tensors_that_overlap(folder: Path) -> None:
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    two = {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
    write_header(folder, {"one": one, "two": two}, 24)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors"):
        load(folder)


@pytest.mark.parametrize("offsets", [[0, 2**40], [2**63, 2**63 + 16], [16, 0], [-16, 0]])
def test_a_tensor_that_lies_outside_the_file(folder: Path, offsets: list[int]) -> None:
    write_header(folder, {"one": {"dtype": "F32", "shape": [4], "data_offsets": offsets}}, 16)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors"):
        load(folder)


def test_a_shape_that_does_not_fit_its_bytes(folder: Path) -> None:
    for shape in ([5], [2**32, 2**32, 2**32]):
        write_header(folder, {"one": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}, 16)
        with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors"):
            load(folder)


def test_a_header_that_claims_more_than_100_megabytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 101_000_000) + b"{}" + bytes(64))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors"):
        load(folder)


def test_a_header_that_is_not_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"{broken}" + bytes(64))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors"):
        load(folder)


def test_a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-2-of-2\.safetensors: missing, though"):
        load(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": 3}, {"weight_map": {"a": 3}}, {"weight_map": {"a": ["b"]}}]
)
def test_an_index_of_another_form(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"index\.json: not an index of weights"):
        load(folder)


def test_an_index_cannot_name_files_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {EMBEDDING: "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"model/model\.safetensors: missing"):
        load(folder)


# Tensors


def test_a_missing_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ModelLoadError, match=rf"1 tensors? (is|are) missing.*{NORM}"):
        load(folder)


def test_a_missing_part_of_a_merged_matrix(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelLoadError, match=rf"missing.*{name}"):
        load(folder)


@pytest.mark.parametrize("shape", [(6, 4), (8, 6), (6, 8, 1), (1,), (48,)])
def test_a_tensor_of_a_wrong_shape(folder: Path, shape: tuple[int, ...]) -> None:
    change(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(shape)}))
    with pytest.raises(ModelLoadError) as found:
        load(folder)
    assert f"tensor {EMBEDDING} is {list(shape)}, config.json says [6, 8]" in str(found.value)


def test_an_unexpected_tensor(folder: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    with pytest.raises(ModelLoadError, match=f"tensor {name} has no place"):
        load(folder)


def test_a_tensor_that_is_in_two_files(folder: Path) -> None:
    save_file({NORM: torch.zeros(8)}, folder / "more.safetensors")
    with pytest.raises(ModelLoadError, match=rf"tensor {NORM} has no place.*twice"):
        load(folder)


def test_what_a_tied_model_may_bring_but_does_not_need(folder: Path) -> None:
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {"lm_head.weight": torch.zeros(6, 8), inverse: torch.zeros(2)}
    change(folder, lambda tensors: tensors.update(extra))
    assert head(load(folder)).abs().sum() > 0


# GGUF files


def test_a_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.gguf.*no such folder or file"):
        locate(str(tmp_path / "model.gguf"))


def test_a_truncated_gguf(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelLoadError, match=r"model\.gguf: tensor .* truncated"):
        load(path)


def test_a_gguf_with_a_missing_tensor(tmp_path: Path) -> None:
    tensors = {
        "token_embd.weight": np.zeros((6, 8), np.float32),
        "blk.0.attn_q.weight": np.zeros((8, 8), np.float32),
    }
    path = write_gguf(tmp_path / "model.gguf", METADATA, tensors)
    with pytest.raises(
        ModelLoadError, match=r"model\.gguf: 9 tensors are missing, the first is model"
    ):
        load(path)


def test_a_folder_with_one_gguf_and_nothing_else_is_that_file(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "model.gguf")
    assert locate(str(tmp_path)) == path


def test_of_several_gguf_files_in_a_folder_one_must_be_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("a.gguf", "b.gguf"):
        small_gguf(folder / name)
    with pytest.raises(ModelLoadError, match=r"model: holds 2 \.gguf files"):
        load(folder)


def test_the_load_format_is_kept_to(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model: holds 0 \.gguf files"):
        load(folder, "gguf")
    with pytest.raises(ModelLoadError, match=r"small\.gguf: holds no weights"):
        load(folder.parent / "small.gguf", "safetensors")
    small_gguf(folder / "model.gguf")
    assert head(load(folder, "gguf")).shape == (6, 8)
    (folder / "model.safetensors").unlink()
    assert head(load(folder, "auto")).shape == (6, 8)
    with pytest.raises(ModelLoadError, match="model: holds no weights"):
        load(folder, "safetensors")


def test_a_name_too_long_for_a_path_is_no_model() -> None:
    with pytest.raises(ModelLoadError, match="no such folder or file"):
        locate("x" * 400)
