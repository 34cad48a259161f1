"""`visualize` on the llava stack: tokens lie where the vision tower saw them, and the files say what was kept."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from painting import SIZES, check_patches, painted, seen
from PIL import Image
from reference import FOLDER, pictures
from tiny import IMAGE_TOKEN, batch_of, randomise_pruners, tiny_llava

from llava_prune import PruneConfig, attach_pruners, last_report, prune_mode, save_pruners
from llava_prune.testbed.install import install_base
from llava_prune.visualize import draw_kept_tokens, recorded_sample
from llava_prune.visualize.chat import LlavaChat
from llava_prune.visualize.command import main
from llava_prune.visualize.grid import Grid, Tower, square_grid
from llava_prune.visualize.png import _drawings
from llava_prune.visualize.recorded import build_parser, read_samples
from llava_prune.visualize.sample import Sample

PRUNERS = FOLDER / "pruners"
QUESTION = "What color is the shape in the top left?"
HOSTILE = 'Is "a" < b & c? </script><script>alert(1)</script> $x /*'
POINTS = [[2, 1], [1, 2], [2, 2]]  # width and height in tiles


def chat_of(pixels=128, patch=16, **config):
    """A `LlavaChat` without its language model: what `grids` reads, with LLaVA's real image processor."""
    from transformers import CLIPImageProcessor

    chat = LlavaChat.__new__(LlavaChat)
    tower = SimpleNamespace(config=SimpleNamespace(image_size=pixels, patch_size=patch))
    chat.model = SimpleNamespace(config=SimpleNamespace(**config), get_vision_tower=lambda: tower)
    square = {"height": pixels, "width": pixels}
    chat.processor = CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size=square)
    return chat


# ---- where tokens lie


@pytest.mark.parametrize("pixels", [128, 140], ids=["whole", "rest"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_a_token_lies_over_what_its_patch_saw(ratio, size, pixels):
    from llava.mm_utils import process_images

    chat = chat_of(pixels, image_aspect_ratio=ratio)
    (grid,) = chat.grids(size, 64)
    values = process_images([painted(grid, size)], chat.processor, chat.model.config)
    low, high = seen(values, chat.processor, 16)
    check_patches(low[0], high[0], grid)
    tokens = grid.token_map(*size)
    unseen = (tokens < 0).mean()
    assert (unseen == 0) == (pixels == 128 and (ratio == "pad" or size[0] == size[1]))


@pytest.mark.parametrize("pixels", [128, 140], ids=["whole", "rest"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_anyres_tokens_lie_over_what_their_patches_saw(tower_folder, size, pixels):
    """Through LLaVA's real tiling, unpadding and newlines, with patches' colours in place of the tower's features."""
    from llava.mm_utils import process_images

    settings = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[side * pixels for side in point] for point in POINTS],
    }
    model = tiny_llava(tower_folder / f"anyres{pixels}", image=pixels, patch=16, merge_type="spatial_unpad")
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.get_model().image_newline.data.fill_(-1e3)
    chat = chat_of(pixels, **settings)
    ids = torch.tensor([[1, IMAGE_TOKEN, 5]])

    def packed(picture):
        values = process_images([picture], chat.processor, model.config)
        tokens = []
        for features in seen(values[0], chat.processor, 16):
            padded = torch.nn.functional.pad(features, (0, 29))
            model.encode_images = lambda _, padded=padded: padded
            tokens.append(
                model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, values, [size])[4][0, 1:-1]
            )
        return tokens

    count = len(packed(Image.new("RGB", size))[0])
    grids = chat.grids(size, count)
    assert [grid.view for grid in grids] == ["picture", "tiles"]
    for grid in grids:
        low, high = packed(painted(grid, size))
        places = torch.arange(grid.first, grid.end).view(len(grid.rows), grid.stride)
        newline = places[:, len(grid.columns) :]
        assert (low[newline] == -1e3).all() and newline.numel() == (0 if grid.view == "picture" else len(grid.rows))
        order = places[:, : len(grid.columns)].flatten()
        check_patches(low[order], high[order], grid)
    with pytest.raises(ValueError, match="cut off"):
        chat.grids(size, count - 1)


def test_what_has_no_place_in_the_picture_is_refused():
    for tokens in (63, 66, 128):
        with pytest.raises(ValueError, match="not the 8 x 8 patches"):
            chat_of(image_aspect_ratio="pad").grids((40, 30), tokens)
    assert chat_of(image_aspect_ratio="pad").grids((40, 30), 65)[0].first == 1  # a class token
    with pytest.raises(ValueError, match="mm_patch_merge_type 'flat'"):
        chat_of(image_aspect_ratio="anyres").grids((40, 30), 64)
    with pytest.raises(ValueError, match="one image"):
        square_grid((40, 30), 288)


def test_a_padded_square_is_llavas_pad():
    (grid,) = chat_of(image_aspect_ratio="pad").grids((40, 30), 64)
    assert np.array_equal(grid.token_map(40, 30), square_grid((40, 30), 64).token_map(40, 30))


# ---- what was kept, and how likely


@pytest.mark.parametrize("residual", [False, True])
def test_keep_probabilities_are_the_same_in_masked_and_hard(llava, residual):
    settings = {"pruning_layers": (1, 3, 4), "target_token_num": 10, "pruner_dim": 16, "use_attn_residual": residual}
    randomise_pruners(attach_pruners(llava, PruneConfig(**settings)))
    reports = []
    for mode in ("masked", "hard"):
        with prune_mode(llava, mode), torch.no_grad():
            llava(**batch_of([9, 14, 7], [1, 2, 0]))
        reports.append(last_report(llava))
    for layer in (1, 3, 4):
        for masked, hard in zip(*(report.probabilities[layer] for report in reports), strict=True):
            torch.testing.assert_close(hard, masked, atol=1e-5, rtol=0, equal_nan=True)
    hard = reports[1]
    for sample, count in enumerate((16, 32, 0)):
        left = torch.arange(count)
        for layer in (1, 3, 4):
            probability = hard.probabilities[layer][sample]
            assert len(probability) == count
            assert torch.equal((~probability.isnan()).nonzero().flatten(), left)
            kept = hard.kept[layer][sample]
            if len(kept) > 1:  # else min_keep may have decided
                assert torch.equal((probability > 0.5).nonzero().flatten(), kept)
            left = kept


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The testbed's base and three pictures: wide, high and square."""
    folder = tmp_path_factory.mktemp("visualize")
    install_base(folder)
    for name, picture in zip(("wide", "high", "square"), pictures(), strict=True):
        picture.save(folder / f"{name}.png")
    return folder


def command(folder, *more, image="wide.png", pruners=PRUNERS):
    model = folder / "llava-mosaic-tiny"
    words = ["--model", model, "--pruners", pruners, "--image", folder / image, "--out", folder / "out.png"]
    return [str(word) for word in (*words, "--max_new_tokens", "8", *more)]


@pytest.fixture(scope="module")
def written(folder):
    words = ["--question", QUESTION, "--question", HOSTILE, "--html", folder / "p.html", "--json", folder / "p.json"]
    main(command(folder, *words))
    return folder


def test_json_says_what_the_report_says(written):
    reference = json.loads((FOLDER / "reference.json").read_text())[0]  # from last_report, of the same question
    document = json.loads((written / "p.json").read_text())
    first, second = document["questions"]
    assert {layer: entry["kept"] for layer, entry in first["layers"].items()} == reference["kept"]
    assert second["question"] == HOSTILE and second["answers"].keys() == {"origin", "hard"}
    assert document["vision_tokens"] == 144 and document["picture"]["width"] == 260
    (grid,) = document["grids"]
    assert np.allclose(grid["rows"], square_grid((260, 180), 144).rows)
    for entry in first["layers"].values():
        likely = [token for token, p in enumerate(entry["probability"]) if p is not None and p > 0.5]
        assert likely == entry["kept"] and len(entry["probability"]) == 144


def test_answers_are_those_of_the_model(written):
    from llava.model.builder import load_pretrained_model

    reference = json.loads((FOLDER / "reference.json").read_text())[0]
    tokenizer = load_pretrained_model(str(written / "llava-mosaic-tiny"), None, "llava", device="cpu")[0]
    answers = json.loads((written / "p.json").read_text())["questions"][0]["answers"]
    assert answers["hard"] == tokenizer.decode(reference["answer"][:9], skip_special_tokens=True).strip()


def test_the_page_fetches_nothing_and_escapes_what_was_asked(written):
    from html.parser import HTMLParser

    page = (written / "p.html").read_text()
    tags, scripts = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

        def handle_data(self, data):
            if tags and tags[-1][0] == "script":
                scripts.append(data)

    Reader().feed(page)
    assert sum(tag == "script" for tag, _ in tags) == 2 and not any(tag in ("link", "iframe") for tag, _ in tags)
    assert not any(name in attributes for _, attributes in tags for name in ("src", "href", "srcset", "data"))
    text = page.replace(page[page.index("data:image/jpeg;base64,") :].split('"')[0], "")
    assert "http" not in text and "url(" not in text and "import" not in text and "fetch" not in text
    assert HOSTILE not in page and "Is &quot;a&quot; &lt; b &amp; c? &lt;/script&gt;" in page
    assert json.loads(scripts[0]) == json.loads((written / "p.json").read_text())


def test_the_picture_has_a_block_a_question(written, folder):
    with Image.open(written / "out.png") as both:
        two = both.size
    main(command(folder, "--question", QUESTION))
    with Image.open(written / "out.png") as single:
        assert single.size[0] == two[0] and single.size[1] < 0.7 * two[1]


def test_a_budget_is_kept_exactly(folder):
    words = ["--question", QUESTION, "--average_tokens", "60", "--json", folder / "b.json"]
    main(command(folder, *words, image="high.png"))
    document = json.loads((folder / "b.json").read_text())
    assert document["budget"] == 60 and 59 < document["questions"][0]["average_tokens"] <= 60


def test_any_resolution_is_drawn(tmp_path):
    from safetensors.torch import load_file, save_file

    model = install_base(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    config |= {"image_grid_pinpoints": [[384, 192], [192, 384]]}
    (model / "config.json").write_text(json.dumps(config))
    pictures()[0].save(tmp_path / "wide.png")
    weights = load_file(model / "model.safetensors")

    def run(newline):
        tensors = {**weights, "model.image_newline": torch.full((128,), newline, dtype=torch.float16)}
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        main(command(tmp_path, "--question", QUESTION, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html"))

    run(0.1)
    document = json.loads((tmp_path / "a.json").read_text())
    whole, tiles = document["grids"]
    assert (whole["view"], tiles["view"]) == ("picture", "tiles")
    assert tiles["first"] + len(tiles["rows"]) * tiles["stride"] == document["vision_tokens"] > 300
    with pytest.raises(SystemExit, match="computes NaN"):
        run(float("nan"))


def test_the_picture_stands_between_its_marks_where_the_model_has_them(folder):
    from transformers import LlamaTokenizer

    from llava_prune.reporting import samples

    tokenizer = LlamaTokenizer.from_pretrained(folder / "llava-mosaic-tiny")
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    model = SimpleNamespace(config=SimpleNamespace(mm_use_im_start_end=True))
    ids = samples.LlavaInputs(model, tokenizer, None, "v1")._ids(samples.Sample(None, "What?")).tolist()
    place = ids.index(IMAGE_TOKEN)
    assert tokenizer.convert_ids_to_tokens([ids[place - 1], ids[place + 1]]) == ["<im_start>", "<im_end>"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--question", " "], "--question is empty"),
        (["--question", "<image> what?"], "leave <image> out"),
        (["--question", "?", "--image", "/nowhere.png"], "no picture /nowhere.png"),
        (["--question", "?", "--image", __file__], "can not be read as a picture"),
        (["--question", "?", "--html", "/nowhere/x.html"], "no folder /nowhere"),
        (["--question", "?", "--pruners", "/nowhere"], "no prune_config.json in /nowhere"),
        (["--question", "?", "--conv_mode", "v9"], "no conversation template 'v9'"),
        (["--question", "?", "--model", "/nowhere/model"], "and 'model' has none"),
        (["--question", "?", "--average_tokens", "3"], "floor"),
    ],
)
def test_what_can_not_be_used_is_named(folder, words, message):
    with pytest.raises(SystemExit, match=message):
        main(command(folder, *words))
    with pytest.raises(SystemExit, match="2"):  # argparse: no question
        main(command(folder))


def test_a_token_merger_is_refused(folder, tmp_path):
    from llava.model.builder import load_pretrained_model

    path = folder / "llava-mosaic-tiny"
    model = load_pretrained_model(str(path), None, "llava-mosaic-tiny", device="cpu")[1].float()
    settings = {"pruning_layers": (1, 3), "target_token_num": 20, "pruner_dim": 16, "enable_token_merger": True}
    attach_pruners(model, PruneConfig(**settings, merger_tokens=36))
    save_pruners(model, tmp_path)
    with pytest.raises(SystemExit, match="merged tokens have no place"):
        main(command(folder, "--question", "?", pruners=tmp_path))


# ---- drawing


def test_kept_tokens_keep_their_pixels_and_dropped_ones_fade(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 200, (4, 8, 3), dtype=np.uint8))
    pixels = np.asarray(picture)
    # a wide picture was padded above and below: its upper half lies in the upper tokens
    grid = square_grid((8, 4), 4)
    sample = Sample(tmp_path / "x.png", "?", {}, 4, (grid,), 2.0, {1: [0, 3]}, {1: [0.9, 0.1, float("nan"), 0.8]})
    (heat,), (kept,) = _drawings(sample, picture, [1])
    assert heat[0] == "layer 1: keep probability" and kept[0] == "layer 1: 2 kept"
    assert np.array_equal(kept[1][:2, :4], pixels[:2, :4]) and np.array_equal(kept[1][2:, 4:], pixels[2:, 4:])
    assert (kept[1][:2, 4:] >= 225).all() and (kept[1][2:, :4] >= 225).all()
    assert (heat[1][2:, :4] >= 225).all() and not (heat[1][:2] >= 225).all(-1).any()
    # the right half of it was cut off
    grid = Grid("picture", 0, 2, rows=((0, 0.5), (0.5, 1)), columns=((0, 0.25), (0.25, 0.5)))
    ((_, shown),) = _drawings(Sample(tmp_path, "?", {}, 4, (grid,), 4.0, {1: [0, 1, 2, 3]}), picture, [1])[0]
    assert np.array_equal(shown[:, :4], pixels[:, :4]) and np.isin(shown[:, 4:], (150, 185)).all()


def test_recorded_samples_are_drawn(tmp_path):
    pictures()[0].save(tmp_path / "x.png")
    line = {"vision_tokens": 144, "average_tokens": 60.0, "kept": {"1": [0, 80], "3": [80]}}
    sample = recorded_sample(line, tmp_path / "x.png", "?", {"hard": "yes"})
    draw_kept_tokens([sample, sample], tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as drawn:
        assert drawn.size[0] > 500
    with pytest.raises(ValueError, match="one image"):
        recorded_sample({**line, "vision_tokens": 288}, tmp_path / "x.png", "?", {})
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_kept_tokens([], tmp_path / "x.png")


def test_the_recorded_form_of_the_command(tmp_path):
    pictures()[0].save(tmp_path / "x.png")
    lines = [{"mode": "hard", "vision_tokens": 0}]
    lines += [{"mode": "hard", "vision_tokens": 144, "average_tokens": 60.0, "kept": {"1": [0, 80]}}]
    (tmp_path / "report.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions = [{"text": "no picture"}, {"text": "what?", "image": "x.png"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    words = ["--report", tmp_path / "report.jsonl", "--question-file", tmp_path / "questions.jsonl"]
    words = [str(word) for word in (*words, "--image-folder", tmp_path, "--out", tmp_path / "kept.png")]
    main(words)
    assert (tmp_path / "kept.png").is_file()
    with pytest.raises(SystemExit, match="2"):  # the two forms do not mix
        main([*words, "--model", "x"])
    (tmp_path / "report.jsonl").write_text(json.dumps({**lines[1], "mode": "origin", "kept": {}}))
    with pytest.raises(SystemExit, match="drops nothing"):
        main(words)


def test_report_questions_and_answers_must_be_of_one_run(tmp_path):
    pictures()[0].save(tmp_path / "x.png")
    kept = {"mode": "hard", "vision_tokens": 144, "average_tokens": 60.0, "kept": {"1": [0, 80]}}
    # a raw U+2028 is part of a JSON string, and blank lines are none
    asked = [{"question_id": i, "image": "x.png", "text": f"what\u2028{i}?"} for i in range(4)]

    def read(report, questions=asked, answers=None, end="\n\n"):
        words = ["--question-file", "q.jsonl", "--report", "r.jsonl", "--image-folder", "."]
        for name, rows in (("q", questions), ("r", report), ("a", answers or [])):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + end)
        words += ["--answers-file", "a.jsonl"] if answers else []
        words = [str(tmp_path / word) if word[0] != "-" else word for word in words]
        return read_samples(build_parser().parse_args(words))

    chunk, merged = [kept] * 2, [{"question_id": i, **kept} for i in range(4)]
    answers = [{"question_id": i, "text": f"no\u2028{i}"} for i in range(4)]
    for sample, question, answer in zip(read(merged, answers=answers), asked, answers, strict=True):
        assert sample.question == question["text"] and sample.answers == {"a": answer["text"]}
    assert len(read(chunk, asked[2:])) == 2
    for mode in ("origin", "hard"):
        (tmp_path / mode).mkdir()
        (tmp_path / mode / "merge.jsonl").write_text("\n".join(json.dumps({"text": mode}) for _ in range(4)))
    words = ["--question-file", "q.jsonl", "--report", "r.jsonl", "--image-folder", "."]
    words += ["--answers-file", "origin/merge.jsonl", "--answers-file", "hard/merge.jsonl"]
    read(merged)
    words = [str(tmp_path / word) if word[0] != "-" else word for word in words]
    sample = read_samples(build_parser().parse_args(words))[0]
    assert sample.answers == {str(tmp_path / mode / "merge"): mode for mode in ("origin", "hard")}
    nameless = [{"image": "x.png", "text": "what?"}] * 4
    assert len(read(merged, nameless)) == len(read([kept] * 4, answers=answers)) == 4
    for files, message in (
        ((chunk,), r"r\.jsonl holds 2 lines, .*q\.jsonl 4 questions: give the merged file"),
        ((merged, asked[:3]), r"r\.jsonl holds 4 lines, .*q\.jsonl 3 questions"),
        ((merged, asked[::-1]), r"r\.jsonl, line 1, is of question 0, and that of .*q\.jsonl is 3: .* in its order"),
        ((merged, asked, answers[:2]), r"a\.jsonl holds 2 lines"),
        (([kept] * 4, asked, answers[::-1]), r"a\.jsonl, line 1, is of question 3"),
        ((merged, [*asked[:3], {"text": "?"}]), r"q\.jsonl, question 4, has no image"),
        ((merged, asked, None, "\n{"), r"r\.jsonl, line 5, is not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            read(*files)


def test_a_tower_loses_the_rest_of_its_input():
    assert Tower(384, 14).side == 27 and Tower(384, 14).spans()[-1] == (364, 378)
