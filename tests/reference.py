"""What the llava stack computes for a few conversations, stored for the hf stack to be held against.

    PYTHONPATH=. python tests/reference.py               # with the llava stack: writes tests/hf/reference/
    PYTHONPATH=. python tests/reference.py --pruners     # draws new random pruners first

Both stacks import this file: `pictures` and `CONVERSATIONS` are the questions, `build` the llava stack's answers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "hf" / "reference"
BASE = Path(__file__).parents[1] / "llava_prune" / "testbed" / "base"
NEW_TOKENS = 16
# an image stands before the text of its turn; the last turn is to be answered
CONVERSATIONS = [
    {"pictures": [0], "turns": ["What color is the shape in the top left?"]},
    {"pictures": [1, 2], "turns": ["Is there a circle in both?"]},
    {"pictures": [2], "turns": ["What shape is it?", "circle", "  Which  color has it, then?"]},
    {"pictures": [], "turns": ["What do you see?"]},
]


def pictures():
    """Three pictures, wide, high and square, the same with every version of numpy and Pillow."""
    from PIL import Image

    generator = np.random.default_rng(0)
    drawn = []
    for width, height in ((260, 180), (150, 210), (192, 192)):
        cells = generator.integers(0, 256, (height // 30 + 1, width // 30 + 1, 3), dtype=np.uint8)
        drawn.append(Image.fromarray(cells.repeat(30, 0).repeat(30, 1)[:height, :width]))
    return drawn


def build(folder):
    """Runs the shipped base with the stored random pruners on the llava stack.

    Args:
        folder: an empty folder for a copy of the base.

    Returns:
        What goes into `reference.json`, and the tensors of `reference.safetensors`.
    """
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from transformers import LlamaTokenizer

    from llava_prune import last_report, load_pruners, prune_mode
    from llava_prune.masks import keep_probability
    from llava_prune.testbed.install import install_base

    path = install_base(folder)
    tokenizer = LlamaTokenizer.from_pretrained(path)
    model = LlavaLlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
    tower = model.get_vision_tower()
    tower.load_model()
    tower.float()
    handle = load_pruners(model, FOLDER / "pruners")
    pixels = process_images(pictures(), tower.image_processor, model.config)

    cases, tensors = [], {"pixels": pixels[:, :, ::16, ::16].contiguous()}
    for number, case in enumerate(CONVERSATIONS):
        conversation = conv_templates["v1"].copy()
        for i, turn in enumerate(case["turns"]):
            images = "<image>\n" * len(case["pictures"]) if i == 0 else ""
            conversation.append_message(conversation.roles[i % 2], images + turn)
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX)
        images = pixels[case["pictures"]] if case["pictures"] else None
        entry = {"ids": ids, "kept": {}}
        with torch.no_grad(), prune_mode(model, "hard"):
            inputs = torch.tensor([ids])
            tensors[f"logits_{number}"] = model(inputs, images=images).logits[0, -1]
            if images is not None:
                entry["kept"] = {layer: kept[0].tolist() for layer, kept in last_report(model).kept.items()}
            answer = model.generate(inputs, images=images, do_sample=False, max_new_tokens=NEW_TOKENS)
        entry["answer"] = answer[0].tolist()
        if images is not None:  # a decision on the edge would tell nothing about the stacks
            with torch.no_grad(), prune_mode(model, "masked"):
                model(inputs, images=images)
            margins = [
                (keep_probability(x) - handle.config.threshold).abs().min()
                for x in handle.state.record.logits.values()
            ]
            assert min(margins) > 1e-5, margins
        cases.append(entry)
    handle.remove()
    attach_merged(model)
    for entry, case in zip(cases, CONVERSATIONS, strict=True):
        if case["pictures"]:
            inputs = torch.tensor([entry["ids"]])
            with prune_mode(model, "hard"):
                answer = model.generate(
                    inputs, images=pixels[case["pictures"]], do_sample=False, max_new_tokens=NEW_TOKENS
                )
            kept = {layer: rows[0].tolist() for layer, rows in last_report(model).kept.items()}
            entry["merged"] = {"kept": kept, "answer": answer[0].tolist()}
    return cases, tensors


def attach_merged(model):
    """Random pruners with a token merger, the same on both stacks."""
    from law import randomise_pruners

    from llava_prune import PruneConfig, attach_pruners

    settings = {"pruning_layers": (2, 4, 6), "target_sparsity": 0.5, "pruner_dim": 16, "pruner_heads": 4}
    torch.manual_seed(3)
    handle = attach_pruners(model, PruneConfig(**settings, enable_token_merger=True, merger_tokens=36))
    randomise_pruners(handle)
    return handle


def draw_pruners(folder):
    """Stores random pruners with the stored settings."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from tiny import randomise_pruners

    from llava_prune import PruneConfig, attach_pruners, save_pruners
    from llava_prune.testbed.install import install_base

    settings = json.loads((FOLDER / "pruners" / "prune_config.json").read_text())["prune_config"]
    model = LlavaLlamaForCausalLM.from_pretrained(install_base(folder), torch_dtype=torch.float32)
    torch.manual_seed(0)
    randomise_pruners(attach_pruners(model, PruneConfig.from_dict(settings)))
    save_pruners(model, FOLDER / "pruners")


def write(new_pruners):
    """Stores what `build` returns, of the stored pruners or of new ones."""
    import tempfile

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        if new_pruners:
            draw_pruners(Path(folder))
        cases, tensors = build(Path(folder))
    (FOLDER / "reference.json").write_text(json.dumps(cases) + "\n")
    save_file(tensors, FOLDER / "reference.safetensors")


if __name__ == "__main__":
    write("--pruners" in sys.argv[1:])
