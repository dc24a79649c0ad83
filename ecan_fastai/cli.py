"Console scripts, thin: arguments in, one clear sentence out where something is wrong."
import argparse
import sys
import warnings
from dataclasses import fields
from pathlib import Path

from ecan_fastai.config import CHOICES, RunConfig

HELP = dict(
    kind="what DATA is", method="the paper's method, its baseline, or a row of its Table 3", arch="name of a timm model", pretrained="timm's pretrained weights",
    epochs="epochs (sample 12, FER2013 200, other data 40)", bs="batch size (sample 32, else 256, less for small data)", lr="highest learning rate (paper: 0.1 at batch 256, in proportion; adam: 0.002)",
    wd="weight decay (paper 5e-4, adam 1e-2)", opt="optimizer: the paper's SGD, or Adam (sample adam, else paper)", schedule="learning rate schedule",
    size="side in pixels (sample and FER2013 48, other data 224)", channels="1 grey, 3 colour (sample and FER2013 1, other data 3)",
    level="augmentation level of the paper's Table 1 (sample weak, else strong)", recipe="column of Table 1 (sample and FER2013 fer2013, other data rafdb)",
    all_crops="train on all five crops of FiveCrop, not on a random one", eval_crops="evaluate on the centre crop, or on the mean over five or ten",
    l1="share of the contrastive loss (lambda 1)", l2="weight of the MVA or center loss (lambda 2; 0.7, center 0.003)", n_groups="feature groups of MVA (V)", temperature="temperature of the contrastive loss",
    momentum="momentum of the key encoder (sample 0.99, else 0.999)", bank_groups="batches that the memory bank holds (K)", affinity_reduction="affinity loss as mean, or as the literal sum of Eq. 8",
    valid_pct="share of train held out, where the data has no valid split", train_all="train on that share too; it is then reported as seen", skip_broken="go on without images that cannot be read",
    seed="seed of everything", precision="fp16 and bf16 need a GPU", workers="loader processes (default: one a core, 16 at most)")

def _parser(config, choices):
    p = argparse.ArgumentParser("ecan_train", description="Train a facial-expression model and write a run folder: configuration, history, metrics, predictions, pictures, weights, exported learner.",
                                epilog="Example: ecan_train sample")
    p.add_argument("data", nargs="?", metavar="DATA", help="folder or csv file, or `sample` for faces that the package draws itself")
    p.add_argument("--out", type=Path, help="folder of the run (default runs/<data>-<method>-seed<seed>)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with the interrupted run in this folder; takes no other option")
    for f in fields(config)[1:]:
        flag, default = f"--{f.name.replace('_', '-')}", f"; default {f.default}" if f.default is not None and f.type is not bool else ""
        if f.type is bool: kind = dict(action="store_true")
        elif f.name in choices: kind = dict(type=f.type, default=f.default, choices=choices[f.name])
        else: kind = dict(type=f.type, default=f.default, metavar=f.type.__name__.upper())
        p.add_argument(flag, help=HELP[f.name] + default, **kind)
    return p

def _print_record(record, out):
    print(f"\n{'split':<14}{'images':>8}{'accuracy':>11}{'average':>10}{'macro-F1':>10}   (evaluation crops)")
    for name, m in record["splits"].items():
        print(f"{name:<14}{m['n']:>8}{100*m['accuracy']:>10.2f}%{100*m['average_accuracy']:>9.2f}%{m['macro_f1']:>10.4f}   ({m['eval_crops']})")
    print(f"\nmedian epoch {record['seconds']['median_epoch']:.1f} s; everything is in {out}")

def ecan_train(args=None):
    "Train a model and write a run folder"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # libraries' notes to their own developers, at import
        warnings.showwarning = lambda message, category, *_, **__: print(f"ecan_train: {message}", file=sys.stderr) if category is UserWarning else None
        _ecan_train(args)

def _ecan_train(args):
    parser = _parser(RunConfig, CHOICES)
    given = parser.parse_args(args)
    options = {k: v for k, v in vars(given).items() if k not in ("out", "resume")}
    if given.resume is not None:
        if given.out is not None or any(options[k] != parser.get_default(k) for k in options): parser.error("--resume takes the whole configuration from the run's folder: give no other option with it")
        out = given.resume
    elif given.data is None: parser.error("DATA is missing: a folder, a csv file, or `sample`")
    else: out = given.out or Path("runs")/f"{'sample' if given.data == 'sample' else Path(given.data).resolve().stem}-{given.method}-seed{given.seed}"
    try:
        config = None if given.resume is not None else RunConfig(**options)
        from ecan_fastai.runs import resume_run, start_run  # seconds of imports, after what can be told without them
        record = start_run(config, out) if config else resume_run(out)
    except (ValueError, OSError) as e: parser.exit(2, f"{parser.prog}: error: {e}\n")
    except KeyboardInterrupt: parser.exit(130, f"\n{parser.prog}: interrupted; finished epochs are in {out}, go on with: {parser.prog} --resume {out}\n")
    _print_record(record, out)
