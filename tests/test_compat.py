"""The host as this package found it: a change of a signature or a call style must be seen here first."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

from llava_prune import compat, compat_training


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_signatures_of_the_host_are_those_the_binding_was_written_for():
    from llava.model.builder import load_pretrained_model
    from llava.model.llava_arch import LlavaMetaForCausalLM
    from transformers import GenerationMixin, Trainer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    assert parameters(LlamaDecoderLayer.forward)[:6] == [
        "self",
        "hidden_states",
        "attention_mask",
        "position_ids",
        "past_key_value",
        "output_attentions",
    ]
    assert parameters(LlamaRotaryEmbedding.forward) == ["self", "x", "seq_len"]
    assert "return self.contrastive_search(" in inspect.getsource(GenerationMixin.generate)
    assert parameters(LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal) == [
        "self",
        "input_ids",
        "position_ids",
        "attention_mask",
        "past_key_values",
        "labels",
        "images",
        "image_sizes",
    ]
    assert parameters(load_pretrained_model)[:3] == ["model_path", "model_base", "model_name"]
    assert "device" in parameters(load_pretrained_model)
    assert parameters(Trainer.training_step) == ["self", "model", "inputs"]
    assert parameters(Trainer._save_optimizer_and_scheduler) == ["self", "output_dir"]
    assert parameters(Trainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]


def test_names_that_training_rebinds_are_there():
    import llava.train.train as module

    source = inspect.getsource(module.train)
    for name in ("TrainingArguments", "LLaVATrainer", "make_supervised_data_module", "safe_save_model_for_hf_trainer"):
        assert hasattr(module, name) and f"{name}" in source


def test_deepspeed_can_leave_frozen_parameters_out():
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "exclude_frozen_parameters" in parameters(DeepSpeedEngine.save_checkpoint)
    assert "load_module_strict" in parameters(DeepSpeedEngine.load_checkpoint)


def test_positional_and_keyword_calls_are_the_same():
    def function(hidden_states, attention_mask=None, **kwargs):
        pass

    bind = compat.bind_arguments(function)
    assert bind((1, 2), {"use_cache": True}) == {"hidden_states": 1, "attention_mask": 2, "use_cache": True}


def test_rotary_of_rows_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    states = torch.randn(2, 4, 7, 8)
    positions = torch.randint(0, 30, (2, 7))
    cos, sin = LlamaRotaryEmbedding(8)(states, seq_len=30)
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin, positions)
    assert torch.allclose(compat.apply_rotary(states, cos[positions], sin[positions]), expected)


def test_a_quantised_base_passes_only_within_the_block(llava):
    llava.is_quantized = True
    llava.quantization_method = QuantizationMethod.BITS_AND_BYTES
    attributes = dict(llava.__dict__)
    with pytest.raises(ValueError, match="not supported"):
        llava.to("cpu")
    with compat_training.as_model_with_adapters(llava):
        assert llava._hf_peft_config_loaded and llava.to("cpu") is llava
    assert llava.__dict__ == attributes
    with pytest.raises(ValueError, match="not supported"):
        llava.to("cpu")


def test_an_unsupported_layer_is_refused_with_what_to_install():
    class LlamaDecoderLayer(nn.Module):
        def forward(self, x):
            return x

    model = nn.Module()
    model.layers = nn.ModuleList([LlamaDecoderLayer()])
    with pytest.raises(ValueError, match="install transformers 4.37.2"):
        compat.find_decoder(model)


@pytest.mark.parametrize("field", ["memory_efficient_backward", "another"])
def test_lora_on_8bit_layers_is_refused_where_peft_would_fail_on_them(monkeypatch, field):
    """bitsandbytes needs no GPU to be asked, but is not installed everywhere: a stand-in for its state."""
    stand_in = SimpleNamespace(MatmulLtState=lambda: SimpleNamespace(**{field: False}), __version__="0.0")
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    if field == "another":
        with pytest.raises(ValueError, match="--bits 4"):
            compat_training.check_8bit_lora()
    else:
        compat_training.check_8bit_lora()
