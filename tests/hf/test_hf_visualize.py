"""`visualize` on the hf stack: tokens lie where the vision tower saw them, and the llava stack's tokens are drawn."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from painting import SIZES, check_patches, painted, seen
from PIL import Image
from reference import BASE, FOLDER, pictures
from tiny_hf import PATCH, batch_of, randomise_pruners, tiny

from llava_prune import PruneConfig, attach_pruners, last_report, prune_mode, save_pruners
from llava_prune.convert import CHAT_TEMPLATE, build_tokenizer
from llava_prune.convert import main as convert
from llava_prune.testbed.install import install_base
from llava_prune.visualize.chat import HfChat
from llava_prune.visualize.command import main

REFERENCE = json.loads((FOLDER / "reference.json").read_text())
POINTS = [[1, 2], [2, 1], [2, 2]]  # height and width in tiles


def chat_of(model_type, processor, pixels=128, **config):
    """An `HfChat` without its language model: what `grids` reads, with a real image processor."""
    chat = HfChat.__new__(HfChat)
    vision = SimpleNamespace(image_size=pixels, patch_size=16, model_type="clip_vision_model")
    chat.model = SimpleNamespace(config=SimpleNamespace(model_type=model_type, vision_config=vision, **config))
    chat.processor = SimpleNamespace(image_processor=processor)
    return chat


def square_processors(pixels):
    square = {"height": pixels, "width": pixels}
    clip = {"size": {"shortest_edge": pixels}, "crop_size": square}
    return {
        "clip": transformers.CLIPImageProcessorPil(**clip),
        "llava": transformers.LlavaImageProcessorPil(**clip, do_pad=True),
        "siglip": transformers.SiglipImageProcessorPil(size=square),
    }


@pytest.mark.parametrize("pixels", [128, 140], ids=["whole", "rest"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["clip", "llava", "siglip"])
def test_a_token_lies_over_what_its_patch_saw(kind, size, pixels):
    processor = square_processors(pixels)[kind]
    (grid,) = chat_of("llava", processor, pixels).grids(size, 64)
    values = processor(painted(grid, size), return_tensors="pt")["pixel_values"]
    low, high = seen(values, processor, 16)
    check_patches(low[0], high[0], grid)


@pytest.mark.parametrize("pixels", [128, 140], ids=["whole", "rest"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["next", "onevision", "onevision-shrunk"])
def test_anyres_tokens_lie_over_what_their_patches_saw(kind, size, pixels):
    """Through the real tiling, unpadding, resampling and newlines, with patches' colours in place of features."""
    square = {"height": pixels, "width": pixels}
    points = [[side * pixels for side in point] for point in POINTS]
    if kind == "next":
        settings = {"size": {"shortest_edge": pixels}, "crop_size": square}
        processor = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=points, **settings)
        packing, more = {"vision_feature_select_strategy": "full"}, {}
    else:
        processor = transformers.LlavaOnevisionImageProcessorPil(image_grid_pinpoints=points, size=square)
        packing = more = {"vision_aspect_ratio": "anyres_max_1" if "shrunk" in kind else "anyres_max_9"}
    model = tiny(kind.split("-")[0]).model
    model.config.image_grid_pinpoints = points
    model.config.vision_config.image_size, model.config.vision_config.patch_size = pixels, 16
    model_type = "llava_next" if kind == "next" else "llava_onevision"
    chat = chat_of(model_type, processor, pixels, image_grid_pinpoints=points, **more)
    newline = torch.full((3,), -1e3)

    def packed(picture):
        values = processor(picture, return_tensors="pt")
        sizes = torch.as_tensor(values["image_sizes"])
        for features in seen(values["pixel_values"][0], processor, 16):
            yield model.pack_image_features([features], sizes, image_newline=newline, **packing)[0][0]

    count = len(next(packed(Image.new("RGB", size))))
    grids = chat.grids(size, count)
    assert [grid.view for grid in grids] == ["picture", "tiles"]
    for grid in grids:
        low, high = packed(painted(grid, size))
        if "shrunk" in kind:  # a token mixes patches, and a patch lies under several tokens
            low = high = (low + high) / 2
        places = torch.arange(grid.first, grid.end).view(len(grid.rows), grid.stride)
        columns = len(grid.columns)
        assert (low[places[:, columns:]] == -1e3).all() and grid.stride - columns == (grid.view == "tiles")
        order = places[:, :columns].flatten()
        check_patches(low[order], high[order], grid)
    with pytest.raises(ValueError, match="cut off"):
        chat.grids(size, count - 1)


def test_towers_without_a_square_input_are_refused():
    chat = chat_of("llava", None)
    chat.processor.image_processor = square_processors(128)["clip"]
    chat.model.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="'pixtral' can not be drawn"):
        chat.grids((40, 30), 64)


@pytest.mark.parametrize("kind", ["llava", "next"])
def test_keep_probabilities_are_the_same_in_masked_and_hard(kind):
    model = tiny(kind)
    settings = {"pruning_layers": (1, 3, 4), "target_sparsity": 0.5, "pruner_dim": 16, "pruner_heads": 4}
    randomise_pruners(attach_pruners(model, PruneConfig(**settings)))
    reports = []
    for mode in ("masked", "hard"):
        with prune_mode(model, mode), torch.no_grad():
            model(**batch_of(model, [9, 14, 7], [1, 2, 0]))
        reports.append(last_report(model).probabilities)
    for layer in (1, 3, 4):
        for masked, hard in zip(reports[0][layer], reports[1][layer], strict=True):
            torch.testing.assert_close(hard, masked, atol=1e-5, rtol=0, equal_nan=True)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The converted testbed base and a wide picture."""
    folder = tmp_path_factory.mktemp("visualize")
    convert(["--model", str(install_base(folder)), "--out", str(folder / "hf")])
    pictures()[0].save(folder / "wide.png")
    return folder


def command(folder, model, pruners, *more):
    words = ["--stack", "hf", "--model", model, "--pruners", pruners, "--image", folder / "wide.png"]
    words += ["--out", folder / "out.png", "--json", folder / "out.json", "--html", folder / "out.html"]
    return [str(word) for word in (*words, "--max_new_tokens", "8", *more)]


def test_json_has_the_tokens_that_the_llava_stack_kept(folder):
    question = "What color is the shape in the top left?"
    main(command(folder, folder / "hf", FOLDER / "pruners", "--question", question, "--question", "Why?"))
    document = json.loads((folder / "out.json").read_text())
    first, second = document["questions"]
    assert {layer: entry["kept"] for layer, entry in first["layers"].items()} == REFERENCE[0]["kept"]
    tokenizer = build_tokenizer(BASE / "tokenizer.model", 512)
    expected = tokenizer.decode(REFERENCE[0]["answer"][:9], skip_special_tokens=True).strip()
    assert first["answers"]["hard"] == expected and second["question"] == "Why?"
    assert (folder / "out.png").stat().st_size > 10_000 and "<canvas" not in (folder / "out.html").read_text()


def test_llava_next_is_drawn_in_both_views(folder, tmp_path):
    pixels, tokenizer = 32, build_tokenizer(BASE / "tokenizer.model", 512)
    model = tiny("next", vocab_size=len(tokenizer))
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model.config.image_token_id = image_token
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(
            image_grid_pinpoints=model.config.image_grid_pinpoints,
            size={"shortest_edge": pixels},
            crop_size={"height": pixels, "width": pixels},
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(tmp_path / "next")
    processor.save_pretrained(tmp_path / "next")
    settings = {"pruning_layers": (1, 3, 4), "target_sparsity": 0.5, "pruner_dim": 16, "pruner_heads": 4}
    randomise_pruners(attach_pruners(model, PruneConfig(**settings)))
    save_pruners(model, tmp_path / "pruners")
    main(command(folder, tmp_path / "next", tmp_path / "pruners", "--allow_other_base", "--question", "What?"))
    document = json.loads((folder / "out.json").read_text())
    whole, tiles = document["grids"]
    assert (whole["view"], tiles["view"]) == ("picture", "tiles")
    assert tiles["first"] + len(tiles["rows"]) * tiles["stride"] == document["vision_tokens"]


def test_what_can_not_be_used_is_named(folder):
    with pytest.raises(SystemExit, match="--model_base is for the llava stack"):
        main(command(folder, folder / "hf", FOLDER / "pruners", "--model_base", "x", "--question", "?"))
    with pytest.raises(SystemExit, match="llava_prune visualize: "):
        main(command(folder, folder / "nowhere", FOLDER / "pruners", "--question", "?"))
