"Console scripts: they read arguments, call the package, and print one clear sentence if something is wrong."

import argparse
import json
import os
import shlex
import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path

from ecan_fastai.config import CROPS, GROUPS, KINDS, RunConfig, help_text, setting_types


def _parser():
    "Parser of `ecan_train`; it returns only the options that are typed, and `RunConfig` has the other defaults"
    p = _Parser(
        "ecan_train",
        description="Train a facial-expression model and write a run folder: settings, history, metrics, predictions, "
        "figures, weights, exported learner.",
        epilog="Example: ecan_train sample",
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: p.add_argument_group(name) for name in GROUPS}
    for f in fields(RunConfig):
        group = groups[f.metadata["group"]]
        if f.name == "data":
            group.add_argument("data", nargs="?", metavar="DATA", help=f.metadata["help"])
        else:
            group.add_argument(f"--{f.name.replace('_', '-')}", help=help_text(f), **_option(f))
    groups["run"].add_argument(
        "--out", type=_path, help="folder of the run, new or empty; default runs/<data>-<method>-seed<seed>"
    )
    groups["run"].add_argument(
        "--resume",
        type=_path,
        metavar="RUN",
        help="resume the interrupted run in this folder; takes no other option, and DATA only if it was moved",
    )
    return p


def _option(f):
    "Return the argparse options of a field of `RunConfig`"
    of_type = setting_types(RunConfig)[f.name]
    if f.name == "pretrained":
        return dict(nargs="?", const=True, metavar="PATH")
    if of_type is bool:
        return dict(action="store_true" if f.default is False else argparse.BooleanOptionalAction)
    if f.metadata["choices"]:
        return dict(type=of_type, choices=f.metadata["choices"])
    return dict(type=of_type, metavar=of_type.__name__.upper())


def _print_splits(splits):
    print(f"\n{'split':<14}{'images':>8}{'accuracy':>11}{'average':>10}{'macro-F1':>10}   (evaluation crops)")
    for name, m in splits.items():
        print(
            f"{name:<14}{m['n']:>8}{100 * m['accuracy']:>10.2f}%{100 * m['average_accuracy']:>9.2f}%"
            f"{m['macro_f1']:>10.4f}   ({m['eval_crops']})"
        )


def _path(text):
    "Parse a path; an empty one would mean the folder one is in"
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def _print_record(record, out):
    _print_splits(record["splits"])
    print(f"\nmedian epoch {record['seconds']['median_epoch']:.1f} s; everything is in {out}")


class _Parser(argparse.ArgumentParser):
    "A parser whose messages hold no control codes"

    def error(self, message):
        super().error(printable(message))


def printable(text):
    "Return text on one line, with control codes escaped"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _script(f):
    "Decorate a console script: print `UserWarning`s in one line, hide other warnings and what OpenCV prints"

    @wraps(f)
    def _inner(args=None):
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet
        if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal's encoding lacks must not end a command
            sys.stdout.reconfigure(errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, category, *_, **__: (
                print(f"{f.__name__}: {printable(message)}", file=sys.stderr) if category is UserWarning else None
            )
            return f(args)

    return _inner


def _data_name(data):
    path = Path(data).resolve()
    return "sample" if data == "sample" else path.name if path.is_dir() else path.stem


@_script
def ecan_train(args=None):
    "Train a model and write a run folder"
    parser = _parser()
    typed = vars(parser.parse_args(args))
    out, resume = typed.pop("out", None), typed.pop("resume", None)
    if resume is not None and (out is not None or typed.keys() - {"data"}):
        parser.error("--resume takes all settings from the run's folder: give nothing else, DATA only if it was moved")
    if resume is None and "data" not in typed:
        parser.error("DATA is missing: a folder, a csv file, or `sample`")
    with _one_sentence(parser, lambda: f"interrupted; {_left(out, parser.prog)}"):
        config = None if resume is not None else RunConfig(**typed)
        out = resume or out or Path("runs") / f"{_data_name(config.data)}-{config.method}-seed{config.seed}"
        from ecan_fastai.runs import resume_run, start_run  # takes seconds, so after the checks above

        record = start_run(config, out) if config else resume_run(out, typed.get("data"))
        if record is not None:  # None in the processes of a distributed run that write nothing
            _print_record(record, out)


def _left(out, prog):
    "Say what an interrupted run leaves, and how to resume it"
    resume = f"{prog} --resume {shlex.quote(str(out))}"
    if out is not None and (out / "checkpoint.pth").exists():
        return f"the finished epochs are in {out}, resume with: {resume}"
    if out is not None and (out / "config.json").exists():
        return f"no epoch was finished; {out} holds the settings, start over with: {resume}"
    return "no epoch was finished, and there is nothing to resume"


# Trained models, and data


@contextmanager
def _one_sentence(parser, interrupted=lambda: "interrupted"):
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    except (ValueError, OSError, ImportError) as e:
        parser.exit(2, f"{parser.prog}: error: {printable(e)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: {interrupted()}\n")


def _is_read(file, path):
    "Whether an existing file is `path`, or an image or video in the folder `path`"
    if not (file.exists() and path.exists()):
        return False
    return file.samefile(path) or file.suffix.lower() in ANNOTATED and path.resolve() in file.resolve().parents


def _out(parser, file, *endings, flag="--out", read=()):
    "Leave with one sentence if a file cannot be written, or if it is one of those that are `read`"
    if file is None:
        return
    if file.suffix.lower() not in endings:
        parser.error(f"{flag}: expected a name ending in {' or '.join(endings)}, got {file}")
    if not file.parent.is_dir():
        parser.error(f"{flag}: no such folder: {file.parent}")
    if not os.access(file.parent, os.W_OK):
        parser.error(f"{flag}: no permission to write into {file.parent}")
    if any(_is_read(file, Path(f)) for f in read if f is not None):
        parser.error(f"{flag}: {file} is a file that is read, give another name")


def _add_run(p):
    p.add_argument(
        "--run",
        type=_path,
        metavar="RUN",
        help="folder of a finished run (default: the model that ships with the package)",
    )
    p.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")


def _refuse_run(p, paths):
    "Refuse a run's folder as images; its figures would be found"
    for path in map(Path, paths):
        if (path / "model.safetensors").is_file():
            p.error(f"{path} is the folder of a run: give it as --run {path}")


def _with_model(prog, description, example):
    p = _Parser(prog, description=description, epilog=f"Example: {example}")
    _add_run(p)
    p.add_argument(
        "--crops",
        choices=CROPS,
        help="views averaged for each image: the centre, the centre and its mirror image, five crops, or ten (default: "
        "as the run was evaluated)",
    )
    return p


def _predict_parser():
    p = _with_model(
        "ecan_predict",
        "Label images cropped to the face, or with --faces the faces in photographs, video and a webcam. Prints a "
        "table, or writes a CSV or JSON file.",
        "ecan_predict face.jpg more_faces/ --run runs/mine --out labels.csv",
    )
    p.add_argument(
        "images",
        nargs="+",
        type=_path,
        metavar="IMAGE",
        help="image file, or folder of images, cropped to the face; with --faces photograph, video or folder of them, "
        "or `webcam`",
    )
    p.add_argument(
        "--faces", action="store_true", help="find the faces first (needs the extra `faces`), one row for each"
    )
    p.add_argument(
        "--every",
        type=float,
        metavar="SECONDS",
        help="with --faces: time between the frames of a video that are labelled, 0 for every frame; default 1, or 0 "
        "with --annotated",
    )
    p.add_argument(
        "--seconds", type=float, metavar="N", help="with --faces: stop after N seconds of video; required for `webcam`"
    )
    p.add_argument(
        "--smoothing",
        type=float,
        metavar="SECONDS",
        help="with --faces: time constant for averaging the probabilities of a video, 0 for none; default 0.5",
    )
    p.add_argument(
        "--annotated",
        type=_path,
        metavar="FILE",
        help="with --faces: write the one photograph or video with boxes and labels to FILE (.png, .jpg, .mp4, .avi or "
        ".webm)",
    )
    p.add_argument(
        "--by",
        type=_path,
        metavar="PEOPLE.csv",
        help="also print accuracy by age, gender or any other column of this table; its first column is the name of "
        "the image file; the true expression is its column `label`, or else the image's folder",
    )
    p.add_argument(
        "--heatmaps",
        type=_path,
        metavar="FILE",
        help="also draw to FILE.png where the model looks in the first 16 images (Grad-CAM, needs the extra `explain`)",
    )
    p.add_argument(
        "--out",
        type=_path,
        metavar="FILE",
        help="write every class's probability to FILE, .csv or .json, instead of printing a table",
    )
    return p


ANNOTATED = (".png", ".jpg", ".jpeg", ".mp4", ".avi", ".webm")


def _check_predict(p, given):
    "Leave with one sentence if options do not go together"
    _refuse_run(p, given.images)
    read = [*given.images, given.by]
    _out(p, given.out, ".csv", ".json", read=read)
    _out(p, given.heatmaps, ".png", flag="--heatmaps", read=read)
    _out(p, given.annotated, *ANNOTATED, flag="--annotated", read=read)
    for option in ("every", "seconds", "smoothing", "annotated"):
        if getattr(given, option) is not None and not given.faces:
            p.error(f"--{option} has no effect without --faces")
    if given.heatmaps and given.faces:
        p.error("--heatmaps takes images of faces: leave --faces out")
    if given.by and not given.by.is_file():
        p.error(f"no such file: {given.by}")


@_script
def ecan_predict(args=None):
    "Label images with a trained model"
    p = _predict_parser()
    given = p.parse_args(args)
    with _one_sentence(p):
        _check_predict(p, given)
        from ecan_fastai.detector import media_files
        from ecan_fastai.inference import Predictor, find_images
        from ecan_fastai.video import is_video

        videos = [f for f in given.images if is_video(f) and not f.is_dir()]
        if videos and not given.faces:
            raise ValueError(f"{videos[0]} is a video or a camera: add --faces")
        predictor = Predictor(given.run, given.crops, given.device)
        find = media_files if given.faces else find_images
        files = [f for path in given.images for f in find(path)]
        if given.by:
            _check_people(files, given.by, predictor.vocab)
        if given.faces:
            readable, table = _found_faces(predictor, files, given)
        else:
            table = predictor.predict(files, skip_broken=True)
            readable = table["image"]
            _note_photographs(readable[:16], 8 * predictor.model.side)
        if given.out:
            _write_faces(table, given.out)
        else:
            _print_faces(table)
        if given.heatmaps:
            _write_heatmaps(predictor, list(readable[:16]), given.heatmaps)
        if given.by:
            _print_groups(table, readable, given.by, predictor.vocab, given.faces)
        if len(readable) < len(files):
            p.exit(1, f"{p.prog}: {len(files) - len(readable)} of {len(files)} files are left out\n")


def _found_faces(predictor, files, given):
    from ecan_fastai.detector import readable_media

    readable = [files[i] for i in readable_media(predictor, files)]
    options = {k: v for k in ("every", "seconds", "smoothing", "annotated") if (v := getattr(given, k)) is not None}
    table = predictor.predict_faces(readable, skip_broken=True, **options)
    with_faces = set(table["image"])
    for f in readable:
        if str(f) not in with_faces:
            print(f"ecan_predict: no face found in {printable(f)}", file=sys.stderr)
    return readable, table


def _check_people(files, people, vocab):
    "Raise the errors of `accuracy_by_group` before the faces are labelled, which may take long"
    import pandas as pd

    from ecan_fastai.detector import accuracy_by_group

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accuracy_by_group(pd.DataFrame(columns=["image", "label"]), files, people, vocab)


def _print_groups(table, files, people, vocab, faces):
    from ecan_fastai.detector import accuracy_by_group

    groups = accuracy_by_group(table, files, people, vocab)
    if not faces:
        groups = groups.drop(columns="found")
    found = "; found: images in which a face was found" if faces else ""
    print(f"\nAccuracy by group, with the 95 % interval from low to high{found}")
    print(groups.to_string(index=False, float_format="{:.3f}".format))


def _note_photographs(images, large):
    "Say that no face was looked for if an image is so large that it may show more than a face"
    from ecan_fastai.data import read_face

    for file in images:
        height, width, _ = read_face(file).shape
        if min(height, width) > large:
            note = f"has {width}x{height} pixels and was taken as one face: for a photograph, add --faces"
            return print(f"ecan_predict: {printable(file)} {note}", file=sys.stderr)


def _write_faces(table, file):
    from ecan_fastai.readers.records import write_csv
    from ecan_fastai.runfiles import as_json, write_whole

    table = table.astype({c: float for c in table.select_dtypes("float32")}).round(5)
    if file.suffix.lower() == ".csv":
        write_whole(file, lambda f: write_csv(table, f))
    else:
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        write_whole(file, lambda f: f.write_text(as_json(rows, indent=1)))


def _write_heatmaps(predictor, images, file):
    from ecan_fastai.interpret import plot_grad_cam
    from ecan_fastai.runfiles import write_whole

    figure = plot_grad_cam(predictor, images)
    write_whole(file, lambda f: figure.savefig(f, dpi=110, format="png"))


def _print_faces(table):
    "Print pixels as whole numbers, and seconds only of videos"
    if not len(table):
        return print("no face found")
    columns = [
        c for c in ("image", "second", "track", "left", "top", "right", "bottom", "label", "probability") if c in table
    ]
    box = {c: int for c in ("left", "top", "right", "bottom") if c in table}
    table = table[columns].assign(image=table["image"].map(printable))
    print(table.dropna(axis=1, how="all").astype(box).to_string(index=False, float_format="{:.3f}".format))


@_script
def ecan_evaluate(args=None):
    "Measure a trained model on labelled faces"
    p = _with_model(
        "ecan_evaluate",
        "Measure a model on labelled faces: accuracy, average accuracy and macro-F1 of each split.",
        "ecan_evaluate path/to/rafdb --run runs/mine --split test",
    )
    p.add_argument("data", type=_path, metavar="DATA", help="folder or csv file of any kind that ecan_train takes")
    p.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="kind of DATA; default auto")
    p.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="split to evaluate, may be repeated (default: all but train and valid, or all if no other exists)",
    )
    p.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    p.add_argument("--out", type=_path, metavar="FILE", help="write the measures, also by class, to FILE.json")
    given = p.parse_args(args)
    with _one_sentence(p):
        _refuse_run(p, [given.data])
        _out(p, given.out, ".json", read=[given.data])
        from ecan_fastai.inference import Predictor
        from ecan_fastai.runfiles import write_whole

        predictor = Predictor(given.run, given.crops, given.device)
        record = predictor.evaluate(given.data, given.kind, given.split, given.skip_broken)
        if given.out:
            write_whole(given.out, lambda f: f.write_text(json.dumps(record, indent=1)))
        _print_evaluation(record)
        if "train" in record["splits"] and not given.split:
            note = (
                "the data has no test split: these numbers say nothing about other images if the model has seen these"
            )
            print(f"{p.prog}: {note}", file=sys.stderr)


def _print_evaluation(record):
    renamed = [f"{data} ({model})" if data != model else data for data, model in record["classes"].items()]
    print(f"classes of the data that the model has: {', '.join(renamed)}")
    if record["left_out"]:
        print(
            "left out, because the model does not have the class: "
            f"{', '.join(f'{n} {label}' for label, n in record['left_out'].items())}"
        )
    if record["unseen"]:
        print(f"classes that only the model has: {', '.join(record['unseen'])}")
    _print_splits({k: {**m, "eval_crops": record["crops"]} for k, m in record["splits"].items()})


@_script
def ecan_check(args=None):
    "Check a data set before training on it"
    p = _Parser(
        "ecan_check",
        description="Count the images of every class and split, and find broken and duplicate images.",
        epilog="Example: ecan_check path/to/fer2013 --out pairs.csv --figure pairs.png",
    )
    p.add_argument("data", type=_path, metavar="DATA", help="folder or csv file of any kind that ecan_train takes")
    p.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="kind of DATA; default auto")
    p.add_argument(
        "--distance",
        type=int,
        default=2,
        metavar="BITS",
        help="bits of 64 by which the perceptual hashes of a near pair may differ; default 2",
    )
    p.add_argument("--out", type=_path, metavar="FILE", help="write all pairs to FILE.csv")
    p.add_argument("--figure", type=_path, metavar="FILE", help="draw the first pairs across splits to FILE.png")
    given = p.parse_args(args)
    with _one_sentence(p):
        _out(p, given.out, ".csv", read=[given.data])
        _out(p, given.figure, ".png", flag="--figure", read=[given.data])
        from ecan_fastai.check import check_data, show_pairs
        from ecan_fastai.readers.records import write_csv
        from ecan_fastai.runfiles import write_whole

        report = check_data(given.data, given.kind, given.distance)
        _print_report(report)
        if given.out:
            write_whole(given.out, lambda f: write_csv(report.pairs.drop(columns=["a", "b"]), f))
        if given.figure and len(report.leaks):
            write_whole(given.figure, lambda f: show_pairs(report).savefig(f, dpi=110, format="png"))
        elif given.figure:
            print("no pair across two splits: no figure written")


def _print_report(report):
    print(report.counts.to_string())
    print(f"\nSizes in pixels\n{report.sizes.to_string(float_format='{:.0f}'.format)}")
    print(f"\n{len(report.broken)} broken images")
    for problem in report.broken.values():
        print(f"  {printable(problem)}")
    print("\nPairs of equal or nearly equal images (check near pairs by eye)")
    print(report.summary().to_string(index=False) if len(report.pairs) else "none")


@_script
def ecan_app(args=None):
    "Serve a page that labels the faces of photographs"
    p = _Parser(
        "ecan_app",
        description="Serve a web page on this computer that labels the faces of photographs (needs the extra `app`). "
        "Photographs are deleted after a few minutes, and nothing is sent anywhere.",
        epilog="Example: ecan_app --run runs/mine",
    )
    _add_run(p)
    p.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; default 127.0.0.1, for this computer alone",
    )
    p.add_argument("--port", type=int, help="port to listen on; default: the first free one from 7860 on")
    given = p.parse_args(args)
    if given.port is not None and not 0 < given.port < 2**16:
        p.error(f"--port: expected a number from 1 to 65535, got {given.port}")
    with _one_sentence(p):
        from ecan_fastai.app import launch_app
        from ecan_fastai.inference import Predictor

        launch_app(Predictor(given.run, device=given.device), given.host, given.port)


# The paper's experiments


def _setting(text):
    "Parse `key=value` as a setting of `RunConfig`, with its type there"
    key, equals, value = text.partition("=")
    types = {
        k: v for k, v in setting_types(RunConfig).items() if k not in ("data", "kind", "seed")
    }  # which are options of their own
    if not equals or key not in types:
        raise argparse.ArgumentTypeError(f"expected SETTING=VALUE with a setting of ecan_train, got {text!r}")
    if types[key] is bool or key == "pretrained" and value in ("true", "false"):
        if value not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{key} must be true or false, got {value!r}")
        return key, value == "true"
    try:
        return key, types[key](value)
    except ValueError:
        number = "a whole number" if types[key] is int else "a number"
        raise argparse.ArgumentTypeError(f"{key} must be {number}, got {value!r}") from None


def _reproduce_parser():
    p = _Parser(
        "ecan_reproduce",
        description="Reproduce a table or figure of the paper, or answer a question that it leaves open: train the "
        "missing runs, then write the table of all finished runs, with the paper's numbers if it has some for that "
        "data, and the figure. Several processes may share a folder: each takes runs that no other is training. "
        "Without EXPERIMENT: list the experiments.",
        epilog="Example: ecan_reproduce table5 --data path/to/fer2013 --seeds 3",
    )
    p.add_argument(
        "experiment",
        nargs="?",
        metavar="EXPERIMENT",
        help="table2 to table5, figure3a to figure7, or the name of a question",
    )
    p.add_argument("--data", metavar="DATA", help="folder or csv file of any kind that ecan_train takes, or `sample`")
    p.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="kind of DATA; default auto")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds, so of runs per row; default 1")
    p.add_argument(
        "--out",
        type=_path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="folder of runs, records and tables; default runs/reproduce",
    )
    p.add_argument("--records", type=_path, metavar="DIR", help="folder of the records; default DIR/records")
    p.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="a setting of ecan_train for all runs, such as epochs=8; may be repeated",
    )
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--commands",
        action="store_true",
        help="train nothing: print a command for each run, to be executed in any order and in parallel (xargs, a job "
        "array)",
    )
    which.add_argument("--only", metavar="RUN", help="make only this run, named as by --commands")
    return p


def _commands(given):
    "Yield a command for each run of an experiment, which can be executed from any folder"
    from ecan_fastai.experiments import planned_runs, run_stem
    from ecan_fastai.weights import NAMES

    script = Path(sys.executable).with_name("ecan_reproduce")
    command = [str(script) if script.exists() else script.name, given.experiment]
    drawn = given.data == "sample" and given.kind == "auto"  # else a folder of this name
    command += ["--data", "sample" if drawn else os.path.abspath(given.data)]
    command += ["--kind", given.kind, "--seeds", str(given.seeds), "--out", os.path.abspath(given.out)]
    if given.records is not None:
        command += ["--records", os.path.abspath(given.records)]
    for k, v in given.set:
        if k == "pretrained" and isinstance(v, str) and v not in NAMES:
            v = os.path.abspath(v)
        command += ["--set", f"{k}={str(v).lower() if isinstance(v, bool) else v}"]
    for _, cfg in planned_runs(given.experiment, given.data, given.seeds, given.kind, **dict(given.set)):
        yield shlex.join([*command, "--only", run_stem(cfg)])


@_script
def ecan_reproduce(args=None):
    "Make the runs of a table or figure, then the table or figure"
    p = _reproduce_parser()
    given = p.parse_args(args)
    if given.experiment is not None and given.data is None:
        p.error("--data is missing: the path of a data set, or `sample`")
    if given.experiment is None and (typed := vars(given).keys() - {"experiment"} - _untouched(p, given)):
        p.error(f"EXPERIMENT is missing: --{', --'.join(sorted(typed))} has no effect without it")
    with _one_sentence(p, lambda: "interrupted; repeat the command to resume"):
        from ecan_fastai.experiments import EXPERIMENTS, reproduce

        if given.experiment is None:
            for name, e in EXPERIMENTS.items():
                print(f"{name:<14}{len(e['runs']):>3} runs a seed   {e['title']}")
            return
        if given.commands:
            print("\n".join(_commands(given)))
            return
        table = reproduce(
            given.experiment,
            given.data,
            given.seeds,
            given.out,
            given.kind,
            given.records,
            lambda message: print(message, flush=True),
            given.only,
            **dict(given.set),
        )
        if not table.empty:
            print(f"\n{table.to_string()}")


def _untouched(parser, given):
    "Return the options that have their defaults"
    return {k for k, v in vars(given).items() if v == parser.get_default(k)}
