"""The results of a run: metrics, predictions, figures, weights, exported learner, and the versions and hardware that
gave them."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.torch_core import num_distrib

from ecan_fastai import __version__
from ecan_fastai.augment import uses_five_crops
from ecan_fastai.inference import Predictor
from ecan_fastai.interpret import plot_confusion, plot_history
from ecan_fastai.metrics import calibrated_temperature, calibration_error, per_class_table, split_metrics
from ecan_fastai.runfiles import as_json, read_json, write_run_file, write_table
from ecan_fastai.weights import model_card

# Versions and hardware


@cache  # commits made while this process runs do not change its code
def package_commit():
    "Return the commit of the package's code, with a + if files differ from it; None outside its repository"

    def git(*args):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent.parent), *args], capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "ecan_fastai/runs.py"):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", "ecan_fastai") else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def environment(dls):
    "Return versions, commit and hardware of this process"
    import albumentations
    import cv2
    import fastai
    import sklearn
    import timm

    device = torch.device(dls.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return dict(
        ecan_fastai=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        fastai=fastai.__version__,
        timm=timm.__version__,
        albumentations=albumentations.__version__,
        numpy=np.__version__,
        sklearn=sklearn.__version__,
        opencv=cv2.__version__,
        commit=package_commit(),
        device=f"{device.type}: {name}",
        cpus=os.cpu_count(),
        **({"processes": num_distrib()} if num_distrib() > 1 else {}),
    )


def _processor():
    "Return the model of the processor, from Linux or else Python"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def write_json(file, value):
    "Write a JSON file of a run"
    write_run_file(file, lambda f: f.write_text(as_json(value, indent=1)))


def note_environment(dls, out):
    "Add this environment to config.json under `resumed`, if it differs from the run's last one"
    file, now = out / "config.json", environment(dls)
    written = read_json(file)
    known = [written["environment"], *written.get("resumed", [])]
    if known[-1] != now:
        write_json(file, {**written, "resumed": [*known[1:], now]})


# Evaluation


def _evaluate(learn, cfg, out):
    "Write metrics, predictions and confusion matrices of every split but train, in float32, as exported"
    # published FER2013 code reports ten crops
    both = cfg.eval_crops == "center" and uses_five_crops(cfg.level, cfg.recipe)
    predictor, vocab = Predictor.from_learner(learn, "ten" if both else None), list(learn.dls.vocab)
    metrics, outputs = {}, {}
    reads_keys = getattr(learn.loss_func, "reads_keys", False)
    keys = Predictor.from_learner(learn, key=True) if reads_keys else None
    for name in learn.dls.split_names[1:]:
        faces = learn.dls[name].dataset.items
        if not len(faces):
            continue
        images, targets = [f.image for f in faces], np.array([vocab.index(f.label) for f in faces])
        logits = predictor.logits(images, num_workers=cfg.workers)
        shown = logits[:, predictor.center_view] if both else logits.mean(1)
        outputs[name] = shown, targets, faces
        predicted = shown.argmax(-1).numpy()
        metrics[name] = {**split_metrics(targets, predicted, vocab), "eval_crops": cfg.eval_crops}
        metrics[name]["per_class"] = per_class_table(targets, predicted, vocab).to_dict("index")
        if both:
            metrics[name]["ten_crops_accuracy"] = _share_right(logits.mean(1).argmax(-1), targets)
        if keys:
            probs = keys.probabilities(images, num_workers=cfg.workers)
            metrics[name]["key_encoder_accuracy"] = _share_right(probs.argmax(1), targets)
        title = f"{cfg.method} on {name}: accuracy {100 * metrics[name]['accuracy']:.2f} %"
        _write_figure(out / f"confusion_{name}.png", plot_confusion, targets, predicted, vocab, title)
    calibration = _calibrate(outputs, metrics)
    for name, (logits, targets, faces) in outputs.items():
        probabilities = (logits / calibration.get("temperature", 1)).softmax(-1).numpy()
        _write_predictions(faces, targets, probabilities, vocab, out / f"predictions_{name}.csv")
    return metrics, calibration


def _calibrate(outputs, metrics):
    "Fit a temperature on valid if training has not seen it, and note the calibration errors of other splits"
    if "valid" not in outputs:
        return {}
    logits, targets, _ = outputs["valid"]
    temperature = calibrated_temperature(logits, targets)
    if temperature is None:
        return {}
    temperature = round(temperature, 4)
    for name, (logits, targets, _) in outputs.items():
        if name != "valid":
            errors = [calibration_error((logits / t).softmax(-1).numpy(), targets) for t in (1, temperature)]
            metrics[name] |= dict(zip(("calibration_error", "calibrated_error"), errors))
    return dict(temperature=temperature, calibrated_on="valid")


def _share_right(predicted, targets):
    return float((np.asarray(predicted) == targets).mean())


def _write_predictions(faces, targets, probs, vocab, file):
    columns = dict(
        image=list(map(str, faces)),
        label=[vocab[t] for t in targets],
        predicted=[vocab[p] for p in probs.argmax(1)],
    )
    table = pd.DataFrame(columns)
    table[[f"p_{v}" for v in vocab]] = probs.round(5)
    write_run_file(file, lambda f: write_table(table, f))


def _write_figure(file, plot, *args):
    "Draw and write a figure; `$` in names begins no formula"
    with matplotlib.rc_context({"text.parse_math": False}):
        fig = plot(*args).figure
        write_run_file(file, lambda f: fig.savefig(f, dpi=110, format="png"))
    matplotlib.pyplot.close(fig)


# Everything that is written after the last epoch


def _first_and_last(column):
    return dict(first=float(column.iloc[0]), last=float(column.iloc[-1]))


def _record(cfg, history, metrics, out):
    "Return the content of metrics.json"
    seconds, written = history["seconds"], read_json(out / "config.json")
    record = dict(
        method=cfg.method,
        epochs=len(history),
        splits=metrics,
        seconds=dict(training_and_validation=round(float(seconds.sum()), 1), median_epoch=float(seconds.median())),
        **{k: written[k] for k in ("environment", "resumed") if k in written},
    )
    if "alpha" in history:
        record["alpha"] = {**_first_and_last(history["alpha"]), "highest": float(history["alpha"].max())}
    if "cos_within" in history:
        record["mean_cosines"] = {pairs: _first_and_last(history[f"cos_{pairs}"]) for pairs in ("within", "between")}
    return record


def write_results(
    learn,  # After its last epoch
    cfg,  # Resolved `RunConfig`
    out,  # Folder of the run
    rows,  # History, a dict per epoch
) -> dict:  # Record written to `metrics.json`
    "Evaluate a trained learner and write everything to the run's folder, `metrics.json` last"
    history = pd.DataFrame(rows)
    # a run may have been stopped between its last checkpoint and this file
    write_run_file(out / "history.csv", lambda f: history.to_csv(f, index=False))
    _write_figure(out / "curves.png", plot_history, history)
    metrics, calibration = _evaluate(learn, cfg, out)
    written = read_json(out / "config.json")
    write_json(out / "config.json", {**written, "about": {**written["about"], **calibration}})
    for name, m in metrics.items():
        if f"{name}_accuracy" in history:
            m["accuracy_of_best_epoch_chosen_on_this_split"] = float(history[f"{name}_accuracy"].max())
    weights = {k: v.detach().cpu().contiguous() for k, v in learn.model.inference().state_dict().items()}
    # save_file would make the file readable by its owner alone
    write_run_file(out / "model.safetensors", lambda f: f.write_bytes(safetensors.torch.save(weights)))
    learn.remove_cbs([MixedPrecision, ChannelsLast])
    with torch.no_grad():  # so that the probabilities of the exported learner are calibrated, too
        for p in learn.model.classifier.parameters():
            p.div_(calibration.get("temperature", 1))
    write_run_file(out / "export.pkl", lambda f: learn.export(f.resolve()))
    record = _record(cfg, history, metrics, out)
    write_run_file(out / "card.md", lambda f: f.write_text(model_card(read_json(out / "config.json"), record), "utf-8"))
    write_json(out / "metrics.json", record)
    return record
