"""`python -m llava_prune convert`: a LLaVA checkpoint as a Hugging Face `LlavaForConditionalGeneration` directory.

The result answers as the original does: same token ids for the same conversation, same pixels, same logits. It
carries the original's name, so that pruners trained on one load on the other. Needs transformers 5.x, not LLaVA.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE_TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# LLaVA's v1 conversation; a content list may hold {"type": "image"} parts, which come before the text
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% else %}{% set system = '"
    + SYSTEM.replace("'", "\\'")
    + "' %}{% endif %}"
    "{{ (system if system is string else system[0]['text']) + ' ' }}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# LLaVA's fields of config.json and the values that Hugging Face's LLaVA can express
SUPPORTED = {
    "model_type": ("llava_llama", "llava"),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch", "cls_patch", None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
    "mm_use_im_start_end": (False, None),
    "tie_word_embeddings": (False, None),
}


def convert(source: str | Path, target: str | Path) -> None:
    """Write the LLaVA checkpoint in `source` to `target` as a Hugging Face model with its processor.

    Args:
        source: a folder in LLaVA's format: `config.json` of type llava_llama, weights, `tokenizer.model`. Its CLIP
            tower is where `mm_vision_tower` says, an absolute path, a path relative to `source`, or a hub name.
        target: made if it does not exist.

    Raises:
        FileNotFoundError: something is missing in `source`.
        ValueError: a feature of the checkpoint has no counterpart, or weights do not fit.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"this is transformers {transformers.__version__}, a checkpoint is written by 5.x: make its environment, "
            "bash scripts/setup.sh hf"
        )
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the checkpoint itself, which would be overwritten: give another --out")
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {source}: --model takes a folder in LLaVA's format")
    config = json.loads(path.read_text())
    for name, values in SUPPORTED.items():
        if config.get(name) not in values:
            raise ValueError(
                f"{path}: {name} is {config.get(name)!r}, and only {' or '.join(map(repr, values))} can be converted"
            )
    tower = _load_tower(config["mm_vision_tower"], source)
    processor = _processor(source, config, tower)
    model = _model(source, config, tower, processor.image_token_id)
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    processor.save_pretrained(target)


# ---- the model


def _tower_path(name: str, source: Path) -> str:
    return str(source / name) if (source / name).is_dir() else name


def _load_tower(name: str, source: Path) -> Any:
    from transformers import CLIPVisionModel

    path = _tower_path(name, source)
    try:
        if Path(path).is_absolute() and not Path(path).is_dir():
            raise FileNotFoundError(path)  # or else the hub would be asked for it
        return CLIPVisionModel.from_pretrained(path, dtype="auto")
    except OSError as error:
        raise FileNotFoundError(
            f"the vision tower {name!r} that {source / 'config.json'} names in mm_vision_tower is not there: put its "
            "folder at that path, relative to the checkpoint or absolute"
        ) from error


def _read_weights(source: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    # pruners and adapters may lie beside the base
    files = sorted(source.glob("model*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"no model*.safetensors and no pytorch_model*.bin in {source}")
    state: dict[str, Tensor] = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        state |= load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    return state


def _text_config(config: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps attention_bias bos_token_id eos_token_id pad_token_id"
    ).split()
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    scaling = config.get("rope_scaling") or {}
    rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]} if scaling else {}
    given = {name: config[name] for name in names if name in config}
    # one more row, for the image placeholder
    return LlamaConfig(vocab_size=config["vocab_size"] + 1, rope_parameters=rope, **given)


def _renamed(name: str) -> str | None:
    """A LLaVA weight's name in the Hugging Face model; None for the tower, which is read from its own folder."""
    if ".vision_tower." in name:
        return "model.vision_tower." + name.split(".vision_tower.vision_tower.")[-1]
    if name.startswith("model.mm_projector."):
        return name.replace("mm_projector.0", "multi_modal_projector.linear_1").replace(
            "mm_projector.2", "multi_modal_projector.linear_2"
        )
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


def _model(source: Path, config: dict[str, Any], tower: Any, image_token_id: int) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    weights = _read_weights(source)
    state = {_renamed(name): value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if not any(name.startswith("model.vision_tower.") for name in state):
        state |= {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            # the placeholder's embedding is never read; as an output it is no likelier than <unk>, and suppressed
            state[name] = torch.cat([state[name], state[name][:1]])
    vision = tower.config
    vision._name_or_path = ""
    llava = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(config),
        image_token_id=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=_strategy(config),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + (_strategy(config) == "full"),
        tie_word_embeddings=False,
        llava_prune_base=config.get("llava_prune_base", source.resolve().name),
    )
    dtype = state["lm_head.weight"].dtype
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava)
    missing, unexpected = model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"the weights in {source} do not make a LLaVA: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    model.config.dtype = dtype
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = config.get("bos_token_id", 1), config.get("eos_token_id", 2)
    generation.pad_token_id = config.get("pad_token_id", 0)
    generation.suppress_tokens = [image_token_id]
    return model


def _strategy(config: dict[str, Any]) -> str:
    return "full" if config.get("mm_vision_select_feature") == "cls_patch" else "default"


# ---- the processor


def _processor(source: Path, config: dict[str, Any], tower: Any) -> Any:
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=_image_processor(source, config),
        tokenizer=build_tokenizer(source / "tokenizer.model", config.get("tokenizer_model_max_length", 2048)),
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=_strategy(config),
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _image_processor(source: Path, config: dict[str, Any]) -> Any:
    """CLIP's settings; for image_aspect_ratio `pad` the picture is first padded to a square, as LLaVA does."""
    from transformers import CLIPImageProcessor

    from .compat import llava_image_processor_class

    clip = CLIPImageProcessor.from_pretrained(_tower_path(config["mm_vision_tower"], source)).to_dict()
    names = (
        "size crop_size resample image_mean image_std rescale_factor do_resize do_center_crop do_rescale "
        "do_normalize do_convert_rgb"
    ).split()
    given = {name: clip[name] for name in names if clip.get(name) is not None}
    return llava_image_processor_class()(**given, do_pad=config.get("image_aspect_ratio") == "pad")


def build_tokenizer(path: Path, model_max_length: int) -> Any:
    """A `tokenizers` tokenizer with the ids of the slow legacy Llama tokenizer, plus `<image>` as the last id.

    LLaVA tokenizes the pieces around an image one by one, and the slow tokenizer puts a space before each; so does a
    normalizer, which runs on each piece between special tokens, and always, unless the piece is empty.

    Raises:
        FileNotFoundError, ValueError: no SentencePiece model, or one that is not Llama's kind.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    if not path.is_file():
        raise FileNotFoundError(f"no {path}: LLaVA checkpoints hold Llama's SentencePiece tokenizer.model")
    extracted = SentencePieceExtractor(str(path)).extract(BPE)
    backend = Tokenizer(
        BPE(extracted["vocab"], extracted["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", extracted["vocab"]["<s>"])]
    )
    special = [AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>", IMAGE_TOKEN)]
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=model_max_length,
        padding_side="left",  # for generation in batches
        clean_up_tokenization_spaces=False,
    )
    slow = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (SYSTEM + " USER: ", "\nWhat  is\tit? ASSISTANT: Ünïcode 図", " x"):
        if tokenizer(text, add_special_tokens=False).input_ids != slow.encode(text):
            raise ValueError(f"{path} is not a tokenizer of Llama's kind (byte pairs, identity normalisation)")
    return tokenizer


def main(argv: list[str]) -> None:
    """`convert --model LLAVA_DIR --out HF_DIR`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_prune convert",
        description="Write a LLaVA checkpoint as a Hugging Face LlavaForConditionalGeneration with its processor.",
    )
    parser.add_argument("--model", required=True, help="checkpoint folder in LLaVA's format")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        convert(args.model, args.out)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"llava_prune convert: {error}")
    print(f"wrote {args.out}: load it with transformers' LlavaForConditionalGeneration and AutoProcessor")
