"""A Hugging Face Space: the page of `ecan_app` with the model that comes with the package, or with the run folder `run`
beside this file."""

from pathlib import Path

from ecan_fastai.app import launch_app
from ecan_fastai.inference import Predictor

run = Path(__file__).parent / "run"
launch_app(Predictor(run if run.is_dir() else None), host="0.0.0.0", port=7860)
