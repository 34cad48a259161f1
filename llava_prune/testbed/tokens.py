"""The tiny LLaVA's tokenizer, and conversations as the token ids that LLaVA makes of them.

A Llama tokenizer (SentencePiece BPE with byte fallback, so any text can be encoded) of a few hundred pieces, trained
on the testbed's own questions and on LLaVA's v1 conversation.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from .pictures import COLORS, SHAPES
from .questions import PAIRS, WORDINGS

PIECES = 512


def train_tokenizer(directory: Path, model_max_length: int = 512):
    """Trains the tokenizer, saves it to `directory` and returns it as a `transformers.LlamaTokenizer`.

    Args:
        directory: an existing folder.
        model_max_length: in tokens.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    path = directory / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        # As in Llama: LLaVA's label masking counts on every space being kept.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    tokenizer = LlamaTokenizer(
        str(path), legacy=True, model_max_length=model_max_length, padding_side="right", pad_token="<unk>"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def conversation_ids(tokenizer) -> tuple[list[int], Callable]:
    """How LLaVA tokenizes a v1 conversation about one picture, cut into parts that are fast to put together.

    Returns:
        The ids before the picture, the same in every conversation, and a function `turn(question, answer, first)` that
        gives the ids of one turn after the picture, `</s>` included, and how many of them at the end are the answer.
    """
    from llava.conversation import conv_templates

    conversation = conv_templates["v1"]
    user, assistant = conversation.roles
    opening = tokenizer(f"{conversation.system}{conversation.sep}{user}: ").input_ids

    @cache
    def turn(question: str, answer: str, first: bool) -> tuple[list[int], int]:
        asked = f"\n{question}" if first else f"{user}: {question}"
        asked += f"{conversation.sep}{assistant}:"
        start = len(tokenizer(asked, add_special_tokens=False).input_ids)
        ids = tokenizer(f"{asked} {answer}{conversation.sep2}", add_special_tokens=False).input_ids
        return ids, len(ids) - start

    return opening, turn


def _corpus() -> list[str]:
    """Every question and answer of the testbed in the v1 conversation, as training text."""
    from llava.conversation import conv_templates

    conversation = conv_templates["v1"]
    places = [(str(place), str(place)) for place in range(1, 10)]
    fillings = {"color_at": places, "shape_at": places, "exists": PAIRS}
    words = [(word,) for word in (*SHAPES, *COLORS)]
    answers = [*SHAPES, *COLORS, "yes", "no", *"0123456789"]
    lines = [conversation.system] * 50
    for kind, templates in WORDINGS.items():
        for template in templates:
            questions = [template.format(*filling) for filling in fillings.get(kind, words)]
            lines += [f"{conversation.roles[0]}: {question} {conversation.roles[1]}:" for question in questions]
            # A first question follows a line break, so its first word has no space before it.
            lines += [f"\n{question}" for question in questions]
    return lines + [f"{conversation.roles[1]}: {answer}" for answer in answers] * 100
