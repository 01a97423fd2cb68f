from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dblightning.geneval_prompts import CLASSES, COLORS, held_out_samples, train_samples, validation_samples
from dblightning.rewards import GenEvalAccuracy, build_reward
from dblightning.rewards.detection import Detection, TransformersDetector, instances, mask_boxes
from dblightning.rewards.geneval_rules import COLOR_TEMPLATES, crop, faults, group_objects, known_samples, relations
from tests.rewards.tiny import pictures, randomise, save_huggingface_clip

#: COCO's labels as COCO spells them, and with Pascal VOC's spellings, which some detectors keep
RENAMED = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
COCO = [RENAMED.get(name, name) for name in CLASSES]
VOC = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "potted plant": "pottedplant",
       "dining table": "diningtable", "tv": "tvmonitor"}  # fmt: skip


def thing(label: str, x: float = 50, y: float = 50, score: float = 0.95, size: float = 10) -> Detection:
    """An object of ``size`` × ``size`` pixels around (x, y)."""
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def no_colors(objects: list[Detection], name: str) -> list[str]:
    raise AssertionError("this prompt asks for no colour")


def sample(tag: str, *include: dict, exclude: list | None = None) -> dict:
    return {"tag": tag, "include": list(include), "exclude": exclude or [], "prompt": ""}


def correct(found: list[Detection], wanted: dict, colors_of=no_colors) -> bool:
    threshold = 0.9 if wanted["tag"] == "counting" else 0.3
    return not faults(group_objects(found, threshold), wanted, colors_of)


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_single_object_has_to_be_found_above_the_threshold() -> None:
    wanted = sample("single_object", {"class": "dog", "count": 1})
    assert correct([thing("dog", score=0.31)], wanted)
    assert not correct([thing("dog", score=0.3)], wanted)
    assert not correct([thing("cat")], wanted)
    assert not correct([], wanted)
    assert correct([thing("dog"), thing("dog"), thing("cat")], wanted)  # further objects are allowed


def test_two_objects_are_both_needed() -> None:
    wanted = sample("two_object", {"class": "dog", "count": 1}, {"class": "cat", "count": 1})
    assert correct([thing("cat"), thing("dog")], wanted)
    assert not correct([thing("cat"), thing("cat")], wanted)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_counting_wants_exactly_the_number_and_more_confidence(count: int) -> None:
    [wanted] = [
        each
        for each in train_samples()
        if each["tag"] == "counting" and each["include"][0] == {"class": "bed", "count": count}
    ] or [sample("counting", {"class": "bed", "count": count}, exclude=[{"class": "bed", "count": count + 1}])]
    for shown in range(1, 7):
        assert correct([thing("bed", score=0.91)] * shown, wanted) == (shown == count)
    # at 0.9 and below an object is neither counted for nor against
    assert correct([thing("bed", score=0.91)] * count + [thing("bed", score=0.9)] * 2, wanted)


def test_at_most_sixteen_objects_of_a_class_are_kept_the_most_confident_ones() -> None:
    found = [thing("bed", score=0.3 + 0.01 * index) for index in range(1, 21)]
    kept = group_objects([*found, thing("cup", score=0.4)], 0.3)
    assert [each.score for each in kept["bed"]] == sorted((each.score for each in found), reverse=True)[:16]
    assert len(kept["cup"]) == 1


def test_the_color_is_that_of_the_most_confident_object() -> None:
    wanted = sample("colors", {"class": "cup", "count": 1, "color": "red"})
    seen: list[list[Detection]] = []

    def colors_of(objects: list[Detection], name: str) -> list[str]:
        assert name == "cup"
        seen.append(objects)
        return ["red" if each.box[0] < 30 else "blue" for each in objects]

    red, blue = thing("cup", x=20, score=0.8), thing("cup", x=80, score=0.7)
    assert correct([blue, red], wanted, colors_of)
    assert not correct([blue._replace(score=0.9), red], wanted, colors_of)
    assert [len(each) for each in seen] == [1, 1]


def test_color_attribution_needs_each_color_on_its_object() -> None:
    wanted = sample(
        "color_attr",
        {"class": "cup", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "color": "blue"},
    )
    found = [thing("cup"), thing("dog")]
    assert correct(found, wanted, lambda objects, name: [{"cup": "red", "dog": "blue"}[name]])
    assert not correct(found, wanted, lambda objects, name: [{"cup": "blue", "dog": "red"}[name]])
    assert not correct(found, wanted, lambda objects, name: ["red"])
    assert not correct(found[:1], wanted, lambda objects, name: ["red"])


@pytest.mark.parametrize(
    ("relation", "x", "y"), [("left of", -1, 0), ("right of", 1, 0), ("above", 0, -1), ("below", 0, 1)]
)
def test_each_position_holds_for_its_side_only(relation: str, x: int, y: int) -> None:
    wanted = sample("position", {"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]})
    cup, dog = thing("cup", 100, 100), thing("dog", 100 + 40 * x, 100 + 40 * y)
    assert correct([cup, dog], wanted)
    assert not correct([thing("cup", *center(dog)), thing("dog", *center(cup))], wanted)
    assert not correct([cup, thing("dog", 100 + 40 * y, 100 + 40 * x)], wanted)
    assert not correct([dog], wanted)  # nothing to be beside
    assert not correct([cup], wanted)


def center(found: Detection) -> tuple[float, float]:
    left, top, right, bottom = found.box
    return (left + right) / 2, (top + bottom) / 2


def test_positions_at_the_borderline_follow_the_published_inequality() -> None:
    # two boxes of 10 × 10: the slack is 0.1 · (10 + 10) = 2 pixels. Along an axis (d − 2) / d > 1/2 means d > 4; on the
    # diagonal (d − 2) / (√2 d) > 1/2 means d > 2 / (1 − √2/2) = 6.83
    landmark = thing("cup").box
    assert relations(thing("dog", 50 + 4).box, landmark) == set()
    assert relations(thing("dog", 50 + 4.01).box, landmark) == {"right of"}
    assert relations(thing("dog", 50 - 4.01).box, landmark) == {"left of"}
    assert relations(thing("dog", 50, 50 + 4.01).box, landmark) == {"below"}
    assert relations(thing("dog", 50, 50 - 4).box, landmark) == set()
    assert relations(thing("dog", 50 + 6.82, 50 - 6.82).box, landmark) == set()
    assert relations(thing("dog", 50 + 6.84, 50 - 6.84).box, landmark) == {"right of", "above"}
    # larger objects need more distance: the slack is 0.1 · (10 + 50) = 6, so d > 12
    assert relations(thing("dog", 50 + 11.9, size=50).box, landmark) == set()
    assert relations(thing("dog", 50 + 12.1, size=50).box, landmark) == {"right of"}
    assert relations(landmark, landmark) == set()
    assert relations(thing("dog", 50 + 0.1).box, landmark, threshold=0.0) == {"right of"}


def test_only_the_most_confident_objects_are_placed() -> None:
    wanted = sample("position", {"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]})
    cup, left, right = thing("cup", 100), thing("dog", 40, score=0.8), thing("dog", 160, score=0.7)
    assert correct([cup, left, right], wanted)
    assert not correct([cup, left, right._replace(score=0.9)], wanted)


# ── the metric, on a stub detector ───────────────────────────────────────────────────────────────────────────────────


class StubDetector:
    """Reads the scene's number off the image's first pixel."""

    def __init__(self, scenes: list[list[Detection]]) -> None:
        self.scenes = scenes
        self.calls = 0

    def detect(self, images: Tensor, min_score: float) -> list[list[Detection]]:
        self.calls += 1
        numbers = (images[:, 0, 0, 0] * 255).round().long().tolist()
        return [[each for each in self.scenes[number] if each.score >= min_score] for number in numbers]


@pytest.fixture(scope="module")
def color_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_huggingface_clip(tmp_path_factory.mktemp("clip"), "quick_gelu", seed=5)


def numbered(count: int) -> Tensor:
    return (torch.arange(count).view(-1, 1, 1, 1) / 255).expand(count, 3, 32, 32).clone()


SCENES: dict[str, tuple[list[Detection], bool]] = {
    "a photo of a bench": ([thing("bench")], True),
    "a photo of a cow": ([thing("dog")], False),
    "a photo of a bicycle": ([thing("bicycle", score=0.5)], True),
}


def scenes_of_known_prompts() -> dict[str, tuple[list[Detection], bool]]:
    """SCENES, and of counting and position a right and a wrong one, read off the samples themselves."""
    by_tag = {tag: [each for each in train_samples() if each["tag"] == tag] for tag in ("counting", "position")}
    scenes = dict(SCENES)
    for right, each in zip((True, False), by_tag["counting"], strict=False):
        clause = each["include"][0]
        # an object of confidence 0.5 is there for every task but counting
        unsure = thing(clause["class"], score=0.5)
        scenes[each["prompt"]] = ([thing(clause["class"])] * (clause["count"] + (not right)) + [unsure], right)
    steps = {"left of": (-30, 0), "right of": (30, 0), "above": (0, -30), "below": (0, 30)}
    for right, each in zip((True, False), by_tag["position"], strict=False):
        landmark, placed = each["include"]
        x, y = steps[placed["position"][0]]
        sign = 1 if right else -1
        scenes[each["prompt"]] = (
            [thing(landmark["class"], score=0.5), thing(placed["class"], 50 + sign * x, 50 + sign * y, 0.5)],
            right,
        )
    return scenes


def test_score_compute_and_tasks_count_the_correct_images(color_clip: Path) -> None:
    scenes = scenes_of_known_prompts()
    stub = StubDetector([found for found, _ in scenes.values()])
    metric = GenEvalAccuracy(stub, color_clip)
    prompts, images = list(scenes), numbered(len(scenes))
    expected = torch.tensor([float(right) for _, right in scenes.values()])
    assert torch.equal(metric.score(images, prompts), expected)
    metric.update(images[:3], prompts[:3])
    metric.update(images[3:], prompts[3:])
    assert metric.compute() == expected.mean()
    # single_object 2 of 3, counting 1 of 2, position 1 of 2; overall is the mean of tasks, as GenEval's tables have it
    by_tag = metric.accuracy_by_tag()
    assert by_tag == pytest.approx(
        {"single_object": 2 / 3, "counting": 1 / 2, "position": 1 / 2, "overall": (2 / 3 + 1 / 2 + 1 / 2) / 3}
    )
    metric.reset()
    assert np.isnan(metric.accuracy_by_tag()["overall"])


def test_a_batch_scores_as_its_images_do_alone(color_clip: Path) -> None:
    scenes = scenes_of_known_prompts()
    metric = GenEvalAccuracy(StubDetector([found for found, _ in scenes.values()]), color_clip, micro_batch_size=2)
    prompts, images = list(scenes), numbered(len(scenes))
    singles = [metric.score(images[index : index + 1], prompts[index : index + 1]) for index in range(len(prompts))]
    assert torch.equal(metric.score(images, prompts), torch.cat(singles))


def test_scores_carry_no_gradient_and_the_networks_are_no_parameters(color_clip: Path) -> None:
    metric = GenEvalAccuracy(StubDetector([[thing("bench")]]), color_clip)
    assert not metric.differentiable
    assert not metric.score(numbered(1).requires_grad_(), ["a photo of a bench"]).requires_grad
    assert list(metric.parameters()) == []


def test_an_unknown_prompt_stops_before_anything_is_detected(color_clip: Path) -> None:
    stub = StubDetector([[]])
    metric = GenEvalAccuracy(stub, color_clip)
    with pytest.raises(ValueError, match=r"no GenEval metadata for the prompt 'a castle'.*metadata="):
        metric.score(numbered(2), ["a photo of a bench", "a castle"])
    assert stub.calls == 0


def test_all_known_prompts_have_their_own_metadata() -> None:
    samples = known_samples()
    assert len(samples) == 553 + 100 + 700
    for each in train_samples() + validation_samples() + held_out_samples():
        assert samples[each["prompt"]] == each


def test_metadata_of_other_prompts_comes_from_a_file_or_a_list(tmp_path: Path, color_clip: Path) -> None:
    wanted = sample("counting", {"class": "cat", "count": 5}, exclude=[{"class": "cat", "count": 6}])
    wanted["prompt"] = "five cats"
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps(wanted) + "\n")
    for metadata in (file, str(file), [wanted]):
        metric = GenEvalAccuracy(StubDetector([[thing("cat")] * 5, [thing("cat")] * 6]), color_clip, metadata=metadata)
        assert metric.score(numbered(2), ["five cats"] * 2).tolist() == [1, 0]
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        known_samples(tmp_path / "none.jsonl")
    for change, message in [
        ({"tag": "colour"}, "sample 1: tag must be one of single_object"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "80 classes.*unicorn"),
        ({"include": [{"class": "cat", "count": 0}]}, "count of at least 1"),
        ({"include": [{"class": "cat", "count": 1, "color": "gold"}]}, "color must be one of red"),
        ({"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, "index of an earlier clause"),
    ]:
        with pytest.raises(ValueError, match=message):
            known_samples([{**wanted, **change}])


# ── colours ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_colors_are_those_of_transformers_clip_on_pillows_crops(color_clip: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
    from transformers import CLIPModel

    from dblightning.rewards.clip import huggingface_tokenizer

    model = CLIPModel.from_pretrained(color_clip).eval()
    transform = Compose(
        [Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(),
         Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))]
    )  # fmt: skip
    tokenize = huggingface_tokenizer()
    metric = GenEvalAccuracy(StubDetector([]), color_clip)
    generator = torch.Generator().manual_seed(0)
    answers = []
    for index, image in enumerate(pictures(12, 60, 80)):
        mask = torch.zeros(60, 80, dtype=torch.bool)
        left, top = (int(torch.randint(0, 30, (), generator=generator)) for _ in range(2))
        mask[top + 2 : top + 25 : 3, left : left + 17 + index] = True  # stripes: most of the box is background
        found = Detection("cup", 0.9, (left - 0.4, top + 2.4, left + 17.3 + index, top + 25.0), mask)
        pixels = Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        grey = Image.new("RGB", pixels.size, "#999")
        part = Image.composite(pixels, grey, Image.fromarray(mask.numpy())).crop(found.box)
        logits = []
        for color in COLORS:
            texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
            with torch.no_grad():
                text = model.get_text_features(tokenize(texts)).pooler_output
                shown = model.get_image_features(transform(part)[None]).pooler_output[0]
            mean = (text / text.norm(dim=1, keepdim=True)).mean(0)
            logits.append(float(shown @ mean / mean.norm()))
        answers.append(COLORS[int(np.argmax(logits))])
        assert metric.colors(image, [found], "cup") == answers[-1:]
    assert len(set(answers)) > 1, "the pictures have to tell colours apart"
    assert len(COLOR_TEMPLATES) == 3


def test_a_crop_shows_the_object_on_grey() -> None:
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:9, 10:20] = True
    part = crop(image, Detection("cup", 1.0, (9.6, 4.0, 21.0, 9.0), mask))
    assert part.shape == (3, 5, 11)
    assert torch.equal(part[:, 1:, :10], image[:, 5:9, 10:20])
    assert (part[:, 0] == 153 / 255).all() and (part[:, :, 10] == 153 / 255).all()
    assert torch.equal(crop(image, Detection("cup", 1.0, (9.6, 4.0, 21.0, 9.0))), image[:, 4:9, 10:21])
    # a box beyond the border, and one thinner than a pixel
    assert crop(image, Detection("cup", 1.0, (-3.0, -2.0, 99.0, 99.0))).shape == (3, 20, 30)
    assert crop(image, Detection("cup", 1.0, (29.9, 19.8, 30.2, 20.1))).shape == (3, 1, 1)


# ── detectors of transformers ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mask2Former of the true classes, tiny and random, with a class head sharp enough to be confident."""
    pytest.importorskip("scipy", reason="transformers builds no Mask2Former without scipy")
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, num_queries=100, dim_feedforward=32, encoder_feedforward_dim=32,
        id2label=dict(enumerate(COCO)), label2id={name: index for index, name in enumerate(COCO)},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(60)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    # the published checkpoint's own size is not the evaluator's: it must not be used
    Mask2FormerImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


def test_mask2former_finds_what_transformers_own_post_processing_finds(mask2former: Path) -> None:
    # at 384 × 384, the one size where transformers enlarges the masks' logits as mmdetection does
    detector = TransformersDetector(mask2former, short_side=384, long_side=384)
    [image] = pictures(1, 384, 384)
    found = detector.detect(image[None], 0.05)[0]
    inputs = detector.processor(
        images=[(image * 255).round().to(torch.uint8)], return_tensors="pt", size={"height": 384, "width": 384}
    )
    with torch.no_grad():
        outputs = detector.network(**inputs)
    [theirs] = detector.processor.post_process_instance_segmentation(
        outputs, threshold=0.05, target_sizes=[(384, 384)], return_binary_maps=True
    )
    assert len(found) == len(theirs["segments_info"]) > 3
    for ours, (info, mask) in zip(
        sorted(found, key=lambda each: -each.score),
        sorted(
            zip(theirs["segments_info"], theirs["segmentation"].bool(), strict=True), key=lambda pair: -pair[0]["score"]
        ),
        strict=True,
    ):
        assert ours.label == CLASSES[info["label_id"]]
        assert ours.score == pytest.approx(info["score"], abs=2e-6)  # theirs is rounded to six digits
        assert torch.equal(ours.mask, mask)
        rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        assert ours.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_mask2former_is_asked_at_the_evaluators_size(mask2former: Path) -> None:
    detector = TransformersDetector(mask2former)
    seen: list[tuple[int, ...]] = []
    forward = detector.network.forward
    detector.network.forward = lambda pixels, **inputs: (seen.append(tuple(pixels.shape)), forward(pixels, **inputs))[1]
    found = detector.detect(pictures(1, 64, 64), 0.05)[0]
    assert seen == [(1, 3, 800, 800)]
    assert all(each.mask.shape == (64, 64) and each.score >= 0.05 for each in found)


def test_detections_in_a_batch_are_those_of_its_images_alone(mask2former: Path, color_clip: Path) -> None:
    detector = TransformersDetector(mask2former, short_side=128, long_side=128)
    images = pictures(3, 64, 64)
    together = detector.detect(images, 0.05)
    for index, found in enumerate(together):
        [alone] = detector.detect(images[index : index + 1], 0.05)
        assert [each.label for each in found] == [each.label for each in alone]
        # float32 kernels sum batches in another order; boxes are whole pixels
        assert [each.score for each in found] == pytest.approx([each.score for each in alone], abs=1e-4)
        assert [each.box for each in found] == [each.box for each in alone]


def test_an_instances_score_is_class_probability_times_mask_certainty() -> None:
    # two queries, three classes; query 0: class 1, a mask of logit 2 on rows 2…4, columns 1…3; query 1: no object
    class_logits = torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    mask_logits = torch.full((2, 8, 10), -3.0)
    mask_logits[0, 2:5, 1:4] = 2.0
    scores, labels, boxes, masks = instances(class_logits, mask_logits, (8, 10), (8, 10), 0.3)
    probability = np.exp(5) / (np.exp(5) + 3)
    assert labels.tolist() == [1]
    assert scores.tolist() == pytest.approx([probability / (1 + np.exp(-2))])
    assert boxes.tolist() == [[1, 2, 4, 5]]
    assert torch.equal(masks[0], mask_logits[0] > 0)
    assert len(instances(class_logits, mask_logits, (8, 10), (8, 10), 0.9)[0]) == 0


def test_masks_are_enlarged_before_they_are_cut() -> None:
    # logits −1 and +3 side by side, 2 columns → 8: bilinear values at 8 centres are −1 −1 −0.5 0.5 1.5 2.5 3 3, so the
    # cut is at column 3; enlarging the cut mask would put it at column 4
    mask_logits = torch.tensor([-1.0, 3.0]).expand(1, 2, 2)
    _, _, boxes, _ = instances(torch.tensor([[9.0, 0.0]]), mask_logits, (8, 8), (8, 8), 0.3)
    assert boxes.tolist() == [[3, 0, 8, 8]]
    # by way of an input of 4 columns (−1 0 2 3) the image's last five columns are 0.5 1.5 2.25 2.75 3
    scores, _, boxes, _ = instances(torch.tensor([[9.0, 0.0]]), mask_logits, (4, 4), (8, 8), 0.3)
    certainty = np.mean([1 / (1 + np.exp(-logit)) for logit in (0.5, 1.5, 2.25, 2.75, 3)])
    assert boxes.tolist() == [[3, 0, 8, 8]]
    assert scores.tolist() == pytest.approx([certainty / (1 + np.exp(-9))])


def test_mask_boxes_enclose_all_parts_of_a_mask() -> None:
    mask = torch.zeros(1, 9, 7, dtype=torch.bool)
    mask[0, 1, 6] = mask[0, 7, 2] = True
    assert mask_boxes(mask).tolist() == [[2, 1, 7, 8]]
    assert mask_boxes(mask[:0]).shape == (0, 4)


def test_a_box_detector_gives_boxes_in_pixels_and_its_own_labels(tmp_path: Path) -> None:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    labels = {0: "N/A", **{index + 1: VOC.get(name, name) for index, name in enumerate(COCO)}}
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"])
    config = DetrConfig(
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=20, id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    model = DetrForObjectDetection(config).eval()
    randomise(model, seed=0)
    with torch.no_grad():
        model.model.query_position_embeddings.weight.mul_(10)  # queries that differ
        model.class_labels_classifier.weight.mul_(3)  # and know what they see
    model.save_pretrained(tmp_path)
    DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(tmp_path)
    detector = TransformersDetector(tmp_path)
    image = pictures(1, 48, 64)
    [found] = detector.detect(image, 0.02)
    inputs = detector.processor(images=[(image[0] * 255).round().to(torch.uint8)], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    expected = []
    for logits, (x, y, width, height) in zip(outputs.logits[0], outputs.pred_boxes[0].tolist(), strict=True):
        probability, label = logits.softmax(0)[:-1].max(0)
        if probability > 0.02 and label > 0:
            box = ((x - width / 2) * 64, (y - height / 2) * 48, (x + width / 2) * 64, (y + height / 2) * 48)
            expected.append((CLASSES[int(label) - 1], float(probability), box))
    assert len(expected) > 3
    for each, (name, score, box) in zip(found, expected, strict=True):
        assert (each.label, each.mask) == (name, None)
        assert each.score == pytest.approx(score, abs=1e-5)  # float32 arithmetic in another order
        assert each.box == pytest.approx(box, abs=1e-3)


def test_the_whole_reward_runs_from_folders(mask2former: Path, color_clip: Path) -> None:
    detector = TransformersDetector(mask2former, short_side=96, long_side=96)
    metric = build_reward("geneval", detector=detector, clip_weights=color_clip, micro_batch_size=2)
    images = pictures(3, 48, 48)
    # what the detector sees in each picture, wanted by a prompt of its own; then a class it does not see there
    found = [group_objects(each, 0.3) for each in detector.detect(images, 0.3)]
    assert all(found), "a random detector has to find something for this test to mean anything"
    for row, groups in enumerate(found):
        seen, unseen = next(iter(groups)), next(name for name in CLASSES if name not in groups)
        single = {each["include"][0]["class"]: each["prompt"] for each in train_samples()[:80]}
        assert metric.score(images[row : row + 1].repeat(2, 1, 1, 1), [single[seen], single[unseen]]).tolist() == [1, 0]
        if seen != "person":
            color = metric.colors(images[row], groups[seen][:1], seen)[0]
            wanted = [
                {**sample("colors", {"class": seen, "count": 1, "color": each}), "prompt": each} for each in COLORS
            ]
            metric.samples.update({each["prompt"]: each for each in wanted})
            scores = metric.score(images[row : row + 1].expand(len(COLORS), -1, -1, -1), list(COLORS))
            assert scores.tolist() == [float(each == color) for each in COLORS]
    assert list(metric.parameters()) == []
    assert metric.explain(images[:1], [single[unseen]]) == [[f"0 of 1 {unseen}"]]


def test_wrong_detectors_are_refused_by_name(mask2former: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"detector: cannot load nowhere/at-all.*mask2former-swin-small"):
        TransformersDetector("nowhere/at-all")
    from safetensors.torch import load_file, save_file

    for file in mask2former.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if key != "class_predictor.bias"},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"does not hold all weights.*class_predictor.bias"):
        TransformersDetector(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"]["17"] = "unicorn"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"1 of COCO's 80 are not among them.*horse"):
        TransformersDetector(tmp_path)


def test_wrong_settings_are_refused(color_clip: Path) -> None:
    for options, message in [
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\)"),
        ({"counting_threshold": -0.1}, r"counting_threshold must lie"),
        ({"max_objects": 3}, "max_objects must be >= 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            GenEvalAccuracy(StubDetector([]), color_clip, **options)
    with pytest.raises(ValueError, match="short_side"):
        TransformersDetector("x", short_side=900, long_side=800)
    with pytest.raises(FileNotFoundError, match="GenEval's colours"):
        GenEvalAccuracy(StubDetector([]), clip_weights="/no/such/folder")
