"""Two augmented views of a face, images a second: this package's DataBlock against its peers, and the bare
augmentation as the limit."""

import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    PILImage,
    PILImageBW,
    RandTransform,
    get_image_files,
    noop,
    parent_label,
)
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import arguments, parser, report, table
from ecan_fastai.augment import crop_size, train_pipeline
from ecan_fastai.data import read_face
from ecan_fastai.loaders import ExpressionDataLoaders
from ecan_fastai.readers.records import EXPRESSIONS
from ecan_fastai.sample import draw_face

SETTINGS = {
    "48x48 grey, FER2013's strong column": dict(size=48, channels=1, recipe="fer2013", bs=256, n=4096),
    "224x224 colour, RAF-DB's strong column": dict(size=224, channels=3, recipe="rafdb", bs=64, n=1024),
}


def write_faces(path, size, channels, n, **_):
    "Drawn faces: PNG at 48x48, JPEG at 224x224, as FER2013 and RAF-DB have them"
    for i in range(n):
        label = EXPRESSIONS[i % len(EXPRESSIONS)]
        (path / "train" / label).mkdir(parents=True, exist_ok=True)
        face = draw_face(label, np.random.default_rng(i), size, channels)
        cv2.imwrite(
            str(path / "train" / label / f"{i:05}.{'png' if channels == 1 else 'jpg'}"),
            face if channels == 1 else face[..., ::-1],
        )
        if i < 2 * len(EXPRESSIONS):
            (path / "valid" / label).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path / "valid" / label / f"{i:05}.png"), face if channels == 1 else face[..., ::-1])
    return path


def stock_pipeline(recipe, size, channels):
    "Table 1's strong column as one writes it with albumentations alone"
    if recipe == "rafdb":
        pad = size // 7
        return A.Compose(
            [
                A.Resize(size, size),
                A.PadIfNeeded(size + 2 * pad, size + 2 * pad, border_mode=cv2.BORDER_CONSTANT),
                A.RandomCrop(size, size),
                A.HorizontalFlip(p=0.5),
                A.Rotate(20, p=0.5),
                A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
                A.Erasing(p=0.5),
            ]
        )
    side = crop_size("strong", recipe, size)
    corners = [
        (0, 0),
        (size - side, 0),
        (0, size - side),
        (size - side, size - side),
        ((size - side) // 2, (size - side) // 2),
    ]
    return A.Compose(
        [
            A.RandomResizedCrop(size=(size, size), scale=(0.8, 1.0)),
            A.ColorJitter(0.5, 0.5, 0.5, 0, p=0.5),
            A.Affine(translate_percent={"x": (-0.2, 0.2), "y": (-0.2, 0.2)}, p=0.5),
            A.HorizontalFlip(p=0.5),
            A.Rotate(10, p=0.5),
            A.OneOf([A.Crop(x, y, x + side, y + side) for x, y in corners], p=1),
            A.Erasing(p=0.5),
        ]
    )


def loading(workers):
    return dict(num_workers=workers, persistent_workers=workers > 0, shuffle=True, drop_last=True)


def ours(path, size, channels, recipe, bs, workers, **_):
    return ExpressionDataLoaders.from_folder(
        path, bs=bs, size=size, channels=channels, recipe=recipe, level="strong", num_workers=workers, device="cpu"
    ).train


class Plain(Dataset):
    def __init__(self, files, labels, pipe, channels):
        self.files, self.labels, self.pipe, self.flag = (
            files,
            labels,
            pipe,
            cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB,
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        img = cv2.imread(self.files[i], self.flag)
        if img.ndim == 2:
            img = img[..., None]
        views = [
            torch.from_numpy(np.ascontiguousarray(self.pipe(image=img)["image"].transpose(2, 0, 1))) for _ in range(2)
        ]
        return *views, self.labels[i]


def albumentations_plain(path, size, channels, recipe, bs, workers, pipeline=stock_pipeline, **_):
    files = sorted(get_image_files(path / "train"))
    data = Plain(
        [str(f) for f in files],
        [EXPRESSIONS.index(f.parent.name) for f in files],
        pipeline(recipe, size, channels),
        channels,
    )
    return DataLoader(data, bs, **loading(workers))


class TwoTimes:
    def __init__(self, transform):
        self.transform = transform

    def __call__(self, img):
        return self.transform(img), self.transform(img)


def torchvision_v2(path, size, channels, recipe, bs, workers, **_):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    grey, erase = [v2.Grayscale()] if channels == 1 else [], [v2.PILToTensor(), v2.RandomErasing(p=0.5)]
    if recipe == "fer2013":
        side = crop_size("strong", recipe, size)
        steps = [
            v2.RandomResizedCrop(size, scale=(0.8, 1)),
            v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5)], 0.5),
            v2.RandomApply([v2.RandomAffine(0, (0.2, 0.2))], 0.5),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.RandomRotation(10)], 0.5),
            v2.RandomCrop(side),
        ]
    else:
        steps = [
            v2.Resize((size, size)),
            v2.RandomCrop(size, padding=size // 7),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.RandomRotation(20)], 0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(size // 10 // 2 * 2 + 1, (0.1, 2))], 0.5),
        ]
    return DataLoader(ImageFolder(path / "train", TwoTimes(v2.Compose(grey + steps + erase))), bs, **loading(workers))


def lightly_transform(path, size, channels, recipe, bs, workers, **_):
    from lightly.transforms import SimCLRTransform
    from torchvision.datasets import ImageFolder

    if recipe == "fer2013":
        t = SimCLRTransform(
            crop_size("strong", recipe, size),
            cj_prob=0.5,
            cj_bright=0.5,
            cj_contrast=0.5,
            cj_sat=0.5,
            cj_hue=0,
            min_scale=0.8,
            random_gray_scale=0,
            gaussian_blur=0,
            rr_prob=0.5,
            rr_degrees=10,
            normalize=None,
        )
    else:
        t = SimCLRTransform(
            size,
            cj_prob=0.8,
            cj_bright=0.4,
            cj_contrast=0.4,
            cj_sat=0.4,
            cj_hue=0.1,
            min_scale=0.6,
            rr_prob=0.5,
            rr_degrees=20,
            normalize=None,
        )
    return DataLoader(ImageFolder(path / "train", t), bs, **loading(workers))


class AlbumentationsTransform(RandTransform):
    "As in fastai's albumentations tutorial"

    split_idx, order = None, 2

    def __init__(self, train_aug, cls):
        super().__init__()
        self.train_aug, self.cls = train_aug, cls

    def before_call(self, b, split_idx):
        self.idx = split_idx

    def encodes(self, img: PILImage):
        if self.idx:
            return img
        a = np.array(img)
        out = self.train_aug(image=a[..., None] if a.ndim == 2 else a)["image"]
        return self.cls.create(out[..., 0] if out.shape[-1] == 1 else out)


def fastai_obvious(path, size, channels, recipe, bs, workers, **_):
    cls = PILImageBW if channels == 1 else PILImage
    block = DataBlock(
        blocks=(ImageBlock(cls), ImageBlock(cls), CategoryBlock),
        n_inp=2,
        get_items=get_image_files,
        getters=[lambda f: f, lambda f: f, parent_label],
        splitter=lambda files: (
            [i for i, f in enumerate(files) if f.parent.parent.name == "train"],
            [i for i, f in enumerate(files) if f.parent.parent.name == "valid"][:1],
        ),
        item_tfms=AlbumentationsTransform(stock_pipeline(recipe, size, channels), cls),
    )
    return block.dataloaders(path, bs=bs, num_workers=workers, device="cpu").train


OURS = {
    "ecan_fastai": ours,
    "our pipeline in a plain Dataset": partial(albumentations_plain, pipeline=lambda *a: train_pipeline("strong", *a)),
}
PEERS = {
    "albumentations in a plain Dataset": albumentations_plain,
    "torchvision v2, ImageFolder": torchvision_v2,
    "lightly's transform, ImageFolder": lightly_transform,
    "fastai, its tutorial's transform": fastai_obvious,
}


def one_pass(loader):
    """Images a second of a whole pass; workers live on from the first, uncounted one where the loader can do that
    (fastai's cannot); what runs on the batch's device afterwards (float, normalise) is left out"""
    if hasattr(loader, "after_batch"):
        loader.after_batch = noop
    start, n = time.perf_counter(), 0
    for batch in loader:
        n += len(batch[-1])
    return n / (time.perf_counter() - start)


def bare(path, size, channels, recipe, n, **_):
    "Images a second of the augmentation alone, both views, in one process"
    pipe = stock_pipeline(recipe, size, channels)
    images = [read_face(f, channels) for f in sorted(get_image_files(path / "train"))[:256]]

    def once():
        start = time.perf_counter()
        for i in range(n):
            img = images[i % len(images)]
            pipe(image=img), pipe(image=img)
        return n / (time.perf_counter() - start)

    return once


def measure(setting, workers, rounds, path, wanted):
    runs = {"bare augmentation, one process": bare(path, **setting)} if workers == 0 else {}
    for name, make in {**OURS, **PEERS}.items():
        if wanted and not any(w in name for w in wanted):
            continue
        try:
            runs[name] = partial(one_pass, make(path, workers=workers, **setting))
        except ImportError as e:
            print(f"{name} left out: {e}")
    rates = {name: [] for name in runs}
    for r in range(rounds + 1):
        for name, run in runs.items():
            rate = run()
            if r:
                rates[name].append(rate)  # the first pass warms
    return {name: float(np.median(r)) for name, r in rates.items()}


def main():
    p = parser("loader", __doc__)
    p.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="numbers of loader processes")
    p.add_argument("--size", type=int, nargs="*", default=[48, 224])
    p.add_argument("--only", nargs="*", help="contenders whose name contains one of these")
    p.set_defaults(rounds=5)
    args = arguments(p)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the loaders' own work, not torch's
    parts = []
    for title, setting in SETTINGS.items():
        if setting["size"] not in args.size:
            continue
        columns = {}
        with tempfile.TemporaryDirectory() as tmp:
            path = write_faces(Path(tmp), **setting)
            for w in args.workers:
                columns[w] = measure(setting, w, args.rounds, path, args.only)
        names = list(columns[args.workers[0]])

        def cell(w, name):
            best = max((v for k, v in columns[w].items() if k in PEERS), default=float("nan"))
            return f"{columns[w][name]:.0f} ({columns[w][name] / best:.2f})" if name in columns[w] else ""

        parts.append(
            f"{title}: images a second, two views each, batch {setting['bs']}; in brackets the ratio to the best "
            "peer\n\n"
            + table(
                ["", *[f"{w} workers" for w in args.workers]], [[n, *[cell(w, n) for w in args.workers]] for n in names]
            )
        )
    report(
        "loader",
        "Loader: two augmented views",
        parts,
        "cpu",
        args.save,
        ("torchvision", "lightly", "opencv-python-headless"),
    )


if __name__ == "__main__":
    main()
