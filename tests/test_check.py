import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ecan_fastai.check import _pairs_exact, _pairs_near, check_data, show_pairs
from ecan_fastai.cli import ecan_check
from ecan_fastai.sample import sample_faces


@pytest.fixture
def spoiled(tmp_path):
    "Test images put into train as they are, under another label, and darker; and a file cut short"
    path = sample_faces(tmp_path / "faces", n=100)
    a, b, c, d = sorted((path / "test" / "happy").glob("*.png"))[:4]
    shutil.copy(a, path / "train" / "happy" / "copy.png")
    shutil.copy(b, path / "train" / "sad" / "copy.png")
    Image.fromarray((np.array(Image.open(c)) * 0.9).astype(np.uint8)).save(path / "train" / "happy" / "darker.png")
    (path / "train" / "fear" / "short.png").write_bytes(d.read_bytes()[:200])
    return path


def test_what_was_spoiled_is_found_and_nothing_else(spoiled):
    report = check_data(spoiled)
    leaks = {
        frozenset(
            (
                p.image_a.split("/")[-3:][0] + "/" + p.image_a.split("/")[-1],
                p.image_b.split("/")[-3:][0] + "/" + p.image_b.split("/")[-1],
            )
        ): (p.same, p.label_a == p.label_b)
        for p in report.leaks.itertuples()
    }
    assert leaks == {
        frozenset(("test/happy_0000.png", "train/copy.png")): (True, True),
        frozenset(("test/happy_0001.png", "train/copy.png")): (True, False),
        frozenset(("test/happy_0002.png", "train/darker.png")): (False, True),
    }
    assert (
        list(report.broken) == [str(spoiled / "train" / "fear" / "short.png")]
        and "short.png" in report.broken[str(spoiled / "train" / "fear" / "short.png")]
    )
    summary = report.summary().set_index("splits").loc["test and train"]
    assert summary.tolist() == [2, 1, 1]
    n = {s: len(list((spoiled / s).rglob("*.png"))) for s in ("train", "test")}
    assert report.counts.loc["all"].to_dict() == {**n, "all": sum(n.values())} and report.counts.loc[
        "happy", "test"
    ] == len(list((spoiled / "test" / "happy").iterdir()))


def test_a_pair_of_splits_is_one_row_in_whatever_order_its_images_come(tmp_path):
    files = sorted((sample_faces(tmp_path / "f", n=40) / "train" / "happy").glob("*.png"))[:2]
    rows = [f"{files[0]},happy,train", f"{files[0]},happy,test", f"{files[1]},happy,test", f"{files[1]},happy,train"]
    (tmp_path / "t.csv").write_text("image,label,split\n" + "\n".join(rows))
    report = check_data(tmp_path / "t.csv")
    assert report.sizes.values.tolist() == [[48, 48]] * 3
    assert report.summary().values.tolist() == [["test and train", 2, 0, 0]]


def test_black_images_of_two_shapes_are_no_copies(tmp_path):
    for split, shape in (("train", (16, 32)), ("test", (32, 16))):
        (tmp_path / split / "happy").mkdir(parents=True)
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / split / "happy" / "black.png")
    leaks = check_data(tmp_path).leaks
    assert len(leaks) == 1 and not leaks["same"].any()


def test_a_clean_set_has_no_pairs(tmp_path):
    report = check_data(sample_faces(tmp_path / "f", n=60))
    assert not len(report.pairs) and not report.broken and not len(report.summary())
    with pytest.raises(ValueError, match="no pairs to show"):
        show_pairs(report)
    with pytest.raises(ValueError, match="expected a distance from 0 to 16 bits of 64, got 17"):
        check_data(tmp_path / "f", distance=17)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_near_pairs_are_those_of_a_plain_loop(rows):
    rng = np.random.default_rng(0)
    signs = np.where(rng.random((23, 16)) < 0.5, -1, 1).astype(np.float32)
    plain = [
        (i, j, int((signs[i] != signs[j]).sum()))
        for i in range(23)
        for j in range(i + 1, 23)
        if (signs[i] != signs[j]).sum() <= 4
    ]
    assert sorted(_pairs_near(signs, 4, rows)) == plain and plain
    assert list(_pairs_exact("abcab")) == [(0, 3, 0), (1, 4, 0)] and len(list(_pairs_exact("aaaa"))) == 6


def test_ecan_check_prints_and_writes(spoiled, tmp_path, capsys):
    ecan_check([str(spoiled), "--out", str(tmp_path / "pairs.csv"), "--figure", str(tmp_path / "pairs.png")])
    printed = capsys.readouterr().out
    assert "1 broken images" in printed and "test and train" in printed and "short.png" in printed
    table = pd.read_csv(tmp_path / "pairs.csv")
    assert len(table[table.split_a != table.split_b]) == 3 and Image.open(tmp_path / "pairs.png").size[0] > 300
    with pytest.raises(SystemExit) as e:
        ecan_check([str(spoiled), "--figure", "pairs.foo"])
    assert e.value.code == 2 and "--figure: expected a name ending in .png, got pairs.foo" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        ecan_check([str(tmp_path / "nowhere")])
    assert e.value.code == 2 and "no such file or folder" in capsys.readouterr().err


def test_a_data_set_of_broken_images_alone_is_reported(tmp_path, capsys):
    (tmp_path / "d.csv").write_text("image,label\na.png,happy\nb.png,sad\n")
    report = check_data(tmp_path / "d.csv")
    assert len(report.broken) == 2 and not len(report.pairs)
    ecan_check([str(tmp_path / "d.csv")])
    assert "2 broken images" in capsys.readouterr().out


def test_what_cannot_be_read_does_not_stop_the_check(tmp_path, monkeypatch):
    from ecan_fastai import data

    path, read = sample_faces(tmp_path / "f", n=60), data._bytes
    closed = sorted((path / "train" / "happy").glob("*.png"))[0]

    def reads(file):
        if file == closed:
            raise PermissionError(f"cannot read {file}: Permission denied")
        return read(file)

    monkeypatch.setattr(data, "_bytes", reads)
    (path / "train" / "happy" / "circle.png").symlink_to(path / "train" / "happy" / "circle.png")
    report = check_data(path)
    assert [p.rsplit("/", 1)[1] for p in report.broken] == ["circle.png", closed.name]
    assert report.counts.loc["all", "all"] == len(list(path.rglob("*.png")))


def test_pairs_of_many_equal_images_have_an_end(tmp_path, monkeypatch):
    from ecan_fastai import check

    monkeypatch.setattr(check, "_MAX_PAIRS", 20)
    black = [Image.fromarray(np.zeros((8, 8), np.uint8))] * 12
    for i, img in enumerate(black):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        img.save(tmp_path / "ab"[i % 2] / f"{i}.png")
    with pytest.warns(UserWarning, match="20 pairs of equal or nearly equal images: further pairs are left out"):
        assert len(check_data(tmp_path).pairs) == 20


def test_a_class_may_be_called_all_and_have_dollars_in_its_name(tmp_path):
    img = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    for split in ("train", "test"):
        for label in ("all", "$\\frac$"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(img).save(tmp_path / split / label / "a.png")
    report = check_data(tmp_path)
    assert report.counts["all"].tolist() == [2, 2, 4]
    show_pairs(report).canvas.draw()


def test_a_single_pair_is_named_by_its_splits(tmp_path):
    file = next(sample_faces(tmp_path / "f", n=40).rglob("happy*.png"))
    (tmp_path / "t.csv").write_text(f"image,label,split\n{file},happy,train\n{file},happy,test\n")
    assert check_data(tmp_path / "t.csv").summary().values.tolist() == [["test and train", 1, 0, 0]]
