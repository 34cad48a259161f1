"""Fixtures: tiny random LLaVA models, the testbed, and a guard that nothing of the host stays patched."""

import importlib.util

import pytest

# the other stacks' tests live in folders of their own
collect_ignore_glob = [] if importlib.util.find_spec("llava") is None else ["hf/*", "lmms/*"]


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory):
    """Where tiny models put their vision tower."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def llava(tower_folder):
    """A random LLaVA of 6 layers and 16 vision tokens."""
    from tiny import tiny_llava

    return tiny_llava(tower_folder)


@pytest.fixture(scope="session")
def testbed(tmp_path_factory):
    """A small testbed folder: 64 training samples, 24 test questions, the tiny LLaVA."""
    from llava_prune.testbed.prepare import prepare

    return prepare(tmp_path_factory.mktemp("testbed"), train=64, test=24)


@pytest.fixture(autouse=True)
def host_left_alone():
    """Every class and function that a careless patch would touch is what it was before the test."""
    if importlib.util.find_spec("llava") is None:
        yield
        return
    import llava.model.builder as builder
    import llava.train.train as train
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from transformers.models.llama import modeling_llama

    def snapshot():
        return {
            "layer": modeling_llama.LlamaDecoderLayer.forward,
            "model": modeling_llama.LlamaModel.forward,
            "rotary": modeling_llama.LlamaRotaryEmbedding.forward,
            "prepare": LlavaLlamaForCausalLM.prepare_inputs_labels_for_multimodal,
            "generate": LlavaLlamaForCausalLM.generate,
            "load": builder.load_pretrained_model,
            "trainer": train.LLaVATrainer,
            "arguments": train.TrainingArguments,
        }

    before = snapshot()
    yield
    assert snapshot() == before, "a test left a class or function of the host patched"
