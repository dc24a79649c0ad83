import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from ecan_fastai import cli, runs
from ecan_fastai.cli import ecan_check, ecan_evaluate, ecan_predict, ecan_reproduce, ecan_train
from ecan_fastai.config import GROUPS, RunConfig, help_text, setting_types


@pytest.fixture
def started(monkeypatch):
    "What `ecan_train` would start or resume, instead of training"
    calls = []
    record = dict(splits={}, seconds=dict(median_epoch=1.0))
    monkeypatch.setattr(runs, "start_run", lambda cfg, out: calls.append((cfg, out)) or record)
    monkeypatch.setattr(runs, "resume_run", lambda out, data=None: calls.append((out, data)) or record)
    return calls


def fails(capsys, script, *args, code=2):
    "What a script says on its way out"
    with pytest.raises(SystemExit) as e:
        script(list(map(str, args)))
    said = capsys.readouterr().err.strip()
    assert e.value.code == code and "Traceback" not in said
    return said


def sections(text):
    "Help by the title of its group, in one line each"
    parts = re.split(r"\n\n(\w[\w ]*):\n", text)
    return {title: " ".join(body.split()) for title, body in zip(parts[1::2], parts[2::2])}


def test_help_has_every_setting_in_its_group(capsys):
    with pytest.raises(SystemExit):
        ecan_train(["--help"])
    groups = sections(capsys.readouterr().out)
    assert [g for g in groups if g in GROUPS] == list(GROUPS)
    for f in fields(RunConfig):
        flag = "DATA" if f.name == "data" else f"--{f.name.replace('_', '-')}"
        own = groups[f.metadata["group"]]
        assert re.search(rf"{flag}[ ,]", own) and "".join(help_text(f).split()) in "".join(own.split()), f.name
    assert "--out " in groups["run"] and "--resume " in groups["run"]


def typed(f):
    "An option of `ecan_train` with a value that is not the default, and that value"
    flag, of_type = f"--{f.name.replace('_', '-')}", setting_types(RunConfig)[f.name]
    if f.name == "pretrained":
        return [flag, "a.pth"], "a.pth"
    if of_type is bool:
        return [flag], True
    if f.metadata["choices"]:
        value = next(c for c in f.metadata["choices"] if c not in (f.default, "sample"))
    else:
        value = {int: 9, float: 0.5, str: "resnet34"}[of_type]
    return [flag, str(value)], value


@pytest.mark.parametrize("f", fields(RunConfig)[1:], ids=lambda f: f.name)
def test_every_option_arrives(f, started):
    args, value = typed(f)
    more = ["--small-size", "24"] if f.name == "small_pct" else []
    ecan_train(["faces", *args, *more])
    ((cfg, out),) = started
    others = {**asdict(RunConfig("faces")), f.name: value, **(dict(small_size=24) if more else {})}
    assert asdict(cfg) == others
    assert out == Path("runs") / f"faces-{cfg.method}-seed{cfg.seed}"


def test_options_that_are_not_typed_are_left_to_the_presets(started):
    ecan_train(["sample", "--out", "x"])
    ecan_train(["faces", "--no-center-features", "--pretrained"])
    assert started[0] == (RunConfig("sample"), Path("x"))
    assert (started[1][0].center_features, started[1][0].pretrained) == (False, True)


@pytest.mark.parametrize("more", [["--epochs", "3"], ["--seed", "0"], ["--out", "x"], ["--schedule", "one-cycle"]])
def test_resume_takes_no_option_not_even_with_its_default(capsys, started, more):
    assert "--resume takes all settings from the run's folder" in fails(capsys, ecan_train, "--resume", "r", *more)
    assert not started


def test_resume_takes_data_that_was_moved(started):
    ecan_train(["--resume", "r"])
    ecan_train(["faces", "--resume", "r"])
    assert started == [(Path("r"), None), (Path("r"), "faces")]


def test_a_reader_that_leaves_is_no_error(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as m:
        m.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as e, cli._one_sentence(cli._Parser("ecan_x")):
            print("what nobody reads")
    assert e.value.code == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "files,said",
    [
        ([], "no epoch was finished, and there is nothing to resume"),
        (["config.json"], "no epoch was finished; .* holds the settings, start over with: ecan_train --resume "),
        (["config.json", "checkpoint.pth"], "the finished epochs are in .*, resume with: ecan_train --resume "),
    ],
)
def test_an_interrupted_run_says_what_there_is(tmp_path, monkeypatch, capsys, files, said):
    out = tmp_path / "a run"
    out.mkdir()
    for name in files:
        (out / name).write_text("")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "start_run", stop)
    text = fails(capsys, ecan_train, "faces", "--out", out, code=130)
    assert re.search(said, text)
    if files:
        assert shlex.split(text.split("with: ")[1]) == ["ecan_train", "--resume", str(out)]
    else:
        assert "--resume" not in text


def test_nothing_is_printed_by_a_process_that_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(runs, "start_run", lambda cfg, out: None)
    ecan_train(["sample"])
    assert capsys.readouterr().out == ""


# ecan_reproduce


def test_commands_are_a_line_for_each_run_and_make_exactly_it(tmp_path, capsys, monkeypatch):
    from ecan_fastai import experiments

    monkeypatch.chdir(tmp_path)
    given = ["--data", "my faces", "--kind", "folder", "--seeds", "2", "--out", "o", "--records", "r"]
    ecan_reproduce(["affinity", *given, "--set", "epochs=3", "--set", "train_all=true", "--commands"])
    lines = capsys.readouterr().out.splitlines()
    plan = experiments.planned_runs("affinity", "my faces", 2, "folder", epochs=3, train_all=True)
    stems = [experiments.run_stem(cfg) for _, cfg in plan]
    assert [shlex.split(line)[-2:] for line in lines] == [["--only", stem] for stem in stems] and len(lines) == 4

    calls = []
    monkeypatch.setattr(experiments, "reproduce", lambda *a, **k: calls.append((a, k)) or experiments.pd.DataFrame())
    monkeypatch.chdir("/")  # a job may start anywhere
    script, *args = shlex.split(lines[1])
    assert Path(script).name == "ecan_reproduce"
    ecan_reproduce(args)
    (((name, data, seeds, out, kind, records, _, only), settings),) = calls
    assert (name, data, seeds, kind, only) == ("affinity", str(tmp_path / "my faces"), 2, "folder", stems[1])
    assert (out, records) == (tmp_path / "o", tmp_path / "r") and settings == dict(epochs=3, train_all=True)


def test_commands_train_nothing_and_name_weights_from_anywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for typed, printed in (("w.pth", tmp_path / "w.pth"), ("fer2013", "fer2013")):
        ecan_reproduce(["affinity", "--data", "sample", "--set", f"pretrained={typed}", "--commands"])
        assert f"pretrained={printed}" in shlex.split(capsys.readouterr().out.splitlines()[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args,said",
    [
        (
            ["affinity", "--data", "sample", "--only", "ecan-seed7"],
            "affinity has no run ecan-seed7; its runs: ecan-seed0",
        ),
        (["affinity", "--data", "sample", "--only", "x", "--commands"], "not allowed with argument"),
        (["--data", "sample", "--commands"], "EXPERIMENT is missing: --commands, --data has no effect without it"),
    ],
)
def test_wrong_arguments_of_reproduce(args, said, capsys):
    assert said in fails(capsys, ecan_reproduce, *args)


# The scripts that use a run


def test_a_run_is_asked_for(tmp_path, capsys):
    for script, more in ((cli.ecan_predict, ["x.png"]), (cli.ecan_evaluate, ["faces"])):
        assert "is not the folder of a finished run: no config.json" in fails(capsys, script, "--run", tmp_path, *more)


def test_a_run_in_the_place_of_images_is_told(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    for script in (cli.ecan_predict, cli.ecan_evaluate):
        assert f"{tmp_path} is the folder of a run: give it as --run {tmp_path}" in fails(capsys, script, tmp_path)


def test_what_is_read_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "people.csv"):
        (tmp_path / name).write_text("mine")
    for script, args, flag, file in (
        (cli.ecan_predict, ["a.png", "--heatmaps", "a.png"], "--heatmaps", "a.png"),
        (cli.ecan_predict, [".", "--heatmaps", "a.png"], "--heatmaps", "a.png"),
        (cli.ecan_check, [str(tmp_path), "--figure", "a.png"], "--figure", "a.png"),
        (cli.ecan_predict, ["a.png", "--faces", "--by", "people.csv", "--out", "people.csv"], "--out", "people.csv"),
        (cli.ecan_check, ["people.csv", "--out", str(tmp_path / "people.csv")], "--out", str(tmp_path / "people.csv")),
    ):
        assert f"{flag}: {file} is a file that is read, give another name" in fails(capsys, script, *args)
        assert (tmp_path / "a.png").read_text() == (tmp_path / "people.csv").read_text() == "mine"
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    assert "--out: no permission to write into ." in fails(capsys, cli.ecan_check, "people.csv", "--out", "b.csv")


@pytest.mark.parametrize(
    "script,args,said",
    [
        (
            cli.ecan_predict,
            ["--run", "run", "x.png", "--out", "t.txt"],
            "--out: expected a name ending in .csv or .json",
        ),
        (cli.ecan_predict, ["--run", "run", "x.png", "--out", "/no/where/t.csv"], "--out: no such folder: /no/where"),
        (cli.ecan_predict, ["--run", "run", "x.mp4", "--every", "2"], "--every has no effect without --faces"),
        (cli.ecan_evaluate, ["--run", "run", "x", "--out", "t.csv"], "--out: expected a name ending in .json"),
        (cli.ecan_check, ["x", "--figure", "t.csv"], "--figure: expected a name ending in .png"),
        (cli.ecan_check, ["/no/where"], "no such file or folder: /no/where"),
    ],
)
def test_wrong_arguments_of_the_others(script, args, said, capsys):
    assert said in fails(capsys, script, *args)


def test_scripts_are_installed_under_their_names():
    from configparser import ConfigParser

    ini = ConfigParser(delimiters=["="])
    ini.read(Path(__file__).parent.parent / "settings.ini")
    named = dict(line.split("=") for line in ini["DEFAULT"]["console_scripts"].split())
    assert named == {name: f"ecan_fastai.cli:{name}" for name in named} and all(hasattr(cli, name) for name in named)


def test_a_message_of_a_library_to_its_developers_is_not_shown():
    code = (
        "import warnings\nfrom ecan_fastai import cli\n@cli._script\ndef ecan_x(args):\n"
        "    warnings.warn('mine'); warnings.warn('theirs', DeprecationWarning)\necan_x()"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.stderr == "ecan_x: mine\n"


def test_the_record_is_printed(capsys):
    split = dict(n=7, accuracy=0.5, average_accuracy=0.25, macro_f1=0.125, eval_crops="center")
    cli._print_record(json.loads(json.dumps(dict(splits=dict(test=split), seconds=dict(median_epoch=2.0)))), "out")
    assert ["test", "7", "50.00%", "25.00%", "0.1250", "(center)"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


def test_a_port_is_a_port(capsys):
    assert "--port: expected a number from 1 to 65535, got 99999" in fails(capsys, cli.ecan_app, "--port", 99999)


@pytest.mark.parametrize(
    "command,args,said",
    [
        (ecan_train, ["", "--epochs", "1"], "the path of the data is empty"),
        (ecan_predict, [""], "expected a path, got an empty text"),
        (ecan_predict, ["a" * 300 + ".jpg"], "File name too long"),
    ],
)
def test_slips_of_the_fingers(tmp_path, monkeypatch, capsys, command, args, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        command(args)
    assert e.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_default_folder_of_a_run_has_the_whole_name_of_a_folder(tmp_path):
    (tmp_path / "faces.2024").mkdir()
    assert cli._data_name(tmp_path / "faces.2024") == "faces.2024" and cli._data_name(tmp_path / "a.b.csv") == "a.b"


def test_a_terminal_without_the_characters_of_a_name_does_not_end_a_command(faces, tmp_path):
    data = shutil.copytree(faces, tmp_path / "data")
    for split in ("train", "test"):
        (data / split / "happy").rename(data / split / "\u5f00\u5fc3")
    script = "from ecan_fastai.cli import ecan_check; ecan_check()"
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    ended = subprocess.run([sys.executable, "-c", script, str(data)], capture_output=True, env=env)
    assert ended.returncode == 0 and b"\\u5f00\\u5fc3" in ended.stdout and b"broken images" in ended.stdout


@pytest.mark.parametrize("command", [ecan_check, ecan_evaluate])
def test_an_empty_path_of_data_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command([""])
    assert "expected a path, got an empty text" in capsys.readouterr().err
