"""What the reference learns of transformers' layers from the model's own forward pass, whatever the names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dynexport.exporter.reference.norms import norm_epsilon  # noqa: E402
from dynexport.exporter.reference.transformers_layers import DecoderLayers, find_layers  # noqa: E402
from dynexport.runtime.bundle.errors import DynexportError  # noqa: E402


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        rms_norm_eps=3e-6,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


class Renamed(torch.nn.Module):
    """A decoder layer of some later version: other names, all by keyword, and a tuple comes back."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *, stream: Any, cache_of_this_version: Any, bias: Any, angles: Any) -> Any:
        after = self.layer(stream, bias, None, cache_of_this_version, position_embeddings=angles)
        return after, "attention weights"


class OfALaterVersion(torch.nn.Module):
    """A model that calls such layers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inside, self.config = [model], model.config  # in a list its own layers are not found
        self.layers = torch.nn.ModuleList(Renamed(layer) for layer in model.model.layers)

    def get_input_embeddings(self) -> Any:
        return self.inside[0].get_input_embeddings()

    def forward(self, ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        embedded = self.get_input_embeddings()(ids)
        tokens = ids.shape[1]
        hidden = embedded
        cache = transformers.DynamicCache() if use_cache else None
        angles = self.inside[0].model.rotary_emb(embedded, torch.arange(tokens)[None])
        seen = torch.ones((tokens, tokens)).tril().bool() & attention_mask[:, None, None].bool()
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        for layer in self.layers:
            hidden = layer(stream=hidden, cache_of_this_version=cache, bias=bias, angles=angles)[0]
        return hidden


def test_other_names_of_arguments_change_nothing(llama: Any) -> None:
    later = OfALaterVersion(llama)
    calls: list[Any] = []
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    decoder = DecoderLayers(later)
    with torch.no_grad():
        expected = later(ids, torch.ones_like(ids), False)

        def run(index: int, call: Any) -> Any:
            calls.append(call)
            rows = [decoder.pick(call, row, 2, torch.arange(4)) for row in range(2)]
            return decoder.run(decoder.modules[index], decoder.join(rows))

        with decoder.replaced(run):
            found = later(ids, torch.ones_like(ids), False)
        torch.testing.assert_close(found, expected)

        class Cache:
            def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
                self.keys = keys
                return keys, values

        cache, places = Cache(), torch.tensor([1, 3])
        picked = decoder.with_cache(decoder.pick(calls[0], 1, 2, places), cache)
        assert decoder.hidden(picked).shape == (1, 2, 16)
        assert decoder.mask(picked).shape == (1, 1, 2, 2)
        decoder.run(decoder.modules[0], picked)
        assert cache.keys.shape == (1, 1, 2, 8)


def test_what_a_model_is_learnt_from_is_its_own_call(llama: Any) -> None:
    assert find_layers(llama)[0][0] == "model.layers.0"
    assert DecoderLayers(llama).input_norm == "input_layernorm"


def test_a_layer_that_is_not_understood_names_the_version(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    later = OfALaterVersion(llama)
    later.layers[0].forward = lambda **_: None
    monkeypatch.setattr(OfALaterVersion, "forward", lambda self, *_, **__: self.layers[0](angles=torch.zeros(1)))
    with pytest.raises(DynexportError, match=r"hidden states, found 0; this is transformers 5\.[0-9.]+: install "):
        DecoderLayers(later)


@pytest.mark.parametrize("hidden", [8, 7])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1e-12, 0.25])
def test_the_epsilon_of_a_norm_is_measured(hidden: int, epsilon: float) -> None:
    gemma = transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(hidden, eps=epsilon)  # multiplies by 1 + weight
    for norm in (torch.nn.LayerNorm(hidden, eps=epsilon), torch.nn.RMSNorm(hidden, eps=epsilon), gemma):
        assert norm_epsilon(norm) == epsilon


def test_no_argument_of_a_layer_is_named() -> None:
    folder = Path(__file__).parents[2] / "exporter"
    names = ('"past_key_values"', '"cache"', '"layer_past"', '"position_embeddings"', '"alibi"', "inspect.signature")
    texts = {path.name: path.read_text() for part in ("reference", "profile") for path in (folder / part).glob("*.py")}
    assert {file: name for file, text in texts.items() for name in names if name in text} == {}
