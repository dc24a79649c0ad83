"Console scripts, thin: arguments in, one clear sentence out where something is wrong."

import argparse
import json
import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path

from ecan_fastai.config import CHOICES, CROPS, KINDS, RunConfig, setting_types

HELP = dict(
    kind="what DATA is",
    preset="defaults: the paper's, or what did better in short runs on FER2013's valid split",
    method="the paper's method, its baseline, or a row of its Table 3",
    arch="name of a timm model (resnet18; tuned resnet18_half)",
    pretrained="timm's pretrained weights (DATA stands before it); with PATH those of a run's folder or a checkpoint",
    epochs="epochs (sample 12, FER2013 200, other data 40)",
    bs="batch size (sample 32, else 256, less for small data)",
    lr="highest learning rate (paper: 0.1 at batch 256, in proportion; adam: 0.002)",
    wd="weight decay (paper 5e-4, adam 1e-2)",
    opt="optimizer: the paper's SGD, or Adam (sample adam, else paper)",
    schedule="learning rate schedule",
    size="side in pixels (sample and FER2013 48, other data 224)",
    channels="1 grey, 3 colour (sample and FER2013 1, other data 3)",
    level="augmentation level of the paper's Table 1 (sample weak, else strong)",
    recipe="column of Table 1 (sample and FER2013 fer2013, other data rafdb)",
    small_size="side in pixels of the views in the first epochs; 0 for none",
    small_pct="share of the epochs that small_size is for",
    all_crops="train on all five crops of FiveCrop, not on a random one",
    eval_crops="evaluate on the centre view, or on the mean over it and its mirror image, five crops, or ten",
    l1="share of the contrastive loss (lambda 1)",
    l2="weight of the MVA or center loss (lambda 2; 0.7, center 0.003)",
    n_groups="feature groups of MVA (V)",
    temperature="temperature of the contrastive loss (0.1)",
    momentum="momentum of the key encoder (sample 0.99, else 0.999)",
    bank_groups="batches that the memory bank holds (K)",
    affinity_reduction="affinity loss as mean, or as the literal sum of Eq. 8",
    normalize_compact="L2-normalise the features for the MVA or center loss",
    anchors_only="gradient of the contrastive loss through the anchors alone; same value, about half the gradient",
    center_features="subtract the bank's mean feature from all features of the contrastive loss (tuned yes, paper no)",
    label_smoothing="label smoothing of cross-entropy, 0 to 1 (0)",
    key_eval="key encoder in evaluation mode, its running statistics moved like its parameters",
    balance="for unequal classes: sample them equally often (sampler), weight cross-entropy (weights), "
    "or use bank entries of rare classes as positives (positives)",
    valid_pct="share of train held out, where the data has no valid split",
    train_all="train on that share too; it is then reported as seen",
    skip_broken="go on without images that cannot be read",
    seed="seed of everything",
    precision="auto takes bf16 where the GPU or processor computes it natively, else fp32; fp16 needs a GPU",
    workers="loader processes (default: one a core, 16 at most)",
    watch_tests="also record the test splits' accuracy after every epoch, for comparison with best-epoch results; "
    "has no effect on training",
)


def _parser(config, choices):
    p = _Parser(
        "ecan_train",
        description="Train a facial-expression model and write a run folder: settings, history, metrics, predictions, "
        "images, weights, exported learner.",
        epilog="Example: ecan_train sample",
    )
    p.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder or csv file, or `sample` for faces that the package draws itself",
    )
    p.add_argument("--out", type=Path, help="folder of the run (default runs/<data>-<method>-seed<seed>)")
    p.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="resume the interrupted run in this folder; takes no other option, and DATA only if the data was moved",
    )
    types = setting_types(config)
    for f in fields(config)[1:]:
        flag, default = (
            f"--{f.name.replace('_', '-')}",
            f"; default {f.default}" if f.default is not None and types[f.name] is not bool else "",
        )
        if f.name == "pretrained":
            kind, default = dict(nargs="?", const=True, default=False, metavar="PATH"), ""
        elif types[f.name] is bool and f.default is None:
            kind = dict(action=argparse.BooleanOptionalAction, default=None)
        elif types[f.name] is bool:
            kind = dict(action="store_true")
        elif f.name in choices:
            kind = dict(type=types[f.name], default=f.default, choices=choices[f.name])
        else:
            kind = dict(type=types[f.name], default=f.default, metavar=types[f.name].__name__.upper())
        p.add_argument(flag, help=HELP[f.name] + default, **kind)
    return p


def _print_splits(splits):
    print(f"\n{'split':<14}{'images':>8}{'accuracy':>11}{'average':>10}{'macro-F1':>10}   (evaluation crops)")
    for name, m in splits.items():
        print(
            f"{name:<14}{m['n']:>8}{100 * m['accuracy']:>10.2f}%{100 * m['average_accuracy']:>9.2f}%"
            f"{m['macro_f1']:>10.4f}   ({m['eval_crops']})"
        )


def _print_record(record, out):
    _print_splits(record["splits"])
    print(f"\nmedian epoch {record['seconds']['median_epoch']:.1f} s; everything is in {out}")


class _Parser(argparse.ArgumentParser):
    "A parser that repeats what was typed without codes that a terminal would obey"

    def error(self, message):
        super().error(printable(message))


def printable(text):
    "Text on one line, without codes that a terminal would obey"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _script(f):
    """A console script from a function of its arguments: libraries' warnings to their own developers are hidden,
    ours are one line"""

    @wraps(f)
    def _inner(args=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, category, *_, **__: (
                print(f"{f.__name__}: {printable(message)}", file=sys.stderr) if category is UserWarning else None
            )
            return f(args)

    return _inner


def _data_name(data):
    return "sample" if data == "sample" else Path(data).resolve().stem


@_script
def ecan_train(args=None):
    "Train a model and write a run folder"
    parser = _parser(RunConfig, CHOICES)
    given = parser.parse_args(args)
    options = {k: v for k, v in vars(given).items() if k not in ("out", "resume")}
    if given.resume is not None:
        if given.out is not None or any(options[k] != parser.get_default(k) for k in options if k != "data"):
            parser.error(
                "--resume takes all settings from the run's folder: give nothing else with it but DATA, if it moved"
            )
        out = given.resume
    elif given.data is None:
        parser.error("DATA is missing: a folder, a csv file, or `sample`")
    else:
        out = given.out or Path("runs") / f"{_data_name(given.data)}-{given.method}-seed{given.seed}"
    try:
        config = None if given.resume is not None else RunConfig(**options)
        from ecan_fastai.runs import resume_run, start_run  # seconds of imports, after what can be told without them

        record = start_run(config, out) if config else resume_run(out, given.data)
    except (ValueError, OSError) as e:
        parser.exit(2, f"{parser.prog}: error: {printable(e)}\n")
    except KeyboardInterrupt:
        parser.exit(
            130,
            f"\n{parser.prog}: interrupted; finished epochs are in {out}, go on with: {parser.prog} --resume {out}\n",
        )
    _print_record(record, out)


# Trained models, and data


@contextmanager
def _one_sentence(parser):
    try:
        yield
    except (ValueError, OSError, ImportError) as e:
        parser.exit(2, f"{parser.prog}: error: {printable(e)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")


def _out(parser, file, *endings, flag="--out"):
    if file is not None and file.suffix not in endings:
        parser.error(f"{flag}: expected a name ending in {' or '.join(endings)}, got {file}")
    if file is not None and not file.parent.is_dir():
        parser.error(f"{flag}: no such folder: {file.parent}")


def _with_model(prog, about, example):
    p = _Parser(prog, description=about, epilog=f"Example: {example}")
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    p.add_argument(
        "--crops",
        choices=tuple(CROPS),
        help="views of an image whose outputs are averaged: the centre, it and its mirror image, five crops, or ten "
        "(default: as the run was evaluated)",
    )
    p.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    return p


@_script
def ecan_predict(args=None):
    "Label pictures with a trained model"
    p = _with_model(
        "ecan_predict",
        "Label pictures of faces, or with --faces the faces in photographs and video: a table, or a CSV or JSON file.",
        "ecan_predict runs/mine face.jpg more_faces/ --out labels.csv",
    )
    p.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image file, or folder of images, each a face as the model was trained on; "
        "with --faces also whole photographs and video",
    )
    p.add_argument("--faces", action="store_true", help="find the faces first (needs the extra `faces`): a row a face")
    p.add_argument(
        "--every",
        type=float,
        metavar="SECONDS",
        help="with --faces: time between the frames of a video that are looked at; default 1",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write every class's probability to FILE, .csv or .json, instead of printing a table",
    )
    given = p.parse_args(args)
    _out(p, given.out, ".csv", ".json")
    if given.every is not None and not given.faces:
        p.error("--every goes with --faces")
    with _one_sentence(p):
        from ecan_fastai.inference import Predictor, find_images
        from ecan_fastai.readers.records import write_csv

        predictor = Predictor(given.run, given.crops, given.device)
        if given.faces:
            table = _found_faces(predictor, given)
        else:
            files = [f for path in given.images for f in find_images(path)]
            table = predictor.predict(files, skip_broken=True)
        if given.out is None:
            _print_faces(table)
        elif given.out.suffix == ".csv":
            write_csv(table.round(5), given.out)
        else:
            given.out.write_text(table.round(5).to_json(orient="records", indent=1))
        if not given.faces and len(table) < len(files):
            p.exit(1, f"{p.prog}: {len(files) - len(table)} of {len(files)} images are left out\n")


def _found_faces(predictor, given):
    from ecan_fastai.detector import media_files

    files = [f for path in given.images for f in media_files(path)]
    table = predictor.predict_faces(files, every=1.0 if given.every is None else given.every)
    for f in files:
        if str(f) not in set(table["image"]):
            print(f"ecan_predict: no face found in {printable(f)}", file=sys.stderr)
    return table


def _print_faces(table):
    "Pixels as whole numbers, and no seconds where there is no video"
    if not len(table):
        return print("no face found")
    columns = [c for c in ("image", "second", "left", "top", "right", "bottom", "label", "probability") if c in table]
    box = {c: int for c in ("left", "top", "right", "bottom") if c in table}
    table = table[columns].assign(image=table["image"].map(printable))
    print(table.dropna(axis=1, how="all").astype(box).to_string(index=False, float_format="{:.3f}".format))


@_script
def ecan_evaluate(args=None):
    "Measure a trained model on labelled faces"
    p = _with_model(
        "ecan_evaluate",
        "Measure a model on labelled faces: accuracy, average accuracy and macro-F1 of each split.",
        "ecan_evaluate runs/mine path/to/rafdb --split test",
    )
    p.add_argument("data", metavar="DATA", help="folder or csv file of any kind that ecan_train takes")
    p.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="what DATA is")
    p.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="split to evaluate, may be repeated (default: all but train and valid, or all if there are no others)",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write the measures, per class too, to FILE.json")
    given = p.parse_args(args)
    _out(p, given.out, ".json")
    with _one_sentence(p):
        from ecan_fastai.inference import Predictor

        record = Predictor(given.run, given.crops, given.device).evaluate(given.data, given.kind, given.split)
        _print_evaluation(record)
        if given.out:
            given.out.write_text(json.dumps(record, indent=1))


def _print_evaluation(record):
    renamed = [f"{data} ({model})" if data != model else data for data, model in record["classes"].items()]
    print(f"classes of both: {', '.join(renamed)}")
    if record["left_out"]:
        print(
            "left out, because the model has no such class: "
            f"{', '.join(f'{n} {label}' for label, n in record['left_out'].items())}"
        )
    if record["unseen"]:
        print(f"classes of the model that the data does not have: {', '.join(record['unseen'])}")
    _print_splits({k: {**m, "eval_crops": record["crops"]} for k, m in record["splits"].items()})


@_script
def ecan_check(args=None):
    "Look at a data set before training on it"
    p = _Parser(
        "ecan_check",
        description="Counts of every class and split, broken images, and images that stand in a data set twice.",
        epilog="Example: ecan_check path/to/fer2013 --out pairs.csv --picture pairs.png",
    )
    p.add_argument("data", metavar="DATA", help="folder or csv file of any kind that ecan_train takes")
    p.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="what DATA is")
    p.add_argument(
        "--distance",
        type=int,
        default=2,
        metavar="BITS",
        help="bits of 64 in which the perceptual hashes of a near pair may differ; default 2",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write all pairs to FILE.csv")
    p.add_argument("--picture", type=Path, metavar="FILE", help="draw the first pairs across splits to FILE.png")
    given = p.parse_args(args)
    _out(p, given.out, ".csv")
    _out(p, given.picture, ".png", flag="--picture")
    with _one_sentence(p):
        from ecan_fastai.check import check_data, show_pairs
        from ecan_fastai.readers.records import write_csv

        report = check_data(given.data, given.kind, given.distance)
        _print_report(report)
        if given.out:
            write_csv(report.pairs.drop(columns=["a", "b"]), given.out)
        if given.picture and len(report.leaks):
            show_pairs(report).savefig(given.picture, dpi=110)
        elif given.picture:
            print("no pair across splits, so no picture")


def _print_report(report):
    print(report.counts.to_string())
    print(f"\n\n{len(report.broken)} broken images")
    for said in list(report.broken.values())[:10]:
        print(f"  {printable(said)}")
    print("\nPairs of images that are the same, or nearly (a near pair is a suspicion: look at it)")
    print(report.summary().to_string(index=False) if len(report.pairs) else "none")


# The paper's experiments


def _setting(text):
    "`key=value` as a setting of `RunConfig`, in the type that it has there"
    key, equals, value = text.partition("=")
    types = {
        k: v for k, v in setting_types(RunConfig).items() if k not in ("data", "kind", "seed")
    }  # which are options of their own
    if not equals or key not in types:
        raise argparse.ArgumentTypeError(f"expected SETTING=VALUE with a setting of ecan_train, got {text!r}")
    if types[key] is bool or key == "pretrained" and value in ("true", "false"):
        if value not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{key} is true or false, got {value!r}")
        return key, value == "true"
    try:
        return key, types[key](value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{key} is a number, got {value!r}") from None


@_script
def ecan_reproduce(args=None):
    "Make the runs of a table or figure, then the table or figure"
    p = _Parser(
        "ecan_reproduce",
        description="Reproduce a table or figure of the paper, or answer an open question: train the missing runs, "
        "then write the table, with the paper's numbers where it has some for that data, and the figure. "
        "Without EXPERIMENT: list what there is.",
        epilog="Example: ecan_reproduce table5 --data path/to/fer2013 --seeds 3",
    )
    p.add_argument(
        "experiment", nargs="?", metavar="EXPERIMENT", help="table2 to table5, figure3a to figure7, or a question"
    )
    p.add_argument("--data", metavar="DATA", help="folder or csv file of any kind that ecan_train takes, or `sample`")
    p.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="what DATA is")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each row; default 1")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="where runs, records and tables go; default runs/reproduce",
    )
    p.add_argument("--records", type=Path, metavar="DIR", help="where the records go; default DIR/records")
    p.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="a setting of ecan_train for all runs, as epochs=8; may be given again",
    )
    given = p.parse_args(args)
    if given.experiment is not None and given.data is None:
        p.error("--data is missing: the path of a data set, or `sample`")
    try:
        from ecan_fastai.experiments import EXPERIMENTS, reproduce

        if given.experiment is None:
            for name, e in EXPERIMENTS.items():
                print(f"{name:<14}{len(e['runs']):>3} runs a seed   {e['title']}")
            return
        table = reproduce(
            given.experiment,
            given.data,
            given.seeds,
            given.out,
            given.kind,
            given.records,
            lambda said: print(said, flush=True),
            **dict(given.set),
        )
        if not table.empty:
            print(f"\n{table.to_string()}")
    except (ValueError, OSError) as e:
        p.exit(2, f"{p.prog}: error: {printable(e)}\n")
    except KeyboardInterrupt:
        p.exit(130, f"\n{p.prog}: interrupted; the same command goes on from here\n")
