"""What this package relies on in transformers 5: a failure here says what changed upstream."""

import inspect

import pytest
from tiny_hf import KINDS, tiny
from transformers import GenerationMixin, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model

LAYER = {"hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"}
DECODER = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"}


def names(function):
    return set(inspect.signature(function).parameters) - {"self", "kwargs"}


@pytest.mark.parametrize("layer", [LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer])
def test_decoder_layers_take_what_is_changed(layer):
    changed = names(layer.forward) ^ LAYER
    assert not changed, f"{layer.__name__}.forward: {changed} came or went; LayerForward and compat must know it"


@pytest.mark.parametrize("decoder", [LlamaModel, MistralModel, Qwen2Model])
def test_decoders_take_what_is_read(decoder):
    changed = names(decoder.forward) ^ DECODER
    assert not changed, f"{decoder.__name__}.forward: {changed} came or went; PruneHandle._begin reads them"


@pytest.mark.parametrize("kind", KINDS)
def test_models_take_what_announces_the_layout(kind):
    model = tiny(kind)
    read = {"input_ids", "pixel_values", "attention_mask", "labels", "inputs_embeds", "past_key_values"}
    missing = (read | {"mm_encoder_outputs"}) - names(model.forward)
    assert not missing, f"{type(model).__name__}.forward lost {missing}, which announce_hf reads"
    assert isinstance(model.config.image_token_id, int)


def test_generate_prefills_by_the_method_that_is_bound():
    assert names(GenerationMixin._prefill) >= {"input_ids", "generation_config", "model_kwargs"}


def test_layers_return_a_tensor_and_are_called_with_hidden_states_first():
    model = tiny()
    layer, seen = model.model.language_model.layers[2], {}
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(args=args, kwargs=kwargs, output=output), with_kwargs=True
    )
    import torch

    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert isinstance(seen["output"], torch.Tensor), "decoder layers return something else than a tensor again"
    assert len(seen["args"]) == 1 and set(seen["kwargs"]) <= LAYER | {"cache_position"}, "layers are called otherwise"
    assert len(seen["kwargs"]["position_embeddings"]) == 2


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("training_step", ["model", "inputs", "num_items_in_batch"]),
        ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("create_optimizer", ["model"]),
        ("log", ["logs", "start_time"]),
        ("save_model", ["output_dir", "_internal_call"]),
        ("_save", ["output_dir", "state_dict"]),
        ("_save_optimizer_and_scheduler", ["output_dir"]),
        ("_load_optimizer_and_scheduler", ["checkpoint"]),
        ("_load_rng_state", ["checkpoint"]),
        ("_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
        ("_get_train_sampler", ["train_dataset"]),
    ],
)
def test_trainer_hooks_are_those_that_are_overridden(hook, arguments):
    found = [name for name in inspect.signature(getattr(Trainer, hook)).parameters if name != "self"]
    assert found == arguments, f"Trainer.{hook}{tuple(found)} changed; PruneTrainerMixin overrides it"


def test_trainer_scales_the_loss_by_the_attribute_that_is_set():
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer), "gradient accumulation is scaled by another switch"


def test_checkpointing_arguments_have_a_known_name():
    fields = TrainingArguments.__dataclass_fields__
    assert {"activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"} & fields.keys()
