"A web page that labels the faces of uploaded photographs, built with Gradio."

import errno
import os
import signal
import socket
import sys
import tempfile
from functools import wraps
from pathlib import Path

import cv2
import pandas as pd

from ecan_fastai.data import read_face
from ecan_fastai.detector import FaceFinder
from ecan_fastai.inference import Predictor
from ecan_fastai.interpret import grad_cam, heat_overlay
from ecan_fastai.readers.records import write_csv
from ecan_fastai.video import draw_faces

LARGEST_FILE = "20mb"
LARGEST_SIDE = 1600  # Pixels; larger photographs are scaled down
MOST_FILES = 200
MOST_HEATMAPS = 12
_BOX = ["left", "top", "right", "bottom"]
KEPT_SECONDS = 120  # Uploads and results are deleted after this time, or when the page is closed


def _photo(file):
    "Read an uploaded photograph, scaled down if it is large; return it and the scale"
    name = Path(file).name
    try:
        image = read_face(file, 3)
    except FileNotFoundError:
        raise ValueError(f"{name} was deleted after {KEPT_SECONDS} seconds, upload it again") from None
    except (ValueError, OSError) as e:
        raise ValueError(str(e).replace(str(file), name)) from None  # without the folder on the server
    scale = min(1.0, LARGEST_SIDE / max(image.shape[:2]))
    size = [max(1, round(scale * side)) for side in image.shape[1::-1]]
    return (cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image), scale


def _rounded(table):
    "Round to three decimals, as float64: float32 would show further digits"
    return table.astype({c: float for c in table.select_dtypes("number")}).round(3)


def _count(n, what):
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _found_sentence(n):
    return f"{_count(n, 'face')} found." if n else "No face found in this photograph."


class FaceApp:
    "The functions of the page: each method takes file paths and returns values to show"

    def __init__(
        self,
        predictor: Predictor,  # Model that labels the faces
        finder=None,  # Default `FaceFinder(device=predictor.device)`
    ):
        self.predictor, self.finder = predictor, finder or FaceFinder(device=predictor.device)

    def label(self, file):  # Sentence, image with boxes, table
        "Label the faces of a photograph"
        image, _ = _photo(file)
        faces = self.predictor.predict_faces(image, self.finder)
        table = _rounded(faces[["label", "probability", *self.predictor.columns]])
        table.insert(0, "face", range(1, len(table) + 1))
        return _found_sentence(len(faces)), draw_faces(image, faces.assign(track=table["face"])), table

    def heatmaps(self, file):  # Sentence, list of (image, caption)
        "Draw heat maps of where the model looks, on the largest faces of a photograph"
        crops = [f.image for f in self.finder(_photo(file)[0])]
        if not crops:
            return _found_sentence(0), []
        shown = crops[:MOST_HEATMAPS]
        table = self.predictor.predict(shown)
        heat = grad_cam(self.predictor, shown, list(table["label"]))
        labels = zip(table["label"], table["probability"])
        captions = [f"{i}: {label} {100 * p:.0f} %" for i, (label, p) in enumerate(labels, 1)]
        over = [heat_overlay(face, cv2.resize(h, face.shape[1::-1])) for face, h in zip(shown, heat)]
        left = f" Heat maps of the {MOST_HEATMAPS} largest are shown." if len(crops) > MOST_HEATMAPS else ""
        return _found_sentence(len(crops)) + left, list(zip(over, captions))

    def label_files(self, files):  # Sentence, table, csv file
        "Label the faces of several photographs"
        if len(files) > MOST_FILES:
            raise ValueError(f"Expected at most {MOST_FILES} files at a time, got {len(files)}")
        tables, left_out = [], []
        for file in files:
            try:
                photo, scale = _photo(file)
            except (ValueError, OSError):
                left_out.append(Path(file).name)
                continue
            table = self.predictor.predict_faces(photo, self.finder)
            table[_BOX] /= scale
            tables.append(table.assign(image=Path(file).name))
        if not tables:
            raise ValueError("None of the files can be read as an image: expected JPEG, PNG or WebP files")
        faces = pd.concat([t for t in tables if len(t)] or tables[:1], ignore_index=True)
        faces = _rounded(faces.drop(columns=["second", "track"]))
        none = sum(not len(t) for t in tables)
        message = f"{_count(len(faces), 'face')} found in {_count(len(tables), 'photograph')}."
        message += f" Photographs without a face: {none}." if none else ""
        message += f" Left out, because they cannot be read: {', '.join(left_out)}." if left_out else ""
        csv = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))) / "faces.csv"
        write_csv(faces, csv)
        return message, faces[["image", "label", "probability"]], str(csv)


def _one_sentence(answer, n_outputs):
    "Answer, or show an error as one sentence on the page and one line in the log"

    @wraps(answer)
    def _inner(value):
        if not value:
            return ["", *[None] * (n_outputs - 1)]
        try:
            return answer(value)
        except (ValueError, OSError, ImportError) as e:
            print(f"ecan_app: {e}", file=sys.stderr)
            return [f"{e}.", *[None] * (n_outputs - 1)]

    return _inner


def _gradio():
    "Import Gradio with telemetry switched off"
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as e:
        raise ImportError(f'the page needs the package {e.name}: pip install "ecan_fastai[app]"') from e
    return gradio


def _uploaded_file(payload):
    "Return the path of an upload; Gradio itself would decode it first, with a traceback if it is no image"
    return None if payload is None else payload.path


def build_app(
    predictor: Predictor,  # Model that labels the faces
    finder=None,  # Default `FaceFinder(device=predictor.device)`
):  # gradio.Blocks, to `launch`
    "Build the page; raises `ImportError` without the extra `app`"
    gr, app = _gradio(), FaceApp(predictor, finder)

    with gr.Blocks(title="Facial expressions", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# Facial expressions\nUpload or paste a photograph, or take one with the camera: each face is found and "
            "labelled. Photographs stay on the computer that runs this page and are deleted after a few minutes. A "
            "label says what a face looks like to a model, not what a person feels. Faces are sought in photographs "
            f"reduced to {LARGEST_SIDE:,} pixels."
        )
        with gr.Tab("One photograph"):
            with gr.Row():
                sources = ["upload", "clipboard", "webcam"]
                photo = gr.Image(label="Photograph", sources=sources, height=380, elem_id="photo")
                photo.preprocess = _uploaded_file
                drawn = gr.Image(
                    label="Faces", interactive=False, height=380, format="jpeg", elem_id="drawn", buttons=[]
                )
            message = gr.Markdown(elem_id="message")
            table = gr.Dataframe(label="Probabilities", interactive=False, buttons=[], elem_id="table")
            look = gr.Button("Show where the model looks", elem_id="look")
            heat = gr.Gallery(
                label="Heat maps (Grad-CAM)",
                columns=3,
                fit_columns=False,
                height="auto",
                format="jpeg",
                buttons=[],
                elem_id="heat",
            )
            photo.change(_one_sentence(app.label, 3), photo, [message, drawn, table], show_progress="minimal")
            photo.change(lambda: None, None, heat, api_visibility="private")
            look.click(_one_sentence(app.heatmaps, 2), photo, [message, heat], show_progress="minimal")
        with gr.Tab("Several photographs"):
            files = gr.File(label="Photographs", file_count="multiple", elem_id="files")
            files_message = gr.Markdown(elem_id="files-message")
            faces = gr.Dataframe(label="Faces", interactive=False, buttons=[], elem_id="faces")
            csv = gr.File(label="Table with all probabilities", interactive=False, elem_id="csv")
            files.change(_one_sentence(app.label_files, 3), files, [files_message, faces, csv], show_progress="minimal")
    return page


def _check_address(host, port):
    "Raise `OSError` if a server cannot listen there; Gradio takes every failure for a port in use"
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as e:
        if port and e.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is in use: choose another one (--port)") from e
        raise OSError(f"cannot listen on {host}: {e.strerror or e}") from e


def launch_app(
    predictor: Predictor,  # Model that labels the faces
    host: str = "127.0.0.1",  # Address to listen on; the default is for this computer alone
    port: int | None = None,  # Default: the first free one from 7860 on
    wait: bool = True,  # Block until the server is stopped (Ctrl+C or SIGTERM); False: return at once
):  # gradio.Blocks, running
    """Serve the page; raises `OSError` if it cannot listen there, `ImportError` without the extra `app`

    Refuses uploads over 20 MB, deletes uploads and results after two to three minutes, and sends nothing anywhere."""
    _check_address(host, port)
    folder = tempfile.TemporaryDirectory(prefix="ecan_app_")
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    gr = _gradio()
    page = build_app(predictor)
    page.kept_files = folder  # deleted with the page
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    options: dict = dict(server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True, footer_links=[])
    try:
        _, url, _ = page.launch(**options, max_file_size=LARGEST_FILE, theme=theme, prevent_thread_lock=True)
    except OSError as e:
        raise OSError(f"cannot serve on {host}: {e}") from e
    print(f"ecan_app: open {url} in a browser, stop with Ctrl+C", flush=True)
    if wait:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped from outside, it deletes its files too
        try:
            page.block_thread()
        finally:
            folder.cleanup()
    return page
