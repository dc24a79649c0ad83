import io
import multiprocessing
import os
import random
import signal
import zlib

import cv2
import numpy as np
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import TfmdDL
from fastai.data.load import SkipItemException
from fastai.data.transforms import Normalize, get_image_files, parent_label
from fastai.torch_core import TensorCategory, TensorImage, defaults, set_seed
from fastai.vision.augment import Brightness, Flip, FlipItem, RandomCrop, RandomErasing
from fasttransform import Transform
from PIL import Image

from ecan_fastai.data import FaceImage, TwoView, TwoViewBlock, default_workers, read_face


def test_items_do_not_share_memory_with_the_images(make_dls):
    "Nor do the two views of a face, even where no augmentation changes them"
    image = np.full((32, 32), 9, np.uint8)
    item = TwoViewBlock("none", "fer2013", 32, 1).type_tfms[0]
    (q, k), evaluated = item(image, split_idx=0), item(image, split_idx=1)
    q.zero_(), evaluated.zero_()
    assert (image == 9).all() and (k == 9).all()


def test_statistics_fit_the_channels():
    with pytest.raises(ValueError, match="expected one mean and deviation, or one for each of 1 channels"):
        TwoViewBlock(channels=1, stats=([0.4, 0.4, 0.4], [0.2, 0.2, 0.2]))
    TwoViewBlock(channels=3, stats=([0.4], [0.2]))


def batch_of_one_picture(make_dls, workers):
    "Loader in which all items are the same picture, so that what differs is the draw"
    dls = make_dls(level="strong", size=48, num_workers=workers, bs=8)
    tl = dls.train_ds.tls[0]
    tl.items = [tl.items[0]] * 32
    dls.train_ds.tls[1].items = [dls.train_ds.tls[1].items[0]] * 32
    dls.train.n = 32
    return dls


def epoch(dls):
    return [tuple(v.clone() for v in b[0]) for b in dls.train]


def distinct(views):
    return len({v.cpu().numpy().tobytes() for v in views})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_draws_differ_between_views_items_workers_and_epochs_and_repeat_under_a_seed(make_dls, workers):
    dls = batch_of_one_picture(make_dls, workers)
    set_seed(3)
    first, second = epoch(dls), epoch(dls)
    q, k = [torch.cat(v) for v in zip(*first)]
    assert len(q) == 32 and distinct([*q, *k]) == 64  # no two views alike: neither the pair's, nor two workers'
    q2, k2 = [torch.cat(v) for v in zip(*second)]
    assert distinct([*q, *k, *q2, *k2]) == 128  # nor two epochs'
    set_seed(3)
    again = torch.cat([b[0] for b in epoch(dls)])
    assert torch.equal(again, q)
    set_seed(4)
    assert not torch.equal(torch.cat([b[0] for b in epoch(dls)]), q)


def test_batch_transforms_that_are_added_later_draw_for_each_view(make_dls):
    dls = make_dls(level="none")
    (q, k), _ = dls.train.one_batch()
    assert torch.equal(q, k)
    dls.add_tfms([Flip(p=0.5, draw=None), Brightness(0.5, p=1)], "after_batch")
    (q, k), _ = dls.train.one_batch()
    assert not torch.equal(q, k) and type(q) is FaceImage
    assert torch.equal(dls.valid.one_batch()[0], dls.valid.one_batch()[0])  # in evaluation they do nothing
    for dl in dls.loaders:
        assert sum(isinstance(t, Normalize) for t in dl.after_batch.fs) == 1


@pytest.mark.slow
def test_draws_do_not_depend_on_the_number_of_workers(make_dls):
    passes = []
    for workers in (0, 1, 3):
        dls = make_dls(level="strong", size=48, num_workers=workers)
        dls.train.rng.seed(1)
        set_seed(5)
        passes.append([(torch.stack(list(x)), y) for _ in range(2) for x, y in dls.train])
    for other in passes[1:]:
        assert len(other) == len(passes[0]) and all(
            torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(passes[0], other)
        )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_draws_of_fastais_item_transforms_depend_on_the_seed_alone(make_dls, workers):
    def one_pass(workers):
        dls = make_dls(level="none", num_workers=workers, item_tfms=[FlipItem(0.5), RandomCrop(32)], size=32)
        dls.train.rng.seed(1)
        set_seed(5)
        views = torch.cat([torch.cat(list(x)) for x, _ in dls.train])
        return views, random.random(), np.random.rand(), torch.rand(())

    views, *then = one_pass(workers)
    expected, *expected_then = one_pass(2)
    assert torch.equal(views, expected) and then == expected_then  # the program's own draws go on as they would


class TellsItsProcess(Transform):
    "Adds the process and draws of the global generators to an item"

    def encodes(self, y: TensorCategory):
        return TensorCategory(
            torch.tensor(
                [os.getpid(), random.getrandbits(30), int(np.random.randint(2**30)), int(torch.randint(2**30, ()))]
            )
        )


@pytest.mark.slow
def test_workers_and_passes_have_streams_of_their_own_and_a_pass_can_be_left_early(make_dls):
    dls = make_dls(num_workers=2)
    dls.train.after_item.add(TellsItsProcess())
    first = torch.cat([y for _, y in dls.train])
    next(iter(dls.train))
    second, third = [torch.cat([y for _, y in dls.train]) for _ in range(2)]
    assert len(first) == len(second) == len(third) and os.getpid() not in first[:, 0]
    for column in (1, 2, 3):
        assert len(set(torch.cat([first, second, third])[:, column].tolist())) == 3 * len(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_passes_at_once_lose_nothing(make_dls, workers):
    train = make_dls(num_workers=workers).train
    train.shuffle = False
    pairs = list(zip(train, train))
    assert len(pairs) == len(train) and all(
        torch.equal(a[1], b[1]) and not torch.equal(a[0][0], b[0][0]) for a, b in pairs
    )


def test_a_pass_that_was_interrupted_leaves_the_loader_usable(make_dls):
    "Ctrl-C reaches the workers too: they die in the middle of a pass"
    train = make_dls(num_workers=2).train
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        for i, _ in enumerate(train):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            raise KeyboardInterrupt
    assert sum(len(y) for _, y in train) == len(train) * 16


def others(dls, kind):
    "Loaders of fastai's own over the same data"
    if kind == "weighted":
        return dls.train.new(cls=WeightedDL, wgts=np.ones(len(dls.train_ds)))
    if kind == "partial":
        return dls.train.new(cls=PartialDL, partial_n=32)
    return dls.train.new(cls=TfmdDL)


@pytest.mark.parametrize("kind", ["weighted", "partial", "plain"])
@pytest.mark.parametrize("workers", [0, 2])
def test_other_loaders_of_fastai_draw_anew_for_each_worker_and_pass(make_dls, kind, workers):
    dl = others(batch_of_one_picture(make_dls, workers), kind)

    def one_pass():
        return [v for (q, k), _ in dl for v in (*q, *k)]

    set_seed(3)
    first, second = one_pass(), one_pass()
    assert len(first) == 64 and distinct(first + second) == 128
    if workers == 0:
        return  # in one process the stream goes on from pass to pass
    set_seed(3)
    again = one_pass()
    assert {v.numpy().tobytes() for v in again} == {v.numpy().tobytes() for v in first}


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_differ_on_fastais_own_way_through_the_data_too(make_dls, workers):
    dls = batch_of_one_picture(make_dls, workers)
    set_seed(3)
    views = [v for _ in range(2) for (q, k), _ in TfmdDL.__iter__(dls.train) for v in (*q, *k)]  # as DistributedDL goes
    assert len(views) == 128 and distinct(views) == 128


def test_a_batch_of_one_item_again_and_again(make_dls):
    import matplotlib.pyplot as plt

    make_dls().show_batch(unique=True, max_n=4)  # fastai asks for an endless pass over the first item
    plt.close("all")


def test_a_skipped_item_makes_its_batch_smaller(make_dls):
    dls = make_dls(bs=16)
    get, skipped = dls.train.create_item, []

    def skip_fives(i):
        if i % 5 == 0:
            skipped.append(i)
            raise SkipItemException
        return get(i)

    dls.train.create_item = skip_fives
    assert sum(len(y) for _, y in dls.train) + len(skipped) == 16 * len(dls.train) and skipped


@pytest.mark.parametrize(
    "cpus, device, expected",
    [(1, "cpu", 0), (2, "cpu", 0), (4, "cpu", 4), (64, "cpu", 16), (2, "cuda", 2), (64, "cuda", 16), (2, None, 0)],
)
def test_two_cores_have_no_loader_processes_beside_the_training_on_them(monkeypatch, cpus, device, expected):
    monkeypatch.setattr(defaults, "cpus", cpus)
    monkeypatch.setattr("ecan_fastai.data.default_device", lambda: torch.device("cpu"))
    assert default_workers(device) == expected


def test_workers_that_are_not_given_are_the_default(make_dls, monkeypatch):
    monkeypatch.setattr("ecan_fastai.data.default_workers", lambda device: 3)
    assert {dl.fake_l.num_workers for dl in make_dls(num_workers=None)} == {3}
    assert {dl.fake_l.num_workers for dl in make_dls(num_workers=1)} == {1}


def test_training_gives_pairs_and_evaluation_one_view(make_dls):
    dls = make_dls()
    x, y = dls.one_batch()
    assert type(x) is TwoView and all(
        type(v) is FaceImage and v.dtype == torch.float32 and v.shape == (16, 1, 32, 32) for v in x
    )
    for name in ("valid", "test"):
        v, _ = dls[name].one_batch()
        assert type(v) is FaceImage and v.shape[1:] == (1, 32, 32)
    assert type(make_dls(n_views=1).one_batch()[0]) is FaceImage
    item = dls.train_ds[0][0]
    assert type(item) is TwoView and item[0].dtype == torch.uint8


def test_evaluation_has_no_randomness(make_dls):
    dls = make_dls(level="strong", size=48)
    a, b = [torch.cat([x for x, _ in dls.valid]) for _ in range(2)]
    assert torch.equal(a, b) and a.shape[-1] == 40


def test_normalisation_and_decode_round_trip(make_dls):
    dls = make_dls(level="none", size=48)
    x, y = dls.valid.one_batch()
    raw = read_face(dls.valid_ds.items[0].image, 1)[..., 0]
    assert np.allclose(x[0, 0].cpu().numpy(), (raw / 255 - 0.5) / 0.25, atol=1e-5)
    decoded = dls.valid.decode((x, y))
    assert type(decoded[0]) is FaceImage and (decoded[0][0, 0].numpy() - raw.astype(int)).__abs__().max() <= 1
    assert type(dls.train.decode(dls.one_batch())[0]) is TwoView


def test_show_batch_draws_both_views_of_a_pair(make_dls):
    import matplotlib.pyplot as plt

    for n_views, width in ((2, 2 * 32 + 1), (1, 32)):
        plt.close("all")
        make_dls(n_views=n_views).show_batch(max_n=4)
        shown = [ax.images[0].get_array().shape for ax in plt.gcf().axes if ax.images]
        assert shown == [(32, width)] * 4 and plt.gcf().axes[0].get_title()
    plt.close("all")


def test_all_crops_and_several_evaluation_crops(make_dls):
    dls = make_dls(level="strong", size=48, all_crops=True, eval_crops="ten")
    assert [v.shape for v in dls.one_batch()[0]] == [(16, 5, 1, 40, 40)] * 2
    assert dls.valid.one_batch()[0].shape[1:] == (10, 1, 40, 40)


@pytest.mark.parametrize("channels", [1, 3])
def test_read_face_takes_every_form(tmp_path, channels):
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    file = tmp_path / "gesicht ä.png"
    ok, png = cv2.imencode(".png", rgb[..., ::-1])
    file.write_bytes(png.tobytes())
    expected = rgb if channels == 3 else cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None]
    for x in (file, str(file), png.tobytes(), rgb, Image.fromarray(rgb), torch.from_numpy(rgb).permute(2, 0, 1)):
        out = read_face(x, channels)
        assert out.shape == (20, 30, channels) and np.abs(out.astype(int) - expected).max() <= 1
    grey = rgb[..., 0]
    for x in (grey, grey[..., None], Image.fromarray(grey), torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert np.array_equal(read_face(x, 1)[..., 0], grey) and read_face(x, 3).shape == (20, 30, 3)


@pytest.mark.parametrize(
    "x,said",
    [
        (b"", "cannot decode"),
        (b"text", "cannot decode"),
        (b"\0\0\0\x18ftypmif1" + bytes(40), "cannot decode .*: it is a HEIC image, convert it to JPEG"),
        ("missing.png", "no such image file: missing.png"),
        (np.zeros((4, 4), np.float32), "got float32"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\(2, 4, 4, 3\)"),
    ],
)
def test_read_face_names_what_is_wrong(x, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_face(x)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
@pytest.mark.parametrize("gamma", [False, True])
def test_a_png_has_the_greys_of_its_pixels(mode, gamma):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image, file = Image.fromarray(rgb).convert(mode), io.BytesIO()
    image.save(file, "PNG")
    png = file.getvalue()
    if gamma:  # a chunk gAMA after the header, as editors write it
        chunk = b"gAMA" + (45455).to_bytes(4, "big")
        png = png[:33] + (4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png[33:]
    seen = cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2GRAY)
    assert np.abs(read_face(png, 1)[..., 0].astype(int) - seen).max() <= (mode in ("L", "LA", "1"))


def test_broken_file_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    with pytest.raises(ValueError, match="a.png.*broken .11 bytes"):
        read_face(tmp_path / "a.png")


def faces_block(faces, **kwargs):
    return DataBlock(
        blocks=(TwoViewBlock(size=32, channels=1, level="none"), CategoryBlock),
        get_items=get_image_files,
        get_y=parent_label,
        **kwargs,
    )


def test_batch_transforms_of_a_data_block_draw_anew_for_each_view(faces):
    from fastai.vision.augment import Brightness

    dls = faces_block(faces, batch_tfms=Brightness(0.9, p=1.0)).dataloaders(faces, bs=8, num_workers=0)
    (q, k), _ = dls.one_batch()
    assert not torch.allclose(q, k)
    x, _ = dls.valid.one_batch()
    plain, _ = faces_block(faces).dataloaders(faces, bs=8, num_workers=0).valid.one_batch()
    assert x.shape == plain.shape


def test_item_transforms_of_a_data_block_are_refused(faces):
    from fastai.vision.augment import Resize

    with pytest.raises(ValueError, match=r"Resize would change no view: give it as TwoViewBlock\(item_tfms="):
        faces_block(faces, item_tfms=Resize(64)).dataloaders(faces, bs=8, num_workers=0)


def test_item_transforms_that_act_on_batches_alone_are_refused():
    for tfm in (RandomErasing(), Brightness(), Flip(), RandomErasing):
        with pytest.raises(ValueError, match=r"^(RandomErasing|Brightness|Flip) does not act on a PILImage, only on"):
            TwoViewBlock(item_tfms=[FlipItem(), tfm])

    class Own(Transform):
        def __call__(self, x, **kwargs):
            return x

    def dark(x: np.ndarray):
        return x // 2

    for tfm in (
        FlipItem,
        Own(),
        np.asarray,
        [np.asarray, dark],
        Transform(lambda image: image.rotate(90)),
        [FlipItem(), np.asarray],
    ):
        assert TwoViewBlock(item_tfms=tfm).type_tfms[0].item_tfms


def test_images_of_pillow_are_read_like_their_files(tmp_path):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    found = read_face(Image.open(tmp_path / "turned.png"), 1)
    assert found.shape == (4, 3, 1) and np.array_equal(found, read_face(tmp_path / "turned.png", 1))
    deep = Image.fromarray(np.full((3, 4), 40000, np.uint16))
    with pytest.raises(ValueError, match="8 bits a channel, got mode I;16: give the path of its file"):
        read_face(deep)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 7"):
        read_face(tmp_path / "turned.png", 7)


class Scaled(Transform):
    "Twice the distance from 0.5, after `Normalize` if `order` says so"

    def __init__(self, order):
        super().__init__()
        self.order, self.seen = order, None

    def setups(self, dl):
        self.seen = len(dl.one_batch()[0])

    def encodes(self, x: TensorImage):
        self.range = x.min().item(), x.max().item()
        return 2 * x - 0.5

    def decodes(self, x: TensorImage):
        return (x + 0.5) / 2


@pytest.mark.parametrize("order,low,high", [(30, 0, 1), (100, -2, 2)])
def test_batch_transforms_keep_their_order_setup_and_decoding(make_dls, order, low, high):
    tfm, plain = Scaled(order), make_dls(level="none", shuffle=False)
    dls = make_dls(level="none", shuffle=False, batch_tfms=tfm)
    (q, _), y = dls.train.one_batch()
    assert low <= tfm.range[0] < low + 0.5 * (high - low) < tfm.range[1] <= high and tfm.seen == 2  # a pair
    assert not torch.allclose(q, plain.train.one_batch()[0][0])
    for dl, same in zip(dls.loaders, plain.loaders):
        views, expected = (d.decode(d.one_batch())[0] for d in (dl, same))
        for a, b in zip(views, expected):
            assert torch.allclose(a.float(), b.float(), atol=1)  # grey levels


def test_a_normalize_without_statistics_is_refused(faces):
    block = TwoViewBlock(size=16, channels=1)
    block = DataBlock((block, CategoryBlock), get_items=get_image_files, get_y=parent_label, batch_tfms=Normalize())
    with pytest.raises(ValueError, match="Normalize needs statistics"):
        block.dataloaders(faces, num_workers=0)


def test_weights_of_items_need_loaders_that_shuffle(make_dls):
    dls = make_dls(shuffle=False)
    dls.train.item_weights = [1.0] * len(dls.train_ds)
    with pytest.raises(ValueError, match="item_weights sample at random"):
        dls.train.one_batch()
    dls.train.shuffle = True
    assert dls.train.new(shuffle=False).item_weights is None and dls.train.new().item_weights


def test_a_tensor_with_channels_last_is_named_as_it_is():
    with pytest.raises(ValueError, match=r"1 or 3 channels first as an image, got shape \(48, 40, 3\)"):
        read_face(torch.zeros(48, 40, 3, dtype=torch.uint8))
