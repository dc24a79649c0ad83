import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import SMALL, small_config

from ecan_fastai import experiments, runs
from ecan_fastai.cli import ecan_reproduce
from ecan_fastai.config import RunConfig
from ecan_fastai.experiments import *
from ecan_fastai.readers.factory import read_faces
from ecan_fastai.readers.records import Face
from ecan_fastai.runfiles import read_json
from ecan_fastai.runs import resume_run, start_run
from ecan_fastai.runstate import Diverged
from ecan_fastai.weights import shipped_run


def quick_args(faces, out, *more):
    return [
        "--data",
        str(faces),
        "--out",
        str(out),
        *[a for k, v in SMALL.items() for a in ("--set", f"{k}={v}")],
        *more,
    ]


@pytest.mark.parametrize("kind", ["fer2013", "rafdb", "sample"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_list_of_valid_and_different_runs(name, kind):
    exp, runs = EXPERIMENTS[name], experiment_runs(name, "sample" if kind == "sample" else "x", kind)
    assert list(runs) == list(exp["runs"]) and exp["title"] and len({run_name(c) for c in runs.values()}) == len(runs)
    for c in runs.values():
        assert c.kind == kind
    for paper in exp.get("paper", {}).values():
        assert set(paper) <= set(runs) and all(len(v) == len(exp["measures"]) for v in paper.values())
    if "axis" in exp:
        assert [getattr(c, exp["axis"]) for c in runs.values()] == [float(label) for label in runs]


def test_the_papers_numbers():
    "A few by hand, from Tables 2, 3 and 5"
    assert EXPERIMENTS["table2"]["paper"]["fer2013"]["ECAN, strong"] == [73.73] and EXPERIMENTS["table2"]["paper"][
        "rafdb"
    ]["baseline, none"] == [85.69]
    assert EXPERIMENTS["table3"]["paper"]["rafdb"]["SupCon"] == [88.01, 79.45] and EXPERIMENTS["table5"]["paper"][
        "fer2013"
    ]["baseline, cosine"] == [72.33, 71.57]


def test_equal_runs_have_equal_names_and_different_ones_do_not():
    def name(**kw):
        return run_name(RunConfig("x", "fer2013", **kw).resolve())

    assert name() == name(l1=0.2, level="strong", workers=3, seed=5) == "ecan"
    assert name(l1=0) == name(l1=0.0) == "ecan-l1=0"
    assert name(l1=0.3, epochs=8) == "ecan-epochs=8-l1=0.3" and name(method="baseline") == "baseline"
    assert name(method="baseline", schedule="cosine") == "baseline-schedule=cosine"
    assert (
        name(pretrained="some/where/a.pth") == "ecan-pretrained=a.pth"
        and name(pretrained=True) == "ecan-pretrained=True"
    )


def test_a_setting_that_a_method_does_not_use_makes_no_other_run():
    a, b = [
        experiment_runs("table3", "x", "fer2013", **kw)
        for kw in ({}, dict(momentum=0.99, temperature=0.07, bank_groups=4))
    ]
    same = {k for k in a if run_name(a[k]) == run_name(b[k])}
    assert same == {"cross-entropy", "center"} and run_name(b["SupCon"]).endswith("temperature=0.07-momentum=0.99")
    assert b["cross-entropy"].momentum is None and b["SupCon"].bank_groups is None and b["ENSC"].bank_groups == 4
    with pytest.raises(ValueError, match="the setting that temperature varies has no effect with method=center"):
        experiment_runs("temperature", "x", "fer2013", method="center")
    with pytest.raises(ValueError, match="^no run of figure3a uses l2, n_groups$"):
        experiment_runs("figure3a", "x", "fer2013", l2=0.5, n_groups=7, lr=0.1)


def test_a_sweep_keeps_what_it_chooses_by():
    with pytest.raises(ValueError, match="chooses by the valid split, and train_all leaves none"):
        experiment_runs("figure3b", "x", "fer2013", train_all=True)


def test_table_shows_mean_deviation_and_number(tmp_path):
    rows = [
        ("cross-entropy", 0, "valid", 0.70, 0.60),
        ("cross-entropy", 1, "valid", 0.72, 0.64),
        ("center", 0, "valid", 0.5, 0.4),
        ("cross-entropy", 0, "test", 0.8, 0.7),
    ]
    table = experiment_table(
        "table3", pd.DataFrame(rows, columns=["label", "seed", "split", "accuracy", "average_accuracy"]), "rafdb"
    )
    assert (
        table.loc["cross-entropy", "valid: accuracy"] == f"71.00 ± {100 * np.std([0.7, 0.72], ddof=1):.2f} (2)"
        and table.loc["center", "valid: average accuracy"] == "40.00 (1)"
    )
    assert (
        table.loc["SupCon", "valid: accuracy"] == ""
        and table.loc["SupCon", "paper: average accuracy"] == "79.45"
        and table.loc["cross-entropy", "test: accuracy"] == "80.00 (1)"
    )


@pytest.mark.slow
def test_a_table_from_runs_is_what_the_runs_say(faces, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        EXPERIMENTS,
        "table3",
        {
            **EXPERIMENTS["table3"],
            "runs": {k: EXPERIMENTS["table3"]["runs"][k] for k in ("cross-entropy", "ENSC + MVA")},
        },
    )
    ecan_reproduce(["table3", *quick_args(faces, tmp_path, "--seeds", "2")])
    said = capsys.readouterr().out
    assert said.count("starts") == 4
    run = {
        m: [
            json.loads((tmp_path / "folder" / f"{p.name}" / "metrics.json").read_text())
            for p in sorted((tmp_path / "folder").glob(f"{m}-*"))
        ]
        for m in ("baseline", "ecan")
    }
    (written,) = tmp_path.glob("table3-folder-*epochs=1*.csv")
    table = pd.read_csv(written, index_col=0)
    for label, method in (("cross-entropy", "baseline"), ("ENSC + MVA", "ecan")):
        for split in ("valid", "test"):
            a = [100 * r["splits"][split]["average_accuracy"] for r in run[method]]
            assert table.loc[label, f"{split}: average accuracy"] == f"{np.mean(a):.2f} ± {np.std(a, ddof=1):.2f} (2)"
    assert np.isfinite([r["splits"]["test"]["key_encoder_accuracy"] for r in run["ecan"]]).all() and isinstance(
        table.loc["ENSC + MVA", "test: accuracy with the key encoder"], str
    )
    shown, folded = written.with_suffix(".md").read_text().split("<details>")
    assert shown.startswith("# Losses (Table 3): folder\n\nAccuracy in percent, one view of each image; mean ± ")
    assert "2 seeds." in shown and [l.count("|") for l in shown.splitlines() if "|" in l] == [4] * 4
    for said in ("epochs=1", "schedule=cosine", "without `valid`", "Commits: ", "Average accuracy, in percent"):
        assert said in folded
    # a second time: nothing runs, the same table
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "folder").rglob("*")}
    ecan_reproduce(["table3", *quick_args(faces, tmp_path, "--seeds", "2")])
    assert "starts" not in capsys.readouterr().out and before == {
        f: f.stat().st_mtime_ns for f in (tmp_path / "folder").rglob("*")
    }
    # records alone are enough for the table, and tell nothing of the machine's folders
    again = experiment_table(
        "table3",
        experiment_results(
            "table3", tmp_path / "records", "folder", **{k: v for k, v in SMALL.items() if k != "workers"}
        ),
        "folder",
    )
    assert again.fillna("").equals(table.fillna("").astype(str)) and str(tmp_path) not in "".join(
        f.read_text() for f in (tmp_path / "records").rglob("*.json")
    )
    # where the folders are gone, records count as runs
    ecan_reproduce(
        ["table3", *quick_args(faces, tmp_path / "elsewhere", "--seeds", "2", "--records", str(tmp_path / "records"))]
    )
    said = capsys.readouterr().out
    assert (
        said.count("done, by its record") == 4
        and "starts" not in said
        and pd.read_csv(tmp_path / "elsewhere" / written.name, index_col=0).equals(table)
    )
    ((name, results, kind, settings),) = recorded_experiments(tmp_path / "records")
    assert (
        experiment_table(name, results, kind).equals(again)
        and experiment_markdown(name, results, kind, **settings) == written.with_suffix(".md").read_text()
    )
    record = json.loads(next((tmp_path / "records").rglob("ecan*.json")).read_text())
    assert (
        len(record["history"]["accuracy"]) == 1
        and record["environment"]["torch"]
        and record["config"]["seed"] in (0, 1)
        and record["seconds"]
    )


def fake_record(records, cfg, seed=0, accuracy=0.5, **kw):
    "A record as `reproduce` writes it"
    file = records / cfg.kind / f"{run_name(cfg)}-seed{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = dict(
        config={**vars(cfg), "seed": seed},
        images=dict(train=90, valid=10),
        environment=dict(commit="a"),
        splits=dict(valid=dict(accuracy=accuracy, average_accuracy=accuracy, n=10)),
    )
    file.write_text(json.dumps({**record, **kw}))
    return file


def test_records_of_another_run_or_other_data_are_refused(tmp_path):
    cfg = experiment_runs("affinity", "x", "fer2013")["mean"]
    file = fake_record(tmp_path, cfg)
    assert len(experiment_results("affinity", tmp_path, "fer2013")) == 1
    other = experiment_runs("affinity", "x", "fer2013")["sum"]
    fake_record(tmp_path, other, images=dict(train=80, valid=10))
    with pytest.raises(
        ValueError, match="was made from other data than these runs: it has images .*80.*, these have .*90"
    ):
        experiment_results("affinity", tmp_path, "fer2013")
    fake_record(tmp_path, other)
    record = json.loads(file.read_text())
    file.write_text(
        json.dumps({**record, "config": {**record["config"], "epochs": 40}})
    )  # as if a preset had changed since
    with pytest.raises(ValueError, match="ecan-seed0.json is the record of a run with epochs 40, expected 200"):
        experiment_results("affinity", tmp_path, "fer2013")


def test_a_record_counts_as_a_run_only_of_the_same_data_and_settings(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "start_run", lambda cfg, folder: pytest.fail(f"{folder} was started"))
    given = dict(seeds=1, out=tmp_path, records=tmp_path / "r", say=lambda s: None)
    counted = Counter(f.split for f in read_faces(faces, "folder"))
    images = {"train": counted["train"] - 10, "valid": 10, "test": counted["test"]}
    files = [
        fake_record(tmp_path / "r", cfg, images=images) for cfg in experiment_runs("affinity", faces, "folder").values()
    ]
    assert list(reproduce("affinity", faces, **given)["valid: accuracy"]) == ["50.00 (1)"] * 2
    record = json.loads(files[1].read_text())
    files[1].write_text(json.dumps({**record, "images": {**images, "test": 7}}))
    with pytest.raises(
        ValueError, match="affinity_reduction=sum-seed0.json was made from other data: it has images .*'test': 7"
    ):
        reproduce("affinity", faces, **given)
    files[1].write_text(json.dumps({**record, "config": {**record["config"], "epochs": 3}}))
    with pytest.raises(ValueError, match="is the record of a run with epochs 3, expected 40"):
        reproduce("affinity", faces, **given)


def test_a_record_that_left_broken_images_out_may_have_fewer(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "start_run", lambda cfg, folder: pytest.fail(f"{folder} was started"))
    given = dict(seeds=1, out=tmp_path, records=tmp_path / "r", say=lambda s: None)
    for cfg in experiment_runs("affinity", faces, "folder", skip_broken=True).values():
        fake_record(tmp_path / "r", cfg, images=dict(train=50, valid=10, test=7))
    assert list(reproduce("affinity", faces, skip_broken=True, **given)["valid: accuracy"]) == ["50.00 (1)"] * 2


def test_a_folder_counts_as_a_run_only_of_the_same_settings_and_data(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "start_run", lambda cfg, folder: pytest.fail(f"{folder} was started"))
    resumed = []
    monkeypatch.setattr(experiments, "resume_run", lambda folder: resumed.append(folder.name))
    monkeypatch.setattr(experiments, "_save_record", lambda *a: None)
    ((_, cfg), *_) = planned_runs("affinity", str(faces), 1, "folder")
    folder = tmp_path / "folder" / run_stem(cfg)
    folder.mkdir(parents=True)

    def written(**changes):
        config = {**asdict(cfg), "workers": 5, **changes}
        (folder / "config.json").write_text(json.dumps(dict(config=config)))

    def again():
        experiments._train_run(cfg, folder, tmp_path / "r.json", lambda s: None)

    written()
    again()
    assert resumed == [folder.name]
    for name, other in dict(l1=0.3, data=str(tmp_path), method="ensc", epochs=3).items():
        written(**{name: other})
        with pytest.raises(ValueError, match=f"holds a run with {name} {other}, expected {getattr(cfg, name)}: choose"):
            again()
    assert resumed == [folder.name]


def test_a_picture_of_runs_needs_their_folders(faces, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(experiments, "start_run", lambda cfg, folder: started.append(cfg.method))
    monkeypatch.setattr(experiments, "_save_record", lambda *a: None)
    monkeypatch.setattr(experiments, "experiment_figure", lambda *a: None)
    for cfg in experiment_runs("figure7", faces, "folder").values():
        fake_record(tmp_path / "r", cfg)
    reproduce("figure7", faces, out=tmp_path, records=tmp_path / "r", say=lambda s: None)
    assert started == ["baseline", "ecan"]


def test_records_of_a_gpu_make_tables_without_one(tmp_path):
    for cfg in experiment_runs("affinity", "x", "fer2013", precision="bf16").values():
        fake_record(tmp_path, cfg, resumed=[dict(commit="b")])
    (tmp_path / "affinity.json").write_text(
        json.dumps(dict(name="affinity", kind="fer2013", settings=dict(precision="bf16")))
    )
    ((name, results, kind, settings),) = recorded_experiments(tmp_path)
    assert len(results) == 2 and "Commits: a, b." in experiment_markdown(name, results, kind, **settings)


def test_method_as_a_setting_is_what_the_table_is_of(tmp_path):
    for temperature, cfg in experiment_runs("temperature", "x", "fer2013").items():
        fake_record(tmp_path, cfg, accuracy=0.9)
    for temperature, cfg in experiment_runs("temperature", "x", "fer2013", method="supcon").items():
        fake_record(tmp_path, cfg, accuracy=0.1)
    table = experiment_table(
        "temperature", experiment_results("temperature", tmp_path, "fer2013", method="supcon"), "fer2013"
    )
    assert set(table["valid: accuracy"]) == {"10.00 (1)"}


def test_a_sweep_is_drawn_from_records_alone(tmp_path):
    for cfg in experiment_runs("momentum", "x", "fer2013").values():
        for seed in (0, 1):
            fake_record(tmp_path, cfg, seed, 0.5 + 0.1 * seed)
    (ax,) = experiment_figure("momentum", experiment_results("momentum", tmp_path, "fer2013"), "fer2013").axes
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "0.9",
        "0.99",
        "0.996",
        "0.999",
    ] and ax.get_title() == "fer2013, valid, 2 seeds"
    assert experiment_figure("figure7", pd.DataFrame(columns=["label", "split"]), "fer2013") is None
    results = experiment_results("momentum", tmp_path, "fer2013")
    assert experiment_figure("momentum", results[results.label == "0.99"], "fer2013") is None  # one point is no curve


def test_a_page_shows_accuracy_with_the_papers_beside_it_and_folds_the_rest(tmp_path):
    first, *others = experiment_runs("table5", "x", "fer2013").values()
    fake_record(tmp_path, first, accuracy=0.7)
    page = experiment_markdown("table5", experiment_results("table5", tmp_path, "fer2013"), "fer2013")
    shown, folded = page.split("<details>")
    assert "1 seed." in shown and "| baseline, cosine | 70.00 |" in shown and "| ECAN, cosine | – |" in shown
    assert "73.73" in shown and "73.25" in folded and "| ECAN, one-cycle |" not in page


def test_a_split_may_have_a_colon_in_its_name(tmp_path):
    cfg = experiment_runs("affinity", "x", "fer2013")["mean"]
    fake_record(tmp_path, cfg, splits={"test: a": dict(accuracy=0.5, average_accuracy=0.4, n=10)})
    page = experiment_markdown("affinity", experiment_results("affinity", tmp_path, "fer2013"), "fer2013")
    shown, folded = page.split("<details>")
    assert "|  | test: a |" in shown and "| mean | 50.00 |" in shown and "| mean | 40.00 |" in folded


def test_a_page_says_how_many_seeds_a_row_has(tmp_path):
    runs = experiment_runs("table5", "x", "fer2013")
    fake_record(tmp_path, runs["baseline, cosine"], seed=0)
    fake_record(tmp_path, runs["baseline, cosine"], seed=1)
    both = experiment_markdown("table5", experiment_results("table5", tmp_path, "fer2013"), "fer2013")
    fake_record(tmp_path, runs["ECAN, cosine"], seed=0)
    mixed = experiment_markdown("table5", experiment_results("table5", tmp_path, "fer2013"), "fer2013")
    assert "2 seeds." in both and "(2)" not in both
    assert "seeds in brackets" in mixed and "(2)" in mixed and "(1)" in mixed


def test_the_results_page_shows_what_the_records_say():
    from fastcore.nbio import read_nb
    from test_package import ROOT

    page = "".join(
        "".join(o["data"].get("text/markdown", ""))
        for c in read_nb(ROOT / "nbs" / "14_results.ipynb").cells
        for o in c.get("outputs", [])
        if "data" in o
    )
    for name, results, kind, settings in recorded_experiments(ROOT / "results" / "records"):
        assert experiment_markdown(name, results, kind, **settings).split("\n", 1)[1].strip() in page


def fake_run(monkeypatch, during=lambda folder: None):
    "Instead of training: the files of a finished run; returns the list of folders that were started"
    started = []

    def start(cfg, folder):
        started.append(folder)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(dict(config=vars(cfg), about=dict(images=dict(train=9)))))
        during(folder)
        scores = dict(accuracy=0.5, average_accuracy=0.5)
        metrics = dict(splits=dict(valid=scores), environment=dict(commit="a"))
        (folder / "history.csv").write_text("epoch\n0\n")
        (folder / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(experiments, "start_run", start)
    return started


HELD = (
    "import sys, time, pathlib\nfrom ecan_fastai.runfiles import lock_run\n"
    "lock = lock_run(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(600)"
)


@pytest.mark.slow
def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path, monkeypatch):
    "and the table is made of the runs that are finished; what is free again is taken"
    started, said = fake_run(monkeypatch), []
    stems = [run_stem(cfg) for _, cfg in planned_runs("affinity", "x", 2, "folder")]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HELD, str(tmp_path / "folder" / stems[0])], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        table = reproduce("affinity", "x", 2, tmp_path, "folder", say=said.append)
        assert [f.name for f in started] == stems[1:]
        assert f"{stems[0]}: left to another process, which is training it" in said
        assert list(table["valid: accuracy"]) == ["50.00 (1)", "50.00 ± 0.00 (2)"]
    finally:
        process.kill()
        process.wait()
    table = reproduce("affinity", "x", 2, tmp_path, "folder", say=said.append)
    assert [f.name for f in started[3:]] == stems[:1]
    assert list(table["valid: accuracy"]) == ["50.00 ± 0.00 (2)"] * 2


@pytest.mark.slow
def test_a_run_that_was_left_is_taken_when_it_is_free_again(tmp_path, monkeypatch):
    stems = [run_stem(cfg) for _, cfg in planned_runs("affinity", "x", 1, "folder")]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HELD, str(tmp_path / "folder" / stems[0])], stdout=subprocess.PIPE
    )

    def killed_meanwhile(folder):
        process.kill()
        process.wait()

    try:
        assert process.stdout.readline() == b"held\n"
        started, said = fake_run(monkeypatch, killed_meanwhile), []
        reproduce("affinity", "x", 1, tmp_path, "folder", say=said.append)
    finally:
        process.kill()
    assert [f.name for f in started] == stems[::-1] and not any("left to another" in text for text in said)


def test_figures_are_closed(tmp_path, monkeypatch):
    fake_run(monkeypatch)
    before = plt.get_fignums()
    reproduce("figure6", "sample", 1, tmp_path, say=lambda s: None)
    assert plt.get_fignums() == before and list(tmp_path.glob("figure6*.png"))


def test_one_run_alone(tmp_path, monkeypatch):
    started = fake_run(monkeypatch)
    stems = [run_stem(cfg) for _, cfg in planned_runs("affinity", "x", 2, "folder")]
    table = reproduce("affinity", "x", 2, tmp_path, "folder", say=lambda s: None, only=stems[3])
    assert [f.name for f in started] == [stems[3]] and list(table.index) == ["sum"]
    with pytest.raises(ValueError, match=f"affinity has no run ecan; its runs: {stems[0]}, "):
        reproduce("affinity", "x", 2, tmp_path, "folder", only="ecan")


def test_runs_that_start_from_a_run_of_ones_own_are_found_again(tmp_path, monkeypatch):
    "The weights bring arch, size, channels and recipe, and the records name their folder alone"
    started = fake_run(monkeypatch)
    mine = shutil.copytree(shipped_run(), tmp_path / "mine")
    table = reproduce("affinity", "x", 1, tmp_path, "folder", say=lambda s: None, pretrained=str(mine))
    assert list(table.index) == ["mean", "sum"] and "arch=resnet18_cifar" in started[0].name
    ((_, results, *_),) = recorded_experiments(tmp_path / "records")
    assert set(results["label"]) == {"mean", "sum"}


def test_a_run_that_diverges_does_not_hold_up_the_others(tmp_path, monkeypatch):
    def diverge(folder, data=None):
        if "sum" not in folder.name:
            raise Diverged("the training loss became nan")

    fake_run(monkeypatch, diverge)
    said, stems = [], [run_stem(cfg) for _, cfg in planned_runs("affinity", "x", 1, "folder")]
    table = reproduce("affinity", "x", 1, tmp_path, "folder", say=said.append)
    assert list(table.index) == ["sum"] and f"{stems[0]}: the training loss became nan" in said
    monkeypatch.setattr(experiments, "resume_run", diverge)
    with pytest.raises(Diverged):
        reproduce("affinity", "x", 1, tmp_path, "folder", say=said.append, only=stems[0])


def test_runs_that_all_diverge_are_an_error(tmp_path, monkeypatch):
    def diverge(folder):
        raise Diverged("the training loss became nan")

    fake_run(monkeypatch, diverge)
    said, stems = [], [run_stem(cfg) for _, cfg in planned_runs("affinity", "x", 1, "folder")]
    with pytest.raises(Diverged, match="the training loss became nan"):
        reproduce("affinity", "x", 1, tmp_path, "folder", say=said.append)
    assert [f"{stem}: the training loss became nan" for stem in stems] == [s for s in said if "nan" in s]


def test_a_row_that_changes_nothing_does_not_hold_up_the_others(tmp_path, monkeypatch):
    "Images of 32 pixels cannot begin smaller, at 32"
    started, said, given = fake_run(monkeypatch), [], dict(size=32, level="weak", workers=0, precision="fp32")
    fake = experiments.start_run
    monkeypatch.setattr(experiments, "start_run", lambda c, f: (start_run if c.small_size else fake)(c, f))
    table = reproduce("recipe", "sample", 1, tmp_path, say=said.append, **given)
    rows = {label: run_stem(cfg) for label, cfg in experiment_runs("recipe", "sample", **given).items()}
    small = rows.pop("ECAN, centred, 32 pixels first")
    assert {f.name for f in started} == set(rows.values()) and set(table.index) == set(rows)
    assert any(t.startswith(f"{small}: small_size must be below the 32 pixels that the network sees") for t in said)


def test_a_figure_waits_for_its_runs(tmp_path, monkeypatch, faces):
    fake_run(monkeypatch)
    said, stems = [], [run_stem(cfg) for _, cfg in planned_runs("figure7", faces, 1, "folder")]
    reproduce("figure7", faces, 1, tmp_path, "folder", say=said.append, only=stems[0])
    assert f"no figure yet: these runs are not finished: {stems[1]}" in said


def test_classes_named_by_numbers_have_a_confusion_matrix(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(about=dict(vocab=["0", "1", "NA"]))))
    pd.DataFrame(dict(image=["a", "b", "c"], label=["0", "1", "NA"], predicted=["0", "1", "1"])).to_csv(
        tmp_path / "predictions_test.csv", index=False
    )
    (ax,) = experiments._confusions({"run": tmp_path}, "test").axes
    assert ax.get_title() == "run: 66.67 % on test, seed 0"


def test_a_broken_run_folder_is_named(faces, tmp_path):
    folder = tmp_path / "folder" / f"{run_name(experiment_runs('affinity', faces, 'folder', **SMALL)['mean'])}-seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not a JSON file"):
        reproduce("affinity", faces, out=tmp_path, **SMALL)


@pytest.mark.slow
def test_runs_are_shared_between_experiments(faces, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        EXPERIMENTS, "affinity", {**EXPERIMENTS["affinity"], "runs": {"mean": {"affinity_reduction": "mean"}}}
    )
    monkeypatch.setitem(
        EXPERIMENTS, "figure3b", {**EXPERIMENTS["figure3b"], "runs": {"0.7": {"l2": 0.7}, "0.2": {"l2": 0.2}}}
    )
    ecan_reproduce(["affinity", *quick_args(faces, tmp_path), "--set", "schedule=cosine"])
    ecan_reproduce(["figure3b", *quick_args(faces, tmp_path)])
    assert capsys.readouterr().out.count("starts") == 2
    assert {f.suffix for f in tmp_path.glob("figure3b-folder*")} == {".md", ".csv", ".png"}


@pytest.fixture
def figures(monkeypatch):
    "Figures that an experiment draws, instead of being lost in a file"
    drawn, draw = [], experiments.experiment_figure
    monkeypatch.setattr(experiments, "experiment_figure", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    return drawn


def two_rows(name, monkeypatch):
    runs = EXPERIMENTS[name]["runs"]
    monkeypatch.setitem(EXPERIMENTS, name, {**EXPERIMENTS[name], "runs": {k: runs[k] for k in list(runs)[:2]}})


@pytest.mark.slow
def test_figure_5_maps_every_test_face_in_a_panel_a_loss(faces, tmp_path, figures, monkeypatch):
    two_rows("figure5", monkeypatch)
    monkeypatch.chdir(faces.parent)
    reproduce("figure5", faces.name, out=tmp_path, **{k: v for k, v in SMALL.items() if k != "momentum"})
    panels, n = figures[0].axes, len(list((faces / "test").rglob("*.png")))
    assert [ax.get_title() for ax in panels] == ["cross-entropy", "center"] and all(
        sum(len(c.get_offsets()) for c in ax.collections) == n for ax in panels
    )
    assert len(list(tmp_path.glob("figure5-folder*.png"))) == 1


def test_figure_6_counts_train(faces, tmp_path, figures):
    reproduce("figure6", faces, out=tmp_path)
    (ax,) = figures[0].axes
    assert not list(tmp_path.glob("*.md"))
    assert {l.get_text(): int(t.get_text()) for l, t in zip(ax.get_xticklabels(), ax.texts)} == {
        c.name: len(list(c.iterdir())) for c in (faces / "train").iterdir()
    }


@pytest.mark.slow
def test_figure_7_shows_the_accuracies_of_the_table(faces, tmp_path, figures):
    table = reproduce("figure7", faces, out=tmp_path, **SMALL)
    assert [ax.get_title() for ax in figures[0].axes] == [
        f"{label}: {table.loc[label, 'test: accuracy'].split()[0]} % on test, seed 0" for label in ("baseline", "ECAN")
    ]


def test_a_picture_of_a_test_split_needs_one_and_says_so_before_training(faces, tmp_path):
    for name in ("figure5", "figure7"):
        with pytest.raises(ValueError, match=f"{name} needs a test split, and .* has none"):
            reproduce(name, faces / "train", out=tmp_path / "out", **SMALL)
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.slow
def test_a_run_of_other_data_or_settings_is_refused(faces, tmp_path, monkeypatch):
    two_rows("affinity", monkeypatch)
    reproduce("affinity", faces, out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match=f"holds a run with data {faces}, expected {faces / 'train'}"):
        reproduce("affinity", faces / "train", out=tmp_path, **SMALL)
    file = next(tmp_path.rglob("config.json"))
    file.write_text(file.read_text().replace('"l2": 0.7', '"l2": 0.6'))
    with pytest.raises(ValueError, match="config.json is not as the run wrote it"):
        reproduce("affinity", faces, out=tmp_path, **SMALL)
    (file.parent / "SHA256SUMS").unlink()  # as in a folder of an earlier version
    with pytest.raises(ValueError, match="holds a run with l2 0.6, expected 0.7"):
        reproduce("affinity", faces, out=tmp_path, **SMALL)


@pytest.mark.slow
def test_two_commands_share_the_runs_and_a_killed_one_loses_nothing(faces, tmp_path):
    args = [
        sys.executable,
        "-c",
        "import sys; from ecan_fastai.cli import ecan_reproduce; ecan_reproduce(sys.argv[1:])",
        "affinity",
        *quick_args(faces, tmp_path, "--seeds", "2"),
        *["--set", "epochs=4"],
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, other = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    try:
        first, second = [process.stdout.readline().split(":")[0] for process in (killed, other)]
        assert first != second
        while not (tmp_path / "folder" / first / "history.csv").exists():
            assert killed.poll() is None
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        before = killed.communicate()[0]
        after = other.communicate(timeout=500)[0]
    finally:
        killed.kill()
        other.kill()
    # the other command took the run that was free again, from the epoch that was finished
    assert other.returncode == 0 and f"{first}: resumes" in after and f"{first}: starts" not in after
    assert (before + after).count(": starts") == 2  # and the two whose lines were read above
    assert all(list(pd.read_csv(f).epoch) == [0, 1, 2, 3] for f in tmp_path.rglob("history.csv"))
    assert len(list(tmp_path.rglob("metrics.json"))) == len(list((tmp_path / "records" / "folder").iterdir())) == 4
    (table,) = tmp_path.glob("affinity-folder*.csv")
    assert pd.read_csv(table, index_col=0)["test: accuracy"].str.endswith("(2)").all()
    assert not list(tmp_path.rglob(".part-*"))


@pytest.mark.slow
def test_watching_the_tests_changes_nothing_but_the_record(faces, tmp_path):
    from ecan_fastai.runs import start_run

    def run(out, **kw):
        return start_run(small_config(faces, epochs=3, **kw), tmp_path / out)

    a, b = run("a"), run("b", watch_tests=True)
    history = pd.read_csv(tmp_path / "b" / "history.csv")
    best = b["splits"]["test"].pop("accuracy_of_best_epoch_chosen_on_this_split")
    assert (
        a["splits"] == b["splits"]
        and best == pytest.approx(history["test_accuracy"].max())
        and history["test_accuracy"].iloc[-1] == pytest.approx(a["splits"]["test"]["accuracy"])
    )


@pytest.mark.parametrize(
    "args,said",
    [
        (["table9", "--data", "sample"], "no experiment 'table9'"),
        (["table3"], "--data is missing"),
        (["table3", "--data", "/nowhere"], "no such"),
        (["table3", "--data", "sample", "--seeds", "0"], "at least one seed"),
        (["figure3a", "--data", "sample", "--set", "l1=0.3"], "varies l1 itself"),
        (["table3", "--data", "sample", "--set", "epoch=3"], "a setting of ecan_train"),
        (["table3", "--data", "sample", "--set", "epochs=many"], "epochs must be a whole number"),
        (["table3", "--data", "sample", "--set", "train_all=1"], "true or false"),
        (
            ["figure6", "--data", "sample", "--set", "epochs=8"],
            "figure6 has no runs: settings and seeds have no effect",
        ),
        (["figure6", "--data", "sample", "--seeds", "2"], "figure6 has no runs: settings and seeds have no effect"),
    ],
)
def test_what_is_wrong_is_said(args, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        ecan_reproduce([*args, "--out", str(tmp_path / "out")])
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_the_list(capsys):
    ecan_reproduce([])
    said = capsys.readouterr().out
    assert all(name in said for name in EXPERIMENTS) and "5 runs a seed   Losses (Table 3)" in said


def test_weights_of_two_runs_have_two_names():
    names = [
        run_name(RunConfig("x", "fer2013", pretrained=f"/{run}/model.safetensors").resolve()) for run in ("ann", "bob")
    ]
    assert names == ["ecan-pretrained=ann", "ecan-pretrained=bob"]
    assert run_name(RunConfig("x", "fer2013", pretrained="/a/face.pth").resolve()) == "ecan-pretrained=face.pth"


@pytest.mark.parametrize(
    "text,said", [("{", "is not whole"), ('{"a": 1}', "no config in it"), ("[]", "no config in it")]
)
def test_a_record_that_is_none_is_named(tmp_path, text, said):
    (cfg, *_) = experiment_runs("affinity", "x", "fer2013").values()
    fake_record(tmp_path, cfg)
    (file,) = (tmp_path / "fer2013").iterdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file.name} .*{said}"):
        experiment_results("affinity", tmp_path, "fer2013")
    (tmp_path / "foo.json").write_text("{}")
    with pytest.raises(ValueError, match="foo.json is not the record of an experiment: no name in it"):
        list(recorded_experiments(tmp_path))
    (tmp_path / "foo.json").rename(tmp_path / ".part-foo.json")  # as a killed process leaves it
    assert list(recorded_experiments(tmp_path)) == []
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(recorded_experiments(tmp_path / "nowhere"))


def test_a_record_counts_only_for_the_weights_that_its_run_started_from(faces, tmp_path, monkeypatch):
    "Two files of one name, and records made from one of them"
    files = [tmp_path / name / "best.pth" for name in "ab"]
    for i, file in enumerate(files):
        file.parent.mkdir()
        torch.save(dict(w=torch.full((2,), float(i))), file)
    cfg = small_config(faces, kind="folder", pretrained=str(files[0]))
    monkeypatch.setattr(runs, "run_learner", lambda *args: None)
    monkeypatch.setattr(runs, "_train", lambda *args: None)
    start_run(cfg, tmp_path / "run")
    sha256 = read_json(tmp_path / "run" / "config.json")["about"]["pretrained_sha256"]
    assert sha256 == hashlib.sha256(files[0].read_bytes()).hexdigest()
    monkeypatch.setattr(experiments, "start_run", lambda cfg, folder: pytest.fail(f"{folder} was started"))
    counted = Counter(f.split for f in read_faces(faces, "folder"))
    images = {"train": counted["train"] - 10, "valid": 10, "test": counted["test"]}
    given = dict(out=tmp_path, records=tmp_path / "r", say=lambda s: None)
    for each in experiment_runs("affinity", faces, "folder", pretrained=str(files[0])).values():
        record = json.loads((file := fake_record(tmp_path / "r", each, images=images)).read_text())
        record["config"]["pretrained"] = "best.pth"
        file.write_text(json.dumps({**record, "pretrained_sha256": sha256}))
    assert list(reproduce("affinity", faces, pretrained=str(files[0]), **given)["valid: accuracy"]) == ["50.00 (1)"] * 2
    with pytest.raises(ValueError, match="started from other weights than .*b/best.pth"):
        reproduce("affinity", faces, pretrained=str(files[1]), **given)
    other = {**json.loads(file.read_text()), "pretrained_sha256": "0" * 64}
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="was made from other weights than these runs"):
        experiment_results("affinity", tmp_path / "r", "folder", pretrained="best.pth")


def test_a_run_is_neither_resumed_nor_counted_with_weights_that_changed(faces, tmp_path, monkeypatch):
    weights = tmp_path / "best.pth"
    torch.save(dict(w=torch.zeros(2)), weights)
    ((_, cfg), *_) = planned_runs("affinity", str(faces), 1, "folder", pretrained=str(weights))
    monkeypatch.setattr(runs, "run_learner", lambda *args: None)
    monkeypatch.setattr(runs, "_train", lambda *args: None)
    folder = tmp_path / "folder" / run_stem(cfg)
    start_run(cfg, folder)
    resume_run(folder)
    torch.save(dict(w=torch.ones(2)), weights)
    with pytest.raises(ValueError, match="started from other weights than .*best.pth holds now"):
        resume_run(folder)
    with pytest.raises(ValueError, match="started from other weights than .*best.pth holds now"):
        reproduce("affinity", faces, out=tmp_path, pretrained=str(weights), say=lambda s: None)
    weights.unlink()  # a finished run needs them no more
    about = read_json(folder / "config.json")["about"]
    runs.check_start(about, cfg, folder)
    monkeypatch.setattr("ecan_fastai.weights.find_spec", lambda name: None)  # nor an extra
    runs.check_start(about, replace(cfg, pretrained="imagenet"), folder)


def test_records_of_other_labels_are_not_put_into_one_table(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run_learner", lambda *args: None)
    monkeypatch.setattr(runs, "_train", lambda *args: None)
    shutil.copytree(faces, tmp_path / "faces")

    def checksum(name, **settings):
        start_run(small_config(tmp_path / "faces", kind="folder", **settings), tmp_path / name)
        return read_json(tmp_path / name / "config.json")["about"]["data_sha256"]

    same = {checksum("a"), checksum("b", seed=1), checksum("c", train_all=True), checksum("d", method="baseline")}
    happy = min((tmp_path / "faces" / "train" / "happy").iterdir())
    happy.rename(tmp_path / "faces" / "train" / "sad" / happy.name)
    assert len(same) == 1 and checksum("e") not in same
    for cfg, sha256 in zip(experiment_runs("affinity", "x", "fer2013").values(), "ab"):
        fake_record(tmp_path / "r", cfg, data_sha256=sha256)
    with pytest.raises(ValueError, match="was made from other images, labels or splits than these runs"):
        experiment_results("affinity", tmp_path / "r", "fer2013")


def test_a_figure_of_runs_needs_their_folders():
    faces = [Face("a.png", "happy", "test")]
    for name in ("figure5", "figure7"):
        assert experiment_figure(name, pd.DataFrame(dict(split=[])), "fer2013", faces) is None
