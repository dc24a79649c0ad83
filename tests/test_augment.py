import albumentations as A
import cv2
import numpy as np
import pytest

from ecan_fastai.augment import *


def picture(size=48, channels=1, seed=0):
    return np.random.default_rng(seed).integers(1, 255, (size, size, channels), np.uint8)


@pytest.mark.parametrize(
    "recipe,size,channels", [("fer2013", 48, 1), ("fer2013", 48, 3), ("rafdb", 64, 3), ("rafdb", 64, 1)]
)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_pictures_of_its_size(level, recipe, size, channels):
    pipe, side = train_pipeline(level, recipe, size, channels), crop_size(level, recipe, size)
    for seed in range(30):
        out = pipe(image=picture(57, channels, seed))["image"]
        assert out.shape == (side, side, channels) and out.dtype == np.uint8


def test_five_crop_is_part_of_strong_fer2013_alone():
    assert [crop_size(l, "fer2013", 48) for l in LEVELS] == [48, 48, 40]
    assert [crop_size(l, "rafdb", 224) for l in LEVELS] == [224] * 3


def test_unknown_crops_are_refused():
    for cut in (lambda: eval_boxes(48, 40, "six"), lambda: image_side("strong", "fer2013", 48, "six")):
        with pytest.raises(ValueError, match="unknown evaluation crops 'six', expected one of center, flip, five, ten"):
            cut()


def test_level_none_is_the_picture_itself():
    img = picture()
    assert np.array_equal(train_pipeline("none", "fer2013", 48, 1)(image=img)["image"], img)


def transforms(level, recipe, channels):
    return [type(t).__name__ for t in train_pipeline(level, recipe, 48, channels).transforms]


def test_rows_of_table_1():
    assert set(transforms("weak", "rafdb", 3)) == {"Resize", "HorizontalFlip", "Erasing", "ToGray"}
    assert set(transforms("strong", "rafdb", 3)) == {
        "Resize",
        "RandomShift",
        "ColorJitter",
        "HorizontalFlip",
        "RandomRotate",
        "Erasing",
        "ToGray",
        "GaussianBlur",
    }
    assert set(transforms("weak", "fer2013", 3)) == {
        "RandomResizedCrop",
        "HorizontalFlip",
        "RandomRotate",
        "Erasing",
        "ToGray",
    }
    assert set(transforms("strong", "fer2013", 3)) == {
        "RandomResizedCrop",
        "ColorJitter",
        "HorizontalFlip",
        "RandomRotate",
        "Erasing",
        "ToGray",
        "RandomShift",
        "RandomFiveCrop",
    }
    (blur,) = [t for t in train_pipeline("strong", "rafdb", 48, 3) if type(t).__name__ == "GaussianBlur"]
    assert blur.blur_limit == (0, 0) and blur.sigma_limit == (0.1, 2)  # the kernel is as wide as sigma needs
    assert "ToGray" not in transforms("strong", "fer2013", 1) and transforms("strong", "fer2013", 1)[-1] == "Erasing"


def test_shift_moves_each_direction_on_its_own_and_fills_with_black():
    shift = A.Compose(
        [next(t for t in train_pipeline("strong", "fer2013", 48, 1).transforms if type(t).__name__ == "RandomShift")]
    )
    seed_pipeline(shift, 0)
    seen, still = set(), 0
    img = np.zeros((48, 48, 1), np.uint8)
    img[24, 24] = 255
    for _ in range(3000):
        out = shift(image=img)["image"]
        assert out.shape == (48, 48, 1) and out.sum() == 255
        (y,), (x,) = np.nonzero(out[..., 0])
        seen.add((int(y) - 24, int(x) - 24))
        still += np.array_equal(out, img)
    ys, xs = map(set, zip(*seen))
    assert ys == xs == set(range(-10, 11)) and len(seen) > 400  # up to 20 % of 48, all 441 pairs are possible
    assert abs(still / 3000 - 0.5 - 0.5 / 441) < 0.04


def test_a_shift_by_more_than_the_side_is_black():
    shift, img = RandomShift(60), picture()
    assert not shift.apply(img, 60, 0).any() and not shift.apply(img, 3, -60).any()
    assert shift(image=img)["image"].shape == img.shape
    with pytest.raises(TypeError, match="fill"):
        RandomRotate(20, fill=255)  # black borders alone


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shift_is_a_crop_from_the_padded_picture(channels):
    img, pad = np.random.default_rng(0).integers(1, 255, (20, 24, channels), np.uint8), 5
    padded = np.pad(img, ((pad, pad), (pad, pad), (0, 0)))
    for right in range(-pad, pad + 1):
        for down in range(-pad, pad + 1):
            assert np.array_equal(
                RandomShift(pad).apply(img, right, down),
                padded[pad - down : pad - down + 20, pad - right : pad - right + 24],
            )


@pytest.mark.parametrize("shape", [(48, 48, 1), (47, 52, 1), (224, 224, 3)])
def test_a_random_rotation_is_that_of_albumentations(shape):
    img = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ours, theirs = A.Compose([RandomRotate(20, p=0.5)]), A.Compose([A.Rotate(20, p=0.5)])
    turned = 0
    for seed in range(100):
        seed_pipeline(ours, seed)
        seed_pipeline(theirs, seed)
        out = ours(image=img)["image"]
        assert np.array_equal(out, theirs(image=img)["image"])
        turned += not np.array_equal(out, img)
    assert 30 < turned < 70


@pytest.mark.parametrize("level, recipe", [("none", "rafdb"), ("weak", "rafdb"), ("weak", "fer2013")])
def test_an_image_that_shrinks_is_averaged(level, recipe):
    noise = np.random.default_rng(0).integers(0, 256, (480, 480, 1), np.uint8)  # 74 from its mean, a pixel
    pipes = [*eval_pipelines(level, recipe, 48), train_pipeline(level, recipe, 48, 1)]
    train = pipes[-1].transforms
    pipes[-1] = A.Compose([t for t in train if isinstance(t, (A.Resize, A.RandomResizedCrop))])
    for pipe in pipes:
        small = pipe(image=noise)["image"]
        assert small.shape == (48, 48, 1) and abs(small.mean() - 127.5) < 1
        assert small.std() < 74 / 8  # the mean of about 10x10 pixels; of four it would be 74 / 2


def test_resize_to_is_exact_for_whole_blocks_and_bilinear_for_what_grows():
    img = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    blocks = img.reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert abs(resize_to(48)(image=img)["image"] - blocks).max() <= 0.5
    grown = cv2.resize(img, (144, 144), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(resize_to(144)(image=img)["image"], grown)
    assert np.array_equal(resize_to(96)(image=img)["image"], img)


def test_random_five_crop_is_one_of_five_crops_with_equal_chance():
    img, side = picture(), 40
    crops = [p(image=img)["image"] for p in eval_pipelines("strong", "fer2013", 48, "five")]
    pipe = A.Compose([RandomFiveCrop(48, side)])
    seed_pipeline(pipe, 0)
    counts = np.zeros(5)
    for _ in range(2000):
        out = pipe(image=img)["image"]
        counts[[np.array_equal(out, c) for c in crops].index(True)] += 1
    assert (abs(counts / 2000 - 0.2) < 0.04).all()


def test_seed_repeats_and_goes_on():
    for kwargs in (dict(), dict(all_crops=True)):
        pipe, img = train_pipeline("strong", "fer2013", 48, 1, **kwargs), picture()
        seed_pipeline(pipe, 5)
        first = [pipe(image=img)["image"] for _ in range(4)]
        seed_pipeline(pipe, 5)
        again = [pipe(image=img)["image"] for _ in range(4)]
        assert all(np.array_equal(a, b) for a, b in zip(first, again)) and not np.array_equal(first[0], first[1])


def test_all_crops_gives_five():
    pipe = train_pipeline("strong", "fer2013", 48, 1, all_crops=True)
    assert pipe(image=picture())["image"].shape == (5, 40, 40, 1)


def test_evaluation_crops():
    img = picture()
    ten = [p(image=img)["image"] for p in eval_pipelines("strong", "fer2013", 48, "ten")]
    corners = [img[:40, :40], img[:40, 8:], img[8:, :40], img[8:, 8:], img[4:44, 4:44]]
    assert all(np.array_equal(a, b) for a, b in zip(ten, corners))
    flipped = img[:, ::-1]
    corners = [flipped[:40, :40], flipped[:40, 8:], flipped[8:, :40], flipped[8:, 8:], flipped[4:44, 4:44]]
    assert all(np.array_equal(a, b) for a, b in zip(ten[5:], corners))
    assert np.array_equal(eval_pipelines("strong", "fer2013", 48)[0](image=img)["image"], img[4:44, 4:44])
    assert len(eval_pipelines("weak", "fer2013", 48)) == 1


@pytest.mark.parametrize(
    "recipe,level", [("rafdb", "weak"), ("rafdb", "strong"), ("fer2013", "weak"), ("fer2013", "strong")]
)
def test_transforms_are_applied_independently_of_each_other(recipe, level):
    pipe = train_pipeline(level, recipe, 24, 3)
    pipe.save_applied_params = True
    img, applied = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8), []
    for batch in range(150):  # seeded anew for each batch, as in the loader
        seed_pipeline(pipe, batch)
        applied += [{name for name, _ in pipe(image=img)["applied_transforms"]} for _ in range(16)]
    names = [n for n in set.union(*applied) if 0.05 < np.mean([n in a for a in applied]) < 0.95]
    chance = dict(
        HorizontalFlip=0.5,
        ToGray=0.2,
        Erasing=0.5,
        RandomRotate=0.5,
        GaussianBlur=0.5,
        ColorJitter=0.8 if recipe == "rafdb" else 0.5,
        RandomShift=0.5,
    )
    assert len(names) >= 3
    for n in names:
        assert abs(np.mean([n in a for a in applied]) - chance[n]) < 0.05
    together = np.corrcoef([[n in a for a in applied] for n in names])
    assert abs(together - np.eye(len(names))).max() < 0.1


def test_five_crops_of_whole_pictures_come_from_a_larger_picture():
    img = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    crops = [p(image=img)["image"] for p in eval_pipelines("weak", "rafdb", 50, "ten")]
    corners = [(0, 0), (0, 10), (10, 0), (10, 10), (5, 5)]
    for source, own in ((img, crops[:5]), (img[:, ::-1], crops[5:])):
        assert all(np.array_equal(a, source[y : y + 50, x : x + 50]) for a, (y, x) in zip(own, corners))
    center, mirrored = [p(image=img)["image"] for p in eval_pipelines("weak", "rafdb", 50, "flip")]
    assert center.shape == (50, 50, 3) and np.array_equal(
        mirrored, eval_pipelines("weak", "rafdb", 50)[0](image=np.ascontiguousarray(img[:, ::-1]))["image"]
    )


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: train_pipeline("stronger"), "unknown augmentation level 'stronger'"),
        (lambda: train_pipeline(recipe="ck"), "unknown augmentation recipe 'ck'"),
        (lambda: train_pipeline("weak", "fer2013", all_crops=True), "all_crops needs FiveCrop"),
        (lambda: eval_pipelines(crops="six"), "unknown evaluation crops 'six'"),
    ],
)
def test_wrong_arguments_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
