import base64
import shutil
import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image

from ecan_fastai.app import LARGEST_SIDE, FaceApp, _one_sentence, launch_app
from ecan_fastai.cli import ecan_app
from ecan_fastai.data import read_face
from ecan_fastai.inference import Predictor
from ecan_fastai.learner import baseline_learner

BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)


@pytest.fixture(scope="module")
def predictor(faces):
    from ecan_fastai.loaders import ExpressionDataLoaders

    options = dict(size=32, channels=1, recipe="fer2013", level="weak", bs=16, num_workers=0, device="cpu")
    return Predictor.from_learner(
        baseline_learner(ExpressionDataLoaders.from_folder(faces, **options), "resnet18_half")
    )


@pytest.fixture(scope="module")
def app(predictor):
    return FaceApp(predictor)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    "What people upload"
    path = tmp_path_factory.mktemp("uploads")
    photo = read_face(get_sample_data("grace_hopper.jpg", asfileobj=False))[:420, 100:420]
    image = Image.fromarray(photo)
    image.save(path / "face.jpg", quality=95)
    image.convert("L").save(path / "grey.png")
    image.convert("CMYK").save(path / "cmyk.jpg", quality=95)
    image.convert("RGBA").save(path / "alpha.png")
    image.resize((4000, 5250)).save(path / "large.jpg")
    small = cv2.resize(photo, (120, 158), interpolation=cv2.INTER_AREA)
    Image.fromarray(np.tile(small, (10, 10, 1))).save(path / "hundred.png")
    Image.new("RGB", (300, 300), (120, 130, 140)).save(path / "nobody.png")
    (path / "text.jpg").write_text("not an image at all")
    (path / "heavy.jpg").write_bytes((path / "face.jpg").read_bytes() + bytes(50 * 2**20))
    return path


@pytest.mark.parametrize("name", ["face.jpg", "grey.png", "cmyk.jpg", "alpha.png", "large.jpg"])
def test_a_photograph_of_any_kind_is_labelled_as_by_the_predictor(app, predictor, uploads, name):
    said, drawn, table = app.label(uploads / name)
    assert said == "1 face found." and max(drawn.shape[:2]) <= LARGEST_SIDE and drawn.ndim == 3
    image = read_face(uploads / name)
    if name == "large.jpg":
        scale = LARGEST_SIDE / max(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    expected = predictor.predict_faces(image, app.finder)
    assert table["label"][0] == expected["label"][0] and list(table["face"]) == [1]
    assert np.allclose(
        table[predictor.columns].to_numpy(float), expected[predictor.columns].to_numpy(float), atol=5.1e-4
    )
    assert (drawn != image).any()


def test_boxes_to_download_are_in_pixels_of_the_photograph(app, uploads):
    large = read_face(uploads / "large.jpg")
    assert max(large.shape) > LARGEST_SIDE
    *_, csv = app.label_files([str(uploads / "large.jpg")])
    (face,) = app.finder(large)
    row, box = pd.read_csv(csv).iloc[0], ["left", "top", "right", "bottom"]
    assert np.allclose(row[box].to_numpy(float), [getattr(face, k) for k in box], atol=0.02 * max(large.shape))


@pytest.mark.slow
def test_a_table_to_download_runs_no_formula(app, uploads, tmp_path):
    file = tmp_path / "=1+1.jpg"
    file.write_bytes((uploads / "face.jpg").read_bytes())
    *_, csv = app.label_files([file])
    assert pd.read_csv(csv)["image"].tolist() == ["'=1+1.jpg"]


@pytest.mark.slow
def test_a_hundred_faces_and_none(app, uploads):
    said, _, table = app.label(uploads / "hundred.png")
    assert 90 <= len(table) <= 100 and said == f"{len(table)} faces found."
    said, shown = app.heatmaps(uploads / "hundred.png")
    assert len(shown) == 12 and said.endswith("Heat maps of the 12 largest are shown.")
    said, drawn, table = app.label(uploads / "nobody.png")
    assert said == "No face found in this photograph." and len(table) == 0
    assert np.array_equal(drawn, read_face(uploads / "nobody.png"))
    assert app.heatmaps(uploads / "nobody.png") == (said, [])


def test_heatmaps_lie_over_the_face_that_was_labelled(app, uploads):
    _, _, table = app.label(uploads / "face.jpg")
    said, ((image, caption),) = app.heatmaps(uploads / "face.jpg")
    (face,) = app.finder(read_face(uploads / "face.jpg"))
    assert said == "1 face found." and image.shape == face.image.shape
    number, label, percent, sign = caption.split()
    assert (number, label, sign) == ("1:", table["label"][0], "%")
    assert abs(int(percent) - 100 * table["probability"][0]) <= 0.51  # the table has its own rounding


def test_several_files_are_one_table_and_what_is_left_out_is_named(app, predictor, uploads):
    files = [str(uploads / n) for n in ("face.jpg", "nobody.png", "text.jpg", "grey.png")]
    said, shown, csv = app.label_files(files)
    assert said == (
        "2 faces found in 3 photographs. Photographs without a face: 1. "
        "Left out, because they cannot be read: text.jpg."
    )
    table = pd.read_csv(csv)
    assert list(table["image"]) == list(shown["image"]) == ["face.jpg", "grey.png"]
    assert np.allclose(table[predictor.columns].sum(1), 1, atol=0.01)
    shutil.rmtree(Path(csv).parent)
    with pytest.raises(ValueError, match="None of the files can be read as an image"):
        app.label_files(files[2:3])
    with pytest.raises(ValueError, match="at most 200 files at a time, got 201"):
        app.label_files(files[:1] * 201)


def test_what_is_wrong_is_one_sentence_and_one_line(app, uploads, capsys):
    answer = _one_sentence(app.label, 3)
    said = "cannot decode text.jpg: not an image, or broken (19 bytes)"
    assert answer(str(uploads / "text.jpg")) == [f"{said}.", None, None]
    assert capsys.readouterr().err == f"ecan_app: {said}\n"
    assert answer(None) == ["", None, None] and capsys.readouterr().err == ""
    gone = uploads / "deleted" / "face.jpg"
    assert answer(str(gone)) == ["face.jpg was deleted after 120 seconds, upload it again.", None, None]
    (uploads / "folder.jpg").mkdir()  # as any file that the server may not read
    said = answer(str(uploads / "folder.jpg"))[0]
    assert "folder.jpg" in said and str(uploads) not in said


def test_without_the_extra_and_without_a_run(monkeypatch, capsys, predictor, tmp_path):
    with pytest.raises(SystemExit):
        ecan_app(["--run", str(tmp_path / "none")])
    assert "is not the folder of a finished run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'pip install "ecan_fastai\[app\]"'):
        launch_app(predictor, wait=False)


@pytest.fixture(scope="module")
def page(predictor, tmp_path_factory):
    page = launch_app(predictor, wait=False)
    yield page
    page.close(verbose=False)
    page.kept_files.cleanup()


@pytest.fixture(scope="module")
def browser(uploads):
    "Chromium whose camera shows the face of the uploads"
    if BROWSER is None:
        print("skipped: no Chromium on this machine (Debian: apt-get install chromium)")
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    film = uploads / "camera.mjpeg"
    film.write_bytes((uploads / "face.jpg").read_bytes() * 10)
    camera = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", *camera, f"--use-file-for-fake-video-capture={film}"]
        )
        context = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"])
        context.set_default_timeout(120_000)
        yield context
        browser.close()


SAID = "document.querySelector('#message').innerText.includes('{}')"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_in_a_browser(page, browser, uploads, width):
    tab, asked, errors = browser.new_page(), [], []
    tab.set_viewport_size(dict(width=width, height=900))
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.local_url)
    tab.wait_for_selector("#photo input[type=file]", state="attached")
    tab.set_input_files("#photo input[type=file]", uploads / "face.jpg")
    tab.wait_for_function(SAID.format("1 face found."))
    tab.wait_for_selector("#drawn img")
    tab.get_by_role("button", name="Show where the model looks").click()
    tab.wait_for_selector("#heat img")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.get_by_role("tab", name="Several photographs").click()
    tab.set_input_files("#files input[type=file]", [uploads / "face.jpg", uploads / "grey.png"])
    tab.wait_for_function("document.querySelector('#files-message').innerText.includes('2 faces found in 2')")
    with tab.expect_download() as download:
        tab.click("#csv a")
    assert len(pd.read_csv(download.value.path())) == 2
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors and [url for url in asked if not url.startswith((page.local_url, "data:", "blob:"))] == []
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,said",
    [
        ("text.jpg", "cannot decode text.jpg: not an image"),
        ("nobody.png", "No face found"),
        ("hundred.png", "faces found"),
    ],
)
def test_bad_uploads_are_answered_on_the_page(page, browser, uploads, name, said, capfd):
    tab = browser.new_page()
    tab.goto(page.local_url)
    tab.wait_for_selector("#photo input[type=file]", state="attached")
    tab.set_input_files("#photo input[type=file]", uploads / name)
    tab.wait_for_function(SAID.format(said))
    tab.close()
    assert len(capfd.readouterr().err.splitlines()) == (name == "text.jpg")


@pytest.mark.slow
def test_a_photograph_from_the_clipboard_and_from_the_camera(page, browser, uploads):
    tab = browser.new_page()
    tab.goto(page.local_url)
    tab.wait_for_selector("#photo input[type=file]", state="attached")
    tab.evaluate(
        """async data => {
            const image = await (await fetch("data:image/png;base64," + data)).blob()
            await navigator.clipboard.write([new ClipboardItem({"image/png": image})])
        }""",
        base64.b64encode((uploads / "nobody.png").read_bytes()).decode(),
    )
    tab.get_by_role("button", name="Paste from clipboard").click()
    tab.wait_for_function(SAID.format("No face found"))
    tab.get_by_role("button", name="Capture from camera").click()
    tab.get_by_text("Click to Access Webcam").click()
    tab.get_by_role("button", name="capture photo").click()
    tab.wait_for_function(SAID.format("1 face found."))
    tab.close()


@pytest.mark.slow
def test_an_upload_that_is_too_large_is_refused_by_page_and_server(page, browser, uploads):
    tab = browser.new_page()
    tab.goto(page.local_url)
    tab.wait_for_selector("#photo input[type=file]", state="attached")
    tab.set_input_files("#photo input[type=file]", uploads / "heavy.jpg")
    tab.get_by_text("exceed the maximum allowed size of 20").wait_for()
    posted = tab.request.post(
        f"{page.local_url}gradio_api/upload",
        multipart=dict(files=dict(name="heavy.jpg", mimeType="image/jpeg", buffer=bytes(21 * 2**20))),
    )
    assert posted.status == 413
    tab.close()


@pytest.mark.slow
def test_the_page_is_reached_from_this_computer_alone_and_keeps_nothing(predictor):
    page = launch_app(predictor, wait=False)
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None and not page.analytics_enabled
    kept = Path(page.kept_files.name)
    assert kept.is_dir() and page.delete_cache == (60, 120) and page.server_name == "127.0.0.1"
    page.close(verbose=False)
    page.kept_files.cleanup()
    assert not kept.exists()


def test_an_address_that_cannot_be_used_is_named(predictor):
    with pytest.raises(OSError, match="^cannot listen on 10.9.9.9: "):
        launch_app(predictor, "10.9.9.9", wait=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is in use"):
            launch_app(predictor, port=port, wait=False)
